"""Read COCO files, with or without splits: exports of Roboflow, CVAT and Label Studio, and Flawmask's COCO folders.

`flawmask.coco` describes how records are read. The images of all splits are joined.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from flawmask.coco import CocoSplit, Record, read_files, read_split
from flawmask.coco_files import SplitFiles, annotation_files, files_in, split_names
from flawmask.coco_records import NOT_LISTED
from flawmask.data.imports.labels import Box, LabelledImage, Labels, Region, Shape
from flawmask.errors import FlawmaskError

log = logging.getLogger(__name__)

NAME = "COCO"

_VARIANT = re.compile(r"^(.+)\.rf\.[0-9A-Za-z]+\.\w+$")
"""A file name of Roboflow. Images whose names have the same beginning are variants of the same image."""


def detects(source: Path) -> bool:
    """Return whether a folder has the splits of a COCO folder."""
    return source.is_dir() and bool(split_names(source))


def is_own(content: Any) -> bool:
    """Return whether a JSON file is a COCO file."""
    return isinstance(content, dict) and isinstance(content.get("images"), list) and "categories" in content


def read(labels: Labels) -> None:
    """Read every split of a COCO folder, or its only file.

    Raises:
        FlawmaskError: a split cannot be used, its categories differ from those of another split, or it holds variants
            made by augmentation.
    """
    splits = list(_splits(labels))
    for split in splits:
        if split.categories != splits[0].categories:
            raise FlawmaskError(
                f"{split.annotation_file} has other categories than {splits[0].annotation_file}: export both with the "
                "same ones"
            )
        if any("augmentation" in image for image in split.images):
            raise FlawmaskError(f"{split.folder} holds variants: take the data set that they were made from")
    labels.categories = list(splits[0].categories)
    names = [Path(str(image["file_name"])).name for split in splits for image in split.images]
    variants = Counter(match[1] for match in map(_VARIANT.match, names) if match)
    for split in splits:
        _note_unused(split, labels)
        labels.images += [_image(split, image, labels, variants) for image in split.images]


def _splits(labels: Labels) -> Iterator[CocoSplit]:
    source = labels.source
    names = split_names(source) if source.is_dir() else []
    if names:
        yield from (read_split(source, name, labels.reading, opens_images=False) for name in names)
    elif source.is_dir():
        found = annotation_files(source)
        if not found:
            raise FlawmaskError(f"{source} holds no COCO file: name the file, or the folder it is in")
        place = files_in(source)
        yield _read_file(labels, place.folder, place.annotation_file)
    else:
        yield _read_file(labels, labels.root, source)


def _read_file(labels: Labels, folder: Path, path: Path) -> CocoSplit:
    place = SplitFiles(folder, path, (labels.root / "images", labels.root))
    return read_files(place, labels.reading, opens_images=False)


def _note_unused(split: CocoSplit, labels: Labels) -> None:
    """Note what was left out while reading the split. Crowds are kept: training decides how to treat them."""
    for problem in split.problems:
        log.warning("left out: %s: %s", split.annotation_file, problem)
    for tally, of_split in zip((labels.unused_images, labels.unused_annotations), split.tallies, strict=True):
        for reason, names in of_split.not_used.items():
            for name in names if reason not in ("crowd", NOT_LISTED) else ():
                tally.leave_out(name, reason)
    for reason, names in split.tallies[0].not_used.items():
        for name in names if reason != NOT_LISTED else ():
            with suppress(FlawmaskError):  # the file may be missing
                labels.image_file(name, split.annotation_file, beside=split.image_folder)


def _image(split: CocoSplit, image: Record, labels: Labels, variants: Counter[str]) -> LabelledImage:
    path = split.image_path(image)
    labels.note_named(path)
    match = _VARIANT.match(path.name)
    parts = [str(image["group"])] if image.get("group") is not None else []
    parts += [match[1]] if match and variants[match[1]] > 1 else []
    names = {category["id"]: str(category["name"]) for category in split.categories}
    regions = [
        Region(
            names[record["category_id"]],
            _shape(record),
            f"annotation {record['id']} of {split.name}",
            {key: record[key] for key in ("iscrowd", "attributes") if record.get(key)},
        )
        for record in split.annotations[image["id"]]
    ]
    kind = image.get("defect_type")
    return LabelledImage(
        path=path,
        original_file=str(image.get("original_file") or labels.name_of(path)),
        regions=regions,
        size=(image["width"], image["height"]),
        parts=tuple(parts),
        defect_type=None if kind is None else str(kind),
    )


def _shape(record: Record) -> Shape:
    outline = None if record.get("is_box") else record.get("segmentation")
    return (lambda _height, _width: outline) if outline else (lambda _height, _width: Box(*record["bbox"]))
