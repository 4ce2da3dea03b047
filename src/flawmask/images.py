"""The one image reader of every stage, and the one writer.

Pillow decodes, because it refuses a truncated file of any kind (OpenCV 5 returns a full-size image for a
truncated JPEG), knows every container's EXIF orientation and prints nothing.
"""

import hashlib
import io
import os
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeGuard

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

LIMIT = "FLAWMASK_MAX_PIXELS"
"""The environment variable that says how many pixels an image may have."""

Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]

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


def decode(data: bytes, path: Path) -> Pixels:
    """Return the pixels that the bytes of an image file hold, turned upright by their Exif orientation (CIPA DC-008).

    Args:
        data: the whole file.
        path: where it came from, for the message.

    Returns:
        Grey images as (height, width), uint8, or uint16 where the file holds 16 bits; all others as
        (height, width, 3) uint8 RGB: transparency is dropped, 16-bit colours keep their upper 8 bits.

    Raises:
        ImageError: not an image, truncated, several images, or with more pixels than `most_pixels()`.
    """
    limit = most_pixels()
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.width * picture.height > limit:
                raise Image.DecompressionBombError
            _refuse_several(picture, path)
            ImageOps.exif_transpose(picture, in_place=True)  # each copy costs a tenth of decoding a PNG
            return _pixels_in(picture, str(path))
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


def _pixels_in(picture: Image.Image, name: str) -> Pixels:
    if picture.mode.startswith("I"):
        return _sixteen_bit(np.asarray(picture))
    if picture.mode == "F":
        raise ImageError(f"{name} holds floating-point numbers: export it with 8 or 16 bits")
    wanted = "L" if picture.mode in ("L", "LA", "1") else "RGB"
    # A copy, since PyTorch wants to own what it is given and Pillow's own buffer cannot be written to.
    return np.array(picture if picture.mode == wanted else picture.convert(wanted), dtype=np.uint8)


def _refuse_several(picture: Image.Image, path: Path) -> None:
    """Refuse a file with a second image as large as its first: which of them is meant, nobody can tell.

    A smaller one is a thumbnail, or the first at a lower resolution. A camera's JPEG may hold more than that.
    """
    if picture.format not in ("TIFF", "PNG", "GIF", "WEBP") or getattr(picture, "n_frames", 1) == 1:
        return
    first = picture.size
    picture.seek(1)
    if picture.size == first:
        raise ImageError(f"{path} holds {getattr(picture, 'n_frames', 2)} images: export each as a file of its own")
    picture.seek(0)


def _sixteen_bit(values: npt.NDArray[np.int32]) -> npt.NDArray[np.uint16]:
    return values.clip(0, 65535).astype(np.uint16)


def read_bytes(path: Path) -> bytes:
    """Return the file's bytes.

    Raises:
        ImageError: it is not there or cannot be opened.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path} cannot be opened: {error.strerror}") from None


def read_pixels(path: Path) -> Pixels:
    """Return a file's pixels as `decode` gives them.

    Raises:
        ImageError: the file cannot be read as an image.
    """
    return decode(read_bytes(path), path)


def to_rgb(pixels: Pixels) -> npt.NDArray[np.uint8]:
    """Return (height, width, 3) uint8 RGB: 16-bit values keep their upper 8 bits, grey is repeated."""
    eight = _upper_bits(pixels)
    return np.repeat(eight[:, :, None], 3, axis=2) if eight.ndim == 2 else eight


def _upper_bits(pixels: Pixels) -> npt.NDArray[np.uint8]:
    return (pixels >> 8).astype(np.uint8) if pixels.dtype == np.uint16 else pixels.astype(np.uint8, copy=False)


def read_image(path: Path) -> npt.NDArray[np.uint8]:
    """Return the image as the network sees it: (height, width, 3) uint8 RGB, upright.

    Raises:
        ImageError: the file cannot be read as an image.
    """
    return to_rgb(read_pixels(path))


def is_source(value: Any) -> "TypeGuard[Source]":
    """Return whether the value is one image of those that `pixels_of` takes, and not several."""
    return isinstance(value, str | Path | Image.Image | np.ndarray) or _is_tensor(value)


def _is_tensor(value: Any) -> "TypeGuard[torch.Tensor]":
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def pixels_of(source: "Source", colour: Colour = "rgb") -> npt.NDArray[np.uint8]:
    """Return the image as `read_image` returns it, from a file, a picture of Pillow's, an array or a tensor.

    As in files, grey is repeated, transparency is dropped, and 16-bit values keep their upper 8 bits. Floats are
    multiplied by 255 and rounded.

    Args:
        source: see `ACCEPTED`.
        colour: the order of the colours in an array or a tensor of 3 or 4 channels.

    Raises:
        ImageError: it cannot be read, or is nothing of this; the message says what is taken.
    """
    if isinstance(source, str | Path):
        return read_image(Path(source))
    if isinstance(source, Image.Image):
        return to_rgb(_pixels_in(ImageOps.exif_transpose(source), "this picture"))
    values = _values_in(source)
    channels = values.shape[2] if values.ndim == 3 else 1
    if values.ndim not in (2, 3) or channels not in (1, 3, 4) or 0 in values.shape:
        raise ImageError(f"this is of shape {tuple(source.shape)}, but {ACCEPTED}")
    pixels = _to_eight_bits(values)
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


def _to_eight_bits(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Return uint8 and uint16 values, and floats from 0 to 1, as uint8."""
    if values.dtype in (np.uint8, np.uint16):
        return _upper_bits(values)
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
    colours_first = torch.from_numpy(np.ascontiguousarray(image))[None].float().permute(0, 3, 1, 2)
    resized = F.interpolate(colours_first, size=shape, mode="bilinear", align_corners=False)
    return np.ascontiguousarray(resized[0].round_().to(torch.uint8).permute(1, 2, 0).numpy())


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
    grey = pixels.max(axis=2) if pixels.ndim == 3 else pixels
    half = 0 if grey.size and grey.max() == 1 else np.iinfo(grey.dtype).max // 2
    return np.asarray(grey > half)


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
