"""Make variants of the training images. Image and masks are transformed together and exactly."""

import logging
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from zlib import crc32

import cv2
import numpy as np
import numpy.typing as npt

import flawmask
from flawmask import images
from flawmask.coco import (
    CocoSplit,
    Record,
    crop_annotation,
    instance_masks,
    read_split,
    total_tallies,
    write_split,
)
from flawmask.coco_files import split_names
from flawmask.data import dataset_info, intensity
from flawmask.data.intensity import IntensitySettings
from flawmask.errors import FlawmaskError
from flawmask.files import atomic_folder, read_json, write_json, write_json_lines
from flawmask.images import UPPER_BITS, Levels, Pixels
from flawmask.launch import usable_cores
from flawmask.masks import Crop, crop_mask
from flawmask.progress import track
from flawmask.settings import BadInput, Overwrite, Reading, Seed, as_json, require
from flawmask.tally import tallies_to_dict

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]

Side = TypeVar("Side", int, float)

GEOMETRIC: dict[str, Callable[[Array], Array]] = {
    "flip_h": lambda pixels: cv2.flip(pixels, 1),
    "rotate_90": lambda pixels: cv2.rotate(pixels, cv2.ROTATE_90_CLOCKWISE),
    "rotate_180": lambda pixels: cv2.rotate(pixels, cv2.ROTATE_180),
    "rotate_270": lambda pixels: cv2.rotate(pixels, cv2.ROTATE_90_COUNTERCLOCKWISE),
}
"""Transformations that move pixels without changing their values, for images and masks. Rotations are clockwise.

They use OpenCV, since NumPy takes ten times as long to rotate an image.
"""

VARIANTS = (*GEOMETRIC, "blur", "bright")
"""The names of all variants, as in the `augmentation` of an image record."""


@dataclass(frozen=True, kw_only=True)
class AugmentSettings(IntensitySettings, Seed, BadInput):
    """How many variants are added, and to which splits."""

    augmentation_factor: int = 0
    """Variants added to each training image, 0 to 6: flip, rotation by 90, 180 and 270 degrees, blur, brightness."""
    augment_val: bool = False
    """Add variants to the validation split too. Its metrics then no longer describe original images only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 <= self.augmentation_factor <= len(VARIANTS),
            f"--augmentation_factor is {self.augmentation_factor}: it must be 0 to {len(VARIANTS)}, since there are "
            f"{len(VARIANTS)} variants ({', '.join(VARIANTS)}) and none is used twice on one image",
        )
        require(
            not self.augment_val or self.augmentation_factor > 0,
            "--augment_val needs an --augmentation_factor of 1 or more: no variants are made without it",
        )


@dataclass(frozen=True, kw_only=True)
class AugmentConfig(AugmentSettings, Overwrite):
    """Add flipped, rotated, blurred and brightened variants to the training images of a COCO folder."""

    augmentation_factor: int = 3
    """Variants added to each training image, 0 to 6: flip, rotation by 90, 180 and 270 degrees, blur, brightness."""
    dataset_dir: Path
    """The COCO folder that prepare made."""
    output_dir: Path | None = None
    """The augmented COCO folder to write; by default <dataset_dir>_augmented."""

    @property
    def augmented_dir(self) -> Path:
        """The augmented COCO folder to write."""
        if self.output_dir:
            return self.output_dir
        named = self.dataset_dir if self.dataset_dir.name not in ("", "..") else self.dataset_dir.resolve()
        return named.with_name(f"{named.name}_augmented")


@dataclass(frozen=True)
class Augmented:
    """The result of `augment`.

    Attributes:
        dataset_dir: the augmented COCO folder.
        originals: the number of original images.
        variants: the number of variants that were added.
        reused: whether the folder existed already.
    """

    dataset_dir: Path
    originals: int
    variants: int
    reused: bool


@dataclass(frozen=True)
class _Variant:
    """One variant: its image record, its annotations (ids are assigned later), and the strength of the change."""

    image: Record
    annotations: list[Record]
    parameter: float | None


def augment(config: AugmentConfig) -> Augmented:
    """Make the augmented COCO folder.

    The original training images are copied byte for byte and keep their ids. The other splits are copied unchanged.

    Raises:
        FlawmaskError: the COCO folder is damaged; or the output folder holds something else, or a data set with another
            origin and `overwrite` is off.
    """
    names = sorted({"train", *split_names(config.dataset_dir)})  # if train is missing, `read_split` raises an error
    reading = Reading(on_error=config.on_error)
    splits = {name: read_split(config.dataset_dir, name, reading) for name in names}
    if any("augmentation" in image for split in splits.values() for image in split.images):
        raise FlawmaskError(f"{config.dataset_dir} holds variants already: augment the data set they were made from")
    if config.augmented_dir.resolve() == config.dataset_dir.resolve():
        raise FlawmaskError(f"{config.dataset_dir} cannot be augmented in place: name another --output_dir")
    origin = {
        "made_by": "flawmask augment",
        "settings": as_json(config, AugmentSettings),
        "source": {"dataset": config.dataset_dir.resolve().name, "sha256": dataset_info.content_of(splits)},
    }
    if dataset_info.is_made_already(config.augmented_dir, origin, overwrite=config.overwrite):
        info = read_json(config.augmented_dir / "augmentation_info.json")
        return Augmented(config.augmented_dir, info["originals"], len(info["variants"]), reused=True)
    for split in splits.values():
        split.warn(strict=False)
    originals = sum(len(split.images) for split in splits.values())
    levels = intensity.of_dataset(config.intensity, list(splits.values()))
    variants = _write(splits, originals, origin, levels, config)
    log.info("augmented %s: %d images and %d variants", config.augmented_dir, originals, variants)
    return Augmented(config.augmented_dir, originals, variants, reused=False)


def _write(
    splits: dict[str, CocoSplit], originals: int, origin: dict[str, Any], levels: Levels, config: AugmentConfig
) -> int:
    """Write the augmented COCO folder and return how many variants it holds."""
    made: list[dict[str, Any]] = []
    tally = tallies_to_dict(total_tallies(splits.values()))
    info: dict[str, Any] = {**origin, "version": flawmask.__version__, "tally": tally}
    if levels != UPPER_BITS:
        info["intensity"] = intensity.to_json(config.intensity, levels)
    if (config.dataset_dir / dataset_info.NAME).is_file():
        info["source_info"] = read_json(config.dataset_dir / dataset_info.NAME)
    with atomic_folder(config.augmented_dir) as folder:
        for name, split in splits.items():
            for image in split.images:
                target = folder / name / "images" / image["file_name"]
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(split.image_path(image), target)
            if name == "train" or (name == "val" and config.augment_val):
                variants = _augment_split(split, folder / name, levels, config)
                made += [_to_dict(name, variant) for variant in variants]
                _write_records(split, variants, folder / name)
                info[name] = dataset_info.counts([*split.images, *(variant.image for variant in variants)])
            else:
                _copy_records(split, folder / name)
                info[name] = dataset_info.counts(split.images)
        write_json(folder / dataset_info.NAME, info)
        write_json_lines(folder / "augmentation_info.json", {**origin, "originals": originals, "variants": made})
    return len(made)


def _copy_records(split: CocoSplit, folder: Path) -> None:
    """Copy the split's annotation file, or write a new one if images were left out or renamed."""
    listed = [image["file_name"] for image in read_json(split.annotation_file)["images"]]
    if listed == [image["file_name"] for image in split.images]:
        shutil.copyfile(split.annotation_file, folder / "annotations.json")
    else:
        _write_records(split, [], folder)


