"""Convert masks to and from polygons, RLE, boxes and connected components.

No other module converts masks. A mask is a (height, width) bool array. Its written forms follow COCO's format
(https://cocodataset.org/#format-data). COCO polygons run along pixel *edges*. So their coordinates are whole numbers
from 0 to width and from 0 to height, and pycocotools rasterises them back to exactly the mask. An RLE is a dictionary
with `size`, [height, width], and `counts`: the run lengths, counted column by column.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from pycocotools import mask as rle_tools

UNITED = 8
"""So many masks are united at a time."""

Mask = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]
Segmentation = list[list[int]] | dict[str, Any]


@dataclass(frozen=True)
class Crop:
    """A crop of a mask. The mask is False outside the crop, so a small defect on a large image needs little memory.

    Attributes:
        mask: (height, width) bool, the crop.
        x: the column of the image where the crop begins.
        y: the row of the image where the crop begins.
    """

    mask: Mask
    x: int
    y: int


def crop_mask(mask: Mask) -> Crop:
    """Return the mask, cropped to its box.

    Raises:
        ValueError: the mask is empty.
    """
    x, y, width, height = box_of(mask)
    return Crop(mask[y : y + height, x : x + width], x, y)


def components(mask: Mask) -> Iterator[Mask]:
    """Yield each 8-connected region of the mask, (height, width) bool, in the reading order of their first pixels.

    The regions are made one at a time, because a noisy mask may have thousands, each as large as the image.
    """
    _, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    values, first_pixels = np.unique(labels, return_index=True)
    for label in values[np.argsort(first_pixels)]:
        if label:
            yield labels == label


def crop_components(mask: Mask) -> list[Crop]:
    """Return the regions that `components` yields, each cropped to its box.

    Raises:
        ValueError: the mask is empty.
    """
    crop = crop_mask(mask)  # for OpenCV, the whole mask takes thirty times as long as the crop around the defect
    count, labels, boxes, _ = cv2.connectedComponentsWithStats(crop.mask.astype(np.uint8), connectivity=8)
    crops = []
    for label in range(1, count):
        x, y, width, height = (int(side) for side in boxes[label, : cv2.CC_STAT_AREA])
        crops.append(Crop(labels[y : y + height, x : x + width] == label, crop.x + x, crop.y + y))
    return sorted(crops, key=lambda crop: (crop.y, crop.x + int(crop.mask[0].argmax())))


def box_of(mask: Mask) -> tuple[int, int, int, int]:
    """Return the mask's box as (x, y, width, height) in pixels; a mask that is one pixel wide has width 1.

    Raises:
        ValueError: the mask is empty.
    """
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if not len(columns):
        raise ValueError("an empty mask has no box")
    x, y = int(columns[0]), int(rows[0])
    return x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1


def box_of_rle(rle: dict[str, Any]) -> tuple[int, int, int, int]:
    """Return the box (x, y, width, height) of a compressed RLE, which must have a pixel. See `box_of`."""
    x, y, width, height = (int(side) for side in rle_tools.toBbox(rle))
    return x, y, width, height


def part_of_rle(rle: dict[str, Any], x: int, y: int, width: int, height: int) -> Mask:
    """Return a part of the mask of a compressed RLE, (height, width) bool.

    Only this part is decoded. On a large image, the whole mask may be hundreds of times as large.

    Args:
        rle: in the form that `to_rle` returns.
        x: the column where the part begins.
        y: the row where the part begins.
        width: of the part, in pixels.
        height: of the part, in pixels.
    """
    return _filled((height, width), *_runs_within(rle, x, y, width, height))


def row_bands(rle: dict[str, Any], rows: int) -> Iterator[Mask]:
    """Yield the mask of a compressed RLE from top to bottom, (rows, width) bool. The last band may be lower."""
    height, width = rle["size"]
    column, top, bottom = _runs_by_column(rle)
    for first in range(0, height, rows):
        tall = min(rows, height - first)
        inside = (top < first + tall) & (bottom > first)
        ends = (np.clip(side[inside] - first, 0, tall) for side in (top, bottom))
        yield _filled((tall, width), column[inside], *ends)


def shrunk_rle(rle: dict[str, Any], height: int, width: int) -> Mask:
    """Return the mask of a compressed RLE at a smaller size, (height, width) bool. No larger mask is made.

    A pixel is set if any of the mask's pixels touches it, so that thin masks stay whole.
    """
    rows, columns = rle["size"]
    column, top, bottom = _runs_by_column(rle)
    mask = np.zeros((height, width), dtype=bool)
    if len(column):
        first, last = column * width // columns, -(-(column + 1) * width // columns) - 1
        top, bottom = top * height // rows, -(-bottom * height // rows)
        x, y, size = first.min(), top.min(), (int(bottom.max() - top.min()), int(last.max() - first.min()) + 1)
        window = mask[y : y + size[0], x : x + size[1]]
        for side in (first, last):
            window |= _filled(size, side - x, top - y, bottom - y)
    return mask


def _filled(shape: tuple[int, int], column: Counts, top: Counts, bottom: Counts) -> Mask:
    """Return a mask with the pixels of runs: their columns, their first rows and the rows after their last ones."""
    height, width = shape
    changes = np.zeros((height + 1, width), np.int32)
    np.add.at(changes, (top, column), 1)  # runs may overlap
    np.add.at(changes, (bottom, column), -1)
    return np.asarray(np.cumsum(changes[:-1], axis=0, dtype=np.int32) > 0)


def _runs_by_column(rle: dict[str, Any]) -> tuple[Counts, Counts, Counts]:
    """Return the column, the first row and the row after the last one of each run of mask pixels.

    A run that continues in the next column is one run for each column.
    """
    rows = rle["size"][0]
    counts = _counts_in(rle["counts"])
    assert counts is not None
    ends = np.cumsum(counts)
    first, last = ends[0:-1:2], ends[1::2] - 1  # pixel of each run of the mask, counted column by column
    runs = first <= last
    first, last = first[runs], last[runs]
    # Split a run that continues in the next column into one run for each column.
    columns = last // rows - first // rows + 1
    of_run = np.repeat(np.arange(len(first)), columns)
    column = first[of_run] // rows + np.arange(len(of_run)) - np.repeat(np.cumsum(columns) - columns, columns)
    top = np.maximum(first[of_run], column * rows) - column * rows
    bottom = np.minimum(last[of_run], column * rows + rows - 1) - column * rows + 1
    return column, top, bottom


def encode(mask: Mask) -> Segmentation:
    """Return the mask as a COCO `segmentation`: polygons, or compressed RLE if a region has a hole.

    COCO polygons cannot have holes. pycocotools decodes either form to exactly the mask.
    """
    polygons = to_polygons(mask)
    return to_rle(mask) if polygons is None else polygons


def encode_crop(crop: Crop, height: int, width: int) -> Segmentation:
    """Return the COCO `segmentation` of a cropped mask of a (height, width) image; see `encode`."""
    rows, columns = crop.mask.shape
    if crop.mask.all():  # fast path, for example for the mask of a good image
        left, top, right, bottom = crop.x, crop.y, crop.x + columns, crop.y + rows
        return [[left, top, right, top, right, bottom, left, bottom]]
    polygons = to_polygons(crop.mask)
    if polygons is None:
        mask = np.zeros((height, width), dtype=bool)
        mask[crop.y : crop.y + rows, crop.x : crop.x + columns] = crop.mask
        return to_rle(mask)
    return [[_interned(at + (crop.y if odd % 2 else crop.x)) for odd, at in enumerate(polygon)] for polygon in polygons]


@cache
def _interned(coordinate: int) -> int:
    """Return one shared object for equal numbers. This halves the memory of all records together."""
    return coordinate


def decode(segmentation: Segmentation, height: int, width: int) -> Mask:
    """Return the (height, width) mask of a COCO `segmentation`: polygons, or compressed or uncompressed RLE.

    Raises:
        ValueError: it is neither, or an RLE of another size.
    """
    return np.asarray(rle_tools.decode(as_rle(segmentation, height, width)), dtype=bool)


def nested(segmentation: Any) -> Any:
    """Return polygons in COCO's form, [[x0, y0, x1, y1, ...], ...].

    Tools also write one flat list of numbers, or lists of points [x, y]. Other values are returned unchanged.
    """
    if not isinstance(segmentation, list) or not segmentation:
        return segmentation
    if isinstance(segmentation[0], int | float):
        return [segmentation]
    if _are_points(segmentation):
        return [_flat(segmentation)]
    if any(map(_are_points, segmentation)):
        return [_flat(ring) if _are_points(ring) else ring for ring in segmentation]
    return segmentation


def _are_points(ring: Any) -> bool:
    return (
        isinstance(ring, list) and len(ring) > 2 and all(isinstance(point, list) and len(point) == 2 for point in ring)
    )


def _flat(points: list[list[Any]]) -> list[Any]:
    return [side for point in points for side in point]


MAX_REACH = 10
"""How far a polygon may reach out of its image, in image sizes. pycocotools allocates memory for this distance."""


def segmentation_problem(segmentation: Any, height: int, width: int) -> str:
    """Return why a value is not a valid COCO `segmentation` for an image of this size, or "" if it is valid.

    The value may come from any file. A valid one needs time and memory in proportion to the image's pixels. On some
    invalid ones pycocotools crashes, and it reads a polygon of two points as a box.
    """
    if isinstance(segmentation, list):
        if not segmentation:
            return "no segmentation, and a box is not a mask"
        return next((reason for ring in segmentation if (reason := _bad_ring(ring, height, width))), "")
    if isinstance(segmentation, dict) and "counts" in segmentation and "size" in segmentation:
        return _bad_rle(segmentation, height, width)
    return f"neither polygons nor RLE, but {_short(segmentation)}"


def _bad_rle(rle: dict[str, Any], height: int, width: int) -> str:
    if rle["size"] != [height, width]:
        return f"an RLE of the size {_short(rle['size'])} on an image of {[height, width]}"
    counts = _counts_in(rle["counts"]) if isinstance(rle["counts"], str) else rle["counts"]
    if not isinstance(counts, list) or not all(type(count) is int for count in counts):
        return f"an RLE with invalid counts: {_short(rle['counts'])}"
    if (counts and min(counts) < 0) or sum(counts) != height * width:
        return "an RLE whose runs do not add up to its size"
    return ""


def _bad_ring(ring: Any, height: int, width: int) -> str:
    if not isinstance(ring, list) or len(ring) % 2:
        return f"a polygon that is not a list of x and y: {_short(ring)}"
    if len(ring) < 6:
        return f"a polygon with {len(ring) // 2} points"
    try:
        is_finite = math.isfinite(sum(ring))
        lowest, highest = min(ring), max(ring)
    except (TypeError, OverflowError):
        is_finite = False
    if not is_finite:
        return "a polygon with coordinates that are not numbers"
    if lowest < -MAX_REACH * max(height, width) or highest > (1 + MAX_REACH) * max(height, width):
        return f"a polygon that reaches far out of the image: from {lowest} to {highest}"
    return ""


def _counts_in(text: str) -> list[int] | None:
    """Return the run lengths in the text of a compressed RLE; None if the text is not one.

    Each number is written in groups of 5 bits, the lowest bits first. A sixth bit says that another group follows. The
    highest bit of the last group is the sign. From the third number on, the difference to the number two places
    earlier is written.
    """
    groups = np.frombuffer(text.encode("latin-1", "replace"), np.uint8).astype(np.int64) - 48
    if not len(groups) or groups.min() < 0 or groups.max() > 63 or groups[-1] & 32:
        return None
    last = np.flatnonzero(groups < 32)
    first = np.concatenate(([0], last[:-1] + 1))
    place = np.arange(len(groups)) - np.repeat(first, last - first + 1)
    if place.max() > 6:  # more than 35 bits: no image has so many pixels
        return None
    values = np.add.reduceat((groups & 31) << (5 * place), first)
    values -= np.where(groups[last] & 16, np.int64(1) << (5 * (place[last] + 1)), 0)
    counts: list[int] = []
    for number, value in enumerate(values.tolist()):
        counts.append(value + counts[number - 2] if number > 2 else value)
    return counts


def _short(value: Any) -> str:
    """Return the `repr` of a value, cut off if it is long."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def rle_of_box(box: tuple[float, float, float, float], height: int, width: int) -> dict[str, Any]:
    """Return the mask of all pixels that a box (x1, y1, x2, y2) touches, as compressed RLE of the image's size."""
    x1, y1, x2, y2 = box
    left, top = max(0, math.floor(x1)), max(0, math.floor(y1))
    across, down = max(0, min(width, math.ceil(x2)) - left), max(0, min(height, math.ceil(y2)) - top)
    (rle,) = rle_tools.frPyObjects(np.array([[left, top, across, down]], dtype=np.float64), height, width)
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def looks_inverted(mask: Mask) -> bool:
    """Return whether all four corners of a mask are defect. Then the tool may have drawn the defect black."""
    return bool(mask[[0, 0, -1, -1], [0, -1, 0, -1]].all())


