"""The table of metrics: the name of each, whether higher is better, where and how it is shown, and how it is computed.

The summary, the report, comparisons, cross-validation and `--against` use this table. A new metric is one entry here.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from flawmask.evaluation import by_group, formulas
from flawmask.evaluation.uncertainty import Groups, Interval, auroc_interval, f1_interval, holds_defect, wilson

if TYPE_CHECKING:  # see `formulas`
    from flawmask.evaluation.measure import Evidence

Floats = npt.NDArray[np.float64]
Figures = Mapping[str, Any]

Group = Literal["verdicts", "ranking", "precision", "overlap", "pixels"]
"""What a metric measures: the verdicts, the images' scores, instances as COCO counts them, the overlap of instances
with predictions, or pixels."""

Line = Literal["block", "intervals", "ranking", "false alarms", "recall at false alarms", "masks", "boxes", "pixels"]
"""The lines of the console summary."""

Shown = Literal["percent", "decimal", "count"]


@dataclass(frozen=True)
class Formula:
    """A formula for an interval, which needs no bootstrap.

    Attributes:
        method: the formula's name in `interval_method`.
        bounds: returns the interval from all metrics by key; None where it is undefined.
        method_by_group: the name of the formula that is used where groups are known.
        bounds_by_group: returns that formula's interval from the evidence and its groups.
    """

    method: str
    bounds: Callable[[Figures], Interval | None]
    method_by_group: str
    bounds_by_group: "Callable[[Evidence, Groups], Interval | None]"


@dataclass(frozen=True)
class Metric:
    """One metric of `metrics.json`.

    Attributes:
        key: its key there; `a.b` is key `b` of the object under `a`.
        label: its name in the report.
        meaning: its meaning in a few words.
        group: what it measures.
        compute: a function of `formulas` that returns this key, perhaps among others.
        lower_is_better: whether lower values are better.
        shown: the number format; `percent` is for fractions from 0 to 1.
        has_interval: whether it has an interval.
        formula: the formula of the interval; without it, the interval is bootstrapped.
        console: the lines of the console summary that show it, each with a text in which its value replaces `{}`.
        report: its place in a table of the report; None where it is not shown. Here and below, metrics with equal
            places are in the order of `METRICS`.
        comparison: its place and its label in the table of a comparison; None where it is not shown.
        against: its place in the table of `--against`; None where it is not compared.
        in_folds: whether a cross-validation shows its value for each fold, with mean and spread.
        curve: the curve of `curves.json` whose title shows it, and its label there.
        question: the question that it answers in a comparison, where models are ranked by it; empty where they are not.
    """

    key: str
    label: str
    meaning: str
    group: Group
    compute: "Callable[[Evidence, Floats | None], dict[str, Floats]]"
    lower_is_better: bool = False
    shown: Shown = "percent"
    has_interval: bool = True
    formula: Formula | None = None
    console: Mapping[Line, str] = field(default_factory=dict)
    report: int | None = None
    comparison: tuple[int, str] | None = None
    against: int | None = None
    in_folds: bool = False
    curve: tuple[str, str] | None = None
    question: str = ""


def proportion(part: Sequence[str], whole: Sequence[str]) -> Formula:
    """Return Wilson's interval for a proportion of images, or over groups.

    Args:
        part: keys of counts; their sum is the numerator.
        whole: keys of counts; their sum is the denominator.
    """

    def bounds(figures: Figures) -> Interval | None:
        return wilson(sum(figures[key] for key in part), sum(figures[key] for key in whole))

    def bounds_by_group(evidence: "Evidence", groups: Groups) -> Interval | None:
        counts = formulas.counts_of_groups(evidence, groups)
        numerator, denominator = (np.sum([counts[key] for key in keys], axis=0) for keys in (part, whole))
        return by_group.wilson(numerator, denominator, holds_defect(evidence.truth, groups))

    return Formula("wilson", bounds, "wilson, by group", bounds_by_group)


def _f1_interval(figures: Figures) -> Interval | None:
    return f1_interval(figures["tp_defect"], figures["fp_defect"], figures["fn_defect"])


def _f1_by_group(evidence: "Evidence", groups: Groups) -> Interval | None:
    counts = formulas.counts_of_groups(evidence, groups)
    defective = holds_defect(evidence.truth, groups)
    return by_group.f1_interval(counts["tp_defect"], counts["fp_defect"], counts["fn_defect"], defective)


def _auroc_interval(figures: Figures) -> Interval:
    positives, negatives = figures["tp_defect"] + figures["fn_defect"], figures["fp_defect"] + figures["tn_good"]
    return auroc_interval(figures["image_auroc"], positives, negatives)


def _auroc_by_group(evidence: "Evidence", groups: Groups) -> Interval:
    return by_group.auroc_interval(evidence.truth, evidence.scores, groups)


RECALL = proportion(["tp_defect"], ["tp_defect", "fn_defect"])

_ENTRIES = (
    Metric(
        "accuracy", "Accuracy", "verdicts that are right", "verdicts", formulas.verdict_rates,
        formula=proportion(["tp_defect", "tn_good"], ["total_images"]),
        console={"block": "Accuracy", "intervals": "accuracy {}"}, report=4, against=1, in_folds=True,
    ),
    Metric(
        "precision", "Precision", "rejected parts that are defective", "verdicts", formulas.verdict_rates,
        formula=proportion(["tp_defect"], ["tp_defect", "fp_defect"]),
        console={"block": "Precision", "intervals": "precision {}"}, report=2, against=1, in_folds=True,
    ),
    Metric(
        "recall", "Recall", "defective parts that are found", "verdicts", formulas.verdict_rates, formula=RECALL,
        console={"block": "Recall", "intervals": "recall {}"}, report=1, comparison=(3, "Recall"), against=1,
        in_folds=True,
    ),
    Metric(
        "f1_score", "F1", "harmonic mean of recall and precision", "verdicts", formulas.verdict_rates,
        formula=Formula("wilson", _f1_interval, "wilson, by group", _f1_by_group),
        console={"block": "F1-Score", "intervals": "F1 {}"}, report=3,
        comparison=(2, "F1 at its threshold"), against=1, in_folds=True,
    ),
    Metric(
        "defect_detection_rate", "Defect detection rate", "another name of the recall", "verdicts",
        formulas.verdict_rates, formula=RECALL, console={"block": "Defect detection rate"},
    ),
    Metric(
        "composite_score", "Composite", "0.3 accuracy + 0.2 precision + 0.3 recall + 0.2 F1", "verdicts",
        formulas.verdict_rates, console={"block": "Composite"}, report=9,
    ),
    Metric(
        "image_auroc", "AUROC", "chance that a defective part scores above a good one", "ranking", formulas.ranking,
        formula=Formula("newcombe", _auroc_interval, "obuchowski, by group", _auroc_by_group),
        console={"ranking": "AUROC {}"}, report=6, comparison=(1, "Image AUROC"), against=1,
        in_folds=True, curve=("roc", "AUROC"),
        question="Telling good from defective (image AUROC)",
    ),
    Metric(
        "image_ap", "Average precision", "precision over all recalls, whatever the threshold", "ranking",
        formulas.ranking, console={"ranking": "AP {}"}, report=6, comparison=(1, "Image AP"), against=1,
        curve=("pr", "AP"),
    ),
    Metric(
        "image_f1_max", "Best F1", "at the threshold that suits these very images best", "ranking", formulas.ranking,
        console={"ranking": "best F1 {}"}, report=6, comparison=(1, "Best F1 of any threshold"),
    ),
    Metric(
        "image_f1_max_threshold", "Threshold of the best F1", "fitted to these very images", "ranking",
        formulas.ranking, shown="decimal", has_interval=False,
    ),
    Metric(
        "ece", "Calibration error", "how far scores are from the share of defects, on average", "ranking",
        formulas.ranking, lower_is_better=True, report=8, curve=("calibration", "error"),
    ),
    Metric(
        "ece_calibrated", "Calibration error, calibrated", "the same for the probability of a defect", "ranking",
        formulas.calibrated, lower_is_better=True, report=8, curve=("calibration", "calibrated"),
    ),
    Metric(
        "brier", "Brier score", "mean square of score minus truth", "ranking", formulas.ranking, lower_is_better=True,
        shown="decimal",
    ),
    Metric(
        "brier_calibrated", "Brier score, calibrated", "the same for the probability of a defect", "ranking",
        formulas.calibrated, lower_is_better=True, shown="decimal",
    ),
    Metric(
        "false_alarms_at_recall.100", "False alarms at 100 % recall", "if every defect must be found", "ranking",
        formulas.ranking, lower_is_better=True, console={"false alarms": "100 %: {}"}, report=7,
    ),
    Metric(
        "false_alarms_at_recall.99", "False alarms at 99 % recall", "if 1 defect in 100 may slip", "ranking",
        formulas.ranking, lower_is_better=True, console={"false alarms": "99 %: {}"}, report=7,
    ),
    Metric(
        "false_alarms_at_recall.95", "False alarms at 95 % recall", "if 5 defects in 100 may slip", "ranking",
        formulas.ranking, lower_is_better=True, console={"false alarms": "95 %: {}"}, report=7,
    ),
    Metric(
        "recall_at_false_alarms.5", "Recall at 5 % false alarms", "if 5 good parts in 100 may be rejected", "ranking",
        formulas.ranking, console={"recall at false alarms": "5 %: {}"}, report=7, in_folds=True,
        comparison=(1, "Recall at 5 % false alarms"),
    ),
    Metric(
        "recall_at_false_alarms.1", "Recall at 1 % false alarms", "if 1 good part in 100 may be rejected", "ranking",
        formulas.ranking, console={"recall at false alarms": "1 %: {}"}, report=7,
    ),
    Metric(
        "confidence", "Confidence", "mean score of the detections at or above the threshold", "ranking",
        formulas.confidence, console={"block": "Confidence"},
    ),
    Metric(
        "mask_ap", "Mask AP", "COCO, mask IoU 0.50 to 0.95", "precision", formulas.precision,
        console={"masks": "{} at IoU 0.50:0.95"}, report=1, comparison=(4, "Mask AP"), against=3, in_folds=True,
        question="Segmenting defects (mask AP)",
    ),
    Metric(
        "mask_ap50", "Mask AP 50", "at a mask IoU of 0.50", "precision", formulas.precision,
        console={"masks": "{} at 0.50"}, report=1, comparison=(4, "Mask AP 50"), against=3,
        curve=("mask_pr", "mask AP 50"),
    ),
    Metric(
        "mask_ap75", "Mask AP 75", "at a mask IoU of 0.75", "precision", formulas.precision,
        console={"masks": "{} at 0.75"}, report=1, against=3,
    ),
    Metric("mask_ap_small", "Mask AP, small", "below 32 x 32 pixels", "precision", formulas.precision, report=1),
    Metric("mask_ap_medium", "Mask AP, medium", "32 x 32 to 96 x 96 pixels", "precision", formulas.precision, report=1),
    Metric("mask_ap_large", "Mask AP, large", "above 96 x 96 pixels", "precision", formulas.precision, report=1),
    Metric(
        "mask_ar", "Mask AR", "average recall of at most 100 detections an image", "precision", formulas.precision,
        report=1,
    ),
    Metric(
        "box_ap", "Box AP", "COCO, box IoU 0.50 to 0.95", "precision", formulas.precision,
        console={"boxes": "Box AP: {}"}, report=1, comparison=(4, "Box AP"), against=3, in_folds=True,
        question="Locating defects (box AP)",
    ),
    Metric(
        "box_ap50", "Box AP 50", "at a box IoU of 0.50", "precision", formulas.precision, report=1,
        comparison=(4, "Box AP 50"), against=3,
    ),
    Metric("box_ap75", "Box AP 75", "at a box IoU of 0.75", "precision", formulas.precision, report=1, against=3),
    Metric("box_ap_small", "Box AP, small", "below 32 x 32 pixels", "precision", formulas.precision),
    Metric("box_ap_medium", "Box AP, medium", "32 x 32 to 96 x 96 pixels", "precision", formulas.precision),
    Metric("box_ap_large", "Box AP, large", "above 96 x 96 pixels", "precision", formulas.precision),
    Metric(
        "box_ar", "Box AR", "average recall of at most 100 detections an image", "precision", formulas.precision,
        report=1,
    ),
    Metric(
        "mean_mask_iou", "Mean mask IoU", "how well each true defect is covered", "overlap", formulas.mask_iou,
        console={"boxes": "mean mask IoU: {}"}, report=1, against=2,
    ),
    Metric(
        "pixel_auroc", "Pixel AUROC", "chance that a defect pixel scores above a good one", "pixels", formulas.pixels,
        console={"pixels": "AUROC {}"}, report=1, in_folds=True, curve=("pixel_roc", "AUROC"),
    ),
    Metric(
        "pixel_aupro", "AUPRO", "overlap per region, false-positive rate up to 0.3", "pixels", formulas.pixels,
        console={"pixels": "AUPRO {}"}, report=2, comparison=(4, "Pixel AUPRO"), in_folds=True,
        curve=("pro", "AUPRO"),
    ),
    Metric(
        "pixel_ap", "Pixel AP", "precision over all recalls", "pixels", formulas.pixels, console={"pixels": "AP {}"},
        report=1, curve=("pixel_pr", "AP"),
    ),
    Metric(
        "pixel_aupro_05", "AUPRO 0.05", "the same, false-positive rate up to 0.05", "pixels", formulas.pixels,
        report=2, curve=("pro", "up to 0.05"),
    ),
    Metric(
        "pixel_iou", "Pixel IoU", "defect area, predicted against true", "pixels", formulas.pixels,
        console={"pixels": "IoU {}"}, report=2,
    ),
    Metric(
        "pixel_dice", "Pixel Dice", "the same, as F1 over pixels", "pixels", formulas.pixels,
        console={"pixels": "Dice {}"}, report=2,
    ),
    Metric(
        "pixel_f1_max", "Best pixel F1", "at the threshold that suits these very pixels best", "pixels",
        formulas.pixels, report=2,
    ),
    Metric(
        "pixel_f1_max_threshold", "Threshold of the best pixel F1", "fitted to these very pixels", "pixels",
        formulas.pixels, shown="decimal", has_interval=False,
    ),
    # Last, because `intervals` has it last.
    Metric(
        "false_alarm_rate", "False-alarm rate", "good parts that are rejected", "verdicts",
        formulas.false_alarm_rate, lower_is_better=True, formula=proportion(["fp_defect"], ["fp_defect", "tn_good"]),
        console={"intervals": "false alarms {}"}, report=5, comparison=(3, "False-alarm rate"),
    ),
    *(
        Metric(
            key, label, "", "verdicts", formulas.verdict_counts, lower_is_better=key in ("fp_defect", "fn_defect"),
            shown="count", has_interval=False,
        )
        for key, label in {
            "tp_defect": "Defects found",
            "fp_defect": "Good parts rejected",
            "tn_good": "Good parts passed",
            "fn_defect": "Defects missed",
            "total_images": "Images",
        }.items()
    ),
)  # fmt: skip

METRICS: dict[str, Metric] = {one.key: one for one in _ENTRIES}
"""All metrics by key, in the order in which they are shown unless a place says otherwise."""


def placed(place: Callable[[Metric], int | None]) -> list[Metric]:
    """Return the metrics for which `place` returns a number, in the order of these numbers."""
    places = [(at, one) for one in METRICS.values() if (at := place(one)) is not None]
    return [one for _, one in sorted(places, key=lambda pair: pair[0])]


def values(metrics: Iterable[Metric], evidence: "Evidence", weights: Floats | None = None) -> dict[str, Floats]:
    """Return the values of metrics by key.

    Args:
        metrics: the metrics to compute.
        evidence: the evidence of N images.
        weights: (B, N), how often each image counts in each of B samples; without it, each image counts once.

    Returns:
        (B,) for each metric, or (1,) without weights; NaN where it is undefined. A metric whose data the evidence lacks
        is missing.
    """
    functions: dict[Any, set[str]] = {}
    for one in metrics:
        functions.setdefault(one.compute, set()).add(one.key)
    return {
        key: value
        for compute, keys in functions.items()
        for key, value in compute(evidence, weights).items()
        if key in keys
    }
