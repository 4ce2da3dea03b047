"""What scores say before a threshold is chosen: ROC, precision and recall, calibration; for one sample or for many.

Each function takes weights, (B, N): how often each of N images counts in each of B samples. A row of ones is the data
as they are; the rows of a bootstrap give B figures at once, as float64. All lie between 0 and 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

CALIBRATION_BINS = 10
CURVE_POINTS = 200
"""A drawn curve has at most about so many points."""


@dataclass(frozen=True)
class Ranking:
    """How many images are rejected at each threshold, the highest threshold first.

    Attributes:
        thresholds: (G,) the distinct scores, falling; an image is rejected where its score is at least this much.
        tp: (B, G) defective images rejected.
        fp: (B, G) good images rejected.
        positives: (B,) defective images there are.
        negatives: (B,) good images there are.
    """

    thresholds: Floats
    tp: Floats
    fp: Floats
    positives: Floats
    negatives: Floats

    @property
    def recall(self) -> Floats:
        """(B, G), NaN where there is no defective image."""
        return _divide(self.tp, self.positives[:, None])

    @property
    def false_alarm_rate(self) -> Floats:
        """(B, G), NaN where there is no good image."""
        return _divide(self.fp, self.negatives[:, None])

    @property
    def precision(self) -> Floats:
        """(B, G), NaN where nothing is rejected."""
        return _divide(self.tp, self.tp + self.fp)

    @property
    def f1(self) -> Floats:
        """(B, G), NaN where there is no defective image."""
        return np.where(
            self.positives[:, None] > 0, _divide(2 * self.tp, self.tp + self.fp + self.positives[:, None]), np.nan
        )


def _divide(part: Floats, whole: Floats) -> Floats:
    undefined = np.full(np.broadcast_shapes(part.shape, whole.shape), np.nan)
    return np.asarray(np.divide(part, whole, out=undefined, where=whole > 0))


def rank(truth: Flags, scores: Floats, weights: Floats | None = None) -> Ranking:
    """Return the counts at every threshold.

    Args:
        truth: (N,) whether each image is defective.
        scores: (N,) its score.
        weights: (B, N), by default one row of ones.
    """
    weights = np.ones((1, len(truth))) if weights is None else weights
    order = np.argsort(-scores, kind="stable")
    falling = scores[order]
    last = np.append(falling[1:] != falling[:-1], True) if len(falling) else np.zeros(0, dtype=bool)
    positive, negative = weights * truth, weights * ~truth
    return Ranking(
        falling[last],
        np.cumsum(positive[:, order], axis=1)[:, last],
        np.cumsum(negative[:, order], axis=1)[:, last],
        positive.sum(axis=1),
        negative.sum(axis=1),
    )


def auroc(ranking: Ranking) -> Floats:
    """Return the area under the ROC curve, (B,): how likely a defective image scores above a good one, ties half.

    NaN without a good or without a defective image. The area is the trapezoidal one (Hanley and McNeil, Radiology
    1982).
    """
    tp, fp = _from_zero(ranking.tp), _from_zero(ranking.fp)
    area = np.sum(np.diff(fp, axis=1) * (tp[:, 1:] + tp[:, :-1]) / 2, axis=1)
    return _divide(area, ranking.positives * ranking.negatives)


def average_precision_score(ranking: Ranking) -> Floats:
    """Return the average precision, (B,): precision summed over the steps of recall, without interpolation.

    NaN without a defective image. This is scikit-learn's `average_precision_score`.
    """
    steps = np.diff(_from_zero(ranking.tp), axis=1)
    return _divide(np.nansum(steps * np.nan_to_num(ranking.precision), axis=1), ranking.positives)


def _from_zero(counts: Floats) -> Floats:
    return np.concatenate((np.zeros((len(counts), 1)), counts), axis=1)


def best_f1(ranking: Ranking) -> tuple[Floats, Floats]:
    """Return the highest F1 that any threshold gives, (B,), and that threshold, (B,); NaN without a defective image.

    A score of 0 stands for an image on which nothing was found, which no threshold rejects.
    """
    f1 = np.where(ranking.thresholds > 0, np.nan_to_num(ranking.f1), 0.0)
    at = f1.argmax(axis=1)
    value = f1[np.arange(len(f1)), at]
    undefined = ranking.positives == 0
    return np.where(undefined, np.nan, value), np.where(undefined, np.nan, ranking.thresholds[at])


def false_alarms_at(ranking: Ranking, recall: float) -> Floats:
    """Return the lowest false-alarm rate, (B,), among the thresholds that find at least this share of the defects.

    It is 1 where that cannot be had without rejecting even images on which nothing was found, and NaN without a good or
    without a defective image.
    """
    enough = ranking.tp >= recall * ranking.positives[:, None] - 1e-9
    rate = ranking.false_alarm_rate[np.arange(len(enough)), enough.argmax(axis=1)]
    return np.where(ranking.positives > 0, rate, np.nan)


def calibration(truth: Flags, scores: Floats) -> list[dict[str, Any]]:
    """Return the reliability curve: for each tenth of the score's range with an image in it, how many there are, their
    mean score and the share of them that is defective.

    The keys of each are `low` and `high`, where the tenth begins and ends; `count`, `mean_score`, `share_defective`.

    Args:
        truth: (N,) whether each image is defective.
        scores: (N,) its score, 0 to 1.
    """
    place = np.minimum((scores * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    return [
        {
            "low": number / CALIBRATION_BINS,
            "high": (number + 1) / CALIBRATION_BINS,
            "count": int(inside.sum()),
            "mean_score": float(scores[inside].mean()),
            "share_defective": float(truth[inside].mean()),
        }
        for number in range(CALIBRATION_BINS)
        if (inside := place == number).any()
    ]


def expected_calibration_error(truth: Flags, scores: Floats, weights: Floats) -> Floats:
    """Return how far, on average over the images, a bin's mean score lies from its share of defective images, (B,).

    Ten bins of equal width, as in Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    """
    place = np.minimum((scores * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    inside = np.eye(CALIBRATION_BINS)[place]  # (N, bins)
    gap = np.abs((weights * (scores - truth)) @ inside)
    return _divide(gap.sum(axis=1), weights.sum(axis=1))


def brier(truth: Flags, scores: Floats, weights: Floats) -> Floats:
    """Return the mean square of score less truth over the images, (B,), 0 to 1 (Brier, Monthly Weather Review 1950)."""
    return _divide((weights * (scores - truth) ** 2).sum(axis=1), weights.sum(axis=1))


def thin(x: Floats, y: Floats) -> dict[str, list[float]]:
    """Return a curve as lists for JSON, `x` and `y`, with at most `CURVE_POINTS` points, first and last among them."""
    keep = np.unique(np.linspace(0, len(x) - 1, min(len(x), CURVE_POINTS)).round().astype(int))
    return {"x": np.asarray(x, float)[keep].tolist(), "y": np.asarray(y, float)[keep].tolist()}


def roc_curve(ranking: Ranking) -> dict[str, list[float]] | None:
    """Return the false-alarm rate (x) and the recall (y) of the first sample, from (0, 0) on; None where undefined."""
    if not (ranking.positives[0] and ranking.negatives[0]):
        return None
    return thin(np.append(0.0, ranking.false_alarm_rate[0]), np.append(0.0, ranking.recall[0]))


def precision_recall_curve(ranking: Ranking) -> dict[str, list[float]] | None:
    """Return the recall (x) and the precision (y) of the first sample; None without a defective image."""
    return thin(ranking.recall[0], ranking.precision[0]) if ranking.positives[0] else None


def confusion(truth: Sequence[str], predicted: Sequence[str], classes: Sequence[str]) -> dict[str, Any]:
    """Return the confusion matrix, `classes` and `rows`: `rows[i][j]` images of class i were called class j.

    Args:
        truth: the class of each image.
        predicted: what each was called.
        classes: the names of all classes, in the order of rows and columns.

    Raises:
        ValueError: a name is none of the classes.
    """
    rows = np.zeros((len(classes), len(classes)), dtype=int)
    for one, other in zip(truth, predicted, strict=True):
        rows[classes.index(one), classes.index(other)] += 1
    return {"classes": list(classes), "rows": rows.tolist()}
