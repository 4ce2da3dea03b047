"""How the folders of data sets lie: a module for each layout, and the list of them.

All others see a category's samples alone.
"""

import logging
import posixpath
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from flawmask.data.layouts import btad, ksdd2, loco, mvtec, mvtec_ad_2, visa
from flawmask.data.layouts.folders import NO_MASK, Folders
from flawmask.data.layouts.layout import Layout, MaskFile, Part, Problem, Sample, listed, where_of
from flawmask.data.layouts.mask_values import are_black
from flawmask.errors import FlawmaskError
from flawmask.files import walk
from flawmask.good_names import GOOD, looks_good
from flawmask.images import is_image
from flawmask.settings import GoodName, require
from flawmask.tally import Tally

__all__ = [
    "AUTO",
    "BAD",
    "LAYOUTS",
    "NO_MASK",
    "Layout",
    "LayoutName",
    "MaskFile",
    "Part",
    "Problem",
    "Sample",
    "categories",
    "chosen_categories",
    "layout_of",
    "names_in",
    "problems",
    "samples",
    "say",
    "taking_part",
    "tallies",
    "where_of",
]

log = logging.getLogger(__name__)

FOLDERS, USUAL = "folders", "mvtec"
"""The layout that has settings of its own, and the one whose folders are missed where none is recognised."""

LAYOUTS: dict[str, Layout] = {
    USUAL: mvtec,
    "visa": visa,
    "loco": loco,
    "mvtec_ad_2": mvtec_ad_2,
    "btad": btad,
    "ksdd2": ksdd2,
    FOLDERS: Folders(),
}
"""The layouts by name. `auto` asks them in this order, but MVTec AD's last: others are that with something more."""

BAD = "bad image or mask"
"""Why images are not used that cannot be read, or whose masks cannot."""

AUTO = "auto"
"""The layout that says: whichever is recognised."""

LABELS = frozenset({".json", ".xml", ".txt", ".csv", ".yaml", ".yml"})
"""Suffixes of files that may be labels of another tool's."""

TRUTH = frozenset({"ground_truth", "masks", "mask"})
"""What folders of masks are called, in lower case."""


@dataclass(frozen=True, kw_only=True)
class LayoutName(GoodName):
    """How the folders of the data set lie."""

    layout: str = AUTO
    """How the folders under mvtec_root lie; auto recognises it."""
    images: str | None = None
    """With --layout folders, the folder of images, below the category or anywhere; by default images."""
    masks: str | None = None
    """With --layout folders, the folder of masks, named as their images are; by default masks."""
    mask_suffix: str | None = None
    """With --layout folders, what a mask's name has more than its image's: _mask for one; by default found."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = (AUTO, *LAYOUTS)
        require(self.layout in known, f"--layout {self.layout}: there are {', '.join(known)}")
        given = [name for name in ("images", "masks", "mask_suffix") if getattr(self, name) is not None]
        require(
            not given or self.layout in (AUTO, FOLDERS),
            f"--{given[0] if given else ''} is for --layout {FOLDERS}, and --layout is {self.layout}",
        )

    @property
    def names_folders(self) -> bool:
        """Whether the settings say where images and masks lie, which only one layout wants to know."""
        return not (self.images is None and self.masks is None and self.mask_suffix is None)


ANY = LayoutName()
"""The settings of somebody who has said nothing."""


def layout_of(root: Path, how: LayoutName = ANY) -> str:
    """Return a layout's name: the one given, or with `auto` the first that is recognised under `root`.

    Where none is, that is MVTec AD's: what it says is missing helps most people.

    Raises:
        FlawmaskError: there is no folder `root`.
    """
    if how.layout == FOLDERS or how.names_folders:
        if not _folders(how).stands_alone(root):
            _check_root(root)
        return FOLDERS
    _check_root(root)
    if how.layout != AUTO:
        return how.layout
    others = (name for name in LAYOUTS if name != USUAL)
    return next((name for name in others if LAYOUTS[name].recognised(root)), USUAL)


def say(layout: str, root: Path, how: LayoutName) -> None:
    """Say which layout was recognised, where the settings leave it to that."""
    if how.layout == AUTO:
        log.info("%s has the layout %s", root, layout)


def _check_root(root: Path) -> None:
    if not root.is_dir():
        near = next((path for path in root.absolute().parents if path.is_dir()), None)
        there = f" ({near} holds {listed(near)})" if near else ""
        raise FlawmaskError(f"{root} is no folder{there}: name the one that holds the categories with --mvtec_root")


def _folders(how: LayoutName) -> Folders:
    given = {"images": how.images, "masks": how.masks, "mask_suffix": how.mask_suffix}
    return Folders(**{name: value for name, value in given.items() if value is not None})


def _layout(root: Path, how: LayoutName) -> Layout:
    name = layout_of(root, how)
    return _folders(how) if name == FOLDERS else LAYOUTS[name]


def categories(root: Path, how: LayoutName = ANY) -> list[str]:
    """Return the names of the categories under `root`, sorted.

    Raises:
        FlawmaskError: there is no such folder, or no category in it.
    """
    return _layout(root, how).categories(root)


def chosen_categories(root: Path, text: str, how: LayoutName = ANY) -> list[str]:
    """Return the categories that `--category` names: one, several as `a,b,c`, or `all` there are.

    Raises:
        FlawmaskError: one of them is not there (the message says what is), or none is named.
    """
    layout, wanted = _layout(root, how), names_in(text)
    if isinstance(layout, Folders) and layout.stands_alone(root):
        require(len(wanted) == 1, f"--images {layout.images} is one category: give it one name with --category")
        return wanted
    known = layout.categories(root)
    if text == "all":
        return known
    if not wanted:
        raise FlawmaskError(f"--category names none: {root} has {', '.join(known)}")
    for name in wanted:
        _check_known(root, name, known)
    return wanted


def names_in(text: str) -> list[str]:
    """Return the names in `a,b,c`, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _check_known(root: Path, category: str, known: Sequence[str]) -> None:
    if category not in known:
        of_another = "; if it is of another layout, name that with --layout" if (root / category).is_dir() else ""
        raise FlawmaskError(f"{root} has no category {category}: it has {', '.join(known)}{of_another}")


