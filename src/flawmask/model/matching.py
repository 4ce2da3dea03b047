"""Matches anchors with instances and encodes box regression targets, for all images of a batch at once.

It follows Ren et al., "Faster R-CNN", NeurIPS 2015, section 3.1, and gives the results of torchvision.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flawmask.model.instances import Instances

MAX_OVERLAPS = 2**24
"""The most IoUs of instances and anchors in memory at a time: 64 MiB for each of a few float32 matrices."""


@dataclass(frozen=True)
class AnchorSamples:
    """The anchors that train the region proposal network: S slots per image.

    Attributes:
        places: (B, S) int64, the anchor of each slot. The first P slots are for positive anchors.
        used: (B, S) bool, which slots hold a sampled anchor.
        corrections: (B, P, 4) float32, the box regression targets of the positive anchors; zeros in unused slots.
    """

    places: Tensor
    used: Tensor
    corrections: Tensor

    @classmethod
    def draw(cls, rpn: Any, anchors: Tensor, instances: Instances, draws: Tensor | None = None) -> "AnchorSamples":
        """Sample anchors at random, at most half of them positive, as torchvision does.

        Args:
            rpn: torchvision's region proposal network.
            anchors: (A, 4) float32, the same for every image.
            instances: of the images.
            draws: (B, A) float32, random numbers from 0 to 1 that decide the sample; None to draw them here.
        """
        images, room = instances.labels.shape
        images_per_chunk = max(1, MAX_OVERLAPS // (room * len(anchors)))
        parts = [
            _match_anchors(rpn.proposal_matcher, anchors, instances, slice(start, start + images_per_chunk))
            for start in range(0, images, images_per_chunk)
        ]
        matched, positive, negative = (torch.cat(each) for each in zip(*parts, strict=True))
        sampler = rpn.fg_bg_sampler
        size = sampler.batch_size_per_image
        max_negatives = min(size, len(anchors))
        max_positives = min(int(size * sampler.positive_fraction), len(anchors))
        draws = torch.rand(positive.shape, device=positive.device) if draws is None else draws
        key, positives = torch.where(positive, draws, -1.0).topk(max_positives)
        is_positive = key >= 0
        key, negatives = torch.where(negative, draws, -1.0).topk(max_negatives)
        fills_up = torch.arange(max_negatives, device=draws.device) < size - is_positive.sum(1, keepdim=True)
        boxes = instances.boxes.gather(1, matched.gather(1, positives)[..., None].expand(-1, -1, 4))
        corrections = encode(boxes, anchors[positives], rpn.box_coder.weights)
        return cls(
            torch.cat((positives, negatives), dim=1),
            torch.cat((is_positive, (key >= 0) & fills_up), dim=1),
            torch.where(is_positive[..., None], corrections, 0.0),
        )


def ious(instances: Instances, of: slice, boxes: Tensor) -> Tensor:
    """Return the IoU of every instance of some images with every box, (b, G, N) float32; -1 for empty slots.

    Args:
        instances: of the images.
        of: the slice of the images.
        boxes: (N, 4) for boxes that all images share, or (b, N, 4); x1 y1 x2 y2 float32.
    """
    truth = instances.boxes[of]
    x1, y1, x2, y2 = truth[:, :, None].unbind(-1)
    left, top, right, bottom = (boxes if boxes.ndim == 3 else boxes[None])[:, None].unbind(-1)
    width = (torch.minimum(x2, right) - torch.maximum(x1, left)).clamp_(min=0)
    shared = width.mul_((torch.minimum(y2, bottom) - torch.maximum(y1, top)).clamp_(min=0))
    union = ((x2 - x1) * (y2 - y1) + (right - left) * (bottom - top)).sub_(shared)
    return torch.where(instances.labels[of, :, None] > 0, shared.div_(union), -1.0)


def _match_anchors(matcher: Any, anchors: Tensor, instances: Instances, of: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each anchor of some images the instance with the largest IoU, whether the anchor is positive, and
    whether it is negative: (b, A) each. The best anchors of each instance are positive even if their IoU is small."""
    overlaps = ious(instances, of, anchors)
    largest, matched = overlaps.max(dim=1)
    best = overlaps.amax(dim=2, keepdim=True)
    is_best = ((overlaps == best) & (best >= 0)).any(dim=1)
    return matched, (largest >= matcher.high_threshold) | is_best, (largest < matcher.low_threshold) & ~is_best


def encode(truth: Tensor, boxes: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the box regression targets, (..., 4): torchvision's `BoxCoder.encode` for any leading axes.

    Args:
        truth: (..., 4) x1 y1 x2 y2, the true boxes.
        boxes: (..., 4) x1 y1 x2 y2, the boxes to correct.
        weights: the factors of the corrections of x, y, width and height.
    """
    sides, true_sides = boxes[..., 2:] - boxes[..., :2], truth[..., 2:] - truth[..., :2]
    centres, true_centres = boxes[..., :2] + 0.5 * sides, truth[..., :2] + 0.5 * true_sides
    x, y = ((true_centres - centres) / sides).unbind(-1)
    width, height = torch.log(true_sides / sides).unbind(-1)
    return torch.stack([one * weight for one, weight in zip((x, y, width, height), weights, strict=True)], dim=-1)


def decode(corrections: Tensor, boxes: Tensor, coder: Any) -> Tensor:
    """Return the corrected boxes, (..., 4) x1 y1 x2 y2: torchvision's `BoxCoder.decode`.

    Args:
        corrections: (..., 4), in the form that `encode` returns.
        boxes: (..., 4) x1 y1 x2 y2, the boxes to correct.
        coder: torchvision's box coder, with the weights and the largest growth of a box.
    """
    sides = boxes[..., 2:] - boxes[..., :2]
    centres = boxes[..., :2] + 0.5 * sides
    x, y, width, height = (one / weight for one, weight in zip(corrections.unbind(-1), coder.weights, strict=True))
    centres = torch.stack((x, y), dim=-1) * sides + centres
    half = 0.5 * torch.exp(torch.stack((width, height), dim=-1).clamp(max=coder.bbox_xform_clip)) * sides
    return torch.cat((centres - half, centres + half), dim=-1)
