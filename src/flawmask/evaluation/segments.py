"""Instance-level figures: COCO average precision of masks and boxes, and how well masks cover the truth."""

from collections.abc import Sequence
from typing import Any

import hotcoco
import numpy as np
from pycocotools import mask as rle_tools

from flawmask.coco import CocoSplit, Record, instance_masks
from flawmask.inference.predictor import Instance, Prediction
from flawmask.masks import to_rle


def coco_results(split: CocoSplit, predictions: Sequence[Prediction]) -> list[Record]:
    """Return the predictions, one per image of the split, in COCO's results format."""
    ids = {category["name"]: category["id"] for category in split.categories}
    return [
        {
            "image_id": image["id"],
            "category_id": ids[instance.label],
            "bbox": _xywh(instance),
            "score": instance.score,
            "segmentation": instance.rle,
        }
        for image, prediction in zip(split.images, predictions, strict=True)
        for instance in prediction.instances
    ]


def _xywh(instance: Instance) -> list[float]:
    x1, y1, x2, y2 = instance.box
    return [x1, y1, x2 - x1, y2 - y1]


def average_precision(split: CocoSplit, results: Sequence[Record]) -> dict[str, float | None]:
    """Return COCO's average precision, averaged over the defect classes; None where there is no truth to find.

    Keys: mask_ap, mask_ap50, mask_ap75, box_ap, box_ap50, box_ap75: at an IoU of 0.50:0.95, 0.50 and 0.75, of all
    areas, at most 100 detections an image (https://cocodataset.org/#detection-eval). The class `good` takes no part.

    Args:
        split: the truth.
        results: detections as `coco_results` gives them.
    """
    truth = _truth(split)
    found = [record for record in results if record["category_id"] in split.defect_ids]
    figures: dict[str, float | None] = {}
    for name, kind in (("mask", "segm"), ("box", "bbox")):
        precision = _precision(truth, found, kind) if truth["annotations"] else None
        figures[f"{name}_ap"] = _mean(precision)
        figures[f"{name}_ap50"] = _mean(None if precision is None else precision[:1])
        figures[f"{name}_ap75"] = _mean(None if precision is None else precision[5:6])
    return figures


def _truth(split: CocoSplit) -> Record:
    """Return the defects of the split as a COCO data set; what a record may lack is filled in."""
    annotations = []
    for image in split.images:
        defects = split.defects(image)
        shape = image["height"], image["width"]
        for record, mask in zip(defects, instance_masks(defects, *shape, image["file_name"]), strict=True):
            area = record.get("area", int(mask.sum()))
            annotations.append(
                {**record, "area": area, "iscrowd": record.get("iscrowd", 0), "segmentation": to_rle(mask)}
            )
    categories = [category for category in split.categories if category["id"] in split.defect_ids]
    return {"images": list(split.images), "annotations": annotations, "categories": categories}


def _precision(truth: Record, found: list[Record], kind: str) -> np.ndarray:
    """Return the precision at each IoU threshold, recall step and class, for all areas: (10, 101, K)."""
    coco = hotcoco.COCO(truth)
    evaluator = hotcoco.COCOeval(coco, coco.loadRes(found), kind)
    evaluator.evaluate()
    evaluator.accumulate()
    figures: Any = evaluator.eval
    return np.asarray(figures["precision"])[:, :, :, 0, -1]


def _mean(precision: np.ndarray | None) -> float | None:
    """Return the mean over what has truth: COCO marks a class without any by -1."""
    if precision is None or not (precision > -1).any():
        return None
    return float(precision[precision > -1].mean())


def mean_mask_iou(split: CocoSplit, predictions: Sequence[Prediction], conf: float, min_area: int) -> float | None:
    """Return how well defects are covered: for each true defect instance the IoU of the predicted defect mask that
    covers it best, 0 where none does, averaged over all of them; None where there is no true defect.

    Args:
        split: the truth.
        predictions: one per image of the split.
        conf: predictions below this score do not count.
        min_area: predictions of fewer pixels do not count.
    """
    best: list[float] = []
    for image, prediction in zip(split.images, predictions, strict=True):
        defects = split.defects(image)
        truth = [
            to_rle(mask) for mask in instance_masks(defects, prediction.height, prediction.width, image["file_name"])
        ]
        found = [instance.rle for instance in prediction.defects(conf, min_area)]
        ious = rle_tools.iou(found, truth, [0] * len(truth)) if found and truth else np.zeros((1, len(truth)))
        best += np.asarray(ious).max(axis=0).tolist()
    return float(np.mean(best)) if best else None
