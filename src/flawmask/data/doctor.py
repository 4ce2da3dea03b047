"""What is wrong with a data set, before hours go into training on it: a category or a COCO folder.

Every image is read once, by all cores; a fault becomes a row of the report, never an exception.
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
from flawmask.data.duplicates import Compared, Look, alike, identical, look_of
from flawmask.data.group_search import find_groups
from flawmask.data.intensity import IntensitySettings
from flawmask.data.layouts import LayoutName, Problem, Sample
from flawmask.data.mask_files import MaskSettings, TurnedImage
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
from flawmask.tally import Tally, tallied

CELL = (240, 240)  # of the contact sheet, pixels
COLUMNS = 8


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(IntensitySettings, MaskSettings, LayoutName, Crowds, Strict):
    """Check a category or a COCO folder: counts, masks, damaged and doubled images."""

    mvtec_root: Path = Path("datasets/mvtec")
    """The folder that holds the categories."""
    category: str | None = None
    """The category to check: a folder name under mvtec_root. Either this or dataset_dir."""
    dataset_dir: Path | None = None
    """The COCO folder to check, with train/, val/ or test/. Either this or category."""
    good_images: Literal["test", "all"] = "all"
    """Which good images of a category are checked: those of the test images, or those of the training images too."""
    contact_sheet: Path | None = None
    """Where the sheet of outlined images goes; by default doctor_<name>.png in the current folder."""
    sheet_images: int = 48
    """Most images on the contact sheet, taken evenly from all defect types; 0 makes no sheet."""
    json: bool = False
    """Print what was found as JSON, and nothing else on standard output."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            (self.category is None) != (self.dataset_dir is None),
            "name either a --category or a --dataset_dir to check, and not both",
        )
        require(self.sheet_images >= 0, f"--sheet_images is {self.sheet_images}: it must be 0 or more")

    @property
    def left_aside(self) -> str:
        """Why good images of the training images are not checked."""
        return f"--good_images {self.good_images}"

    @property
    def name(self) -> str:
        """What is checked: the category's or the COCO folder's name."""
        return self.category or (self.dataset_dir or Path()).resolve().name


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
        tallies: how many images and annotations, or masks, were found and can be used.
        layout: how the folders of the category lie; None of a COCO folder.
    """

    name: str
    counts: tuple[Count, ...]
    sizes: tuple[Size, ...]
    problems: tuple[Problem, ...]
    contact_sheet: Path | None
    tallies: tuple[Tally, ...] = ()
    layout: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values; of the tallies, `images` and `annotations` with what each holds."""
        plain = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "tallies"}
        listed = {name: [asdict(one) for one in plain[name]] for name in ("counts", "sizes", "problems")}
        sheet = None if self.contact_sheet is None else self.contact_sheet.as_posix()
        return plain | listed | {"contact_sheet": sheet} | tallied(self.tallies)


LOST = frozenset({"unreadable image", "image size", "mask missing", "mask size", "mask empty"})
"""The kinds of problems for which an image is left out by the stages that follow."""


@dataclass(frozen=True)
class _Seen:
    """What is kept of an image once it was read: never its pixels, but for its cell on the contact sheet."""

    item: Item
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
    samples, aside = list[Sample](), list[Sample]()
    tallies = Tally("images"), Tally("annotations")
    category = config.category
    if category:
        layout = layouts.layout_of(config.mvtec_root, config)
        layouts.say(layout, config.mvtec_root, config)
        config = replace(config, layout=layout)
        samples, aside = _samples(config, category)
        problems = layouts.problems(config.mvtec_root, category, config)
        items, more = category_items(samples, config.mvtec_root, category, config)
        problems += more
        levels = intensity.of_images(config.intensity, [item.path for item in items], category)
    else:
        items, problems, splits = coco_items(config.dataset_dir or Path(), config.crowds, config.good_name, tallies)
        levels = intensity.of_dataset(config.intensity, splits) if splits else UPPER_BITS
    seen = _see_all(items, levels, _spread(items, config.sheet_images))
    problems += chain.from_iterable(each.problems for each in seen)
    if category:
        tallies = _tallies(config, category, samples, seen, aside)
        problems += unused_files(tallies, (layouts.BAD, config.left_aside), problems)
    else:
        _count(seen, *tallies)
    problems += _identical(seen, coco=config.category is None)
    problems += _near_identical(seen, coco=config.category is None)
    problems += _parts(items, config)
    return Report(
        config.name,
        _counts(seen),
        _sizes(seen),
        tuple(sorted(problems, key=lambda problem: (problem.severity, problem.kind, problem.where))),
        _write_sheet(seen, config.contact_sheet or Path(f"doctor_{config.name}.png")),
        tallies,
        config.layout if config.category else None,
    )