def as_rle(segmentation: Segmentation, height: int, width: int) -> dict[str, Any]:
    """Return a COCO `segmentation` as compressed RLE of the image's size, in the form that `to_rle` returns.

    Raises:
        ValueError: it is not a segmentation, or an RLE of another size.
    """
    if isinstance(segmentation, list):
        if not segmentation:
            return to_rle(np.zeros((height, width), dtype=bool))
        rle = rle_tools.merge(rle_tools.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation.get("counts"), list):
        rle = rle_tools.frPyObjects(segmentation, height, width)
    else:
        rle = segmentation
    if list(rle["size"]) != [height, width]:
        raise ValueError(f"an RLE of {rle['size'][1]}x{rle['size'][0]} on an image of {width}x{height}")
    counts = rle["counts"]
    return {"size": [height, width], "counts": counts.decode() if isinstance(counts, bytes) else counts}


def has_pixel(segmentation: Segmentation, height: int, width: int) -> bool:
    """Return whether a COCO `segmentation` has a pixel in its (height, width) image. It must be valid."""
    if isinstance(segmentation, list):  # no need to merge the polygons into one mask
        return bool(np.any(rle_tools.area(rle_tools.frPyObjects(segmentation, height, width))))
    return area(as_rle(segmentation, height, width)) > 0


