"""Maps of scores: the probability of a defect in each cell of a grid over an image. The module needs no PyTorch."""

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from flawmask import masks
from flawmask.masks import Mask
from flawmask.tiles import Window

Floats = npt.NDArray[np.float32]

MAX_CELLS = 1024
"""The most rows, and the most columns, of the map of an image that is seen in tiles: 4 MB for each class of defects."""


def interpolated(grid: Floats, height: int, width: int) -> Floats:
    """Return the values of a grid, (rows, columns), at the centres of an image's pixels: (height, width) float32.

    They are bilinear between the centres of cells. Beyond the centres of the outermost cells, these cells' values go
    on.
    """
    return np.asarray(cv2.resize(grid, (width, height), interpolation=cv2.INTER_LINEAR), dtype=np.float32)


def within(maps: Floats, region: Mask) -> Floats:
    """Return the maps, (D, rows, columns), with 0 in all cells that lie outside of a region of the image.

    Args:
        maps: of the image.
        region: (height, width) bool.
    """
    rows, columns = maps.shape[1:]
    share = cv2.resize(region.astype(np.float32), (columns, rows), interpolation=cv2.INTER_AREA)
    return np.where(share > 0, maps, np.float32(0))


def of_tiles(
    seen: Sequence[tuple[Window, Floats]], tile: int, height: int, width: int, coarse: Floats | None = None
) -> Floats:
    """Return the maps of an image, (D, rows, columns), from those of its tiles.

    Its cells are as large as those of the tiles, or larger if there would be more than `MAX_CELLS` on a side. Where
    tiles overlap, and in larger cells, the highest value counts.

    Args:
        seen: at least one tile, each with its maps, (D, rows, columns). They cover the tile with its padding.
        tile: the side of a tile with its padding, in pixels of the image.
        height: of the image in pixels.
        width: of the image in pixels.
        coarse: the maps of the whole image, made small, which count where no tile was seen. Without them, that is 0.
    """
    classes, rows, columns = seen[0][1].shape
    cells = [max(1, round(side * count / tile)) for side, count in ((height, rows), (width, columns))]
    down, across = height / cells[0], width / cells[1]  # the pixels of the image per cell
    if coarse is None:
        whole = np.zeros((classes, *cells), np.float32)
    else:
        whole = np.stack([interpolated(of_class, *cells) for of_class in coarse])
    for window, maps in seen:
        top, left = int(window.y / down), int(window.x / across)
        bottom = min(cells[0], math.ceil((window.y + window.height) / down))
        right = min(cells[1], math.ceil((window.x + window.width) / across))
        # From the centre of a cell of the image to the place in the tile's map.
        to_map = np.array(
            [
                [across * columns / tile, 0, ((left + 0.5) * across - window.x) * columns / tile - 0.5],
                [0, down * rows / tile, ((top + 0.5) * down - window.y) * rows / tile - 0.5],
            ]
        )
        for of_class, of_tile in zip(whole[:, top:bottom, left:right], maps, strict=True):
            part = cv2.warpAffine(
                np.ascontiguousarray(of_tile),
                to_map,
                of_class.shape[::-1],
                flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                borderMode=cv2.BORDER_REPLICATE,
            )
            np.maximum(of_class, part, out=of_class)
    for axis, count in ((1, cells[0]), (2, cells[1])):
        if count > MAX_CELLS:
            whole = np.maximum.reduceat(whole, np.arange(MAX_CELLS) * count // MAX_CELLS, axis=axis)
    return whole


def region_of_peak(maps: Floats, height: int, width: int) -> tuple[int, dict[str, Any]]:
    """Return the region around the highest value of the maps, where the same map has at least half of that value.

    Args:
        maps: (D, rows, columns), of D classes.
        height: of the image in pixels.
        width: of the image in pixels.

    Returns:
        The class, 0 to D - 1, and the pixels of the region's cells as compressed RLE. The cells are connected. There is
        at least one pixel. No mask of the image's size is made.
    """
    number, row, column = (int(at) for at in np.unravel_index(maps.argmax(), maps.shape))
    of_class = maps[number]
    _, regions = cv2.connectedComponents((of_class >= of_class[row, column] / 2).astype(np.uint8), connectivity=8)
    return number, masks.enlarged(regions == regions[row, column], height, width)
