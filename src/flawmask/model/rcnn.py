"""Mask R-CNN and Faster R-CNN as a kind of detector."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import maskrcnn_inference

from flawmask.model import compute
from flawmask.model.compute import Layers
from flawmask.model.layers import to_original
from flawmask.model.layers import unnormalised as network_input
from flawmask.model.rcnn_build import build, stages
from flawmask.model.rcnn_losses import counts, losses

__all__ = [
    "build",
    "counts",
    "infer",
    "infer_in",
    "losses",
    "network_input",
    "stages",
    "train_in",
]


BLOCK = 32
"""On a GPU, the number of regions that pass through convolutions together is a multiple of this."""


def train_in(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Let the network's layers train in `dtype`; the last ones, boxes and losses stay float32."""
    compute.train_in(model, _layers(model, device), device, dtype)


def infer_in(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Let the network's layers hold `dtype`; the last ones and boxes stay float32. It cannot be trained any more."""
    compute.infer_in(model, _layers(model, device), dtype)


def _layers(model: Any, device: torch.device) -> Layers:
    """Return the layers that compute in lower precision: all but those that give scores, moves and masks, and those
    that would be slower for it."""
    heads = model.roi_heads
    outer = [model.rpn.head.conv, heads.box_head]
    backbone = model.backbone.fpn if compute.is_slow(model.backbone.body, device) else model.backbone
    if not heads.has_mask():
        return Layers([backbone], outer)
    return Layers([backbone, heads.mask_head], [*outer, heads.mask_predictor.conv5_mask])


def infer(model: Any, images: list[Tensor], sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
    """Return what torchvision's Mask R-CNN finds on each image, but for the last step: `boxes` (N, 4) float32, x1 y1 x2
    y2 in pixels of the original, `labels` (N,) int64, `scores` (N,) float32, 0 to 1, and, where it has masks, `masks`
    (N, 1, 28, 28) float32 probabilities inside the box.

    These are the steps of `GeneralizedRCNN.forward`. The last would paste each mask into a float image of its own,
    400 MB for 100 detections on 1024 x 1024.

    Args:
        model: in evaluation mode.
        images: (3, H, W) uint8, at the size at which the network sees them, padded to one size by it.
        sizes: height and width of each original.
    """
    seen, _ = model.transform([image.float() / 255 for image in images])
    features = model.backbone(seen.tensors)
    proposals, _ = model.rpn(seen, features)
    found = _in_regions(model.roi_heads, features, proposals, seen.image_sizes)
    return to_original(found, seen.image_sizes, sizes)


def _in_regions(
    heads: Any, features: dict[str, Tensor], proposals: list[Tensor], shapes: list[tuple[int, int]]
) -> list[dict[str, Tensor]]:
    """Return what the heads find in the regions of each image, by the steps of `RoIHeads.forward`; boxes in pixels of
    the image as the network sees it."""
    pooled = heads.box_roi_pool(features, proposals, shapes)
    regions = heads.box_head(in_blocks(pooled))[: len(pooled)]
    boxes, scores, labels = heads.postprocess_detections(*heads.box_predictor(regions), proposals, shapes)
    found = [
        {"boxes": of_image, "labels": label, "scores": score}
        for of_image, label, score in zip(boxes, labels, scores, strict=True)
    ]
    if heads.has_mask():
        pooled = heads.mask_roi_pool(features, boxes, shapes)
        logits = heads.mask_predictor(heads.mask_head(in_blocks(pooled)))[: len(pooled)]
        for one, masks in zip(found, maskrcnn_inference(logits, labels), strict=True):
            one["masks"] = masks
    return found


def in_blocks(pooled: Tensor) -> Tensor:
    """Return the features of N regions, (N, ...), on a GPU with zeros behind them for some more regions.

    cuDNN plans a convolution anew for each N that it has not met, which takes longer than the convolution; so that N
    recurs, there are but eight between a power of two and the next, and none that is no multiple of `BLOCK`.
    """
    return pooled if pooled.device.type != "cuda" else padded_to(pooled, whole_blocks(len(pooled)))


def whole_blocks(count: int) -> int:
    """Return how many regions pass together for so many that are wanted."""
    block = max(BLOCK, 1 << max(0, count.bit_length() - 4))
    return -(-count // block) * block


def padded_to(pooled: Tensor, count: int) -> Tensor:
    """Return the features of N regions with zeros behind them, (count, ...), in the same layout."""
    return F.pad(pooled, (0, 0) * (pooled.ndim - 1) + (0, count - len(pooled)))