def to_rle(mask: Mask) -> dict[str, Any]:
    """Return the mask as compressed COCO RLE, its `counts` as text so that JSON can hold it."""
    return _text(rle_tools.encode(np.asfortranarray(mask, dtype=np.uint8)))


def rle_of_changes(changes: npt.NDArray[np.int64], height: int, width: int) -> tuple[dict[str, Any], int]:
    """Return the compressed RLE of a (height, width) mask that is given by its runs, and its number of pixels.

    Args:
        changes: the indices `column * height + row` where a run begins, and where the first pixel after a run lies.
            They are unique and in ascending order.
        height: the height of the image.
        width: the width of the image.
    """
    ends = [] if len(changes) and changes[-1] == height * width else [height * width]  # no empty run at the end
    counts = np.diff(changes, prepend=0, append=ends)
    return _compressed(counts, height, width), int(counts[1::2].sum())


def union(rles: Sequence[dict[str, Any]], height: int, width: int) -> dict[str, Any]:
    """Return the compressed RLE of the union of masks, without decoding them.

    Args:
        rles: any number of compressed RLEs of this size, in the form that `to_rle` returns.
        height: the height of the images.
        width: the width of the images.
    """
    if not rles:
        return _compressed(np.array([height * width]), height, width)
    parts: list[Any] = list(rles)
    while len(parts) > 1:  # pycocotools merges one mask after the other: a large union would be copied for each
        parts = [rle_tools.merge(parts[at : at + UNITED]) for at in range(0, len(parts), UNITED)]
    return _text(rle_tools.merge(parts))


