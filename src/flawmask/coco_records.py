"""Check the records of a COCO file, and count which are used and which are not, with the reason.

The records follow COCO's format for object detection (https://cocodataset.org/#format-data). Tools deviate from the
format, and these deviations are accepted: ids that are text or floats, a polygon as one flat list or as a list of
points, annotations that are only a box, and an image that is listed twice.
"""

import posixpath
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from flawmask import masks
from flawmask.errors import FlawmaskError, RecordsError
from flawmask.good_names import GOOD
from flawmask.images import LIMIT_VARIABLE, max_pixels
from flawmask.settings import Reading
from flawmask.tally import Tally

Record = dict[str, Any]

Id = int | str
"""An id as records refer to it: a number, or text that is not a number."""

EMPTY_SEGMENTATIONS: tuple[Any, ...] = (None, [], [[]], {}, "")
"""What tools write as `segmentation` of an annotation without a mask."""


NO_PIXEL, NO_AREA, OUTSIDE = NO_INSTANCE = ("no pixel", "no area", "outside the image")
"""The reasons why an annotation is not an instance."""

NOT_LISTED = "not listed"
"""The reason why an image that no record names is not used."""


@dataclass
class Records:
    """The checked records of one file.

    Attributes:
        path: the file.
        reading: how the file is read.
        images: the records of the images that are used, in the file's order. Ids are unique numbers.
        categories: the category records. Names are unique.
        annotations: the annotations that are used, and the crowds, by image id. Every image id is a key.
        image_tally: the tally of the images.
        annotation_tally: the tally of the annotations.
        problems: one reason for each record that cannot be used.
        doubtful: the image ids of annotations that lack a field or a unique id.
    """

    path: Path
    reading: Reading
    images: list[Record] = field(default_factory=list)
    categories: list[Record] = field(default_factory=list)
    annotations: dict[int, list[Record]] = field(default_factory=dict)
    image_tally: Tally = field(default_factory=lambda: Tally("images"))
    annotation_tally: Tally = field(default_factory=lambda: Tally("annotations"))
    problems: list[str] = field(default_factory=list)
    doubtful: list[Any] = field(default_factory=list)

    def stop(self) -> None:
        """Raise an error if a record cannot be used, unless such records are left out.

        Raises:
            RecordsError: a record cannot be used, and `on_error` is `stop`.
        """
        if self.problems and self.reading.on_error == "stop":
            raise RecordsError(self.path, self.problems)

    def leave_out(self, unusable: Mapping[int, str], reason: str) -> None:
        """Leave out images together with their annotations.

        Args:
            unusable: the problem of each image that is left out, by image id.
            reason: the reason in one or two words.

        Raises:
            RecordsError: a record cannot be used, and `on_error` is `stop`.
            FlawmaskError: no image is left.
        """
        self.problems += [problem for problem in unusable.values() if problem]
        self.stop()
        for image in self.images:
            if image["id"] in unusable:
                self.image_tally.leave_out(str(image["file_name"]), reason)
                for record in self.annotations.pop(image["id"], []):
                    self.annotation_tally.leave_out(_named(record, image), "image not used")
        self.images = [image for image in self.images if image["id"] not in unusable]
        if not self.images:
            raise FlawmaskError(f"{self.path} lists no image that can be used: {self.problems[0]}")

    def count(self) -> tuple[Tally, Tally]:
        """Return the tallies of images and annotations. Call this after the last `leave_out`."""
        self.image_tally.used = len(self.images)
        for image in self.images:
            for record in self.annotations[image["id"]]:
                if record.get("iscrowd"):
                    self.annotation_tally.leave_out(_named(record, image), "crowd")
                else:
                    self.annotation_tally.used += 1
        return self.image_tally, self.annotation_tally


