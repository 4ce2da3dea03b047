"""Read, check and write a COCO folder: `<dataset>/<split>/images/*` and `<dataset>/<split>/annotations.json`.

The records follow COCO's format for object detection (https://cocodataset.org/#format-data).
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from flawmask import coco_files, masks
from flawmask import images as image_files
from flawmask.coco_files import SplitFiles
from flawmask.coco_records import NOT_LISTED, Records, leave_out_duplicates, read_records
from flawmask.errors import FlawmaskError
from flawmask.files import read_json, write_json_lines
from flawmask.good_names import GOOD
from flawmask.launch import is_main_process, usable_cores
from flawmask.masks import Crop, Mask, crop_mask
from flawmask.settings import Reading
from flawmask.tally import Tally, tallies_to_dict, warn_of_unused

log = logging.getLogger(__name__)

Record = dict[str, Any]

T = TypeVar("T")


@dataclass(frozen=True)
class CocoSplit:
    """One split of a COCO folder, after all checks.

    Attributes:
        folder: `<dataset>/<split>`. The folder need not exist: see `coco_files`.
        images: the image records, in the file's order.
        annotations: the annotation records by image id. Every image id is a key; its list may be empty.
        categories: the category records, sorted by id.
        annotations_in: the annotation file, relative to `folder`. It starts with `..` if one folder holds
            the files of all splits.
        images_in: the folder that the images' file names are relative to, itself relative to `folder`.
        tallies: how many images and annotations were found and are used. Empty if the split was not read from a file.
        problems: one reason for each record that was left out because `on_error` is `skip`.
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
        """The categories' names in the order of the network's labels 1, 2, ...; label 0 is the background."""
        return tuple(category["name"] for category in self.categories)

    @property
    def labels(self) -> dict[int, int]:
        """The network's label (1 or more) by category id."""
        return {category["id"]: label for label, category in enumerate(self.categories, start=1)}

    @property
    def defect_ids(self) -> frozenset[int]:
        """The ids of all categories that are defects: every category except `good`."""
        return frozenset(category["id"] for category in self.categories if category["name"] != GOOD)

    @property
    def name(self) -> str:
        """The split's name, such as `val`."""
        return coco_files.split_name(self.folder.name)

    @property
    def annotation_file(self) -> Path:
        """The file that holds the records."""
        return self._resolve(self.annotations_in)

    @property
    def image_folder(self) -> Path:
        """The folder that the images' file names are relative to."""
        return self._resolve(self.images_in)

    def _resolve(self, relative: str) -> Path:
        """Return a path relative to `folder`. A path that leaves the folder works even if the folder does not exist."""
        path = self.folder / relative
        return Path(os.path.normpath(path)) if relative.startswith("..") else path

    @property
    def groups(self) -> list[str] | None:
        """The group of each image; see `groups_of`."""
        return groups_of(self.images)

    def image_path(self, image: Record) -> Path:
        """Return the path of the image's file."""
        return self.image_folder / str(image["file_name"])

    def defects(self, image: Record) -> list[Record]:
        """Return the image's annotations that are defects."""
        return [record for record in self.annotations[image["id"]] if record["category_id"] in self.defect_ids]

    def is_defective(self, image: Record) -> bool:
        """Return whether the image has a defect annotation."""
        return bool(self.defects(image))

    def type_of(self, image: Record) -> str:
        """Return the image's defect type.

        This is the `defect_type` of its record if there is one, else the class of its largest defect, else `good`.
        """
        return str(image["defect_type"]) if image.get("defect_type") else self.class_of(image)

    def class_of(self, image: Record) -> str:
        """Return the class of the defect with the largest box, or `good` if the image has no defect."""
        defects = self.defects(image)
        if not defects:
            return GOOD
        largest = max(defects, key=lambda record: float(record["bbox"][2]) * float(record["bbox"][3]))
        return self.class_names[self.labels[largest["category_id"]] - 1]

    def without(self, places: Iterable[int]) -> "CocoSplit":
        """Return the split without the images at these places."""
        dropped = set(places)
        images = tuple(image for at, image in enumerate(self.images) if at not in dropped)
        return replace(
            self, images=images, annotations={image["id"]: self.annotations[image["id"]] for image in images}
        )

    @property
    def box_only_defects(self) -> list[Record]:
        """The defects that have a box and no mask."""
        return [record for image in self.images for record in self.defects(image) if record.get("is_box")]

    @property
    def crowds(self) -> list[Record]:
        """The defects that are crowds (`iscrowd: 1`). Networks learn nothing from them."""
        return [record for image in self.images for record in self.defects(image) if record.get("iscrowd")]

    def require_masks(self, why: str, instead: str) -> None:
        """Raise an error if a defect has a box and no mask.

        Args:
            why: why masks are needed, as a clause of the message.
            instead: what to do that needs no masks.

        Raises:
            FlawmaskError: there is such a defect.
        """
        boxes = self.box_only_defects
        if boxes:
            raise FlawmaskError(
                f"{self.annotation_file}: {len(boxes)} defects have a box but no mask (annotation "
                f"{boxes[0]['id']}, for example), and {why}: draw masks, or {instead} (--arch fasterrcnn_resnet50_fpn)"
            )

    @property
    def tally(self) -> dict[str, Any]:
        """The tallies as JSON values; see `Tally.to_dict`."""
        return tallies_to_dict(self.tallies)

    def warn(self, *, strict: bool) -> None:
        """Warn about images and annotations that were found and are not used. Only the first process of several warns.

        Raises:
            UnusedError: something is not used, and `strict` is on.
        """
        if not strict:
            if not is_main_process():
                return
            for problem in self.problems:
                log.warning("left out: %s: %s", self.annotation_file, problem)
        warn_of_unused(self.tallies, str(self.folder), strict=strict)


