"""Compute all metrics of `metrics.json` from truth and predictions, each with its interval."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from flawmask import masks
from flawmask.coco import CocoSplit, Record, instance_masks, instance_rles
from flawmask.evaluation.average_precision import (
    Evaluation,
    average_precision,
    evaluate_instances,
    mask_precision_curve,
)
from flawmask.evaluation.by_group import bootstrap
from flawmask.evaluation.instances import InstanceErrors, instance_errors
from flawmask.evaluation.metrics import METRICS, Formula, Group, Metric, values
from flawmask.evaluation.pixels import PixelTally
from flawmask.evaluation.ranking import calibration, confusion, precision_recall_curve, rank, roc_curve
from flawmask.evaluation.spool import StoredPredictions
from flawmask.evaluation.uncertainty import Groups, Interval
from flawmask.evaluation.verdicts import EvaluatedImage, groups_of, recall_by_type
from flawmask.good_names import GOOD
from flawmask.prediction import Prediction
from flawmask.progress import track

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class SplitMetrics:
    """The metrics of a model on a split.

    Attributes:
        images: truth and verdict of each image.
        metrics: the content of `metrics.json`, without what the stage adds: names, speed, the threshold's origin.
        curves: the content of `curves.json`.
    """

    images: list[EvaluatedImage]
    metrics: dict[str, Any]
    curves: dict[str, Any]


def decide_verdicts(
    split: CocoSplit, predictions: Sequence[Prediction], conf: float, min_area: int
) -> list[EvaluatedImage]:
    """Return each image's truth and verdict."""
    evaluated = []
    groups: Sequence[str | None] = split.groups or [None] * len(split.images)
    for image, prediction, group in zip(split.images, predictions, groups, strict=True):
        verdict = prediction.verdict(conf, min_area)
        evaluated.append(
            EvaluatedImage(
                file_name=image["file_name"],
                defect_type=split.type_of(image),
                truth=split.is_defective(image),
                verdict=verdict.is_defect,
                score=verdict.score,
                group=group,
                defect_probability=verdict.defect_probability,
            )
        )
    return evaluated


@dataclass(frozen=True)
class Detections:
    """The predictions of a detector for a split. They are matched with the truth when a metric first needs that.

    Attributes:
        split: the truth.
        predictions: one per image of the split.
        conf: the verdict's threshold.
        min_area: defects of fewer pixels do not count for verdicts and scores.
    """

    split: CocoSplit
    predictions: Sequence[Prediction]
    conf: float
    min_area: int

    @cached_property
    def has_masks(self) -> bool:
        """Whether the network predicts masks."""
        return all(prediction.has_masks for prediction in self.predictions)

    @cached_property
    def counted_scores(self) -> list[list[float]]:
        """The scores, at or above the threshold, of all instances on each image."""
        return [[one.score for one in each.instances if one.score >= self.conf] for each in self.predictions]

    @cached_property
    def sums_of_scores(self) -> tuple[Floats, Floats]:
        """The sum of each image's `counted_scores`, (N,), and their number, (N,)."""
        sums, counts = (np.array([float(function(one)) for one in self.counted_scores]) for function in (sum, len))
        return sums, counts

    @cached_property
    def evaluations(self) -> dict[str, Evaluation] | None:
        """COCO's evaluations of masks and boxes; None where the split has no true defect."""
        return evaluate_instances(self.split, self.predictions, has_masks=self.has_masks)

    @cached_property
    def precision(self) -> dict[str, Any]:
        """COCO's metrics, see `average_precision`."""
        return average_precision(self.split, self.evaluations)

    @cached_property
    def errors(self) -> InstanceErrors:
        """The missed and the spurious defects at the threshold."""
        return instance_errors(self.split, self.predictions, self.conf, self.min_area)

    @cached_property
    def pixels(self) -> PixelTally | None:
        """The pixel counts; None where the network predicts no masks."""
        return _tally_pixels(self) if self.has_masks else None


@dataclass(frozen=True)
class Evidence:
    """The data from which the metrics of a split are computed.

    Attributes:
        images: truth, verdict and score of each image.
        detections: the predictions for them; None for a model that only scores images.
    """

    images: Sequence[EvaluatedImage]
    detections: Detections | None = None

    @cached_property
    def truth(self) -> Flags:
        """(N,) whether each image is defective."""
        return np.array([one.truth for one in self.images], dtype=bool)

    @cached_property
    def verdicts(self) -> Flags:
        """(N,) whether each image was rejected."""
        return np.array([one.verdict for one in self.images], dtype=bool)

    @cached_property
    def outcomes(self) -> Floats:
        """(N, 4) one 1 in each row: true positive, false positive, false negative, true negative."""
        truth, verdicts = self.truth, self.verdicts
        kinds = np.stack([truth & verdicts, ~truth & verdicts, truth & ~verdicts, ~truth & ~verdicts], axis=1)
        return kinds.astype(np.float64)

    @cached_property
    def scores(self) -> Floats:
        """(N,) each image's score."""
        return np.array([one.score for one in self.images], dtype=np.float64)

    @cached_property
    def probabilities(self) -> Floats | None:
        """(N,) each image's calibrated score; None if an image has none."""
        probabilities = [one.defect_probability for one in self.images]
        return None if None in probabilities else np.array(probabilities, dtype=np.float64)

    @cached_property
    def groups(self) -> Groups | None:
        """(N,) the number of each image's group; None where groups are unknown."""
        return groups_of(self.images)