def read_records(content: Any, path: Path, reading: Reading) -> Records:
    """Return the records of a COCO file, after checking them against each other.

    If one record of an image cannot be used, we do not know what the image shows. So with `on_error=skip` the image is
    left out together with all of its annotations. An annotation without a pixel in its image is never an instance,
    whatever `on_error` is.

    Raises:
        RecordsError: some records cannot be used; the error lists each one.
        FlawmaskError: this is not a COCO file, or it lists no image or no category.
    """
    if not isinstance(content, dict):
        raise FlawmaskError(f"{path} is not a COCO file: it must hold an object, not {type(content).__name__}")
    checked = Records(path, reading)
    images = list(_valid_records(content, "images", ("id", "file_name", "width", "height"), checked))
    categories = list(_valid_records(content, "categories", ("id", "name"), checked))
    annotations = list(_valid_records(content, "annotations", ("id", "image_id", "category_id"), checked))
    checked.stop()
    if not content["images"] or not content["categories"]:
        raise FlawmaskError(f"{path} lists no {'category' if content['images'] else 'image'}")
    image_ids, category_ids, annotation_ids = (_numbers(records) for records in (images, categories, annotations))
    checked.images = [_with_id(image, image_ids) for image in images]
    numbered = [_with_id(record, annotation_ids) for record in annotations]
    in_use = {category_ids.get(plain_id(record["category_id"])) for record in annotations}
    checked.categories = _unique_names([_with_id(category, category_ids) for category in categories], in_use, checked)
    checked.categories, of_good = _merge_good(checked.categories, reading.good_names)
    category_ids = {original: of_good.get(number, number) for original, number in category_ids.items()}
    sizes = [_with_integer_size(image) for image in checked.images]
    checked.images = [image for image, _ in sizes]
    bad_sizes = {image["id"]: problem for image, problem in sizes if problem}
    checked.problems += bad_sizes.values()
    checked.stop()
    if not checked.images or not checked.categories:
        what = "category" if checked.images else "image"
        raise FlawmaskError(f"{path} lists no {what} that can be used: {checked.problems[0]}")
    _assign_annotations(numbered, image_ids, category_ids, bad_sizes, checked)
    checked.stop()
    leave_out_duplicates(checked)
    return checked


# Ids.


def plain_id(value: Any) -> Id | None:
    """Return an id in one form, so that 7, 7.0 and "7" are equal; None if the value is not an id."""
    if type(value) is int:  # nearly all are; `true` is not an id
        return value if abs(value) < 2**63 else None
    if isinstance(value, str):
        text = value.strip()
        return int(text.partition(".")[0]) if re.fullmatch(r"-?\d{1,18}(\.0+)?", text) else text or None
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else None


def _numbers(records: Sequence[Record]) -> dict[Id | None, int]:
    """Return a number for each id: the id itself, or the next free number if the id is text."""
    ids = [plain_id(record["id"]) for record in records]
    free = count(max((number for number in ids if isinstance(number, int)), default=0) + 1)
    return {record_id: record_id if isinstance(record_id, int) else next(free) for record_id in ids}


def _with_id(record: Record, numbers: Mapping[Id | None, int]) -> Record:
    return _changed(record, id=numbers[plain_id(record["id"])])


def _changed(record: Record, **values: Any) -> Record:
    """Return the record with these values. Most records have them already, and are returned without a copy."""
    same = all(type(record.get(key)) is type(value) and record[key] == value for key, value in values.items())
    return record if same else {**record, **values}


def _valid_records(content: Record, key: str, fields: Collection[str], checked: Records) -> Iterator[Record]:
    """Yield the records under `key` that have these fields and a unique id; count or report the others."""
    records = content.get(key)
    if not isinstance(records, list):
        raise FlawmaskError(f"{checked.path} is not a COCO file: it has no list `{key}`")
    tally = {"images": checked.image_tally, "annotations": checked.annotation_tally}.get(key)
    first: dict[Id, Record] = {}
    for index, record in enumerate(records):
        is_record = isinstance(record, dict)
        missing = [field for field in fields if not is_record or field not in record]
        if key == "annotations" and is_record and "segmentation" not in record and "bbox" not in record:
            missing.append("segmentation")
        number = None if missing else plain_id(record["id"])
        if number is not None and number not in first:
            first[number] = record
            yield record
            continue
        reason, where = "bad record", f"{key}[{index}]"
        if missing:
            checked.problems.append(f"{where} has no {', '.join(missing)}: export it again, or add what is missing")
        elif number is None or not _is_same(first[number], record):
            checked.problems.append(f"{where} has the id {record['id']!r}, which is a duplicate or not a number")
        else:
            reason = "listed twice"
        if key == "annotations" and is_record and reason == "bad record":
            checked.doubtful.append(record.get("image_id"))
        if tally is not None:
            tally.leave_out(str(record.get("file_name", where)) if is_record else where, reason)


def _is_same(first: Record, second: Record) -> bool:
    """Return whether two records with the same id have the same content."""
    if "file_name" in first:
        return _plain_name(first) == _plain_name(second)
    return first == second


def _plain_name(image: Record) -> str:
    return posixpath.normpath(str(image["file_name"]))


# Categories and images.


