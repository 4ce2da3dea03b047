"""Plain folders: one of images, one of masks with the same names or a suffix more: `images/7.png`, `masks/7_mask.png`.

This is no data set's layout, but what people have who label with a painting program. Images may lie in folders, with
masks at the same places. A first folder `train`, `val` or `test` says what an image is for; the next, or else the
first, is the type of its defect. A black mask says that an image is good; so does a missing one where no folder says a
type.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from flawmask.data.layouts.layout import (
    MaskFile,
    Origin,
    Problem,
    Sample,
    categories_with,
    folders_in,
    images_below,
    listed,
    where_of,
)
from flawmask.data.layouts.mask_values import are_black
from flawmask.errors import FlawmaskError
from flawmask.good_names import GOOD
from flawmask.images import to_mask

DEFECT = "defect"
"""The type of a defect in no folder of its own."""

NO_MASK = "no mask"
"""The kind of the problem that images without a mask count as good."""

ORIGINS: dict[str, Origin] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""What the folders of splits are called."""


@dataclass(frozen=True)
class Folders:
    """The layout, with the names that the user gave.

    Attributes:
        images: the folder of images, below the category, or else a path of its own, whatever the root and the category.
        masks: the folder of masks likewise.
        mask_suffix: what a mask's name has more than its image's, before the file's suffix; None to find it.
    """

    images: str = "images"
    masks: str = "masks"
    mask_suffix: str | None = None

    def recognised(self, root: Path) -> bool:
        """Return whether a folder under `root` holds both folders."""
        return any(all((folder / name).is_dir() for name in (self.images, self.masks)) for folder in folders_in(root))

    def stands_alone(self, root: Path) -> bool:
        """Return whether the images lie in a folder of their own, and the category is but a name."""
        is_below = any((folder / self.images).is_dir() for folder in folders_in(root))
        return Path(self.images).is_dir() and (Path(self.images).is_absolute() or not is_below)

    def categories(self, root: Path) -> list[str]:
        """Return the names of the folders under `root` that hold the folder of images, sorted.

        Raises:
            FlawmaskError: there is none.
        """
        return categories_with(root, self.images, self.masks, "; name the folders with --images and --masks")

    def places(self, root: Path, category: str) -> list[Path]:
        """Return the folder of images and that of masks.

        Raises:
            FlawmaskError: one is not there.
        """
        folder = Path() if self.stands_alone(root) else root / category
        found = [folder / self.images, folder / self.masks]
        for path, flag in zip(found, ("--images", "--masks"), strict=True):
            if not path.is_dir():
                there = f": {folder} holds {listed(folder)}" if folder.is_dir() else ""
                raise FlawmaskError(f"{path} is no folder{there}; name it with {flag}")
        return found

    def samples(self, root: Path, category: str) -> list[Sample]:
        """Return the images below the folder of images, sorted by their path.

        Raises:
            FlawmaskError: a folder is not there, there is no image, or no suffix explains the names of the masks.
        """
        place, images, masks = self._files(root, category)
        files = [path for of_image in masks.values() for path in of_image]
        black = {path for path, is_black in zip(files, are_black(files), strict=True) if is_black}
        return [
            self._sample(root, image, image.relative_to(place), masks.get(_key(image, place), []), black)
            for image in images
        ]

    def problems(self, root: Path, category: str) -> list[Problem]:
        """Return masks without an image or of the same one, and how many images without a mask count as good.

        Raises:
            FlawmaskError: a folder is not there, there is no image, or no suffix explains the names of the masks.
        """
        place, images, masks = self._files(root, category)
        there = {_key(image, place) for image in images}
        message = "belongs to no image: add the image, or name the mask after it"
        found = [
            Problem("warning", "orphan masks", where_of(path, root), message)
            for key, paths in masks.items()
            for path in paths
            if key not in there
        ]
        for first, *others in masks.values():
            message = f"and {first.name} are masks of one image: take one of them out"
            found += [Problem("error", "masks of one image", where_of(path, root), message) for path in others]
        bare = [image for image in images if _key(image, place) not in masks and _says(image, place)[1] is None]
        if bare:
            message = f"is the first of {len(bare)} images (of {len(images)}) without a mask, which count as good"
            found.append(Problem("warning", NO_MASK, where_of(bare[0], root), message))
        return found

    def _files(self, root: Path, category: str) -> tuple[Path, list[Path], dict[PurePath, list[Path]]]:
        """Return the folder of images, the images in it, and the masks by the `_key` of their image."""
        at, masks_at = self.places(root, category)
        if at == masks_at and not self.mask_suffix:
            raise FlawmaskError(f"{at} holds both images and masks: say with --mask_suffix what tells the masks")
        masks = images_below(masks_at)
        if at == masks_at:
            masks = [path for path in masks if path.stem.endswith(self.mask_suffix or "")]
        images = sorted(set(images_below(at)) - set(masks))
        if not images:
            raise FlawmaskError(f"{at} holds no image (png, jpg, jpeg, bmp, tif, tiff)")
        suffix = self._suffix(at, images, masks_at, masks) if self.mask_suffix is None else self.mask_suffix
        by_key: dict[PurePath, list[Path]] = {}
        for path in masks:
            key = _key(path, masks_at)
            stem = path.stem.removesuffix(suffix)  # of a mask without it, what it has: then it is no image's
            by_key.setdefault(key.with_name(stem) if stem else key, []).append(path)
        return at, images, by_key

    def _suffix(self, at: Path, images: Sequence[Path], masks_at: Path, masks: Sequence[Path]) -> str:
        """Return what the names of most masks have more than those of their images.

        Raises:
            FlawmaskError: there is nothing that they have in common.
        """
        keys = {_key(image, at) for image in images}
        tails: Counter[str] = Counter()
        for path in masks:
            key = _key(path, masks_at)
            lengths = range(len(path.stem), 0, -1)
            tails.update([path.stem[n:] for n in lengths if key.with_name(path.stem[:n]) in keys][:1])
        (tail, count) = max(tails.items(), key=lambda one: (one[1], -len(one[0])), default=("", 0))
        if 2 * count <= len(masks):
            names = f"{images[0].name} and {masks[0].name} for one" if masks else "there is no mask"
            raise FlawmaskError(
                f"{masks_at}: the names of the masks do not follow from those of the images in {at} ({names}): name "
                "each mask after its image, perhaps with a suffix that --mask_suffix says"
            )
        return tail

    def _sample(self, root: Path, image: Path, place: PurePath, masks: Sequence[Path], black: set[Path]) -> Sample:
        """Return an image's sample.

        Args:
            root: the root.
            image: its file.
            place: its path below the folder of images.
            masks: its masks.
            black: those masks, among others, that mark nothing.
        """
        origin, kind = _says(image, image.parents[len(place.parts) - 1])
        is_good = kind == GOOD or (all(path in black for path in masks) and bool(masks or kind is None))
        name = GOOD if is_good else kind or DEFECT
        mask = place.with_name(f"{place.stem}{self.mask_suffix or ''}.png")
        wanted = f"{self.masks}/{mask.as_posix()}"
        return Sample(
            image=image,
            masks=() if is_good else tuple(MaskFile(path, to_mask, name) for path in masks),
            defect_type=name,
            origin=origin,
            original_file=where_of(image, root),
            mask_wanted="" if is_good else wanted,
            good_folder=f"{self.images}/{GOOD}",
            good_by=f"paint {wanted} black",
            labels=tuple(path for path in masks if path in black) if is_good else (),
        )


def _key(path: Path, place: Path) -> PurePath:
    """Return what an image and its mask have in common: the path below their folders, without the file's suffix."""
    below = path.relative_to(place)
    return below.with_name(path.stem)


def _says(image: Path, place: Path) -> tuple[Origin, str | None]:
    """Return what the folders that an image lies in say: what it is for, and its type, None where they say none."""
    folders = image.relative_to(place).parts[:-1]
    origin = ORIGINS.get(folders[0].casefold()) if folders else None
    kinds = folders[1:] if origin else folders
    return origin or "test", kinds[0] if kinds else None
