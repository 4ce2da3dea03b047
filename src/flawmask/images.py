"""The one image reader of every stage, and the one writer.

Pillow decodes, because it refuses a truncated file of any kind (OpenCV 5 returns a full-size image for a
truncated JPEG), knows every container's EXIF orientation and prints nothing. Of colours of 16 bits it keeps 8: where
it has read such a file, OpenCV reads the other 8.
"""

import ctypes
import hashlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from mimetypes import MimeTypes
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeAlias, TypeGuard

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from flawmask.errors import FlawmaskError, ImageError
from flawmask.files import is_junk, write_bytes
from flawmask.launch import is_own_process

if TYPE_CHECKING:
    import torch

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})

READABLE = SUFFIXES | {".webp", ".jfif", ".jp2", ".gif"}
"""Of the files that `predict` finds in folders. A file of several pictures is refused, as an animation is."""

NO_IMAGES = frozenset({".cache", ".ckpt", ".db", ".onnx", ".pkl", ".pt", ".pth", ".safetensors", ".sqlite"})
"""Suffixes of what programs write beside images: `labels.cache` of YOLO, and checkpoints."""

_TYPES = MimeTypes()  # Python's own table: what the machine adds to it differs from one to the next

PROGRAMS = ("EPS", "WMF")
"""What Pillow would let another program draw. No such file is a photograph."""

LIMIT = "FLAWMASK_MAX_PIXELS"
"""The environment variable that says how many pixels an image may have."""

Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]

Levels: TypeAlias = tuple[int, int]
"""What becomes black and what becomes white, of values of more than 8 bits. One pair holds for a whole data set."""

UPPER_BITS: Levels = (0, 65535)
"""By these, 16-bit values keep their upper 8 bits: as of files that use all 16."""

CLIPPED = 0.01
"""So large a share of an image's values may lie outside the levels."""

STRIP = 2**22
"""So many pixels are converted at a time: a large image is not held in memory once more."""

Source: TypeAlias = "str | Path | Image.Image | npt.NDArray[Any] | torch.Tensor"
"""What `pixels_of` makes an image of."""

Colour = Literal["rgb", "bgr"]

ACCEPTED = (
    "an image is a file's path, a picture of Pillow's, an array (height, width) or (height, width, channels), or a "
    "tensor (height, width) or (channels, height, width), with 1, 3 or 4 channels of uint8 or uint16, or of floats "
    "from 0 to 1"
)


@cache
def most_pixels() -> int:
    """Return how many pixels an image may have: a file of some kilobytes can hold billions of them.

    Raises:
        FlawmaskError: the environment variable says no number.
    """
    given = os.environ.get(LIMIT) or str(2 * 89_478_485)  # at twice of which Pillow refuses an image
    if not given.isdecimal() or not int(given):
        raise FlawmaskError(f"the environment variable {LIMIT} is {given!r}: it must be a number of pixels")
    if is_own_process():
        Image.MAX_IMAGE_PIXELS = int(given)  # Pillow warns at once, which is not shown here
        # Pillow warns of odd metadata; the pixels are what counts. (`warnings.catch_warnings` around each decode would
        # not do: images are read by many threads, and it is one list of filters that they would put back in any order.)
        warnings.filterwarnings("ignore", module=r"PIL\.")
    return int(given)


def is_image(path: Path) -> bool:
    """Return whether the file's name says that it is an image; hidden files are not, nor is other junk."""
    return path.suffix.lower() in SUFFIXES and not is_junk(path.name)


def is_readable(path: Path) -> bool:
    """Return whether the file's name says that it is an image of one of the kinds that `predict` takes from folders."""
    return path.suffix.lower() in READABLE and not path.name.startswith(".")


def may_be_image(path: Path) -> bool:
    """Return whether a person might take the file for an image: its suffix says so, or nobody knows the suffix and it
    holds no text."""
    if path.suffix.lower() in NO_IMAGES:
        return False
    kind, packed = _TYPES.guess_type(f"file{path.suffix.lower()}", strict=False)
    if kind is not None or packed is not None:
        return (kind or "").startswith(("image/", "video/", "application/dicom", "application/octet-stream"))
    if not path.is_file():  # a pipe, which hangs who opens it
        return True
    try:
        with path.open("rb") as file:
            return b"\0" in file.read(1024)  # as in no text but UTF-16
    except OSError:
        return True


