"""The folder layouts of data sets. Each layout has a module; this module lists them.

The rest of the code sees only a category's samples.
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
    "BAD_FILE",
    "LAYOUTS",
    "NO_MASK",
    "Layout",
    "LayoutSettings",
    "MaskFile",
    "Part",
    "Problem",
    "Sample",
    "categories",
    "chosen_categories",
    "layout_of",
    "log_layout",
    "names_in",
    "problems",
    "samples",
    "select_samples",
    "tallies",
    "where_of",
]

log = logging.getLogger(__name__)

FOLDERS, FALLBACK = "folders", "mvtec"
"""The layout that has its own settings, and the layout that error messages assume if none is recognised."""

LAYOUTS: dict[str, Layout] = {
    FALLBACK: mvtec,
    "visa": visa,
    "loco": loco,
    "mvtec_ad_2": mvtec_ad_2,
    "btad": btad,
    "ksdd2": ksdd2,
    FOLDERS: Folders(),
}
"""The layouts by name. `auto` tries them in this order, but MVTec AD's last, because other layouts extend it."""

BAD_FILE = "bad image or mask"
"""The reason why an image is not used if it or its mask cannot be read."""

AUTO = "auto"
"""The layout setting with which the layout is detected."""

LABEL_SUFFIXES = frozenset({".json", ".xml", ".txt", ".csv", ".yaml", ".yml"})
"""Suffixes of files that may be labels of another tool."""

MASK_FOLDERS = frozenset({"ground_truth", "masks", "mask"})
"""Usual names of mask folders, in lower case."""


@dataclass(frozen=True, kw_only=True)
class LayoutSettings(GoodName):
    """The folder layout of the data set."""

    layout: str = AUTO
    """Layout of the folders under mvtec_root; auto detects it."""
    images: str | None = None
    """With --layout folders: the folder of images, inside the category or anywhere; by default images."""
    masks: str | None = None
    """With --layout folders: the folder of masks, which have the names of their images; by default masks."""
    mask_suffix: str | None = None
    """With --layout folders: what a mask's name adds to its image's name, such as _mask. By default: detected."""

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
        """Whether the settings name folders of images or masks. Only one layout uses them."""
        return not (self.images is None and self.masks is None and self.mask_suffix is None)


DEFAULTS = LayoutSettings()
"""The default settings."""


def layout_of(root: Path, settings: LayoutSettings = DEFAULTS) -> str:
    """Return the name of the layout: the one in the settings or, with `auto`, the first that is recognised.

    If none is recognised, this is MVTec AD's layout, because its error messages help most people.

    Raises:
        FlawmaskError: there is no folder `root`.
    """
    if settings.layout == FOLDERS or settings.names_folders:
        if not _folders(settings).stands_alone(root):
            _check_root(root)
        return FOLDERS
    _check_root(root)
    if settings.layout != AUTO:
        return settings.layout
    others = (name for name in LAYOUTS if name != FALLBACK)
    return next((name for name in others if LAYOUTS[name].recognised(root)), FALLBACK)


def log_layout(layout: str, root: Path, settings: LayoutSettings) -> None:
    """Log which layout was recognised, if the settings do not name one."""
    if settings.layout == AUTO:
        log.info("%s has the layout %s", root, layout)


def _check_root(root: Path) -> None:
    if not root.is_dir():
        parent = next((path for path in root.absolute().parents if path.is_dir()), None)
        content = f" ({parent} holds {listed(parent)})" if parent else ""
        raise FlawmaskError(f"{root} is not a folder{content}: give the folder of the categories with --mvtec_root")


def _folders(settings: LayoutSettings) -> Folders:
    names = {"images": settings.images, "masks": settings.masks, "mask_suffix": settings.mask_suffix}
    return Folders(**{name: value for name, value in names.items() if value is not None})


def _layout(root: Path, settings: LayoutSettings) -> Layout:
    name = layout_of(root, settings)
    return _folders(settings) if name == FOLDERS else LAYOUTS[name]


def categories(root: Path, settings: LayoutSettings = DEFAULTS) -> list[str]:
    """Return the names of the categories under `root`, sorted.

    Raises:
        FlawmaskError: there is no such folder, or no category in it.
    """
    return _layout(root, settings).categories(root)


