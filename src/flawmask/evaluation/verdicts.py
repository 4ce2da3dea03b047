"""Image-level metrics: how often the verdict, good or defect, is right."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flawmask.evaluation import by_group
from flawmask.evaluation.uncertainty import Groups, wilson
from flawmask.good_names import GOOD

COMPOSITE_WEIGHTS = {"accuracy": 0.3, "precision": 0.2, "recall": 0.3, "f1_score": 0.2}
"""The weights of the composite score."""


@dataclass(frozen=True)
class EvaluatedImage:
    """The truth and the verdict of an image.

    Attributes:
        file_name: its name in the data set.
        defect_type: `good` or the type of the defect. Where the data set names no type, it is the class of the largest
            defect.
        truth: whether the image has a defect.
        verdict: whether it was rejected.
        score: the highest score of a predicted defect; 0 where there is none.
        group: the name of the group of images that show the same part; None where groups are unknown.
        defect_probability: the calibrated score; None without a calibration.
    """

    file_name: str
    defect_type: str
    truth: bool
    verdict: bool
    score: float
    group: str | None = None
    defect_probability: float | None = None

    @property
    def outcome(self) -> str:
        """`missed`, `false_alarm` or `right`."""
        if self.truth == self.verdict:
            return "right"
        return "missed" if self.truth else "false_alarm"


def ratio(part: float, whole: float) -> float | None:
    """Return part / whole; None where `whole` is 0."""
    return part / whole if whole else None


def rates(tp: float, fp: float, fn: float, tn: float) -> dict[str, float | None]:
    """Return the image-level ratios of a confusion matrix, with defect as the positive class.

    Keys: accuracy, precision, recall, f1_score, defect_detection_rate (another name of the recall) and composite_score
    = 0.3 accuracy + 0.2 precision + 0.3 recall + 0.2 F1. Values lie between 0 and 1; undefined ones are None.
    """
    figures = {
        "accuracy": ratio(tp + tn, tp + fp + fn + tn),
        "precision": ratio(tp, tp + fp),
        "recall": ratio(tp, tp + fn),
        "f1_score": ratio(2 * tp, 2 * tp + fp + fn),
    }
    parts = [(weight, figures[name]) for name, weight in COMPOSITE_WEIGHTS.items()]
    defined = [weight * value for weight, value in parts if value is not None]
    composite = sum(defined) if len(defined) == len(parts) else None
    return {**figures, "defect_detection_rate": figures["recall"], "composite_score": composite}


def recall_by_type(evaluated: Sequence[EvaluatedImage]) -> dict[str, dict[str, Any]]:
    """Return the recall of each defect type, by its name, in the form of `metrics.json`.

    Each has the keys `images`, the number of images; `found`, the number of rejected ones; `recall`, 0 to 1;
    `interval`, its 95 % interval (Wilson, JASA 1927); and, where groups are known, `groups`, their number.
    """
    defective = [one for one in evaluated if one.truth and one.defect_type != GOOD]
    table = {}
    for name in sorted({one.defect_type for one in defective}):
        of_type = [one for one in defective if one.defect_type == name]
        images, found = len(of_type), sum(one.verdict for one in of_type)
        row = {"images": images, "found": found, "recall": ratio(found, images), "interval": wilson(found, images)}
        groups = groups_of(of_type)
        if groups is not None:
            verdicts = np.array([[one.verdict, True] for one in of_type], dtype=np.float64)
            part, whole = (np.bincount(groups, column).astype(np.float64) for column in verdicts.T)
            row |= {"interval": by_group.wilson(part, whole, whole > 0), "groups": len(whole)}
        table[name] = row
    return table


def groups_of(evaluated: Sequence[EvaluatedImage]) -> Groups | None:
    """Return the number of each image's group, (N,); None where groups are unknown."""
    names = [one.group for one in evaluated if one.group is not None]
    return by_group.numbered(names) if names else None
