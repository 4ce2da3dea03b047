"""Paste a detection's 28 x 28 mask probabilities into its image, as runs of mask pixels or as probabilities in its box.

The result is that of torchvision's `paste_masks_in_image`. The probabilities get a border of zeros, the box grows to
include that border and is rounded towards zero, and the probabilities are interpolated over the pixels of the box.
PyTorch computes this in float32, in varying order. So a pixel within about 1e-6 of the threshold may differ.
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

MASK_THRESHOLD = 0.5
"""A pixel belongs to an instance if its probability is above this."""


def expand_boxes(boxes: Floats, cells: int) -> Integers:
    """Return the boxes in whole pixels, with room for the border: (N, 4) int64 x1 y1 x2 y2, x2 and y2 included.

    Args:
        boxes: (N, 4) float32, x1 y1 x2 y2 in pixels of the image.
        cells: the number of probabilities along each side of a box.
    """
    centre = (boxes[:, 2:] + boxes[:, :2]) * 0.5
    half = (boxes[:, 2:] - boxes[:, :2]) * 0.5 * ((cells + 2) / cells)
    return np.hstack((centre - half, centre + half)).astype(np.int64)


def mask_changes(probabilities: Floats, box: Integers, height: int, width: int) -> Integers:
    """Return the starts and ends of the runs of a detection's mask pixels, counted column by column, within the image.

    In a column, the interpolated probability is linear between two neighbouring rows of cells. So it crosses the
    threshold there at most once, namely if the two rows lie on different sides of it. The pixels between them need not
    be computed.

    Args:
        probabilities: (M, M) float32, 0 to 1.
        box: (4,) int64, a row of the result of `expand_boxes`.
        height: the height of the image.
        width: the width of the image.

    Returns:
        (2 * runs,) int64, ascending: `column * height + row` of the first pixel of each run and of the first pixel
        after it.
    """
    padded = np.pad(probabilities, 1)
    left, top, right, bottom = box.tolist()
    across, down = _positions(len(padded), right - left + 1), _positions(len(padded), bottom - top + 1)
    first, last = max(left, 0), min(right + 1, width)
    by_column = _interpolate(padded.T, across[first - left : max(last - left, 0)])
    inside = by_column > MASK_THRESHOLD
    column, cell = np.nonzero(inside[:, 1:] != inside[:, :-1])
    above, below = by_column[column, cell].astype(np.float64), by_column[column, cell + 1]
    crossing = cell + (MASK_THRESHOLD - above) / (below - above)
    # The border of zeros is outside the mask, so starts and ends alternate in each column, and over all columns.
    row = np.empty_like(column)
    row[0::2] = np.searchsorted(down, crossing[0::2], side="right")  # a pixel exactly at the threshold is outside
    row[1::2] = np.searchsorted(down, crossing[1::2], side="left")
    changes = (first + column) * height + np.clip(top + row, 0, height)
    # An empty run starts and ends at one place. So does a run that continues at the top of the next column. Both drop.
    places, times = np.unique(changes, return_counts=True)
    return np.asarray(places[times % 2 == 1])


def probabilities_in_box(probabilities: Floats, box: Integers, height: int, width: int) -> tuple[Floats, int, int]:
    """Return the probabilities of the pixels in the box, within the image, and the box's corner x, y there.

    They are (rows, columns) float32, 0 to 1, interpolated bilinearly between the centres of the cells.

    Args:
        probabilities: (M, M) float32, 0 to 1.
        box: (4,) int64, a row of the result of `expand_boxes`.
        height: the height of the image.
        width: the width of the image.
    """
    padded = np.pad(probabilities, 1)
    left, top, right, bottom = box.tolist()
    across, down = _positions(len(padded), right - left + 1), _positions(len(padded), bottom - top + 1)
    x, y = max(left, 0), max(top, 0)
    by_column = _interpolate(padded.T, across[x - left : max(min(right + 1, width) - left, 0)])
    return _interpolate(by_column.T, down[y - top : max(min(bottom + 1, height) - top, 0)]), x, y


def _positions(cells: int, pixels: int) -> npt.NDArray[np.float64]:
    """Return the position of each pixel's centre in units of cells, counted from the first cell's centre: (pixels,)."""
    return np.asarray(np.maximum((np.arange(pixels) + 0.5) * cells / pixels - 0.5, 0))


def _interpolate(cells: Floats, positions: npt.NDArray[np.float64]) -> Floats:
    """Return rows of cells interpolated at the positions: (M, K) and (N,) to (N, K).

    This is no matrix product, because a matrix product starts threads, which would wait for those of the network.
    """
    lower = positions.astype(np.int64)
    fraction = (positions - lower).astype(np.float32)[:, None]
    result, above = cells[lower], cells[np.minimum(lower + 1, len(cells) - 1)]
    result *= 1 - fraction  # in place, because it may be as large as an image
    above *= fraction
    result += above
    return result
