"""The common code of several layouts with a folder for each defect type, `test/<type>`, and a folder for its masks."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from flawmask.data.layouts.layout import (
    MaskFile,
    Origin,
    Problem,
    Sample,
    categories_with,
    folders_in,
    images_below,
)
from flawmask.data.layouts.mask_values import are_black
from flawmask.errors import FlawmaskError
from flawmask.good_names import GOOD
from flawmask.images import Pixels, to_mask
from flawmask.masks import Mask

OTHER_PARTS: tuple[tuple[str, Origin], ...] = (("train", "train"), ("validation", "val"))
"""The folders beside the test images, and their splits."""


@dataclass(frozen=True)
class TypeFolders:
    """A layout: `<category>/<test>/<type>`, and perhaps `train/<type>` and `validation/<type>` beside it.

    An image may lie in a subfolder of its type. Its mask then lies in the same subfolder of the type's folder in
    `truth`; or in another subfolder, if the name is unique.

    Attributes:
        test: the folder of the test images.
        truth: the folder of the masks, inside the category. It has a folder for each type.
        good: the name of the folder of good images.
        has_several: whether each image has a folder of masks, named after it, instead of one mask.
        rule: the rule for reading a mask.
        group: returns the name of the part from the image's path inside the category; None if it is not known.
    """

    test: str = "test"
    truth: str = "ground_truth"
    good: str = GOOD
    has_several: bool = False
    rule: Callable[[Pixels], Mask] = to_mask
    group: Callable[[PurePath], str | None] = lambda _: None

    def recognised(self, root: Path) -> bool:
        """Return whether a folder under `root` contains the folder of test images, with a subfolder."""
        return any(self._types(folder, self.test) for folder in folders_in(root))

    def categories(self, root: Path) -> list[str]:
        """Return the names of the folders under `root` that contain the folder of test images, sorted.

        Raises:
            FlawmaskError: there is none.
        """
        return categories_with(root, self.test, self.truth)

    def samples(self, root: Path, category: str) -> list[Sample]:
        """Return the test images, sorted by path, and then the others.

        Images and masks are matched by name: the mask of `004.png` is `004_mask.png` or `004.png`. If two masks match
        one image, the sample has both, and `problems` reports it.

        Raises:
            FlawmaskError: no image lies in a folder under the test folder.
        """
        folder = root / category
        tests = self._of_part(root, folder, self.test, "test")
        if not tests:
            raise FlawmaskError(
                f"{folder / self.test} holds no image (png, jpg, jpeg, bmp, tif, tiff) in a folder per type"
            )
        others = [sample for part, origin in OTHER_PARTS for sample in self._of_part(root, folder, part, origin)]
        return tests + others

    def problems(self, root: Path, category: str) -> list[Problem]:
        """Return types without an image, masks without an image, and several masks of one image.

        Raises:
            FlawmaskError: no image lies in a folder under the test folder.
        """
        found = self.samples(root, category)
        return [
            *self._empty_types(root, category, found),
            *self._orphan_masks(root, category, found),
            *([] if self.has_several else self._clashes(root, category)),
        ]

    def _types(self, folder: Path, part: str) -> list[Path]:
        """Return the folders of images in a part of the category, with that of good images."""
        truth = folder / self.truth
        return [path for path in folders_in(folder / part) if not truth.is_relative_to(path)]

    def _masks_in(self, folder: Path, part: str, kind: str) -> Path:
        """Return the folder of a type's masks: `truth/<part>/<type>` or, for test images without it, `truth/<type>`."""
        own = folder / self.truth / part / kind
        return folder / self.truth / kind if part == self.test and not own.is_dir() else own

    def _of_part(self, root: Path, folder: Path, part: str, origin: Origin) -> list[Sample]:
        """Return the images of a part of the category, sorted by path."""
        found = []
        for kind in self._types(folder, part):
            images = images_below(kind)
            place = self._masks_in(folder, part, kind.name)
            files = _matched(images, kind, place, has_several=self.has_several)
            of_kind = [self._sample(root, folder, image, kind, place, origin, files[image]) for image in images]
            found += _with_black_masks(of_kind, files) if kind.name == self.good else of_kind
        return found

    def _sample(
        self, root: Path, folder: Path, image: Path, kind: Path, place: Path, origin: Origin, files: Sequence[Path]
    ) -> Sample:
        name = GOOD if kind.name == self.good else kind.name
        wanted = (place / image.relative_to(kind)).relative_to(folder)
        mask = wanted.with_suffix("") / "000.png" if self.has_several else wanted.with_name(f"{image.stem}_mask.png")
        return Sample(
            image=image,
            masks=() if name == GOOD else tuple(MaskFile(path, self.rule, name) for path in files),
            defect_type=name,
            group=self.group(image.relative_to(folder)),
            origin=origin,
            original_file=image.relative_to(root).as_posix(),
            mask_wanted="" if name == GOOD else mask.as_posix(),
            good_folder=kind.with_name(self.good).relative_to(folder).as_posix(),
        )

    def _empty_types(self, root: Path, category: str, found: Sequence[Sample]) -> Iterator[Problem]:
        """Yield a problem for each folder of a type of test images that holds no image."""
        used = {parent for sample in found for parent in sample.image.parents}
        for folder in self._types(root / category, self.test):
            if folder not in used:
                where = folder.relative_to(root).as_posix()
                yield Problem("warning", "empty category", where, "holds no image: add some, or delete the folder")

    def _truth_folders(self, folder: Path) -> Iterator[tuple[Path, str, str]]:
        """Yield each folder of masks, with the part and the type of its images."""
        parts = [self.test, *(part for part, _ in OTHER_PARTS)]
        for path in folders_in(folder / self.truth):
            if path.name in parts and not (folder / self.test / path.name).is_dir():
                yield from ((kind, path.name, kind.name) for kind in folders_in(path))
            else:
                yield path, self.test, path.name

    def _orphan_masks(self, root: Path, category: str, found: Sequence[Sample]) -> Iterator[Problem]:
        """Yield a problem for each folder of masks without a folder of images, and for each mask without an image."""
        used = {path for sample in found for path in (*(mask.path for mask in sample.masks), *sample.labels)}
        for folder, part, kind in self._truth_folders(root / category):
            where = folder.relative_to(root).as_posix()
            if not (root / category / part / kind).is_dir():
                message = f"has no folder {part}/{kind} beside it: its masks are not used; add the images"
                yield Problem("warning", "orphan masks", where, message)
                continue
            message = f"belongs to no defective image of {part}/{kind}: add the image, or name the mask after it"
            for mask in images_below(folder):
                if mask not in used:
                    yield Problem("warning", "orphan masks", mask.relative_to(root).as_posix(), message)

    def _clashes(self, root: Path, category: str) -> Iterator[Problem]:
        """Yield a problem for each mask whose name differs from an earlier one only in its suffix."""
        for folder, _, kind in self._truth_folders(root / category):
            first: dict[Path, Path] = {}
            for path in images_below(folder) if kind != self.good else ():
                other = first.setdefault(path.with_suffix(""), path)
                if other != path:
                    message = f"and {other.name} are masks of one image: take one of them out"
                    yield Problem("error", "masks of one image", path.relative_to(root).as_posix(), message)


