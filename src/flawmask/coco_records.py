"""The records of a COCO file, as tools write them: which can be used, and which cannot and why. Each is counted.

Records are COCO's for object detection (https://cocodataset.org/#format-data). Tools differ from it and from each other
in what is read here all the same: ids that are text or floats, a polygon as one flat list or as a list of points,
annotations that are boxes alone, an image that is listed twice.
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
from flawmask.images import LIMIT, most_pixels
from flawmask.settings import Reading
from flawmask.tally import Tally

Record = dict[str, Any]

Id = int | str
"""An id as records refer to it: a number, or text that is none."""

NO_OUTLINE: tuple[Any, ...] = (None, [], [[]], {}, "")
"""What tools write as `segmentation` where nothing was outlined."""


NO_PIXEL, NO_AREA, OUTSIDE = NO_INSTANCE = ("no pixel", "no area", "outside the image")
"""Why an annotation is no instance."""

NOT_LISTED = "not listed"
"""Why an image is not used that no record names."""


@dataclass
class Records:
    """The records of one file.

    Attributes:
        path: the file.
        reading: how it is read.
        images: the records of the images that are used, in the file's order; ids are numbers, each once.
        categories: the category records, each name once.
        annotations: those that are used and the crowds, by image id; every image's id is there.
        of_images: the count of the images.
        of_annotations: the count of the annotations.
        problems: why records cannot be used, one by one.
        doubtful: what annotations that lack a field or an id of their own say of their image.
    """

    path: Path
    reading: Reading
    images: list[Record] = field(default_factory=list)
    categories: list[Record] = field(default_factory=list)
    annotations: dict[int, list[Record]] = field(default_factory=dict)
    of_images: Tally = field(default_factory=lambda: Tally("images"))
    of_annotations: Tally = field(default_factory=lambda: Tally("annotations"))
    problems: list[str] = field(default_factory=list)
    doubtful: list[Any] = field(default_factory=list)

    def stop(self) -> None:
        """Refuse the file where records cannot be used, unless they are to be left out.

        Raises:
            RecordsError: there are some.
        """
        if self.problems and self.reading.on_error == "stop":
            raise RecordsError(self.path, self.problems)

    def leave_out(self, unusable: Mapping[int, str], reason: str) -> None:
        """Leave out images with all that is annotated on them.

        Args:
            unusable: the problem of each of them, by image id.
            reason: the same in one or two words.

        Raises:
            RecordsError: records that cannot be used are not to be left out.
            FlawmaskError: no image is left.
        """
        self.problems += [problem for problem in unusable.values() if problem]
        self.stop()
        for image in self.images:
            if image["id"] in unusable:
                self.of_images.leave_out(str(image["file_name"]), reason)
                for record in self.annotations.pop(image["id"], []):
                    self.of_annotations.leave_out(_named(record, image), "image not used")
        self.images = [image for image in self.images if image["id"] not in unusable]
        if not self.images:
            raise FlawmaskError(f"{self.path} lists no image that can be used: {self.problems[0]}")

    def count(self) -> tuple[Tally, Tally]:
        """Return the count of the images and that of the annotations, once nothing more is left out."""
        self.of_images.used = len(self.images)
        for image in self.images:
            for record in self.annotations[image["id"]]:
                if record.get("iscrowd"):
                    self.of_annotations.leave_out(_named(record, image), "crowd")
                else:
                    self.of_annotations.used += 1
        return self.of_images, self.of_annotations


def read_records(content: Any, path: Path, reading: Reading) -> Records:
    """Return the records of a COCO file's content, checked against each other.

    With `on_error` at `skip`, an image of which a record cannot be used is left out with all that is annotated on it:
    what it shows is not known. An annotation without a pixel in its image is no instance, whatever `on_error` says.

    Raises:
        RecordsError: records cannot be used, each of which is named.
        FlawmaskError: it is no COCO file, or lists no image or no category.
    """
    if not isinstance(content, dict):
        raise FlawmaskError(f"{path} is not a COCO file: it must hold an object, not {type(content).__name__}")
    found = Records(path, reading)
    images = list(_listed(content, "images", ("id", "file_name", "width", "height"), found))
    categories = list(_listed(content, "categories", ("id", "name"), found))
    annotations = list(_listed(content, "annotations", ("id", "image_id", "category_id"), found))
    found.stop()
    if not content["images"] or not content["categories"]:
        raise FlawmaskError(f"{path} lists no {'category' if content['images'] else 'image'}")
    image_ids, category_ids, annotation_ids = (_numbers(one) for one in (images, categories, annotations))
    found.images = [_with_id(image, image_ids) for image in images]
    numbered = [_with_id(record, annotation_ids) for record in annotations]
    in_use = {category_ids.get(plain_id(record["category_id"])) for record in annotations}
    found.categories = _one_of_each_name([_with_id(one, category_ids) for one in categories], in_use, found)
    found.categories, of_good = _one_good(found.categories, reading.good_names)
    category_ids = {one: of_good.get(number, number) for one, number in category_ids.items()}
    sizes = [_with_whole_size(image) for image in found.images]
    found.images = [image for image, _ in sizes]
    bad_sizes = {image["id"]: problem for image, problem in sizes if problem}
    found.problems += bad_sizes.values()
    found.stop()
    if not found.images or not found.categories:
        what = "category" if found.images else "image"
        raise FlawmaskError(f"{path} lists no {what} that can be used: {found.problems[0]}")
    _sort_in(numbered, image_ids, category_ids, bad_sizes, found)
    found.stop()
    take_twice_listed_out(found)
    return found


# Ids.


def plain_id(value: Any) -> Id | None:
    """Return an id in the form in which 7, 7.0 and "7" are one; None where it is none."""
    if type(value) is int:  # as nearly all are, and true is none
        return value if abs(value) < 2**63 else None
    if isinstance(value, str):
        text = value.strip()
        return int(text.partition(".")[0]) if re.fullmatch(r"-?\d{1,18}(\.0+)?", text) else text or None
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else None


def _numbers(records: Sequence[Record]) -> dict[Id | None, int]:
    """Return the number of each id: itself, or of text that is none the next that is free."""
    ids = [plain_id(record["id"]) for record in records]
    free = count(max((one for one in ids if isinstance(one, int)), default=0) + 1)
    return {one: one if isinstance(one, int) else next(free) for one in ids}


def _with_id(record: Record, numbers: Mapping[Id | None, int]) -> Record:
    return _changed(record, id=numbers[plain_id(record["id"])])


def _changed(record: Record, **values: Any) -> Record:
    """Return the record with these values: itself where it has them, and most do."""
    same = all(type(record.get(key)) is type(value) and record[key] == value for key, value in values.items())
    return record if same else {**record, **values}


def _listed(content: Record, key: str, fields: Collection[str], found: Records) -> Iterator[Record]:
    """Yield the records under `key` that have these fields and an id of their own; count or name the others."""
    records = content.get(key)
    if not isinstance(records, list):
        raise FlawmaskError(f"{found.path} is not a COCO file: it has no list `{key}`")
    tally = {"images": found.of_images, "annotations": found.of_annotations}.get(key)
    first: dict[Id, Record] = {}
    for place, record in enumerate(records):
        is_record = isinstance(record, dict)
        missing = [field for field in fields if not is_record or field not in record]
        if key == "annotations" and is_record and "segmentation" not in record and "bbox" not in record:
            missing.append("segmentation")
        number = None if missing else plain_id(record["id"])
        if number is not None and number not in first:
            first[number] = record
            yield record
            continue
        reason, where = "bad record", f"{key}[{place}]"
        if missing:
            found.problems.append(f"{where} has no {', '.join(missing)}: export it again, or add what is missing")
        elif number is None or not _is_same(first[number], record):
            found.problems.append(f"{where} has the id {record['id']!r}, which is doubled or no number")
        else:
            reason = "listed twice"
        if key == "annotations" and is_record and reason == "bad record":
            found.doubtful.append(record.get("image_id"))
        if tally is not None:
            tally.leave_out(str(record.get("file_name", where)) if is_record else where, reason)


def _is_same(first: Record, second: Record) -> bool:
    """Return whether two records of one id say the same."""
    if "file_name" in first:
        return _plain_name(first) == _plain_name(second)
    return first == second


def _plain_name(image: Record) -> str:
    return posixpath.normpath(str(image["file_name"]))


# Categories and images.


def _one_of_each_name(categories: Sequence[Record], in_use: Collection[int | None], found: Records) -> list[Record]:
    """Return the categories; of those that share a name the one that annotations have, else the last.

    Roboflow lists the project's name first, as a category that no annotation has; a class may be called the same.
    """
    by_name: dict[Any, list[Record]] = defaultdict(list)
    for category in categories:
        name = category["name"]
        if isinstance(name, str) and name:
            by_name[name].append(category)
        else:
            why = "which is doubled or none: give each a name of its own, as text"
            found.problems.append(f"category {category['id']} has the name {name!r}, {why}")
    kept = []
    for name, of_name in by_name.items():
        used = [category for category in of_name if category["id"] in in_use] or of_name[-1:]
        kept.append(used[0])
        found.problems += [
            f"category {other['id']} has the name {name!r}, which is doubled or none: category {used[0]['id']} has it "
            "too, and both have annotations; rename one, or give all annotations one of them"
            for other in used[1:]
        ]
    return kept


def _one_good(categories: Sequence[Record], names: Collection[str]) -> tuple[list[Record], dict[int, int]]:
    """Return the categories, those that have one of the names as one category `good`, and the id of that by each id
    that it takes the place of."""
    good = [category for category in categories if category["name"] in {GOOD, *names}]
    if not good or not names:
        return list(categories), {}
    first = {**good[0], "name": GOOD}
    rest = [category for category in categories if category not in good]
    return [first, *rest], {category["id"]: first["id"] for category in good}


def _with_whole_size(image: Record) -> tuple[Record, str]:
    """Return the image's record, its sides as integers, and what is wrong with its size; nothing where it is right."""
    sides = {side: image[side] for side in ("width", "height")}
    whole = {
        side: int(value) if isinstance(value, float) and value.is_integer() else value for side, value in sides.items()
    }
    size = f"image {image['id']} has the size {image['width']!r} x {image['height']!r}"
    if not all(type(value) is int and value > 0 for value in whole.values()):
        return image, f"{size}, which is not in whole pixels"
    if whole["width"] * whole["height"] > most_pixels():
        return image, f"{size}: more than {most_pixels() // 10**6} million pixels, see {LIMIT}"
    return _changed(image, **whole), ""


