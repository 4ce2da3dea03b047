"""KolektorSDD2's layout: `<category>/train/10000.png` and `<category>/test/20000.png`.

The mask of an image lies beside it, `10000_GT.png`. It is black if the image is good.

Božič et al., "Mixed supervision for surface-defect detection: from weakly to fully supervised learning", Computers in
Industry 129, 2021; https://www.vicos.si/resources/kolektorsdd2/.
"""

from pathlib import Path

from flawmask.data.layouts.layout import MaskFile, Origin, Problem, Sample, folders_in, images_below, listed
from flawmask.data.layouts.mask_values import are_black, not_black
from flawmask.errors import FlawmaskError
from flawmask.good_names import GOOD

MARK = "_GT"
"""What a mask's name adds to its image's name."""

DEFECT = "defect"

PARTS: tuple[tuple[str, Origin], ...] = (("test", "test"), ("train", "train"))


def recognised(root: Path) -> bool:
    """Return whether a folder under `root` has a mask in `test` or `train`."""
    return any(_is_category(folder) for folder in folders_in(root))


def categories(root: Path) -> list[str]:
    """Return the names of the folders under `root` with a mask in `test` or `train`, sorted.

    Raises:
        FlawmaskError: there is none.
    """
    found = [folder.name for folder in folders_in(root) if _is_category(folder)]
    if not found:
        raise FlawmaskError(
            f"{root} holds no category, which is a folder with train/ and test/ and masks named *{MARK}.png in them: "
            f"it holds {listed(root)}"
        )
    return found


def samples(root: Path, category: str) -> list[Sample]:
    """Return the images below `test`, sorted by path, and then those below `train`.

    Raises:
        FlawmaskError: there is none.
    """
    found = [
        (image, masks.get(image.with_suffix("")), origin)
        for part, origin in PARTS
        for images, masks in [_files(root / category / part)]
        for image in images
    ]
    if not found:
        raise FlawmaskError(f"{root / category} holds no image in test/ or train/")
    black = iter(are_black(mask for _, mask, _ in found if mask is not None))
    return [
        _sample(root, category, image, mask, origin, is_good=mask is not None and next(black))
        for image, mask, origin in found
    ]


def problems(root: Path, category: str) -> list[Problem]:
    """Return masks without an image.

    Raises:
        FlawmaskError: there is no image.
    """
    used = {sample.image.with_suffix("") for sample in samples(root, category)}
    message = f"belongs to no image: add the image, or name the mask after it with {MARK}"
    return [
        Problem("warning", "orphan masks", mask.relative_to(root).as_posix(), message)
        for part, _ in PARTS
        for place, mask in _files(root / category / part)[1].items()
        if place not in used
    ]


def _is_category(folder: Path) -> bool:
    return any(True for part, _ in PARTS for _ in folder.glob(f"{part}/*{MARK}.*"))


def _files(folder: Path) -> tuple[list[Path], dict[Path, Path]]:
    """Return the images below a folder, and the masks by the path of their image without its suffix."""
    files = images_below(folder)
    masks = {path.with_name(path.stem.removesuffix(MARK)): path for path in files if path.stem.endswith(MARK)}
    return [path for path in files if not path.stem.endswith(MARK)], masks


def _sample(root: Path, category: str, image: Path, mask: Path | None, origin: Origin, *, is_good: bool) -> Sample:
    wanted = image.relative_to(root / category).with_name(f"{image.stem}{MARK}.png").as_posix()
    return Sample(
        image=image,
        masks=() if is_good or mask is None else (MaskFile(mask, not_black, DEFECT),),
        defect_type=GOOD if is_good else DEFECT,
        origin=origin,
        original_file=image.relative_to(root).as_posix(),
        mask_wanted="" if is_good else wanted,
        good_folder=origin,
        good_by=f"paint {wanted} black",
        labels=(mask,) if is_good and mask is not None else (),
    )
