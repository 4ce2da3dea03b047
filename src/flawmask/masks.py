"""Masks and what they are written as: polygons, RLE, boxes, connected components.

The only place that converts. A mask is a (height, width) bool array. What it is written as follows COCO's format
(https://cocodataset.org/#format-data). COCO polygons run along pixel *edges*, so their coordinates are whole numbers
from 0 to width and 0 to height and pycocotools rasterises them back to exactly the mask. An RLE is a dictionary of
`size`, [height, width], and `counts`: the lengths of its runs, counted column by column.
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

Mask = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]
Segmentation = list[list[int]] | dict[str, Any]


@dataclass(frozen=True)
class Cut:
    """A mask cut out of its image's, which is False everywhere else: a small defect costs nothing of a large image.

    Attributes:
        mask: (height, width) bool, the part that is cut out.
        x: column of the image where the part's first column lies.
        y: row of the image where the part's first row lies.
    """

    mask: Mask
    x: int
    y: int


def cut_out(mask: Mask) -> Cut:
    """Return the mask cut along its box.

    Raises:
        ValueError: the mask is empty.
    """
    x, y, width, height = box_of(mask)
    return Cut(mask[y : y + height, x : x + width], x, y)


def components(mask: Mask) -> Iterator[Mask]:
    """Yield each 8-connected region of the mask, (height, width) bool, in reading order of their first pixel.

    One at a time: a noisy mask may have thousands, each as large as the image.
    """
    _, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    found, first_pixels = np.unique(labels, return_index=True)
    for label in found[np.argsort(first_pixels)]:
        if label:
            yield labels == label


def cut_components(mask: Mask) -> list[Cut]:
    """Return what `components` yields, each region cut along its box.

    Raises:
        ValueError: the mask is empty.
    """
    whole = cut_out(mask)  # OpenCV takes thirty times as long for all of a mask as for the defect on it
    count, labels, boxes, _ = cv2.connectedComponentsWithStats(whole.mask.astype(np.uint8), connectivity=8)
    cuts = []
    for label in range(1, count):
        x, y, width, height = (int(side) for side in boxes[label, : cv2.CC_STAT_AREA])
        cuts.append(Cut(labels[y : y + height, x : x + width] == label, whole.x + x, whole.y + y))
    return sorted(cuts, key=lambda cut: (cut.y, cut.x + int(cut.mask[0].argmax())))


def box_of(mask: Mask) -> tuple[int, int, int, int]:
    """Return the mask's box as (x, y, width, height) in pixels, width being the number of columns it covers.

    Raises:
        ValueError: the mask is empty.
    """
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if not len(columns):
        raise ValueError("an empty mask has no box")
    x, y = int(columns[0]), int(rows[0])
    return x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1


def box_of_rle(rle: dict[str, Any]) -> tuple[int, int, int, int]:
    """Return what `box_of` returns for the mask of a compressed RLE, which must have a pixel."""
    x, y, width, height = (int(side) for side in rle_tools.toBbox(rle))
    return x, y, width, height


def cut_of_rle(rle: dict[str, Any]) -> Cut:
    """Return the mask of a compressed RLE, which must have a pixel, cut along its box. What lies around it is never
    laid out, which in a line scan is hundreds of times as much."""
    x, y, width, height = box_of_rle(rle)
    column, top, bottom = _runs_by_column(rle)
    changes = np.zeros((height + 1, width), np.int8)
    changes[top - y, column - x] += 1  # runs of one column never touch
    changes[bottom - y, column - x] -= 1
    return Cut(np.cumsum(changes[:-1], axis=0, dtype=np.int8) > 0, x, y)


def _runs_by_column(rle: dict[str, Any]) -> tuple[Counts, Counts, Counts]:
    """Return the column of each run of mask pixels, its first row, and the first row behind it; a run that goes on in
    the next column is one in each of them."""
    rows = rle["size"][0]
    counts = _counts_in(rle["counts"])
    assert counts is not None
    ends = np.cumsum(counts)
    first, last = ends[0:-1:2], ends[1::2] - 1  # of each run of mask pixels, as they are counted column by column
    runs = first <= last
    first, last = first[runs], last[runs]
    columns = last // rows - first // rows + 1
    of_run = np.repeat(np.arange(len(first)), columns)
    column = first[of_run] // rows + np.arange(len(of_run)) - np.repeat(np.cumsum(columns) - columns, columns)
    top = np.maximum(first[of_run], column * rows) - column * rows
    bottom = np.minimum(last[of_run], column * rows + rows - 1) - column * rows + 1
    return column, top, bottom


def encode(mask: Mask) -> Segmentation:
    """Return the mask as a COCO `segmentation`: polygons, or compressed RLE where a region has a hole.

    pycocotools decodes either to exactly the mask. COCO polygons have no holes, hence the RLE.
    """
    polygons = to_polygons(mask)
    return to_rle(mask) if polygons is None else polygons


def encode_cut(cut: Cut, height: int, width: int) -> Segmentation:
    """Return what `encode` returns for the whole mask, of a (height, width) image."""
    rows, columns = cut.mask.shape
    if cut.mask.all():  # as a good image's: no corner to look for in a million pixels
        left, top, right, bottom = cut.x, cut.y, cut.x + columns, cut.y + rows
        return [[left, top, right, top, right, bottom, left, bottom]]
    polygons = to_polygons(cut.mask)
    if polygons is None:
        whole = np.zeros((height, width), dtype=bool)
        whole[cut.y : cut.y + rows, cut.x : cut.x + columns] = cut.mask
        return to_rle(whole)
    return [[_kept_once(at + (cut.y if odd % 2 else cut.x)) for odd, at in enumerate(polygon)] for polygon in polygons]


@cache
def _kept_once(coordinate: int) -> int:
    """Return the number, the same object for equal ones: all records together take half the memory."""
    return coordinate


def decode(segmentation: Segmentation, height: int, width: int) -> Mask:
    """Return the (height, width) mask of a COCO `segmentation`: polygons, or RLE compressed or not.

    Raises:
        ValueError: it is none of these, or an RLE of another size.
    """
    return np.asarray(rle_tools.decode(as_rle(segmentation, height, width)), dtype=bool)


def nested(segmentation: Any) -> Any:
    """Return polygons as COCO nests them, [[x0, y0, x1, y1, ...], ...], whichever way a file does: as one flat list of
    numbers, or as points [x, y]. What is no polygon is returned as it is."""
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


FARTHEST = 10
"""How many image sizes outside its image a polygon may reach: pycocotools takes memory for all the way there."""


def unusable(segmentation: Any, height: int, width: int) -> str:
    """Return why something is no COCO `segmentation` of an image of this size; nothing where it is one.

    Whatever a file may hold, what passes here takes no more time and memory than its image has pixels; pycocotools
    itself crashes on some of the rest, and takes a polygon of two points for a box.
    """
    if isinstance(segmentation, list):
        if not segmentation:
            return "no outline, and a box alone shows no mask"
        return next((reason for ring in segmentation if (reason := _bad_ring(ring, height, width))), "")
    if isinstance(segmentation, dict) and "counts" in segmentation and "size" in segmentation:
        return _bad_rle(segmentation, height, width)
    return f"neither polygons nor RLE, but {_short(segmentation)}"


def _bad_rle(rle: dict[str, Any], height: int, width: int) -> str:
    if rle["size"] != [height, width]:
        return f"an RLE of the size {_short(rle['size'])} on an image of {[height, width]}"
    counts = _counts_in(rle["counts"]) if isinstance(rle["counts"], str) else rle["counts"]
    if not isinstance(counts, list) or not all(type(count) is int for count in counts):
        return f"an RLE with counts that are none: {_short(rle['counts'])}"
    if (counts and min(counts) < 0) or sum(counts) != height * width:
        return "an RLE whose runs do not add up to its size"
    return ""


def _bad_ring(ring: Any, height: int, width: int) -> str:
    if not isinstance(ring, list) or len(ring) % 2:
        return f"a polygon that is no list of x and y: {_short(ring)}"
    if len(ring) < 6:
        return f"a polygon with {len(ring) // 2} points"
    try:
        is_finite = math.isfinite(sum(ring))
        lowest, highest = min(ring), max(ring)
    except (TypeError, OverflowError):
        is_finite = False
    if not is_finite:
        return "a polygon with coordinates that are no numbers"
    if lowest < -FARTHEST * max(height, width) or highest > (1 + FARTHEST) * max(height, width):
        return f"a polygon that reaches far out of the image: from {lowest} to {highest}"
    return ""


def _counts_in(text: str) -> list[int] | None:
    """Return the run lengths in a compressed RLE's text; None where it is none.

    Each number is written in groups of 5 bits, the lowest first, a sixth bit saying that another group follows, the
    last group's highest bit being its sign; from the third number on, it is the difference to the one before the last.
    """
    groups = np.frombuffer(text.encode("latin-1", "replace"), np.uint8).astype(np.int64) - 48
    if not len(groups) or groups.min() < 0 or groups.max() > 63 or groups[-1] & 32:
        return None
    last = np.flatnonzero(groups < 32)
    first = np.concatenate(([0], last[:-1] + 1))
    place = np.arange(len(groups)) - np.repeat(first, last - first + 1)
    if place.max() > 6:  # 35 bits: no image has so many pixels
        return None
    values = np.add.reduceat((groups & 31) << (5 * place), first)
    values -= np.where(groups[last] & 16, np.int64(1) << (5 * (place[last] + 1)), 0)
    counts: list[int] = []
    for number, value in enumerate(values.tolist()):
        counts.append(value + counts[number - 2] if number > 2 else value)
    return counts


def _short(value: Any) -> str:
    """Return what a value looks like, the beginning of it where that is long."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def rle_of_box(box: tuple[float, float, float, float], height: int, width: int) -> dict[str, Any]:
    """Return the pixels that a box (x1, y1, x2, y2), in pixels of the image, touches as compressed RLE at its size."""
    x1, y1, x2, y2 = box
    left, top = max(0, math.floor(x1)), max(0, math.floor(y1))
    across, down = max(0, min(width, math.ceil(x2)) - left), max(0, min(height, math.ceil(y2)) - top)
    (rle,) = rle_tools.frPyObjects(np.array([[left, top, across, down]], dtype=np.float64), height, width)
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def looks_inverted(mask: Mask) -> bool:
    """Return whether all four corners are defect, as where a tool draws the defect black."""
    return bool(mask[[0, 0, -1, -1], [0, -1, 0, -1]].all())


