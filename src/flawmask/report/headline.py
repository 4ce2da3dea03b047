"""The figures that the report and the comparison lead with: their names, what they say, and how they are written."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NBSP, DASH = "\u00a0", "\u2013"
NOT_THERE = "n/a"


@dataclass(frozen=True)
class Figure:
    """One figure of `metrics.json`, a fraction from 0 to 1.

    Attributes:
        key: its key there; `a.b` is key `b` of the object under `a`.
        name: what it is called.
        meaning: what it says, in a few words.
        lower_is_better: whether a small value is a good one.
    """

    key: str
    name: str
    meaning: str
    lower_is_better: bool = False


GROUPS: dict[str, tuple[Figure, ...]] = {
    "Images: good or defect": (
        Figure("recall", "Recall", "defective parts that are found"),
        Figure("precision", "Precision", "rejected parts that are defective"),
        Figure("f1_score", "F1", "harmonic mean of recall and precision"),
        Figure("accuracy", "Accuracy", "verdicts that are right"),
        Figure("false_alarm_rate", "False-alarm rate", "good parts that are rejected", lower_is_better=True),
        Figure("image_auroc", "AUROC", "chance that a defective part scores above a good one"),
        Figure("image_ap", "Average precision", "precision over all recalls, whatever the threshold"),
        Figure("image_f1_max", "Best F1", "at the threshold that suits these very images best"),
        Figure("false_alarms_at_recall.100", "False alarms at 100 % recall", "if every defect must be found", True),
        Figure("false_alarms_at_recall.99", "False alarms at 99 % recall", "if 1 defect in 100 may slip", True),
        Figure("false_alarms_at_recall.95", "False alarms at 95 % recall", "if 5 defects in 100 may slip", True),
        Figure("ece", "Calibration error", "how far scores are from the share of defects, on average", True),
        Figure("composite_score", "Composite", "0.3 accuracy + 0.2 precision + 0.3 recall + 0.2 F1"),
    ),
    "Instances: found one by one": (
        Figure("mask_ap", "Mask AP", "COCO, mask IoU 0.50 to 0.95"),
        Figure("mask_ap50", "Mask AP 50", "at a mask IoU of 0.50"),
        Figure("mask_ap75", "Mask AP 75", "at a mask IoU of 0.75"),
        Figure("mask_ap_small", "Mask AP, small", "below 32 x 32 pixels"),
        Figure("mask_ap_medium", "Mask AP, medium", "32 x 32 to 96 x 96 pixels"),
        Figure("mask_ap_large", "Mask AP, large", "above 96 x 96 pixels"),
        Figure("mask_ar", "Mask AR", "average recall of at most 100 detections an image"),
        Figure("box_ap", "Box AP", "COCO, box IoU 0.50 to 0.95"),
        Figure("box_ap50", "Box AP 50", "at a box IoU of 0.50"),
        Figure("box_ap75", "Box AP 75", "at a box IoU of 0.75"),
        Figure("box_ar", "Box AR", "average recall of at most 100 detections an image"),
        Figure("mean_mask_iou", "Mean mask IoU", "how well each true defect is covered"),
    ),
    "Pixels": (
        Figure("pixel_auroc", "Pixel AUROC", "chance that a defect pixel scores above a good one"),
        Figure("pixel_ap", "Pixel AP", "precision over all recalls"),
        Figure("pixel_aupro", "AUPRO", "overlap per region, false-positive rate up to 0.3"),
        Figure("pixel_aupro_05", "AUPRO 0.05", "the same, false-positive rate up to 0.05"),
        Figure("pixel_iou", "Pixel IoU", "defect area, predicted against true"),
        Figure("pixel_dice", "Pixel Dice", "the same, as F1 over pixels"),
        Figure("pixel_f1_max", "Best pixel F1", "at the threshold that suits these very pixels best"),
    ),
}
"""What is shown, in this order; a figure that the results do not have is left out."""


def lookup(metrics: Mapping[str, Any], key: str) -> tuple[bool, float | None]:
    """Return whether the results have the figure, and its value; None where it is undefined."""
    value: Any = metrics
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return False, None
        value = value[part]
    return True, value


def interval_of(metrics: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    """Return the figure's 95 % interval (low, high), or None where there is none; key `a.b` has it under `a_b`."""
    bounds = (metrics.get("intervals") or {}).get(key.replace(".", "_"))
    if not bounds or None in bounds:
        return None
    return float(bounds[0]), float(bounds[1])


def percent(value: float | None) -> str:
    """Return a fraction as `85.7 %`, or n/a."""
    return NOT_THERE if value is None else f"{_tenths(value)}{NBSP}%"


def percent_range(bounds: tuple[float, float] | None) -> str:
    """Return an interval of fractions as `75.0-92.2 %`, with a dash, or n/a."""
    return NOT_THERE if bounds is None else f"{_tenths(bounds[0])}{DASH}{_tenths(bounds[1])}{NBSP}%"


def _tenths(value: float) -> str:
    """Return a fraction as per cent with one decimal; a half goes up, as in the page's script."""
    return f"{math.floor(1000 * value + 0.5) / 10:.1f}"


def whole_percent(value: float) -> str:
    """Return a fraction as whole per cent without the sign; what is not quite 0 or 100 does not read so."""
    rounded = int(100 * value + 0.5)
    return f"{100 * value:.1f}" if rounded in (0, 100) and value not in (0, 1) else str(rounded)


def decimal(value: float | None) -> str:
    """Return a threshold or a score with two decimals, three where it needs them, or n/a."""
    if value is None:
        return NOT_THERE
    return f"{value:.2f}" if abs(value - round(value, 2)) < 5e-4 else f"{value:.3f}"
