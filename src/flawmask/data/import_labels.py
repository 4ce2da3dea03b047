"""Convert the labels of other tools to a COCO folder, with the same splits as `prepare` makes."""

import logging
import math
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from flawmask import images, masks
from flawmask.coco import Record
from flawmask.data import dataset_info, groups, imports
from flawmask.data.coco_folder import SPLITS, ReadImage, write_folder
from flawmask.data.folder_settings import FolderSettings
from flawmask.data.group_search import find_groups
from flawmask.data.imports import FormatName
from flawmask.data.imports.labels import MALFORMED, Box, LabelledImage, Labels, Region
from flawmask.data.layouts import Sample
from flawmask.data.prepare import Prepared
from flawmask.errors import FlawmaskError
from flawmask.files import fingerprint, read_json, sha256, walk
from flawmask.good_names import GOOD, looks_good
from flawmask.launch import usable_cores
from flawmask.progress import track
from flawmask.settings import Overwrite, Reading, Strict, as_json, require
from flawmask.tally import Tally, tallies_to_dict, warn_of_unused

log = logging.getLogger(__name__)

MADE_BY = "flawmask import"


@dataclass(frozen=True, kw_only=True)
class ImportSettings(FolderSettings, Reading):
    """How labels of other tools are converted."""

    source_format: FormatName = "auto"
    """Format of the labels; auto detects it."""
    boxes: Literal["box", "outline"] = "box"
    """What rectangles are. box: boxes around defects, for networks that predict boxes. outline: the defects' masks."""
    unlabelled: Literal["leave_out", "good"] = "leave_out"
    """Images without labels: leave them out and report them, or use them as good. YOLO's are always good."""


@dataclass(frozen=True, kw_only=True)
class ImportConfig(ImportSettings, Overwrite, Strict):
    """Convert the labels of a labelling tool to a COCO folder with a training and a validation split.

    Splits of the source are joined, and all images are split anew.
    """

    source: tyro.conf.Positional[Path]
    """A label file, or a folder with label files and images: labelme, VIA, CVAT, Label Studio, YOLO or COCO."""
    output_dir: Path
    """The COCO folder to write."""
    image_dir: Path | None = None
    """The folder of the images, if they do not lie with the labels. Its subfolders are searched too."""


def import_labels(config: ImportConfig) -> Prepared:
    """Make a COCO folder from the labels, and return its counts.

    Raises:
        FlawmaskError: there are no labels in a known format, no image has a defect, a label or an image is bad and
            `on_error` is `stop`, or the output folder holds something else, or a data set with another origin.
        UnusedError: something is not used, and `strict` is on.
    """
    require(
        config.folds == 1 or config.fold is not None,
        f"--folds {config.folds} needs --fold: name the fold for validation",
    )
    labels, name = _labels(config)
    log.info("%s: %d images with labels of %s", config.source, len(labels.images), imports.FORMATS[name].NAME)
    categories = _categories(labels)
    _warn_of_parts(labels.images, config)
    read, used = _read_all(labels, categories, config)
    tallies = Tally("images", used=len(read)), Tally("annotations", used=used)
    for tally, not_used in zip(tallies, (labels.unused_images, labels.unused_annotations), strict=True):
        tally.add(not_used)
    warn_of_unused(tallies, str(config.source), strict=config.strict)
    if not any(not item.sample.is_good for item in read):
        raise FlawmaskError(f"{config.source} has no image with a defect: there is nothing to learn from")
    contents = [(item.sample.original_file, item.digest + item.mask_digest) for item in read]
    source = {"category": config.source.resolve().name, "format": name, "sha256": fingerprint(contents)}
    chosen = as_json(config, ImportSettings) | {"source_format": name}
    origin = {"made_by": MADE_BY, "settings": chosen, "source": source}
    if dataset_info.is_made_already(config.output_dir, origin, overwrite=config.overwrite):
        return _imported(config, read_json(config.output_dir / dataset_info.NAME), tallies, reused=True)
    facts, target = {"tally": tallies_to_dict(tallies)}, config.output_dir
    info = write_folder(read, labels.bad, categories, origin, facts, config, source=config.source, target=target)
    sizes = ", ".join(f"{split} {dataset_info.size(info[split])}" for split in SPLITS if split in info)
    log.info("imported %s: images: %s", config.output_dir, sizes)
    return _imported(config, info, tallies, reused=False)


