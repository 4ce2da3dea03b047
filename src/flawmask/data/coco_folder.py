"""Split images that were read and write them as a COCO folder. `prepare` and `import` share this module."""

import logging
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import flawmask
from flawmask.coco import Record, write_split
from flawmask.data import dataset_info, groups
from flawmask.data.duplicates import Descriptor
from flawmask.data.folder_settings import FolderSettings
from flawmask.data.layouts import Sample
from flawmask.data.split import Member, fold_groups, split_groups, split_method
from flawmask.errors import FlawmaskError
from flawmask.files import atomic_folder, write_json
from flawmask.good_names import GOOD
from flawmask.launch import usable_cores
from flawmask.progress import track
from flawmask.settings import require

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class ReadImage:
    """What is kept of an image after reading it. The pixels are not kept.

    Attributes:
        sample: the sample.
        name: the file name wanted in the COCO folder; it is changed if another image has the same name.
        digest: the SHA-256 of the image file.
        content: the SHA-256 of the pixels; see `images.content_digest`.
        mask_digest: the SHA-256 of each mask file, joined; or the SHA-256 of the labels.
        height: the height in pixels.
        width: the width in pixels.
        annotations: the annotation records. Their ids are assigned later.
        inverted: the masks that seem to be inverted.
        parts: the names of the part that the image shows; see `groups.keys`.
        descriptor: the image descriptor, see `descriptor_of`; None if it is not needed.
        kinds: the defect type of each annotation, if category ids are assigned later too.
    """

    sample: Sample
    name: str
    digest: str
    content: str
    mask_digest: str
    height: int
    width: int
    annotations: list[Record]
    inverted: list[Path]
    parts: list[str]
    descriptor: Descriptor | None
    kinds: Sequence[str] = ()


def write_folder(
    read: Sequence[ReadImage],
    left_out: list[dict[str, str]],
    categories: Sequence[Record],
    origin: dict[str, Any],
    facts: dict[str, Any],
    config: FolderSettings,
    *,
    source: Path,
    target: Path,
    keeps_split: bool = False,
) -> dict[str, Any]:
    """Split the images, write them as a COCO folder, and return the content of its `dataset_info.json`.

    Args:
        read: the images.
        left_out: the images that were left out, each with `file` and `reason`.
        categories: the category records.
        origin: what identifies this data set; see `dataset_info.is_made_already`.
        facts: further entries of `dataset_info.json`.
        config: how to split and how to place the image files.
        source: the source folder or file, for messages.
        target: the COCO folder to write.
        keeps_split: whether to keep the data set's own split, given by each sample's `origin`.

    Raises:
        FlawmaskError: no image is left for validation, or there are fewer images than folds.
    """
    group_of = groups.merge([groups.keys(item.content, item.parts) for item in read])
    members = [Member(group, item.sample.defect_type) for group, item in zip(group_of, read, strict=True)]
    split_of = _own_splits(read, members, config, source) if keeps_split else _new_splits(members, config)
    splits = [split_of[group] for group in group_of]
    if "val" not in splits:
        raise FlawmaskError(
            f"{source}: every defect type has a single image (or group), so none is left for validation: add images"
        )
    records = _records(read, _group_names(read, group_of))
    method = "layout" if keeps_split else split_method(members)
    info = {**origin, "split_method": method, "version": flawmask.__version__, **facts}
    with atomic_folder(target) as folder:
        for split in (name for name in SPLITS if name in splits):
            chosen = [
                (item, *record)
                for item, record, its_split in zip(read, records, splits, strict=True)
                if its_split == split
            ]
            (folder / split / "images").mkdir(parents=True)
            files = [(item.sample.image, folder / split / "images" / image["file_name"]) for item, image, _ in chosen]
            _place_all(files, config.link, f"writing {split}")
            annotations = [record for _, _, of_image in chosen for record in of_image]
            write_split(folder / split, [image for _, image, _ in chosen], annotations, categories)
            info[split] = dataset_info.counts([image for _, image, _ in chosen])
        info["left_out"] = left_out
        write_json(folder / dataset_info.NAME, info)
    return info


def _new_splits(members: Sequence[Member], config: FolderSettings) -> dict[str, str]:
    """Return the split of each group.

    Raises:
        FlawmaskError: there are fewer groups than folds.
    """
    not_test, test = list(members), frozenset[str]()
    if config.test_ratio:
        not_test_groups = split_groups(members, 1 - config.test_ratio, config.seed)
        not_test = [member for member in members if member.group in not_test_groups]
        test = frozenset(member.group for member in members) - not_test_groups
    if config.fold is None:
        training = split_groups(not_test, config.train_ratio, config.seed)
    else:
        _check_folds(not_test, config)
        training = frozenset(member.group for member in not_test)
        training -= fold_groups(not_test, config.folds, config.seed)[config.fold - 1]
    return {
        member.group: "test" if member.group in test else "train" if member.group in training else "val"
        for member in members
    }