def _with_black_masks(samples: Sequence[Sample], files: Mapping[Path, Sequence[Path]]) -> list[Sample]:
    """Return good samples with their black masks as labels."""
    masks = [mask for sample in samples for mask in files[sample.image]]
    black = {mask for mask, is_black in zip(masks, are_black(masks), strict=True) if is_black}
    return [replace(sample, labels=tuple(mask for mask in files[sample.image] if mask in black)) for sample in samples]


def _matched(images: Sequence[Path], kind: Path, place: Path, *, has_several: bool) -> dict[Path, list[Path]]:
    """Return the mask files of each image of a type.

    Args:
        images: the images.
        kind: the type's folder of images.
        place: the type's folder of masks.
        has_several: whether each image has a folder of masks, named after it.
    """
    masks = images_below(place)
    keys = [(mask.parent if has_several else mask.with_suffix("")).relative_to(place) for mask in masks]
    by_key: dict[PurePath, list[Path]] = defaultdict(list)
    by_name: dict[str, dict[PurePath, list[Path]]] = defaultdict(dict)
    for key, mask in zip(keys, masks, strict=True):
        by_key[key].append(mask)
        by_name[key.name][key] = by_key[key]
    stems = Counter(image.stem for image in images)

    def masks_of(image: Path) -> list[Path]:
        """Return the masks of an image: those beside it in its folder, else those of its name in another one."""
        here = image.relative_to(kind).with_suffix("")
        names = (image.stem,) if has_several else (f"{image.stem}_mask", image.stem)
        for name in names:
            if here.with_name(name) in by_key:
                return by_key[here.with_name(name)]
        for name in names:  # look in other folders if the name is unique among the images and among the masks
            if stems[image.stem] == 1 and len(by_name.get(name, ())) == 1:
                return next(iter(by_name[name].values()))
        return []

    return {image: masks_of(image) for image in images}
