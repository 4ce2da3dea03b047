"""Tiles of an image: where they lie, and how they are cut. Training and inference use the same ones."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from flawmask.errors import FlawmaskError

log = logging.getLogger(__name__)

TileChoice = Literal["off", "auto"]

TileFrom = Literal["all", "coarse"]
"""Which tiles the network sees: all of an image, or those where it sees something on the whole image, made small."""

WHOLE_IMAGES = {"tile": None, "overlap": 0, "tile_from": "all"}
"""What results say of a network that sees images whole. Results of older versions say nothing, and mean this."""

MIN_TILE, MAX_TILE = 32, 65_536
"""The smallest and the largest tile, in pixels."""

OVERLAP = 8
"""Where nothing is known about the defects, tiles overlap by this part of their side: an eighth."""


class Window(NamedTuple):
    """A part of an image.

    Attributes:
        x: the column of the image where it begins.
        y: the row of the image where it begins.
        width: in pixels.
        height: in pixels.
    """

    x: int
    y: int
    width: int
    height: int

    def overlap(self, other: "Window") -> "Window | None":
        """Return the part that both windows share; None where they share no pixel."""
        left, top = max(self.x, other.x), max(self.y, other.y)
        right = min(self.x + self.width, other.x + other.width)
        bottom = min(self.y + self.height, other.y + other.height)
        return Window(left, top, right - left, bottom - top) if left < right and top < bottom else None


@dataclass(frozen=True)
class Tiling:
    """How images are divided into square tiles that overlap.

    Attributes:
        size: the side of a tile, in pixels of the image.
        overlap: the fewest rows or columns that neighbouring tiles share, in pixels, at least 1.
        shift_y: how far the grid is moved up, in pixels; see `starts`.
        shift_x: how far it is moved to the left.

    Raises:
        FlawmaskError: the tile is too small, or the overlap does not fit it.
    """

    size: int
    overlap: int
    shift_y: int = 0
    shift_x: int = 0

    def __post_init__(self) -> None:
        if not MIN_TILE <= self.size <= MAX_TILE:
            raise FlawmaskError(f"--tile is {self.size}: it must be {MIN_TILE} to {MAX_TILE} pixels, or off or auto")
        if not 1 <= self.overlap <= self.size // 2:
            raise FlawmaskError(
                f"--overlap is {self.overlap}: it must be 1 to {self.size // 2}, half of the tile of {self.size} pixels"
            )

    def windows(self, height: int, width: int) -> list[Window]:
        """Return the tiles of a (height, width) image, row by row. Together they cover each pixel.

        A tile is cut off at the edge of an image that is smaller than a tile.
        """
        tall, wide = min(self.size, height), min(self.size, width)
        return [
            Window(x, y, wide, tall)
            for y in starts(height, self.size, self.overlap, self.shift_y)
            for x in starts(width, self.size, self.overlap, self.shift_x)
        ]


def default_overlap(tile: int) -> int:
    """Return the overlap of tiles where nothing is known about the defects: an eighth of a tile."""
    return tile // OVERLAP


def starts(length: int, tile: int, overlap: int, shift: int = 0) -> list[int]:
    """Return where the tiles along a side begin, ascending. The last tile is moved inside the image.

    Args:
        length: of the side, in pixels.
        tile: the side of a tile.
        overlap: the fewest pixels that neighbouring tiles share.
        shift: how far all tiles but the first and the last are moved towards the start. A grid with another shift
            divides the same image in other places.
    """
    last = max(0, length - tile)
    step = tile - overlap
    return sorted({*(max(0, at) for at in range(-(shift % step), last, step)), last})


def cut(pixels: npt.NDArray[Any], window: Window) -> npt.NDArray[Any]:
    """Return a tile of an image or of a mask, (height, width, ...), as a view."""
    return pixels[window.y : window.y + window.height, window.x : window.x + window.width]


def padded(pixels: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """Return a tile, (size, size, 3) uint8, from one that may be smaller: black below and to the right.

    All tiles have one size, so that a network sees images of all sizes at the same scale.
    """
    if pixels.shape[:2] == (size, size):
        return pixels
    tile = np.zeros((size, size, 3), np.uint8)
    tile[: pixels.shape[0], : pixels.shape[1]] = pixels
    return tile


def check_sizes(tiling: Tiling, sizes: Sequence[tuple[int, int]], where: str, *, refuse: bool = True) -> None:
    """Warn how many images are smaller than a tile in height or width. They are padded to it.

    Args:
        tiling: the tiles.
        sizes: height and width of each image.
        where: the images' name in messages.
        refuse: whether it is an error if a tile is larger than every image, in height and in width.

    Raises:
        FlawmaskError: a tile is larger than every image.
    """
    height, width = max(sizes, key=max, default=(0, 0))
    if refuse and max(height, width) < tiling.size:
        raise FlawmaskError(
            f"--tile {tiling.size} is larger than every image of {where} (the largest is {width}x{height}): give at "
            f"most {max(height, width)}, or off"
        )
    warn_of_smaller(sum(min(size) < tiling.size for size in sizes), len(sizes), where, tiling.size)


def warn_of_smaller(small: int, total: int, where: str, tile: int) -> None:
    """Warn if some of all images are smaller than a tile of so many pixels."""
    if small:
        log.warning(
            "%d of %d images of %s are smaller than a tile of %d pixels in height or width: they are padded to it",
            *(small, total, where, tile),
        )
