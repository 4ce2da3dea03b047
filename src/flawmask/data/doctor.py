"""What is wrong with a data set, before hours go into training on it: an MVTec-layout category or a COCO folder.

Every image is read once, by all cores; a fault becomes a row of the report, never an exception.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from rich.table import Table
from rich.text import Text

from flawmask import draw, images
from flawmask.coco import GOOD, CocoSplit, Record, instance_masks, read_split
from flawmask.data.duplicates import Compared, Look, alike, identical, look_of
from flawmask.data.mvtec import Sample, scan
from flawmask.draw import Picture
from flawmask.errors import FlawmaskError, ImageError
from flawmask.files import sha256
from flawmask.images import Pixels
from flawmask.masks import Mask, box_of
from flawmask.progress import track
from flawmask.settings import require

SPLITS = ("train", "val", "test")

CELL = (240, 240)  # of the contact sheet, pixels
COLUMNS = 8
SHOWN = 5  # examples of each kind of problem in the table

# Other tools measure the polygon where Flawmask counts pixels: a difference below these is theirs, not a fault.
BOX_TOLERANCE = 1.5  # pixels
AREA_TOLERANCE = 0.05  # of the mask's pixels


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Check a category in MVTec AD's layout or a COCO folder: counts, masks, damaged and doubled images."""

    mvtec_root: Path = Path("datasets/mvtec")
    """The folder that holds the categories."""
    category: str | None = None
    """The category to check: a folder name under mvtec_root. Either this or dataset_dir."""
    dataset_dir: Path | None = None
    """The COCO folder to check, with train/, val/ or test/. Either this or category."""
    good_images: Literal["test", "all"] = "all"
    """Which good images of a category are checked: those in test/good, or those in train/good too."""
    contact_sheet: Path | None = None
    """Where the sheet of outlined images goes; by default doctor_<name>.png in the current folder."""
    sheet_images: int = 48
    """Most images on the contact sheet, taken evenly from all defect types; 0 makes no sheet."""

    def __post_init__(self) -> None:
        require(
            (self.category is None) != (self.dataset_dir is None),
            "name either a --category or a --dataset_dir to check, and not both",
        )
        require(self.sheet_images >= 0, f"--sheet_images is {self.sheet_images}: it must be 0 or more")

    @property
    def name(self) -> str:
        """What is checked: the category's or the COCO folder's name."""
        return self.category or (self.dataset_dir or Path()).resolve().name


@dataclass(frozen=True)
class Problem:
    """One thing found.

    Attributes:
        severity: `error` where training would stop or its figures would be wrong, `warning` where a person should look.
        kind: two or three words, the same for all problems of the kind.
        where: the file it is about, relative to what is checked, or a split.
        message: what is wrong and what to do; it reads on from `where`.
    """

    severity: Literal["error", "warning"]
    kind: str
    where: str
    message: str


@dataclass(frozen=True)
class Count:
    """How many images of one type a split holds, how many of them show a defect, and how many instances those have."""

    split: str
    type: str
    images: int
    defective: int
    instances: int


@dataclass(frozen=True)
class Size:
    """How many images are `width` x `height` pixels."""

    width: int
    height: int
    images: int


@dataclass(frozen=True)
class Report:
    """What the doctor found.

    Attributes:
        name: what was checked.
        counts: by split and type, sorted.
        sizes: of the images that can be read, the most frequent first.
        problems: errors first, then by kind and file; empty where nothing is wrong.
        contact_sheet: where the sheet of outlined images was written; None where none was.
    """

    name: str
    counts: tuple[Count, ...]
    sizes: tuple[Size, ...]
    problems: tuple[Problem, ...]
    contact_sheet: Path | None


@dataclass(frozen=True)
class _Truth:
    """What is marked on an image: one mask of all its defects, None without any; how many there are; what is wrong."""

    mask: Mask | None
    instances: int
    problems: list[Problem]


@dataclass(frozen=True)
class _Item:
    """An image to check: where it stands in the data set, and what reads its truth, given height and width."""

    path: Path
    where: str
    split: str
    type: str
    defective: bool
    variant: bool
    truth: Callable[[int, int], _Truth]


