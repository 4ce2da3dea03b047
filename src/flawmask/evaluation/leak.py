"""Whether a model has seen the images that it is judged on, by their content, or their parts, by their groups."""

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
"""The file in a run folder that lists what was trained on."""


@dataclass(frozen=True)
class Leak:
    """What of a split a model was trained on.

    Attributes:
        images: the file names of the images that it was trained on.
        parts: those of the others that show a part of which it was trained on another image.
    """

    images: list[str]
    parts: list[str]


def content_digests(split: CocoSplit, levels: Levels = UPPER_BITS) -> dict[str, str]:
    """Return the SHA-256 of each image's upright pixels, by file name: the same picture in another file has the same.

    Args:
        split: whose images are read.
        levels: what becomes black and white, of values of more than 8 bits.

    Raises:
        ImageError: an image cannot be read.
    """

    def digest(image: Record) -> str:
        return content_digest(read_image(split.image_path(image), levels))

    with ThreadPoolExecutor(usable_cores()) as pool:
        digests = track(pool.map(digest, split.images), f"reading {split.name}", total=len(split.images))
        return {str(image["file_name"]): one for image, one in zip(split.images, digests, strict=True)}


def write_training_images(split: CocoSplit, digests: dict[str, str], run_dir: Path) -> None:
    """Write what was trained on into the run folder: the digests of the images by file name, and the groups that they
    are of, where these are known.

    Args:
        split: what was trained on.
        digests: of its images, as `content_digests` gives them.
        run_dir: the run folder.
    """
    content: dict[str, Any] = {"made_by": "flawmask train", "sha256_of_pixels": digests}
    if split.groups is not None:
        origin = dataset_info.origin_of(split.folder.parent)
        names = {name for image in split.images for name in _parts(image, origin, origin)}
        content["groups"] = {**origin, "names": sorted(names)}
    write_json(run_dir / NAME, content)


def _parts(image: Record, origin: Mapping[str, str | None], wanted: Mapping[str, str | None]) -> set[str]:
    """Return what the image's part is called in the way in which another data set calls its parts.

    Names of groups say something among images of one category alone: of another, `part01` is another part. Where two
    data sets of it were divided by other regular expressions, that of the other one is asked for the part.

    Args:
        image: its record.
        origin: of its data set, as `dataset_info.origin_of` gives it.
        wanted: the same of the other data set.
    """
    if origin["category"] != wanted["category"]:
        return set()
    found = set()
    if image.get("group") is not None and origin["group_by"] == wanted["group_by"]:
        found.update(str(image["group"]).split(groups.SAME_PART))
    if wanted["group_by"] and "original_file" in image:
        found.add(groups.part_named(wanted["group_by"], Path(image["original_file"]).name) or "")
    return found - {""}


def seen_in_training(split: CocoSplit, digests: Mapping[str, str], model: Path, *, allow: bool) -> Leak | None:
    """Return the images of the split that the model was trained on, and those that show a part that it was trained on.

    Args:
        split: what is to be judged.
        digests: of its images, as `content_digests` gives them.
        model: the checkpoint.
        allow: whether there may be any.

    Returns:
        None where the model's folder does not say what it was trained on.

    Raises:
        FlawmaskError: there are any, and `allow` is off.
    """
    path = model.parent / NAME
    if not path.is_file():
        return None
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("sha256_of_pixels"), dict):
        raise FlawmaskError(f"{path} is damaged: delete it to judge without knowing what was trained on")
    trained = {digest: name for name, digest in content["sha256_of_pixels"].items()}
    images = [name for name, digest in digests.items() if digest in trained]
    parts = _seen_parts(split, content.get("groups"), path)
    others = [name for name in parts if name not in set(images)]
    if not allow:
        advice = "judge a split that training has not seen, or say --allow_leak"
        where, count = split.folder, len(split.images)
        if images:
            was = f"{images[0]} was {trained[digests[images[0]]]}"
            raise FlawmaskError(f"{where}: {len(images)} of {count} images were trained on ({was}): {advice}")
        if others:
            part = f"{others[0]} shows {parts[others[0]]}"
            raise FlawmaskError(
                f"{where}: {len(others)} of {count} images show parts that were trained on ({part}): {advice}"
            )
    return Leak(images, others)


def _seen_parts(split: CocoSplit, trained: Any, path: Path) -> dict[str, str]:
    """Return the file names of the images that show a part that was trained on, and what that is called.

    Args:
        split: what is to be judged.
        trained: `groups` of the run's list; None where it has none.
        path: the run's list.
    """
    if trained is None:
        return {}
    try:
        names, wanted = set(trained["names"]), {key: trained[key] for key in ("category", "group_by")}
    except (TypeError, KeyError):
        raise FlawmaskError(f"{path} is damaged: delete it to judge without knowing what was trained on") from None
    origin = dataset_info.origin_of(split.folder.parent)
    both = {str(image["file_name"]): _parts(image, origin, wanted) & names for image in split.images}
    return {name: min(parts) for name, parts in both.items() if parts}
