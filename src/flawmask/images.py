"""The image reader and writer of all stages.

Pillow decodes the files. It refuses truncated files of every kind (OpenCV 5 returns a full-size image for a truncated
JPEG), knows the EXIF orientation in every format, and prints nothing. But it keeps only 8 bits of 16-bit colours, so
OpenCV reads such files a second time.
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

from flawmask.errors import FlawmaskError, ImageError, TooManyPixelsError
from flawmask.files import is_junk, write_bytes
from flawmask.launch import is_own_process

if TYPE_CHECKING:
    import torch

open_image = Image.open
"""Pillow's function. Importing ultralytics replaces `Image.open` by one that tries to install a package if a file is
not an image."""

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})

READABLE = SUFFIXES | {".webp", ".jfif", ".jp2", ".gif"}
"""Suffixes of the files that `predict` reads in folders. Files with several images, such as animations, are refused."""

OTHER_SUFFIXES = frozenset({".cache", ".ckpt", ".db", ".onnx", ".pkl", ".pt", ".pth", ".safetensors", ".sqlite"})
"""Suffixes of binary files that programs write beside images, such as YOLO's `labels.cache` and checkpoints."""

_TYPES = MimeTypes()  # Python's own table, without the additions of the machine, which differ between machines

VECTOR_FORMATS = ("EPS", "WMF")
"""Formats that Pillow hands to another program to draw. Such a file is never a photograph."""

LIMIT_VARIABLE = "FLAWMASK_MAX_PIXELS"
"""The environment variable that sets how many pixels an image may have."""

Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]

Levels: TypeAlias = tuple[int, int]
"""The 16-bit values that become black and white. A whole data set shares one pair."""

UPPER_BITS: Levels = (0, 65535)
"""The levels that keep the upper 8 of 16 bits, for files that use all 16."""

BLACK = 3
"""An image of more than 8 bits whose highest value becomes at most this, of 255, counts as black. Its range of grey was
read wrong, and it gets no verdict."""

MAX_CLIPPED = 0.01
"""The largest share of an image's values that may lie outside the levels."""

STRIP = 2**22
"""The number of pixels that are converted at a time. This avoids a second copy of a large image in memory."""

Source: TypeAlias = "str | Path | Image.Image | npt.NDArray[Any] | torch.Tensor"
"""What `pixels_of` accepts as an image."""

Colour = Literal["rgb", "bgr"]

ACCEPTED = (
    "an image is a file's path, a picture of Pillow's, an array (height, width) or (height, width, channels), or a "
    "tensor (height, width) or (channels, height, width), with 1, 3 or 4 channels of uint8 or uint16, or of floats "
    "from 0 to 1"
)


@cache
def max_pixels() -> int:
    """Return how many pixels an image may have. (A file of a few kilobytes can hold billions.)

    Raises:
        FlawmaskError: the environment variable is not a number.
    """
    text = os.environ.get(LIMIT_VARIABLE) or str(2 * 89_478_485)  # Pillow refuses an image above twice its own limit
    if not text.isdecimal() or not int(text):
        raise FlawmaskError(f"the environment variable {LIMIT_VARIABLE} is {text!r}: it must be a number of pixels")
    if is_own_process():
        Image.MAX_IMAGE_PIXELS = int(text)  # above it Pillow warns, and the filter below hides the warning
        # Pillow also warns of odd metadata, but only the pixels matter. (`warnings.catch_warnings` around each decode
        # does not work: many threads read images. They share one list of filters, and would restore it in any order.)
        warnings.filterwarnings("ignore", module=r"PIL\.")
    return int(text)


def is_image(path: Path) -> bool:
    """Return whether the file's name is that of an image. Hidden files and other junk are not images."""
    return path.suffix.lower() in SUFFIXES and not is_junk(path.name)


def is_readable(path: Path) -> bool:
    """Return whether the file's name is that of an image which `predict` reads in a folder."""
    return path.suffix.lower() in READABLE and not path.name.startswith(".")


