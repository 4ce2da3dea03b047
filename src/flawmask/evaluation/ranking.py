"""Metrics of image scores without a threshold: ROC, precision and recall, calibration; for one sample or for many.

The functions work with weights, (B, N): how often each of N images counts in each of B samples. A row of ones is the
original data; bootstrap weights give B values at once, as float64. All metrics lie between 0 and 1.
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
"""The most points of a curve for drawing."""


@dataclass(frozen=True)
class Ranking:
    """The number of rejected images at each threshold, the highest threshold first.

    Attributes:
        thresholds: (G,) the distinct scores, descending. An image is rejected if its score is at least the threshold.
        tp: (B, G) rejected defective images.
        fp: (B, G) rejected good images.
        positives: (B,) all defective images.
        negatives: (B,) all good images.
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
    """Return the area under the ROC curve, (B,): the probability that a defective image scores above a good one.

    Ties count half. The area is NaN without a good or without a defective image. It is the trapezoidal one (Hanley and
    McNeil, Radiology 1982).
    """
    tp, fp = _from_zero(ranking.tp), _from_zero(ranking.fp)
    area = np.sum(np.diff(fp, axis=1) * (tp[:, 1:] + tp[:, :-1]) / 2, axis=1)
    return _divide(area, ranking.positives * ranking.negatives)


def average_precision_score(ranking: Ranking) -> Floats:
    """Return the average precision, (B,): the precision summed over the steps of the recall, without interpolation.

    It is NaN without a defective image. It equals scikit-learn's `average_precision_score`.
    """
    steps = np.diff(_from_zero(ranking.tp), axis=1)
    return _divide(np.nansum(steps * np.nan_to_num(ranking.precision), axis=1), ranking.positives)


def _from_zero(counts: Floats) -> Floats:
    return np.concatenate((np.zeros((len(counts), 1)), counts), axis=1)


def best_f1(ranking: Ranking) -> tuple[Floats, Floats]:
    """Return the highest F1 of all thresholds, (B,), and its threshold, (B,); NaN without a defective image.

    An image without detections has the score 0. No threshold rejects it.
    """
    f1 = np.where(ranking.thresholds > 0, np.nan_to_num(ranking.f1), 0.0)
    at = f1.argmax(axis=1)
    value = f1[np.arange(len(f1)), at]
    undefined = ranking.positives == 0
    return np.where(undefined, np.nan, value), np.where(undefined, np.nan, ranking.thresholds[at])


def false_alarms_at(ranking: Ranking, recall: float) -> Floats:
    """Return the lowest false-alarm rate, (B,), among the thresholds that find at least this share of the defects.

    It is 1 if even images without detections would have to be rejected. It is NaN without a good or without a defective
    image.
    """
    enough = ranking.tp >= recall * ranking.positives[:, None] - 1e-9
    rate = ranking.false_alarm_rate[np.arange(len(enough)), enough.argmax(axis=1)]
    return np.where(ranking.positives > 0, rate, np.nan)


def recall_at(ranking: Ranking, false_alarm_rate: float) -> Floats:
    """Return the highest recall, (B,), among the thresholds that reject at most this share of the good images.

    It is 0 if every threshold rejects more, and NaN without a good or without a defective image. An image without
    detections has the score 0. No threshold rejects it.
    """
    allowed = ranking.fp <= false_alarm_rate * ranking.negatives[:, None] + 1e-9
    recall = np.where(allowed & (ranking.thresholds > 0), ranking.recall, 0.0).max(axis=1, initial=0.0)
    return np.where((ranking.positives > 0) & (ranking.negatives > 0), recall, np.nan)


def calibration(truth: Flags, scores: Floats) -> list[dict[str, Any]]:
    """Return the reliability curve: an entry for each tenth of the range of scores that has images.

    Each entry has the keys `low` and `high`, the ends of the tenth; `count`, the number of images; `mean_score`; and
    `share_defective`.

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
    """Return the expected calibration error, (B,): the mean difference, over images, between the mean score of an
    image's bin and the share of defective images in it.

    There are ten bins of equal width (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017).
    """
    place = np.minimum((scores * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    inside = np.eye(CALIBRATION_BINS)[place]  # (N, bins)
    gap = np.abs((weights * (scores - truth)) @ inside)
    return _divide(gap.sum(axis=1), weights.sum(axis=1))


def brier(truth: Flags, scores: Floats, weights: Floats) -> Floats:
    """Return the Brier score, (B,), 0 to 1: the mean square of score minus truth over the images.

    See Brier, "Verification of forecasts expressed in terms of probability", Monthly Weather Review 1950.
    """
    return _divide((weights * (scores - truth) ** 2).sum(axis=1), weights.sum(axis=1))


def thin(x: Floats, y: Floats) -> dict[str, list[float]]:
    """Return a curve as lists for JSON, `x` and `y`, with at most `CURVE_POINTS` points, including both ends."""
    keep = np.unique(np.linspace(0, len(x) - 1, min(len(x), CURVE_POINTS)).round().astype(int))
    return {"x": np.asarray(x, float)[keep].tolist(), "y": np.asarray(y, float)[keep].tolist()}


def roc_curve(ranking: Ranking) -> dict[str, list[float]] | None:
    """Return the false-alarm rate (x) and the recall (y) of the first sample, from (0, 0) on; None if undefined."""
    if not (ranking.positives[0] and ranking.negatives[0]):
        return None
    return thin(np.append(0.0, ranking.false_alarm_rate[0]), np.append(0.0, ranking.recall[0]))


def precision_recall_curve(ranking: Ranking) -> dict[str, list[float]] | None:
    """Return the recall (x) and the precision (y) of the first sample; None without a defective image."""
    return thin(ranking.recall[0], ranking.precision[0]) if ranking.positives[0] else None


def confusion(truth: Sequence[str], predicted: Sequence[str], classes: Sequence[str]) -> dict[str, Any]:
    """Return the confusion matrix, `classes` and `rows`: `rows[i][j]` images of class i were predicted as class j.

    Args:
        truth: the true class of each image.
        predicted: the predicted class of each image.
        classes: the names of all classes, in the order of rows and columns.

    Raises:
        ValueError: a name is not in `classes`.
    """
    rows = np.zeros((len(classes), len(classes)), dtype=int)
    for one, other in zip(truth, predicted, strict=True):
        rows[classes.index(one), classes.index(other)] += 1
    return {"classes": list(classes), "rows": rows.tolist()}
