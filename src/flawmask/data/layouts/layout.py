"""The interface of a layout, which returns a category's samples and the problems in its folders."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from flawmask.errors import FlawmaskError
from flawmask.files import is_junk, walk
from flawmask.good_names import GOOD
from flawmask.images import Pixels, is_image
from flawmask.masks import Mask

Part = Literal["colour", "alpha", "palette", "values"]
"""The part of a mask file that is read: colours or grey values, alpha channel, or palette indices. `values` means the
palette indices if the file has a palette, else the colours or grey values."""

SHOWN = 12  # the largest number of names in a message that lists a folder

Origin = Literal["train", "val", "test"]
"""The split of an image in the data set itself."""


@dataclass(frozen=True)
class MaskFile:
    """A file that marks a defect, and the rule for reading it.

    Attributes:
        path: the file. Several masks may be read from the same file, with different rules.
        rule: a function that takes the pixels that `images.decode` returns, and returns (height, width) bool, True on
            the defect. `images.to_mask` is a placeholder for the common rule of all masks of the category
            (`data/mask_files.py`). Of several rules for the same file, at least one must find a defect.
        defect_type: the type of the defect.
        part: the part of the file that the rule reads.
    """

    path: Path
    rule: Callable[[Pixels], Mask]
    defect_type: str
    part: Part = "colour"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image of a category.

    Attributes:
        image: the image file.
        masks: the masks of its defects; empty for a good image, and for a defective one whose mask is missing.
        defect_type: the image's defect type; `good` for a good image.
        group: a name that all images of the same part share; None if the layout does not say it.
        origin: the split of the image in the data set itself.
        original_file: the image's POSIX path relative to the root.
        mask_wanted: for messages, the path where its mask should be: a POSIX path relative to the category; empty for a
            good image.
        good_folder: for messages, the folder of good images: a POSIX path relative to the category.
        labels: further files that the image's type was read from, such as the black mask of a good image.
        good_by: for messages, what to do to make the image good, if that is not moving it to another folder.
    """

    image: Path
    masks: tuple[MaskFile, ...] = ()
    defect_type: str
    group: str | None = None
    origin: Origin
    original_file: str
    mask_wanted: str = ""
    good_folder: str
    labels: tuple[Path, ...] = ()
    good_by: str = ""

    @property
    def is_good(self) -> bool:
        """Whether the image shows no defect."""
        return self.defect_type == GOOD

    @property
    def if_good(self) -> str:
        """For messages, what to do with the image if it is good."""
        return self.good_by or f"move the image to {self.good_folder}"


@dataclass(frozen=True)
class Problem:
    """One problem of a data set.

    Attributes:
        severity: `error` if training would stop or its metrics would be wrong; `warning` if a person should look.
        kind: the kind of problem, in two or three words.
        where: the file, relative to the data set, or a split.
        message: what is wrong and what to do. It continues after `where`.
    """

    severity: Literal["error", "warning"]
    kind: str
    where: str
    message: str


class Layout(Protocol):
    """A folder layout. Each module with these functions is one.

    `root` is an existing folder, and `category` is one of `categories(root)`.
    """

    def recognised(self, root: Path) -> bool:
        """Return whether the folders under `root` have this layout."""

    def categories(self, root: Path) -> list[str]:
        """Return the names of the categories under `root`, sorted.

        Raises:
            FlawmaskError: there is none. The message says what a category looks like.
        """

    def samples(self, root: Path, category: str) -> list[Sample]:
        """Return the images of a category, always in the same order.

        Raises:
            FlawmaskError: there is no test image.
        """

    def problems(self, root: Path, category: str) -> list[Problem]:
        """Return the problems in the folders and file names of a category; their `where` is relative to `root`.

        If one of them is an error, the category is not converted.

        Raises:
            FlawmaskError: there is no test image.
        """


def folders_in(folder: Path) -> list[Path]:
    """Return the subfolders of a folder, sorted, without junk; none if the folder does not exist."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not is_junk(path.name))


def images_below(folder: Path) -> list[Path]:
    """Return the image files below a folder, sorted by path; none if the folder does not exist."""
    return [path for path in walk(folder) if is_image(path)]


def where_of(path: Path, root: Path) -> str:
    """Return a file's POSIX path relative to the root, or its full path if it is outside the root."""
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def categories_with(root: Path, inside: str, beside: str, advice: str = "") -> list[str]:
    """Return the names of the categories under `root`, sorted: of the folders that contain a certain folder.

    Args:
        root: the folder of categories.
        inside: the folder that each category contains.
        beside: another folder that each category contains, for the message.
        advice: further advice, for the message.

    Raises:
        FlawmaskError: there is none.
    """
    names = [folder.name for folder in folders_in(root) if (folder / inside).is_dir()]
    if not names:
        wanted = f"a folder with {inside}/ and {beside}/"
        raise FlawmaskError(f"{root} holds no category, which is {wanted}: it holds {listed(root)}{advice}")
    return names


def listed(folder: Path) -> str:
    """Return the names in a folder as text; long lists are cut off."""
    names = sorted(path.name for path in folder.iterdir() if not is_junk(path.name))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more or "nothing"
