"""Whether a model has seen the images that it is judged on, by their content."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flawmask.coco import CocoSplit, Record
from flawmask.errors import FlawmaskError
from flawmask.files import read_json, write_json
from flawmask.images import content_digest, read_image
from flawmask.launch import usable_cores
from flawmask.progress import track

NAME = "training_images.json"
"""The file in a run folder that lists what was trained on."""


def content_digests(split: CocoSplit) -> dict[str, str]:
    """Return the SHA-256 of each image's upright pixels, by file name: the same picture in another file has the same.

    Raises:
        ImageError: an image cannot be read.
    """

    def digest(image: Record) -> str:
        return content_digest(read_image(split.image_path(image)))

    with ThreadPoolExecutor(usable_cores()) as pool:
        digests = track(pool.map(digest, split.images), f"reading {split.name}", total=len(split.images))
        return {str(image["file_name"]): one for image, one in zip(split.images, digests, strict=True)}


def write_training_images(digests: dict[str, str], run_dir: Path) -> None:
    """Write the digests of what was trained on, by file name, into the run folder."""
    write_json(run_dir / NAME, {"made_by": "flawmask train", "sha256_of_pixels": digests})


def seen_in_training(split: CocoSplit, digests: Mapping[str, str], model: Path, *, allow: bool) -> list[str] | None:
    """Return the images of the split that the model was trained on.

    Args:
        split: what is to be judged.
        digests: of its images, as `content_digests` gives them.
        model: the checkpoint.
        allow: whether there may be any.

    Returns:
        Their file names; None where the model's folder does not say what it was trained on.

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
    seen = [name for name, digest in digests.items() if digest in trained]
    if seen and not allow:
        there = trained[digests[seen[0]]]
        raise FlawmaskError(
            f"{split.folder}: {len(seen)} of {len(split.images)} images were trained on ({seen[0]} was {there}): "
            "judge a split that training has not seen, or say --allow_leak"
        )
    return seen