def intersection(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return the compressed RLE of the intersection of two masks of the same size."""
    return _text(rle_tools.merge([one, other], intersect=True))


def dilated(rle: dict[str, Any]) -> dict[str, Any]:
    """Return the compressed RLE of the mask and of all pixels that touch it, by a side or by a corner.

    No mask is decoded.
    """
    height, width = rle["size"]
    column, top, bottom = _runs_by_column(rle)
    column = np.concatenate((column - 1, column, column + 1))
    top, bottom = np.tile(np.maximum(top - 1, 0), 3), np.tile(np.minimum(bottom + 1, height), 3)
    inside = (column >= 0) & (column < width)
    starts, ends = (column * height + top)[inside], (column * height + bottom)[inside]
    places, event = np.unique(np.concatenate((starts, ends)), return_inverse=True)
    steps = np.bincount(event[: len(starts)], minlength=len(places)) - np.bincount(
        event[len(starts) :], minlength=len(places)
    )
    is_mask = np.cumsum(steps) > 0  # from this place to the next
    return rle_of_changes(places[np.diff(is_mask, prepend=False)], height, width)[0]


def moved(rle: dict[str, Any], x: int, y: int, height: int, width: int) -> dict[str, Any]:
    """Return the compressed RLE of a mask that was cut out of a larger image, at that image's size.

    No mask is decoded.

    Args:
        rle: the mask of the part, in the form that `to_rle` returns.
        x: the column of the image where the part begins.
        y: the row of the image where the part begins.
        height: the height of the image.
        width: the width of the image.
    """
    column, top, bottom = _runs_by_column(rle)
    return _rle_of_runs(column + x, top + y, bottom + y, height, width)


def enlarged(cells: Mask, height: int, width: int) -> dict[str, Any]:
    """Return a mask of cells as the compressed RLE of an image: the pixels whose centres lie in a cell of the mask.

    If no pixel's centre does, because the image has fewer pixels than there are cells, it is the pixel that holds the
    centre of a cell. No mask of the image's size is made.

    Args:
        cells: (rows, columns) bool, with at least one cell. The grid covers the image.
        height: of the image in pixels.
        width: of the image in pixels.
    """
    rows, columns = cells.shape
    column, top, bottom = _runs_by_column(to_rle(cells))

    def first_pixel(edge: Counts, pixels: int, count: int) -> Counts:
        return -(-(2 * edge * pixels - count) // (2 * count))  # the first one with its centre at or behind the edge

    tops, bottoms = first_pixel(top, height, rows), first_pixel(bottom, height, rows)
    left, right = first_pixel(column, width, columns), first_pixel(column + 1, width, columns)
    seen = (tops < bottoms) & (left < right)
    if not seen.any():
        y, x = int((top[0] + 0.5) * height / rows), int((column[0] + 0.5) * width / columns)
        tops, bottoms, left, right = (np.array([one]) for one in (y, y + 1, x, x + 1))
        seen = np.array([True])
    times = (right - left)[seen]
    # Each run of cells becomes a run of pixels in each of its columns.
    number = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
    return _rle_of_runs(
        np.repeat(left[seen], times) + number,
        np.repeat(tops[seen], times),
        np.repeat(bottoms[seen], times),
        height,
        width,
    )


def cropped(rle: dict[str, Any], x: int, y: int, width: int, height: int) -> dict[str, Any]:
    """Return the compressed RLE of a part of a mask, at the part's size: `moved` backwards. No mask is decoded.

    Args:
        rle: in the form that `to_rle` returns.
        x: the column where the part begins.
        y: the row where the part begins.
        width: of the part, in pixels.
        height: of the part, in pixels.
    """
    return _rle_of_runs(*_runs_within(rle, x, y, width, height), height, width)


def _runs_within(rle: dict[str, Any], x: int, y: int, width: int, height: int) -> tuple[Counts, Counts, Counts]:
    """Return the runs of `_runs_by_column` in a part of the mask, counted from the part's corner."""
    column, top, bottom = _runs_by_column(rle)
    top, bottom = np.clip(top - y, 0, height), np.clip(bottom - y, 0, height)
    inside = (column >= x) & (column < x + width) & (top < bottom)
    return column[inside] - x, top[inside], bottom[inside]


def _rle_of_runs(column: Counts, top: Counts, bottom: Counts, height: int, width: int) -> dict[str, Any]:
    """Return the compressed RLE of runs: their columns, their first rows and the rows after their last ones."""
    places, times = np.unique(np.stack((column * height + top, column * height + bottom)), return_counts=True)
    return rle_of_changes(places[times == 1], height, width)[0]  # a run that goes on in the next column has no end


def touching(rles: Sequence[dict[str, Any]]) -> Mask:
    """Return which of N masks of one image overlap or touch, by a side or by a corner: (N, N) bool, symmetric.

    An empty mask touches nothing, not even itself.

    Args:
        rles: compressed RLEs of one size, in the form that `to_rle` returns.
    """
    if not rles:
        return np.zeros((0, 0), dtype=bool)
    not_crowds = [False] * len(rles)
    return np.asarray(rle_tools.iou([dilated(rle) for rle in rles], list(rles), not_crowds), dtype=np.float64) > 0


def shared_pixels(some: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> npt.NDArray[np.int64]:
    """Return how many pixels masks share with others: (N, M) for N and M compressed RLEs of one size."""
    # With crowds, pycocotools divides by the first mask's area instead of by the union's.
    shares = np.asarray(rle_tools.iou(list(some), list(others), [True] * len(others)), dtype=np.float64)
    areas = np.array([area(one) for one in some], dtype=np.float64)[:, None]
    return np.rint(shares.reshape(len(some), len(others)) * areas).astype(np.int64)


def area(rle: dict[str, Any]) -> int:
    """Return the number of pixels of a compressed RLE."""
    return int(rle_tools.area(rle))


def _compressed(counts: npt.NDArray[np.int64], height: int, width: int) -> dict[str, Any]:
    return _text(rle_tools.frPyObjects({"size": [height, width], "counts": counts}, height, width))


def _text(rle: dict[str, Any]) -> dict[str, Any]:
    """Return pycocotools' RLE with its `counts` as text, so that JSON can hold it."""
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()}


def to_polygons(mask: Mask) -> list[list[int]] | None:
    """Return the mask as COCO polygons `[x0, y0, x1, y1, ...]` along pixel edges; None if the mask has a hole.

    Each polygon is rectilinear and does not cross itself. It may touch itself at a pixel's corner, where background
    inside is connected to the outside by this corner only. Pixels that touch each other only at a corner become
    separate polygons.

    No contour tracing is needed. If the vertices are sorted by row, a horizontal edge joins each vertex with an even
    index to the next one. If they are sorted by column, a vertical edge does. (O'Rourke, "Uniqueness of orthogonal
    connect-the-dots", 1988.)
    """
    if not mask.any():
        return []
    left, top, width, height = box_of(mask)
    mask = mask[top : top + height, left : left + width]  # this keeps a small region of a large image cheap
    padded = np.pad(mask, 1).astype(np.int8)
    upper_left, upper_right = padded[:-1, :-1], padded[:-1, 1:]
    lower_left, lower_right = padded[1:, :-1], padded[1:, 1:]
    falling = (upper_left == lower_right) & (upper_right == lower_left) & (upper_left != upper_right)
    corner = (upper_left + upper_right + lower_left + lower_right) % 2 == 1
    ys, xs = np.nonzero(corner | falling)
    # Where two pixels touch at a corner, two vertices coincide: one for each pixel.
    twice = falling[ys, xs].astype(np.int64) + 1
    first_of_two = np.concatenate([np.arange(count) for count in twice]) if len(twice) else np.zeros(0, np.int64)
    ys, xs = np.repeat(ys, twice), np.repeat(xs, twice)
    rising = falling[ys, xs] & (upper_right[ys, xs] == 1)
    # Of two such vertices, one has the edge to the left. It has the upward edge if the upper left pixel is set, else
    # the downward edge.
    vertical_rank = np.where(rising, 1 - first_of_two, first_of_two)
    across, down = (
        _partners(np.lexsort((first_of_two, xs, ys))),
        _partners(np.lexsort((vertical_rank, ys, xs))),
    )

    polygons = []
    unvisited = np.ones(len(xs), dtype=bool)
    for start in range(len(xs)):
        if not unvisited[start]:
            continue
        loop, vertex = [], start
        while unvisited[vertex]:
            other = across[vertex]
            unvisited[vertex] = unvisited[other] = False
            loop += [vertex, other]
            vertex = down[other]
        x, y = xs[loop], ys[loop]
        # The first vertex is the topmost, then leftmost, of its loop. Its pixel is set, unless the loop is a hole.
        if not mask[y[0], x[0]]:
            return None
        polygons.append(np.stack((x + left, y + top), axis=1).ravel().tolist())
    return polygons


def _partners(order: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the partner of each vertex after pairing them off in this order: first with second, third with fourth."""
    partner = np.empty_like(order)
    partner[order[0::2]], partner[order[1::2]] = order[1::2], order[0::2]
    return partner
