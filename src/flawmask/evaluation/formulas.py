"""Functions that compute metrics from the evidence. Metrics that share work share a function.

Each function takes the evidence of N images, and weights, (B, N): how often each image counts in each of B samples.
Without weights, each image counts once. It returns float64 values by key, (B,) each, or (1,) without weights. A value
is NaN where the metric is undefined. A metric whose data the evidence lacks has no key: a model that only scores images
has no masks, for example. Ratios lie between 0 and 1. docs/metrics.md defines each metric and names its source.
"""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from flawmask.evaluation.pixels import PixelTally
from flawmask.evaluation.ranking import (
    auroc,
    average_precision_score,
    best_f1,
    brier,
    expected_calibration_error,
    false_alarms_at,
    rank,
    recall_at,
)
from flawmask.evaluation.uncertainty import Groups
from flawmask.evaluation.verdicts import rates

if TYPE_CHECKING:  # the command line and the report import the table of metrics; this import would slow them down
    from flawmask.evaluation.measure import Evidence

Floats = npt.NDArray[np.float64]
Values = dict[str, Floats]

RECALL_LEVELS = {"100": 1.0, "99": 0.99, "95": 0.95}
FALSE_ALARM_LEVELS = {"5": 0.05, "1": 0.01}
"""The recalls at which the false-alarm rate is read."""


def verdict_rates(evidence: "Evidence", weights: Floats | None) -> Values:
    """Return the metrics of `verdicts.rates`."""
    by_sample = [rates(*(float(one) for one in counts)) for counts in zip(*outcomes(evidence, weights), strict=True)]
    return {name: np.array([one[name] for one in by_sample], dtype=float) for name in by_sample[0]}


def false_alarm_rate(evidence: "Evidence", weights: Floats | None) -> Values:
    """Return `false_alarm_rate`, the share of good images that are rejected."""
    _, fp, _, tn = outcomes(evidence, weights)
    return {"false_alarm_rate": share(fp, fp + tn)}


def verdict_counts(evidence: "Evidence", weights: Floats | None) -> Values:
    """Return the number of images, and of each outcome."""
    tp, fp, fn, tn = outcomes(evidence, weights)
    return {"tp_defect": tp, "fp_defect": fp, "tn_good": tn, "fn_defect": fn, "total_images": tp + fp + fn + tn}


def outcomes(evidence: "Evidence", weights: Floats | None) -> tuple[Floats, Floats, Floats, Floats]:
    """Return the verdicts' true positives, false positives, false negatives and true negatives, (B,) each."""
    kinds = evidence.outcomes
    weights = np.ones((1, len(kinds))) if weights is None else weights
    tp, fp, fn, tn = (weights @ kinds).T
    return tp, fp, fn, tn


def counts_of_groups(evidence: "Evidence", groups: Groups) -> Values:
    """Return the metrics of `verdict_counts` for each of k groups, (k,) each."""
    tp, fp, fn, tn = (np.bincount(groups, kind).astype(np.float64) for kind in evidence.outcomes.T)
    return {"tp_defect": tp, "fp_defect": fp, "tn_good": tn, "fn_defect": fn, "total_images": tp + fp + fn + tn}


def share(part: Floats, whole: Floats) -> Floats:
    """Return part / whole for each sample, (B,); NaN where `whole` is 0."""
    return np.asarray(np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0))


def ranking(evidence: "Evidence", weights: Floats | None) -> Values:
    """Return the image-level metrics that need no threshold. All need a good and a defective image."""
    truth, scores = evidence.truth, evidence.scores
    weights = np.ones((1, len(truth))) if weights is None else weights
    levels = {f"false_alarms_at_recall.{name}": level for name, level in RECALL_LEVELS.items()}
    rates = {f"recall_at_false_alarms.{name}": rate for name, rate in FALSE_ALARM_LEVELS.items()}
    if truth.all() or not truth.any():
        keys = ("image_auroc", "image_ap", "image_f1_max", "ece", "brier", "image_f1_max_threshold", *levels, *rates)
        return dict.fromkeys(keys, np.full(len(weights), np.nan))
    ranked = rank(truth, scores, weights)
    highest, threshold = best_f1(ranked)
    return {
        "image_auroc": auroc(ranked),
        "image_ap": average_precision_score(ranked),
        "image_f1_max": highest,
        "ece": expected_calibration_error(truth, scores, weights),
        "brier": brier(truth, scores, weights),
        "image_f1_max_threshold": threshold,
        **{key: false_alarms_at(ranked, level) for key, level in levels.items()},
        **{key: recall_at(ranked, rate) for key, rate in rates.items()},
    }


def calibrated(evidence: "Evidence", weights: Floats | None) -> Values:
    """Return the calibration error and the Brier score of the calibrated scores.

    They are undefined where those of `ranking` are, and missing without calibrated scores.
    """
    truth, probabilities = evidence.truth, evidence.probabilities
    if probabilities is None:
        return {}
    weights = np.ones((1, len(truth))) if weights is None else weights
    if truth.all() or not truth.any():
        return dict.fromkeys(("ece_calibrated", "brier_calibrated"), np.full(len(weights), np.nan))
    return {
        "ece_calibrated": expected_calibration_error(truth, probabilities, weights),
        "brier_calibrated": brier(truth, probabilities, weights),
    }


def confidence(evidence: "Evidence", weights: Floats | None) -> Values:
    """Return the mean score, 0 to 1, of the detections of all classes at or above the threshold."""
    detections = evidence.detections
    if detections is None:
        return {}
    if weights is None:
        pooled = np.concatenate([*detections.counted_scores, []])
        return {"confidence": _one(float(np.mean(pooled)) if len(pooled) else None)}
    sums, counts = detections.sums_of_scores
    return {"confidence": share(weights @ sums, weights @ counts)}


def precision(evidence: "Evidence", weights: Floats | None) -> Values:
    """Return COCO's metrics (https://cocodataset.org/#detection-eval), except those of single classes.

    With weights, it is only the average precision at an IoU of 0.50:0.95, 0.50 and 0.75.
    """
    detections = evidence.detections
    if detections is None:
        return {}
    if weights is None:
        return {key: _one(value) for key, value in detections.precision.items() if key != "ap_by_class"}
    return {
        f"{kind}_{name}": values
        for kind, evaluation in (detections.evaluations or {}).items()
        for name, values in evaluation.resampled(weights).items()
    }


def mask_iou(evidence: "Evidence", weights: Floats | None) -> Values:
    """Return the mean IoU, 0 to 1, of each true defect with the prediction that covers it best."""
    detections = evidence.detections
    if detections is None:
        return {}
    if weights is None:
        return {"mean_mask_iou": _one(detections.errors.mean_iou if detections.has_masks else None)}
    return {"mean_mask_iou": detections.errors.resampled_iou(weights)} if detections.has_masks else {}


def pixels(evidence: "Evidence", weights: Floats | None) -> Values:
    """Return the pixel-level metrics. With weights, they are approximate, see `PixelTally.resampled`."""
    if evidence.detections is None:
        return {}
    tally = evidence.detections.pixels
    if weights is None:
        return {key: _one(value) for key, value in (tally or PixelTally()).figures().items()}
    return tally.resampled(weights) if tally else {}


def _one(value: float | None) -> Floats:
    return np.array([np.nan if value is None else value])
