"""Match predicted defects with true defects one by one, and classify the errors."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as rle_tools

from flawmask.coco import CocoSplit, Record, instance_rles
from flawmask.prediction import Instance, Prediction

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

MATCH_IOU = 0.5
"""A prediction matches a defect where the IoU of their masks, or of their boxes without masks, is at least this."""

NEAR_IOU = 0.1
"""Below this IoU, a prediction counts as unrelated to a defect (Bolya et al., "TIDE", ECCV 2020)."""


@dataclass(frozen=True)
class InstanceErrors:
    """The missed and the spurious defects at the verdict's threshold.

    Attributes:
        best_ious: for each image, the IoU of each true defect with the prediction that covers it best, 0 to 1.
        missed: the true defects without a matching prediction: `file`, `annotation_id`, `bbox`, `area`, `best_iou`.
        spurious: the predictions without a matching defect, the highest score first: `file`, `label`, `score`, `bbox`,
            `area`, `iou` with the nearest defect, and `kind`. The kind is `duplicate` (a prediction with a higher score
            matches the defect), `classification` (right place, wrong class), `localisation` (the overlap is too small)
            or `background` (there is no defect).
        truths: the number of true defects.
        found: the number of predictions.
    """

    best_ious: tuple[Floats, ...]
    missed: list[Record]
    spurious: list[Record]
    truths: int
    found: int

    @property
    def counts(self) -> dict[str, int]:
        """The number of errors of each kind, including `missed`."""
        kinds = ("localisation", "classification", "duplicate", "background")
        return {kind: sum(one["kind"] == kind for one in self.spurious) for kind in kinds} | {
            "missed": len(self.missed)
        }

    @cached_property
    def _sums(self) -> tuple[Floats, Floats]:
        """The sum of each image's `best_ious`, (N,), and their number, (N,)."""
        sums, counts = np.array([[ious.sum(), len(ious)] for ious in self.best_ious]).reshape(-1, 2).T
        return sums, counts

    @property
    def mean_iou(self) -> float | None:
        """The mean of `best_ious`, 0 to 1; None where there is no true defect."""
        return float(np.concatenate(self.best_ious).mean()) if self.truths else None

    def resampled_iou(self, weights: Floats) -> Floats:
        """Return `mean_iou` for weighted images, (B, N) to (B,); NaN where there is no true defect."""
        sums, counts = self._sums
        total = weights @ counts
        return np.asarray(np.divide(weights @ sums, total, out=np.full(len(weights), np.nan), where=total > 0))


def instance_errors(split: CocoSplit, predictions: Sequence[Prediction], conf: float, min_area: int) -> InstanceErrors:
    """Match predictions with true defects. The prediction with the highest score chooses first; each takes the
    unmatched defect with the highest IoU.

    The kinds of errors are those of Bolya et al., "TIDE: a general toolbox for identifying object detection errors",
    ECCV 2020, on masks, or on boxes where the network predicts no masks.

    Args:
        split: the truth. A crowd is no defect to match, and a prediction inside a crowd is no error.
        predictions: one per image of the split.
        conf: predictions below this score do not count.
        min_area: predictions with fewer pixels do not count.
    """
    best, missed, spurious, truths, found = [], [], [], 0, 0
    names = {category["id"]: category["name"] for category in split.categories}
    for image, prediction in zip(split.images, predictions, strict=True):
        records = split.defects(image)
        rles = instance_rles(records, prediction.height, prediction.width, image["file_name"])
        instances = prediction.defects(conf, min_area)
        crowd = np.array([bool(one.get("iscrowd")) for one in records], dtype=bool)
        if prediction.has_masks:
            ious = _ious([one.rle for one in instances], rles, crowd)
        else:
            ious = _ious([one.xywh for one in instances], [one["bbox"] for one in records], crowd)
        labels = [names[one["category_id"]] for one in records]
        free = ~crowd
        for instance, row in zip(instances, ious, strict=True):
            same = np.array([label == instance.label for label in labels], dtype=bool)
            candidates = np.where(free & same, row, -1.0)
            if candidates.size and candidates.max() >= MATCH_IOU:
                free[candidates.argmax()] = False
            elif not (crowd & (row >= MATCH_IOU)).any():
                kind = _kind(np.where(crowd, 0.0, row), same)
                nearest = float(row[~crowd].max(initial=0.0))
                spurious.append({"file": image["file_name"], **_described(instance), "iou": nearest, "kind": kind})
        covered = ious[:, ~crowd].max(axis=0, initial=0.0)
        best.append(covered)
        for at in np.flatnonzero(free):
            missed.append(_missed(image, records[at], rles[at], float(ious[:, at].max(initial=0.0))))
        truths, found = truths + int((~crowd).sum()), found + len(instances)
    spurious.sort(key=lambda one: -float(one["score"]))
    return InstanceErrors(tuple(best), missed, spurious, truths, found)


def _ious(found: Sequence[Any], truth: Sequence[Any], crowd: Flags) -> Floats:
    """Return the IoU of each prediction with each true defect. With a crowd, it is the share of the prediction inside.

    All are given as RLE, or all as COCO's boxes.
    """
    if not found or not truth:
        return np.zeros((len(found), len(truth)))
    return np.asarray(rle_tools.iou(list(found), list(truth), crowd.tolist()), dtype=np.float64)


def _kind(ious: Floats, same: Flags) -> str:
    """Return the kind of error of a prediction that matches no defect."""
    if (ious[same] >= MATCH_IOU).any():
        return "duplicate"
    if (ious >= MATCH_IOU).any():
        return "classification"
    return "localisation" if (ious >= NEAR_IOU).any() else "background"


def _described(instance: Instance) -> Record:
    return {"label": instance.label, "score": instance.score, "bbox": instance.xywh, "area": instance.area}


def _missed(image: Record, record: Record, rle: Record, best_iou: float) -> Record:
    return {
        "file": image["file_name"],
        "annotation_id": record["id"],
        "bbox": list(record["bbox"]),
        "area": int(rle_tools.area(rle)),
        "best_iou": best_iou,
    }
