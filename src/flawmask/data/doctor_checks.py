"""What can be wrong with one image, its masks or its annotations: of a category, or of a COCO folder."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from flawmask import images
from flawmask.coco import GOOD, CocoSplit, Record, instance_masks, read_split, split_folder
from flawmask.data import layouts, mask_files
from flawmask.data.layouts import MaskFile, Problem, Sample
from flawmask.data.mask_files import MaskSettings, TurnedError, TurnedImage
from flawmask.draw import Picture
from flawmask.errors import FlawmaskError, ImageError, RecordsError
from flawmask.images import Pixels
from flawmask.masks import Mask, box_of, looks_inverted

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")

# Other tools measure the polygon where Flawmask counts pixels: a difference below these is theirs, not a fault.
BOX_TOLERANCE = 1.5  # pixels
AREA_TOLERANCE = 0.05  # of the mask's pixels

DARK = 16
"""Below this level, of 255, a pixel is as good as black; so far from the top it is as good as white."""
FEW_PIXELS = 0.001
"""So few brighter ones, of all, leave a picture black: hot pixels of the camera."""


@dataclass(frozen=True)
class Truth:
    """What is marked on an image: one mask of all its defects, None without any; how many there are; what is wrong."""

    mask: Mask | None
    instances: int
    problems: list[Problem]


@dataclass(frozen=True)
class Item:
    """An image to check: where it stands in the data set, what its file was called first, what part it shows if that is
    known, and what reads its truth, given height, width and Exif orientation."""

    path: Path
    where: str
    name: str
    group: str | None
    split: str
    type: str
    defective: bool
    variant: bool
    truth: Callable[[TurnedImage], Truth]


def category_items(
    root: Path, category: str, layout: str, good_images: Literal["test", "all"], settings: MaskSettings
) -> tuple[list[Item], list[Problem]]:
    """Return the images of a category, and what is wrong with its folders, file names and masks as a whole.

    Raises:
        FlawmaskError: there is no such category, or no image in it.
    """
    samples = layouts.taking_part(layouts.samples(root, category, layout), good_images)
    found = layouts.problems(root, category, layout)
    try:
        samples, reading = mask_files.with_rule(samples, settings)
    except FlawmaskError as error:
        return [], [*found, Problem("error", "masks of two kinds", category, f"cannot be read: {error}")]
    if reading is not None and reading.several and reading.rule != "white":  # of white, each mask says it
        found.append(Problem("warning", "mask values", category, reading.several))
    if reading is not None:
        log.info("masks of %s: %s", category, reading)
    return [_sample_item(sample, root, settings) for sample in samples], found


def unreadable(error: ImageError, path: Path, where: str) -> Problem:
    """Return the problem that a file which cannot be read is; its message does not repeat the path."""
    return Problem("error", "unreadable image", where, str(error).removeprefix(f"{path} "))


def brightness(image: Picture, where: str) -> Iterator[Problem]:
    """Yield a problem for a picture that is nearly black or white, as it is where its range of grey is not known.

    Args:
        image: (height, width, 3) uint8 RGB.
        where: its place in the data set.
    """
    few = FEW_PIXELS * image.size
    message = "is nearly %s as networks see it: look at the exposure, or at --intensity if it has more than 8 bits"
    if np.count_nonzero(image >= DARK) < few:
        yield Problem("warning", "nearly black", where, message % "black")
    elif np.count_nonzero(image <= 255 - DARK) < few:
        yield Problem("warning", "nearly white", where, message % "white")


# A category.


def _sample_item(sample: Sample, root: Path, settings: MaskSettings) -> Item:
    return Item(
        path=sample.image,
        where=sample.original_file,
        name=sample.image.name,
        group=sample.group,
        split=sample.origin,
        type=sample.defect_type,
        defective=not sample.is_good,
        variant=False,
        truth=partial(_sample_truth, sample, root, settings),
    )


def _sample_truth(sample: Sample, root: Path, settings: MaskSettings, image: TurnedImage) -> Truth:
    """Read the sample's masks, and return what is wrong with them."""
    if not sample.is_good and not sample.masks:
        advice = f"draw {sample.mask_wanted}, or move it to {sample.good_folder}"
        return Truth(None, 0, [Problem("error", "mask missing", sample.original_file, f"has no mask: {advice}")])
    truths = [_mask_truth(file, root, settings, image) for file in sample.masks]
    masks = [truth.mask for truth in truths if truth.mask is not None]
    there = [(file.path, truth.mask) for file, truth in zip(sample.masks, truths, strict=True)]
    marked = {path for path, mask in there if mask is not None and mask.any()}
    for file, truth in zip(sample.masks, truths, strict=True):
        if truth.mask is not None and file.path not in marked:
            marked.add(file.path)  # said once, though several rules may have looked at it
            where = file.path.relative_to(root).as_posix()
            message = f"has no defect pixel: draw the defect white, or move the image to {sample.good_folder}"
            truth.problems.append(Problem("error", "mask empty", where, message))
    return Truth(
        np.logical_or.reduce(masks) if masks else None,
        sum(truth.instances for truth in truths),
        [problem for truth in truths for problem in truth.problems],
    )


