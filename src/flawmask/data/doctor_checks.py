"""Check single images with their masks or annotations, in a category or in a COCO folder."""

import logging
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Literal

import cv2
import numpy as np

from flawmask import images
from flawmask.coco import CocoSplit, Record, instance_masks, read_split, without_crowds
from flawmask.coco_files import has_split
from flawmask.coco_records import NO_INSTANCE, NOT_LISTED
from flawmask.data import mask_files
from flawmask.data.layouts import MaskFile, Problem, Sample, where_of
from flawmask.data.mask_files import ImageGeometry, MaskSettings, OrientationError
from flawmask.draw import Picture
from flawmask.errors import FlawmaskError, ImageError, RecordsError
from flawmask.files import walk
from flawmask.good_names import GOOD, looks_good
from flawmask.images import Pixels
from flawmask.masks import Mask, box_of, looks_inverted
from flawmask.settings import Reading
from flawmask.tally import Tally

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")

# Other tools measure the polygon, while Flawmask counts pixels. Smaller differences than these are not faults.
BOX_TOLERANCE = 1.5  # pixels
AREA_TOLERANCE = 0.05  # share of the mask's pixels

DARK = 16
"""A pixel below this level, of 255, counts as black. A pixel that is this close to 255 counts as white."""
FEW_PIXELS = 0.001
"""A picture counts as black if fewer than this share of its pixels are brighter, such as hot pixels of the camera."""


@dataclass(frozen=True)
class Truth:
    """The ground truth of an image: one mask of all defects (None if there is none), their number, and problems."""

    mask: Mask | None
    instances: int
    problems: list[Problem]


@dataclass(frozen=True)
class Item:
    """An image to check.

    Attributes:
        path: the image file.
        where: its place in the data set, for messages.
        name: its original file name.
        group: the part that it shows; None if unknown.
        split: its split.
        type: its defect type.
        defective: whether it has a defect.
        variant: whether it was made by augmentation.
        labels: the names of its masks or annotations.
        truth: reads its ground truth, given the size and orientation of the image.
    """

    path: Path
    where: str
    name: str
    group: str | None
    split: str
    type: str
    defective: bool
    variant: bool
    labels: tuple[str, ...]
    truth: Callable[[ImageGeometry], Truth]


def category_items(
    samples: Sequence[Sample], root: Path, category: str, settings: MaskSettings
) -> tuple[list[Item], list[Problem]]:
    """Return the images of a category, in order, and the problems that concern all of its masks together."""
    problems = []
    try:
        samples, chosen = mask_files.choose_rule(samples, settings)
    except FlawmaskError as error:
        return [], [Problem("error", "masks of two kinds", category, f"cannot be read: {error}")]
    if chosen is not None and chosen.warning and chosen.rule != "white":  # for white, each mask is reported
        problems.append(Problem("warning", "mask values", category, chosen.warning))
    if chosen is not None:
        log.info("masks of %s: %s", category, chosen)
    return [_sample_item(sample, root, settings) for sample in samples], problems


def unused_files(tallies: Sequence[Tally], reasons: Container[str], known: Sequence[Problem]) -> Iterator[Problem]:
    """Yield a problem for each file that is not used.

    Args:
        tallies: the tallies of images and annotations.
        reasons: the reasons that are not reported.
        known: problems that were reported before, about the same file or, for masks, about their folder.
    """
    named = {PurePosixPath(problem.where) for problem in known}
    folders = {PurePosixPath(problem.where) for problem in known if problem.kind == "orphan masks"}
    for tally in tallies:
        for reason, names in tally.not_used.items():
            for name in names if reason not in reasons else ():
                path = PurePosixPath(name)
                if path not in named and folders.isdisjoint(path.parents):
                    yield Problem("warning", "not used", name, f"is not used ({reason}): move it, or delete it")


def unreadable(error: ImageError, path: Path, where: str) -> Problem:
    """Return the problem for a file that cannot be read. Its message does not repeat the path."""
    return Problem("error", "unreadable image", where, str(error).removeprefix(f"{path} "))


