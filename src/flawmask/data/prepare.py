"""Convert a category to a COCO folder. Every mask is preserved exactly, and no part is in two splits."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flawmask import images
from flawmask.coco import Record, crop_annotation
from flawmask.data import dataset_info, groups, intensity, layouts, mask_files
from flawmask.data.coco_folder import SPLITS, ReadImage, knows_groups, write_folder
from flawmask.data.duplicates import Compared, descriptor_of, near_duplicates
from flawmask.data.folder_settings import FolderSettings
from flawmask.data.group_search import find_groups
from flawmask.data.intensity import IntensitySettings
from flawmask.data.layouts import LayoutSettings, MaskFile, Sample
from flawmask.data.mask_files import ImageGeometry, MaskSettings
from flawmask.errors import FlawmaskError
from flawmask.files import fingerprint, read_json, sha256
from flawmask.good_names import GOOD
from flawmask.images import Levels
from flawmask.launch import usable_cores
from flawmask.masks import Crop, Mask, crop_components, crop_mask, looks_inverted
from flawmask.progress import track
from flawmask.settings import Overwrite, Strict, as_json, require
from flawmask.tally import Tally, tallies_to_dict, warn_of_unused

log = logging.getLogger(__name__)


MAX_COMPARED = 2000
"""`prepare` compares up to this many images with each other, which takes a second. `doctor` compares any number."""


@dataclass(frozen=True, kw_only=True)
class PrepareSettings(IntensitySettings, MaskSettings, FolderSettings, LayoutSettings):
    """How a category is converted."""

    good_images: Literal["test", "all"] = "test"
    """Good images to use. test: those in the test folders. all: also those in the training folders."""
    good_as: Literal["instance", "empty"] = "instance"
    """Annotation of a good image: one instance of class good that covers the whole image, or none (empty)."""
    instances: Literal["component", "image"] = "component"
    """What counts as one instance: each connected region of a mask (8 neighbours), or the whole mask (image)."""
    classes: Literal["defect", "type"] = "defect"
    """Classes besides good: one class for all defects, or one for each defect type (folder name)."""
    keep_split: bool = False
    """Keep the data set's own splits, with all good images. If there is no validation split, train_ratio makes one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        divides = "--test_ratio" if self.test_ratio else "--folds" if self.folds > 1 else None
        require(not (self.keep_split and divides), f"--keep_split keeps the data set's own split: leave out {divides}")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(PrepareSettings, Overwrite, Strict):
    """Convert a category to a COCO folder with a training and a validation split."""

    mvtec_root: Path = Path("datasets/mvtec")
    """The folder that holds the categories."""
    category: str
    """The category, which is a folder name; several as a,b,c; or all."""
    output_dir: Path | None = None
    """The COCO folder to write; by default datasets/maskrcnn_mvtec_<category>."""

    @property
    def dataset_dir(self) -> Path:
        """The COCO folder to write."""
        fold = f"_fold{self.fold}of{self.folds}" if self.fold else ""
        return self.output_dir or Path("datasets") / f"maskrcnn_mvtec_{self.category}{fold}"


@dataclass(frozen=True)
class Prepared:
    """The result of `prepare`.

    Attributes:
        dataset_dir: the COCO folder.
        train: the counts of the training split, as in `dataset_info.json`.
        val: the counts of the validation split.
        test: the counts of the test split; None if there is none.
        left_out: the images that were left out, each with `file` and `reason`.
        reused: whether the folder existed already.
        tallies: how many images and masks were found and are used.
    """

    dataset_dir: Path
    train: dict[str, Any]
    val: dict[str, Any]
    test: dict[str, Any] | None
    left_out: list[dict[str, str]]
    reused: bool
    tallies: tuple[Tally, ...] = ()


