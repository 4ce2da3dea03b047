"""Where a detection's 28 x 28 probabilities fall on its image: as runs of mask pixels, or spread over its box.

The pixels are those of torchvision's `paste_masks_in_image`: the probabilities get a border of zeros, the box grows
with them and is rounded towards zero, and they are interpolated over the pixels that it then covers. PyTorch does that
in float32, in one order or another: a pixel within some 1e-6 of the threshold may fall to either side of it.
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Whole = npt.NDArray[np.int64]

MASK_THRESHOLD = 0.5
"""A pixel belongs to an instance where the network holds that more likely than not."""


def expanded_boxes(boxes: Floats, cells: int) -> Whole:
    """Return boxes in whole pixels with room for the border: (N, 4) int64 x1 y1 x2 y2, the last ones included.

    Args:
        boxes: (N, 4) float32, x1 y1 x2 y2 in pixels of the image.
        cells: how many probabilities lie side by side in a box.
    """
    centre = (boxes[:, 2:] + boxes[:, :2]) * 0.5
    half = (boxes[:, 2:] - boxes[:, :2]) * 0.5 * ((cells + 2) / cells)
    return np.hstack((centre - half, centre + half)).astype(np.int64)


def mask_changes(probabilities: Floats, box: Whole, height: int, width: int) -> Whole:
    """Return where a detection's mask begins and ends as pixels are counted column by column, cut to the image.

    Down a column, interpolation is a straight line from one row of cells to the next, so it crosses the threshold once
    where these two lie on both sides of it, and nowhere else: no pixel in between need be looked at.

    Args:
        probabilities: (M, M) float32, 0 to 1.
        box: (4,) int64, as `expanded_boxes` returns it.
        height: the image's.
        width: the image's.

    Returns:
        (2 * runs,) int64, ascending: `column * height + row` of the first pixel of a run and of the first behind it.
    """
    padded = np.pad(probabilities, 1)
    left, top, right, bottom = box.tolist()
    across, down = _positions(len(padded), right - left + 1), _positions(len(padded), bottom - top + 1)
    first, last = max(left, 0), min(right + 1, width)
    by_column = _between(padded.T, across[first - left : max(last - left, 0)])
    inside = by_column > MASK_THRESHOLD
    column, cell = np.nonzero(inside[:, 1:] != inside[:, :-1])
    here, there = by_column[column, cell].astype(np.float64), by_column[column, cell + 1]
    crossing = cell + (MASK_THRESHOLD - here) / (there - here)
    # The border is outside, so in each column, and over all of them, beginnings and ends take turns.
    row = np.empty_like(column)
    row[0::2] = np.searchsorted(down, crossing[0::2], side="right")  # just at the threshold is outside
    row[1::2] = np.searchsorted(down, crossing[1::2], side="left")
    changes = (first + column) * height + np.clip(top + row, 0, height)
    # A run of no pixels, or one that goes on at the top of the next column, changes twice at one place.
    places, times = np.unique(changes, return_counts=True)
    return np.asarray(places[times % 2 == 1])


def probabilities_in_box(probabilities: Floats, box: Whole, height: int, width: int) -> tuple[Floats, int, int]:
    """Return the probabilities at the pixels that the box covers, cut to the image, and its corner (x, y) there.

    They are (rows, columns) float32, 0 to 1, interpolated bilinearly between the middles of the cells.

    Args:
        probabilities: (M, M) float32, 0 to 1.
        box: (4,) int64, as `expanded_boxes` returns it.
        height: the image's.
        width: the image's.
    """
    padded = np.pad(probabilities, 1)
    left, top, right, bottom = box.tolist()
    across, down = _positions(len(padded), right - left + 1), _positions(len(padded), bottom - top + 1)
    x, y = max(left, 0), max(top, 0)
    by_column = _between(padded.T, across[x - left : max(min(right + 1, width) - left, 0)])
    return _between(by_column.T, down[y - top : max(min(bottom + 1, height) - top, 0)]), x, y


def _positions(cells: int, pixels: int) -> npt.NDArray[np.float64]:
    """Return where the middle of each pixel lies among the middles of the cells: (pixels,), 0 to `cells` - 0.5."""
    return np.asarray(np.maximum((np.arange(pixels) + 0.5) * cells / pixels - 0.5, 0))


def _between(cells: Floats, positions: npt.NDArray[np.float64]) -> Floats:
    """Return rows of cells interpolated at the positions: (M, K) and (N,) to (N, K).

    No matrix product: the threads that one starts would wait for those that the network has started.
    """
    lower = positions.astype(np.int64)
    share = (positions - lower).astype(np.float32)[:, None]
    found, above = cells[lower], cells[np.minimum(lower + 1, len(cells) - 1)]
    found *= 1 - share  # in place, since it may be as large as an image
    above *= share
    found += above
    return found
