"""Every figure of `metrics.json` that follows from truth and predictions, each with its interval."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flawmask.coco import GOOD, CocoSplit, Record, instance_masks
from flawmask.evaluation.average_precision import (
    Evaluation,
    average_precision,
    coco_results,
    evaluate_instances,
    mask_precision_curve,
)
from flawmask.evaluation.instances import InstanceErrors, instance_errors
from flawmask.evaluation.pixels import PixelTally
from flawmask.evaluation.ranking import (
    auroc,
    average_precision_score,
    best_f1,
    calibration,
    confusion,
    expected_calibration_error,
    false_alarms_at,
    precision_recall_curve,
    rank,
    roc_curve,
)
from flawmask.evaluation.uncertainty import Interval, auroc_interval, f1_interval, percentiles, resample, wilson
from flawmask.evaluation.verdicts import Judged, image_metrics, rates
from flawmask.prediction import Prediction
from flawmask.progress import track

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

RECALL_LEVELS = {"100": 1.0, "99": 0.99, "95": 0.95}
"""At which recalls the false-alarm rate is read."""


@dataclass(frozen=True)
class Measured:
    """What a split says of a model.

    Attributes:
        judged: truth and verdict of each image.
        metrics: what `metrics.json` holds, but for what the stage adds: names, speed, the threshold's origin.
        curves: what `curves.json` holds.
    """

    judged: list[Judged]
    metrics: dict[str, Any]
    curves: dict[str, Any]


def judge(split: CocoSplit, predictions: Sequence[Prediction], conf: float, min_area: int) -> list[Judged]:
    """Return each image's truth and verdict."""
    judged = []
    for image, prediction in zip(split.images, predictions, strict=True):
        verdict = prediction.verdict(conf, min_area)
        judged.append(
            Judged(
                file_name=image["file_name"],
                defect_type=image.get("defect_type", "unknown"),
                truth=split.is_defective(image),
                verdict=verdict.is_defect,
                score=verdict.score,
            )
        )
    return judged


@dataclass(frozen=True)
class Evidence:
    """What the figures of a split come from, each image judged and matched once.

    Attributes:
        judged: truth and verdict of each image.
        predictions: what was found on each.
        evaluations: COCO's, of masks and boxes; None without a true defect.
        errors: defects found and not found at the verdict's threshold.
        conf: that threshold.
    """

    judged: list[Judged]
    predictions: Sequence[Prediction]
    evaluations: dict[str, Evaluation] | None
    errors: InstanceErrors
    conf: float

    @property
    def has_masks(self) -> bool:
        """Whether the network outlines what it finds."""
        return all(prediction.has_masks for prediction in self.predictions)

    @property
    def truth(self) -> Flags:
        """(N,) whether each image is defective."""
        return np.array([one.truth for one in self.judged], dtype=bool)

    @property
    def scores(self) -> Floats:
        """(N,) each image's score."""
        return np.array([one.score for one in self.judged], dtype=np.float64)


def gather(split: CocoSplit, predictions: Sequence[Prediction], conf: float, min_area: int) -> Evidence:
    """Judge and match the predictions, one per image of the split."""
    return Evidence(
        judge(split, predictions, conf, min_area),
        predictions,
        _evaluate(split, predictions),
        instance_errors(split, predictions, conf, min_area),
        conf,
    )


def _evaluate(split: CocoSplit, predictions: Sequence[Prediction]) -> dict[str, Evaluation] | None:
    has_masks = all(prediction.has_masks for prediction in predictions)
    return evaluate_instances(split, coco_results(split, predictions), has_masks=has_masks)


def resampled_figures(evidence: Evidence, weights: Floats) -> dict[str, Floats]:
    """Return the image- and instance-level figures of weighted images.

    Args:
        evidence: of N images.
        weights: (B, N), how often each image counts in each of B samples.

    Returns:
        (B,) for each figure, NaN where it is undefined.
    """
    return {
        **_resampled_verdicts(evidence.judged, weights),
        **_resampled_ranking(evidence.truth, evidence.scores, weights),
        "confidence": _resampled_confidence(evidence.predictions, evidence.conf, weights),
        **_resampled_precision(evidence.evaluations, weights),
        **({"mean_mask_iou": evidence.errors.resampled_iou(weights)} if evidence.has_masks else {}),
    }