def prepare(config: PrepareConfig) -> Prepared:
    """Make the COCO folder of one category, and return its counts.

    Raises:
        FlawmaskError: the category does not exist or has no defect; an image or a mask is bad and `on_error` is `stop`;
            the output folder holds something else, or a data set with another origin and `overwrite` is off.
    """
    require(
        config.folds == 1 or config.fold is not None,
        f"--folds {config.folds} needs --fold: name the fold for validation",
    )
    layout = layouts.layout_of(config.mvtec_root, config)
    is_first_fold = config.fold in (None, 1)  # messages about all folds are logged once
    if is_first_fold:
        layouts.log_layout(layout, config.mvtec_root, config)
    config = replace(config, layout=layout)
    samples, unwanted = _samples(config)
    samples, chosen = mask_files.choose_rule(samples, config)
    if chosen is not None and is_first_fold:
        log.info("masks of %s: %s", config.category, chosen)
        if chosen.warning:
            log.warning("%s: %s", config.category, chosen.warning)
    parts = [groups.parts_of(sample, config.group_by) for sample in samples]
    _check_pattern(samples, parts, config)
    needs_search = not any(parts) and is_first_fold
    wants_descriptors = needs_search and not _warn_of_names(samples, config) and len(samples) <= MAX_COMPARED
    levels = intensity.of_images(config.intensity, [sample.image for sample in samples], config.category)
    read, left_out = _read_all(samples, levels, config, wants_descriptors=wants_descriptors)
    _warn_of_near_duplicates(read)
    tallies = _tallies(read, samples, unwanted, config)
    if config.strict or is_first_fold:
        warn_of_unused(tallies, str(config.mvtec_root / config.category), strict=config.strict)
    category_ids = _category_ids(samples, read, config)
    read = [_with_categories(item, category_ids) for item in read]
    origin = _origin(read, config)
    if dataset_info.is_made_already(config.dataset_dir, origin, overwrite=config.overwrite):
        info = read_json(config.dataset_dir / dataset_info.NAME)
        require(
            "groups" in info["train"] or not knows_groups(read),
            f"{config.dataset_dir} was prepared by an older version, which wrote no groups: make it anew, --overwrite",
        )
        return _prepared(config, info, tallies, reused=True)
    facts: dict[str, Any] = {"mvtec_root": config.mvtec_root.as_posix(), "tally": tallies_to_dict(tallies)}
    if chosen is not None:
        facts["mask_values"] = chosen.rule
    if levels != images.UPPER_BITS:
        facts["intensity"] = intensity.to_json(config.intensity, levels)
    categories = _categories(category_ids, config.classes)
    info = write_folder(
        read,
        left_out,
        categories,
        origin,
        facts,
        config,
        source=config.mvtec_root / config.category,
        target=config.dataset_dir,
        keeps_split=config.keep_split,
    )
    sizes = ", ".join(f"{name} {dataset_info.size(info[name])}" for name in SPLITS if name in info)
    log.info("prepared %s: images: %s", config.dataset_dir, sizes)
    return _prepared(config, info, tallies, reused=False)


def _origin(read: Sequence[ReadImage], config: PrepareConfig) -> dict[str, Any]:
    """Return the settings and the fingerprint of the content. A data set with the same origin is reused."""
    contents = [
        (
            item.sample.original_file + (f" {item.sample.origin}" if config.keep_split else ""),
            item.digest + item.mask_digest,
        )
        for item in read
    ]
    if config.mask_classes is not None:
        contents.append(("mask_classes", sha256(config.mask_classes.read_bytes())))
    return {
        "made_by": "flawmask prepare",
        "settings": as_json(config, PrepareSettings),
        "source": {"category": config.category, "sha256": fingerprint(contents)},
    }


def _prepared(config: PrepareConfig, info: dict[str, Any], tallies: tuple[Tally, ...], *, reused: bool) -> Prepared:
    counts = info["train"], info["val"], info.get("test")
    return Prepared(config.dataset_dir, *counts, info["left_out"], reused, tallies)


def _samples(config: PrepareConfig) -> tuple[list[Sample], list[Sample]]:
    """Return the samples that are used, and those that are not because of the settings.

    Raises:
        FlawmaskError: no sample is defective, or there is an error in the folders.
    """
    every = layouts.samples(config.mvtec_root, config.category, config)
    found = every if config.keep_split else layouts.select_samples(every, config.good_images)
    for problem in layouts.problems(config.mvtec_root, config.category, config):
        if problem.severity == "error":
            raise FlawmaskError(f"{config.mvtec_root / problem.where} {problem.message}")
        if problem.kind == layouts.NO_MASK and config.fold in (None, 1):
            log.warning("%s %s", config.mvtec_root / problem.where, problem.message)
    if all(sample.is_good for sample in found):
        beside_good = config.mvtec_root / config.category / Path(found[0].good_folder).parent
        raise FlawmaskError(f"{beside_good} holds no defective image: there is nothing to learn from")
    chosen = {sample.image for sample in found}
    return found, [sample for sample in every if sample.image not in chosen]


