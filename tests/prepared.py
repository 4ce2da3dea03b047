"""Prepare data sets in one call, and read them back without Flawmask's own code."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image
from pycocotools.coco import COCO

from flawmask.data.prepare import PrepareConfig, Prepared, prepare

Make = Callable[..., Path]
Digests = Callable[[Path], dict[str, str]]
Array = npt.NDArray[Any]


def run(category: Path, /, **settings: Any) -> Prepared:
    output = category.parents[1] / "out" / category.name
    given = {"mvtec_root": category.parent, "category": category.name, "output_dir": output, **settings}
    return prepare(PrepareConfig(**given))


def content(prepared: Prepared, split: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((prepared.dataset_dir / split / "annotations.json").read_text())
    return found


def info(prepared: Prepared) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((prepared.dataset_dir / "dataset_info.json").read_text())
    return found


def records(prepared: Prepared, key: str = "images") -> list[dict[str, Any]]:
    return [record for split in ("train", "val") for record in content(prepared, split)[key]]


def joined(prepared: Prepared) -> dict[str, Array]:
    """Return the union of each image's annotations, decoded by pycocotools, by its original file."""
    unions = {}
    for split in ("train", "val"):
        coco = COCO(str(prepared.dataset_dir / split / "annotations.json"))
        for image in coco.dataset["images"]:
            union = np.zeros((image["height"], image["width"]), dtype=bool)
            for record in coco.imgToAnns[image["id"]]:
                mask = coco.annToMask(record).astype(bool)
                assert record["area"] == mask.sum()
                rows, columns = np.nonzero(mask)
                box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
                assert record["bbox"] == box
                union |= mask
            unions[image["original_file"]] = union
    return unions


def truth_of(root: Path, original_file: str) -> Array:
    """Return the ground truth read by OpenCV, for a mask named as MVTec names it; all of a good image."""
    path = root / original_file
    category, kind = path.parents[2], path.parent.name
    if kind == "good":
        image = cv2.imread(str(path))
        assert image is not None
        return np.ones(image.shape[:2], dtype=bool)
    mask = cv2.imread(str(category / "ground_truth" / kind / f"{path.stem}_mask.png"), cv2.IMREAD_GRAYSCALE)
    assert mask is not None
    return np.asarray(mask > 127)


def sides(prepared: Prepared) -> dict[str, str]:
    return {image["original_file"]: split for split in ("train", "val") for image in content(prepared, split)["images"]}


def draw_image(path: Path, seed: int, size: tuple[int, int] = (14, 18)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def write_mask(path: Path, pixels: Array, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
