"""Joining of predictions: predictions of one class whose masks overlap or touch are parts of one defect.

In a data set, a defect is a connected component of its class's mask (`masks.components`). A network does not know that:
it predicts several pieces of a long scratch, and some pieces twice.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from flawmask import masks

Join = Literal["off", "touching"]
"""`off`: predictions stay as they are. `touching`: see `same_defect`."""

DEFAULT: Join = "touching"
"""The default rule of a training, which the checkpoint keeps. docs/results.md has measurements of the rules."""

MIN_SCORE = 0.5
"""The lowest score of predictions that are joined. The mask of a weaker one is often blurred and covers several
defects, so it would join them. docs/results.md has measurements of other values."""


def same_defect(
    rles: Sequence[dict[str, Any]], labels: Sequence[str], scores: Sequence[float]
) -> list[npt.NDArray[np.int64]]:
    """Return the predictions of each defect, as indices, (K,) ascending. The defects are ordered by their first index.

    Two predictions are parts of one defect if they have the same class, if both have at least `MIN_SCORE`, and if their
    masks overlap or touch, by a side or by a corner. The same is true of predictions that are connected by others. Each
    prediction is part of exactly one defect.

    Args:
        rles: (N,) masks of one image, in the form that `masks.to_rle` returns.
        labels: (N,) class names.
        scores: (N,) 0 to 1.
    """
    from scipy.sparse.csgraph import connected_components

    is_single = np.full(len(rles), fill_value=True)
    defects = []
    for name in sorted(set(labels)):
        places = np.array([at for at, label in enumerate(labels) if label == name and scores[at] >= MIN_SCORE])
        if len(places) < 2:
            continue
        count, component = connected_components(masks.touching([rles[at] for at in places]), directed=False)
        defects += [places[component == one] for one in range(count)]
        is_single[places] = False
    defects += [np.array([at]) for at in np.flatnonzero(is_single)]
    return sorted(defects, key=lambda places: int(places[0]))