def as_rle(segmentation: Segmentation, height: int, width: int) -> dict[str, Any]:
    """Return a COCO `segmentation` as compressed RLE at the image's size, as `to_rle` gives it.

    Raises:
        ValueError: it is none, or an RLE of another size.
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
    """Return whether a COCO `segmentation` has a pixel in its (height, width) image. It must be usable there."""
    if isinstance(segmentation, list):  # all of them need not be one mask for that
        return bool(np.any(rle_tools.area(rle_tools.frPyObjects(segmentation, height, width))))
    return area(as_rle(segmentation, height, width)) > 0


def to_rle(mask: Mask) -> dict[str, Any]:
    """Return the mask as compressed COCO RLE, its `counts` as text so that JSON can hold it."""
    return _text(rle_tools.encode(np.asfortranarray(mask, dtype=np.uint8)))


def rle_of_changes(changes: npt.NDArray[np.int64], height: int, width: int) -> tuple[dict[str, Any], int]:
    """Return the compressed RLE of a (height, width) mask known by its runs, and how many pixels it has.

    Args:
        changes: ascending, each once: `column * height + row` of every first pixel of a run and first one behind it.
        height: the image's.
        width: the image's.
    """
    ends = [] if len(changes) and changes[-1] == height * width else [height * width]  # no run of no pixels at the end
    counts = np.diff(changes, prepend=0, append=ends)
    return _compressed(counts, height, width), int(counts[1::2].sum())


def union(rles: Sequence[dict[str, Any]], height: int, width: int) -> dict[str, Any]:
    """Return the compressed RLE of all pixels that are in any of the masks, without laying one out.

    Args:
        rles: any number of them, as `to_rle` gives them, of images of this size.
        height: the images'.
        width: the images'.
    """
    if not rles:
        return _compressed(np.array([height * width]), height, width)
    return _text(rle_tools.merge(list(rles)))


def intersection(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return the compressed RLE of all pixels that are in both masks, of images of one size."""
    return _text(rle_tools.merge([one, other], intersect=True))