def may_be_image(path: Path) -> bool:
    """Return whether the file may be an image in an unknown format.

    Its suffix is that of an image or a similar type; or the suffix is unknown and the file holds no text.
    """
    if path.suffix.lower() in OTHER_SUFFIXES:
        return False
    kind, packed = _TYPES.guess_type(f"file{path.suffix.lower()}", strict=False)
    if kind is not None or packed is not None:
        return (kind or "").startswith(("image/", "video/", "application/dicom", "application/octet-stream"))
    if not path.is_file():  # a pipe, say: opening it would hang
        return True
    try:
        with path.open("rb") as file:
            return b"\0" in file.read(1024)  # texts have no zero bytes, except in UTF-16
    except OSError:
        return True


@dataclass(frozen=True)
class DecodedImage:
    """The content of an image file, turned upright.

    Attributes:
        colour: the pixels that `decode` returns.
        alpha: (height, width) uint8, the opacity of each pixel; None if the file has no transparency.
        palette: (height, width) uint8, the palette index of each pixel; None if the file has no palette.
        orientation: the Exif orientation of the stored pixels, 1 to 8; None if the file has none.
    """

    colour: Pixels
    alpha: npt.NDArray[np.uint8] | None
    palette: npt.NDArray[np.uint8] | None
    orientation: int | None


def decode(data: bytes, path: Path | str, page: int | None = None) -> Pixels:
    """Return the pixels of an image file, turned upright by their Exif orientation (CIPA DC-008).

    Args:
        data: the content of the file.
        path: the file's path or address, for the message.
        page: which of the file's images to read, from 1; None if there is only one.

    Returns:
        Grey images as (height, width), all others as (height, width, 3) RGB. The type is uint8, or uint16 if the file
        has more than 8 bits. Transparency is dropped.

    Raises:
        ImageError: the file is not an image, is truncated, holds several images, has more pixels than `max_pixels()`,
            has values outside 0 to 65535, or has values that are not whole numbers.
    """
    return _decoded(io.BytesIO(data), path, page).colour


def decode_parts(data: bytes, path: Path) -> DecodedImage:
    """Return the pixels of an image file together with its alpha channel, palette and orientation.

    Raises:
        ImageError: see `decode`.
    """
    return _decoded(io.BytesIO(data), path, wants_all=True)


def _decoded(file: BinaryIO, path: Path | str, page: int | None = None, *, wants_all: bool = False) -> DecodedImage:
    """Decode an open image file.

    Args:
        file: the open file.
        path: its path, for messages.
        page: which of the file's images to read, from 1; None if there is only one.
        wants_all: whether to read the alpha channel and the palette too.
    """
    limit = max_pixels()
    try:
        with open_image(file) as picture:
            _go_to_page(picture, page, path)
            if picture.width * picture.height > limit:
                raise Image.DecompressionBombError
            if picture.format in VECTOR_FORMATS:
                raise ImageError(f"{path} is {picture.format}, which holds no pixels: export it as PNG")
            mode = raw_mode(picture)
            orientation = _orientation(picture)
            ImageOps.exif_transpose(picture, in_place=True)  # a copy takes a tenth as long as decoding a PNG
            pixels = _pixels_in(picture, str(path))
            if ";16" in mode:
                pixels = _deep_colours(file, page or 1, orientation or 1, pixels, path)
                pixels = pixels[:, :, 0] if mode.startswith("L") else pixels
            return DecodedImage(pixels, *(_alpha_and_palette(picture) if wants_all else (None, None)), orientation)
    except ImageError:
        raise
    except Image.DecompressionBombError:
        # In a program that imports Flawmask, Pillow's own limit applies too.
        pillow_limit = limit if is_own_process() else 2 * (Image.MAX_IMAGE_PIXELS or limit)
        where = f"the environment variable {LIMIT_VARIABLE}" if limit <= pillow_limit else "PIL.Image.MAX_IMAGE_PIXELS"
        raise TooManyPixelsError(
            f"{path} has more than {min(limit, pillow_limit) // 10**6} million pixels: if it is meant to be so large, "
            f"raise the limit by {where}"
        ) from None
    except Exception as error:  # on a damaged file, Pillow's plugins raise errors of any type
        reason = str(error).split("<_io")[0].strip() or type(error).__name__
        raise ImageError(f"{path} cannot be read as an image ({reason}): replace it or take it out") from None


