"""Splits and predictions made by hand, of rectangles and blobs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flawmask.coco import CocoSplit, annotation
from flawmask.masks import Mask, box_of, to_rle
from flawmask.prediction import Instance, Prediction

HEIGHT, WIDTH = 60, 80
NAMES = {1: "good", 3: "crack", 7: "scratch"}


def rectangle(y: int, x: int, height: int, width: int) -> Mask:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[y : y + height, x : x + width] = True
    return mask


def instance(label: str, score: float, mask: Mask) -> Instance:
    x, y, width, height = box_of(mask)
    box = (float(x), float(y), float(x + width), float(y + height))
    return Instance(label, score, box, to_rle(mask), int(mask.sum()))


def make_split(truths: list[list[tuple[int, Mask]]], names: dict[int, str] = NAMES) -> CocoSplit:
    """A split with an image for each list of (category id, mask). Ids start at 11."""
    images: list[dict[str, Any]] = [
        {"id": 11 + at, "file_name": f"{at}.png", "width": WIDTH, "height": HEIGHT} for at in range(len(truths))
    ]
    annotations: dict[int, tuple[dict[str, Any], ...]] = {}
    number = 100
    for image, truth in zip(images, truths, strict=True):
        records = []
        for category, mask in truth:
            number += 1
            records.append(annotation(mask, id=number, image_id=image["id"], category_id=category))
        annotations[image["id"]] = tuple(records)
    categories = tuple({"id": number, "name": name} for number, name in names.items())
    return CocoSplit(Path("data/val"), tuple(images), annotations, categories)


def grouped(split: CocoSplit, size: int) -> CocoSplit:
    """The same split with groups of the given sizes."""
    images = tuple({**image, "group": f"part {at // size}"} for at, image in enumerate(split.images))
    return replace(split, images=images)


def predicted(*instances: Instance) -> Prediction:
    return Prediction(HEIGHT, WIDTH, tuple(sorted(instances, key=lambda one: -one.score)))


def blob(random: np.random.Generator) -> Mask:
    """A rectangle, some of them hollow, some thin."""
    height, width = (int(side) for side in random.integers(1, 25, 2))
    y, x = int(random.integers(0, HEIGHT - height)), int(random.integers(0, WIDTH - width))
    mask = rectangle(y, x, height, width)
    if height > 6 and width > 6 and random.random() < 0.4:
        mask &= ~rectangle(y + 2, x + 2, height - 4, width - 4)
    return mask


def shaken(mask: Mask, random: np.random.Generator) -> Mask:
    moved = np.roll(mask, tuple(random.integers(-2, 3, 2)), axis=(0, 1))
    return moved if moved.any() else mask
