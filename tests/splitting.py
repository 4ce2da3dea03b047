"""A batch of images with different numbers of instances, which shows whether splitting a batch changes its losses."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from random_network import patchwork

from flawmask.coco import annotation
from flawmask.model.spec import ModelSpec
from flawmask.model.targets import Target, make_target
from flawmask.training.loader import Batch

BOXES = [(8, 12, 20, 15), (30, 20, 24, 40), (2, 40, 18, 18), (40, 4, 12, 10), (20, 30, 30, 14)]
"""x y width height of defects on an image of 64 x 64 pixels."""

INSTANCES = (5, 0, 2, 1)
"""On each of four images."""


def target_of(size: int, image_id: int, count: int) -> Target:
    records: list[dict[str, Any]] = []
    for at, box in enumerate(BOXES[:count]):
        x, y, width, height = (round(side * size / 64) for side in box)
        mask: npt.NDArray[np.bool_] = np.zeros((size, size), dtype=bool)
        mask[y : y + height, x : x + width] = True
        records.append(annotation(mask, id=at + 1, image_id=image_id, category_id=2 + at % 2))
    return make_target(records, {2: 2, 3: 3}, image_id, (size, size), (size, size), "an image")


def batch_for(spec: ModelSpec) -> Batch:
    """Four images with five, no, two and one instance."""
    size = spec.resized(64, 64)[0]
    images = [torch.from_numpy(patchwork(size, size, at).copy()).permute(2, 0, 1) for at in range(len(INSTANCES))]
    targets = [target_of(size, 10 + at, count) for at, count in enumerate(INSTANCES)]
    return Batch.of(list(zip(images, targets, strict=True)))