def exceeds_8_bits(path: Path) -> bool:
    """Return whether an image file has more than 8 bits per value, without decoding it.

    Raises:
        ImageError: the file cannot be opened, or is not an image.
    """
    max_pixels()  # this also hides Pillow's warnings
    try:
        with open_image(path) as picture:
            return picture.mode.startswith("I") or ";16" in raw_mode(picture)
    except Exception as error:  # Pillow's plugins raise errors of any type
        raise ImageError(f"{path} cannot be read as an image ({type(error).__name__})") from None


def raw_mode(picture: Image.Image) -> str:
    """Return Pillow's name for the order and depth of the file's colours, such as `RGB;16B`.

    Returns "" for grey images, and if Pillow does not tell.
    """
    if picture.mode not in ("RGB", "RGBA", "LA"):
        return ""
    tiles = getattr(picture, "tile", None) or ()
    arguments = tiles[0][3] if tiles else ()
    first = arguments if isinstance(arguments, str) else next(iter(arguments or ()), "")
    if picture.format == "TIFF" and max(getattr(picture, "tag_v2", {}).get(BITS_PER_SAMPLE, (8,))) > 8:
        return f"{picture.mode};16"  # if each colour is stored as a plane, Pillow names only one
    return first if isinstance(first, str) else ""


def _deep_colours(file: BinaryIO, page: int, turn: int, upper: Pixels, path: Path | str) -> npt.NDArray[np.uint16]:
    """Read 16-bit colours in full with OpenCV: (height, width, 3) RGB.

    Args:
        file: the image file.
        page: which of the file's images to read, from 1.
        turn: the Exif orientation.
        upper: (height, width, 3), the upper 8 bits as Pillow has read them, turned upright. Both readers must agree.
        path: the file's path, for the message.

    Raises:
        ImageError: the readers disagree, for example if each colour is stored as a plane.
    """
    file.seek(0)
    data = np.frombuffer(file.read(), np.uint8)
    _, pages = cv2.imdecodemulti(data, cv2.IMREAD_UNCHANGED, range=(page - 1, page))
    if pages and pages[0].dtype == np.uint16 and pages[0].ndim == 3 and pages[0].shape[2] in (3, 4):
        values = pages[0]
        for top, bottom in _strips(*values.shape[:2]):  # in place, to save a copy of a large image
            values[top:bottom, :, :3] = values[top:bottom, :, 2::-1]
        colours = np.ascontiguousarray(turn_upright(values[:, :, :3], turn))
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
"""The functions that turn stored pixels upright, by Exif orientation."""

ORIENTATION = 0x0112
BITS_PER_SAMPLE, WHITE_IS_ZERO, SAMPLES_PER_PIXEL = 258, 262, 277
"""Tags of TIFF 6.0. If the value of the second one is 0, then 0 means white."""
SAMPLE_FORMAT, SIGNED = 339, 2
"""A tag of TIFF 6.0, and its value for signed numbers."""


def turn_upright(pixels: npt.NDArray[Any], orientation: int) -> npt.NDArray[Any]:
    """Return stored pixels turned upright by an Exif orientation, as a view if possible."""
    return TURNS[orientation](pixels) if orientation in TURNS else pixels


def _orientation(picture: Image.Image) -> int | None:
    orientation = picture.getexif().get(ORIENTATION)
    return orientation if orientation in range(1, 9) else None


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
            # Pillow inverts such values if they have 8 bits, but not if they have 16.
            is_inverted = getattr(picture, "tag_v2", {}).get(WHITE_IS_ZERO) == 0
            return np.asarray(65535 - values if is_inverted else values)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"{name} holds values from {values.min()} to {values.max()}: export it with 8 or 16 bits")
        return values.astype(np.uint16)
    if picture.mode == "F":
        raise ImageError(f"{name} holds floating-point numbers: export it with 8 or 16 bits")
    if SIGNED in getattr(picture, "tag_v2", {}).get(SAMPLE_FORMAT, ()):
        raise ImageError(f"{name} holds signed numbers of 8 bits: export it with unsigned numbers of 8 or 16 bits")
    return _array(picture, "L" if picture.mode in ("L", "LA", "1") else "RGB")


