"""Images with instance masks, a network to train on them, and the gradients of its losses."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from random_network import SPEC, patchwork
from torch import Tensor

from flawmask.coco import annotation
from flawmask.masks import Mask
from flawmask.model.arch import Arch
from flawmask.model.build import build
from flawmask.model.targets import Target, make_target

SIZES = [(64, 96), (80, 64), (64, 64), (64, 100)]
INSTANCES = [2, 0, 3, 1]


def rectangle(size: tuple[int, int], y: int, x: int, height: int, width: int) -> Mask:
    mask = np.zeros(size, dtype=bool)
    mask[y : y + height, x : x + width] = True
    return mask


def disc(size: tuple[int, int], y: float, x: float, radius: float) -> Mask:
    rows, columns = np.mgrid[: size[0], : size[1]]
    return np.asarray((rows - y) ** 2 + (columns - x) ** 2 < radius**2)


def target_of(masks: list[Mask], size: tuple[int, int]) -> Target:
    """Return the target of an image at its original size."""
    records: list[dict[str, Any]] = [annotation(mask, id=1, image_id=1, category_id=2) for mask in masks]
    return make_target(records, {2: 2}, 1, size, size, "an image")


def batch() -> tuple[list[Tensor], list[list[Mask]], list[Target]]:
    """Four images of different sizes with two, no, three and one instance."""
    random = np.random.default_rng(0)
    images = [torch.from_numpy(patchwork(*size, seed).copy()).permute(2, 0, 1) for seed, size in enumerate(SIZES)]
    masks = [
        [
            rectangle(size, *random.integers(0, 40, 2).tolist(), *random.integers(4, 30, 2).tolist())
            for _ in range(count)
        ]
        for size, count in zip(SIZES, INSTANCES, strict=True)
    ]
    return images, masks, [target_of(of_image, size) for of_image, size in zip(masks, SIZES, strict=True)]


def network(roi_samples: int = 512, arch: Arch = SPEC.arch) -> Any:
    torch.manual_seed(1)
    model = build(replace(SPEC, arch=arch, norm="frozen", max_detections=5)).train()
    model.roi_heads.fg_bg_sampler.batch_size_per_image = roi_samples
    # torchvision draws a size for each image, of one; here sizes are not drawn.
    model.transform.torch_choice = lambda sizes: sizes[0]
    return model


def gradients(model: Any, found: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    torch.autograd.backward(list(found.values()))
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def boxes_for(masks: list[Mask], size: tuple[int, int], random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Boxes around, inside, beside and far larger than the instances, and beyond the image's edges; and the index of
    each box's instance."""
    height, width = size
    made, instances = [], []
    for number, mask in enumerate(masks):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        tight = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.float64)
        around = [tight + random.normal(0, scale, 4) for scale in (0, 0.4, 3, 10)]
        others = [(0, 0, width, height), (-9, -7, width + 8, height + 5), (*tight[:2], *tight[:2]), (2, 3, 2.5, 60)]
        for box in [*around, *(np.array(other, dtype=np.float64) for other in others)]:
            made.append([*np.minimum(box[:2], box[2:]), *np.maximum(box[:2], box[2:])])
            instances.append(number)
    return torch.tensor(made, dtype=torch.float32), torch.tensor(instances)


def masks_of_all_kinds(size: tuple[int, int]) -> list[Mask]:
    """Instances inside, at the edges and in the corners, as large as the image and as small as a pixel, in two parts,
    round and with a hole."""
    height, width = size
    return [
        rectangle(size, 5, 7, 12, 9),
        rectangle(size, 0, 0, height, width),
        rectangle(size, 0, width - 1, height, 1),
        rectangle(size, height - 1, 0, 1, 1),
        rectangle(size, 0, 0, 1, 1),
        rectangle(size, 17, 21, 1, 1),
        rectangle(size, 0, 3, 9, 4) | rectangle(size, height - 4, width - 9, 4, 9),
        disc(size, 15.5, 16, 11),
        disc(size, 20, 20, 12) & ~disc(size, 21, 19, 6),
    ]