@dataclass(frozen=True)
class _Seen:
    """What is kept of an image once it was read: never its pixels, but for its cell on the contact sheet."""

    item: _Item
    problems: list[Problem]
    digest: str = ""
    size: tuple[int, int] | None = None
    look: Look | None = None
    instances: int = 0
    cell: Picture | None = None


def examine(config: DoctorConfig) -> Report:
    """Check a data set and return what was found; the contact sheet is written where one is wanted.

    Raises:
        FlawmaskError: there is no such category or COCO folder, or no image in it.
    """
    if config.category:
        items = [_sample_item(sample) for sample in scan(config.mvtec_root, config.category, config.good_images)]
        problems = _empty_types(config.mvtec_root, config.category)
        problems += _orphan_masks(config.mvtec_root, config.category)
    else:
        items, problems = _coco_items(config.dataset_dir or Path())
    seen = _see_all(items, _spread(items, config.sheet_images))
    problems += chain.from_iterable(each.problems for each in seen)
    problems += _identical(seen, coco=config.category is None)
    problems += _near_identical(seen, coco=config.category is None)
    return Report(
        config.name,
        _counts(seen),
        _sizes(seen),
        tuple(sorted(problems, key=lambda problem: (problem.severity, problem.kind, problem.where))),
        _write_sheet(seen, config.contact_sheet or Path(f"doctor_{config.name}.png")),
    )


def _see_all(items: Sequence[_Item], on_sheet: frozenset[Path]) -> list[_Seen]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        seen = pool.map(lambda item: _see(item, item.path in on_sheet), items)
        return list(track(seen, "checking", total=len(items)))


def _see(item: _Item, on_sheet: bool) -> _Seen:
    """Read one image and its truth, and return what the report needs of them."""
    try:
        data = images.read_bytes(item.path)
        image = images.to_rgb(images.decode(data, item.path))
    except ImageError as error:
        return _Seen(item, [_unreadable(error, item.path, item.where)])
    height, width = image.shape[:2]
    truth = item.truth(height, width)
    cell = _cell(image, truth.mask) if on_sheet else None
    return _Seen(item, truth.problems, sha256(data), (width, height), look_of(image), truth.instances, cell)


def _unreadable(error: ImageError, path: Path, where: str) -> Problem:
    return Problem("error", "unreadable image", where, str(error).removeprefix(f"{path} "))


# A category in MVTec AD's layout.


def _sample_item(sample: Sample) -> _Item:
    return _Item(
        path=sample.image,
        where=sample.original_file,
        split=Path(sample.original_file).parts[1],
        type=sample.defect_type,
        defective=not sample.is_good,
        variant=False,
        truth=partial(_sample_truth, sample),
    )


def _sample_truth(sample: Sample, height: int, width: int) -> _Truth:
    """Read the sample's mask, and return what is wrong with it."""
    if sample.is_good:
        return _Truth(None, 0, [])
    if sample.mask is None:
        advice = f"draw ground_truth/{sample.defect_type}/{sample.image.stem}_mask.png, or move it to test/good"
        return _Truth(None, 0, [Problem("error", "mask missing", sample.original_file, f"has no mask: {advice}")])
    where = sample.mask.relative_to(sample.image.parents[3]).as_posix()
    try:
        pixels = images.read_pixels(sample.mask)
    except ImageError as error:
        return _Truth(None, 0, [_unreadable(error, sample.mask, where)])
    if pixels.shape[:2] != (height, width):
        sizes = f"is {pixels.shape[1]}x{pixels.shape[0]} but its image is {width}x{height}"
        return _Truth(None, 0, [Problem("error", "mask size", where, f"{sizes}: export the mask at the image's size")])
    mask = images.to_mask(pixels)
    count, _ = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    return _Truth(mask, count - 1, list(_mask_problems(pixels, mask, where)))


