"""Mask R-CNN and Faster R-CNN as a kind of detector."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flawmask.model.layers import unnormalised as seen
from flawmask.model.rcnn_build import build, loss_names, stages
from flawmask.model.rcnn_compute import infer_in, train_in
from flawmask.model.rcnn_losses import losses

__all__ = [
    "build",
    "infer",
    "infer_in",
    "loss_names",
    "losses",
    "seen",
    "stages",
    "train_in",
]


def infer(model: Any, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """Return what torchvision's Mask R-CNN finds on each image, but for the last step: `boxes` (N, 4) in pixels of the
    image, `labels` (N,), `scores` (N,) and, where it has masks, `masks` (N, 1, 28, 28) probabilities inside the box.

    These are the steps of `GeneralizedRCNN.forward`. The last would paste each mask into a float image of its own,
    400 MB for 100 detections on 1024 x 1024.

    Args:
        model: in evaluation mode.
        images: (3, H, W) float32, 0 to 1, of one size.
    """
    height, width = images[0].shape[-2:]
    resized, _ = model.transform(list(images))
    features = model.backbone(resized.tensors)
    proposals, _ = model.rpn(resized, features)
    found, _ = model.roi_heads(features, proposals, resized.image_sizes)
    resized_height, resized_width = resized.image_sizes[0]
    # In float32, as torchvision does it: the last bit decides which pixel a box's edge falls on.
    ratio = torch.tensor([width / resized_width, height / resized_height] * 2, dtype=torch.float32)
    return [{**one, "boxes": one["boxes"] * ratio.to(one["boxes"].device)} for one in found]