def gather(split: CocoSplit, predictions: Sequence[Prediction], conf: float, min_area: int) -> Evidence:
    """Return the evidence for predictions, one per image of the split."""
    return Evidence(decide_verdicts(split, predictions, conf, min_area), Detections(split, predictions, conf, min_area))


def measure(
    split: CocoSplit, predictions: Sequence[Prediction], conf: float, min_area: int, *, resamples: int, seed: int
) -> SplitMetrics:
    """Return all metrics of a split.

    Args:
        split: the truth.
        predictions: one per image of the split.
        conf: the verdict's threshold.
        min_area: defects of fewer pixels do not count for verdicts and scores.
        resamples: the number of bootstrap samples for intervals; 0 for none.
        seed: the seed of these samples.

    Raises:
        FlawmaskError: a prediction has an invalid score or mask; the message names the image.
    """
    detections = Detections(split, predictions, conf, min_area)
    evidence = Evidence(decide_verdicts(split, predictions, conf, min_area), detections)
    errors, pixels, truth = detections.errors, detections.pixels, evidence.truth
    figures = _figures(evidence)
    metrics = {
        **_nested(figures, "verdicts"),
        "recall_by_type": recall_by_type(evidence.images),
        **_nested(figures, "ranking"),
        "confusion": _confusion(split, predictions, conf, min_area),
        **_nested(figures, "precision"),
        "ap_by_class": detections.precision["ap_by_class"],
        **_nested(figures, "overlap"),
        "instances": {"truth": errors.truths, "found": errors.found, "matched": errors.truths - len(errors.missed)},
        "instance_errors": errors.counts,
        "missed_instances": errors.missed,
        "spurious_instances": errors.spurious,
        **_nested(figures, "pixels"),
        "finds": "masks" if detections.has_masks else "boxes",
        **_groups(evidence),
        "resamples": resamples,
        "notes": [*_crowds_alone(split), *_undefined(truth, detections.has_masks)],
        **_intervals(figures, evidence, resamples, seed),
    }
    ranking = rank(truth, evidence.scores)
    curves = {
        "roc": roc_curve(ranking),
        "pr": precision_recall_curve(ranking),
        "mask_pr": mask_precision_curve(detections.evaluations),
        "calibration": calibration(truth, evidence.scores),
        "calibrated": None if evidence.probabilities is None else calibration(truth, evidence.probabilities),
        **(pixels.curves() if pixels else {}),
    }
    curves = {name: curve for name, curve in curves.items() if curve is not None}
    return SplitMetrics(list(evidence.images), metrics, curves)


def measure_scores(images: Sequence[EvaluatedImage], *, resamples: int, seed: int) -> dict[str, Any]:
    """Return the image-level metrics with their intervals. They need only a score and a verdict for each image.

    Args:
        images: truth, verdict and score, 0 to 1, of each image.
        resamples: the number of bootstrap samples for intervals; 0 for none.
        seed: the seed of these samples.
    """
    evidence = Evidence(images)
    figures = _figures(evidence)
    return {
        **_nested(figures, "verdicts"),
        "recall_by_type": recall_by_type(images),
        **_nested(figures, "ranking"),
        **_groups(evidence),
        "resamples": resamples,
        **_intervals(figures, evidence, resamples, seed),
    }


def _groups(evidence: Evidence) -> dict[str, int]:
    """Return the number of groups, where groups are known."""
    return {} if evidence.groups is None else {"groups": len(np.unique(evidence.groups))}


def _figures(evidence: Evidence) -> dict[str, float | None]:
    """Return all metrics by key; None where one is undefined."""
    return {key: _number(METRICS[key], value[0]) for key, value in values(METRICS.values(), evidence).items()}


def _number(metric: Metric, value: float) -> float | None:
    if np.isnan(value):
        return None
    return int(value) if metric.shown == "count" else float(value)


def _nested(figures: Mapping[str, float | None], group: Group) -> dict[str, Any]:
    """Return the metrics of a group in the form of `metrics.json`: `a.b` is key `b` of an object under `a`."""
    nested: dict[str, Any] = {}
    for key, value in figures.items():
        if METRICS[key].group == group:
            outer, _, inner = key.partition(".")
            nested[outer] = {**nested.get(outer, {}), inner: value} if inner else value
    return nested