@dataclass(frozen=True)
class Parts:
    """What an image file holds, each part upright and (height, width) but for colours.

    Attributes:
        colour: what `decode` returns.
        alpha: uint8, how opaque each pixel is, 0 to 255; None where the file says nothing of it.
        palette: uint8, the number of each pixel's colour in the file's palette; None where it has none.
        orientation: by Exif, 1 to 8, of the pixels as they are stored; None where the file says nothing of it.
    """

    colour: Pixels
    alpha: npt.NDArray[np.uint8] | None
    palette: npt.NDArray[np.uint8] | None
    orientation: int | None


def decode(data: bytes, path: Path) -> Pixels:
    """Return the pixels that the bytes of an image file hold, turned upright by their Exif orientation (CIPA DC-008).

    Args:
        data: the whole file.
        path: where it came from, for the message.

    Returns:
        Grey images as (height, width), all others as (height, width, 3) RGB: uint8, or uint16 where the file holds more
        than 8 bits. Transparency is dropped.

    Raises:
        ImageError: not an image, truncated, several images, with more pixels than `most_pixels()`, with values beyond
            0 to 65535 or that are no whole numbers.
    """
    return _decoded(io.BytesIO(data), path).colour


def decode_parts(data: bytes, path: Path) -> Parts:
    """Return what `decode` returns together with what else a file may hold.

    Raises:
        ImageError: see `decode`.
    """
    return _decoded(io.BytesIO(data), path, wants_all=True)


def _decoded(file: BinaryIO, path: Path, page: int | None = None, *, wants_all: bool = False) -> Parts:
    """Return what `decode_parts` does.

    Args:
        file: the image file, open.
        path: where it lies.
        page: which of a file's images is read, from 1; None for its only one.
        wants_all: whether alpha channel and palette are wanted.
    """
    limit = most_pixels()
    try:
        with Image.open(file) as picture:
            _turn_to(picture, page, path)
            if picture.width * picture.height > limit:
                raise Image.DecompressionBombError
            if picture.format in PROGRAMS:
                raise ImageError(f"{path} is {picture.format}, which holds no pixels: export it as PNG")
            deep = _raw_mode(picture)
            orientation = _orientation(picture)
            ImageOps.exif_transpose(picture, in_place=True)  # each copy costs a tenth of decoding a PNG
            pixels = _pixels_in(picture, str(path))
            if ";16" in deep:
                pixels = _deep_colours(file, page or 1, orientation or 1, pixels, path)
                pixels = pixels[:, :, 0] if deep.startswith("L") else pixels
            return Parts(pixels, *(_alpha_and_palette(picture) if wants_all else (None, None)), orientation)
    except ImageError:
        raise
    except Image.DecompressionBombError:
        # In a program of others, Pillow's own limit holds, too.
        pillows = limit if is_own_process() else 2 * (Image.MAX_IMAGE_PIXELS or limit)
        where = f"the environment variable {LIMIT}" if limit <= pillows else "PIL.Image.MAX_IMAGE_PIXELS"
        raise ImageError(
            f"{path} has more than {min(limit, pillows) // 10**6} million pixels: if it is meant to be so large, raise "
            f"the limit by {where}"
        ) from None
    except Exception as error:  # Pillow's plugins raise whatever a damaged file makes them trip over
        reason = str(error).split("<_io")[0].strip() or type(error).__name__
        raise ImageError(f"{path} cannot be read as an image ({reason}): replace it or take it out") from None


def is_deep(path: Path) -> bool:
    """Return whether a file holds values of more than 8 bits, by its header alone.

    Raises:
        ImageError: it cannot be opened, or is no image.
    """
    most_pixels()  # and with it, what Pillow warns of
    try:
        with Image.open(path) as picture:
            return picture.mode.startswith("I") or ";16" in _raw_mode(picture)
    except Exception as error:  # whatever Pillow's plugins trip over
        raise ImageError(f"{path} cannot be read as an image ({type(error).__name__})") from None


