"""Instance-level metrics: COCO's average precision and recall."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from operator import itemgetter
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

MAX_DETECTIONS = 100
"""The detections of a class on an image that COCO's evaluator counts."""

CHUNK = 10_000
"""Images whose matches are computed at once, to limit memory."""

RECALLS = np.linspace(0, 1, 101)
"""The recalls at which COCO reads the precision."""


@dataclass(frozen=True)
class Matches:
    """The matches of COCO's evaluator for the D detections of one class, at its ten IoU thresholds.

    Attributes:
        image: (D,) the position of each detection's image in the split; the highest score comes first.
        image_id: (D,) the id of that image.
        scores: (D,) the score of each detection.
        tp: (10, D) whether the detection is a true positive.
        fp: (10, D) whether it is a false positive. A detection that is neither does not count; it lies in a crowd, say.
        truths: (N,) the number of true defects on each image of the split.
    """

    image: npt.NDArray[np.int64]
    image_id: npt.NDArray[np.int64]
    scores: Floats
    tp: Flags
    fp: Flags
    truths: Floats

    @cached_property
    def places(self) -> tuple[list[npt.NDArray[np.int64]], Flags, npt.NDArray[np.int64]]:
        """Where the true positives are at each IoU threshold; which detections count, in a row for each way in which
        they do (without crowds, one); and the row of each threshold."""
        counting, which = np.unique(self.tp | self.fp, axis=0, return_inverse=True)
        return [np.flatnonzero(one) for one in self.tp], counting, which


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

    The precision at a recall is the highest precision at that recall or above. It is always that of a true positive.
    """
    places, counting, which = matches.places
    ap = np.full((len(weights), len(matches.tp)), np.nan)
    for sample, row in enumerate(weights):
        truths = float(row @ matches.truths)
        if truths == 0:
            continue
        counts = row[matches.image]
        counted = [np.cumsum(counts * one) for one in counting]
        for threshold, (hits, row_of) in enumerate(zip(places, which, strict=True)):
            tp = np.cumsum(counts[hits])
            precision = tp / (counted[row_of][hits] + np.spacing(1))
            envelope = np.maximum.accumulate(precision[::-1])[::-1]
            read = np.searchsorted(tp / truths, RECALLS)
            ap[sample, threshold] = envelope[read[read < len(envelope)]].sum() / len(RECALLS)
    return ap


def coco_results(split: CocoSplit, predictions: Iterable[Prediction]) -> Iterator[Record]:
    """Yield the predictions, one per image of the split, in COCO's results format.

    See https://cocodataset.org/#format-results. There is no `segmentation` where the network predicts no masks.
    """
    ids = {category["name"]: category["id"] for category in split.categories}
    pairs = zip(split.images, predictions, strict=True)
    return (record for image, prediction in pairs for record in prediction.to_coco(image["id"], ids))


def evaluate_instances(
    split: CocoSplit, predictions: Sequence[Prediction], *, has_masks: bool = True
) -> dict[str, Evaluation] | None:
    """Return COCO's evaluation of `mask` and `box`; None where the split has no true defect.

    At most 100 detections per image count (https://cocodataset.org/#detection-eval). The class `good` does not count.

    Args:
        split: the truth.
        predictions: one per image of the split.
        has_masks: whether they have masks; if not, only boxes are evaluated.
    """
    if not any(split.is_defective(image) for image in split.images):
        return None
    classes = [category for category in split.categories if category["id"] in split.defect_ids]
    kinds = {"mask": "segm", "box": "bbox"} if has_masks else {"box": "bbox"}
    streams = {name: hotcoco.StreamingEval(classes, iou_type=kind) for name, kind in kinds.items()}
    matches: dict[str, list[list[Matches]]] = {name: [] for name in kinds}
    for first in range(0, len(split.images), CHUNK):
        part = replace(split, images=split.images[first : first + CHUNK])
        truth = {"images": list(part.images), "annotations": _annotations(part), "categories": classes}
        found = coco_results(part, predictions[first : first + CHUNK])
        defects = [record for record in found if record["category_id"] in split.defect_ids]
        for name, kind in kinds.items():
            streams[name].update(truth["images"], truth["annotations"], defects)
            matches[name].append(_match(truth, defects, kind, first))
    return {name: _accumulated(stream, matches[name]) for name, stream in streams.items()}


def _accumulated(stream: hotcoco.StreamingEval, matches: Sequence[Sequence[Matches]]) -> Evaluation:
    """Return the evaluation of all images. `matches` has those of each class, for one chunk of images after another."""
    evaluator = stream.finalize()
    evaluator.accumulate()
    figures: Any = evaluator.eval
    joined = tuple(_joined(of_class) for of_class in zip(*matches, strict=True))
    return Evaluation(np.asarray(figures["precision"])[..., -1], np.asarray(figures["recall"])[..., -1], joined)


def _match(truth: Record, defects: list[Record], kind: str, first: int) -> list[Matches]:
    """Return the matches of each class in a chunk of images, whose place in the split begins at `first`.

    A `StreamingEval` keeps matches to itself, so they are made once more, for all areas together. On images without a
    true defect, all detections are false positives, so these need no evaluator.
    """
    places = {image["id"]: at for at, image in enumerate(truth["images"])}
    defective = {one["image_id"] for one in truth["annotations"]}
    images = [image for image in truth["images"] if image["id"] in defective]
    coco = hotcoco.COCO({**truth, "images": images})
    evaluator = hotcoco.COCOeval(coco, coco.loadRes([one for one in defects if one["image_id"] in defective]), kind)
    evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
    evaluator.evaluate()
    entries = [one for one in evaluator.evalImgs if one]
    by_image = groupby((one for one in defects if one["image_id"] not in defective), itemgetter("image_id"))
    on_good = [(number, list(of_image)) for number, of_image in by_image]
    return [
        _matches(
            [one for one in entries if one["category_id"] == category["id"]],
            [(number, _scores(of_image, category["id"])) for number, of_image in on_good],
            places,
            first,
        )
        for category in truth["categories"]
    ]


def _scores(records: Sequence[Record], category_id: int) -> list[float]:
    """Return the scores that COCO's evaluator counts of an image's detections of a class, the highest first."""
    return sorted((one["score"] for one in records if one["category_id"] == category_id), reverse=True)[:MAX_DETECTIONS]


def _matches(
    of_class: Sequence[Any], on_good: Sequence[tuple[int, list[float]]], places: dict[int, int], first: int
) -> Matches:
    """Return the matches of a class.

    Args:
        of_class: the evaluator's entries for images with a true defect.
        on_good: the ids of the other images, each with the scores of its detections.
        places: the place of each image id in the chunk.
        first: the place of the chunk in the split.
    """
    truths = np.zeros(len(places))
    for one in of_class:
        truths[places[one["image_id"]]] = len(one["gtIgnore"]) - sum(one["gtIgnore"])
    found = [(one["image_id"], one["dtScores"]) for one in of_class if one["dtScores"]]
    empty = np.zeros((10, 0), dtype=bool)
    matched, ignored = (
        np.concatenate([empty, *(np.asarray(one[key], dtype=bool) for one in of_class if one["dtScores"])], axis=1)
        for key in ("dtMatched", "dtIgnore")
    )
    others = np.zeros((10, sum(len(scores) for _, scores in on_good)), dtype=bool)
    everything = [*found, *on_good]
    image_id = np.repeat([number for number, _ in everything], [len(scores) for _, scores in everything])
    return Matches(
        image=np.array([first + places[number] for number in image_id.tolist()], dtype=np.int64),
        image_id=image_id.astype(np.int64),
        scores=np.array([score for _, scores in everything for score in scores], dtype=np.float64),
        tp=np.concatenate([matched & ~ignored, others], axis=1),
        fp=np.concatenate([~matched & ~ignored, ~others], axis=1),
        truths=truths,
    )


def _joined(parts: Sequence[Matches]) -> Matches:
    """Return the matches of all images, the highest score first. Equal scores are in the order of image ids."""
    image, image_id, scores, truths = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("image", "image_id", "scores", "truths")
    )
    order = np.lexsort((image_id, -scores))
    tp, fp = (np.concatenate([getattr(part, name) for part in parts], axis=1)[:, order] for name in ("tp", "fp"))
    return Matches(image[order], image_id[order], scores[order], tp, fp, truths)


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


def _annotations(split: CocoSplit) -> list[Record]:
    """Return the true defects of the split, with optional keys filled in."""
    annotations = []
    for image in split.images:
        defects = split.defects(image)
        shape = image["height"], image["width"]
        for record, rle in zip(defects, instance_rles(defects, *shape, image["file_name"]), strict=True):
            annotations.append({"area": int(rle_tools.area(rle)), "iscrowd": 0, **record, "segmentation": rle})
    return annotations
