"""Read YOLO's labels: a text file for each image, with a line for each object
(https://docs.ultralytics.com/datasets/segment/ and https://docs.ultralytics.com/datasets/detect/).

A line has the number of the class and either a polygon, `x1 y1 x2 y2 ...`, or a box, `x-centre y-centre width height`,
as fractions of the image's size. The text file has the same name as its image. It lies beside the image, or in the
folder whose path has `labels` in place of `images`, or anywhere if no other image has this name. In this format, an
image without a text file is good. The class names come from `data.yaml` (`names`), or from `classes.txt` or
`obj.names`, with a line for each class.
"""

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from flawmask.data.imports.labels import Box, LabelledImage, Labels, Region, Shape, files_below, polygon
from flawmask.errors import FlawmaskError
from flawmask.images import READABLE
from flawmask.masks import Segmentation

log = logging.getLogger(__name__)

NAME = "YOLO"

LISTS = ("classes.txt", "obj.names", "predefined_classes.txt")
"""Files that list the class names if there is no `data.yaml`."""

LABELS = "labels"

MAX_FRACTION = 2.0
"""The largest coordinate that is taken for a fraction. Rounding may give slightly more than 1; pixels give far more."""

OTHERS = (*LISTS, "train.txt", "val.txt", "valid.txt", "test.txt", "obj.data")
"""Text files that are not labels: lists of names and of images. READMEs are skipped too."""


def detects(source: Path) -> bool:
    """Return whether a folder holds a list of classes in YOLO's form, and text files that may be labels."""
    root = _root(source)
    return (bool(_yaml_files(root)) or any(_lists(root))) and any(_label_files(root))


def _root(source: Path) -> Path:
    return source if source.is_dir() else source.parent


def _yaml_files(root: Path) -> list[Path]:
    found = []
    for path in sorted(files_below(root, ".yaml", ".yml"), key=lambda path: len(path.parts)):
        content = _yaml(path)
        if isinstance(content, dict) and "names" in content:
            found.append(path)
    return found


def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return None


def _lists(root: Path) -> Iterator[Path]:
    return (path for path in files_below(root, ".txt", ".names") if path.name.lower() in LISTS)


def _label_files(root: Path) -> Iterator[Path]:
    for path in files_below(root, ".txt"):
        if path.name.lower() not in OTHERS and not path.name.lower().startswith("readme"):
            yield path


def read(labels: Labels) -> None:
    """Read the text file of each image in and below the source, or below the folder of a `data.yaml`.

    Raises:
        FlawmaskError: no file lists the class names.
    """
    root = _root(labels.source)
    names = _names(labels.source, root)
    labels.classes += names.values()
    labels.unlabelled_is_good = True
    paths = list(files_below(labels.root, *READABLE))
    images = {path.with_suffix(""): path for path in reversed(paths)}
    by_name: dict[str, list[Path]] = defaultdict(list)
    by_place: dict[Path, list[Path]] = defaultdict(list)
    for path in paths:
        by_name[path.stem].append(path)
        by_place[path.with_suffix("")].append(path)
    for path in _label_files(root):
        image = _image_of(path.relative_to(root), images, labels.root)
        if image is None and len(by_name[path.stem]) == 1:
            (image,) = by_name[path.stem]
        if image is None and LABELS not in path.relative_to(root).parts:
            log.warning("%s is not read: no image belongs to it", path)
            continue
        twins = by_place[image.with_suffix("")][1:] if image else []
        for twin in twins:  # nobody knows whether it is good
            with labels.noting_errors(path.as_posix(), NAME):
                labels.note_named(twin)
                raise FlawmaskError(_ambiguous_message(path, image, twin))
        with labels.noting_errors(path.as_posix(), NAME):
            lines = [(number, line) for number, line in enumerate(_lines(path), start=1) if line.strip()]
            labels.expect_annotations(len(lines))
            if image is None:
                raise FlawmaskError(
                    f"{path} has no image: put the image into images/ beside labels/, or give --image_dir"
                )
            labels.note_named(image)
            if twins:
                raise FlawmaskError(_ambiguous_message(path, image, twins[0]))
            name = labels.name_of(image)
            regions = [_region(line, number, names, path) for number, line in lines]
            labels.images.append(LabelledImage(image, name, regions))


def _ambiguous_message(path: Path, image: Path | None, twin: Path) -> str:
    return f"{path} may belong to {image} or to {twin}: remove one of the images, or rename it"


def _names(source: Path, root: Path) -> dict[int, str]:
    """Return the class names by their numbers.

    Raises:
        FlawmaskError: no file lists the class names.
    """
    files = [source] if source.is_file() else _yaml_files(root)
    if files:
        content = _yaml(files[0])
        names = content.get("names") if isinstance(content, dict) else None
        pairs = names.items() if isinstance(names, dict) else enumerate(names or ())
        classes = {int(number): str(name) for number, name in pairs}
    else:
        path = next(_lists(root), None)
        lines = _lines(path) if path else []
        classes = {number: line.strip() for number, line in enumerate(lines) if line.strip()}
    if not classes:
        raise FlawmaskError(f"{root} has no names for its classes: add data.yaml with `names`, or classes.txt")
    return classes


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise FlawmaskError(f"{path} is not in UTF-8: save it in UTF-8 again") from None


def _image_of(path: Path, images: Mapping[Path, Path], root: Path) -> Path | None:
    """Return the image of a text file, or None.

    Args:
        path: the text file, relative to the source's folder.
        images: the images by their paths without suffix.
        root: the folder with the images, in it or below.
    """
    parts = path.with_suffix("").parts
    indices = [index for index, part in enumerate(parts) if part == LABELS]
    swapped = [Path(*parts[:index], "images", *parts[index + 1 :]) for index in reversed(indices)]
    bare = [Path(*parts[:index], *parts[index + 1 :]) for index in reversed(indices)]  # if `root` is the images folder
    candidates = [*swapped, *bare, Path(*parts)]
    return next((images[root / candidate] for candidate in candidates if root / candidate in images), None)


def _region(line: str, number: int, names: dict[int, str], path: Path) -> Region:
    who = f"{path}: line {number}"
    try:
        first, *values = (float(word) for word in line.split())
    except ValueError:
        raise FlawmaskError(f"{who} is not as YOLO writes it: {line[:40]!r}") from None
    label = names.get(int(first))
    if label is None:
        raise FlawmaskError(f"{who} has the class {first:g}, which has no name: there are {', '.join(names.values())}")
    largest = max(map(abs, values), default=0.0)
    if largest > MAX_FRACTION:
        raise FlawmaskError(
            f"{who} has the number {largest:g}, but YOLO writes fractions of the image's size, from 0 to 1: divide by "
            "the size"
        )
    return Region(label, _shape(values, who), f"line {number} of {path.name}")


def _shape(values: Sequence[float], who: str) -> Shape:
    if len(values) == 4:
        x, y, across, down = values
        return partial(_box, x, y, across, down)
    if len(values) < 6 or len(values) % 2:
        raise FlawmaskError(
            f"{who} has {len(values)} numbers behind the class: a box has 4, a polygon 6 or more, in pairs"
        )
    points = list(zip(values[::2], values[1::2], strict=True))
    return lambda height, width: polygon(points, width, height)


def _box(x: float, y: float, across: float, down: float, height: int, width: int) -> Segmentation | Box:
    return Box((x - across / 2) * width, (y - down / 2) * height, across * width, down * height)
