"""Read predictions that were stored earlier, for `evaluate --predictions`."""

import logging
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

from flawmask import masks
from flawmask.coco import CocoSplit
from flawmask.coco_results import results_of
from flawmask.errors import FlawmaskError
from flawmask.evaluation.against import instance_of
from flawmask.evaluation.spool import StoredPredictions
from flawmask.files import read_json
from flawmask.inference import records
from flawmask.inference.archive import MARKER
from flawmask.inference.records import Row
from flawmask.prediction import Instance, Prediction
from flawmask.settings import require

log = logging.getLogger(__name__)

SHARED = (
    *("model_sha256", "classes", "finds", "min_area", "join", "intensity", "calibration"),
    *("tile", "overlap", "tile_from", "notes"),
)
"""What the rows of several shards must share."""


def stored_facts(path: Path) -> dict[str, Any]:
    """Return what all stored rows share: the content of `records.json`; empty for a file in COCO's results format.

    Raises:
        FlawmaskError: there are no predictions, or the shards are of different models or settings.
    """
    if path.is_file():
        return {}
    markers = sorted(path.rglob(MARKER))
    require(
        bool(markers), f"{path} holds no {MARKER}: name the folder of predict --records, or a file in COCO's format"
    )
    contents = [read_json(marker) for marker in markers]
    for marker, content in zip(markers, contents, strict=True):
        is_known = isinstance(content, dict) and {*SHARED, "images"} <= content.keys()
        require(is_known, f"{marker} is damaged: predict again")
        for key in SHARED:
            same = content[key] == contents[0][key]
            require(same, f"{marker} has another {key} than {markers[0]}: evaluate them one by one")
        rows, form = content["settings"]["rows_per_part"], content["settings"]["records"]
        parts, there = -(-content["images"] // rows), len(list(marker.parent.glob(f"part-*.{form}")))
        require(there == parts, f"{marker.parent} has {there} of {parts} parts: let predict --records end first")
    return dict(contents[0])


def read_stored(
    path: Path, split: CocoSplit, facts: dict[str, Any], file: BinaryIO
) -> tuple[StoredPredictions, dict[int, str]]:
    """Return the stored predictions for a split, and the places of images without a verdict, each with the reason.

    Rows name images by paths. A row belongs to the image whose `file_name` ends its path.

    Args:
        path: the folder of `predict --records`, or a file in COCO's results format.
        split: the truth.
        facts: what `stored_facts` returned.
        file: an empty file for them, which must stay open.

    Raises:
        FlawmaskError: predictions are damaged, name an image twice, or miss one.
    """
    stored = StoredPredictions(file, len(split.images))
    if not facts:
        _store_results(path, split, stored)
        return stored, {}
    places = {str(image["file_name"]): at for at, image in enumerate(split.images)}
    without: dict[int, str] = {}
    others = 0
    for row in _rows(path):
        at = next((places[name] for name in _endings(row["file"]) if name in places), -1)
        if at < 0:
            others += 1
            continue
        if stored.has(at) or at in without:
            raise FlawmaskError(f"{path} has two rows for {split.images[at]['file_name']}: name the folder of one run")
        if row["verdict"] is None:
            without[at] = row["reason"]
            continue
        image = split.images[at]
        sizes = [f"{one['width']}x{one['height']}" for one in (row, image)]
        require(sizes[0] == sizes[1], f"{row['file']} was {sizes[0]}, but its record in {split.folder} says {sizes[1]}")
        stored.put(at, _prediction(row, tuple(facts["classes"]), has_masks=facts["finds"] == "masks"))
    missing = [at for at in range(len(stored)) if not stored.has(at) and at not in without]
    if missing:
        raise FlawmaskError(
            f"{path} has no row for {len(missing)} of {len(stored)} images of {split.folder}, for example "
            f"{split.images[missing[0]]['file_name']}: predict them, too"
        )
    if others:
        log.info("%d rows of %s are of images that %s does not list", others, path, split.folder)
    return stored, without


def _store_results(path: Path, split: CocoSplit, stored: StoredPredictions) -> None:
    """Store the predictions of a file in COCO's results format, in which images may come in any order."""
    names = {category["id"]: str(category["name"]) for category in split.categories}
    places = {image["id"]: at for at, image in enumerate(split.images)}
    has_masks = True
    for image_id, records_of_image in groupby(results_of(path, split), itemgetter("image_id")):
        found = list(records_of_image)
        has_masks = "is_box" not in found[0]
        at, image = places[image_id], split.images[places[image_id]]
        instances = [*stored[at].instances] if stored.has(at) else []
        instances += [instance_of(record, names[record["category_id"]]) for record in found]
        instances.sort(key=lambda one: -one.score)
        stored.put(at, Prediction(image["height"], image["width"], tuple(instances), has_masks=has_masks))
    for at, image in enumerate(split.images):
        if not stored.has(at):
            stored.put(at, Prediction(image["height"], image["width"], (), has_masks=has_masks))


def _rows(path: Path) -> Iterator[Row]:
    for part in sorted(one for suffix in ("jsonl", "parquet") for one in path.rglob(f"part-*.{suffix}")):
        yield from records.read_part(part)


def _endings(file: str) -> Iterable[str]:
    """Yield a path and its endings: `a/b/c.png`, `b/c.png`, `c.png`."""
    parts = file.split("/")
    return ("/".join(parts[first:]) for first in range(len(parts)))


def _prediction(row: Row, classes: tuple[str, ...], *, has_masks: bool) -> Prediction:
    height, width = row["height"], row["width"]
    instances = []
    for one in row["instances"]:
        x, y, across, down = one["box"]
        box = (x, y, x + across, y + down)
        rle = {"size": [height, width], "counts": one["counts"]} if has_masks else masks.rle_of_box(box, height, width)
        instances.append(Instance(one["class"], one["score"], box, rle, one["area"]))
    return Prediction(height, width, tuple(instances), has_masks=has_masks, classes=classes)