def _imported(config: ImportConfig, info: dict[str, Any], tallies: tuple[Tally, ...], *, reused: bool) -> Prepared:
    counts = info["train"], info["val"], info.get("test")
    return Prepared(config.output_dir, *counts, info["left_out"], reused, tallies)


def _labels(config: ImportConfig) -> tuple[Labels, str]:
    """Read the label files, and return their content and the name of the format.

    Raises:
        FlawmaskError: there is no such file or folder, it has no labels in a known format, or a label cannot be used
            and `on_error` is `stop`.
    """
    source = config.source
    require(source.exists(), f"{source} does not exist: give a label file, or a folder with labels and images")
    root = config.image_dir or (source if source.is_dir() else source.parent)
    require(root.is_dir(), f"--image_dir {root} is not a folder: give the folder of the images")
    name = imports.recognised(source) if config.source_format == "auto" else config.source_format
    if name is None:
        known = ", ".join(known_format.NAME for known_format in imports.FORMATS.values())
        raise FlawmaskError(f"{source} holds no labels that are known ({known}): give the label file, or --from")
    labels = Labels(source, root, Reading(crowds=config.crowds, on_error=config.on_error, good_name=config.good_name))
    imports.read(labels, name)
    _check_classes(labels)
    _name_good(labels, config)
    _check_once(labels)
    for image in filter(labels.is_unclear, labels.images):
        labels.unused_images.leave_out(image.original_file, "no usable annotation")
    labels.images = [image for image in labels.images if not labels.is_unclear(image)]
    unnamed = [path for path in walk(root) if not labels.is_named(path)]
    for path in unnamed:
        if not images.is_readable(path) and path != source and images.may_be_image(path):
            labels.unused_images.leave_out(labels.name_of(path), "unknown format")
    for path in [*filter(images.is_readable, unnamed), *labels.unlabelled]:
        original_file = labels.name_of(path)
        if labels.unlabelled_is_good or config.unlabelled == "good":
            labels.images.append(LabelledImage(path, original_file, ()))
        else:
            labels.unused_images.leave_out(original_file, "not labelled")
    return labels, name


def _check_classes(labels: Labels) -> None:
    """Note images with a region that has no class as bad, and remove spaces around the names of classes."""
    for image in labels.images:
        nameless = next((region for region in image.regions if not region.label.strip()), None)
        if nameless is not None:
            labels.bad.append({"file": image.original_file, "reason": f"{nameless.name} has no class: give it one"})
    if labels.categories is None:  # a COCO file's categories have their names already
        labels.classes = [name.strip() for name in labels.classes]
        labels.images = [
            replace(image, regions=[replace(region, label=region.label.strip()) for region in image.regions])
            for image in labels.images
        ]


def _name_good(labels: Labels, config: ImportConfig) -> None:
    """Rename the classes in `--good_name` to good.

    Raises:
        FlawmaskError: the name of another class probably means good, and `--good_name` is not given.
    """
    names = {region.label for image in labels.images for region in image.regions}
    for name in sorted(names - {GOOD}):
        require(
            config.good_name is not None or not looks_good(name),
            f"{config.source}: the class {name} counts as a defect, but its name looks like that of good images: "
            f"give --good_name {name} if it is good, or --good_name {GOOD} if it is a defect",
        )
    labels.images = [
        replace(image, regions=[_renamed(region, config.good_names) for region in image.regions])
        for image in labels.images
    ]