def _unique_names(categories: Sequence[Record], in_use: Collection[int | None], checked: Records) -> list[Record]:
    """Return the categories, one for each name.

    If several categories share a name, the one that annotations use is kept; if none is used, the last one. Roboflow
    lists the project's name as its first category, which no annotation uses, and a class may have the same name.
    """
    by_name: dict[Any, list[Record]] = defaultdict(list)
    for category in categories:
        name = category["name"]
        if isinstance(name, str) and name:
            by_name[name].append(category)
        else:
            reason = "which is a duplicate or not a name: give each category a name of its own, as text"
            checked.problems.append(f"category {category['id']} has the name {name!r}, {reason}")
    kept = []
    for name, of_name in by_name.items():
        used = [category for category in of_name if category["id"] in in_use] or of_name[-1:]
        kept.append(used[0])
        checked.problems += [
            f"category {other['id']} has the name {name!r}, which is a duplicate or not a name: category "
            f"{used[0]['id']} has it too, and both have annotations; rename one, or give all annotations one of them"
            for other in used[1:]
        ]
    return kept


def _merge_good(categories: Sequence[Record], names: Collection[str]) -> tuple[list[Record], dict[int, int]]:
    """Merge all categories with one of the names into one category `good`.

    Returns the categories, and the id of `good` by the id of each category that was merged into it.
    """
    good = [category for category in categories if category["name"] in {GOOD, *names}]
    if not good or not names:
        return list(categories), {}
    first = {**good[0], "name": GOOD}
    defects = [category for category in categories if category not in good]
    return [first, *defects], {category["id"]: first["id"] for category in good}


def _with_integer_size(image: Record) -> tuple[Record, str]:
    """Return the image's record with integer width and height, and what is wrong with its size, or ""."""
    sides = {side: image[side] for side in ("width", "height")}
    integers = {
        side: int(value) if isinstance(value, float) and value.is_integer() else value for side, value in sides.items()
    }
    size = f"image {image['id']} has the size {image['width']!r} x {image['height']!r}"
    if not all(type(value) is int and value > 0 for value in integers.values()):
        return image, f"{size}, which is not in whole pixels"
    if integers["width"] * integers["height"] > max_pixels():
        return image, f"{size}: more than {max_pixels() // 10**6} million pixels, see {LIMIT_VARIABLE}"
    return _changed(image, **integers), ""


def leave_out_duplicates(checked: Records) -> None:
    """Leave out duplicate records of the same image. The first record with annotations is kept.

    Raises:
        RecordsError: two records of an image have different annotations.
    """
    by_name: dict[str, list[Record]] = defaultdict(list)
    for image in checked.images:
        by_name[_plain_name(image)].append(image)
    duplicates: dict[int, str] = {}
    unclear: dict[int, str] = {}
    for name, of_name in by_name.items():
        if len(of_name) == 1:
            continue
        first = next((image for image in of_name if checked.annotations[image["id"]]), of_name[0])
        marks = [_content(checked.annotations[image["id"]]) for image in of_name]
        if any(mark and mark != _content(checked.annotations[first["id"]]) for mark in marks):
            numbers = " and ".join(str(image["id"]) for image in of_name)
            problem = (
                f"images {numbers} are both {name} and have different annotations: give all of them to one of the two"
            )
            unclear |= {image["id"]: "" for image in of_name} | {first["id"]: problem}
        else:
            duplicates |= {image["id"]: "" for image in of_name if image is not first}
    if duplicates:
        checked.leave_out(duplicates, "listed twice")
    if unclear:
        checked.leave_out(unclear, "listed twice")


def _content(records: Sequence[Record]) -> list[Any]:
    """Return the content of the annotations without their ids, for comparison."""
    return [(record["category_id"], record["segmentation"], record["bbox"]) for record in records]


# Annotations.


class _BadRecordError(Exception):
    """An annotation cannot be used. The message continues after the annotation's id."""


class _NoInstanceError(Exception):
    """An annotation marks no pixel. The message is the reason in one or two words."""


def _assign_annotations(
    records: Sequence[Record],
    image_ids: Mapping[Id | None, int],
    category_ids: Mapping[Id | None, int],
    bad_sizes: Collection[int],
    checked: Records,
) -> None:
    """Assign the annotations to their images.

    Annotations that are not instances are left out. So are images with an annotation that cannot be used.
    """
    images: dict[int | None, Record] = {image["id"]: image for image in checked.images}
    names: dict[int | None, str] = {category["id"]: category["name"] for category in checked.categories}
    checked.annotations = {image["id"]: [] for image in checked.images}
    doubtful = {image_ids.get(plain_id(number)) for number in checked.doubtful}
    bad = {image["id"]: "" for image in checked.images if image["id"] in bad_sizes or image["id"] in doubtful}
    for record in records:
        image = images.get(image_ids.get(plain_id(record["image_id"])))
        if image is None:
            checked.problems.append(
                f"annotation {record['id']} belongs to image {record['image_id']!r}, which is not listed: take it out"
            )
            checked.annotation_tally.leave_out(str(record["id"]), "bad record")
            continue
        if image["id"] in bad_sizes:
            checked.annotation_tally.leave_out(_named(record, image), "image not used")
            continue
        try:
            category = _category(record, category_ids, names)
            known = _changed(record, image_id=image["id"], category_id=category)
            instance = _instance(known, image["height"], image["width"], checked.reading)
        except _BadRecordError as error:
            checked.problems.append(f"annotation {record['id']} {error}")
            checked.annotation_tally.leave_out(_named(record, image), "bad record")
            bad[image["id"]] = ""
        except _NoInstanceError as error:
            checked.annotation_tally.leave_out(_named(record, image), str(error))
        else:
            checked.annotations[image["id"]].append(instance)
    if bad:
        bad_names = {_plain_name(image) for image in checked.images if image["id"] in bad}
        with_bad_name = {image["id"]: "" for image in checked.images if _plain_name(image) in bad_names}
        checked.leave_out(with_bad_name, "bad record")