def dilated(rle: dict[str, Any]) -> dict[str, Any]:
    """Return the compressed RLE of the mask and of all pixels that touch it, by a side or by a corner, without laying
    out a mask."""
    height, width = rle["size"]
    column, top, bottom = _runs_by_column(rle)
    column = np.concatenate((column - 1, column, column + 1))
    top, bottom = np.tile(np.maximum(top - 1, 0), 3), np.tile(np.minimum(bottom + 1, height), 3)
    inside = (column >= 0) & (column < width)
    first, behind = (column * height + top)[inside], (column * height + bottom)[inside]
    places, event = np.unique(np.concatenate((first, behind)), return_inverse=True)
    steps = np.bincount(event[: len(first)], minlength=len(places)) - np.bincount(
        event[len(first) :], minlength=len(places)
    )
    is_mask = np.cumsum(steps) > 0  # from this place to the next
    return rle_of_changes(places[np.diff(is_mask, prepend=False)], height, width)[0]


def touching(rles: Sequence[dict[str, Any]]) -> Mask:
    """Return which of N masks of one image overlap or touch, by a side or by a corner: (N, N) bool, symmetric. A mask
    without a pixel touches nothing, not even itself.

    Args:
        rles: compressed RLEs, as `to_rle` gives them, of one size.
    """
    if not rles:
        return np.zeros((0, 0), dtype=bool)
    not_crowds = [False] * len(rles)
    return np.asarray(rle_tools.iou([dilated(rle) for rle in rles], list(rles), not_crowds), dtype=np.float64) > 0


