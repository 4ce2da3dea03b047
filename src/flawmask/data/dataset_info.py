"""`dataset_info.json`: the source of a COCO folder, the settings it was made with, and its counts."""

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flawmask.coco import CocoSplit, Record, groups_of
from flawmask.errors import FlawmaskError
from flawmask.files import check_output_folder, fingerprint, read_json, sha256
from flawmask.good_names import GOOD
from flawmask.images import read_bytes
from flawmask.launch import usable_cores
from flawmask.settings import has_origin

NAME = "dataset_info.json"

log = logging.getLogger(__name__)


def is_made_already(folder: Path, origin: dict[str, Any], *, overwrite: bool) -> bool:
    """Return whether `folder` holds a data set with exactly this origin: the same stage, settings and source images.

    With `overwrite` the answer is always no, so that the data set is made again.

    Args:
        folder: the folder to write.
        origin: the entries of `dataset_info.json` that identify the data set: stage, settings and source.
        overwrite: whether to replace a data set that the same stage made, whatever its origin.

    Raises:
        FlawmaskError: the folder holds something else, or a data set with another origin and `overwrite` is off.
    """
    if (folder / NAME).is_file():
        info = read_json(folder / NAME)
        maker = info.get("made_by") if isinstance(info, dict) else None
        if maker != origin["made_by"]:
            raise FlawmaskError(f"{folder} holds something else ({NAME} says made by {maker}): name a new folder")
        if not overwrite and has_origin(info, origin):
            log.info("reused %s: it was made from the same images with the same settings", folder)
            return True
    check_output_folder(folder, NAME, overwrite=overwrite, what="data set made from other images or settings")
    return False


def origin_of(folder: Path) -> dict[str, str | None]:
    """Return the `category` that a COCO folder was made from, and the regular expression `group_by` of its parts.

    Groups of two folders can be compared only if both are equal. An entry is None if the folder does not say it.
    """
    info = read_json(folder / NAME) if (folder / NAME).is_file() else {}

    def value(*keys: str) -> Any:
        entry = info
        for key in keys:
            entry = entry.get(key) if isinstance(entry, dict) else None
        return entry

    # An augmented folder keeps the info of its source folder.
    prefix = () if value("source_info") is None else ("source_info",)
    values = {"category": value(*prefix, "source", "category"), "group_by": value(*prefix, "settings", "group_by")}
    return {key: entry if isinstance(entry, str) else None for key, entry in values.items()}


def counts(images: Sequence[Record]) -> dict[str, Any]:
    """Return the numbers of images: all, good, defective, and by type; and the number of groups, if known."""
    by_type = Counter(image.get("defect_type", "unknown") for image in images)
    good, groups = by_type.get(GOOD, 0), groups_of(images)
    return {
        "images": len(images),
        "good": good,
        "defective": len(images) - good - by_type.get("unknown", 0),
        "by_type": dict(sorted(by_type.items())),
        **({} if groups is None else {"groups": len(set(groups))}),
    }


def size(counts: Mapping[str, Any]) -> str:
    """Return a split's number of images in words, with the number of parts if it is known, from its counts."""
    if "groups" not in counts:
        return str(counts["images"])
    return f"{counts['images']} of {counts['groups']} part{'' if counts['groups'] == 1 else 's'}"


def content_of(splits: Mapping[str, CocoSplit]) -> str:
    """Return one SHA-256 over all annotation files and images of a COCO folder's splits."""
    paths = [
        path
        for split in splits.values()
        for path in (split.annotation_file, *(split.image_path(image) for image in split.images))
    ]
    with ThreadPoolExecutor(usable_cores()) as pool:
        digests = list(pool.map(lambda path: sha256(read_bytes(path)), paths))
    root = next(iter(splits.values())).folder.parent
    names = [Path(os.path.relpath(path, root)).as_posix() for path in paths]
    return fingerprint(zip(names, digests, strict=True))