def _array(picture: Image.Image, mode: str) -> npt.NDArray[Any]:
    """Return the image's values in a Pillow mode, as a copy: PyTorch needs an array that can be written to.

    The copy is made strip by strip. Converting all at once would hold three more copies in memory.
    """
    copy: npt.NDArray[Any] | None = None
    for top, bottom in _strips(picture.height, picture.width):
        part = picture if bottom - top == picture.height else picture.crop((0, top, picture.width, bottom))
        values = np.asarray(part if part.mode == mode else part.convert(mode))
        if copy is None:
            copy = np.empty((picture.height, *values.shape[1:]), values.dtype.newbyteorder("="))
        copy[top:bottom] = values
    assert copy is not None
    return copy


def _strips(height: int, width: int) -> Iterator[tuple[int, int]]:
    """Yield the first row and the end row (exclusive) of each strip of about `STRIP` pixels."""
    rows = max(1, STRIP // max(1, width))
    yield from ((top, min(top + rows, height)) for top in range(0, height, rows))


def _go_to_page(picture: Image.Image, page: int | None, path: Path | str) -> None:
    """Go to a page of the file.

    Without a page, refuse a file whose second image is as large as its first: we cannot know which one is meant. A
    smaller second image is a thumbnail or a lower resolution. A JPEG from a camera may hold further images.
    """
    has_pages = picture.format in ("TIFF", "PNG", "GIF", "WEBP")
    count = getattr(picture, "n_frames", 1) if has_pages else 1
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
            f"{path} holds {count} images: export each as a separate file, or let predict read one with --page"
        )
    picture.seek(0)