def _raw_mode(picture: Image.Image) -> str:
    """Return what Pillow calls the order and depth of the colours in the file, `RGB;16B` say; nothing of grey
    pictures, or where it keeps that to itself."""
    if picture.mode not in ("RGB", "RGBA", "LA"):
        return ""
    tiles = getattr(picture, "tile", None) or ()
    arguments = tiles[0][3] if tiles else ()
    first = arguments if isinstance(arguments, str) else next(iter(arguments or ()), "")
    if picture.format == "TIFF" and max(getattr(picture, "tag_v2", {}).get(BITS_PER_SAMPLE, (8,))) > 8:
        return f"{picture.mode};16"  # of colours that lie in planes, Pillow names one
    return first if isinstance(first, str) else ""


def _deep_colours(file: BinaryIO, page: int, turn: int, upper: Pixels, path: Path) -> npt.NDArray[np.uint16]:
    """Return 16-bit colours with all their bits, (height, width, 3) RGB, as OpenCV reads them.

    Args:
        file: the image file.
        page: which of its images, from 1.
        turn: its Exif orientation.
        upper: (height, width, 3), the upper 8 bits, upright, as Pillow has read them: both must agree.
        path: where it lies.

    Raises:
        ImageError: they do not, as where colours lie in planes.
    """
    file.seek(0)
    data = np.frombuffer(file.read(), np.uint8)
    _, found = cv2.imdecodemulti(data, cv2.IMREAD_UNCHANGED, range=(page - 1, page))
    if found and found[0].dtype == np.uint16 and found[0].ndim == 3 and found[0].shape[2] in (3, 4):
        values = found[0]
        for top, bottom in _strips(*values.shape[:2]):  # in place: each copy of a large image is dear
            values[top:bottom, :, :3] = values[top:bottom, :, 2::-1]
        colours = np.ascontiguousarray(turned(values[:, :, :3], turn))
        strips = list(_strips(*upper.shape[:2]))
        if colours.shape == upper.shape and all(np.array_equal(colours[a:b] >> 8, upper[a:b]) for a, b in strips):
            return colours
    raise ImageError(f"{path} holds 16-bit colours in a way that cannot be read for sure: export it as a PNG")


TURNS: dict[int, Callable[[npt.NDArray[Any]], npt.NDArray[Any]]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90,
}
"""What makes upright pixels of stored ones, by Exif orientation."""

ORIENTATION = 0x0112
BITS_PER_SAMPLE, WHITE_IS_ZERO = 258, 262
"""Tags of TIFF 6.0; the last one's value 0 says that 0 is white."""
SAMPLE_FORMAT, SIGNED = 339, 2
"""A tag of TIFF 6.0, and its value for numbers with a sign."""


def turned(pixels: npt.NDArray[Any], orientation: int) -> npt.NDArray[Any]:
    """Return stored pixels upright, by an Exif orientation; a view of them where that will do."""
    return TURNS[orientation](pixels) if orientation in TURNS else pixels


def _orientation(picture: Image.Image) -> int | None:
    found = picture.getexif().get(ORIENTATION)
    return found if found in range(1, 9) else None


def _alpha_and_palette(
    picture: Image.Image,
) -> tuple[npt.NDArray[np.uint8] | None, npt.NDArray[np.uint8] | None]:
    may_be_clear = picture.mode in ("1", "L", "P", "RGB") and "transparency" in picture.info
    has_alpha, has_palette = picture.mode.endswith(("A", "a")) or may_be_clear, picture.mode in ("P", "PA")
    alpha = np.array(picture.convert("RGBA").getchannel("A")) if has_alpha else None
    return alpha, np.array(picture.getchannel(0)) if has_palette else None


def _pixels_in(picture: Image.Image, name: str) -> Pixels:
    if picture.mode.startswith("I"):
        values = _array(picture, picture.mode)
        if values.dtype == np.uint16:
            # Pillow inverts such values of 8 bits, and not those of 16.
            is_inverted = getattr(picture, "tag_v2", {}).get(WHITE_IS_ZERO) == 0
            return np.asarray(65535 - values if is_inverted else values)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"{name} holds values from {values.min()} to {values.max()}: export it with 8 or 16 bits")
        return values.astype(np.uint16)
    if picture.mode == "F":
        raise ImageError(f"{name} holds floating-point numbers: export it with 8 or 16 bits")
    if SIGNED in getattr(picture, "tag_v2", {}).get(SAMPLE_FORMAT, ()):
        raise ImageError(f"{name} holds signed numbers of 8 bits: export it with 8 or 16 bits, without signs")
    return _array(picture, "L" if picture.mode in ("L", "LA", "1") else "RGB")