def _named(record: Record, image: Record) -> str:
    return f"{record['id']} of {image['file_name']}"


def _category(record: Record, category_ids: Mapping[Id | None, int], names: Mapping[int | None, str]) -> int:
    category = category_ids.get(plain_id(record["category_id"]))
    if category is None or category not in names:
        listed = ", ".join(f"{number} {name}" for number, name in names.items()) or "none"
        raise _BadRecordError(
            f"has category {record['category_id']!r}, which is not listed ({listed}): add it to `categories`"
        )
    return category


def _instance(record: Record, height: int, width: int, reading: Reading) -> Record:
    """Return the annotation in its standard form: with a box, with nested polygons, and with `iscrowd` as 0 or 1.

    If the annotation is only a box, the box is clipped to the image, `segmentation` holds the pixels that the box
    touches, and `is_box` is set.

    Raises:
        _BadRecordError: the annotation cannot be used.
        _NoInstanceError: it has no area, or none of its pixels is in the image.
    """
    if "iscrowd" in record:
        crowd = _crowd(record["iscrowd"])
        record = _changed(record, iscrowd=0 if reading.crowds == "instances" else crowd)
    segmentation, box = record.get("segmentation"), record.get("bbox")
    has_box = box not in (None, [])
    if has_box and not is_box(box):
        raise _BadRecordError(f"has the box {box!r}, not [x, y, width, height]")
    if record.get("is_box") or segmentation in EMPTY_SEGMENTATIONS:
        if not has_box:
            raise _BadRecordError("has neither a mask nor a box: draw one, or delete the annotation")
        return _box_only(record, height, width)
    nested = masks.nested(segmentation)
    if reason := masks.segmentation_problem(nested, height, width):
        raise _BadRecordError(f"has no usable segmentation: {reason}")
    if not masks.has_pixel(nested, height, width):
        raise _NoInstanceError(OUTSIDE if _is_outside(nested, height, width) else NO_PIXEL)
    if has_box and min(record["bbox"][2:]) > 0:
        return _changed(record, segmentation=nested)
    return {**record, "segmentation": nested, "bbox": list(masks.box_of_rle(masks.as_rle(nested, height, width)))}


def _crowd(value: Any) -> int:
    """Return 1 for a crowd and 0 for a single instance. Tools write these values in several ways."""
    if value in (None, 0, "0"):
        return 0
    if value in (1, "1"):
        return 1
    raise _BadRecordError(f"has iscrowd {value!r}, which is neither 0 nor 1")


def _box_only(record: Record, height: int, width: int) -> Record:
    x, y, across, down = record["bbox"]
    if across <= 0 or down <= 0:
        raise _NoInstanceError(NO_AREA)
    left, top, right, bottom = max(0, x), max(0, y), min(width, x + across), min(height, y + down)
    if left >= right or top >= bottom:
        raise _NoInstanceError(OUTSIDE)
    rle = masks.rle_of_box((left, top, right, bottom), height, width)
    is_inside = (left, top) == (x, y) and x + across <= width and y + down <= height
    box = record["bbox"] if is_inside else [left, top, right - left, bottom - top]
    return {**record, "is_box": True, "bbox": box, "segmentation": rle}


def _is_outside(segmentation: masks.Segmentation, height: int, width: int) -> bool:
    if not isinstance(segmentation, list):
        return False
    xs = [side for ring in segmentation for side in ring[::2]]
    ys = [side for ring in segmentation for side in ring[1::2]]
    return min(xs) >= width or min(ys) >= height or max(xs) <= 0 or max(ys) <= 0


def is_box(value: Any) -> bool:
    """Return whether the value is [x, y, width, height]."""
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(isinstance(side, int | float) and abs(side) < 10**9 for side in value)
    )
