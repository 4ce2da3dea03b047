"""The COCO folder: read, checked and written. `<dataset>/<split>/images/*` and `<dataset>/<split>/annotations.json`."""

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from flawmask import masks
from flawmask.errors import FlawmaskError
from flawmask.files import read_json, write_json_lines
from flawmask.masks import Cut, Mask, cut_out

GOOD = "good"
"""The name of the class that is no defect. It takes no part in AP, image scores or overlays."""

Record = dict[str, Any]

T = TypeVar("T")


@dataclass(frozen=True)
class CocoSplit:
    """One split of a COCO folder, checked.

    Attributes:
        folder: `<dataset>/<split>`.
        images: the image records, in the file's order.
        annotations: the annotation records by image id; every image id is there, its list possibly empty.
        categories: the category records, sorted by id.
    """

    folder: Path
    images: tuple[Record, ...]
    annotations: dict[int, tuple[Record, ...]]
    categories: tuple[Record, ...]

    @property
    def class_names(self) -> tuple[str, ...]:
        """The categories' names in the order of the network's labels 1, 2, ...; background, 0, has none."""
        return tuple(category["name"] for category in self.categories)

    @property
    def labels(self) -> dict[int, int]:
        """The network's label, 1 or more, of each category id."""
        return {category["id"]: label for label, category in enumerate(self.categories, start=1)}

    @property
    def defect_ids(self) -> frozenset[int]:
        """The category ids that stand for a defect: all but the one named `good`."""
        return frozenset(category["id"] for category in self.categories if category["name"] != GOOD)

    def image_path(self, image: Record) -> Path:
        """Return where the image record's file lies."""
        return self.folder / "images" / str(image["file_name"])

    def defects(self, image: Record) -> list[Record]:
        """Return the annotations of the image that are defects."""
        return [record for record in self.annotations[image["id"]] if record["category_id"] in self.defect_ids]

    def is_defective(self, image: Record) -> bool:
        """Return whether the image has a defect annotation."""
        return bool(self.defects(image))


def annotation(mask: Mask, *, id: int, image_id: int, category_id: int) -> Record:
    """Return the COCO annotation record of one instance; its mask must not be empty."""
    height, width = mask.shape
    return cut_annotation(Cut(mask, 0, 0), height, width, id=id, image_id=image_id, category_id=category_id)


def cut_annotation(cut: Cut, height: int, width: int, *, id: int, image_id: int, category_id: int) -> Record:
    """Return the COCO annotation record of one instance of a (height, width) image; its mask must not be empty."""
    tight = cut_out(cut.mask)
    tight = Cut(tight.mask, cut.x + tight.x, cut.y + tight.y)
    rows, columns = tight.mask.shape
    return {
        "id": id,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [tight.x, tight.y, columns, rows],
        "area": int(np.count_nonzero(tight.mask)),
        "iscrowd": 0,
        "segmentation": masks.encode_cut(tight, height, width),
    }


def write_split(
    folder: Path, images: Sequence[Record], annotations: Sequence[Record], categories: Sequence[Record]
) -> None:
    """Write `folder/annotations.json`; the images are the caller's."""
    info = {"description": "made by Flawmask"}
    content = {"info": info, "images": images, "annotations": annotations, "categories": categories}
    write_json_lines(folder / "annotations.json", content)


def read_split(dataset_dir: Path, split: str) -> CocoSplit:
    """Return a split of a COCO folder after checking its records against each other and against the disk.

    Raises:
        FlawmaskError: a folder or file is missing, or a record is incomplete, doubled, refers to an image or
            category that is not there, names a file that is not there or lies outside the split's folder.
    """
    folder = dataset_dir / split
    if not folder.is_dir():
        found = sorted(path.name for path in dataset_dir.iterdir()) if dataset_dir.is_dir() else []
        there = f"it holds {', '.join(found)}" if found else "there is no such folder, or it is empty"
        raise FlawmaskError(f"{dataset_dir} has no split {split}: {there}")
    path = folder / "annotations.json"
    content = read_json(path)
    if not isinstance(content, dict):
        raise FlawmaskError(f"{path} is not a COCO file: it must hold an object, not {type(content).__name__}")
    images = _records(content, "images", ("id", "file_name", "width", "height"), path)
    categories = _records(content, "categories", ("id", "name"), path)
    annotations = _records(content, "annotations", ("id", "image_id", "category_id", "bbox", "segmentation"), path)
    if not images or not categories:
        raise FlawmaskError(f"{path} lists no {'category' if images else 'image'}")
    for image in images:
        if not all(isinstance(image[side], int) and image[side] > 0 for side in ("width", "height")):
            size = f"{image['width']!r} x {image['height']!r}"
            raise FlawmaskError(f"{path}: image {image['id']} has the size {size}, which is not in whole pixels")
    _check_files(images, folder, path)
    by_image: dict[int, list[Record]] = {image["id"]: [] for image in images}
    known = {category["id"]: category["name"] for category in categories}
    for record in annotations:
        where = f"{path}: annotation {record['id']}"
        if not _is_among(record["image_id"], by_image):
            raise FlawmaskError(f"{where} belongs to image {record['image_id']}, which is not listed: take it out")
        if not _is_among(record["category_id"], known):
            listed = ", ".join(f"{number} {name}" for number, name in known.items()) or "none"
            raise FlawmaskError(
                f"{where} has category {record['category_id']}, which is not listed ({listed}): add it to `categories`"
            )
        by_image[record["image_id"]].append(record)
    return CocoSplit(
        folder=folder,
        images=tuple(images),
        annotations={number: tuple(records) for number, records in by_image.items()},
        categories=tuple(sorted(categories, key=lambda category: int(category["id"]))),
    )


