"""The COCO folder: read, checked and written. `<dataset>/<split>/images/*` and `<dataset>/<split>/annotations.json`.

Records are COCO's for object detection (https://cocodataset.org/#format-data).
"""

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from flawmask import coco_files, masks
from flawmask import images as image_files
from flawmask.coco_files import SplitFiles
from flawmask.coco_records import NOT_LISTED, Records, is_box, plain_id, read_records, take_twice_listed_out
from flawmask.errors import FlawmaskError
from flawmask.files import read_json, write_json_lines
from flawmask.good_names import GOOD
from flawmask.launch import is_first, usable_cores
from flawmask.masks import Cut, Mask, cut_out
from flawmask.settings import Reading
from flawmask.tally import Tally, tallied, warn_of_unused

log = logging.getLogger(__name__)

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
        tallies: how many images and annotations were found and are used; none of a split that was not read from a file.
        problems: why records were left out, one by one, where `on_error` is `skip`.
    """

    folder: Path
    images: tuple[Record, ...]
    annotations: dict[int, tuple[Record, ...]]
    categories: tuple[Record, ...]
    annotations_in: str = "annotations.json"
    images_in: str = "images"
    tallies: tuple[Tally, ...] = ()
    problems: tuple[str, ...] = ()

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

    def type_of(self, image: Record) -> str:
        """Return the type of defect that the image shows: what its record says, else the class of its largest defect,
        else `good`."""
        return str(image["defect_type"]) if image.get("defect_type") else self.class_of(image)

    def class_of(self, image: Record) -> str:
        """Return the class of the image's largest defect, by its box; `good` where it has none."""
        defects = self.defects(image)
        if not defects:
            return GOOD
        largest = max(defects, key=lambda one: float(one["bbox"][2]) * float(one["bbox"][3]))
        return self.class_names[self.labels[largest["category_id"]] - 1]

    @property
    def boxes_alone(self) -> list[Record]:
        """The defects of which a box is all that is known."""
        return [record for image in self.images for record in self.defects(image) if record.get("is_box")]

    @property
    def crowds(self) -> list[Record]:
        """The defects that are crowds: nothing is learnt from them."""
        return [record for image in self.images for record in self.defects(image) if record.get("iscrowd")]

    def refuse_boxes_alone(self, why: str, instead: str) -> None:
        """Refuse defects that are boxes alone.

        Args:
            why: why they do not do, as a clause.
            instead: what to do that takes no outlines.

        Raises:
            FlawmaskError: there are some.
        """
        boxes = self.boxes_alone
        if boxes:
            raise FlawmaskError(
                f"{self.annotation_file}: {len(boxes)} defects are boxes without an outline (annotation "
                f"{boxes[0]['id']} for one), and {why}: outline them, or {instead} (--arch fasterrcnn_resnet50_fpn)"
            )

    @property
    def tally(self) -> dict[str, Any]:
        """The tallies as JSON values, see `Tally.to_dict`."""
        return tallied(self.tallies)

    def warn(self, *, strict: bool) -> None:
        """Say what was found and is not used; of several processes, the first one does.

        Raises:
            UnusedError: there is any, and `strict` is on.
        """
        if not strict:
            if not is_first():
                return
            for problem in self.problems:
                log.warning("left out: %s: %s", self.annotation_file, problem)
        warn_of_unused(self.tallies, str(self.folder), strict=strict)


def groups_of(images: Sequence[Record]) -> list[str] | None:
    """Return the group of each image, in their order: images of one group show the same part.

    An image whose record names none is a group of its own. None where no record names one: then nothing is known of
    groups.
    """
    if all(image.get("group") is None for image in images):
        return None
    named = ((image.get("group"), image["file_name"]) for image in images)
    return [f"only {name}" if group is None else str(group) for group, name in named]


def total_tallies(splits: Iterable[CocoSplit]) -> tuple[Tally, Tally]:
    """Return the count of the images and that of the annotations of several splits together."""
    both = Tally("images"), Tally("annotations")
    for split in splits:
        for total, of_split in zip(both, split.tallies, strict=True):
            total.add(of_split)
    return both


def one_by_one(records: Sequence[Record]) -> list[Record]:
    """Return the annotations that are instances: all but crowds, regions of which nobody outlined what is in them."""
    return [record for record in records if not record.get("iscrowd")]


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
    """Write `folder/annotations.json`; the images are the caller's. A box alone is written without an outline."""
    info = {"description": "made by Flawmask"}
    records = [{**one, "segmentation": []} if one.get("is_box") else one for one in annotations]
    content = {"info": info, "images": images, "annotations": records, "categories": categories}
    write_json_lines(folder / "annotations.json", content)


