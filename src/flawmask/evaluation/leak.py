"""Whether a model has seen the images that it is judged on, by their content."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flawmask.coco import CocoSplit, Record
from flawmask.errors import FlawmaskError
from flawmask.files import read_json, write_json
from flawmask.images import read_image
from flawmask.progress import track

NAME = "training_images.json"
"""The file in a run folder that lists what was trained on."""


def content_digests(split: CocoSplit, images: Sequence[Record]) -> dict[str, str]:
    """Return the SHA-256 of each image's upright pixels, by file name: the same picture in another file has the same.

    Raises:
        ImageError: an image cannot be read.
    """

    def digest(image: Record) -> str:
        pixels = read_image(split.image_path(image))
        return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = track(pool.map(digest, images), f"reading {split.folder.name}", total=len(images))
        return {str(image["file_name"]): one for image, one in zip(images, digests, strict=True)}


def training_images(split: CocoSplit) -> dict[str, str]:
    """Return the digests of the photographs that training sees, by file name; their variants are not among them."""
    return content_digests(split, [image for image in split.images if "augmentation" not in image])


def write_training_images(digests: dict[str, str], run_dir: Path) -> None:
    """Write what was trained on into the run folder."""
    write_json(run_dir / NAME, {"made_by": "flawmask train", "sha256_of_pixels": digests})


def seen_in_training(split: CocoSplit, model: Path, *, allow: bool) -> dict[str, str] | None:
    """Return the images of the split that the model was trained on, each with the file they were there.

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
    judged = content_digests(split, split.images)
    seen = {name: trained[digest] for name, digest in judged.items() if digest in trained}
    if seen and not allow:
        name, there = next(iter(seen.items()))
        raise FlawmaskError(
            f"{split.folder}: {len(seen)} of {len(split.images)} images were trained on ({name} was {there}): "
            "judge a split that training has not seen, or say --allow_leak"
        )
    return seen
