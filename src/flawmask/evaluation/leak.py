"""Check whether a model was trained on images that it is evaluated on, or on other images of the same parts.

Images are compared by their content, parts by the groups of images.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flawmask.coco import CocoSplit, Record
from flawmask.data import dataset_info, groups
from flawmask.errors import FlawmaskError
from flawmask.files import read_json, write_json
from flawmask.images import UPPER_BITS, Levels, content_digest, read_image
from flawmask.launch import usable_cores
from flawmask.progress import track

NAME = "training_images.json"
"""The file in a run folder that lists the training images."""


@dataclass(frozen=True)
class Leak:
    """The images of a split that a model knows from training.

    Attributes:
        images: the file names of the images that it was trained on.
        parts: the file names of other images, which show a part that it was trained on.
    """

    images: list[str]
    parts: list[str]


def content_digests(split: CocoSplit, levels: Levels = UPPER_BITS) -> dict[str, str]:
    """Return the SHA-256 of each image's upright pixels, by file name. It is the same for copies in other formats.

    Args:
        split: the images to read.
        levels: the values that become black and white in images of more than 8 bits.

    Raises:
        ImageError: an image cannot be read.
    """

    def digest(image: Record) -> str:
        return content_digest(read_image(split.image_path(image), levels))

    with ThreadPoolExecutor(usable_cores()) as pool:
        digests = track(pool.map(digest, split.images), f"reading {split.name}", total=len(split.images))
        return {str(image["file_name"]): one for image, one in zip(split.images, digests, strict=True)}


def write_training_images(split: CocoSplit, digests: dict[str, str], run_dir: Path) -> None:
    """Write the list of training images into the run folder: their digests and, where these are known, their groups.

    Args:
        split: the training split.
        digests: the digests of its images, from `content_digests`.
        run_dir: the run folder.
    """
    content: dict[str, Any] = {"made_by": "flawmask train", "sha256_of_pixels": digests}
    if split.groups is not None:
        origin = dataset_info.origin_of(split.folder.parent)
        names = {name for image in split.images for name in _parts(image, origin, origin)}
        content["groups"] = {**origin, "names": sorted(names)}
    write_json(run_dir / NAME, content)


def _parts(image: Record, origin: Mapping[str, str | None], wanted: Mapping[str, str | None]) -> set[str]:
    """Return the names that the image's part has in another data set.

    Group names can be compared only within a category: `part01` of another category is another part. If the two data
    sets were divided by different regular expressions, the one of the other data set is applied to the image's name.

    Args:
        image: its record.
        origin: the origin of its data set, from `dataset_info.origin_of`.
        wanted: the origin of the other data set.
    """
    if origin["category"] != wanted["category"]:
        return set()
    names = set()
    if image.get("group") is not None and origin["group_by"] == wanted["group_by"]:
        names.update(str(image["group"]).split(groups.SAME_PART))
    if wanted["group_by"] and "original_file" in image:
        names.add(groups.part_named(wanted["group_by"], Path(image["original_file"]).name) or "")
    return names - {""}


def seen_in_training(split: CocoSplit, digests: Mapping[str, str], model: Path, *, allow: bool) -> Leak | None:
    """Return the images of the split that the model was trained on, and those that show a part that it was trained on.

    Args:
        split: the split to evaluate.
        digests: the digests of its images, from `content_digests`.
        model: the checkpoint.
        allow: whether such images are allowed.

    Returns:
        The leak; None where the model's folder has no list of training images.

    Raises:
        FlawmaskError: there are such images, and `allow` is off.
    """
    path = model.parent / NAME
    if not path.is_file():
        return None
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("sha256_of_pixels"), dict):
        raise FlawmaskError(_damaged(path))
    training_names = {digest: name for name, digest in content["sha256_of_pixels"].items()}
    images = [name for name, digest in digests.items() if digest in training_names]
    parts = _parts_in_training(split, content.get("groups"), path)
    others = [name for name in parts if name not in set(images)]
    if not allow:
        advice = "evaluate a split that was not used for training, or give --allow_leak"
        where, count = split.folder, len(split.images)
        if images:
            was = f"{images[0]} was {training_names[digests[images[0]]]}"
            raise FlawmaskError(f"{where}: {len(images)} of {count} images were used for training ({was}): {advice}")
        if others:
            part = f"{others[0]} shows {parts[others[0]]}"
            raise FlawmaskError(
                f"{where}: {len(others)} of {count} images show parts that were used for training ({part}): {advice}"
            )
    return Leak(images, others)


def _damaged(path: Path) -> str:
    return f"{path} is damaged: delete it to evaluate without a check of the training images"


def _parts_in_training(split: CocoSplit, training_groups: Any, path: Path) -> dict[str, str]:
    """Return the images that show a part that was trained on: file names, each with the name of the part.

    Args:
        split: the split to evaluate.
        training_groups: `groups` of the list of training images; None where it has none.
        path: the list of training images.
    """
    if training_groups is None:
        return {}
    try:
        names, wanted = set(training_groups["names"]), {key: training_groups[key] for key in ("category", "group_by")}
    except (TypeError, KeyError):
        raise FlawmaskError(_damaged(path)) from None
    origin = dataset_info.origin_of(split.folder.parent)
    shared = {str(image["file_name"]): _parts(image, origin, wanted) & names for image in split.images}
    return {name: min(parts) for name, parts in shared.items() if parts}
