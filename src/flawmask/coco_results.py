"""Read predictions in COCO's results format (https://cocodataset.org/#format-results)."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from flawmask import masks
from flawmask.coco import CocoSplit, Record
from flawmask.coco_records import is_box, plain_id
from flawmask.errors import FlawmaskError
from flawmask.json_lists import NoListError, read_json_list


def read_results(path: Path, split: CocoSplit) -> dict[int, list[Record]]:
    """Return the predictions in a COCO results file by image id, highest score first; see `results_of`.

    Every image id of the split is a key; its list may be empty.

    Raises:
        FlawmaskError: see `results_of`.
    """
    predictions: dict[int, list[Record]] = {image["id"]: [] for image in split.images}
    for record in results_of(path, split):
        predictions[record["image_id"]].append(record)
    return {
        image_id: sorted(of_image, key=lambda record: -float(record["score"]))
        for image_id, of_image in predictions.items()
    }


def results_of(path: Path, split: CocoSplit, only: Collection[int] | None = None) -> Iterator[Record]:
    """Yield the predictions in a COCO results file, in the order of the file. Only one is in memory at a time.

    Each mask is compressed RLE at the image's size. If no record of the file has a mask, the network predicts only
    boxes: then each mask is filled from its box, and the record gets `is_box`.

    Args:
        path: the file.
        split: its images and classes.
        only: the ids of the images to yield predictions of; by default all.

    Raises:
        FlawmaskError: the file is damaged, or a record names an image or class that the split does not list, has a
            score that is not a number from 0 to 1, no box, or a mask whose size is not that of its image.
    """
    has_masks = any(isinstance(record, dict) and "segmentation" in record for record in _results(path))
    images: dict[Any, Record] = {image["id"]: image for image in split.images}
    for index, record in enumerate(_results(path)):
        where = f"{path}: record {index}"
        if not isinstance(record, dict):
            raise FlawmaskError(f"{where} is not an object: {record!r}")
        image_id, category_id, score = (record.get(key) for key in ("image_id", "category_id", "score"))
        image, category = images.get(plain_id(image_id)), plain_id(category_id)
        if image is None:
            raise FlawmaskError(f"{where} names the image {image_id!r}, which {split.folder} does not list")
        if only is not None and image["id"] not in only:
            continue
        if category not in split.labels:
            raise FlawmaskError(f"{where} names the class {category_id!r}, which {split.folder} does not list")
        if not isinstance(score, int | float) or not 0 <= score <= 1:  # this also refuses NaN
            raise FlawmaskError(f"{where} has the score {score!r}: it must be a number from 0 to 1")
        if not is_box(record.get("bbox")):
            raise FlawmaskError(f"{where} has the box {record.get('bbox')!r}, not [x, y, width, height]")
        known = {**record, "image_id": image["id"], "category_id": category}
        yield _with_rle(known, image, where) if has_masks else _with_box_as_mask(known, image)


def _results(path: Path) -> Iterator[Any]:
    try:
        yield from read_json_list(path)
    except NoListError:
        raise FlawmaskError(f"{path} is not in COCO's results format: it must hold a list") from None


def _with_box_as_mask(record: Record, image: Record) -> Record:
    x, y, across, down = record["bbox"]
    rle = masks.rle_of_box((x, y, x + across, y + down), image["height"], image["width"])
    return {**record, "segmentation": rle, "is_box": True}


def _with_rle(record: Record, image: Record, where: str) -> Record:
    """Return the prediction with its mask as compressed RLE."""
    height, width = image["height"], image["width"]
    reason = masks.segmentation_problem(record.get("segmentation"), height, width)
    if reason:
        raise FlawmaskError(f"{where} has no mask of {width}x{height} pixels, its image's size: {reason}")
    return {**record, "segmentation": masks.as_rle(record["segmentation"], height, width)}