def _own_splits(
    read: Sequence[ReadImage], members: Sequence[Member], config: FolderSettings, source: Path
) -> dict[str, str]:
    """Return the split of each group according to the data set's own split.

    Raises:
        FlawmaskError: a group is in two splits, or there is no defect to train on.
    """
    first: dict[str, Sample] = {}
    for member, item in zip(members, read, strict=True):
        other = first.setdefault(member.group, item.sample)
        if other.origin != item.sample.origin:
            raise FlawmaskError(
                f"{item.sample.image} is for {item.sample.origin} and shows the same part or picture as {other.image}, "
                f"which is for {other.origin}: remove one of them, or leave out --keep_split"
            )
    origin_of = {group: sample.origin for group, sample in first.items()}
    training = [member for member in members if origin_of[member.group] == "train"]
    if all(member.defect_type == GOOD for member in training):
        raise FlawmaskError(
            f"{source}: the data set's own split has no defective image to train on: leave out --keep_split"
        )
    if "val" not in origin_of.values():
        kept = split_groups(training, config.train_ratio, config.seed)
        origin_of |= {member.group: "val" for member in training if member.group not in kept}
    return dict(origin_of)


def _check_folds(members: Sequence[Member], config: FolderSettings) -> None:
    """Check that there are enough groups for the folds, and warn about types that are too rare to be in every fold.

    Raises:
        FlawmaskError: there are fewer groups than folds.
    """
    groups = {member.group for member in members}
    require(
        config.folds <= len(groups),
        f"--folds {config.folds}: there are only {len(groups)} images (or groups) to divide",
    )
    for kind in sorted({member.defect_type for member in members}):
        count = len({member.group for member in members if member.defect_type == kind})
        if count < config.folds:
            log.warning(
                "%s: %d images (or groups) for %d folds: some folds evaluate without it", kind, count, config.folds
            )


def knows_groups(read: Sequence[ReadImage]) -> bool:
    """Return whether the part of at least one image is known."""
    return any(item.parts for item in read)


def _group_names(read: Sequence[ReadImage], group_of: Sequence[str]) -> list[str] | None:
    """Return the name of each image's group, or None if no image's part is known."""
    files = [item.sample.original_file for item in read]
    return groups.names(group_of, [item.parts for item in read], files) if knows_groups(read) else None


def _records(read: Sequence[ReadImage], named: Sequence[str] | None) -> list[tuple[Record, list[Record]]]:
    """Return the COCO record of each image and the records of its annotations.

    Ids are unique over all splits. The image's record names its group, if groups are known.
    """
    taken: set[str] = set()
    numbered, next_annotation = [], 1
    for image_id, item in enumerate(read, start=1):
        image = {
            "id": image_id,
            "file_name": _file_name(item.name, taken),
            "width": item.width,
            "height": item.height,
            "original_file": item.sample.original_file,
            "defect_type": item.sample.defect_type,
        }
        if named is not None:
            image["group"] = named[image_id - 1]
        of_image = [
            {**record, "id": number, "image_id": image_id}
            for number, record in enumerate(item.annotations, start=next_annotation)
        ]
        next_annotation += len(of_image)
        numbered.append((image, of_image))
    return numbered


def _file_name(name: str, taken: set[str]) -> str:
    """Return a file name that is not in `taken`, ignoring case, and add it to `taken`."""
    stem, suffix, number = Path(name).stem, Path(name).suffix, 2
    while name.lower() in taken:
        name, number = f"{stem}-{number}{suffix}", number + 1
    taken.add(name.lower())
    return name


def _place_all(files: Sequence[tuple[Path, Path]], link: Literal["copy", "hardlink", "symlink"], label: str) -> None:
    """Copy or link every (source, target), several at a time."""
    with ThreadPoolExecutor(usable_cores()) as pool:
        placed = pool.map(lambda pair: _place(pair[0], pair[1], link), files)
        for _ in track(placed, label, total=len(files)):
            pass


def _place(source: Path, target: Path, link: Literal["copy", "hardlink", "symlink"]) -> None:
    if link == "copy":
        shutil.copyfile(source, target)
    elif link == "symlink":
        target.symlink_to(source.resolve())
    else:
        try:
            target.hardlink_to(source.resolve())
        except OSError as error:
            raise FlawmaskError(f"{source} cannot be hard-linked ({error.strerror}): use --link copy") from None
