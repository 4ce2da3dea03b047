"""Check a category or a COCO folder for faults, before hours go into training on it.

Every image is read once, on all cores. A fault becomes a row of the report, never an exception.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from flawmask import draw, images
from flawmask.data import intensity, layouts
from flawmask.data.doctor_checks import Item, brightness, category_items, coco_items, unreadable, unused_files
from flawmask.data.duplicates import Compared, Descriptor, descriptor_of, exact_duplicates, near_duplicates
from flawmask.data.group_search import find_groups
from flawmask.data.intensity import IntensitySettings
from flawmask.data.layouts import LayoutSettings, Problem, Sample
from flawmask.data.mask_files import ImageGeometry, MaskSettings
from flawmask.draw import Picture
from flawmask.errors import ImageError
from flawmask.files import sha256
from flawmask.fonts import first_writable
from flawmask.good_names import GOOD
from flawmask.images import UPPER_BITS, Levels
from flawmask.launch import usable_cores
from flawmask.masks import Mask
from flawmask.progress import track
from flawmask.settings import Crowds, Strict, require
from flawmask.tally import Tally, tallies_to_dict

CELL = (240, 240)  # pixels of one image on the contact sheet
COLUMNS = 8


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(IntensitySettings, MaskSettings, LayoutSettings, Crowds, Strict):
    """Check a category or a COCO folder: counts, masks, damaged and duplicate images."""

    mvtec_root: Path = Path("datasets/mvtec")
    """The folder that holds the categories."""
    category: str | None = None
    """The category to check: a folder name under mvtec_root. Give either this or dataset_dir."""
    dataset_dir: Path | None = None
    """The COCO folder to check, with train/, val/ or test/. Give either this or category."""
    good_images: Literal["test", "all"] = "all"
    """Good images to check. test: those in the test folders. all: also those in the training folders."""
    contact_sheet: Path | None = None
    """File for the sheet of images with outlined defects; by default doctor_<name>.png in the current folder."""
    sheet_images: int = 48
    """Maximum number of images on the contact sheet, taken evenly from all defect types; 0 makes no sheet."""
    json: bool = False
    """Print the report as JSON, and nothing else on standard output."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            (self.category is None) != (self.dataset_dir is None),
            "give either --category or --dataset_dir, not both",
        )
        require(self.sheet_images >= 0, f"--sheet_images is {self.sheet_images}: it must be 0 or more")

    @property
    def good_images_flag(self) -> str:
        """The reason why good training images are not checked: the flag that says so."""
        return f"--good_images {self.good_images}"

    @property
    def name(self) -> str:
        """The name of the category or COCO folder that is checked."""
        return self.category or (self.dataset_dir or Path()).resolve().name


@dataclass(frozen=True)
class Count:
    """One type in one split: the number of images, of defective images, and of instances."""

    split: str
    type: str
    images: int
    defective: int
    instances: int


@dataclass(frozen=True)
class Size:
    """The number of images with `width` x `height` pixels."""

    width: int
    height: int
    images: int


@dataclass(frozen=True)
class Report:
    """The doctor's report.

    Attributes:
        name: the name of the category or COCO folder.
        counts: the counts by split and type, sorted.
        sizes: the sizes of the readable images, the most frequent first.
        problems: the problems, errors first, then by kind and file; empty if nothing is wrong.
        contact_sheet: the sheet of images with outlined defects; None if none was written.
        tallies: how many images and annotations (or masks) were found and can be used.
        layout: the layout of the category's folders; None for a COCO folder.
    """

    name: str
    counts: tuple[Count, ...]
    sizes: tuple[Size, ...]
    problems: tuple[Problem, ...]
    contact_sheet: Path | None
    tallies: tuple[Tally, ...] = ()
    layout: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values. The tallies become `images` and `annotations`."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "tallies"}
        lists = {name: [asdict(entry) for entry in values[name]] for name in ("counts", "sizes", "problems")}
        sheet = None if self.contact_sheet is None else self.contact_sheet.as_posix()
        return values | lists | {"contact_sheet": sheet} | tallies_to_dict(self.tallies)


LEFT_OUT = frozenset({"unreadable image", "image size", "mask missing", "mask size", "mask empty"})
"""The kinds of problems for which later stages leave the image out."""


@dataclass(frozen=True)
class _Checked:
    """What is kept of an image after reading it: of its pixels, only the small picture for the contact sheet."""

    item: Item
    problems: list[Problem]
    digest: str = ""
    size: tuple[int, int] | None = None
    descriptor: Descriptor | None = None
    instances: int = 0
    cell: Picture | None = None