def _is_among(value: Any, ids: Collection[int]) -> bool:
    """Return whether the value, of whatever type a file holds, is one of the ids."""
    return isinstance(value, int) and value in ids


def _records(content: Record, key: str, fields: tuple[str, ...], path: Path) -> list[Record]:
    """Return the list under `key` after checking that each record has the fields and an id of its own."""
    records = content.get(key)
    if not isinstance(records, list):
        raise FlawmaskError(f"{path} is not a COCO file: it has no list `{key}`")
    seen: set[int] = set()
    for place, record in enumerate(records):
        missing = [field for field in fields if not isinstance(record, dict) or field not in record]
        if missing:
            raise FlawmaskError(f"{path}: {key}[{place}] has no {', '.join(missing)}")
        if not isinstance(record["id"], int) or record["id"] in seen:
            raise FlawmaskError(f"{path}: {key}[{place}] has the id {record['id']!r}, which is doubled or no number")
        seen.add(record["id"])
    return records


def _check_files(images: list[Record], folder: Path, path: Path) -> None:
    """Refuse image records whose file is not there or lies outside the split's `images` folder."""
    root = (folder / "images").resolve()
    there = _files_in(root)
    missing = []
    for image in images:
        if str(image["file_name"]) in there:  # and so a plain name: most are, and asking for each takes its time
            continue
        name = Path(str(image["file_name"]))
        if name.is_absolute() or ".." in name.parts:
            raise FlawmaskError(f"{path}: image {image['id']} names {name}, which is outside {root}: put it there")
        if not (root / name).is_file():
            missing.append(name.as_posix())
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise FlawmaskError(
            f"{path} lists images that are not in {folder / 'images'} ({shown}): put them there, or take them out"
        )


def _files_in(folder: Path) -> frozenset[str]:
    """Return the names of the files in the folder, in one look; none where there is no folder."""
    if not folder.is_dir():
        return frozenset()
    with os.scandir(folder) as entries:
        return frozenset(entry.name for entry in entries if entry.is_file())


def read_results(path: Path, split: CocoSplit) -> dict[int, list[Record]]:
    """Return the detections of a file in COCO's results format by image id, the highest score first.

    Every id of the split is there, its list possibly empty; each mask is compressed RLE at its image's size.

    Raises:
        FlawmaskError: the file is damaged, or a record names an image or class that the split does not list, has a
            score that is not a number from 0 to 1, no box, or a mask of another size than its image.
    """
    content = read_json(path)
    if not isinstance(content, list):
        raise FlawmaskError(f"{path} is not in COCO's results format: it must hold a list")
    images = {image["id"]: image for image in split.images}
    found: dict[int, list[Record]] = {number: [] for number in images}
    for place, record in enumerate(content):
        where = f"{path}: record {place}"
        if not isinstance(record, dict):
            raise FlawmaskError(f"{where} is no object: {record!r}")
        image_id, category_id, score = (record.get(key) for key in ("image_id", "category_id", "score"))
        if not _is_among(image_id, images):
            raise FlawmaskError(f"{where} names the image {image_id!r}, which {split.folder} does not list")
        if not _is_among(category_id, split.labels):
            raise FlawmaskError(f"{where} names the class {category_id!r}, which {split.folder} does not list")
        if not isinstance(score, int | float) or not 0 <= score <= 1:  # NaN is not either
            raise FlawmaskError(f"{where} has the score {score!r}: it must be a number from 0 to 1")
        box = record.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(side, int | float) for side in box):
            raise FlawmaskError(f"{where} has the box {box!r}, not [x, y, width, height]")
        found[record["image_id"]].append(_with_rle(record, images[record["image_id"]], where))
    return {number: sorted(of_image, key=lambda record: -float(record["score"])) for number, of_image in found.items()}


def _with_rle(record: Record, image: Record, where: str) -> Record:
    """Return the detection with its mask as compressed RLE."""
    height, width = image["height"], image["width"]
    try:
        return {**record, "segmentation": masks.as_rle(record["segmentation"], height, width)}
    except Exception as error:  # pycocotools raises plain Exception for what it does not know
        raise FlawmaskError(f"{where} has no mask of {width}x{height} pixels, its image's size: {error}") from None


def instance_masks(records: Sequence[Record], height: int, width: int, where: str) -> list[Mask]:
    """Return the (height, width) mask of each annotation.

    Raises:
        FlawmaskError: a segmentation cannot be decoded at this size; `where` names the image.
    """
    return _converted(records, masks.decode, height, width, where)


def instance_rles(records: Sequence[Record], height: int, width: int, where: str) -> list[dict[str, Any]]:
    """Return the mask of each annotation as compressed RLE at the image's size.

    Raises:
        FlawmaskError: a segmentation cannot be used at this size; `where` names the image.
    """
    return _converted(records, masks.as_rle, height, width, where)


def _converted(
    records: Sequence[Record], convert: Callable[[Any, int, int], T], height: int, width: int, where: str
) -> list[T]:
    converted = []
    for record in records:
        try:
            converted.append(convert(record["segmentation"], height, width))
        except Exception as error:  # pycocotools raises plain Exception for what it does not know
            raise FlawmaskError(f"{where}: annotation {record['id']} has no usable segmentation: {error}") from None
    return converted