def area(rle: dict[str, Any]) -> int:
    """Return how many pixels a compressed RLE has."""
    return int(rle_tools.area(rle))


def _compressed(counts: npt.NDArray[np.int64], height: int, width: int) -> dict[str, Any]:
    return _text(rle_tools.frPyObjects({"size": [height, width], "counts": counts}, height, width))


def _text(rle: dict[str, Any]) -> dict[str, Any]:
    """Return pycocotools' RLE with its `counts` as text, so that JSON can hold it."""
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()}


def to_polygons(mask: Mask) -> list[list[int]] | None:
    """Return the mask's outline as COCO polygons `[x0, y0, x1, y1, ...]` along pixel edges; None if it has a hole.

    Each polygon is rectilinear and crosses itself nowhere; it touches itself only where background that reaches the
    outside by no more than a pixel's corner would have been a hole. Pixels that touch only by a corner come as polygons
    of their own.

    The vertices of a rectilinear outline need no tracing: sorted by row, each even one is joined to the next by a
    horizontal edge; sorted by column, by a vertical one. (O'Rourke, "Uniqueness of orthogonal connect-the-dots", 1988.)
    """
    if not mask.any():
        return []
    left, top, width, height = box_of(mask)
    mask = mask[top : top + height, left : left + width]  # a small region of a large image stays cheap
    padded = np.pad(mask, 1).astype(np.int8)
    upper_left, upper_right = padded[:-1, :-1], padded[:-1, 1:]
    lower_left, lower_right = padded[1:, :-1], padded[1:, 1:]
    falling = (upper_left == lower_right) & (upper_right == lower_left) & (upper_left != upper_right)
    corner = (upper_left + upper_right + lower_left + lower_right) % 2 == 1
    ys, xs = np.nonzero(corner | falling)
    # Where two pixels touch by a corner, two vertices coincide: one for each pixel.
    twice = falling[ys, xs].astype(np.int64) + 1
    first_of_two = np.concatenate([np.arange(count) for count in twice]) if len(twice) else np.zeros(0, np.int64)
    ys, xs = np.repeat(ys, twice), np.repeat(xs, twice)
    rising = falling[ys, xs] & (upper_right[ys, xs] == 1)
    # The copy with the edge to the left has the edge upwards if the upper left pixel is set, else the one downwards.
    vertical_rank = np.where(rising, 1 - first_of_two, first_of_two)
    across, down = (
        _partners(np.lexsort((first_of_two, xs, ys))),
        _partners(np.lexsort((vertical_rank, ys, xs))),
    )

    polygons = []
    unseen = np.ones(len(xs), dtype=bool)
    for start in range(len(xs)):
        if not unseen[start]:
            continue
        loop, vertex = [], start
        while unseen[vertex]:
            other = across[vertex]
            unseen[vertex] = unseen[other] = False
            loop += [vertex, other]
            vertex = down[other]
        x, y = xs[loop], ys[loop]
        # The first vertex is the loop's uppermost, then leftmost: its pixel is set in an outline, clear in a hole.
        if not mask[y[0], x[0]]:
            return None
        polygons.append(np.stack((x + left, y + top), axis=1).ravel().tolist())
    return polygons


def _partners(order: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return for each vertex the one it is paired with when neighbours in `order` are joined two by two."""
    partner = np.empty_like(order)
    partner[order[0::2]], partner[order[1::2]] = order[1::2], order[0::2]
    return partner
