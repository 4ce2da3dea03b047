"""Joining of predictions: which predictions of an image are parts of one defect, or the same defect seen twice.

In a data set, a defect is a connected component of its class's mask (`masks.components`). A network does not know that:
it predicts several pieces of a long scratch, and some pieces twice. Tiles add to both: a seam cuts a defect into
pieces, and what lies in the overlap of two tiles is predicted twice.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

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


class Agreement(NamedTuple):
    """Two predictions of different tiles that show the same defect.

    Attributes:
        first: the index of the one with the higher score, or of the first of equals.
        second: the index of the other.
        repeat: the index of the one that shows nothing more than the other; None if each shows a part of its own.
    """

    first: int
    second: int
    repeat: int | None


def same_defect(
    rles: Masks, labels: Sequence[str], scores: Sequence[float], agreements: Sequence[Agreement] | None = None
) -> list[Places]:
    """Return the predictions of each defect, as indices, (K,) ascending. The defects are ordered by their first index.

    Two predictions are parts of one defect if they have the same class, if both have at least `MIN_SCORE`, and if their
    masks overlap or touch, by a side or by a corner. The same is true of predictions that are connected by others. Each
    prediction is part of exactly one defect.

    Args:
        rles: (N,) masks of one image, in the form that `masks.to_rle` returns.
        labels: (N,) class names.
        scores: (N,) 0 to 1.
        agreements: of predictions of tiles, as `across_tiles` returns them. If given, only these are parts of one
            defect.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = len(rles)
    pairs = _touching(rles, labels, scores) if agreements is None else ((one.first, one.second) for one in agreements)
    rows, columns = np.array(list(pairs), dtype=np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(rows)), (rows, columns)), shape=(count, count))
    _, defect = connected_components(graph, directed=False)
    order = np.argsort(defect, kind="stable")
    bounds = np.flatnonzero(np.diff(defect[order])) + 1
    return sorted(np.split(order, bounds) if count else [], key=lambda places: int(places[0]))


def across_tiles(
    rles: Masks, labels: Sequence[str], scores: Sequence[float], tiles: Sequence[Window]
) -> list[Agreement]:
    """Return the pairs of predictions of one class and of different tiles that show the same defect.

    Their masks agree where the tiles overlap. Of two predictions with at least `MIN_SCORE`, the smaller mask must share
    half of its pixels there, because a tile may show two ends of a defect that another tile shows as one. If one has a
    lower score, the intersection over union must be half.

    A prediction repeats another if the intersection over union is half, and it lies completely in the other's tile. If
    both do, the one with the lower score repeats the other. So a tile that shows all of a defect wins over tiles that
    show a part.

    Args:
        rles: (N,) masks of one image, in the form that `masks.to_rle` returns, none empty.
        labels: (N,) class names.
        scores: (N,) 0 to 1.
        tiles: (N,) the tile in which each prediction was made; no mask leaves its tile.
    """
    of_tile: dict[tuple[Window, str], list[int]] = {}
    for at, key in enumerate(zip(tiles, labels, strict=True)):
        of_tile.setdefault(key, []).append(at)
    boxes, areas = [Window(*masks.box_of_rle(one)) for one in rles], [masks.area(one) for one in rles]
    found = []
    for overlap, some, others in _neighbours(of_tile):
        reach = [[at for at in side if boxes[at].overlap(overlap)] for side in (some, others)]
        if not all(reach):
            continue
        cuts = [[masks.cropped(rles[at], *overlap) for at in side] for side in reach]
        inside = [np.array([masks.area(cut) for cut in side]) for side in cuts]
        shared = masks.shared_pixels(*cuts)
        for row, column in np.argwhere(shared):
            pair, pixels = (reach[0][row], reach[1][column]), (int(inside[0][row]), int(inside[1][column]))
            both = int(shared[row, column])
            is_like = both >= AGREEMENT * (sum(pixels) - both)
            is_sure = min(scores[at] for at in pair) >= MIN_SCORE
            if is_like or (is_sure and both >= AGREEMENT * min(pixels)):
                first, second = sorted((0, 1), key=lambda at: (-scores[pair[at]], pair[at]))
                lies_inside = [pixels[at] == areas[pair[at]] for at in (0, 1)]
                repeat = next((pair[at] for at in (second, first) if is_like and lies_inside[at]), None)
                found.append(Agreement(pair[first], pair[second], repeat))
    return found


def repeats(scores: Sequence[float], agreements: Sequence[Agreement]) -> set[int]:
    """Return the predictions that show nothing more than another one that stays, as indices.

    Args:
        scores: (N,) of all predictions.
        agreements: as `across_tiles` returns them.
    """
    found: set[int] = set()
    for one in sorted(agreements, key=lambda one: (-scores[one.first], -scores[one.second])):
        if one.repeat is not None and not found & {one.first, one.second}:
            found.add(one.repeat)
    return found


def _touching(rles: Masks, labels: Sequence[str], scores: Sequence[float]) -> Iterator[tuple[int, int]]:
    """Yield the pairs of predictions of one class that are joined because they touch."""
    for name in sorted(set(labels)):
        places = np.array([at for at, label in enumerate(labels) if label == name and scores[at] >= MIN_SCORE])
        if len(places) < 2:
            continue
        touching = masks.touching([rles[at] for at in places])
        yield from ((int(places[row]), int(places[column])) for row, column in np.argwhere(np.triu(touching, 1)))


def _neighbours(of_tile: dict[tuple[Window, str], list[int]]) -> Iterator[tuple[Window, list[int], list[int]]]:
    """Yield what two tiles share, and their predictions of one class, for all tiles that overlap."""
    ordered = sorted(of_tile, key=lambda key: key[0].y)
    for at, (tile, label) in enumerate(ordered):
        for other, other_label in ordered[at + 1 :]:
            if other.y >= tile.y + tile.height:
                break
            overlap = tile.overlap(other)
            if label == other_label and tile != other and overlap is not None:
                yield overlap, of_tile[tile, label], of_tile[other, label]