def _intervals(
    figures: Mapping[str, float | None], evidence: Evidence, resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Return `intervals` and, under `interval_method`, how each was computed: by a formula or else by the bootstrap."""
    defined = [one for key, one in METRICS.items() if figures.get(key) is not None and one.has_interval]
    truth, groups = evidence.truth, evidence.groups
    method = "bootstrap" if groups is None else "bootstrap, by group"
    drawn = bootstrap(lambda weights: values(defined, evidence, weights), truth, groups, resamples, seed)
    candidates: list[tuple[str, str, Interval | None]] = [
        *((key, method, interval) for key, interval in drawn.items()),
        *((one.key, *_by_formula(one.formula, figures, evidence)) for one in defined if one.formula),
    ]
    intervals, methods = {}, {}
    for key, method, interval in candidates:  # an interval from a formula replaces a bootstrapped one
        if interval is not None:
            name = key.replace(".", "_")
            intervals[name], methods[name] = interval, method
    return {"intervals": intervals, "interval_method": methods}


def _by_formula(
    formula: Formula, figures: Mapping[str, float | None], evidence: Evidence
) -> tuple[str, Interval | None]:
    """Return the name of the method and the interval, over groups where these are known."""
    if evidence.groups is None:
        return formula.method, formula.bounds(figures)
    return formula.method_by_group, formula.bounds_by_group(evidence, evidence.groups)


def quick_figures(split: CocoSplit, predictions: Sequence[Prediction]) -> dict[str, float | None]:
    """Return the metrics by which an epoch can be chosen: `segm_ap`, the mask AP, and `f1` at a threshold of 0.5."""
    evidence = gather(split, predictions, 0.5, 0)
    figures = values([METRICS["mask_ap"], METRICS["f1_score"]], evidence)
    return {
        name: _number(METRICS[key], figures[key][0]) for name, key in {"segm_ap": "mask_ap", "f1": "f1_score"}.items()
    }


def _tally_pixels(detections: Detections) -> PixelTally:
    tally = PixelTally()
    split, predictions, min_area = detections.split, detections.predictions, detections.min_area
    pairs = zip(split.images, predictions, strict=True)
    for image, prediction in track(pairs, "counting pixels", total=len(predictions)):
        if isinstance(predictions, StoredPredictions):
            tally.add_masks(*_overlap(split, image, prediction.defect_rle(detections.conf, min_area)))
            continue
        truth, predicted = true_mask(split, image), prediction.defect_mask(detections.conf, min_area)
        tally.add(image["file_name"], prediction.score_map(min_area), truth, predicted)
    return tally


def _overlap(split: CocoSplit, image: Record, predicted: dict[str, Any]) -> tuple[int, int, int]:
    """Return the number of pixels in both the true and the predicted mask, only in the latter, and only in the former.

    No mask is decoded.
    """
    shape = image["height"], image["width"]
    truth = masks.union(instance_rles(split.defects(image), *shape, image["file_name"]), *shape)
    hits = masks.area(masks.intersection(truth, predicted))
    return hits, masks.area(predicted) - hits, masks.area(truth) - hits


def true_mask(split: CocoSplit, image: Record) -> Flags:
    """Return the union of an image's true defects, (height, width) bool."""
    union = np.zeros((image["height"], image["width"]), dtype=bool)
    for mask in instance_masks(split.defects(image), *union.shape, image["file_name"]):
        union |= mask
    return union


def _confusion(split: CocoSplit, predictions: Sequence[Prediction], conf: float, min_area: int) -> dict[str, Any]:
    """Return the confusion matrix of the images by class.

    The predicted class of an image is the class of its defect with the highest score, or good. Its true class is its
    `defect_type`, if that is a class, or else the class of its largest annotation.
    """
    classes = [GOOD, *(name for name in split.class_names if name != GOOD)]
    truth, predicted = [], []
    for image, prediction in zip(split.images, predictions, strict=True):
        truth.append(_true_class(split, image))
        defects = prediction.defects(conf, min_area)
        predicted.append(defects[0].label if defects else GOOD)
    return confusion(truth, predicted, classes)


def _true_class(split: CocoSplit, image: Record) -> str:
    if split.is_defective(image) and image.get("defect_type") in split.class_names:
        return str(image["defect_type"])
    return split.class_of(image)


def _crowds_alone(split: CocoSplit) -> list[str]:
    """Return a note, as a sentence, where all defects are crowds."""
    crowds = len(split.crowds)
    if not crowds or crowds < sum(len(split.defects(image)) for image in split.images):
        return []
    return [f"All {crowds} defects are crowds, so none counts as an instance: --crowds instances makes them count."]


def _undefined(truth: Flags, has_masks: bool) -> list[str]:
    """Return notes, as sentences, on why metrics are undefined."""
    notes = []
    if truth.all():
        notes.append("There is no good image: false alarms and all figures that rank images read n/a.")
    elif not truth.any():
        notes.append("There is no defective image: recall, AP and all figures that rank images or pixels read n/a.")
    if not has_masks:
        notes.append("This network predicts boxes and no masks: all figures of masks and pixels read n/a.")
    return notes