def _count(seen: Sequence[_Seen], of_images: Tally, of_labels: Tally) -> None:
    """Count the images of a COCO folder that can be used and what is marked on them."""
    for each in seen:
        item = each.item
        lost = next((problem.kind for problem in each.problems if problem.kind in LOST), None)
        if lost is None:
            of_images.used += 1
            of_labels.used += len(item.labels)
        else:
            of_images.leave_out(item.where, lost)
            for label in item.labels:
                of_labels.leave_out(label, "image not used")


def _samples(config: DoctorConfig, category: str) -> tuple[list[Sample], list[Sample]]:
    """Return the samples of a category to check, and those that the settings leave aside.

    Raises:
        FlawmaskError: there is no such category, or no image in it.
    """
    every = layouts.samples(config.mvtec_root, category, config)
    chosen = layouts.taking_part(every, config.good_images)
    images = {sample.image for sample in chosen}
    return chosen, [sample for sample in every if sample.image not in images]


def _tallies(
    config: DoctorConfig, category: str, samples: Sequence[Sample], seen: Sequence["_Seen"], aside: Sequence[Sample]
) -> tuple[Tally, Tally]:
    """Return the counts of the images and masks of a category; those with an error would not be trained on."""
    fit = {each.item.path for each in seen if all(problem.severity != "error" for problem in each.problems)}
    used = [sample for sample in samples if sample.image in fit]
    bad = [sample for sample in samples if sample.image not in fit]
    return layouts.tallies(config.mvtec_root, category, used, {layouts.BAD: bad, config.left_aside: aside}, config)


def _see_all(items: Sequence[Item], levels: Levels, on_sheet: frozenset[Path]) -> list[_Seen]:
    with ThreadPoolExecutor(usable_cores()) as pool:
        seen = pool.map(lambda item: _see(item, levels, item.path in on_sheet), items)
        return list(track(seen, "checking", total=len(items)))


def _see(item: Item, levels: Levels, on_sheet: bool) -> _Seen:
    """Read one image and its truth, and return what the report needs of them."""
    try:
        data = images.read_bytes(item.path)
        decoded = images.decode_parts(data, item.path)
    except ImageError as error:
        return _Seen(item, [unreadable(error, item.path, item.where)])
    image = images.to_rgb(decoded.colour, levels)
    height, width = image.shape[:2]
    truth = item.truth(TurnedImage(height, width, decoded.orientation))
    problems = [*truth.problems, *brightness(image, item.where)]
    cell = _cell(image, truth.mask) if on_sheet else None
    return _Seen(item, problems, sha256(data), (width, height), look_of(image), truth.instances, cell)


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


# Photographs of one part.


def _parts(items: Sequence[Item], config: DoctorConfig) -> Iterator[Problem]:
    """Yield an error for each part that is on several splits; where nobody says which images show one part, a warning
    if their names seem to."""
    if any(item.group is not None for item in items):
        if config.category is None:
            yield from _parts_on_several_splits(items)
        return
    photographs = [item for item in items if not item.variant]
    found = find_groups([item.name for item in photographs])
    if found is None:
        return
    advice = f"if so, keep each on one side with {found.flag}"
    if config.category is None:
        splits = {(part, item.split) for part, item in zip(found.parts, photographs, strict=True) if part is not None}
        divided = sum(count > 1 for count in Counter(part for part, _ in splits).values())
        advice = (
            f"if so, {divided} of them are on several splits: keep each on one (prepare {found.flag}), and name it as "
            "`group` in the image records"
        )
    yield Problem("warning", "several images of a part", config.name, f"{found}; {advice}")


def _parts_on_several_splits(items: Sequence[Item]) -> Iterator[Problem]:
    by_group: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        if item.group is not None:
            by_group[item.group].append(item)
    for group, (first, *others) in by_group.items():
        other = next((one for one in others if one.split != first.split), None)
        if other is not None:
            message = (
                f"shows the part {group}, and so does {other.where}: keep it on one split, or the figures are too good"
            )
            yield Problem("error", "leak", first.where, message)


# The contact sheet.


def _spread(items: Sequence[Item], most: int) -> frozenset[Path]:
    """Return the files of up to `most` items: as many of each type as there are, spread evenly over its files."""
    by_type: dict[str, list[Item]] = defaultdict(list)
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
        first_writable(
            item.path.name if item.path.name.startswith(item.type) else f"{item.type}  {item.path.name}",
            item.type,
            "",
        )
        for item, _ in shown  # prepare puts the type into the name already
    ]
    rows = -(-len(shown) // COLUMNS)
    columns = -(-len(shown) // rows)  # evenly filled rows: 17 images are 6 + 6 + 5, not 8 + 8 + 1
    images.write_png(path, draw.contact_sheet([cell for _, cell in shown], columns, CELL, captions))
    return path


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