def _mask_problems(pixels: Pixels, mask: Mask, where: str) -> Iterator[Problem]:
    values = np.unique(pixels)
    if len(values) > 2 or (len(values) == 2 and values[0] != 0):
        shown = ", ".join(str(value) for value in values[:3]) + (", ..." if len(values) > 3 else "")
        message = f"holds the values {shown}, and only those above half count as defect: export it as black and white"
        yield Problem("warning", "mask not binary", where, message)
    if not mask.any():
        message = "has no defect pixel: draw the defect white, or move the image to test/good"
        yield Problem("error", "mask empty", where, message)


def _empty_types(mvtec_root: Path, category: str) -> list[Problem]:
    """Return a problem for each folder under `test` that holds no image."""
    seen = {sample.defect_type for sample in scan(mvtec_root, category)}
    folders = [path for path in sorted((mvtec_root / category / "test").iterdir()) if path.is_dir()]
    message = "holds no image: add some, or delete the folder"
    wheres = [path.relative_to(mvtec_root).as_posix() for path in folders if path.name not in seen]
    return [Problem("warning", "empty category", where, message) for where in wheres]


def _orphan_masks(mvtec_root: Path, category: str) -> list[Problem]:
    """Return a problem for each folder of masks without a folder of images, and for each mask without an image."""
    root, problems = mvtec_root / category, []
    used = {sample.mask for sample in scan(mvtec_root, category)}
    folders = [path for path in (root / "ground_truth").glob("*") if path.is_dir()]
    for folder in folders:
        where = folder.relative_to(mvtec_root).as_posix()
        if not (root / "test" / folder.name).is_dir():
            message = f"has no folder test/{folder.name} beside it: its masks are not used; add the images"
            problems.append(Problem("warning", "orphan masks", where, message))
            continue
        for mask in folder.iterdir():
            if images.is_image(mask) and mask not in used:
                message = (
                    f"belongs to no defective image of test/{folder.name}: add the image, or name the mask after it"
                )
                problems.append(Problem("warning", "orphan masks", f"{where}/{mask.name}", message))
    return problems


# A COCO folder.


def _coco_items(dataset_dir: Path) -> tuple[list[_Item], list[Problem]]:
    """Return the images of all splits that are there and can be used, and what is wrong with the splits themselves."""
    items: list[_Item] = []
    problems: list[Problem] = []
    for name in [name for name in SPLITS if (dataset_dir / name).is_dir()] or SPLITS[:1]:
        try:
            split = read_split(dataset_dir, name)
        except FlawmaskError as error:
            if not (dataset_dir / name).is_dir():
                raise
            problems.append(Problem("error", "unusable split", name, f"cannot be used: {error}"))
            continue
        items += [_record_item(split, image) for image in split.images]
        problems += _split_problems(split)
    return items, problems


def _record_item(split: CocoSplit, image: Record) -> _Item:
    names = {category["id"]: category["name"] for category in split.categories}
    marked = [*split.defects(image), *split.annotations[image["id"]]]
    return _Item(
        path=split.image_path(image),
        where=f"{split.folder.name}/images/{image['file_name']}",
        split=split.folder.name,
        type=str(image.get("defect_type") or (names[marked[0]["category_id"]] if marked else "no annotation")),
        defective=split.is_defective(image),
        variant="augmentation" in image,
        truth=partial(_record_truth, split, image),
    )


def _record_truth(split: CocoSplit, image: Record, height: int, width: int) -> _Truth:
    """Decode the annotations of an image, and return what is wrong with them."""
    where = f"{split.folder.name}/images/{image['file_name']}"
    defects = split.defects(image)
    if (image["width"], image["height"]) != (width, height):
        sizes = f"is {width}x{height} but its record says {image['width']}x{image['height']}"
        message = f"{sizes}: export the annotations again; they were not checked"
        return _Truth(None, len(defects), [Problem("error", "image size", where, message)])
    union, problems = np.zeros((height, width), dtype=bool), []
    for record in split.annotations[image["id"]]:
        try:
            (mask,) = instance_masks([record], height, width, where)
        except FlawmaskError as error:
            message = str(error).removeprefix(f"{where}: ")
            problems.append(Problem("error", "segmentation", where, message))
            continue
        problems += _annotation_problems(record, mask, where)
        if record["category_id"] in split.defect_ids:
            union |= mask
    return _Truth(union, len(defects), problems)