def _renamed(region: Region, good: Collection[str]) -> Region:
    return replace(region, label=GOOD) if region.label in good else region


def _check_once(labels: Labels) -> None:
    """Leave out images that are labelled twice, or that have a label which cannot be used."""
    count = Counter(image.path.resolve() for image in labels.images)
    bad = {item["file"] for item in labels.bad}
    for path in [path for path, times in count.items() if times > 1]:
        reason = f"{path} is labelled {count[path]} times: keep one of the labels"
        labels.bad.append({"file": labels.name_of(path), "reason": reason})
    usable = []
    for image in labels.images:
        if count[image.path.resolve()] == 1 and image.original_file not in bad:
            usable.append(image)
        else:
            _leave_out_regions(image, labels)
    labels.images = usable
    for path in [path for path in labels.unlabelled if path.resolve() in count]:
        labels.unused_images.leave_out(labels.name_of(path), "listed twice")
        labels.unlabelled.remove(path)


def _leave_out_regions(image: LabelledImage, labels: Labels) -> None:
    for region in image.regions:
        labels.unused_annotations.leave_out(f"{region.name} ({image.original_file})", "image not used")


def _categories(labels: Labels) -> list[Record]:
    """Return the category records: those of the source, or else one for each class that is used."""
    if labels.categories is not None:
        return labels.categories
    used = {region.label for image in labels.images for region in image.regions}
    names = [*dict.fromkeys(name for name in labels.classes if name in used), *sorted(used - set(labels.classes))]
    return [{"id": number, "name": name} for number, name in enumerate(names, start=1)]


def _warn_of_parts(found: Sequence[LabelledImage], config: ImportConfig) -> None:
    """Raise an error if `--group_by` matches no name; without it, warn if the names seem to name parts."""
    names = [Path(image.original_file).name for image in found]
    if config.group_by is None:
        parts = find_groups(names) if config.fold in (None, 1) and not any(image.parts for image in found) else None
        if parts is not None:
            log.warning("%s %s. If so, keep each in one split with %s", config.source, parts, parts.flag)
        return
    without = [name for name in names if not groups.part_named(config.group_by, name)]
    if len(without) == len(names):
        raise FlawmaskError(
            f"--group_by {config.group_by!r} matches none of {len(names)} file names, such as {names[0]}: give a "
            "regular expression that finds the part in them"
        )
    if without and config.fold in (None, 1):
        log.warning(
            "--group_by %r does not match %d of %d file names (for example %s): each of them counts as a separate part",
            config.group_by,
            len(without),
            len(names),
            without[0],
        )


def _read_all(labels: Labels, categories: Sequence[Record], config: ImportConfig) -> tuple[list[ReadImage], int]:
    """Read all images, and return them with the number of annotations that are used. `labels` notes unusable ones.

    Raises:
        FlawmaskError: something cannot be used, and `on_error` is `stop`.
    """
    ids = {str(category["name"]): int(category["id"]) for category in categories}

    def attempt(image: LabelledImage) -> tuple[ReadImage, Tally] | FlawmaskError:
        try:
            return _read(image, ids, config)
        except FlawmaskError as error:
            return error

    read, used = [], 0
    with ThreadPoolExecutor(usable_cores()) as pool:
        results = track(pool.map(attempt, labels.images), "reading", total=len(labels.images))
        for image, result in zip(labels.images, results, strict=True):
            if isinstance(result, FlawmaskError):
                labels.bad.append({"file": image.original_file, "reason": str(result)})
                _leave_out_regions(image, labels)
                continue
            item, tally = result
            read.append(item)
            used += tally.used
            labels.unused_annotations.add(Tally("annotations", not_used=tally.not_used))
    _stop_or_note(labels, config)
    return read, used