def _tallies(
    read: Sequence[ReadImage], samples: Sequence[Sample], unwanted: Sequence[Sample], config: PrepareConfig
) -> tuple[Tally, Tally]:
    """Return the tallies of the images and of the annotations (the mask files) in the category's folders."""
    used = [item.sample for item in read]
    images_used = {sample.image for sample in used}
    bad = [sample for sample in samples if sample.image not in images_used]
    left_out = {layouts.BAD_FILE: bad, f"--good_images {config.good_images}": unwanted}
    return layouts.tallies(config.mvtec_root, config.category, used, left_out, config)


def _category_ids(samples: Sequence[Sample], read: Sequence[ReadImage], config: PrepareSettings) -> dict[str, int]:
    """Return the category id of each defect type; good is 1. With `--mask_classes`, only types on a mask have an id."""
    defective = [sample for sample in samples if not sample.is_good]
    types = {
        kind for sample in defective for kind in [mask.defect_type for mask in sample.masks] or [sample.defect_type]
    }
    if config.mask_classes is not None:
        types = {kind for item in read for kind in item.kinds if kind != GOOD}
    by_type = config.classes == "type"
    return {GOOD: 1, **{name: number if by_type else 2 for number, name in enumerate(sorted(types), start=2)}}


def _check_pattern(samples: Sequence[Sample], parts: Sequence[Sequence[str]], config: PrepareConfig) -> None:
    """Raise an error if `--group_by` matches no name, and warn about images whose part is not known."""
    if config.group_by is None:
        return
    if not any(groups.part_named(config.group_by, sample.image.name) for sample in samples):
        raise FlawmaskError(
            f"--group_by {config.group_by!r} matches none of {len(samples)} file names, such as "
            f"{samples[0].image.name}: give a regular expression that finds the part in them"
        )
    without = [sample.image.name for sample, of_image in zip(samples, parts, strict=True) if not of_image]
    if without and config.fold in (None, 1):
        shown = ", ".join(without[:3]) + (", ..." if len(without) > 3 else "")
        log.warning(
            "--group_by %r does not match %d of %d file names (%s): each of them counts as a separate part",
            config.group_by,
            len(without),
            len(samples),
            shown,
        )


def _warn_of_names(samples: Sequence[Sample], config: PrepareConfig) -> bool:
    """Warn if the names seem to name parts, and return whether they do."""
    found = find_groups([sample.image.name for sample in samples])
    if found is not None:
        log.warning("%s %s. If so, keep each in one split with %s", config.category, found, found.flag)
    return found is not None


def _warn_of_near_duplicates(read: Sequence[ReadImage]) -> None:
    """Warn about images that look the same and may be in different splits."""
    pairs = near_duplicates(
        [Compared(item.content, item.descriptor, "", variant=False) for item in read if item.descriptor is not None]
    )
    if pairs:
        later, earlier = (read[index].sample.original_file for index in pairs[0])
        log.warning(
            "%d images look like others, for example %s like %s: if they show the same part, keep it in one split with "
            "--group_by (flawmask doctor lists them all)",
            len(pairs),
            later,
            earlier,
        )


def _read_all(
    samples: Sequence[Sample], levels: Levels, config: PrepareConfig, *, wants_descriptors: bool
) -> tuple[list[ReadImage], list[dict[str, str]]]:
    """Read all images on all cores, and return them with the images that were left out."""

    def attempt(sample: Sample) -> ReadImage | FlawmaskError:
        try:
            return _read(sample, levels, config, wants_descriptor=wants_descriptors)
        except FlawmaskError as error:
            return error

    read, left_out = [], []
    with ThreadPoolExecutor(usable_cores()) as pool:
        for sample, result in zip(
            samples, track(pool.map(attempt, samples), "reading", total=len(samples)), strict=True
        ):
            if isinstance(result, ReadImage):
                read.append(result)
            else:
                left_out.append({"file": sample.original_file, "reason": str(result)})
    if left_out and config.on_error == "stop":
        others = f" ({len(left_out)} files are bad in all; flawmask doctor lists them)" if len(left_out) > 1 else ""
        raise FlawmaskError(f"{left_out[0]['reason']}{others}, or leave it out with --on_error skip")
    for item in left_out:
        log.warning("left out: %s", item["reason"])
    if not any(not item.sample.is_good for item in read):
        raise FlawmaskError(f"{config.mvtec_root / config.category}: no defective image is left to learn from")
    inverted = [path for item in read for path in item.inverted]
    if inverted:
        log.warning(
            "%d masks are white in all four corners, for example %s: if their defects are black, invert them",
            len(inverted),
            inverted[0],
        )
    return read, left_out