def measure(
    split: CocoSplit, predictions: Sequence[Prediction], conf: float, min_area: int, *, resamples: int, seed: int
) -> Measured:
    """Return all figures of a split.

    Args:
        split: the truth.
        predictions: one per image of the split.
        conf: the verdict's threshold.
        min_area: defects of fewer pixels do not count for verdicts and scores.
        resamples: how many bootstrap samples the intervals come from; 0 for none.
        seed: decides these samples.

    Raises:
        FlawmaskError: a prediction's score or mask makes no sense; the message names the image.
    """
    evidence = gather(split, predictions, conf, min_area)
    pixels = _tally_pixels(split, predictions, conf, min_area) if evidence.has_masks else None
    errors, truth, scores = evidence.errors, evidence.truth, evidence.scores
    metrics = {
        **image_metrics(evidence.judged),
        **_ranked(truth, scores),
        "confidence": _confidence(predictions, conf),
        "confusion": _confusion(split, predictions, conf, min_area),
        **average_precision(split, evidence.evaluations),
        "mean_mask_iou": errors.mean_iou if evidence.has_masks else None,
        "instances": {"truth": errors.truths, "found": errors.found, "matched": errors.truths - len(errors.missed)},
        "instance_errors": errors.counts,
        "missed_instances": errors.missed,
        "spurious_instances": errors.spurious,
        **(pixels or PixelTally()).figures(),
        "finds": "masks" if evidence.has_masks else "boxes",
        "resamples": resamples,
        "notes": _undefined(truth, evidence.has_masks),
    }
    weights = resample(truth, resamples, seed)
    drawn: dict[str, Floats] = {}
    if resamples:
        drawn = {**resampled_figures(evidence, weights), **(pixels.resampled(weights) if pixels else {})}
    metrics |= _intervals(metrics, drawn)
    ranking = rank(truth, scores)
    curves = {
        "roc": roc_curve(ranking),
        "pr": precision_recall_curve(ranking),
        "mask_pr": mask_precision_curve(evidence.evaluations),
        "calibration": calibration(truth, scores),
        **(pixels.curves() if pixels else {}),
    }
    return Measured(evidence.judged, metrics, {name: curve for name, curve in curves.items() if curve is not None})


def measure_scores(judged: Sequence[Judged], *, resamples: int, seed: int) -> dict[str, Any]:
    """Return the image-level figures and their intervals, which need no more than a score and a verdict per image.

    Args:
        judged: truth, verdict and score, 0 to 1, of each image.
        resamples: how many bootstrap samples the intervals come from; 0 for none.
        seed: decides these samples.
    """
    truth = np.array([one.truth for one in judged], dtype=bool)
    scores = np.array([one.score for one in judged], dtype=np.float64)
    metrics = {**image_metrics(judged), **_ranked(truth, scores), "resamples": resamples}
    drawn: dict[str, Floats] = {}
    if resamples:
        weights = resample(truth, resamples, seed)
        drawn = {**_resampled_verdicts(judged, weights), **_resampled_ranking(truth, scores, weights)}
    return metrics | _intervals(metrics, drawn)


def _intervals(metrics: Mapping[str, Any], drawn: Mapping[str, Floats]) -> dict[str, Any]:
    """Return `intervals`, and by which method each was made: by a formula where there is one, else by the bootstrap."""
    by_method: dict[str, Mapping[str, Interval | None]] = {
        "bootstrap": {name: percentiles(values) for name, values in drawn.items()},
        "wilson": _wilson_intervals(metrics),
        "newcombe": _newcombe_interval(metrics),
    }
    found, methods = {}, {}
    for method, intervals in by_method.items():  # the last one that has an interval gives it
        for name, interval in intervals.items():
            if interval is not None and metrics.get(name, 0.0) is not None:
                found[name], methods[name] = interval, method
    return {"intervals": found, "interval_method": methods}


def _newcombe_interval(metrics: Mapping[str, Any]) -> dict[str, Interval]:
    if metrics["image_auroc"] is None:
        return {}
    positives, negatives = metrics["tp_defect"] + metrics["fn_defect"], metrics["fp_defect"] + metrics["tn_good"]
    return {"image_auroc": auroc_interval(metrics["image_auroc"], positives, negatives)}


def quick_figures(split: CocoSplit, predictions: Sequence[Prediction]) -> dict[str, float | None]:
    """Return `segm_ap`, the mask AP, and `f1`, at a threshold of 0.5: what an epoch is chosen by."""
    evaluations = _evaluate(split, predictions)
    verdicts = image_metrics(judge(split, predictions, 0.5, 0))
    return {"segm_ap": average_precision(split, evaluations)["mask_ap"], "f1": verdicts["f1_score"]}


def _tally_pixels(split: CocoSplit, predictions: Sequence[Prediction], conf: float, min_area: int) -> PixelTally:
    tally = PixelTally()
    pairs = zip(split.images, predictions, strict=True)
    for image, prediction in track(pairs, "counting pixels", total=len(predictions)):
        truth = true_mask(split, image)
        tally.add(image["file_name"], prediction.score_map(min_area), truth, prediction.defect_mask(conf, min_area))
    return tally


def true_mask(split: CocoSplit, image: Record) -> Flags:
    """Return where the image is defective: (height, width) bool, the union of its defects."""
    union = np.zeros((image["height"], image["width"]), dtype=bool)
    for mask in instance_masks(split.defects(image), *union.shape, image["file_name"]):
        union |= mask
    return union


