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
from flawmask.model.rcnn_graph import Graph
from flawmask.model.rcnn_losses import counts, losses
from flawmask.model.semantic import maps
from flawmask.model.spec import ModelSpec

__all__ = [
    "build",
    "counts",
    "graph",
    "infer",
    "infer_in",
    "losses",
    "network_input",
    "stages",
    "train_in",
]


BLOCK = 32
"""On a GPU, convolutions get a multiple of this many regions."""


def train_in(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Prepare the layers for training in `dtype`. The last layers, boxes and losses stay float32."""
    compute.train_in(model, _layers(model, device), device, dtype)


def infer_in(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Convert the layers to `dtype` for inference. The last layers and boxes stay float32.

    The network cannot be trained any more.
    """
    compute.infer_in(model, _layers(model, device), dtype)


def _layers(model: Any, device: torch.device) -> Layers:
    """Return the layers that may compute in lower precision: all except those that output scores, box corrections and
    masks, and those that would be slower."""
    heads = model.roi_heads
    outer = [model.rpn.head.conv, heads.box_head]
    if hasattr(model, "semantic_head"):
        outer.append(model.semantic_head.layers)
    backbone = model.backbone.fpn if compute.is_slow(model.backbone.body, device) else model.backbone
    if not heads.has_mask():
        return Layers([backbone], outer)
    return Layers([backbone, heads.mask_head], [*outer, heads.mask_predictor.conv5_mask])


def infer(model: Any, images: list[Tensor], sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
    """Return the instances that torchvision's Mask R-CNN predicts on each image, before masks are pasted.

    They are `boxes` (N, 4) float32, x1 y1 x2 y2 in pixels of the original; `labels` (N,) int64; `scores` (N,) float32,
    0 to 1; and, if the network has masks, `masks` (N, 1, 28, 28) float32, probabilities inside the box. If it has a
    branch for pixels, there are also `maps` of the D classes of defects, (D, rows, columns) float32, 0 to 1.

    The steps are those of `GeneralizedRCNN.forward` without the last. That would paste each mask into a float image of
    its own: 400 MB for 100 predictions on 1024 x 1024.

    Args:
        model: in evaluation mode.
        images: (3, H, W) uint8, resized for the network, which pads them to one size.
        sizes: height and width of each original.
    """
    batch, _ = model.transform([image.float() / 255 for image in images])
    features = model.backbone(batch.tensors)
    proposals, _ = model.rpn(batch, features)
    predicted = _head_predictions(model.roi_heads, features, proposals, batch.image_sizes)
    if hasattr(model, "semantic_head"):
        of_images = maps(model.semantic_head(features["0"]), batch.image_sizes)
        for one, of_image in zip(predicted, of_images, strict=True):
            one["maps"] = of_image
    return to_original(predicted, batch.image_sizes, sizes)


def _head_predictions(
    heads: Any, features: dict[str, Tensor], proposals: list[Tensor], shapes: list[tuple[int, int]]
) -> list[dict[str, Tensor]]:
    """Return the heads' predictions for the region proposals of each image, by the steps of `RoIHeads.forward`. Boxes
    are in pixels of the resized image."""
    pooled = heads.box_roi_pool(features, proposals, shapes)
    regions = heads.box_head(in_blocks(pooled))[: len(pooled)]
    boxes, scores, labels = heads.postprocess_detections(*heads.box_predictor(regions), proposals, shapes)
    predicted = [
        {"boxes": of_image, "labels": label, "scores": score}
        for of_image, label, score in zip(boxes, labels, scores, strict=True)
    ]
    if heads.has_mask():
        pooled = heads.mask_roi_pool(features, boxes, shapes)
        logits = heads.mask_predictor(heads.mask_head(in_blocks(pooled)))[: len(pooled)]
        for one, masks in zip(predicted, maskrcnn_inference(logits, labels), strict=True):
            one["masks"] = masks
    return predicted


def graph(model: Any, spec: ModelSpec) -> Graph:
    """Return the network as it is exported, see `build.Detector.graph`."""
    return Graph(model, spec)


def in_blocks(pooled: Tensor) -> Tensor:
    """Return the features of N regions, (N, ...). On a GPU they are padded with zeros for a few more regions.

    cuDNN plans a convolution for each new N, which takes longer than the convolution itself. Padding limits the number
    of different N: all are multiples of `BLOCK`, and there are only eight between a power of two and the next.
    """
    return pooled if pooled.device.type != "cuda" else padded_to(pooled, whole_blocks(len(pooled)))


def whole_blocks(count: int) -> int:
    """Return the padded number of regions for `count` regions."""
    block = max(BLOCK, 1 << max(0, count.bit_length() - 4))
    return -(-count // block) * block


def padded_to(pooled: Tensor, count: int) -> Tensor:
    """Return the features of N regions, padded with zeros to (count, ...), in the same memory layout."""
    return F.pad(pooled, (0, 0) * (pooled.ndim - 1) + (0, count - len(pooled)))