def take_twice_listed_out(found: Records) -> None:
    """Leave out the records of images that an earlier or fuller record lists too.

    Raises:
        RecordsError: two of them have annotations, and not the same ones.
    """
    by_name: dict[str, list[Record]] = defaultdict(list)
    for image in found.images:
        by_name[_plain_name(image)].append(image)
    twice: dict[int, str] = {}
    unclear: dict[int, str] = {}
    for name, of_name in by_name.items():
        if len(of_name) == 1:
            continue
        first = next((image for image in of_name if found.annotations[image["id"]]), of_name[0])
        marks = [_marks(found.annotations[image["id"]]) for image in of_name]
        if any(mark and mark != _marks(found.annotations[first["id"]]) for mark in marks):
            numbers = " and ".join(str(image["id"]) for image in of_name)
            problem = f"images {numbers} are both {name} and have different annotations: give them to one of the two"
            unclear |= {image["id"]: "" for image in of_name} | {first["id"]: problem}
        else:
            twice |= {image["id"]: "" for image in of_name if image is not first}
    if twice:
        found.leave_out(twice, "listed twice")
    if unclear:
        found.leave_out(unclear, "listed twice")


def _marks(records: Sequence[Record]) -> list[Any]:
    """Return what is annotated, whatever the ids."""
    return [(one["category_id"], one["segmentation"], one["bbox"]) for one in records]


