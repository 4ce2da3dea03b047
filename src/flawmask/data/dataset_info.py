"""`dataset_info.json`: what a COCO folder was made from, with which settings, and what is in it."""

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
from flawmask.settings import is_of

NAME = "dataset_info.json"

log = logging.getLogger(__name__)


def is_made_already(folder: Path, origin: dict[str, Any], *, overwrite: bool) -> bool:
    """Return whether `folder` holds a data set of this very origin: the same stage, settings and source images.

    With `overwrite` it never does: who asks for a fresh one gets it.

    Args:
        folder: where the data set would be written.
        origin: the part of `dataset_info.json` that says what it is made from: stage, settings, source.
        overwrite: whether one that the same stage made is replaced, whatever its origin.

    Raises:
        FlawmaskError: the folder holds something else, or a data set of another origin and `overwrite` is off.
    """
    if (folder / NAME).is_file():
        found = read_json(folder / NAME)
        maker = found.get("made_by") if isinstance(found, dict) else None
        if maker != origin["made_by"]:
            raise FlawmaskError(f"{folder} holds something else ({NAME} says made by {maker}): name a new folder")
        if not overwrite and is_of(found, origin):
            log.info("reused %s: it was made from the same images with the same settings", folder)
            return True
    check_output_folder(folder, NAME, overwrite=overwrite, what="data set made from other images or settings")
    return False


def origin_of(folder: Path) -> dict[str, str | None]:
    """Return what tells the groups of a COCO folder from those of another: the `category` that it was made from, and
    the regular expression `group_by` that found the parts; each None where it does not say so."""
    info = read_json(folder / NAME) if (folder / NAME).is_file() else {}

    def value(*keys: str) -> Any:
        found = info
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    of = () if value("source_info") is None else ("source_info",)  # a folder with variants is of what it was made from
    named = {"category": value(*of, "source", "category"), "group_by": value(*of, "settings", "group_by")}
    return {key: found if isinstance(found, str) else None for key, found in named.items()}


def counts(images: Sequence[Record]) -> dict[str, Any]:
    """Return how many images there are, how many of them good and defective, how many of each type, and how many
    groups they are of, where that is known."""
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
    """Return how many images a split has, and of how many parts where that is known, from its counts."""
    if "groups" not in counts:
        return str(counts["images"])
    return f"{counts['images']} of {counts['groups']} part{'' if counts['groups'] == 1 else 's'}"


def content_of(splits: Mapping[str, CocoSplit]) -> str:
    """Return one SHA-256 for every annotation file and image of a COCO folder's splits."""
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