def examine(config: DoctorConfig) -> Report:
    """Check a data set, write the contact sheet if one is wanted, and return the report.

    Raises:
        FlawmaskError: there is no such category or COCO folder, or no image in it.
    """
    samples, unchecked = list[Sample](), list[Sample]()
    tallies = Tally("images"), Tally("annotations")
    category = config.category
    if category:
        layout = layouts.layout_of(config.mvtec_root, config)
        layouts.log_layout(layout, config.mvtec_root, config)
        config = replace(config, layout=layout)
        samples, unchecked = _samples(config, category)
        problems = layouts.problems(config.mvtec_root, category, config)
        items, mask_problems = category_items(samples, config.mvtec_root, category, config)
        problems += mask_problems
        levels = intensity.of_images(config.intensity, [item.path for item in items], category)
    else:
        items, problems, splits = coco_items(config.dataset_dir or Path(), config.crowds, config.good_name, tallies)
        levels = intensity.of_dataset(config.intensity, splits) if splits else UPPER_BITS
    checked = _check_all(items, levels, _choose_for_sheet(items, config.sheet_images))
    problems += chain.from_iterable(each.problems for each in checked)
    if category:
        tallies = _tallies(config, category, samples, checked, unchecked)
        problems += unused_files(tallies, (layouts.BAD_FILE, config.good_images_flag), problems)
    else:
        _count(checked, *tallies)
    problems += _identical(checked, coco=config.category is None)
    problems += _near_identical(checked, coco=config.category is None)
    problems += _parts(items, config)
    return Report(
        config.name,
        _counts(checked),
        _sizes(checked),
        tuple(sorted(problems, key=lambda problem: (problem.severity, problem.kind, problem.where))),
        _write_sheet(checked, config.contact_sheet or Path(f"doctor_{config.name}.png")),
        tallies,
        config.layout if config.category else None,
    )


def _count(checked: Sequence[_Checked], of_images: Tally, of_labels: Tally) -> None:
    """Count the usable images of a COCO folder and their annotations."""
    for each in checked:
        item = each.item
        reason = next((problem.kind for problem in each.problems if problem.kind in LEFT_OUT), None)
        if reason is None:
            of_images.used += 1
            of_labels.used += len(item.labels)
        else:
            of_images.leave_out(item.where, reason)
            for label in item.labels:
                of_labels.leave_out(label, "image not used")


def _samples(config: DoctorConfig, category: str) -> tuple[list[Sample], list[Sample]]:
    """Return the samples of a category that are checked, and those that are not because of the settings.

    Raises:
        FlawmaskError: there is no such category, or no image in it.
    """
    every = layouts.samples(config.mvtec_root, category, config)
    chosen = layouts.select_samples(every, config.good_images)
    images = {sample.image for sample in chosen}
    return chosen, [sample for sample in every if sample.image not in images]


def _tallies(
    config: DoctorConfig,
    category: str,
    samples: Sequence[Sample],
    checked: Sequence[_Checked],
    unchecked: Sequence[Sample],
) -> tuple[Tally, Tally]:
    """Return the tallies of a category's images and masks. Those with an error would not be used for training."""
    usable = {each.item.path for each in checked if all(problem.severity != "error" for problem in each.problems)}
    used = [sample for sample in samples if sample.image in usable]
    bad = [sample for sample in samples if sample.image not in usable]
    unused = {layouts.BAD_FILE: bad, config.good_images_flag: unchecked}
    return layouts.tallies(config.mvtec_root, category, used, unused, config)


def _check_all(items: Sequence[Item], levels: Levels, on_sheet: frozenset[Path]) -> list[_Checked]:
    with ThreadPoolExecutor(usable_cores()) as pool:
        checked = pool.map(lambda item: _check(item, levels, item.path in on_sheet), items)
        return list(track(checked, "checking", total=len(items)))


def _check(item: Item, levels: Levels, on_sheet: bool) -> _Checked:
    """Read one image and its ground truth, and return what the report needs."""
    try:
        data = images.read_bytes(item.path)
        decoded = images.decode_parts(data, item.path)
    except ImageError as error:
        return _Checked(item, [unreadable(error, item.path, item.where)])
    image = images.to_rgb(decoded.colour, levels)
    height, width = image.shape[:2]
    truth = item.truth(ImageGeometry(height, width, decoded.orientation))
    problems = [*truth.problems, *brightness(image, item.where)]
    cell = _cell(image, truth.mask) if on_sheet else None
    return _Checked(item, problems, sha256(data), (width, height), descriptor_of(image), truth.instances, cell)


# Duplicate images.


def _identical(checked: Sequence[_Checked], *, coco: bool) -> Iterator[Problem]:
    """Yield a problem for each set of files with the same bytes. It is an error if they are in several splits."""
    readable = [each for each in checked if each.digest]
    for indices in exact_duplicates([each.digest for each in readable]):
        first, *others = [readable[index].item for index in indices]
        leak = coco and any(other.split != first.split for other in others)
        # Variants of identical images are identical too. Within one split, it is enough to report the originals.
        if first.variant and not leak:
            continue
        others.sort(key=lambda other: other.split == first.split)  # name those of other splits first
        names = ", ".join(other.where for other in others[:3]) + (", ..." if len(others) > 3 else "")
        message = f"is byte for byte the same as {names}"
        if leak:
            yield Problem(
                "error", "leak", first.where, f"{message}: keep them in one split, or the figures are too good"
            )
        else:
            yield Problem("warning", "identical images", first.where, f"{message}: keep one")