# Annotations.


class _BadRecordError(Exception):
    """An annotation that cannot be used; the message goes on after its id."""


class _NoInstanceError(Exception):
    """An annotation that marks nothing; the message is the reason in a word or two."""


def _sort_in(
    records: Sequence[Record],
    image_ids: Mapping[Id | None, int],
    category_ids: Mapping[Id | None, int],
    bad_sizes: Collection[int],
    found: Records,
) -> None:
    """Sort the annotations into their images, and leave out those that are no instances and images with bad ones."""
    images: dict[int | None, Record] = {image["id"]: image for image in found.images}
    names: dict[int | None, str] = {category["id"]: category["name"] for category in found.categories}
    found.annotations = {image["id"]: [] for image in found.images}
    doubtful = {image_ids.get(plain_id(number)) for number in found.doubtful}
    bad = {image["id"]: "" for image in found.images if image["id"] in bad_sizes or image["id"] in doubtful}
    for record in records:
        image = images.get(image_ids.get(plain_id(record["image_id"])))
        if image is None:
            found.problems.append(
                f"annotation {record['id']} belongs to image {record['image_id']!r}, which is not listed: take it out"
            )
            found.of_annotations.leave_out(str(record["id"]), "bad record")
            continue
        if image["id"] in bad_sizes:
            found.of_annotations.leave_out(_named(record, image), "image not used")
            continue
        try:
            category = _category(record, category_ids, names)
            known = _changed(record, image_id=image["id"], category_id=category)
            instance = _instance(known, image["height"], image["width"], found.reading)
        except _BadRecordError as error:
            found.problems.append(f"annotation {record['id']} {error}")
            found.of_annotations.leave_out(_named(record, image), "bad record")
            bad[image["id"]] = ""
        except _NoInstanceError as error:
            found.of_annotations.leave_out(_named(record, image), str(error))
        else:
            found.annotations[image["id"]].append(instance)
    if bad:
        names_of_bad = {_plain_name(image) for image in found.images if image["id"] in bad}
        alike = {image["id"]: "" for image in found.images if _plain_name(image) in names_of_bad}
        found.leave_out(alike, "bad record")


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
    """Return the annotation with a box, with its outline as COCO nests it, and as a crowd only where crowds are.

    Of a box alone, `segmentation` is what the box touches, `is_box` says so, and the box is cut at the image's edges.

    Raises:
        _BadRecordError: it cannot be used.
        _NoInstanceError: it has no area, or none of its pixels is in the image.
    """
    if "iscrowd" in record:
        crowd = _crowd(record["iscrowd"])
        record = _changed(record, iscrowd=0 if reading.crowds == "instances" else crowd)
    segmentation, box = record.get("segmentation"), record.get("bbox")
    has_box = box not in (None, [])
    if has_box and not is_box(box):
        raise _BadRecordError(f"has the box {box!r}, not [x, y, width, height]")
    if record.get("is_box") or segmentation in NO_OUTLINE:
        if not has_box:
            raise _BadRecordError("has neither an outline nor a box: draw it, or delete it")
        return _box_alone(record, height, width)
    nested = masks.nested(segmentation)
    if reason := masks.unusable(nested, height, width):
        raise _BadRecordError(f"has no usable segmentation: {reason}")
    if not masks.has_pixel(nested, height, width):
        raise _NoInstanceError(OUTSIDE if _is_outside(nested, height, width) else NO_PIXEL)
    if has_box and min(record["bbox"][2:]) > 0:
        return _changed(record, segmentation=nested)
    return {**record, "segmentation": nested, "bbox": list(masks.box_of_rle(masks.as_rle(nested, height, width)))}


def _crowd(value: Any) -> int:
    """Return 1 of a crowd and 0 of a single instance, whichever way that is written."""
    if value in (None, 0, "0"):
        return 0
    if value in (1, "1"):
        return 1
    raise _BadRecordError(f"has iscrowd {value!r}, which is neither 0 nor 1")


def _box_alone(record: Record, height: int, width: int) -> Record:
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