def _augment_split(split: CocoSplit, folder: Path, levels: Levels, config: AugmentSettings) -> list[_Variant]:
    """Write the variants of every image of the split into `folder/images` and return their records."""
    with ThreadPoolExecutor(usable_cores()) as pool:
        jobs = pool.map(lambda image: _variants_of(split, image, folder, levels, config), split.images)
        by_image = list(track(jobs, f"augmenting {split.name}", total=len(split.images)))
    variants = [variant for of_image in by_image for variant in of_image]
    next_id = max(image["id"] for image in split.images) + 1
    for number, variant in enumerate(variants, start=next_id):
        variant.image["id"] = number
    return variants


def _variants_of(
    split: CocoSplit, image: Record, folder: Path, levels: Levels, config: AugmentSettings
) -> list[_Variant]:
    """Write the variants of one image. The random draws depend only on the seed and the image's file name."""
    path = split.image_path(image)
    pixels = images.read_pixels(path)
    height, width = pixels.shape[:2]
    if (image["height"], image["width"]) != (height, width):
        raise FlawmaskError(
            f"{path} is {width}x{height} but its record says "
            f"{image['width']}x{image['height']}: export the annotations again"
        )
    rng = np.random.default_rng([config.seed, crc32(str(image["file_name"]).encode())])
    chosen = rng.permutation(len(VARIANTS))[: config.augmentation_factor]
    names = [VARIANTS[index] for index in sorted(chosen)]
    records = split.annotations[image["id"]]
    crops = _crops(records, height, width, str(path)) if not GEOMETRIC.keys().isdisjoint(names) else []
    variants = []
    for name in names:
        changed, parameter = _transform(name, pixels, levels, rng)
        record = {
            **image,
            "file_name": f"{path.stem}-{image['id']}__{name}.png",
            "height": changed.shape[0],
            "width": changed.shape[1],
            "augmentation": name,
            "source_id": image["id"],
        }
        target = folder / "images" / record["file_name"]
        if target.exists():
            raise FlawmaskError(f"{path.with_name(target.name)} has the name of a variant to be made: rename it")
        target.write_bytes(images.encode_png(changed))
        if name in GEOMETRIC:
            moved = [_moved(source, name, crop, height, width) for source, crop in zip(records, crops, strict=True)]
        else:
            moved = [dict(source) for source in records]
        variants.append(_Variant(record, moved, parameter))
    return variants


