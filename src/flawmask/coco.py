"""The COCO folder: read, checked and written. `<dataset>/<split>/images/*` and `<dataset>/<split>/annotations.json`.

Records are COCO's for object detection (https://cocodataset.org/#format-data).
"""

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from flawmask import coco_files, masks
from flawmask.coco_files import SplitFiles
from flawmask.errors import FlawmaskError, RecordsError
from flawmask.files import read_json, write_json_lines
from flawmask.images import LIMIT, most_pixels
from flawmask.masks import Cut, Mask, cut_out

GOOD = "good"
"""The name of the class that is no defect. It takes no part in AP, image scores or overlays."""

Record = dict[str, Any]

T = TypeVar("T")


@dataclass(frozen=True)
class CocoSplit:
    """One split of a COCO folder, checked.

    Attributes:
        folder: `<dataset>/<split>`, which may be no more than a name: see `coco_files`.
        images: the image records, in the file's order.
        annotations: the annotation records by image id; every image id is there, its list possibly empty.
        categories: the category records, sorted by id.
        annotations_in: the annotation file, from the folder; `..` where a tool keeps those of all splits together.
        images_in: where the images' names lead from, from the folder.
    """

    folder: Path
    images: tuple[Record, ...]
    annotations: dict[int, tuple[Record, ...]]
    categories: tuple[Record, ...]
    annotations_in: str = "annotations.json"
    images_in: str = "images"

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

    @property
    def name(self) -> str:
        """What the split is called."""
        return coco_files.split_name(self.folder.name)

    @property
    def annotation_file(self) -> Path:
        """The file that the records are from."""
        return self._at(self.annotations_in)

    @property
    def image_folder(self) -> Path:
        """Where the images' names lead from."""
        return self._at(self.images_in)

    def _at(self, inside: str) -> Path:
        """Return a path from the folder, which need not be there itself where the path leads out of it."""
        path = self.folder / inside
        return Path(os.path.normpath(path)) if inside.startswith("..") else path

    @property
    def groups(self) -> list[str] | None:
        """The group of each image, see `groups_of`."""
        return groups_of(self.images)

    def image_path(self, image: Record) -> Path:
        """Return where the image record's file lies."""
        return self.image_folder / str(image["file_name"])

    def defects(self, image: Record) -> list[Record]:
        """Return the annotations of the image that are defects."""
        return [record for record in self.annotations[image["id"]] if record["category_id"] in self.defect_ids]

    def is_defective(self, image: Record) -> bool:
        """Return whether the image has a defect annotation."""
        return bool(self.defects(image))


def groups_of(images: Sequence[Record]) -> list[str] | None:
    """Return the group of each image, in their order: images of one group show the same part.

    An image whose record names none is a group of its own. None where no record names one: then nothing is known of
    groups.
    """
    if all(image.get("group") is None for image in images):
        return None
    named = ((image.get("group"), image["file_name"]) for image in images)
    return [f"only {name}" if group is None else str(group) for group, name in named]


def annotation(mask: Mask, *, id: int, image_id: int, category_id: int) -> Record:
    """Return the COCO annotation record of one instance: `bbox` is [x, y, width, height] and `area` counts its pixels.

    Args:
        mask: (height, width) bool, of the whole image.
        id: the record's.
        image_id: the image's.
        category_id: the class's.

    Raises:
        ValueError: the mask is empty.
    """
    height, width = mask.shape
    return cut_annotation(Cut(mask, 0, 0), height, width, id=id, image_id=image_id, category_id=category_id)


