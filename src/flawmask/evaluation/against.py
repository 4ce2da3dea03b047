"""Compare two models on the same images: their differences, with intervals and a test."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle_tools

from flawmask.coco import CocoSplit, Record
from flawmask.coco_results import read_results
from flawmask.csv_tables import read_table
from flawmask.errors import FlawmaskError
from flawmask.evaluation.measure import gather
from flawmask.evaluation.metrics import placed, values
from flawmask.evaluation.uncertainty import mcnemar, percentiles, resample, widened
from flawmask.files import read_json
from flawmask.prediction import Instance, Prediction


@dataclass(frozen=True)
class Other:
    """The predictions of another model for a split.

    Attributes:
        name: its results folder or file.
        predictions: one per image of the split.
        conf: the threshold of its verdicts.
        min_area: the smallest area, in pixels, of a defect that counts.
        notes: the notes of its own evaluation.
    """

    name: str
    predictions: list[Prediction]
    conf: float
    min_area: int = 0
    notes: tuple[str, ...] = ()


def read_other(against: Path, split: CocoSplit, conf: float, min_area: int) -> Other:
    """Return another model's predictions for a split.

    Args:
        against: a run folder with `inference_<split>`, a results folder, or a file in COCO's results format.
        split: the split on which both models are evaluated.
        conf: the threshold where `against` is a file, which names none.
        min_area: the smallest area where `against` is a file.

    Raises:
        FlawmaskError: there are no such results, they are damaged, or they belong to other images.
    """
    places = (against / f"inference_{split.name}", against)
    folder = next((place for place in places if (place / "predictions.json").is_file()), None)
    if folder is None and not against.is_file():
        raise FlawmaskError(f"{against} holds no results for {split.name}: run flawmask evaluate on that model first")
    if folder is None:
        return Other(against.as_posix(), read_predictions(against, split), conf, min_area)
    _check_same_images(folder, split)
    metrics = read_json(folder / "metrics.json")
    if not isinstance(metrics, dict) or not {"conf", "min_area"} <= set(metrics):
        raise FlawmaskError(f"{folder / 'metrics.json'} was not written by flawmask evaluate: evaluate that run again")
    has_masks = metrics.get("finds") != "boxes"
    predictions = [replace(one, has_masks=has_masks) for one in read_predictions(folder / "predictions.json", split)]
    notes = tuple(map(str, metrics.get("notes", ())))
    return Other(folder.as_posix(), predictions, float(metrics["conf"]), int(metrics["min_area"]), notes)


def _check_same_images(folder: Path, split: CocoSplit) -> None:
    """Refuse results that belong to other images. Image ids do not tell: many data sets have the same ones.

    Raises:
        FlawmaskError: file names or truth differ.
    """
    other = {(row.get("file"), row.get("truth") == "defect") for row in read_table(folder / "predictions.csv")}
    if other != {(image["file_name"], split.is_defective(image)) for image in split.images}:
        raise FlawmaskError(
            f"{folder} holds results for other images than {split.folder}: evaluate that run on this split first"
        )


def read_predictions(path: Path, split: CocoSplit) -> list[Prediction]:
    """Return the predictions of a file in COCO's results format, one per image of the split.

    Raises:
        FlawmaskError: see `coco_results.read_results`.
    """
    names = {category["id"]: str(category["name"]) for category in split.categories}
    results = read_results(path, split)
    has_masks = not any("is_box" in record for of_image in results.values() for record in of_image)
    return [
        Prediction(
            image["height"],
            image["width"],
            tuple(instance_of(record, names[record["category_id"]]) for record in results[image["id"]]),
            has_masks=has_masks,
        )
        for image in split.images
    ]


def instance_of(record: Record, label: str) -> Instance:
    """Return the instance of a record in COCO's results format, with its mask as RLE."""
    x, y, width, height = (float(value) for value in record["bbox"])
    rle = record["segmentation"]
    return Instance(label, float(record["score"]), (x, y, x + width, y + height), rle, int(rle_tools.area(rle)))


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
    """Return how a model differs from another one on the same images.

    Both models are evaluated on the same resampled sets of images. So images that are hard for both do not widen the
    intervals. Where groups are known, intervals and p are over whole groups.

    Returns:
        `other`: the other model's name; `conf` and `notes`: its threshold and the notes of its evaluation; `figures`:
        for each metric that both models have, `this`, `other`, `difference` and `interval`, the middle 95 % of the
        bootstrapped differences; `mcnemar`: `only_this_right`, `only_other_right` and the exact `p`; `groups`: the
        number of groups, where these are known.
    """
    this_evidence = gather(split, predictions, conf, min_area)
    other_evidence = gather(split, other.predictions, other.conf, other.min_area)
    truth, groups = this_evidence.truth, this_evidence.groups
    weights = np.vstack((np.ones(len(truth)), resample(truth, resamples, seed, groups)))
    level = widened(truth, groups)
    compared = placed(lambda one: one.against)
    both = (this_evidence, other_evidence)
    figures, others = (values(compared, evidence, weights) for evidence in both)
    right, other_right = (np.array([one.outcome == "right" for one in evidence.images]) for evidence in both)
    table = {}
    for name in (one.key for one in compared):
        if name not in figures.keys() & others.keys() or np.isnan(figures[name][0] - others[name][0]):
            continue
        difference = figures[name] - others[name]
        table[name] = {
            "this": float(figures[name][0]),
            "other": float(others[name][0]),
            "difference": float(difference[0]),
            "interval": percentiles(difference[1:], level),
        }
    return {
        "other": other.name,
        "conf": other.conf,
        "notes": list(other.notes),
        "figures": table,
        "mcnemar": {
            "only_this_right": int((right & ~other_right).sum()),
            "only_other_right": int((other_right & ~right).sum()),
            "p": mcnemar(right, other_right, groups),
        },
        **({} if groups is None else {"groups": len(np.unique(groups))}),
    }