def groups_of(images: Sequence[Record]) -> list[str] | None:
    """Return the group of each image, in order; images of one group show the same part.

    An image whose record names no group forms a group of its own. Returns None if no record names a group: then the
    groups are not known.
    """
    if all(image.get("group") is None for image in images):
        return None
    named = ((image.get("group"), image["file_name"]) for image in images)
    return [f"only {name}" if group is None else str(group) for group, name in named]


def total_tallies(splits: Iterable[CocoSplit]) -> tuple[Tally, Tally]:
    """Return the sums of several splits' tallies, first for images and then for annotations."""
    totals = Tally("images"), Tally("annotations")
    for split in splits:
        for total, tally in zip(totals, split.tallies, strict=True):
            total.add(tally)
    return totals


def without_crowds(records: Sequence[Record]) -> list[Record]:
    """Return the annotations that are instances. Crowds are not: nobody marked the single objects in such a region."""
    return [record for record in records if not record.get("iscrowd")]


def annotation(mask: Mask, *, id: int, image_id: int, category_id: int) -> Record:
    """Return the COCO annotation record of one instance.

    `bbox` is [x, y, width, height] in pixels, and `area` is the number of the mask's pixels.

    Args:
        mask: (height, width) bool, as large as the image.
        id: the id of the record.
        image_id: the id of the image.
        category_id: the id of the class.

    Raises:
        ValueError: the mask is empty.
    """
    height, width = mask.shape
    return crop_annotation(Crop(mask, 0, 0), height, width, id=id, image_id=image_id, category_id=category_id)


def crop_annotation(crop: Crop, height: int, width: int, *, id: int, image_id: int, category_id: int) -> Record:
    """Return the same record as `annotation`, from a crop of the (height, width) mask.

    Raises:
        ValueError: the mask is empty.
    """
    tight = crop_mask(crop.mask)
    tight = Crop(tight.mask, crop.x + tight.x, crop.y + tight.y)
    rows, columns = tight.mask.shape
    return {
        "id": id,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [tight.x, tight.y, columns, rows],
        "area": int(np.count_nonzero(tight.mask)),
        "iscrowd": 0,
        "segmentation": masks.encode_crop(tight, height, width),
    }


def write_split(
    folder: Path, images: Sequence[Record], annotations: Sequence[Record], categories: Sequence[Record]
) -> None:
    """Write `folder/annotations.json`, not the images. An annotation that is only a box gets an empty segmentation."""
    info = {"description": "made by Flawmask"}
    records = [{**record, "segmentation": []} if record.get("is_box") else record for record in annotations]
    content = {"info": info, "images": images, "annotations": records, "categories": categories}
    write_json_lines(folder / "annotations.json", content)