def _annotation_problems(record: Record, mask: Mask, where: str) -> Iterator[Problem]:
    """Yield what is wrong with an annotation's box and area, held against its mask and the image."""
    who = f"annotation {record['id']}"
    height, width = mask.shape
    try:
        x, y, across, down = box = [float(value) for value in record["bbox"]]
    except (TypeError, ValueError):
        yield Problem("error", "box", where, f"{who} has the box {record['bbox']}, not [x, y, width, height]")
        return
    if not (across > 0 and down > 0):
        yield Problem("error", "box", where, f"{who} has a box of {across:g}x{down:g} pixels: remove or redraw it")
    elif min(x, y) < -BOX_TOLERANCE or x + across > width + BOX_TOLERANCE or y + down > height + BOX_TOLERANCE:
        yield Problem("error", "box", where, f"{who} has the box {record['bbox']}, outside its {width}x{height} image")
    elif mask.any() and np.abs(np.subtract(box, box_of(mask))).max() > BOX_TOLERANCE:
        message = f"{who} has the box {record['bbox']} but its mask covers {list(box_of(mask))}: export it again"
        yield Problem("warning", "box and mask", where, message)
    pixels, area = int(np.count_nonzero(mask)), record.get("area")
    if not pixels:
        yield Problem("error", "mask empty", where, f"{who} has a segmentation without a pixel: remove or redraw it")
    elif not isinstance(area, int | float) or abs(area - pixels) > max(2, AREA_TOLERANCE * pixels):
        yield Problem("warning", "area", where, f"{who} has the area {area} but its mask {pixels} pixels")


def _split_problems(split: CocoSplit) -> Iterator[Problem]:
    """Yield what is wrong with a split as a whole."""
    name, folder = split.folder.name, split.folder / "images"
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


# Images that are there twice.


def _identical(seen: Sequence[_Seen], *, coco: bool) -> Iterator[Problem]:
    """Yield a problem for each set of files with the same bytes: an error where it lies on several splits."""
    there = [each for each in seen if each.digest]
    for places in identical([each.digest for each in there]):
        first, *others = [there[place].item for place in places]
        leak = coco and any(other.split != first.split for other in others)
        # Variants of two identical images are identical too: on one split the images themselves say it.
        if first.variant and not leak:
            continue
        others.sort(key=lambda other: other.split == first.split)  # those of another split are named first
        names = ", ".join(other.where for other in others[:3]) + (", ..." if len(others) > 3 else "")
        message = f"is byte for byte the same as {names}"
        if leak:
            yield Problem(
                "error", "leak", first.where, f"{message}: keep them on one split, or the figures are too good"
            )
        else:
            yield Problem("warning", "identical images", first.where, f"{message}: keep one")


def _near_identical(seen: Sequence[_Seen], *, coco: bool) -> Iterator[Problem]:
    """Yield a problem for each image that shows the same picture as an earlier one in another file's bytes."""
    there = [each for each in seen if each.look is not None]
    splits = [each.item.split if coco else "" for each in there]
    compared = [
        Compared(each.digest, each.look, split, each.item.variant)
        for each, split in zip(there, splits, strict=True)
        if each.look is not None
    ]
    for later, earlier in alike(compared):
        message = f"shows the same picture as {there[earlier].item.where}"
        if splits[later] != splits[earlier]:
            kind, advice = "near-leak", "if it is the same part, keep both on one split"
        else:
            kind, advice = "near-identical images", "keep one" if coco else "keep one, or both together with --group_by"
        yield Problem("warning", kind, there[later].item.where, f"{message}: {advice}")


# The contact sheet.