def _mask_truth(file: MaskFile, root: Path, settings: MaskSettings, image: TurnedImage) -> Truth:
    """Read one mask, and return what is wrong with it, but for its being empty."""
    where = file.path.relative_to(root).as_posix()
    try:
        pixels = mask_files.pixels_of(images.read_bytes(file.path), file, image, settings)
    except ImageError as error:
        return Truth(None, 0, [unreadable(error, file.path, where)])
    except TurnedError as error:
        return Truth(None, 0, [Problem("error", "mask turned", where, str(error).removeprefix(f"{file.path} "))])
    if pixels.shape[:2] != (image.height, image.width):
        sizes = f"is {pixels.shape[1]}x{pixels.shape[0]} but its image is {image.width}x{image.height}"
        return Truth(None, 0, [Problem("error", "mask size", where, f"{sizes}: export the mask at the image's size")])
    try:
        mask = file.rule(pixels)
    except FlawmaskError as error:
        return Truth(None, 0, [Problem("error", "mask values", where, str(error).removeprefix(f"{file.path} "))])
    count, _ = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    problems = [*(_value_problems(pixels, where) if (file.part, file.rule) == ("colour", images.white) else ())]
    if looks_inverted(mask):
        message = "is white in all four corners: if the defect is what is black, invert it"
        problems.append(Problem("warning", "mask inverted", where, message))
    return Truth(mask, count - 1, problems)


def _value_problems(pixels: Pixels, where: str) -> Iterator[Problem]:
    """Yield a problem for a mask that is not black and white."""
    values = np.unique(pixels)
    if len(values) > 2 or (len(values) == 2 and values[0] != 0):
        shown = ", ".join(str(value) for value in values[:3]) + (", ..." if len(values) > 3 else "")
        message = f"holds the values {shown}, and only those above half count as defect: export it as black and white"
        yield Problem("warning", "mask not binary", where, message)


# A COCO folder.


def coco_items(dataset_dir: Path) -> tuple[list[Item], list[Problem], list[CocoSplit]]:
    """Return the images of all splits that are there and can be used, what is wrong with the splits themselves, and
    these splits."""
    items: list[Item] = []
    splits: list[CocoSplit] = []
    problems: list[Problem] = []
    for name in [name for name in SPLITS if split_folder(dataset_dir, name).is_dir()] or SPLITS[:1]:
        try:
            split = read_split(dataset_dir, name)
        except FlawmaskError as error:
            if not split_folder(dataset_dir, name).is_dir():
                raise
            if isinstance(error, RecordsError):
                problems += [Problem("error", "unusable record", name, problem) for problem in error.problems]
                continue
            problems.append(Problem("error", "unusable split", name, f"cannot be used: {error}"))
            continue
        splits.append(split)
        items += [_record_item(split, image) for image in split.images]
        problems += _split_problems(split)
    return items, problems, splits


