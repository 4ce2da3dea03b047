"""Which predictions of one image are parts of one defect: those of one class whose masks overlap or touch.

In a data set a defect is a connected component of its class's mask (`masks.components`). A network knows nothing of
that: of a long scratch it finds several pieces, and some of them twice.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from flawmask import masks

Join = Literal["off", "touching"]
"""`off`: predictions stay as they come. `touching`: see `same_defect`."""

DEFAULT: Join = "touching"
"""What a training writes into its checkpoint unless it is told otherwise; docs/results.md has what was measured."""

LEAST_SCORE = 0.5
"""Predictions below it stay as they are: a weak one is often a blurred mask over several defects, and would join them.
docs/results.md has other values measured."""


def same_defect(
    rles: Sequence[dict[str, Any]], labels: Sequence[str], scores: Sequence[float]
) -> list[npt.NDArray[np.int64]]:
    """Return for each defect which predictions are parts of it, as places, (K,) ascending; the defect whose first part
    comes first is the first one.

    Two predictions are parts of one defect where they are of one class, both score at least `LEAST_SCORE`, and their
    masks overlap or touch, by a side or by a corner. So are those that others connect. Each prediction is part of
    exactly one defect.

    Args:
        rles: (N,) masks of one image, as `masks.to_rle` gives them.
        labels: (N,) class names.
        scores: (N,) 0 to 1.
    """
    from scipy.sparse.csgraph import connected_components

    alone = np.full(len(rles), fill_value=True)
    found = []
    for name in sorted(set(labels)):
        places = np.array([at for at, label in enumerate(labels) if label == name and scores[at] >= LEAST_SCORE])
        if len(places) < 2:
            continue
        count, defect = connected_components(masks.touching([rles[at] for at in places]), directed=False)
        found += [places[defect == one] for one in range(count)]
        alone[places] = False
    found += [np.array([at]) for at in np.flatnonzero(alone)]
    return sorted(found, key=lambda places: int(places[0]))
