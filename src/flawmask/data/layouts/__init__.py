"""How the folders of data sets lie: a module for each layout, and the list of them.

All others see a category's samples alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flawmask.data.layouts import mvtec
from flawmask.data.layouts.layout import Layout, MaskFile, Part, Problem, Sample, listed
from flawmask.errors import FlawmaskError
from flawmask.settings import Settings, require

__all__ = [
    "AUTO",
    "LAYOUTS",
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
    "taking_part",
]

LAYOUTS: dict[str, Layout] = {"mvtec": mvtec}
"""The layouts by name, in the order in which `auto` asks them."""

AUTO = "auto"
"""The layout that says: whichever is recognised."""


@dataclass(frozen=True, kw_only=True)
class LayoutName(Settings):
    """How the folders of the data set lie."""

    layout: str = AUTO
    """How the folders under mvtec_root lie; auto recognises it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = (AUTO, *LAYOUTS)
        require(self.layout in known, f"--layout {self.layout}: there are {', '.join(known)}")


def layout_of(root: Path, layout: str = AUTO) -> str:
    """Return a layout's name: the one given, or with `auto` the first that is recognised under `root`.

    Where none is, that is the first there is: what it says is missing helps most people.

    Raises:
        FlawmaskError: there is no folder `root`.
    """
    if not root.is_dir():
        near = next((path for path in root.absolute().parents if path.is_dir()), None)
        there = f" ({near} holds {listed(near)})" if near else ""
        raise FlawmaskError(f"{root} is no folder{there}: name the one that holds the categories with --mvtec_root")
    if layout != AUTO:
        return layout
    return next((name for name, one in LAYOUTS.items() if one.recognised(root)), next(iter(LAYOUTS)))


def categories(root: Path, layout: str = AUTO) -> list[str]:
    """Return the names of the categories under `root`, sorted.

    Raises:
        FlawmaskError: there is no such folder, or no category in it.
    """
    return LAYOUTS[layout_of(root, layout)].categories(root)


def chosen_categories(root: Path, text: str, layout: str = AUTO) -> list[str]:
    """Return the categories that `--category` names: one, several as `a,b,c`, or `all` there are.

    Raises:
        FlawmaskError: one of them is not there (the message says what is), or none is named.
    """
    known = categories(root, layout)
    if text == "all":
        return known
    wanted = names_in(text)
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
        raise FlawmaskError(f"{root} has no category {category}: it has {', '.join(known)}")


def samples(root: Path, category: str, layout: str = AUTO) -> list[Sample]:
    """Return the images of a category, always in the same order.

    Raises:
        FlawmaskError: the root or the category is missing (the message says what is there), or no image is in it.
    """
    return _with_category(root, category, layout).samples(root, category)


def problems(root: Path, category: str, layout: str = AUTO) -> list[Problem]:
    """Return what is wrong with the folders and file names of a category; `where` is relative to `root`.

    Raises:
        FlawmaskError: the root or the category is missing (the message says what is there), or no image is in it.
    """
    return _with_category(root, category, layout).problems(root, category)


def _with_category(root: Path, category: str, layout: str) -> Layout:
    """Return the layout, once it is sure that the category is there."""
    found = LAYOUTS[layout_of(root, layout)]
    _check_known(root, category, found.categories(root))
    return found


def taking_part(found: Sequence[Sample], good_images: Literal["test", "all"]) -> list[Sample]:
    """Return the samples without the good ones of the training images, or all of them: what `--good_images` says."""
    return [sample for sample in found if good_images == "all" or sample.origin == "test" or not sample.is_good]
