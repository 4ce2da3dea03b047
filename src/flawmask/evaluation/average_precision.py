"""Instance-level metrics: COCO's average precision and recall."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import hotcoco
import numpy as np
import numpy.typing as npt
from pycocotools import mask as rle_tools

from flawmask.coco import CocoSplit, Record, instance_rles
from flawmask.prediction import Prediction

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

AREAS = ("", "_small", "_medium", "_large")
"""COCO's ranges of an instance's area: all, below 32 x 32 pixels, below 96 x 96, and above."""

RECALLS = np.linspace(0, 1, 101)
"""The recalls at which COCO reads the precision."""


@dataclass(frozen=True)
class Matches:
    """The matches of COCO's evaluator for the D detections of one class, at its ten IoU thresholds.

    Attributes:
        image: (D,) the position of each detection's image in the split; the highest score comes first.
        tp: (10, D) whether the detection is a true positive.
        fp: (10, D) whether it is a false positive. A detection that is neither does not count; it lies in a crowd, say.
        truths: (N,) the number of true defects on each image of the split.
    """

    image: npt.NDArray[np.int64]
    tp: Flags
    fp: Flags
    truths: Floats


@dataclass(frozen=True)
class Evaluation:
    """COCO's evaluation of masks or of boxes. Where there is no true defect, its values are -1.

    Attributes:
        precision: (10, 101, K, 4) at each IoU threshold, recall, defect class and range of areas.
        recall: (10, K, 4) the highest recall with 100 detections per image.
        matches: the matches behind both, one entry for each defect class.
    """

    precision: Floats
    recall: Floats
    matches: tuple[Matches, ...]

    def resampled(self, weights: Floats) -> dict[str, Floats]:
        """Return `ap`, `ap50` and `ap75` for weighted images, (B, N) to (B,) each; NaN where there is no true defect.

        The matches stay the same: an image with weight 2 counts its matches twice.
        """
        by_class = np.stack([_accumulate(one, weights) for one in self.matches])  # (K, B, 10)
        known = ~np.isnan(by_class)
        count = known.sum(axis=0)
        mean = np.divide(np.nansum(by_class, axis=0), count, out=np.full(count.shape, np.nan), where=count > 0)
        return {"ap": mean.mean(axis=1), "ap50": mean[:, 0], "ap75": mean[:, 5]}


def _accumulate(matches: Matches, weights: Floats) -> Floats:
    """Return the average precision at each IoU threshold, (B, 10), from the precision at 101 recalls.

    The precision at a recall is the highest precision at that recall or above.
    """
    ap = np.full((len(weights), len(matches.tp)), np.nan)
    for sample, row in enumerate(weights):
        truths = float(row @ matches.truths)
        if truths == 0:
            continue
        counts = row[matches.image]
        tp, fp = np.cumsum(counts * matches.tp, axis=1), np.cumsum(counts * matches.fp, axis=1)
        precision = tp / (tp + fp + np.spacing(1))
        falling = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        for threshold, (recall, envelope) in enumerate(zip(tp / truths, falling, strict=True)):
            read = np.searchsorted(recall, RECALLS)
            ap[sample, threshold] = envelope[read[read < len(envelope)]].sum() / len(RECALLS)
    return ap


def coco_results(split: CocoSplit, predictions: Sequence[Prediction]) -> list[Record]:
    """Return the predictions, one per image of the split, in COCO's results format.

    See https://cocodataset.org/#format-results. There is no `segmentation` where the network predicts no masks.
    """
    ids = {category["name"]: category["id"] for category in split.categories}
    pairs = zip(split.images, predictions, strict=True)
    return [record for image, prediction in pairs for record in prediction.to_coco(image["id"], ids)]


def evaluate_instances(
    split: CocoSplit, results: Sequence[Record], *, has_masks: bool = True
) -> dict[str, Evaluation] | None:
    """Return COCO's evaluation of `mask` and `box`; None where the split has no true defect.

    At most 100 detections per image count (https://cocodataset.org/#detection-eval). The class `good` does not count.

    Args:
        split: the truth.
        results: detections in the form that `coco_results` returns.
        has_masks: whether they have masks; if not, only boxes are evaluated.
    """
    truth = _truth(split)
    if not truth["annotations"]:
        return None
    defects = [record for record in results if record["category_id"] in split.defect_ids]
    kinds = {"mask": "segm", "box": "bbox"} if has_masks else {"box": "bbox"}
    return {name: _evaluate(split, truth, defects, kind) for name, kind in kinds.items()}


def _evaluate(split: CocoSplit, truth: Record, defects: list[Record], kind: str) -> Evaluation:
    coco = hotcoco.COCO(truth)
    evaluator = hotcoco.COCOeval(coco, coco.loadRes(defects), kind)
    evaluator.evaluate()
    evaluator.accumulate()
    figures: Any = evaluator.eval
    # Passing the matches to Python takes time, so this is done once, for all areas together.
    evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
    evaluator.evaluate()
    images = sorted((one for one in evaluator.evalImgs if one), key=lambda one: int(one["image_id"]))
    matches = tuple(
        _matches(split, [one for one in images if one["category_id"] == category["id"]])
        for category in truth["categories"]
    )
    return Evaluation(np.asarray(figures["precision"])[..., -1], np.asarray(figures["recall"])[..., -1], matches)


def _matches(split: CocoSplit, of_class: Sequence[Any]) -> Matches:
    """Return the matches from the evaluator's entries, which are in the order of image ids, for one class."""
    place = {image["id"]: at for at, image in enumerate(split.images)}
    truths = np.zeros(len(split.images))
    for one in of_class:
        truths[place[one["image_id"]]] = len(one["gtIgnore"]) - sum(one["gtIgnore"])
    with_detections = [one for one in of_class if one["dtScores"]]
    if not with_detections:
        empty = np.zeros((10, 0), dtype=bool)
        return Matches(np.zeros(0, dtype=np.int64), empty, empty, truths)
    order = np.argsort([-score for one in with_detections for score in one["dtScores"]], kind="stable")
    image = np.concatenate([[place[one["image_id"]]] * len(one["dtScores"]) for one in with_detections])
    matched = np.concatenate([np.asarray(one["dtMatched"], dtype=bool) for one in with_detections], axis=1)
    ignored = np.concatenate([np.asarray(one["dtIgnore"], dtype=bool) for one in with_detections], axis=1)
    return Matches(image[order], (matched & ~ignored)[:, order], (~matched & ~ignored)[:, order], truths)


def average_precision(split: CocoSplit, evaluations: dict[str, Evaluation] | None) -> dict[str, Any]:
    """Return COCO's metrics (https://cocodataset.org/#detection-eval), 0 to 1.

    They are means over the defect classes that have true defects. They are None where no class has any, and for masks
    where the network predicts none.

    Keys, for masks and likewise for boxes: `mask_ap`, `mask_ap50`, `mask_ap75` (average precision at an IoU of
    0.50:0.95, 0.50 and 0.75), `mask_ar` (average recall at 100 detections per image); `mask_ap_small`, `mask_ap_medium`
    and `mask_ap_large` (by area); and `ap_by_class`, the first four for each defect class.
    """
    names = [category["name"] for category in split.categories if category["id"] in split.defect_ids]
    figures: dict[str, Any] = {}
    by_class: dict[str, dict[str, float | None]] = {name: {} for name in names}
    for kind in ("mask", "box"):
        evaluation = evaluations.get(kind) if evaluations else None
        precision = evaluation.precision if evaluation else np.full((10, 101, len(names), 4), -1.0)
        recall = evaluation.recall if evaluation else np.full((10, len(names), 4), -1.0)
        figures |= _headline(kind, precision, recall)
        figures |= {f"{kind}_ap{area}": _mean(precision[..., at]) for at, area in enumerate(AREAS)}
        for at, name in enumerate(names):
            by_class[name] |= _headline(kind, precision[:, :, [at]], recall[:, [at]])
    return {**figures, "ap_by_class": by_class}


def _headline(kind: str, precision: Floats, recall: Floats) -> dict[str, float | None]:
    return {
        f"{kind}_ap": _mean(precision[..., 0]),
        f"{kind}_ap50": _mean(precision[:1, ..., 0]),
        f"{kind}_ap75": _mean(precision[5:6, ..., 0]),
        f"{kind}_ar": _mean(recall[..., 0]),
    }


def _mean(figures: Floats) -> float | None:
    """Return the mean of the defined values: COCO writes -1 for a class without true defects."""
    return float(figures[figures > -1].mean()) if (figures > -1).any() else None


def mask_precision_curve(evaluations: dict[str, Evaluation] | None) -> dict[str, list[float]] | None:
    """Return recall (x) and precision (y), 0 to 1, at a mask IoU of 0.5, as the mean over defect classes.

    The result is None without true defects or without masks.
    """
    if evaluations is None or "mask" not in evaluations:
        return None
    precision = evaluations["mask"].precision[0, :, :, 0]
    known = precision[:, (precision > -1).all(axis=0)]
    return {"x": RECALLS.tolist(), "y": known.mean(axis=1).tolist()} if known.size else None


def _truth(split: CocoSplit) -> Record:
    """Return the true defects of the split as a COCO data set, with optional keys filled in."""
    annotations = []
    for image in split.images:
        defects = split.defects(image)
        shape = image["height"], image["width"]
        for record, rle in zip(defects, instance_rles(defects, *shape, image["file_name"]), strict=True):
            filled = {"area": int(rle_tools.area(rle)), "iscrowd": 0, **record, "segmentation": rle}
            annotations.append(filled)
    categories = [category for category in split.categories if category["id"] in split.defect_ids]
    return {"images": list(split.images), "annotations": annotations, "categories": categories}