def read_split(
    dataset_dir: Path, split: str, reading: Reading | None = None, *, opens_images: bool = True
) -> CocoSplit:
    """Return a split of a COCO folder after checking its records against each other and against the disk.

    Exports of other tools are taken as they are: see `coco_files` and `coco_records`. Where a name is one that another
    machine wrote, the record's `file_name` becomes the one that leads to the file. What is not used is counted in
    `tallies`.

    Args:
        dataset_dir: the COCO folder.
        split: the split's name.
        reading: what crowds are, and what becomes of an image that cannot be used. By default crowds are no instances,
            and nothing is left out.
        opens_images: whether image files are read to find those that cannot be used, where these are left out.

    Raises:
        RecordsError: records cannot be used, each of which is named: it is incomplete, doubled, refers to an image or
            category that is not there, or has an outline that is none.
        FlawmaskError: a folder or file is missing, or a record names a file that is not there or lies outside the
            split's folder.
    """
    return read_files(coco_files.find_split(dataset_dir, split), reading, opens_images=opens_images)


def read_files(place: SplitFiles, reading: Reading | None = None, *, opens_images: bool = True) -> CocoSplit:
    """Return a split, as `read_split` does, whose files are known.

    Raises:
        FlawmaskError: see `read_split`.
    """
    folder, path = place.folder, place.annotation_file
    records = read_records(read_json(path), path, reading or Reading())
    image_folder = _locate(records, place)
    if opens_images and records.reading.on_error == "skip":
        records.leave_out(_unreadable(records, image_folder), "bad image")
    left_out = [name for names in records.of_images.not_used.values() for name in names]
    for name in coco_files.unlisted(records.images, left_out, image_folder, place):
        records.of_images.leave_out(name, NOT_LISTED)
    tallies = records.count()
    return CocoSplit(
        folder=folder,
        images=tuple(records.images),
        annotations={number: tuple(of_image) for number, of_image in records.annotations.items()},
        categories=tuple(sorted(records.categories, key=lambda category: int(category["id"]))),
        annotations_in=Path(os.path.relpath(path, folder)).as_posix(),
        images_in=Path(os.path.relpath(image_folder, folder)).as_posix(),
        tallies=tallies,
        problems=tuple(records.problems),
    )


def _unreadable(records: Records, folder: Path) -> dict[int, str]:
    """Return what is wrong with the files of images, by image id: those that cannot be read, or are of another size."""

    def problem(image: Record) -> str:
        path = folder / str(image["file_name"])
        seen = path.stat()
        return _file_problem(path, seen.st_mtime_ns, seen.st_size, image["width"], image["height"])

    with ThreadPoolExecutor(usable_cores()) as pool:
        problems = zip(records.images, pool.map(problem, records.images), strict=True)
        return {image["id"]: found for image, found in problems if found}


@lru_cache(maxsize=10**6)
def _file_problem(path: Path, changed: int, size: int, width: int, height: int) -> str:
    """Return what is wrong with an image's file; nothing where it is right. A run asks several times."""
    try:
        found = image_files.read_image(path).shape
    except FlawmaskError as error:
        return str(error)
    is_right = found[:2] == (height, width)
    return "" if is_right else f"{path} is {found[1]}x{found[0]} but its record says {width}x{height}"


def _locate(records: Records, place: SplitFiles) -> Path:
    """Name each image as its file is called, and return the folder that the names lead from.

    Raises:
        FlawmaskError: a file lies outside the folder, or several fit a name; or one is not there, and is not to be left
            out.
    """
    skips = records.reading.on_error == "skip"
    folder, names = coco_files.locate(records.images, place, skips_missing=skips)
    missing = {
        image["id"]: f"{image['file_name']} is not there"
        for image, name in zip(records.images, names, strict=True)
        if name is None
    }
    records.images = [
        image if name in (None, image["file_name"]) else {**image, "file_name": name}
        for image, name in zip(records.images, names, strict=True)
    ]
    if missing:
        records.leave_out(missing, "file missing")
    take_twice_listed_out(records)  # two names may lead to one file
    return folder


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
    images: dict[Any, Record] = {image["id"]: image for image in split.images}
    found: dict[int, list[Record]] = {number: [] for number in images}
    for place, record in enumerate(content):
        where = f"{path}: record {place}"
        if not isinstance(record, dict):
            raise FlawmaskError(f"{where} is no object: {record!r}")
        image_id, category_id, score = (record.get(key) for key in ("image_id", "category_id", "score"))
        image, category = images.get(plain_id(image_id)), plain_id(category_id)
        if image is None:
            raise FlawmaskError(f"{where} names the image {image_id!r}, which {split.folder} does not list")
        if category not in split.labels:
            raise FlawmaskError(f"{where} names the class {category_id!r}, which {split.folder} does not list")
        if not isinstance(score, int | float) or not 0 <= score <= 1:  # NaN is not either
            raise FlawmaskError(f"{where} has the score {score!r}: it must be a number from 0 to 1")
        if not is_box(record.get("bbox")):
            raise FlawmaskError(f"{where} has the box {record.get('bbox')!r}, not [x, y, width, height]")
        known = {**record, "image_id": image["id"], "category_id": category}
        found[image["id"]].append(_with_rle(known, image, where) if has_masks else _with_box_as_mask(known, image))
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
