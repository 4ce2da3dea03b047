"""Joining of predictions: which predictions of an image are parts of one defect, or the same defect seen twice.

In a data set, a defect is a connected component of its class's mask (`masks.components`). A network does not know that:
it predicts several pieces of a long scratch, and some pieces twice. Tiles add to both: a seam cuts a defect into
pieces, and what lies in the overlap of two tiles is predicted twice.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from flawmask import masks
from flawmask.tiles import Window

Join = Literal["off", "touching"]
"""`off`: predictions stay as they are. `touching`: see `same_defect`."""

DEFAULT: Join = "touching"
"""The default rule of a training, which the checkpoint keeps. docs/results.md has measurements of the rules."""

MIN_SCORE = 0.5
"""The lowest score of predictions that are joined. The mask of a weaker one is often blurred and covers several
defects, so it would join them. docs/results.md has measurements of other values."""

AGREEMENT = 0.5
"""Predictions of two tiles show the same defect if, where the tiles overlap, they share this part of their masks."""

Masks = Sequence[dict[str, Any]]
Places = npt.NDArray[np.int64]


def same_defect(
    rles: Masks, labels: Sequence[str], scores: Sequence[float], tiles: Sequence[Window] | None = None
) -> list[Places]:
    """Return the predictions of each defect, as indices, (K,) ascending. The defects are ordered by their first index.

    Two predictions are parts of one defect if they have the same class, if both have at least `MIN_SCORE`, and if their
    masks overlap or touch, by a side or by a corner. The same is true of predictions that are connected by others. Each
    prediction is part of exactly one defect.

    With `tiles`, only predictions of different tiles are compared. They show the same defect if they have the same
    class, and if their masks agree where the tiles overlap. Of two predictions with at least `MIN_SCORE`, the smaller
    mask must share half of its pixels there, because a tile may show two ends of a defect that another tile shows as
    one. If one has a lower score, the intersection over union must be half.

    Args:
        rles: (N,) masks of one image, in the form that `masks.to_rle` returns.
        labels: (N,) class names.
        scores: (N,) 0 to 1.
        tiles: (N,) the tile in which each prediction was made; no mask leaves its tile.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = len(rles)
    pairs = list(_touching(rles, labels, scores) if tiles is None else _agreeing(rles, labels, scores, tiles))
    rows, columns = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(pairs)), (rows, columns)), shape=(count, count))
    _, defect = connected_components(graph, directed=False)
    order = np.argsort(defect, kind="stable")
    bounds = np.flatnonzero(np.diff(defect[order])) + 1
    return sorted(np.split(order, bounds) if count else [], key=lambda places: int(places[0]))


def without_repeats(places: Places, rles: Masks, scores: Sequence[float], tiles: Sequence[Window]) -> Places:
    """Return the predictions of a defect, without those that repeat a better one, in the order of the scores.

    A prediction repeats a better one if it lies completely in the other's tile and their masks agree there. The better
    one of two is the one that shows more of the defect than fits into the other's tile. If neither does, it is the one
    with the higher score. So a tile that shows a defect whole wins over tiles that show a part, and what is left over
    are the parts that only together show the defect.

    Args:
        places: the indices of the predictions, as `same_defect` returns them.
        rles: (N,) the masks of all predictions.
        scores: (N,) 0 to 1.
        tiles: (N,) the tile of each prediction.
    """
    ordered = sorted(places.tolist(), key=lambda at: -scores[at])
    repeats: set[int] = set()
    for first, second in combinations(ordered, 2):  # the first has the higher score, or the same
        if repeats & {first, second} or tiles[first] == tiles[second]:
            continue
        shared, areas, sizes = _in_overlap(rles, tiles, first, second)
        if not areas or shared < AGREEMENT * (sum(areas) - shared):
            continue
        if areas[1] == sizes[1]:
            repeats.add(second)
        elif areas[0] == sizes[0]:
            repeats.add(first)
    return np.array([at for at in ordered if at not in repeats], dtype=np.int64)


def _touching(rles: Masks, labels: Sequence[str], scores: Sequence[float]) -> Iterator[tuple[int, int]]:
    """Yield the pairs of predictions of one class that are joined because they touch."""
    for name in sorted(set(labels)):
        places = np.array([at for at, label in enumerate(labels) if label == name and scores[at] >= MIN_SCORE])
        if len(places) < 2:
            continue
        touching = masks.touching([rles[at] for at in places])
        yield from ((int(places[row]), int(places[column])) for row, column in np.argwhere(np.triu(touching, 1)))


def _agreeing(
    rles: Masks, labels: Sequence[str], scores: Sequence[float], tiles: Sequence[Window]
) -> Iterator[tuple[int, int]]:
    """Yield the pairs of predictions of one class and of different tiles whose masks agree."""
    of_tile: dict[tuple[Window, str], list[int]] = {}
    for at, key in enumerate(zip(tiles, labels, strict=True)):
        of_tile.setdefault(key, []).append(at)
    for (tile, label), (other, other_label) in _neighbours(list(of_tile)):
        if label != other_label:
            continue
        some, others = of_tile[tile, label], of_tile[other, label]
        overlapping = masks.overlaps([rles[at] for at in some], [rles[at] for at in others])
        for row, column in np.argwhere(overlapping):
            first, second = some[row], others[column]
            shared, areas, _ = _in_overlap(rles, tiles, first, second)
            is_sure = min(scores[first], scores[second]) >= MIN_SCORE
            if shared >= AGREEMENT * (min(areas) if is_sure else sum(areas) - shared):
                yield first, second


def _neighbours(keys: Sequence[tuple[Window, str]]) -> Iterator[tuple[tuple[Window, str], tuple[Window, str]]]:
    """Yield the pairs of keys whose tiles are different and overlap."""
    ordered = sorted(keys, key=lambda key: key[0].y)
    for at, key in enumerate(ordered):
        for other in ordered[at + 1 :]:
            if other[0].y >= key[0].y + key[0].height:
                break
            if other[0] != key[0] and key[0].overlap(other[0]):
                yield key, other


def _in_overlap(
    rles: Masks, tiles: Sequence[Window], first: int, second: int
) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Return how many pixels two masks share, how many each has where their tiles overlap, and how many each has.

    The second value is empty where the tiles do not overlap.
    """
    overlap = tiles[first].overlap(tiles[second])
    if overlap is None:
        return 0, (), ()
    x, y, width, height = overlap
    pair = rles[first], rles[second]
    part = masks.rle_of_box((x, y, x + width, y + height), *pair[0]["size"])
    areas = tuple(masks.area(masks.intersection(one, part)) for one in pair)
    return masks.area(masks.intersection(*pair)), areas, tuple(masks.area(one) for one in pair)