def read_split(
    dataset_dir: Path, split: str, reading: Reading | None = None, *, opens_images: bool = True
) -> CocoSplit:
    """Return a split of a COCO folder, after checking its records against each other and against the files.

    Exports of other tools are read without changes: see `coco_files` and `coco_records`. A `file_name` may have been
    written on another machine; it is then replaced by the name that leads to the file. The split's `tallies` count what
    is not used.

    Args:
        dataset_dir: the COCO folder.
        split: the split's name.
        reading: how crowds are treated, and whether an unusable image is left out or an error. By default crowds are
            not instances, and an unusable image is an error.
        opens_images: whether to read every image file in order to leave out the damaged ones. This applies only if
            unusable images are left out.

    Raises:
        RecordsError: some records cannot be used. The error lists each one: it is incomplete, duplicated, refers to a
            missing image or category, or has an invalid segmentation.
        FlawmaskError: a folder or file is missing, or a record names a file that is missing or lies outside the split's
            folder.
    """
    return read_files(coco_files.find_split(dataset_dir, split), reading, opens_images=opens_images)


def read_files(place: SplitFiles, reading: Reading | None = None, *, opens_images: bool = True) -> CocoSplit:
    """Return the split with these files; like `read_split`, which finds the files first.

    Raises:
        FlawmaskError: see `read_split`.
    """
    folder, path = place.folder, place.annotation_file
    records = read_records(read_json(path), path, reading or Reading())
    image_folder = _locate(records, place)
    if opens_images and records.reading.on_error == "skip":
        records.leave_out(_unreadable(records, image_folder), "bad image")
    left_out = [name for names in records.image_tally.not_used.values() for name in names]
    for name in coco_files.unlisted_images(records.images, left_out, image_folder, place):
        records.image_tally.leave_out(name, NOT_LISTED)
    tallies = records.count()
    return CocoSplit(
        folder=folder,
        images=tuple(records.images),
        annotations={image_id: tuple(of_image) for image_id, of_image in records.annotations.items()},
        categories=tuple(sorted(records.categories, key=lambda category: int(category["id"]))),
        annotations_in=Path(os.path.relpath(path, folder)).as_posix(),
        images_in=Path(os.path.relpath(image_folder, folder)).as_posix(),
        tallies=tallies,
        problems=tuple(records.problems),
    )


def _unreadable(records: Records, folder: Path) -> dict[int, str]:
    """Return the problems of image files by image id: a file cannot be read, or its size differs from its record's."""

    def problem(image: Record) -> str:
        path = folder / str(image["file_name"])
        status = path.stat()
        return _file_problem(path, status.st_mtime_ns, status.st_size, image["width"], image["height"])

    with ThreadPoolExecutor(usable_cores()) as pool:
        problems = zip(records.images, pool.map(problem, records.images), strict=True)
        return {image["id"]: reason for image, reason in problems if reason}


@lru_cache(maxsize=10**6)
def _file_problem(path: Path, mtime: int, size: int, width: int, height: int) -> str:
    """Return what is wrong with an image's file, or "". Cached, because a run asks several times."""
    try:
        shape = image_files.read_image(path).shape
    except FlawmaskError as error:
        return str(error)
    is_right = shape[:2] == (height, width)
    return (
        ""
        if is_right
        else f"{path} is {shape[1]}x{shape[0]} but its record says {width}x{height}: export the annotations again"
    )


def _locate(records: Records, place: SplitFiles) -> Path:
    """Set each image's `file_name` to that of its file, and return the folder that these names are relative to.

    Raises:
        FlawmaskError: a file lies outside the folder, several files match a name, or a file is missing and is not to be
            left out.
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
    leave_out_duplicates(records)  # two names may lead to the same file
    return folder


def instance_masks(records: Sequence[Record], height: int, width: int, where: str) -> Iterator[Mask]:
    """Yield the (height, width) bool mask of each annotation. Only one is in memory at a time.

    Raises:
        FlawmaskError: a segmentation cannot be decoded at this size; `where` names the image.
    """
    return _converted(records, masks.decode, height, width, where)


def instance_rles(records: Sequence[Record], height: int, width: int, where: str) -> list[dict[str, Any]]:
    """Return the mask of each annotation as compressed RLE at the image's size.

    Raises:
        FlawmaskError: a segmentation cannot be used at this size; `where` names the image.
    """
    return list(_converted(records, masks.as_rle, height, width, where))


def _converted(
    records: Sequence[Record], convert: Callable[[Any, int, int], T], height: int, width: int, where: str
) -> Iterator[T]:
    for record in records:
        try:
            converted = convert(record["segmentation"], height, width)
        except Exception as error:  # pycocotools raises a plain Exception for input that it does not know
            raise FlawmaskError(f"{where}: annotation {record['id']} has no usable segmentation: {error}") from None
        yield converted