def _transform(name: str, pixels: Pixels, levels: Levels, rng: np.random.Generator) -> tuple[Pixels, float | None]:
    """Return the transformed image and its random strength; the strength is None for a geometric variant."""
    if name in GEOMETRIC:
        return GEOMETRIC[name](pixels), None
    if name == "blur":
        # Sigma grows with the image: a blur that is visible at 100 pixels would not be visible at 4000.
        sigma = rng.uniform(0.6, 1.6) * max(1.0, min(pixels.shape[:2]) / 512)
        return cv2.GaussianBlur(pixels, (0, 0), sigma), sigma  # type: ignore[return-value]
    # The factor stays away from 1, or the variant would be almost a copy.
    factor = rng.uniform(0.7, 0.9) if rng.random() < 0.5 else rng.uniform(1.1, 1.3)
    # A table needs one multiplication for each possible value. A 12-bit camera never writes values above 4095, so the
    # result is clipped to the levels.
    type_max = np.iinfo(pixels.dtype).max
    brightest = type_max if pixels.dtype == np.uint8 else max(levels[1], int(pixels.max()))
    table = np.clip(np.rint(np.arange(type_max + 1) * factor), 0, brightest).astype(pixels.dtype)
    return cv2.LUT(pixels, table) if pixels.dtype == np.uint8 else table[pixels], factor  # type: ignore[return-value]


def _crops(records: Sequence[Record], height: int, width: int, where: str) -> list[Crop]:
    """Return each annotation's mask, cropped to its box. Only one full-size mask is in memory at a time."""
    crops = []
    for record in records:
        (mask,) = instance_masks([record], height, width, where)
        crops.append(crop_mask(mask))
    return crops


def _moved(record: Record, name: str, crop: Crop, height: int, width: int) -> Record:
    """Return the annotation of a geometric variant. Box and area are computed again from the transformed mask.

    Args:
        record: the source's annotation.
        name: the variant's name.
        crop: the annotation's mask.
        height: the height of the source image.
        width: the width of the source image.
    """
    mask = GEOMETRIC[name](crop.mask.astype(np.uint8)).astype(bool)
    rows, columns = crop.mask.shape
    x, y = _moved_corner(name, crop.x, crop.y, columns, rows, height, width)
    swaps_sides = name in ("rotate_90", "rotate_270")
    size = (width, height) if swaps_sides else (height, width)
    new_record = crop_annotation(Crop(mask, x, y), *size, id=0, image_id=0, category_id=record["category_id"])
    if record.get("is_box"):  # a box may lie between pixels, while its mask cannot
        left, top, across, down = record["bbox"]
        corner = _moved_corner(name, left, top, across, down, height, width)
        new_record["bbox"] = [*corner, *((down, across) if swaps_sides else (across, down))]
    return {**record, **new_record, "iscrowd": record.get("iscrowd", 0)}


def _moved_corner(name: str, x: Side, y: Side, across: Side, down: Side, height: int, width: int) -> tuple[Side, Side]:
    """Return the upper left corner of a box after a geometric variant of its (height, width) image."""
    right, below = width - x - across, height - y - down
    return {
        "flip_h": (right, y),
        "rotate_90": (below, x),
        "rotate_180": (right, below),
        "rotate_270": (y, right),
    }[name]


def _write_records(split: CocoSplit, variants: list[_Variant], folder: Path) -> None:
    """Write the split's annotation file: first the records of the originals, unchanged, then those of the variants."""
    annotations = [record for image in split.images for record in split.annotations[image["id"]]]
    next_id = max((record["id"] for record in annotations), default=0) + 1
    for variant in variants:
        for record in variant.annotations:
            annotations.append({**record, "id": next_id, "image_id": variant.image["id"]})
            next_id += 1
    records = [*split.images, *(variant.image for variant in variants)]
    write_split(folder, records, annotations, split.categories)


def _to_dict(split: str, variant: _Variant) -> dict[str, Any]:
    return {
        "split": split,
        "file_name": variant.image["file_name"],
        "source_id": variant.image["source_id"],
        "augmentation": variant.image["augmentation"],
        "parameter": variant.parameter,
    }
