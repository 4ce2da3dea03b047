"""A tiny data set of grey plates with a dark stain on each, and settings that train on it in a moment."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from small_network import STANDS_IN_FOR, is_in_place

from flawmask.coco import annotation, write_split
from flawmask.images import write_png
from flawmask.masks import Mask
from flawmask.training.config import TrainConfig

SIDE = 72
CATEGORIES = [{"id": 1, "name": "good"}, {"id": 2, "name": "defect"}]


def good_plate(seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A grey plate without a stain."""
    return np.random.default_rng(seed).normal(170, 6, (SIDE, SIDE, 3)).clip(0, 255).astype(np.uint8)


def part(seed: int) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], Mask]:
    """A grey plate with one dark stain on it, and the stain's mask."""
    random = np.random.default_rng(seed)
    pixels = random.normal(170, 6, (SIDE, SIDE, 3)).clip(0, 255).astype(np.uint8)
    height, width = (int(side) for side in random.integers(14, 24, 2))
    y, x = int(random.integers(2, SIDE - height - 2)), int(random.integers(2, SIDE - width - 2))
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    mask[y : y + height, x : x + width] = True
    pixels[mask] = pixels[mask] // 4
    return pixels, mask


def make_split(folder: Path, seeds: range) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, seed in enumerate(seeds, start=1):
        pixels, mask = part(seed)
        write_png(folder / "images" / f"{number}.png", pixels)
        images.append({"id": number, "file_name": f"{number}.png", "width": SIDE, "height": SIDE})
        annotations.append(annotation(mask, id=number, image_id=number, category_id=2))
    write_split(folder, images, annotations, CATEGORIES)


def make_dataset(folder: Path, training: int = 4, validation: int = 2) -> Path:
    """Write training and validation images, and return the folder."""
    make_split(folder / "train", range(training))
    make_split(folder / "val", range(100, 100 + validation))
    return folder


def settings(dataset: Path, **changes: Any) -> TrainConfig:
    small: dict[str, Any] = {
        "dataset_dir": dataset,
        "output_dir": dataset.parent / "run",
        "arch": "maskrcnn_resnet18_fpn",
        "weights": "none",
        "image_size": 64,
        "epochs": 1,
        "batch_size": 2,
        "device": "cpu",
        "precision": "fp32",
        "workers": 0,
        "proposals": 30,
        "roi_samples": 16,
        "max_detections": 10,
        "seed": 0,
    }
    return TrainConfig(**(small | changes))


def light(dataset: Path, **changes: Any) -> TrainConfig:
    """The same settings with the network that trains fastest, for tests that work with any network."""
    arch = STANDS_IN_FOR if is_in_place() else "ssdlite320_mobilenet_v3_large"
    return settings(dataset, **({"arch": arch} | changes))


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    """Return the weights in a checkpoint."""
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["model_state_dict"]
    return state


def same_weights(one: Path, other: Path) -> bool:
    """Return whether two checkpoints hold exactly the same weights."""
    first, second = weights_of(one), weights_of(other)
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())
