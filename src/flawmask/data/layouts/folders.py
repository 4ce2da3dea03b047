"""Plain folders: one with images and one with masks, such as `images/7.png` and `masks/7_mask.png`.

This is not the layout of a published data set, but of people who label with a painting program. A mask has the name of
its image, perhaps with a suffix. Images may lie in subfolders, with their masks in the same subfolders. If the first
subfolder is called `train`, `val` or `test`, it is the image's split, and the next one is the defect type. Otherwise
the first subfolder is the defect type. An image is good if its mask is black, or if it has no mask and no subfolder
gives a type.
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
"""The defect type of images that are not in a type's folder."""

NO_MASK = "no mask"
"""The kind of problem for images that count as good because they have no mask."""

ORIGINS: dict[str, Origin] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""The splits by the names of their folders."""


@dataclass(frozen=True)
class Folders:
    """The layout with the names that the user gave.

    Attributes:
        images: the folder of images, inside the category; or else a path that does not depend on root and category.
        masks: the folder of masks, in the same way.
        mask_suffix: what a mask's name adds to its image's name, before the file's suffix; None to find it.
    """

    images: str = "images"
    masks: str = "masks"
    mask_suffix: str | None = None

    def recognised(self, root: Path) -> bool:
        """Return whether a folder under `root` contains both folders."""
        return any(all((folder / name).is_dir() for name in (self.images, self.masks)) for folder in folders_in(root))

    def stands_alone(self, root: Path) -> bool:
        """Return whether `images` is a path of its own. Then the category is only a name."""
        is_below = any((folder / self.images).is_dir() for folder in folders_in(root))
        return Path(self.images).is_dir() and (Path(self.images).is_absolute() or not is_below)

    def categories(self, root: Path) -> list[str]:
        """Return the names of the folders under `root` that contain the folder of images, sorted.

        Raises:
            FlawmaskError: there is none.
        """
        return categories_with(root, self.images, self.masks, "; name the folders with --images and --masks")

    def places(self, root: Path, category: str) -> list[Path]:
        """Return the folder of images and the folder of masks.

        Raises:
            FlawmaskError: one of them does not exist.
        """
        folder = Path() if self.stands_alone(root) else root / category
        found = [folder / self.images, folder / self.masks]
        for path, flag in zip(found, ("--images", "--masks"), strict=True):
            if not path.is_dir():
                there = f": {folder} holds {listed(folder)}" if folder.is_dir() else ""
                raise FlawmaskError(f"{path} is not a folder{there}; name it with {flag}")
        return found

    def samples(self, root: Path, category: str) -> list[Sample]:
        """Return the images below the folder of images, sorted by path.

        Raises:
            FlawmaskError: a folder is missing, there is no image, or the names of masks and images do not match.
        """
        place, images, masks = self._files(root, category)
        files = [path for of_image in masks.values() for path in of_image]
        black = {path for path, is_black in zip(files, are_black(files), strict=True) if is_black}
        return [
            self._sample(root, image, image.relative_to(place), masks.get(_key(image, place), []), black)
            for image in images
        ]

    def problems(self, root: Path, category: str) -> list[Problem]:
        """Return masks without an image, several masks of one image, and images without a mask, which count as good.

        Raises:
            FlawmaskError: a folder is missing, there is no image, or the names of masks and images do not match.
        """
        place, images, masks = self._files(root, category)
        keys = {_key(image, place) for image in images}
        message = "belongs to no image: add the image, or name the mask after it"
        found = [
            Problem("warning", "orphan masks", where_of(path, root), message)
            for key, paths in masks.items()
            for path in paths
            if key not in keys
        ]
        for first, *others in masks.values():
            message = f"and {first.name} are masks of one image: take one of them out"
            found += [Problem("error", "masks of one image", where_of(path, root), message) for path in others]
        unmasked = [image for image in images if _key(image, place) not in masks and _says(image, place)[1] is None]
        if unmasked:
            message = f"is the first of {len(unmasked)} images (of {len(images)}) without a mask, which count as good"
            found.append(Problem("warning", NO_MASK, where_of(unmasked[0], root), message))
        return found

    def _files(self, root: Path, category: str) -> tuple[Path, list[Path], dict[PurePath, list[Path]]]:
        """Return the folder of images, the images in it, and the masks by the `_key` of their image."""
        image_folder, mask_folder = self.places(root, category)
        if image_folder == mask_folder and not self.mask_suffix:
            raise FlawmaskError(
                f"{image_folder} holds both images and masks: give the ending of the masks' names with --mask_suffix"
            )
        masks = images_below(mask_folder)
        if image_folder == mask_folder:
            masks = [path for path in masks if path.stem.endswith(self.mask_suffix or "")]
        images = sorted(set(images_below(image_folder)) - set(masks))
        if not images:
            raise FlawmaskError(f"{image_folder} holds no image (png, jpg, jpeg, bmp, tif, tiff)")
        suffix = (
            self._suffix(image_folder, images, mask_folder, masks) if self.mask_suffix is None else self.mask_suffix
        )
        by_key: dict[PurePath, list[Path]] = {}
        for path in masks:
            key = _key(path, mask_folder)
            stem = path.stem.removesuffix(suffix)  # a mask without the suffix keeps its name, and belongs to no image
            by_key.setdefault(key.with_name(stem) if stem else key, []).append(path)
        return image_folder, images, by_key

    def _suffix(self, image_folder: Path, images: Sequence[Path], mask_folder: Path, masks: Sequence[Path]) -> str:
        """Return what the names of most masks add to the names of their images.

        Raises:
            FlawmaskError: there is no common suffix.
        """
        keys = {_key(image, image_folder) for image in images}
        suffixes: Counter[str] = Counter()
        for path in masks:
            key = _key(path, mask_folder)
            lengths = range(len(path.stem), 0, -1)
            suffixes.update([path.stem[n:] for n in lengths if key.with_name(path.stem[:n]) in keys][:1])
        suffix, count = max(suffixes.items(), key=lambda pair: (pair[1], -len(pair[0])), default=("", 0))
        if 2 * count <= len(masks):
            names = f"{images[0].name} and {masks[0].name}, for example" if masks else "there is no mask"
            raise FlawmaskError(
                f"{mask_folder}: the names of the masks do not match those of the images in {image_folder} "
                f"({names}): name each mask after its image, perhaps with a suffix that --mask_suffix gives"
            )
        return suffix

    def _sample(self, root: Path, image: Path, place: PurePath, masks: Sequence[Path], black: set[Path]) -> Sample:
        """Return an image's sample.

        Args:
            root: the root.
            image: the image file.
            place: the image's path relative to the folder of images.
            masks: the image's masks.
            black: all black masks, of this and other images.
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
    """Return a key that is equal for an image and its mask: the path inside their folders, without the suffix."""
    below = path.relative_to(place)
    return below.with_name(path.stem)


def _says(image: Path, place: Path) -> tuple[Origin, str | None]:
    """Return an image's split and defect type according to its subfolders; the type is None if they do not give one."""
    folders = image.relative_to(place).parts[:-1]
    origin = ORIGINS.get(folders[0].casefold()) if folders else None
    kinds = folders[1:] if origin else folders
    return origin or "test", kinds[0] if kinds else None