def chosen_categories(root: Path, text: str, settings: LayoutSettings = DEFAULTS) -> list[str]:
    """Return the categories that `--category` names: one, several as `a,b,c`, or `all`.

    Raises:
        FlawmaskError: a category does not exist (the message lists those that do), or none is named.
    """
    layout, wanted = _layout(root, settings), names_in(text)
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
    """Return the unique names in `a,b,c`."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _check_known(root: Path, category: str, known: Sequence[str]) -> None:
    if category not in known:
        hint = "; if it has another layout, name that with --layout" if (root / category).is_dir() else ""
        raise FlawmaskError(f"{root} has no category {category}: it has {', '.join(known)}{hint}")


def samples(root: Path, category: str, settings: LayoutSettings = DEFAULTS) -> list[Sample]:
    """Return the images of a category, always in the same order.

    Raises:
        FlawmaskError: the root or the category does not exist (the message lists what does), or it has no image.
    """
    return _with_good_names(_with_category(root, category, settings).samples(root, category), settings)


def problems(root: Path, category: str, settings: LayoutSettings = DEFAULTS) -> list[Problem]:
    """Return the problems in the folders and file names of a category; their `where` is relative to `root`.

    Raises:
        FlawmaskError: the root or the category does not exist (the message lists what does), or it has no image.
    """
    found = _with_category(root, category, settings).problems(root, category)
    return [*found, *_good_by_another_name(samples(root, category, settings), category, settings)]


def _with_category(root: Path, category: str, settings: LayoutSettings) -> Layout:
    """Return the layout, after checking that the category exists."""
    found = _layout(root, settings)
    if not (isinstance(found, Folders) and found.stands_alone(root)):
        _check_known(root, category, found.categories(root))
    return found


def select_samples(found: Sequence[Sample], good_images: Literal["test", "all"]) -> list[Sample]:
    """Return the samples that `--good_images` selects: all, or all except good images for training."""
    return [sample for sample in found if good_images == "all" or sample.origin == "test" or not sample.is_good]


def _with_good_names(found: Sequence[Sample], settings: LayoutSettings) -> list[Sample]:
    """Return the samples, with the types in `--good_name` renamed to good. Their black masks become labels."""
    names = settings.good_names
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


def _good_by_another_name(found: Sequence[Sample], category: str, settings: LayoutSettings) -> list[Problem]:
    """Return an error for each type whose name probably means good images, unless `--good_name` is given."""
    if settings.good_name is not None:
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
            f"holds {len(of_kind)} images of the type {kind}, a name that looks like that of good images: give "
            f"--good_name {kind} if they are good, or --good_name {GOOD} if it is a type of defect",
        )
        for kind, of_kind in sorted(folders.items())
    ]


def tallies(
    root: Path,
    category: str,
    used: Sequence[Sample],
    left_out: Mapping[str, Sequence[Sample]],
    settings: LayoutSettings = DEFAULTS,
) -> tuple[Tally, Tally]:
    """Return the tallies of the image files and of the label files in a category.

    Other files that lie directly in the category's folder describe it, and are not counted.

    Args:
        root: the folder that holds the categories.
        category: the category.
        used: the samples that are used.
        left_out: the samples that are not used, by reason.
        settings: the settings of the layout.
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
    layout = _layout(root, settings)
    places = layout.places(root, category) if isinstance(layout, Folders) else []
    if not (isinstance(layout, Folders) and layout.stands_alone(root)):
        places.append(root / category)  # it may hold files that the layout does not use
    for place in places:
        for path in walk(place):
            below = path.relative_to(place)
            is_description = len(below.parts) == 1 and place == root / category and not is_image(path)
            if path not in known and not is_description:
                known.add(path)
                is_mask_folder = place != places[0] and place in places[1:2]
                kind, reason = _classify_unused(path, below, is_mask_folder=is_mask_folder)
                (labels if kind == "label" else images).leave_out(where_of(path, root), reason)
    return images, labels


def _classify_unused(path: Path, below: Path, *, is_mask_folder: bool) -> tuple[Literal["image", "label"], str]:
    """Return whether an unused file is an image or a label file, and why it is not used."""
    suffix = path.suffix.lower()
    is_label = is_mask_folder or not MASK_FOLDERS.isdisjoint(part.casefold() for part in below.parts[:-1])
    is_label = is_label or suffix in LABEL_SUFFIXES or path.stem.casefold().endswith(("_gt", "_mask"))
    if not is_image(path):
        return "label" if is_label else "image", f"suffix {suffix or 'missing'}"
    where = "no image" if is_label else f"in {'/'.join(below.parts[:-1][:2]) or '.'}"
    return "label" if is_label else "image", where