def read_bytes(path: Path) -> bytes:
    """Return the file's bytes.

    Raises:
        ImageError: the file is missing or cannot be opened.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path} cannot be opened: {error.strerror}") from None


def read_pixels(path: Path, page: int | None = None) -> Pixels:
    """Return the pixels of an image file in the form that `decode` returns.

    Args:
        path: the file.
        page: which of the file's images to read, from 1; None if there is only one.

    Raises:
        ImageError: the file cannot be read as an image, or has no such page.
    """
    try:
        file = path.open("rb")  # reading all bytes at once would hold them in memory beside the pixels
    except OSError as error:
        raise ImageError(f"{path} cannot be opened: {error.strerror}") from None
    with file:
        pixels = _decoded(file if file.seekable() else io.BytesIO(file.read()), path, page).colour
    if pixels.size > 4 * STRIP:
        give_back_memory()
    return pixels


def give_back_memory() -> None:
    """Return the memory that Pillow has freed to the operating system.

    Flawmask's own processes keep freed memory (`runtime.keep_freed_memory`). The next large image may not fit into the
    gap, and would then need memory on top of it.
    """
    with suppress(AttributeError, OSError, TypeError):  # only glibc has this function
        ctypes.CDLL(None).malloc_trim(0)


def to_rgb(pixels: Pixels, levels: Levels = UPPER_BITS) -> npt.NDArray[np.uint8]:
    """Return (height, width, 3) uint8 RGB. Grey is repeated, and the levels map 16-bit values to 0 to 255."""
    eight = to_eight_bits(pixels, levels)
    return np.repeat(eight[:, :, None], 3, axis=2) if eight.ndim == 2 else eight


def to_eight_bits(pixels: Pixels, levels: Levels = UPPER_BITS) -> npt.NDArray[np.uint8]:
    """Return the pixels as uint8.

    16-bit values between the levels are scaled to 0 to 255 in even steps, and values outside become 0 or 255. For
    example, levels of 0 and 4095 keep the upper 8 of 12 bits. 8-bit values stay as they are.
    """
    if pixels.dtype != np.uint16:
        return pixels.astype(np.uint8, copy=False)
    table = _table(levels)
    eight_bits = np.empty(pixels.shape, np.uint8)
    for top, bottom in _strips(*pixels.shape[:2]):  # NumPy needs 8 bytes for each index
        eight_bits[top:bottom] = table[pixels[top:bottom]]
    return eight_bits


@cache
def _table(levels: Levels) -> npt.NDArray[np.uint8]:
    low, high = levels
    return ((np.arange(65536) - low) * 256 // (high - low + 1)).clip(0, 255).astype(np.uint8)


def levels_problem(pixels: Pixels, levels: Levels) -> str:
    """Return a message about an image that does not fit the levels, or "". The message continues after its name.

    An image does not fit if more than the share `MAX_CLIPPED` of its values lie above the upper level, or below the
    lower one. It does not fit either if its values use less than a quarter of the range between the levels. 8-bit
    images always fit.
    """
    if pixels.dtype != np.uint16:
        return ""
    low, high = levels
    allowed, brightest = MAX_CLIPPED * pixels.size, int(pixels.max(initial=0))
    if np.count_nonzero(pixels > high) > allowed:
        return f"holds values up to {brightest}, and all above {high} become white"
    if np.count_nonzero(pixels < low) > allowed:
        return f"holds values down to {int(pixels.min())}, and all below {low} become black"
    if brightest - low < (high - low) // 4:
        return f"holds no value above {brightest}, and {high} becomes white: it is seen as a dark picture"
    return ""


def as_seen(pixels: Pixels, levels: Levels, path: Path | str) -> npt.NDArray[np.uint8]:
    """Return the pixels of a file as the network sees them: (height, width, 3) uint8 RGB.

    Raises:
        FlawmaskError: the file has more than 8 bits, and all its values become black.
    """
    shown = to_rgb(pixels, levels)
    if pixels.dtype == np.uint16 and shown.max() <= BLACK:
        raise FlawmaskError(
            f"{path} is black as the network sees it: its highest value {pixels.max()} becomes {shown.max()} of 255; "
            "give --intensity the number of bits of the camera"
        )
    return shown


def read_image(path: Path, levels: Levels = UPPER_BITS) -> npt.NDArray[np.uint8]:
    """Return the image as the network sees it: (height, width, 3) uint8 RGB, upright.

    Args:
        path: the file.
        levels: the 16-bit values that become black and white.

        Raises:
            ImageError: the file cannot be read as an image.
    """
    return to_rgb(read_pixels(path), levels)


def is_source(value: Any) -> "TypeGuard[Source]":
    """Return whether the value is a single image that `pixels_of` accepts, not a collection of images."""
    return isinstance(value, str | Path | Image.Image | np.ndarray) or _is_tensor(value)


def _is_tensor(value: Any) -> "TypeGuard[torch.Tensor]":
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def pixels_of(source: "Source", colour: Colour = "rgb", levels: Levels = UPPER_BITS) -> npt.NDArray[np.uint8]:
    """Return an image in the form that `read_image` returns, from a file, a Pillow image, an array or a tensor.

    As with files, grey is repeated, transparency is dropped, and the levels map 16-bit values to 0 to 255. Floats are
    multiplied by 255 and rounded.

    Args:
        source: the image; see `ACCEPTED`.
        colour: the order of the colours in an array or tensor with 3 or 4 channels.
        levels: the 16-bit values that become black and white.

    Raises:
        ImageError: the source cannot be read or is not of an accepted type; the message lists the accepted types.
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
    """Return an array or a tensor as an array with its channels last."""
    if isinstance(source, np.ndarray):
        return source
    if not _is_tensor(source):
        raise ImageError(f"this is a {type(source).__name__}, but {ACCEPTED}")
    values: npt.NDArray[Any] = source.detach().cpu().numpy()
    return values.transpose(1, 2, 0) if values.ndim == 3 else values


def _eight_bits_of(values: npt.NDArray[Any], levels: Levels) -> npt.NDArray[np.uint8]:
    """Return uint8 values, uint16 values, or floats from 0 to 1 as uint8."""
    if values.dtype in (np.uint8, np.uint16):
        return to_eight_bits(values, levels)
    if values.dtype.kind != "f":
        raise ImageError(f"this is of {values.dtype}, but {ACCEPTED}")
    if not (values.min() >= 0 and values.max() <= 1):  # this also refuses NaN
        raise ImageError(f"these floats go from {values.min():g} to {values.max():g}, but {ACCEPTED}")
    return np.asarray(np.rint(values * 255).astype(np.uint8))