def _array(picture: Image.Image, mode: str) -> npt.NDArray[Any]:
    """Return the picture's values in a mode of Pillow's: a copy, since PyTorch wants to own what it is given and
    Pillow's own buffer cannot be written to.

    It is made strip by strip. Pillow's own way has three further copies in memory.
    """
    found: npt.NDArray[Any] | None = None
    for top, bottom in _strips(picture.height, picture.width):
        part = picture if bottom - top == picture.height else picture.crop((0, top, picture.width, bottom))
        values = np.asarray(part if part.mode == mode else part.convert(mode))
        if found is None:
            found = np.empty((picture.height, *values.shape[1:]), values.dtype.newbyteorder("="))
        found[top:bottom] = values
    assert found is not None
    return found


def _strips(height: int, width: int) -> Iterator[tuple[int, int]]:
    """Yield the first row and the one behind the last of each strip of about `STRIP` pixels."""
    rows = max(1, STRIP // max(1, width))
    yield from ((top, min(top + rows, height)) for top in range(0, height, rows))


def _turn_to(picture: Image.Image, page: int | None, path: Path) -> None:
    """Go to a page of the file, or refuse a file with a second image as large as its first: which of them is meant,
    nobody can tell.

    A smaller one is a thumbnail, or the first at a lower resolution. A camera's JPEG may hold more than that.
    """
    several = picture.format in ("TIFF", "PNG", "GIF", "WEBP")
    count = getattr(picture, "n_frames", 1) if several else 1
    if page is not None:
        if page > count:
            raise ImageError(f"{path} has no page {page}: it holds {count} image{'' if count == 1 else 's'}")
        picture.seek(page - 1)
        return
    if count == 1:
        return
    first = picture.size
    picture.seek(1)
    if picture.size == first:
        raise ImageError(
            f"{path} holds {count} images: export each as a file of its own, or let predict read one with --page"
        )
    picture.seek(0)


def read_bytes(path: Path) -> bytes:
    """Return the file's bytes.

    Raises:
        ImageError: it is not there or cannot be opened.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path} cannot be opened: {error.strerror}") from None


def read_pixels(path: Path, page: int | None = None) -> Pixels:
    """Return a file's pixels as `decode` gives them.

    Args:
        path: the file.
        page: which of its images, from 1; None for its only one.

    Raises:
        ImageError: the file cannot be read as an image, or has no such page.
    """
    try:
        file = path.open("rb")  # and not its bytes: those of a large image would be held beside its pixels
    except OSError as error:
        raise ImageError(f"{path} cannot be opened: {error.strerror}") from None
    with file:
        pixels = _decoded(file if file.seekable() else io.BytesIO(file.read()), path, page).colour
    if pixels.size > 4 * STRIP:
        _give_back_memory()
    return pixels


def _give_back_memory() -> None:
    """Give back what Pillow has freed of a large image, in a process that else keeps such memory
    (`runtime.keep_freed_memory`): what comes next may not fit into the gap, and be added to it."""
    with suppress(AttributeError, OSError, TypeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


def to_rgb(pixels: Pixels, levels: Levels = UPPER_BITS) -> npt.NDArray[np.uint8]:
    """Return (height, width, 3) uint8 RGB: grey is repeated, and 16-bit values become 0 to 255 as the levels say."""
    eight = to_eight_bits(pixels, levels)
    return np.repeat(eight[:, :, None], 3, axis=2) if eight.ndim == 2 else eight


def to_eight_bits(pixels: Pixels, levels: Levels = UPPER_BITS) -> npt.NDArray[np.uint8]:
    """Return the pixels as uint8: 16-bit values between the levels become 0 to 255 in even steps, the others 0 or 255;
    8-bit values stay as they are.

    Levels of 0 and 4095 keep the upper 8 of 12 bits.
    """
    if pixels.dtype != np.uint16:
        return pixels.astype(np.uint8, copy=False)
    table = _table(levels)
    found = np.empty(pixels.shape, np.uint8)
    for top, bottom in _strips(*pixels.shape[:2]):  # NumPy makes 8 bytes of each index
        found[top:bottom] = table[pixels[top:bottom]]
    return found


@cache
def _table(levels: Levels) -> npt.NDArray[np.uint8]:
    low, high = levels
    return ((np.arange(65536) - low) * 256 // (high - low + 1)).clip(0, 255).astype(np.uint8)


def outside(pixels: Pixels, levels: Levels) -> str:
    """Return how an image lies outside the levels, to be read on from its name; nothing where it does not.

    It does where more than `CLIPPED` of its values lie beyond either level, or where not even a quarter of what lies
    between them is used. 8-bit pixels never do.
    """
    if pixels.dtype != np.uint16:
        return ""
    low, high = levels
    most, brightest = CLIPPED * pixels.size, int(pixels.max(initial=0))
    if np.count_nonzero(pixels > high) > most:
        return f"holds values up to {brightest}, and all above {high} become white"
    if np.count_nonzero(pixels < low) > most:
        return f"holds values down to {int(pixels.min())}, and all below {low} become black"
    if brightest - low < (high - low) // 4:
        return f"holds no value above {brightest}, and {high} becomes white: it is seen as a dark picture"
    return ""


def read_image(path: Path, levels: Levels = UPPER_BITS) -> npt.NDArray[np.uint8]:
    """Return the image as the network sees it: (height, width, 3) uint8 RGB, upright.

    Args:
        path: the file.
        levels: what becomes black and white, of values of more than 8 bits.

    Raises:
        ImageError: the file cannot be read as an image.
    """
    return to_rgb(read_pixels(path), levels)


def is_source(value: Any) -> "TypeGuard[Source]":
    """Return whether the value is one image of those that `pixels_of` takes, and not several."""
    return isinstance(value, str | Path | Image.Image | np.ndarray) or _is_tensor(value)


def _is_tensor(value: Any) -> "TypeGuard[torch.Tensor]":
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def pixels_of(source: "Source", colour: Colour = "rgb", levels: Levels = UPPER_BITS) -> npt.NDArray[np.uint8]:
    """Return the image as `read_image` returns it, from a file, a picture of Pillow's, an array or a tensor.

    As in files, grey is repeated, transparency is dropped, and 16-bit values become 0 to 255 as the levels say. Floats
    are multiplied by 255 and rounded.

    Args:
        source: see `ACCEPTED`.
        colour: the order of the colours in an array or a tensor of 3 or 4 channels.
        levels: what becomes black and white, of values of more than 8 bits.

    Raises:
        ImageError: it cannot be read, or is nothing of this; the message says what is taken.
    """
    if isinstance(source, str | Path):
        return read_image(Path(source), levels)
    if isinstance(source, Image.Image):
        return to_rgb(_pixels_in(ImageOps.exif_transpose(source), "this picture"), levels)
    values = _values_in(source)
    channels = values.shape[2] if values.ndim == 3 else 1
    if values.ndim not in (2, 3) or channels not in (1, 3, 4) or 0 in values.shape:
        raise ImageError(f"this is of shape {tuple(source.shape)}, but {ACCEPTED}")
    pixels = _eight_bits_of(values, levels)
    if channels == 1:
        return to_rgb(pixels.reshape(values.shape[:2]))
    coloured = pixels[:, :, :3] if colour == "rgb" else pixels[:, :, 2::-1]
    return np.ascontiguousarray(coloured)


def _values_in(source: Any) -> npt.NDArray[Any]:
    """Return an array, or a tensor as one, its channels last."""
    if isinstance(source, np.ndarray):
        return source
    if not _is_tensor(source):
        raise ImageError(f"this is a {type(source).__name__}, but {ACCEPTED}")
    values: npt.NDArray[Any] = source.detach().cpu().numpy()
    return values.transpose(1, 2, 0) if values.ndim == 3 else values


def _eight_bits_of(values: npt.NDArray[Any], levels: Levels) -> npt.NDArray[np.uint8]:
    """Return uint8 and uint16 values, and floats from 0 to 1, as uint8."""
    if values.dtype in (np.uint8, np.uint16):
        return to_eight_bits(values, levels)
    if values.dtype.kind != "f":
        raise ImageError(f"this is of {values.dtype}, but {ACCEPTED}")
    if not (values.min() >= 0 and values.max() <= 1):  # nor for NaN
        raise ImageError(f"these floats go from {values.min():g} to {values.max():g}, but {ACCEPTED}")
    return np.asarray(np.rint(values * 255).astype(np.uint8))


def resize(image: npt.NDArray[np.uint8], shape: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Return the (height, width, 3) uint8 image at another size, as all networks see it, in training and afterwards.

    Bilinear between the middles of pixels (half-pixel centres), not smoothed beforehand where it shrinks (no
    antialiasing), each value the nearest whole grey level. The image itself is returned where its size is the one asked
    for. Places between pixels are worked out in float32, so that a value may be the nearest one to something
    else than the exact result: by no more than 0.0001 grey levels for each pixel of the image's longer side.

    Args:
        image: (height, width, 3) uint8.
        shape: height and width wanted.
    """
    if image.shape[:2] == shape:
        return image
    import torch
    from torch.nn import functional as F

    # Not OpenCV: after a fork its thread pool, once used by prepare or augment, hangs. Not PyTorch's kernel for whole
    # numbers: it rounds twice, and every second value of an image shrunk to half is another by one. The colours of a
    # pixel stay together all the way, by which it takes a third to a half less time; the values are the same bits.
    whole = torch.from_numpy(np.ascontiguousarray(image))
    parts: Iterable[torch.Tensor] = [whole[None].float().permute(0, 3, 1, 2)] if _is_small(image) else _by_colour(whole)
    resized = [F.interpolate(part, size=shape, mode="bilinear", align_corners=False) for part in parts]
    return np.ascontiguousarray(torch.cat(resized, 1)[0].round_().to(torch.uint8).permute(1, 2, 0).numpy())


def _is_small(image: npt.NDArray[np.uint8]) -> bool:
    return image[:, :, 0].size <= 4 * STRIP


def _by_colour(whole: "torch.Tensor") -> "Iterator[torch.Tensor]":
    """Yield one colour of a (height, width, 3) image after the other as floats, (1, 1, height, width), each in the
    place of the last: those of all three take four times the image's memory."""
    import torch

    floats = torch.empty((1, 1, *whole.shape[:2]))
    yield from (floats.copy_(whole[:, :, colour]) for colour in range(3))


def content_digest(image: npt.NDArray[np.uint8]) -> str:
    """Return a SHA-256 in hexadecimal of what is on the image, as `read_image` gives it: (height, width, 3) uint8 RGB.

    It is the same in whatever file the image is kept.
    """
    digest = hashlib.sha256(repr(image.shape).encode())
    digest.update(np.ascontiguousarray(image).data)  # joined to one string it would be copied twice
    return digest.hexdigest()


def to_mask(pixels: Pixels) -> npt.NDArray[np.bool_]:
    """Return (height, width) bool: True where any channel is above half of what its type can hold.

    In 8 bits that is above 127. A mask that holds nothing but 0 and 1 is True at 1.
    """
    return nonzero(pixels) if pixels.size and pixels.max() == 1 else white(pixels)


def white(pixels: Pixels) -> npt.NDArray[np.bool_]:
    """Return (height, width) bool: True where any channel is above half of what its type can hold."""
    return np.asarray(strongest(pixels) > np.iinfo(pixels.dtype).max // 2)


def nonzero(pixels: Pixels) -> npt.NDArray[np.bool_]:
    """Return (height, width) bool: True where any channel is not 0."""
    return np.asarray(strongest(pixels) > 0)


def strongest(pixels: Pixels) -> Pixels:
    """Return the highest of each pixel's channels: (height, width)."""
    return pixels.max(axis=2) if pixels.ndim == 3 else pixels


def read_mask(path: Path) -> npt.NDArray[np.bool_]:
    """Return the ground-truth mask in the file: (height, width) bool, True on the defect, upright.

    Raises:
        ImageError: the file cannot be read as an image.
    """
    return to_mask(read_pixels(path))


def encode_png(pixels: Pixels) -> bytes:
    """Return the pixels as a PNG file: grey (height, width) or RGB (height, width, 3), uint8 or uint16, lossless."""
    ordered: npt.NDArray[Any] = np.ascontiguousarray(pixels)
    if ordered.ndim == 3:
        ordered = cv2.cvtColor(ordered, cv2.COLOR_RGB2BGR)
    # OpenCV's own choice of filter and compression: on photographs of parts Paeth's filter made files a quarter smaller
    # and took half as long again, zlib's level 6 a fifth smaller and eight times as long.
    _, data = cv2.imencode(".png", ordered)
    return data.tobytes()


def write_png(path: Path, pixels: Pixels) -> None:
    """Write the pixels as a lossless PNG, whole or not at all."""
    write_bytes(path, encode_png(pixels))