def brightness(image: Picture, where: str) -> Iterator[Problem]:
    """Yield a problem for a picture that is nearly black or white, perhaps because of wrong intensity levels.

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
        labels=tuple(dict.fromkeys(where_of(file.path, root) for file in sample.masks)),
        truth=partial(_sample_truth, sample, root, settings),
    )


def _sample_truth(sample: Sample, root: Path, settings: MaskSettings, image: ImageGeometry) -> Truth:
    """Read the sample's masks and return its ground truth."""
    if not sample.is_good and not sample.masks:
        advice = f"draw {sample.mask_wanted}, or {sample.if_good}"
        return Truth(None, 0, [Problem("error", "mask missing", sample.original_file, f"has no mask: {advice}")])
    truths = [_mask_truth(file, root, settings, image) for file in sample.masks]
    masks = [truth.mask for truth in truths if truth.mask is not None]
    pairs = [(file.path, truth.mask) for file, truth in zip(sample.masks, truths, strict=True)]
    marked = {path for path, mask in pairs if mask is not None and mask.any()}
    for file, truth in zip(sample.masks, truths, strict=True):
        if truth.mask is not None and file.path not in marked:
            marked.add(file.path)  # report a file once, even if several rules read it
            message = f"has no defect pixel: draw the defect white, or {sample.if_good}"
            truth.problems.append(Problem("error", "mask empty", where_of(file.path, root), message))
    return Truth(
        np.logical_or.reduce(masks) if masks else None,
        sum(truth.instances for truth in truths),
        [problem for truth in truths for problem in truth.problems],
    )


def _mask_truth(file: MaskFile, root: Path, settings: MaskSettings, image: ImageGeometry) -> Truth:
    """Read one mask and return its ground truth. An empty mask is reported elsewhere."""
    where = where_of(file.path, root)
    try:
        pixels = mask_files.pixels_of(images.read_bytes(file.path), file, image, settings)
    except ImageError as error:
        return Truth(None, 0, [unreadable(error, file.path, where)])
    except OrientationError as error:
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


def coco_items(
    dataset_dir: Path, crowds: Literal["ignore", "instances"], good_name: str | None, tallies: tuple[Tally, Tally]
) -> tuple[list[Item], list[Problem], list[CocoSplit]]:
    """Return the images of all usable splits, the problems of the splits themselves, and these splits.

    Args:
        dataset_dir: the COCO folder.
        crowds: how crowds are treated.
        good_name: the name of the good images, from `--good_name`; None if it is not given.
        tallies: the tallies of images and annotations, to which the unusable ones are added.
    """
    chosen = Reading(crowds=crowds, on_error="skip", good_name=good_name)
    items: list[Item] = []
    splits: list[CocoSplit] = []
    problems: list[Problem] = []
    for name in [name for name in SPLITS if has_split(dataset_dir, name)] or SPLITS[:1]:
        try:
            split = read_split(dataset_dir, name, chosen, opens_images=False)
        except FlawmaskError as error:
            if not has_split(dataset_dir, name):
                raise
            if isinstance(error, RecordsError):
                problems += [Problem("error", "unusable record", name, problem) for problem in error.problems]
                continue
            problems.append(Problem("error", "unusable split", name, f"cannot be used: {error}"))
            continue
        splits.append(split)
        items += [_record_item(split, image) for image in split.images]
        problems += [Problem("error", "unusable record", name, problem) for problem in split.problems]
        problems += _split_problems(split, asks_for_good=good_name is None)
        for tally, of_split in zip(tallies, split.tallies, strict=True):
            tally.add(replace(of_split, used=0))  # the used ones are counted after their images are checked
    if not any(problem.kind == "unusable split" for problem in problems):
        for name in _unlisted_in_shared_folders(dataset_dir, splits):
            tallies[0].leave_out(name, NOT_LISTED)
            problems.append(_unlisted_image(name))
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
        labels=tuple(
            f"{record['id']} of {image['file_name']}" for record in without_crowds(split.annotations[image["id"]])
        ),
        truth=partial(_record_truth, split, image),
    )