def _record_item(split: CocoSplit, image: Record) -> Item:
    names = {category["id"]: category["name"] for category in split.categories}
    marked = [*split.defects(image), *split.annotations[image["id"]]]
    return Item(
        path=split.image_path(image),
        where=f"{split.name}/images/{image['file_name']}",
        name=Path(str(image.get("original_file", image["file_name"]))).name,
        group=None if image.get("group") is None else str(image["group"]),
        split=split.name,
        type=str(image.get("defect_type") or (names[marked[0]["category_id"]] if marked else "no annotation")),
        defective=split.is_defective(image),
        variant="augmentation" in image,
        truth=partial(_record_truth, split, image),
    )


def _record_truth(split: CocoSplit, image: Record, seen: TurnedImage) -> Truth:
    """Decode the annotations of an image, and return what is wrong with them."""
    height, width = seen.height, seen.width
    where = f"{split.name}/images/{image['file_name']}"
    defects = split.defects(image)
    if (image["width"], image["height"]) != (width, height):
        sizes = f"is {width}x{height} but its record says {image['width']}x{image['height']}"
        message = f"{sizes}: export the annotations again; they were not checked"
        return Truth(None, len(defects), [Problem("error", "image size", where, message)])
    problems: list[Problem] = []
    union = np.zeros((height, width), dtype=bool)
    for record in split.annotations[image["id"]]:
        (mask,) = instance_masks([record], height, width, where)
        problems += _annotation_problems(record, mask, where)
        if record["category_id"] in split.defect_ids:
            union |= mask
    return Truth(union, len(defects), problems)


def _annotation_problems(record: Record, mask: Mask, where: str) -> Iterator[Problem]:
    """Yield what is wrong with an annotation's box and area, held against its mask and the image."""
    who = f"annotation {record['id']}"
    height, width = mask.shape
    x, y, across, down = box = record["bbox"]
    if not (across > 0 and down > 0):
        yield Problem("error", "box", where, f"{who} has a box of {across:g}x{down:g} pixels: remove or redraw it")
    elif min(x, y) < -BOX_TOLERANCE or x + across > width + BOX_TOLERANCE or y + down > height + BOX_TOLERANCE:
        yield Problem("error", "box", where, f"{who} has the box {record['bbox']}, outside its {width}x{height} image")
    elif mask.any() and np.abs(np.subtract(box, box_of(mask))).max() > BOX_TOLERANCE:
        message = f"{who} has the box {record['bbox']} but its mask covers {list(box_of(mask))}: export it again"
        yield Problem("warning", "box and mask", where, message)
    pixels = int(np.count_nonzero(mask))
    area = record.get("area", pixels)  # not every tool writes it
    if not pixels:
        yield Problem("error", "mask empty", where, f"{who} has a segmentation without a pixel: remove or redraw it")
    elif not isinstance(area, int | float) or abs(area - pixels) > max(2, AREA_TOLERANCE * pixels):
        yield Problem("warning", "area", where, f"{who} has the area {area} but its mask {pixels} pixels")


def _split_problems(split: CocoSplit) -> Iterator[Problem]:
    """Yield what is wrong with a split as a whole."""
    name, folder = split.name, split.image_folder
    used = {record["category_id"] for records in split.annotations.values() for record in records}
    for category in split.categories:
        if category["id"] not in used and category["name"] != GOOD:
            message = (
                f"has no annotation of category {category['id']} {category['name']}: it cannot be learnt or judged"
            )
            yield Problem("warning", "empty category", name, message)
    # An image said to be good needs no annotation; one that says nothing may have been forgotten.
    bare = [image for image in split.images if not split.annotations[image["id"]] and image.get("defect_type") != GOOD]
    if bare:
        share = f"{len(bare)} of {len(split.images)} images"
        message = f"has {share} without annotation (the first is {bare[0]['file_name']}): they count as good"
        yield Problem("warning", "no annotation", name, message)
    listed = {split.image_path(image) for image in split.images}
    for path in sorted(folder.rglob("*")):
        if images.is_image(path) and path not in listed:
            where = f"{name}/images/{path.relative_to(folder).as_posix()}"
            yield Problem("warning", "unlisted image", where, "is not in annotations.json and takes no part")