def _near_identical(checked: Sequence[_Checked], *, coco: bool) -> Iterator[Problem]:
    """Yield a problem for each image that shows the same picture as an earlier one, but has other bytes."""
    readable = [each for each in checked if each.descriptor is not None]
    splits = [each.item.split if coco else "" for each in readable]
    compared = [
        Compared(each.digest, each.descriptor, split, each.item.variant)
        for each, split in zip(readable, splits, strict=True)
        if each.descriptor is not None
    ]
    for later, earlier in near_duplicates(compared):
        message = f"shows the same picture as {readable[earlier].item.where}"
        if splits[later] != splits[earlier]:
            kind, advice = "near-leak", "if it is the same part, keep both in one split"
        else:
            kind, advice = "near-identical images", "keep one" if coco else "keep one, or both together with --group_by"
        yield Problem("warning", kind, readable[later].item.where, f"{message}: {advice}")


# Photographs of the same part.


def _parts(items: Sequence[Item], config: DoctorConfig) -> Iterator[Problem]:
    """Yield an error for each part that is in several splits.

    If groups are not known, yield a warning if the file names seem to name parts.
    """
    if any(item.group is not None for item in items):
        if config.category is None:
            yield from _parts_on_several_splits(items)
        return
    originals = [item for item in items if not item.variant]
    found = find_groups([item.name for item in originals])
    if found is None:
        return
    advice = f"if so, keep each in one split with {found.flag}"
    if config.category is None:
        splits = {(part, item.split) for part, item in zip(found.parts, originals, strict=True) if part is not None}
        divided = sum(count > 1 for count in Counter(part for part, _ in splits).values())
        advice = (
            f"if so, {divided} of them are in several splits: make the data set anew with {found.flag}, or keep each "
            "part in one split and write its name as `group` into the image records"
        )
    yield Problem("warning", "several images of a part", config.name, f"{found}; {advice}")


def _parts_on_several_splits(items: Sequence[Item]) -> Iterator[Problem]:
    by_group: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        if item.group is not None:
            by_group[item.group].append(item)
    for group, (first, *others) in by_group.items():
        other = next((item for item in others if item.split != first.split), None)
        if other is not None:
            message = (
                f"shows the part {group}, and so does {other.where}: keep both in a split, or the figures are too good"
            )
            yield Problem("error", "leak", first.where, message)


# The contact sheet.


def _choose_for_sheet(items: Sequence[Item], max_images: int) -> frozenset[Path]:
    """Return the files of up to `max_images` items, the same number of each type, evenly spaced over its files."""
    by_type: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        by_type[item.type].append(item)
    chosen: set[Path] = set()
    # The smallest types come first. The places that they do not need go to the larger types.
    for left, group in zip(range(len(by_type), 0, -1), sorted(by_type.values(), key=len), strict=True):
        count = min(len(group), -(-(max_images - len(chosen)) // left))
        chosen |= {group[index * len(group) // count].path for index in range(count)}
    return frozenset(chosen)


def _cell(image: Picture, mask: Mask | None) -> Picture:
    """Return the image in the size of the contact sheet, with its defects outlined."""
    fitted = draw.fit(image, *CELL)
    return fitted if mask is None else draw.outline(fitted, draw.fit_mask(mask, *CELL), draw.TRUTH)


def _write_sheet(checked: Sequence[_Checked], path: Path) -> Path | None:
    """Write the sheet, good images first, and return its path; None if it has no image."""
    shown = sorted(
        ((each.item, each.cell) for each in checked if each.cell is not None),
        key=lambda pair: (pair[0].type != GOOD, pair[0].type, pair[0].where),
    )
    if not shown:
        return None
    captions = [
        first_writable(
            item.path.name if item.path.name.startswith(item.type) else f"{item.type}  {item.path.name}",
            item.type,
            "",
        )
        for item, _ in shown  # prepare has put the type into the file name already
    ]
    rows = -(-len(shown) // COLUMNS)
    columns = -(-len(shown) // rows)  # fill the rows evenly: 17 images become 6 + 6 + 5, not 8 + 8 + 1
    images.write_png(path, draw.contact_sheet([cell for _, cell in shown], columns, CELL, captions))
    return path


def _counts(checked: Sequence[_Checked]) -> tuple[Count, ...]:
    by_type: dict[tuple[str, str], list[_Checked]] = defaultdict(list)
    for each in checked:
        by_type[each.item.split, each.item.type].append(each)
    return tuple(
        Count(
            split,
            kind,
            len(of_type),
            sum(each.item.defective for each in of_type),
            sum(each.instances for each in of_type),
        )
        for (split, kind), of_type in sorted(by_type.items())
    )


def _sizes(checked: Sequence[_Checked]) -> tuple[Size, ...]:
    counted = Counter(each.size for each in checked if each.size)
    return tuple(Size(*size, count) for size, count in sorted(counted.items(), key=lambda pair: (-pair[1], pair[0])))
