"""A category in MVTec AD's layout: which images there are, of which defect type, and where their masks lie."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flawmask.coco import GOOD
from flawmask.errors import FlawmaskError
from flawmask.images import is_image

SHOWN = 12  # names in a message that says what is there


@dataclass(frozen=True)
class Sample:
    """One image of a category.

    Attributes:
        image: its file.
        mask: its ground-truth file; None for a good image, and for a defective one whose mask is missing.
        defect_type: the folder's name under `test`, `good` for a good one.
        original_file: the image's POSIX path relative to the root that holds the categories.
    """

    image: Path
    mask: Path | None
    defect_type: str
    original_file: str

    @property
    def is_good(self) -> bool:
        """Whether the image shows no defect."""
        return self.defect_type == GOOD


def categories(mvtec_root: Path) -> list[str]:
    """Return the names of the folders under `mvtec_root` that hold a `test` folder, sorted.

    Raises:
        FlawmaskError: there is no such folder, or no category in it.
    """
    if not mvtec_root.is_dir():
        near = next((path for path in mvtec_root.absolute().parents if path.is_dir()), None)
        there = f" ({near} holds {_listed(near)})" if near else ""
        raise FlawmaskError(
            f"{mvtec_root} is no folder{there}: name the one that holds the categories with --mvtec_root"
        )
    found = sorted(path.name for path in mvtec_root.iterdir() if (path / "test").is_dir())
    if not found:
        raise FlawmaskError(
            f"{mvtec_root} holds no category, which is a folder with test/ and ground_truth/: "
            f"it holds {_listed(mvtec_root)}"
        )
    return found


def _listed(folder: Path) -> str:
    """Return what is in a folder, in a few words."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more or "nothing"


def chosen_categories(mvtec_root: Path, text: str) -> list[str]:
    """Return the categories that `--category` names: one, several as `a,b,c`, or `all` there are.

    Raises:
        FlawmaskError: one of them is not there (the message says what is), or none is named.
    """
    known = categories(mvtec_root)
    if text == "all":
        return known
    wanted = names_in(text)
    if not wanted:
        raise FlawmaskError(f"--category names none: {mvtec_root} has {', '.join(known)}")
    for name in wanted:
        _check_known(mvtec_root, name, known)
    return wanted


def names_in(text: str) -> list[str]:
    """Return the names in `a,b,c`, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _check_known(mvtec_root: Path, category: str, known: list[str]) -> None:
    if category not in known:
        raise FlawmaskError(f"{mvtec_root} has no category {category}: it has {', '.join(known)}")


def scan(mvtec_root: Path, category: str, good_images: Literal["test", "all"] = "test") -> list[Sample]:
    """Return the samples of a category, sorted by their path.

    Args:
        mvtec_root: the folder that holds the categories.
        category: the category's folder name.
        good_images: `all` takes `train/good` too.

    Raises:
        FlawmaskError: the root or the category is missing (the message says what is there), or no image is in it.
    """
    _check_known(mvtec_root, category, categories(mvtec_root))
    root = mvtec_root / category
    samples = []
    for folder in sorted(path for path in (root / "test").iterdir() if path.is_dir()):
        masks = {} if folder.name == GOOD else _mask_files(root / "ground_truth" / folder.name)
        for image in _images(folder):
            mask = masks.get(f"{image.stem}_mask") or masks.get(image.stem)
            samples.append(Sample(image, mask, folder.name, image.relative_to(mvtec_root).as_posix()))
    if good_images == "all" and (root / "train" / GOOD).is_dir():
        for image in _images(root / "train" / GOOD):
            samples.append(Sample(image, None, GOOD, image.relative_to(mvtec_root).as_posix()))
    if not samples:
        raise FlawmaskError(f"{root / 'test'} holds no image (png, jpg, jpeg, bmp, tif, tiff) in a folder per type")
    return samples


def _images(folder: Path) -> Iterator[Path]:
    yield from sorted(path for path in folder.iterdir() if is_image(path) and not path.is_dir())


def _mask_files(folder: Path) -> dict[str, Path]:
    """Return the mask files of a defect type by their stem.

    Raises:
        FlawmaskError: two of them have the same one.
    """
    found: dict[str, Path] = {}
    for path in _images(folder) if folder.is_dir() else ():
        if path.stem in found:
            raise FlawmaskError(f"{path} and {found[path.stem].name} are masks of one image: take one of them out")
        found[path.stem] = path
    return found
