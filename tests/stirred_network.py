"""An R-CNN without random sampling, and images to train it."""

from collections.abc import Sequence
from typing import Any

import torch
from outlined_images import batch, network, rectangle, target_of
from random_network import patchwork
from torch import Tensor

from flawmask.model.arch import Arch
from flawmask.model.targets import Target

PROPOSALS, ENOUGH = 20, 96
"""Sampled regions per image. A quarter of them is more than an image can have positive proposals and true boxes."""


def without_chance(arch: Arch = "maskrcnn_resnet18_fpn", seed: int | None = None) -> Any:
    """Return a network that trains on all anchors and, with `ENOUGH`, on all regions. The seed decides its weights."""
    model = network(1024, arch)
    model.rpn.fg_bg_sampler.batch_size_per_image = 10**6
    model.rpn.fg_bg_sampler.positive_fraction = 0.5
    model.rpn._post_nms_top_n["training"] = PROPOSALS
    if seed is not None:
        stir(model, seed)
    return model


@torch.no_grad()
def stir(model: Any, seed: int) -> None:
    """Change the weights so that the network proposes large and small regions and gives them scores."""
    torch.manual_seed(seed)
    for layer, spread in (
        (model.rpn.head.cls_logits, 0.3),
        (model.rpn.head.bbox_pred, 0.15),
        (model.roi_heads.box_predictor.cls_score, 0.05),
        (model.roi_heads.box_predictor.bbox_pred, 0.05),
    ):
        layer.weight += torch.randn_like(layer.weight) * spread


def chosen_of(places: Sequence[int]) -> tuple[list[Tensor], list[Target]]:
    images, _, targets = batch()
    return [images[at] for at in places], [targets[at] for at in places]


FLAT = [(40, 200), (20, 200), (64, 96)]
"""Heights and widths. The first two are wide; padding makes them 1.6 times as high."""


def flat_of(places: Sequence[int]) -> tuple[list[Tensor], list[Target]]:
    sizes = [FLAT[at] for at in places]
    images = [
        torch.from_numpy(patchwork(*size, seed=at).copy()).permute(2, 0, 1)
        for at, size in zip(places, sizes, strict=True)
    ]
    spots = [(2, 3, 12, 20), (5, 60, 9, 35)]  # y x height width
    return images, [target_of([rectangle(size, *spot) for spot in spots], size) for size in sizes]