def _spread(items: Sequence[_Item], most: int) -> frozenset[Path]:
    """Return the files of up to `most` items: as many of each type as there are, spread evenly over its files."""
    by_type: dict[str, list[_Item]] = defaultdict(list)
    for item in items:
        by_type[item.type].append(item)
    chosen: set[Path] = set()
    # The smallest types come first: what they leave over goes to the larger ones.
    for left, group in zip(range(len(by_type), 0, -1), sorted(by_type.values(), key=len), strict=True):
        share = min(len(group), -(-(most - len(chosen)) // left))
        chosen |= {group[place * len(group) // share].path for place in range(share)}
    return frozenset(chosen)


def _cell(image: Picture, mask: Mask | None) -> Picture:
    """Return the image at the contact sheet's size, its defects outlined."""
    fitted = draw.fit(image, *CELL)
    return fitted if mask is None else draw.outline(fitted, draw.fit_mask(mask, *CELL), draw.TRUTH)


def _write_sheet(seen: Sequence[_Seen], path: Path) -> Path | None:
    """Write the sheet, good images first, and return where it is; None where no image is on it."""
    shown = sorted(
        ((each.item, each.cell) for each in seen if each.cell is not None),
        key=lambda pair: (pair[0].type != GOOD, pair[0].type, pair[0].where),
    )
    if not shown:
        return None
    captions = [
        item.path.name if item.path.name.startswith(item.type) else f"{item.type}  {item.path.name}"
        for item, _ in shown  # prepare puts the type into the name already
    ]
    rows = -(-len(shown) // COLUMNS)
    columns = -(-len(shown) // rows)  # evenly filled rows: 17 images are 6 + 6 + 5, not 8 + 8 + 1
    images.write_png(path, draw.contact_sheet([cell for _, cell in shown], columns, CELL, captions))
    return path


# The report.


def _counts(seen: Sequence[_Seen]) -> tuple[Count, ...]:
    groups: dict[tuple[str, str], list[_Seen]] = defaultdict(list)
    for each in seen:
        groups[each.item.split, each.item.type].append(each)
    return tuple(
        Count(
            split, kind, len(group), sum(each.item.defective for each in group), sum(each.instances for each in group)
        )
        for (split, kind), group in sorted(groups.items())
    )


def _sizes(seen: Sequence[_Seen]) -> tuple[Size, ...]:
    counted = Counter(each.size for each in seen if each.size)
    return tuple(Size(*size, count) for size, count in sorted(counted.items(), key=lambda pair: (-pair[1], pair[0])))


def tables(report: Report) -> list[Table]:
    """Return the report as tables for a terminal: counts, sizes, and problems where there are any."""
    return [_counts_table(report), _sizes_table(report), *([_problems_table(report)] if report.problems else [])]


def _counts_table(report: Report) -> Table:
    table = Table("split", "type", title=Text(f"{report.name}: images"))
    for heading in ("images", "defective", "instances"):
        table.add_column(heading, justify="right")
    for count in report.counts:
        numbers = (count.images, count.defective, count.instances)
        table.add_row(Text(count.split), Text(count.type), *map(str, numbers))
    return table


def _sizes_table(report: Report) -> Table:
    """Return a table of the most frequent sizes; hand-cropped parts have nearly as many sizes as images."""
    table = Table(title=Text(f"{report.name}: sizes in pixels"))
    for heading in ("width", "height", "images"):
        table.add_column(heading, justify="right")
    for size in report.sizes[:SHOWN]:
        table.add_row(str(size.width), str(size.height), str(size.images))
    if rest := report.sizes[SHOWN:]:
        widths, heights = [size.width for size in rest], [size.height for size in rest]
        spans = [f"{min(sides)} to {max(sides)}" for sides in (widths, heights)]
        table.add_row(*spans, str(sum(size.images for size in rest)))
    return table


def _problems_table(report: Report) -> Table:
    """Return a table with one row for each kind of problem, and its first examples."""
    table = Table(title=Text(f"{report.name}: problems"), show_lines=True)
    table.add_column("kind")
    table.add_column("count", justify="right")
    table.add_column("examples", overflow="fold")
    for (severity, kind), group in groupby(report.problems, key=lambda problem: (problem.severity, problem.kind)):
        found = list(group)
        examples = [f"{problem.where} {problem.message}" for problem in found[:SHOWN]]
        examples += [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
        # Text, because rich would take [brackets] in a file's name for markup.
        style = "red" if severity == "error" else "yellow"
        table.add_row(Text(f"{severity}: {kind}", style), str(len(found)), Text("\n".join(examples)))
    return table