def samples(root: Path, category: str, how: LayoutName = ANY) -> list[Sample]:
    """Return the images of a category, always in the same order.

    Raises:
        FlawmaskError: the root or the category is missing (the message says what is there), or no image is in it.
    """
    return _with_good_names(_with_category(root, category, how).samples(root, category), how)


def problems(root: Path, category: str, how: LayoutName = ANY) -> list[Problem]:
    """Return what is wrong with the folders and file names of a category; `where` is relative to `root`.

    Raises:
        FlawmaskError: the root or the category is missing (the message says what is there), or no image is in it.
    """
    found = _with_category(root, category, how).problems(root, category)
    return [*found, *_good_by_another_name(samples(root, category, how), category, how)]


def _with_category(root: Path, category: str, how: LayoutName) -> Layout:
    """Return the layout, once it is sure that the category is there."""
    found = _layout(root, how)
    if not (isinstance(found, Folders) and found.stands_alone(root)):
        _check_known(root, category, found.categories(root))
    return found


def taking_part(found: Sequence[Sample], good_images: Literal["test", "all"]) -> list[Sample]:
    """Return the samples without the good ones of the training images, or all of them: what `--good_images` says."""
    return [sample for sample in found if good_images == "all" or sample.origin == "test" or not sample.is_good]


def _with_good_names(found: Sequence[Sample], how: LayoutName) -> list[Sample]:
    """Return the samples, those good whose type `--good_name` names. Black masks of theirs say so, too."""
    names = how.good_names
    masks = [mask.path for sample in found if sample.defect_type in names for mask in sample.masks]
    black = {path for path, is_black in zip(masks, are_black(masks), strict=True) if is_black}
    return [
        replace(
            sample,
            defect_type=GOOD,
            masks=(),
            mask_wanted="",
            labels=(*sample.labels, *(mask.path for mask in sample.masks if mask.path in black)),
        )
        if sample.defect_type in names
        else sample
        for sample in found
    ]


def _good_by_another_name(found: Sequence[Sample], category: str, how: LayoutName) -> list[Problem]:
    """Return an error for each type that looks as if its images were good, unless `--good_name` says what is."""
    if how.good_name is not None:
        return []
    folders: dict[str, list[str]] = defaultdict(list)
    for sample in found:
        if not sample.is_good and looks_good(sample.defect_type):
            folders[sample.defect_type].append(posixpath.dirname(sample.original_file))
    return [
        Problem(
            "error",
            "good by another name",
            posixpath.commonpath(of_kind) or category,
            f"looks as if its images ({len(of_kind)} of type {kind}) were good: say so with --good_name {kind}, or "
            f"--good_name {GOOD} if it is a type of defect",
        )
        for kind, of_kind in sorted(folders.items())
    ]


def tallies(
    root: Path,
    category: str,
    used: Sequence[Sample],
    left_out: Mapping[str, Sequence[Sample]],
    how: LayoutName = ANY,
) -> tuple[Tally, Tally]:
    """Return the counts of the images, and of the files of labels, that lie in a category.

    Files that are neither, and lie directly in the category's folder, describe it and are not counted.

    Args:
        root: the folder that holds the categories.
        category: one of them.
        used: the samples that are used.
        left_out: those that are not, by the reason.
        how: the layout's settings.
    """
    images, labels = Tally("images"), Tally("annotations")
    known: set[Path] = set()
    for reason, of_reason in (("", used), *left_out.items()):
        for sample in of_reason:
            files = dict.fromkeys([*(mask.path for mask in sample.masks), *sample.labels])
            known |= {sample.image, *files}
            if not reason:
                images.used += 1
                labels.used += len(files)
                continue
            images.leave_out(sample.original_file, reason)
            for path in files:
                labels.leave_out(where_of(path, root), reason)
    layout = _layout(root, how)
    places = layout.places(root, category) if isinstance(layout, Folders) else []
    if not (isinstance(layout, Folders) and layout.stands_alone(root)):
        places.append(root / category)  # there may be more than the layout knows
    for place in places:
        for path in walk(place):
            below = path.relative_to(place)
            is_described = len(below.parts) == 1 and place == root / category and not is_image(path)
            if path not in known and not is_described:
                known.add(path)
                kind, reason = _stray(path, below, is_mask_folder=place != places[0] and place in places[1:2])
                (labels if kind == "label" else images).leave_out(where_of(path, root), reason)
    return images, labels


def _stray(path: Path, below: Path, *, is_mask_folder: bool) -> tuple[Literal["image", "label"], str]:
    """Return what a file is that no sample is made of, and why: an image or a file of labels."""
    suffix = path.suffix.lower()
    is_label = is_mask_folder or not TRUTH.isdisjoint(part.casefold() for part in below.parts[:-1])
    is_label = is_label or suffix in LABELS or path.stem.casefold().endswith(("_gt", "_mask"))
    if not is_image(path):
        return "label" if is_label else "image", f"suffix {suffix or 'missing'}"
    where = "no image" if is_label else f"in {'/'.join(below.parts[:-1][:2]) or '.'}"
    return "label" if is_label else "image", where