def cut_annotation(cut: Cut, height: int, width: int, *, id: int, image_id: int, category_id: int) -> Record:
    """Return what `annotation` returns, of an instance that is cut out of a (height, width) image.

    Raises:
        ValueError: the mask is empty.
    """
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

    Exports of other tools are taken as they are: see `coco_files`. Where a name is one that another machine wrote, the
    record's `file_name` becomes the one that leads to the file.

    Raises:
        RecordsError: records cannot be used, each of which is named: it is incomplete, doubled, refers to an image or
            category that is not there, or has an outline that is none.
        FlawmaskError: a folder or file is missing, or a record names a file that is not there or lies outside the
            split's folder.
    """
    return read_files(coco_files.find_split(dataset_dir, split))


def read_files(place: SplitFiles) -> CocoSplit:
    """Return a split, as `read_split` does, whose files are known.

    Raises:
        FlawmaskError: see `read_split`.
    """
    folder, path = place.folder, place.annotation_file
    content = read_json(path)
    if not isinstance(content, dict):
        raise FlawmaskError(f"{path} is not a COCO file: it must hold an object, not {type(content).__name__}")
    problems: list[str] = []
    images = _records(content, path, "images", ("id", "file_name", "width", "height"), problems)
    categories = _records(content, path, "categories", ("id", "name"), problems)
    annotations = _records(content, path, "annotations", ("id", "image_id", "category_id", "segmentation"), problems)
    _stop(path, problems)
    if not images or not categories:
        raise FlawmaskError(f"{path} lists no {'category' if images else 'image'}")
    names: set[str] = set()
    for category in categories:
        name = category["name"]
        if not isinstance(name, str) or not name or name in names:
            problems.append(f"category {category['id']} has the name {name!r}, which is doubled or none")
        else:
            names.add(name)
    for image in images:
        size = f"image {image['id']} has the size {image['width']!r} x {image['height']!r}"
        if not all(type(image[side]) is int and image[side] > 0 for side in ("width", "height")):
            problems.append(f"{size}, which is not in whole pixels")
        elif image["width"] * image["height"] > most_pixels():
            problems.append(f"{size}: more than {most_pixels() // 10**6} million pixels, see {LIMIT}")
    _stop(path, problems)
    image_folder, files = coco_files.locate(images, place)
    images = [
        image if image["file_name"] == file else {**image, "file_name": file}
        for image, file in zip(images, files, strict=True)
    ]
    sizes = {image["id"]: (image["height"], image["width"]) for image in images}
    by_image: dict[int, list[Record]] = {number: [] for number in sizes}
    known = {category["id"]: category["name"] for category in categories}
    for record in annotations:
        reason = _unusable(record, sizes, known)
        if reason:
            problems.append(f"annotation {record['id']} {reason}")
        else:
            by_image[record["image_id"]].append(_with_box(record, *sizes[record["image_id"]]))
    _stop(path, problems)
    return CocoSplit(
        folder=folder,
        images=tuple(images),
        annotations={number: tuple(records) for number, records in by_image.items()},
        categories=tuple(sorted(categories, key=lambda category: int(category["id"]))),
        annotations_in=Path(os.path.relpath(path, folder)).as_posix(),
        images_in=Path(os.path.relpath(image_folder, folder)).as_posix(),
    )


def _stop(path: Path, problems: Sequence[str]) -> None:
    if problems:
        raise RecordsError(path, problems)


def _unusable(record: Record, sizes: dict[int, tuple[int, int]], categories: dict[int, str]) -> str:
    """Return why an annotation cannot be used; nothing where it can."""
    if not _is_among(record["image_id"], sizes):
        return f"belongs to image {record['image_id']!r}, which is not listed: take it out"
    if not _is_among(record["category_id"], categories):
        listed = ", ".join(f"{number} {name}" for number, name in categories.items()) or "none"
        return f"has category {record['category_id']!r}, which is not listed ({listed}): add it to `categories`"
    if "bbox" in record and not _is_box(record["bbox"]):
        return f"has the box {record['bbox']!r}, not [x, y, width, height]"
    reason = masks.unusable(record["segmentation"], *sizes[record["image_id"]])
    return f"has no usable segmentation: {reason}" if reason else ""


def _is_box(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(isinstance(side, int | float) and abs(side) < 10**9 for side in value)
    )


def _with_box(record: Record, height: int, width: int) -> Record:
    """Return the annotation with its mask's box, where it has none."""
    if "bbox" in record:
        return record
    return {**record, "bbox": list(masks.box_of_rle(masks.as_rle(record["segmentation"], height, width)))}


def _is_among(value: Any, ids: Collection[int]) -> bool:
    """Return whether the value, of whatever type a file holds, is one of the ids."""
    return isinstance(value, int) and value in ids


def _records(content: Record, path: Path, key: str, fields: tuple[str, ...], problems: list[str]) -> list[Record]:
    """Return the list under `key`, and add to the problems which record lacks a field or an id of its own."""
    records = content.get(key)
    if not isinstance(records, list):
        raise FlawmaskError(f"{path} is not a COCO file: it has no list `{key}`")
    seen: set[int] = set()
    for place, record in enumerate(records):
        missing = [field for field in fields if not isinstance(record, dict) or field not in record]
        if missing:
            problems.append(f"{key}[{place}] has no {', '.join(missing)}")
        elif not isinstance(record["id"], int) or abs(record["id"]) >= 2**63 or record["id"] in seen:
            problems.append(f"{key}[{place}] has the id {record['id']!r}, which is doubled or no number")
        else:
            seen.add(record["id"])
    return records


def read_results(path: Path, split: CocoSplit) -> dict[int, list[Record]]:
    """Return the detections of a file in COCO's results format (https://cocodataset.org/#format-results) by image id,
    the highest score first.

    Every id of the split is there, its list possibly empty; each mask is compressed RLE at its image's size. Where no
    detection has one, the network outlines nothing: the box's pixels stand in for it, and `is_box` says so.

    Raises:
        FlawmaskError: the file is damaged, or a record names an image or class that the split does not list, has a
            score that is not a number from 0 to 1, no box, or a mask of another size than its image.
    """
    content = read_json(path)
    if not isinstance(content, list):
        raise FlawmaskError(f"{path} is not in COCO's results format: it must hold a list")
    has_masks = any(isinstance(record, dict) and "segmentation" in record for record in content)
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
        if not _is_box(record.get("bbox")):
            raise FlawmaskError(f"{where} has the box {record.get('bbox')!r}, not [x, y, width, height]")
        image = images[record["image_id"]]
        found[image["id"]].append(_with_rle(record, image, where) if has_masks else _with_box_as_mask(record, image))
    return {number: sorted(of_image, key=lambda record: -float(record["score"])) for number, of_image in found.items()}


def _with_box_as_mask(record: Record, image: Record) -> Record:
    x, y, across, down = record["bbox"]
    rle = masks.rle_of_box((x, y, x + across, y + down), image["height"], image["width"])
    return {**record, "segmentation": rle, "is_box": True}


def _with_rle(record: Record, image: Record, where: str) -> Record:
    """Return the detection with its mask as compressed RLE."""
    height, width = image["height"], image["width"]
    reason = masks.unusable(record.get("segmentation"), height, width)
    if reason:
        raise FlawmaskError(f"{where} has no mask of {width}x{height} pixels, its image's size: {reason}")
    return {**record, "segmentation": masks.as_rle(record["segmentation"], height, width)}


def instance_masks(records: Sequence[Record], height: int, width: int, where: str) -> list[Mask]:
    """Return the (height, width) bool mask of each annotation.

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
