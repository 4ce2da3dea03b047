"""What a layout is: it says which samples a category has, and what is wrong with its folders."""

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
"""What of a mask's file is looked at: its colours or grey values, its alpha channel, the numbers of its palette, or
these numbers where it has a palette and its values where it has none."""

SHOWN = 12  # names in a message that says what is there

Origin = Literal["train", "val", "test"]
"""What a data set has an image for."""


@dataclass(frozen=True)
class MaskFile:
    """A file that marks a defect, and how it is read.

    Attributes:
        path: the file. Several masks may come from the same one, each by another rule.
        rule: takes the file's pixels as `images.decode` gives them, and returns (height, width) bool, True on the
            defect. `images.to_mask` stands for the rule that suits all masks of the category (`data/mask_files.py`).
            Where several take the same file, some may find nothing in it, but not all of them.
        defect_type: the type of the defect that it marks.
        part: what of the file the rule takes.
    """

    path: Path
    rule: Callable[[Pixels], Mask]
    defect_type: str
    part: Part = "colour"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image of a category.

    Attributes:
        image: its file.
        masks: what marks its defects; empty for a good image, and for a defective one whose mask is missing.
        defect_type: the type that the image counts for, `good` for a good one.
        group: what images of the same part share; None where the layout says none.
        origin: whether the data set has the image for training, for validation or for testing.
        original_file: the image's POSIX path relative to the root.
        mask_wanted: where its mask should be, for messages: a POSIX path relative to the category; empty for a good
            image.
        good_folder: where it would lie if it were good, for messages: a POSIX path relative to the category.
        labels: further files that its label was read from, such as the black mask of a good image.
        good_by: what would make it good, for messages, where that is not the folder that it lies in.
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
        """What to do with the image if it is good, for messages."""
        return self.good_by or f"move the image to {self.good_folder}"


@dataclass(frozen=True)
class Problem:
    """One thing found wrong with a data set.

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


class Layout(Protocol):
    """How the folders of a data set lie. A module with these functions is one.

    `root` is a folder that is there, and `category` one of `categories(root)`.
    """

    def recognised(self, root: Path) -> bool:
        """Return whether the folders under `root` lie like this."""

    def categories(self, root: Path) -> list[str]:
        """Return the names of the categories under `root`, sorted.

        Raises:
            FlawmaskError: there is none; the message says what one would be.
        """

    def samples(self, root: Path, category: str) -> list[Sample]:
        """Return the images of a category, always in the same order.

        Raises:
            FlawmaskError: there is no image to test with.
        """

    def problems(self, root: Path, category: str) -> list[Problem]:
        """Return what is wrong with the folders and file names of a category; `where` is relative to `root`.

        With an error among them, no data set is made of the category.

        Raises:
            FlawmaskError: there is no image to test with.
        """


def folders_in(folder: Path) -> list[Path]:
    """Return the folders in a folder, sorted, without junk; none where there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not is_junk(path.name))


def images_below(folder: Path) -> list[Path]:
    """Return the image files below a folder, sorted by their path; none where there is no such folder."""
    return [path for path in walk(folder) if is_image(path)]


def where_of(path: Path, root: Path) -> str:
    """Return a file's POSIX path relative to the root, or all of it where it lies elsewhere."""
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def categories_with(root: Path, inside: str, beside: str, advice: str = "") -> list[str]:
    """Return the names of the folders under `root` that hold a folder, sorted.

    Args:
        root: the folder of categories.
        inside: what each holds.
        beside: what each holds too, for the message.
        advice: what else to do, for the message.

    Raises:
        FlawmaskError: there is none.
    """
    found = [folder.name for folder in folders_in(root) if (folder / inside).is_dir()]
    if not found:
        wanted = f"a folder with {inside}/ and {beside}/"
        raise FlawmaskError(f"{root} holds no category, which is {wanted}: it holds {listed(root)}{advice}")
    return found


def listed(folder: Path) -> str:
    """Return what is in a folder, in a few words."""
    names = sorted(path.name for path in folder.iterdir() if not is_junk(path.name))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more or "nothing"
