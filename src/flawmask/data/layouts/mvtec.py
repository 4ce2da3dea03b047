"""MVTec AD's layout: `<category>/test/<type>`, `<category>/ground_truth/<type>` and `<category>/train/good`.

Bergmann et al., "MVTec AD: a comprehensive real-world dataset for unsupervised anomaly detection", CVPR 2019; what its
archive holds is described at https://www.mvtec.com/company/research/datasets/mvtec-ad.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from flawmask.coco import GOOD
from flawmask.data.layouts.layout import MaskFile, Problem, Sample, listed
from flawmask.errors import FlawmaskError
from flawmask.images import is_image, to_mask


def recognised(root: Path) -> bool:
    """Return whether a folder under `root` holds a `test` folder with a folder in it."""
    return any(path.is_dir() for path in root.glob("*/test/*"))


def categories(root: Path) -> list[str]:
    """Return the names of the folders under `root` that hold a `test` folder, sorted.

    Raises:
        FlawmaskError: there is none.
    """
    found = sorted(path.name for path in root.iterdir() if (path / "test").is_dir())
    if not found:
        raise FlawmaskError(
            f"{root} holds no category, which is a folder with test/ and ground_truth/: it holds {listed(root)}"
        )
    return found


def samples(root: Path, category: str) -> list[Sample]:
    """Return the images under `test`, sorted by their path, and then those of `train/good`.

    Images and masks belong together by their names: `004.png` and `004_mask.png`, or `004.png` too. Where two masks
    have the name of one image, the sample has both; `problems` says so.

    Raises:
        FlawmaskError: no image lies in a folder under `test`.
    """
    folder = root / category
    found = []
    for kind in _types(folder):
        masks = _masks(folder / "ground_truth" / kind.name) if kind.name != GOOD else {}
        for image in _images(kind):
            files = masks.get(f"{image.stem}_mask") or masks.get(image.stem, [])
            found.append(_sample(root, image, kind.name, "test", files))
    if not found:
        raise FlawmaskError(f"{folder / 'test'} holds no image (png, jpg, jpeg, bmp, tif, tiff) in a folder per type")
    return found + [_sample(root, image, GOOD, "train", []) for image in _images(folder / "train" / GOOD)]


def problems(root: Path, category: str) -> list[Problem]:
    """Return types without an image, masks without one, and masks that clash.

    Raises:
        FlawmaskError: no image lies in a folder under `test`.
    """
    found = samples(root, category)
    return [*_empty_types(root, category, found), *_orphan_masks(root, category, found), *_clashes(root, category)]


def _sample(root: Path, image: Path, kind: str, origin: Literal["train", "test"], masks: Sequence[Path]) -> Sample:
    return Sample(
        image=image,
        masks=tuple(MaskFile(path, to_mask, kind) for path in masks),
        defect_type=kind,
        origin=origin,
        original_file=image.relative_to(root).as_posix(),
        mask_wanted="" if kind == GOOD else f"ground_truth/{kind}/{image.stem}_mask.png",
        good_folder="test/good",
    )


def _types(folder: Path) -> list[Path]:
    """Return the folders of images under a category's `test`, good ones among them."""
    return sorted(path for path in (folder / "test").iterdir() if path.is_dir())


def _images(folder: Path) -> list[Path]:
    """Return the image files in a folder, sorted; none where there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if is_image(path) and not path.is_dir())


def _masks(folder: Path) -> dict[str, list[Path]]:
    """Return the mask files of a defect type by their stem."""
    found: dict[str, list[Path]] = {}
    for path in _images(folder):
        found.setdefault(path.stem, []).append(path)
    return found


def _empty_types(root: Path, category: str, found: Sequence[Sample]) -> Iterator[Problem]:
    """Yield a problem for each folder under `test` that holds no image."""
    seen = {sample.defect_type for sample in found if sample.origin == "test"}
    for folder in _types(root / category):
        if folder.name not in seen:
            where = folder.relative_to(root).as_posix()
            yield Problem("warning", "empty category", where, "holds no image: add some, or delete the folder")


def _orphan_masks(root: Path, category: str, found: Sequence[Sample]) -> Iterator[Problem]:
    """Yield a problem for each folder of masks without a folder of images, and for each mask without an image."""
    used = {mask.path for sample in found for mask in sample.masks}
    for folder in sorted(path for path in (root / category / "ground_truth").glob("*") if path.is_dir()):
        where = folder.relative_to(root).as_posix()
        if not (root / category / "test" / folder.name).is_dir():
            message = f"has no folder test/{folder.name} beside it: its masks are not used; add the images"
            yield Problem("warning", "orphan masks", where, message)
            continue
        for mask in sorted(folder.iterdir()):
            if is_image(mask) and mask not in used:
                message = (
                    f"belongs to no defective image of test/{folder.name}: add the image, or name the mask after it"
                )
                yield Problem("warning", "orphan masks", f"{where}/{mask.name}", message)


def _clashes(root: Path, category: str) -> Iterator[Problem]:
    """Yield a problem for each mask that has the name of one before it, but for the suffix."""
    for folder in _types(root / category):
        first: dict[str, Path] = {}
        for path in _images(root / category / "ground_truth" / folder.name) if folder.name != GOOD else ():
            other = first.setdefault(path.stem, path)
            if other != path:
                message = f"and {other.name} are masks of one image: take one of them out"
                yield Problem("error", "masks of one image", path.relative_to(root).as_posix(), message)
