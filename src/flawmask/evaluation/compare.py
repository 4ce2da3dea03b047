"""Two models on the same images: how far they differ, and whether that could be chance."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flawmask.coco import CocoSplit, Record
from flawmask.errors import FlawmaskError
from flawmask.evaluation.measure import gather, resampled_figures
from flawmask.evaluation.uncertainty import mcnemar, percentiles, resample
from flawmask.files import read_json
from flawmask.inference.predictor import Instance, Prediction
from flawmask.masks import decode, to_rle

COMPARED = (
    *("accuracy", "precision", "recall", "f1_score", "image_auroc", "image_ap", "mean_mask_iou"),
    *(f"{kind}_{name}" for kind in ("mask", "box") for name in ("ap", "ap50", "ap75")),
)
"""The figures that are compared."""


@dataclass(frozen=True)
class Other:
    """What another model found on the images of a split.

    Attributes:
        name: its results folder or file.
        predictions: one per image of the split.
        conf: its verdict's threshold.
    """

    name: str
    predictions: list[Prediction]
    conf: float


def read_other(against: Path, split: CocoSplit, conf: float) -> Other:
    """Return another model's predictions for a split.

    Args:
        against: a run folder, which holds `inference_<split>`; such a folder; or a file in COCO's results format.
        split: what both are judged on.
        conf: the threshold where `against` says none, as a bare file does.

    Raises:
        FlawmaskError: there are no such results, or they do not fit the split.
    """
    places = (against / f"inference_{split.folder.name}", against)
    folder = next((place for place in places if (place / "predictions.json").is_file()), None)
    if folder is not None:
        return Other(
            folder.as_posix(),
            read_predictions(folder / "predictions.json", split),
            float(read_json(folder / "metrics.json")["conf"]),
        )
    if against.is_file():
        return Other(against.as_posix(), read_predictions(against, split), conf)
    raise FlawmaskError(
        f"{against} holds no results for {split.folder.name}: judge that run with flawmask evaluate first"
    )


def read_predictions(path: Path, split: CocoSplit) -> list[Prediction]:
    """Return the predictions of a file in COCO's results format, one per image of the split.

    Raises:
        FlawmaskError: the file is damaged, or a record names an unknown image or class, has a score that is not a
            number from 0 to 1, or a mask of another size than its image.
    """
    content = read_json(path)
    if not isinstance(content, list):
        raise FlawmaskError(f"{path} is not in COCO's results format: it must hold a list")
    images = {image["id"]: image for image in split.images}
    names = {category["id"]: str(category["name"]) for category in split.categories}
    found: dict[Any, list[Instance]] = {number: [] for number in images}
    for place, item in enumerate(content):
        where = f"{path}: record {place}"
        record = item if isinstance(item, dict) else {"image_id": item}
        image_id, category_id = record.get("image_id"), record.get("category_id")
        if not isinstance(image_id, int | str) or image_id not in images:
            raise FlawmaskError(f"{where} names the image {image_id!r}, which {split.folder} does not list")
        if not isinstance(category_id, int | str) or category_id not in names:
            raise FlawmaskError(f"{where} names the class {category_id!r}, which {split.folder} does not list")
        found[image_id].append(_instance(record, names[category_id], images[image_id], where))
    return [
        Prediction(image["height"], image["width"], tuple(sorted(found[number], key=lambda one: -one.score)))
        for number, image in images.items()
    ]


def _instance(record: Record, label: str, image: Record, where: str) -> Instance:
    score, size = record.get("score"), [image["height"], image["width"]]
    if not isinstance(score, int | float) or not math.isfinite(score) or not 0 <= score <= 1:
        raise FlawmaskError(f"{where} has the score {score!r}: it must be a number from 0 to 1")
    rle = record.get("segmentation")
    if not isinstance(rle, dict) or list(rle.get("size", [])) != size:
        there = rle.get("size") if isinstance(rle, dict) else rle
        raise FlawmaskError(
            f"{where} has a mask of the size {there!r}, but its image is {size}: height, width, and RLE"
        )
    try:
        x, y, width, height = (float(value) for value in record["bbox"])
        mask = decode(rle, *size)
    except (KeyError, TypeError, ValueError) as error:
        raise FlawmaskError(f"{where} is damaged: {error}") from None
    return Instance(label, float(score), (x, y, x + width, y + height), to_rle(mask), int(mask.sum()))


def compare(
    split: CocoSplit,
    predictions: Sequence[Prediction],
    conf: float,
    other: Other,
    *,
    min_area: int,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Return how one model differs from another on the same images.

    Each resampled set of images is judged by both: images that are hard for both do not widen the intervals.

    Returns:
        `other`, its name; `figures`: for each figure that both have, `this`, `other`, `difference` and `interval`, the
        middle 95 % of the bootstrapped differences; `mcnemar`: `only_this_right`, `only_other_right` and the exact `p`.
    """
    mine = gather(split, predictions, conf, min_area)
    theirs = gather(split, other.predictions, other.conf, min_area)
    weights = np.vstack((np.ones(len(mine.judged)), resample(mine.truth, resamples, seed)))
    figures, others = resampled_figures(mine, weights), resampled_figures(theirs, weights)
    right, other_right = (np.array([one.outcome == "right" for one in each.judged]) for each in (mine, theirs))
    table = {}
    for name in COMPARED:
        if name not in figures or np.isnan(figures[name][0] - others[name][0]):
            continue
        difference = figures[name] - others[name]
        table[name] = {
            "this": float(figures[name][0]),
            "other": float(others[name][0]),
            "difference": float(difference[0]),
            "interval": percentiles(difference[1:]),
        }
    return {
        "other": other.name,
        "figures": table,
        "mcnemar": {
            "only_this_right": int((right & ~other_right).sum()),
            "only_other_right": int((other_right & ~right).sum()),
            "p": mcnemar(right, other_right),
        },
    }