def _record_truth(split: CocoSplit, image: Record, actual: ImageGeometry) -> Truth:
    """Decode the annotations of an image and return its ground truth."""
    height, width = actual.height, actual.width
    where = f"{split.name}/images/{image['file_name']}"
    defects = without_crowds(split.defects(image))
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
    """Yield a problem if an annotation's box or area does not fit its mask or the image."""
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
    area = record.get("area", pixels)  # not every tool writes the area
    if not pixels:
        yield Problem("error", "mask empty", where, f"{who} has a segmentation without a pixel: remove or redraw it")
    elif record.get("is_box"):  # its true area is not known
        return
    elif not isinstance(area, int | float) or abs(area - pixels) > max(2, AREA_TOLERANCE * pixels):
        yield Problem("warning", "area", where, f"{who} has the area {area} but its mask {pixels} pixels")


def _split_problems(split: CocoSplit, *, asks_for_good: bool) -> Iterator[Problem]:
    """Yield the problems of a split as a whole.

    Args:
        split: the split.
        asks_for_good: whether to report a category whose name may mean good: `--good_name` is not given.
    """
    name = split.name
    unmarked = set()
    for reason, left in split.tallies[1].not_used.items():
        if reason in NO_INSTANCE:
            for number, _, file in (name.partition(" of ") for name in left):
                unmarked.add(file)
                message = f"annotation {number} is no instance: {reason}; remove or redraw it"
                yield Problem("error", "mask empty", f"{name}/images/{file}", message)
    yield from _crowd_problems(split)
    boxes = split.box_only_defects
    if boxes:
        message = (
            f"has {len(boxes)} defects with a box but no mask (annotation {boxes[0]['id']}, for example): networks "
            "that predict boxes learn them, networks that predict masks do not"
        )
        yield Problem("warning", "box alone", name, message)
    used = {record["category_id"] for records in split.annotations.values() for record in records}
    for category in split.categories:
        if category["id"] not in used and category["name"] != GOOD:
            message = (
                f"has no annotation of category {category['id']} {category['name']}: it cannot be learnt or evaluated"
            )
            yield Problem("warning", "empty category", name, message)
    for category in split.categories:
        if not asks_for_good or category["name"] == GOOD or not looks_good(category["name"]):
            continue
        message = (
            f"has the category {category['name']}, which counts as a defect. If it is for good images, give "
            f"--good_name {category['name']}; if it is a defect, --good_name {GOOD}"
        )
        yield Problem("error" if category["id"] in used else "warning", "good by another name", name, message)
    # An image without annotations is right if its record says `good`. Otherwise it may have been forgotten.
    bare = [
        image
        for image in split.images
        if not split.annotations[image["id"]]
        and image.get("defect_type") != GOOD
        and str(image["file_name"]) not in unmarked
    ]
    if bare:
        share = f"{len(bare)} of {len(split.images)} images"
        message = f"has {share} without annotation (the first is {bare[0]['file_name']}): they count as good"
        yield Problem("warning", "no annotation", name, message)
    for file in split.tallies[0].not_used.get(NOT_LISTED, ()):
        yield _unlisted_image(f"{name}/images/{file}")


def _unlisted_image(where: str) -> Problem:
    return Problem("warning", "unlisted image", where, "is not in the annotation file and is not used")


def _unlisted_in_shared_folders(dataset_dir: Path, splits: Sequence[CocoSplit]) -> Iterator[str]:
    """Yield the images that no split lists, in folders that hold the images of several splits."""
    listed = {
        split.image_folder / str(file)
        for split in splits
        for names in ([image["file_name"] for image in split.images], *split.tallies[0].not_used.values())
        for file in names
    }
    for folder in sorted({split.image_folder for split in splits if split.annotations_in.startswith("..")}):
        for path in walk(folder):
            if images.is_readable(path) and path not in listed:
                listed.add(path)
                yield where_of(path, dataset_dir)


def _crowd_problems(split: CocoSplit) -> Iterator[Problem]:
    """Yield a warning about crowds, or an error if all defects are crowds."""
    crowds, defects = len(split.crowds), sum(len(split.defects(image)) for image in split.images)
    if not crowds:
        return
    message = (
        f"has {crowds} of {defects} defects as crowds (iscrowd: 1), as brushes of labelling tools write them: use "
        "them as instances with --crowds instances, or export polygons; nothing is learnt from a crowd"
    )
    yield Problem("error" if crowds == defects else "warning", "crowd", split.name, message)