def _ranked(truth: Flags, scores: Floats) -> dict[str, Any]:
    """Return the image-level figures that need no threshold."""
    one = {
        name: _number(values) for name, values in _resampled_ranking(truth, scores, np.ones((1, len(truth)))).items()
    }
    at_recall = {name: one.pop(f"false_alarms_at_recall_{name}") for name in RECALL_LEVELS}
    _, threshold = best_f1(rank(truth, scores))
    both = one["image_f1_max"] is not None
    return {**one, "image_f1_max_threshold": _number(threshold) if both else None, "false_alarms_at_recall": at_recall}


def _number(values: Floats) -> float | None:
    return None if np.isnan(values[0]) else float(values[0])


def _resampled_ranking(truth: Flags, scores: Floats, weights: Floats) -> dict[str, Floats]:
    if truth.all() or not truth.any():
        names = ("auroc", "ap", "f1_max")
        nothing = np.full(len(weights), np.nan)
        levels = [f"false_alarms_at_recall_{name}" for name in RECALL_LEVELS]
        return dict.fromkeys([*(f"image_{name}" for name in names), "ece", *levels], nothing)
    ranking = rank(truth, scores, weights)
    return {
        "image_auroc": auroc(ranking),
        "image_ap": average_precision_score(ranking),
        "image_f1_max": best_f1(ranking)[0],
        "ece": expected_calibration_error(truth, scores, weights),
        **{f"false_alarms_at_recall_{name}": false_alarms_at(ranking, level) for name, level in RECALL_LEVELS.items()},
    }


def _confidence(predictions: Sequence[Prediction], conf: float) -> float | None:
    """Return the mean score of the detections at or above `conf`, of every class."""
    scores = [one.score for prediction in predictions for one in prediction.instances if one.score >= conf]
    return float(np.mean(scores)) if scores else None


def _resampled_confidence(predictions: Sequence[Prediction], conf: float, weights: Floats) -> Floats:
    sums, counts = (
        np.array([float(function([one.score for one in each.instances if one.score >= conf])) for each in predictions])
        for function in (sum, len)
    )
    total = weights @ counts
    return np.asarray(np.divide(weights @ sums, total, out=np.full(len(weights), np.nan), where=total > 0))


def _resampled_verdicts(judged: Sequence[Judged], weights: Floats) -> dict[str, Floats]:
    """Return the figures of `rates` of each sample, NaN where undefined."""
    outcomes = np.array([[one.truth and one.verdict, one.verdict and not one.truth, one.truth, True] for one in judged])
    tp, fp, positives, total = (weights @ outcomes.astype(float)).T
    found = [rates(*counts) for counts in zip(tp, fp, positives - tp, total - positives - fp, strict=True)]
    return {name: np.array([one[name] for one in found], dtype=float) for name in found[0]}


def _resampled_precision(evaluations: Mapping[str, Evaluation] | None, weights: Floats) -> dict[str, Floats]:
    if evaluations is None:
        return {}
    return {
        f"{kind}_{name}": values
        for kind, evaluation in track(list(evaluations.items()), "resampling")
        for name, values in evaluation.resampled(weights).items()
    }


def _wilson_intervals(metrics: Mapping[str, Any]) -> dict[str, Interval | None]:
    tp, fp, fn, tn = (metrics[name] for name in ("tp_defect", "fp_defect", "fn_defect", "tn_good"))
    recall = wilson(tp, tp + fn)
    return {
        "accuracy": wilson(tp + tn, metrics["total_images"]),
        "precision": wilson(tp, tp + fp),
        "recall": recall,
        "defect_detection_rate": recall,
        "false_alarm_rate": wilson(fp, fp + tn),
        "f1_score": f1_interval(tp, fp, fn),
    }


def _confusion(split: CocoSplit, predictions: Sequence[Prediction], conf: float, min_area: int) -> dict[str, Any]:
    """Return the confusion matrix of the images by class: the class of an image is good, or that of its most certain
    defect; in truth its `defect_type` where that is a class, or that of its largest annotation.
    """
    classes = [GOOD, *(name for name in split.class_names if name != GOOD)]
    truth, predicted = [], []
    for image, prediction in zip(split.images, predictions, strict=True):
        truth.append(_true_class(split, image))
        defects = prediction.defects(conf, min_area)
        predicted.append(defects[0].label if defects else GOOD)
    return confusion(truth, predicted, classes)


def _true_class(split: CocoSplit, image: Record) -> str:
    defects = split.defects(image)
    if not defects:
        return GOOD
    if image.get("defect_type") in split.class_names:
        return str(image["defect_type"])
    largest = max(defects, key=lambda one: float(one["bbox"][2]) * float(one["bbox"][3]))
    return split.class_names[split.labels[largest["category_id"]] - 1]


def _undefined(truth: Flags, has_masks: bool) -> list[str]:
    """Return why figures are not there, as sentences for a person."""
    notes = []
    if truth.all():
        notes.append("There is no good image: false alarms and everything that ranks images read n/a.")
    elif not truth.any():
        notes.append("There is no defective image: recall, AP and everything that ranks images or pixels read n/a.")
    if not has_masks:
        notes.append("This network finds boxes and outlines nothing: everything of masks and pixels reads n/a.")
    return notes