def _stop_or_note(labels: Labels, config: ImportConfig) -> None:
    if labels.bad and config.on_error == "stop":
        others = f" ({len(labels.bad)} are bad in all)" if len(labels.bad) > 1 else ""
        raise FlawmaskError(f"{labels.bad[0]['reason']}{others}, or leave it out with --on_error skip")
    for item in labels.bad:
        log.warning("left out: %s", item["reason"])
        labels.unused_images.leave_out(item["file"], "bad image or label")


def _read(image: LabelledImage, ids: dict[str, int], config: ImportSettings) -> tuple[ReadImage, Tally]:
    """Read one image and encode its annotations. Ids are assigned later."""
    data = images.read_bytes(image.path)
    pixels = images.to_rgb(images.decode(data, image.path))
    height, width = pixels.shape[:2]
    if image.size is not None and image.size != (width, height):
        labelled = "x".join(map(str, image.size))
        raise FlawmaskError(
            f"{image.path} is {width}x{height} but its labels are for {labelled}: use the image that was labelled"
        )
    tally = Tally("annotations")
    records: list[Record] = []
    sizes = {GOOD: 0.0}  # the area of the largest defect's box, by class
    for region in image.regions:
        record = _record(region, height, width, config.boxes, image.original_file)
        if isinstance(record, str):
            tally.leave_out(f"{region.name} ({image.original_file})", record)
            continue
        records.append({**record, "category_id": ids[region.label], **region.facts})
        if region.label != GOOD:
            _, _, across, down = record["bbox"]
            sizes[region.label] = max(sizes.get(region.label, 0.0), float(across * down))
    tally.used = len(records)
    kind = image.defect_type or max(sizes, key=lambda name: sizes[name])
    in_name = groups.part_named(config.group_by, Path(image.original_file).name) if config.group_by else None
    parts = [*image.parts, *([in_name] if in_name else [])]
    sample = Sample(
        image=image.path, defect_type=kind, origin="test", original_file=image.original_file, good_folder=""
    )
    item = ReadImage(
        sample=sample,
        name=image.path.name,
        digest=sha256(data),
        content=images.content_digest(pixels),
        mask_digest=sha256(repr(records).encode()),
        height=height,
        width=width,
        annotations=records,
        inverted=[],
        parts=parts,
        descriptor=None,
    )
    return item, tally


def _record(region: Region, height: int, width: int, boxes: str, file: str) -> Record | str:
    """Return a region's annotation without its class; or, as text, why it is not an annotation.

    Raises:
        FlawmaskError: the region's shape cannot be used; `file` is its image.
    """
    try:
        shape = region.shape(height, width)
    except MALFORMED as error:
        raise FlawmaskError(f"{file}: {region.name} cannot be read ({error}): export it anew") from None
    if isinstance(shape, Box):
        if not all(isinstance(side, int | float) and math.isfinite(side) for side in astuple(shape)):
            raise FlawmaskError(f"{file}: {region.name} has no usable box, but {astuple(shape)}: draw it anew")
        left, top = max(0.0, shape.x), max(0.0, shape.y)
        right, below = min(float(width), shape.x + shape.width), min(float(height), shape.y + shape.height)
        if not (left < right and top < below):
            return "outside the image" if shape.width > 0 and shape.height > 0 else "without area"
        across, down = right - left, below - top
        outline = [[left, top, right, top, right, below, left, below]] if boxes == "outline" else []
        if not outline:
            box = {"bbox": [left, top, across, down], "area": across * down}
            return {"id": 0, "image_id": 0, **box, "iscrowd": 0, "segmentation": []}
        shape = outline  # type: ignore[assignment]
    reason = masks.segmentation_problem(shape, height, width)
    if reason:
        raise FlawmaskError(f"{file}: {region.name} has no usable mask: {reason}")
    rle = masks.as_rle(shape, height, width)  # type: ignore[arg-type]
    area = masks.area(rle)
    if not area:
        return "without a pixel"
    box_of = list(masks.box_of_rle(rle))
    return {"id": 0, "image_id": 0, "bbox": box_of, "area": area, "iscrowd": 0, "segmentation": shape}