def resize(image: npt.NDArray[np.uint8], shape: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Return the (height, width, 3) uint8 image at another size. All networks use this function in every stage.

    The interpolation is bilinear with half-pixel centres and without antialiasing, and rounds to whole grey levels. If
    the image has this size already, the image itself is returned. Positions are computed in float32. Before rounding,
    this changes a value by at most 0.0001 grey levels for each pixel of the image's longer side.

    Args:
        image: (height, width, 3) uint8.
        shape: the new height and width.
    """
    if image.shape[:2] == shape:
        return image
    import torch
    from torch.nn import functional as F

    # Not OpenCV: its thread pool, once used by prepare or augment, hangs after a fork. Not PyTorch's integer kernel: it
    # rounds twice, and so every second value of an image that is shrunk to half its size is wrong by one. The channels
    # stay last in memory, which takes a third to a half less time and gives the same bits.
    tensor = torch.from_numpy(np.ascontiguousarray(image))
    parts: Iterable[torch.Tensor] = (
        [tensor[None].float().permute(0, 3, 1, 2)] if _is_small(image) else _by_colour(tensor)
    )
    resized = [F.interpolate(part, size=shape, mode="bilinear", align_corners=False) for part in parts]
    return np.ascontiguousarray(torch.cat(resized, 1)[0].round_().to(torch.uint8).permute(1, 2, 0).numpy())


def _is_small(image: npt.NDArray[np.uint8]) -> bool:
    return image[:, :, 0].size <= 4 * STRIP


def _by_colour(image: "torch.Tensor") -> "Iterator[torch.Tensor]":
    """Yield the colours of a (height, width, 3) image one after the other as floats, (1, 1, height, width).

    All use the same memory: the floats of all three colours together would take four times the image's memory.
    """
    import torch

    floats = torch.empty((1, 1, *image.shape[:2]))
    yield from (floats.copy_(image[:, :, colour]) for colour in range(3))


def content_digest(image: npt.NDArray[np.uint8]) -> str:
    """Return the SHA-256 of the pixels, in hexadecimal. It does not depend on the file format.

    Args:
        image: (height, width, 3) uint8 RGB, as `read_image` returns it.
    """
    digest = hashlib.sha256(repr(image.shape).encode())
    digest.update(np.ascontiguousarray(image).data)  # `tobytes` would copy the pixels
    return digest.hexdigest()


def to_mask(pixels: Pixels) -> npt.NDArray[np.bool_]:
    """Return (height, width) bool: True where a channel is above half of the largest value of its type.

    With 8 bits this means above 127. A mask whose only values are 0 and 1 is True at 1.
    """
    return nonzero(pixels) if pixels.size and pixels.max() == 1 else white(pixels)


def white(pixels: Pixels) -> npt.NDArray[np.bool_]:
    """Return (height, width) bool: True where a channel is above half of the largest value of its type."""
    return np.asarray(brightest_channel(pixels) > np.iinfo(pixels.dtype).max // 2)


def nonzero(pixels: Pixels) -> npt.NDArray[np.bool_]:
    """Return (height, width) bool: True where a channel is not 0."""
    return np.asarray(brightest_channel(pixels) > 0)


def brightest_channel(pixels: Pixels) -> Pixels:
    """Return the highest channel of each pixel: (height, width)."""
    return pixels.max(axis=2) if pixels.ndim == 3 else pixels


def read_mask(path: Path) -> npt.NDArray[np.bool_]:
    """Return the ground-truth mask in a file: (height, width) bool, upright, True on the defect.

    Raises:
        ImageError: the file cannot be read as an image.
    """
    return to_mask(read_pixels(path))


def encode_png(pixels: Pixels) -> bytes:
    """Return the pixels as a PNG file: grey (height, width) or RGB (height, width, 3), uint8 or uint16, lossless."""
    ordered: npt.NDArray[Any] = np.ascontiguousarray(pixels)
    if ordered.ndim == 3:
        ordered = cv2.cvtColor(ordered, cv2.COLOR_RGB2BGR)
    # We keep OpenCV's default filter and compression level. On photographs of parts, the Paeth filter made files a
    # quarter smaller but took one and a half times as long. Level 6 of zlib made them a fifth smaller and took eight
    # times as long.
    _, data = cv2.imencode(".png", ordered)
    return data.tobytes()


def write_png(path: Path, pixels: Pixels) -> None:
    """Write the pixels as a lossless PNG, atomically."""
    write_bytes(path, encode_png(pixels))