def _with_categories(item: ReadImage, category_ids: dict[str, int]) -> ReadImage:
    """Return the image with the category ids of its annotations."""
    pairs = zip(item.annotations, item.kinds, strict=True)
    return replace(item, annotations=[{**record, "category_id": category_ids[kind]} for record, kind in pairs])


def _read(sample: Sample, levels: Levels, config: PrepareSettings, *, wants_descriptor: bool) -> ReadImage:
    """Read one image and its masks, and encode its annotations. Ids are assigned later."""
    data = images.read_bytes(sample.image)
    decoded = images.decode_parts(data, sample.image)
    image = images.to_rgb(decoded.colour, levels)
    height, width = image.shape[:2]
    regions: list[tuple[str, Crop]] = []
    mask_digest, inverted = "", []
    if sample.is_good and config.good_as == "instance":
        regions.append((GOOD, Crop(np.ones((height, width), dtype=bool), 0, 0)))
    if not sample.is_good and not sample.masks:
        raise FlawmaskError(f"{sample.image} has no mask: draw {sample.mask_wanted}, or {sample.if_good}")
    masks = [_read_mask(file, ImageGeometry(height, width, decoded.orientation), config) for file in sample.masks]
    marked = {file.path for file, (mask, _) in zip(sample.masks, masks, strict=True) if mask.any()}
    for file, (mask, digest) in zip(sample.masks, masks, strict=True):
        mask_digest += digest
        if file.path not in marked:
            raise FlawmaskError(f"{file.path} has no defect pixel: draw the defect white, or {sample.if_good}")
        if not mask.any():
            continue
        crops = crop_components(mask) if config.instances == "component" else [crop_mask(mask)]
        regions += [(file.defect_type, crop) for crop in crops]
        if looks_inverted(mask):
            inverted.append(file.path)
    records = [crop_annotation(crop, height, width, id=0, image_id=0, category_id=0) for _, crop in regions]
    kinds = [kind for kind, _ in regions]
    parts, descriptor = groups.parts_of(sample, config.group_by), descriptor_of(image) if wants_descriptor else None
    content = images.content_digest(image)
    prefix = "" if sample.origin == "test" else f"{sample.origin}_"
    return ReadImage(
        sample=sample,
        name=f"{prefix}{sample.defect_type}_{sample.image.name}",
        digest=sha256(data),
        content=content,
        mask_digest=mask_digest,
        height=height,
        width=width,
        annotations=records,
        kinds=kinds,
        inverted=inverted,
        parts=parts,
        descriptor=descriptor,
    )


def _read_mask(file: MaskFile, image: ImageGeometry, config: PrepareSettings) -> tuple[Mask, str]:
    """Return a mask and the SHA-256 of its file, after checking that it fits the image."""
    data = images.read_bytes(file.path)
    mask = file.rule(mask_files.pixels_of(data, file, image, config))
    if mask.shape != (image.height, image.width):
        raise FlawmaskError(
            f"{file.path} is {mask.shape[1]}x{mask.shape[0]} but its image is {image.width}x{image.height}: "
            "export the mask at the image's size"
        )
    return mask, sha256(data)


def _categories(category_ids: dict[str, int], classes: Literal["defect", "type"]) -> list[Record]:
    if classes == "defect":
        return [{"id": 1, "name": GOOD}, {"id": 2, "name": "defect"}]
    return [
        {"id": number, "name": name, **({} if name == GOOD else {"supercategory": "defect"})}
        for name, number in category_ids.items()
    ]
