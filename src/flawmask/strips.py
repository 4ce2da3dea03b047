"""Large image files, read strip by strip: memory then depends on the strip, not on the image.

libvips reads the strips (https://www.libvips.org), through pyvips. Its pixels are those that `images.read_image` gives,
which a test checks. Pillow and OpenCV can only decode an image whole.
"""

import logging
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import PIL.Image

from flawmask import images
from flawmask.errors import ImageError
from flawmask.tiles import Window

log = logging.getLogger(__name__)

Image = npt.NDArray[np.uint8]

MIN_PIXELS = 2**25
"""Images with at least so many pixels are read in strips. Decoding a smaller one whole takes less than 250 MB."""

ROWS = 256
"""About so many rows are read at a time."""

LONGEST_SIDE = 1600
"""The shrunk picture of an image has at least so many pixels along its longer side, and less than twice as many."""

BYTES = {"L": 5, "RGB": 7}
"""The bytes that each pixel needs while an image is decoded whole: in Pillow, as an array, and as RGB."""


@dataclass(frozen=True)
class StripImage:
    """An image file that can be read in strips. Nothing of it is in memory.

    Attributes:
        path: the file.
        height: in pixels.
        width: in pixels.
    """

    path: Path
    height: int
    width: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape that its pixels would have as an array: (height, width, 3)."""
        return self.height, self.width, 3

    def strips(self, rows: int = ROWS) -> Iterator[Image]:
        """Yield the image from top to bottom, (rows, width, 3) uint8 RGB. The last strip may be lower.

        Raises:
            ImageError: the file is damaged, or holds other pixels than its header says.
        """
        import pyvips

        try:
            picture = pyvips.Image.new_from_file(str(self.path), access="sequential", fail_on="error")
            if picture.bands not in (1, 3) or picture.format != "uchar":
                kind = f"{picture.bands} bands of {picture.format}"
                raise ImageError(f"{self.path} cannot be read in strips ({kind}): export it as RGB with 8 bits")
            region = pyvips.Region.new(picture)
            for top in range(0, self.height, rows):
                tall = min(rows, self.height - top)
                values = np.frombuffer(region.fetch(0, top, self.width, tall), np.uint8)
                pixels = values.reshape(tall, self.width, picture.bands)
                yield np.repeat(pixels, 3, axis=2) if picture.bands == 1 else pixels
        except pyvips.Error as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise ImageError(f"{self.path} cannot be read as an image ({reason}): replace it or take it out") from None


def opened(path: Path, first: dict[str, Path] | None = None) -> StripImage | None:
    """Return a large image file that can be read in strips; None for all others.

    If a large image cannot be read in strips, a warning says why, and how much memory it takes to decode it whole.
    Damaged files and files that are no images are left to `images.read_image`, which says what is wrong with them.
    So are pipes, which can be read only once.

    Args:
        path: the file.
        first: the first image for each reason, of several images. Other images are not warned of again. Threads may
            share it.
    """
    limit = images.max_pixels()
    if not path.is_file():
        return None
    try:
        with images.open_image(path) as picture:
            pixels = picture.width * picture.height
            if not MIN_PIXELS <= pixels <= limit:
                return None
            size, mode, reason = (picture.height, picture.width), picture.mode, _obstacle(picture)
    except Exception:  # Pillow's plugins raise errors of any type
        return None
    if not reason:
        return StripImage(path, *size)
    if first is None or first.setdefault(reason, path) is path:
        gigabytes = BYTES.get(mode, 7) * pixels / 1e9
        others = "" if first is None else ". Other images with the same reason are not named"
        log.warning("%s is decoded whole, which takes %.1f GB: %s%s", path, gigabytes, reason, others)
    return None


def _obstacle(picture: PIL.Image.Image) -> str:
    """Return why an image cannot be read in strips, or ""."""
    tags: Any = getattr(picture, "tag_v2", {})
    if picture.format not in ("JPEG", "PNG", "TIFF"):
        return f"only JPEG, PNG and TIFF can be read in strips, not {picture.format}"
    deep = max(tags.get(images.BITS_PER_SAMPLE, (8,))) != 8 or ";16" in images.raw_mode(picture)
    samples = tags.get(images.SAMPLES_PER_PIXEL, len(picture.mode))
    is_odd = samples != len(picture.mode) or "transparency" in picture.info
    if picture.mode not in ("L", "RGB") or deep or is_odd:
        return "only grey and RGB images of 8 bits can be read in strips"
    if "progression" in picture.info or picture.info.get("interlace"):
        return "a progressive or interlaced image cannot be read in strips"
    if picture.getexif().get(images.ORIENTATION, 1) != 1:
        return "it has to be turned by its Exif orientation"
    is_inverted = tags.get(images.WHITE_IS_ZERO) == 0 or images.SIGNED in tags.get(images.SAMPLE_FORMAT, ())
    if is_inverted or getattr(picture, "n_frames", 1) > 1:
        return "a TIFF with several images, with signed values or with white as 0 cannot be read in strips"
    return "" if find_spec("pyvips") else 'pip install "pyvips[binary]" reads it in strips'


class Bands:
    """Cuts tiles out of an image while it is read in strips. Only the rows that tiles still need are in memory.

    Several threads may cut tiles. Each tile is cut exactly once, and about in the order of the rows.
    """

    def __init__(self, image: StripImage, windows: Sequence[Window]) -> None:
        """Take the image, and all tiles that will be cut."""
        factor = max(1, max(image.height, image.width) // LONGEST_SIDE)
        self._picture: list[Image] = []
        self._factor, self._width = factor, max(1, round(image.width / factor))
        self._reader = image.strips(max(1, ROWS // factor) * factor)
        self._strips: deque[tuple[int, Image]] = deque()
        self._end = 0
        self._uncut = Counter(one.y for one in windows)
        self._lock = Lock()

    @property
    def picture(self) -> Image:
        """The whole image, shrunk: (h, w, 3) uint8 RGB, at least `LONGEST_SIDE` pixels along its longer side."""
        with self._lock:
            while self._read_on():
                pass
            return np.concatenate(self._picture)

    def cut(self, window: Window) -> Image:
        """Return the pixels of a tile, (height, width, 3) uint8 RGB.

        Raises:
            ImageError: the file is damaged.
        """
        bottom = window.y + window.height
        with self._lock:
            while self._end < bottom and self._read_on():
                pass
            parts = [
                strip[max(0, window.y - top) : bottom - top, window.x : window.x + window.width]
                for top, strip in self._strips
                if top < bottom and top + len(strip) > window.y
            ]
            pixels = np.concatenate(parts)
            self._uncut[window.y] -= 1
            self._uncut += Counter()  # this drops rows of tiles that are all cut
            self._drop()
            return pixels

    def _read_on(self) -> bool:
        """Read a strip. Return whether there was one."""
        strip = next(self._reader, None)
        if strip is None:
            return False
        self._picture.append(reduced(strip, -(-len(strip) // self._factor), self._width))
        self._strips.append((self._end, strip))
        self._end += len(strip)
        self._drop()
        images.give_back_memory()  # strips are large, and leave gaps that nothing else fits into
        return True

    def _drop(self) -> None:
        """Drop the strips that no tile needs any more."""
        needed = min(self._uncut, default=self._end)
        while self._strips and self._strips[0][0] + len(self._strips[0][1]) <= needed:
            self._strips.popleft()


def shrunk(image: StripImage) -> Image:
    """Return a smaller picture of an image, see `Bands.picture`.

    Raises:
        ImageError: the file is damaged.
    """
    return Bands(image, []).picture


def reduced(pixels: Image, height: int, width: int) -> Image:
    """Return the image at a smaller size. Each pixel is the mean of those that it covers, so small spots stay."""
    return np.asarray(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
