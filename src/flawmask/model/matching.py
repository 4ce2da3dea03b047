"""Which boxes of a batch lie on which instance, and how they are to be moved: for all images at once.

As in Ren et al., "Faster R-CNN", NeurIPS 2015, section 3.1, and as torchvision computes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flawmask.model.instances import Instances

MAX_OVERLAPS = 2**24
"""Overlaps of instances and anchors that are held at a time: 64 MiB for each of a few float32 matrices."""


@dataclass(frozen=True)
class AnchorSamples:
    """On which anchors the region proposal network learns: S of each image.

    Attributes:
        places: (B, S) int64, which anchors; those that lie on an instance come first.
        used: (B, S) bool, which of the slots count.
        corrections: (B, P, 4) float32, how the first P, if they count, are to be moved onto their instance.
    """

    places: Tensor
    used: Tensor
    corrections: Tensor

    @classmethod
    def draw(cls, rpn: Any, anchors: Tensor, instances: Instances, draws: Tensor | None = None) -> "AnchorSamples":
        """Return anchors drawn at random, at most half of them on an instance, as torchvision draws them.

        Args:
            rpn: torchvision's region proposal network.
            anchors: (A, 4) float32, of every image.
            instances: what is on the images.
            draws: (B, A) float32, random numbers from 0 to 1 that decide it; by default they are drawn here.
        """
        images, room = instances.labels.shape
        images_per_chunk = max(1, MAX_OVERLAPS // (room * len(anchors)))
        parts = [
            _match_anchors(rpn.proposal_matcher, anchors, instances, slice(start, start + images_per_chunk))
            for start in range(0, images, images_per_chunk)
        ]
        matched, positive, negative = (torch.cat(each) for each in zip(*parts, strict=True))
        sampler = rpn.fg_bg_sampler
        most = min(sampler.batch_size_per_image, len(anchors))
        most_positive = min(int(sampler.batch_size_per_image * sampler.positive_fraction), len(anchors))
        draws = torch.rand(positive.shape, device=positive.device) if draws is None else draws
        key, on_instance = torch.where(positive, draws, -1.0).topk(most_positive)
        found = key >= 0
        key, beside = torch.where(negative, draws, -1.0).topk(most)
        fills_up = torch.arange(most, device=draws.device) < sampler.batch_size_per_image - found.sum(1, keepdim=True)
        boxes = instances.boxes.gather(1, matched.gather(1, on_instance)[..., None].expand(-1, -1, 4))
        corrections = encode(boxes, anchors[on_instance], rpn.box_coder.weights)
        return cls(
            torch.cat((on_instance, beside), dim=1),
            torch.cat((found, (key >= 0) & fills_up), dim=1),
            torch.where(found[..., None], corrections, 0.0),
        )


def ious(instances: Instances, of: slice, boxes: Tensor) -> Tensor:
    """Return the IoU of every instance of some images with every box, (b, G, N) float32; -1 where there is no instance.

    Args:
        instances: what is on the images.
        of: which images.
        boxes: (N, 4) of all images, or (b, N, 4), x1 y1 x2 y2 float32.
    """
    truth = instances.boxes[of]
    x1, y1, x2, y2 = truth[:, :, None].unbind(-1)
    left, top, right, bottom = (boxes if boxes.ndim == 3 else boxes[None])[:, None].unbind(-1)
    width = (torch.minimum(x2, right) - torch.maximum(x1, left)).clamp_(min=0)
    shared = width.mul_((torch.minimum(y2, bottom) - torch.maximum(y1, top)).clamp_(min=0))
    union = ((x2 - x1) * (y2 - y1) + (right - left) * (bottom - top)).sub_(shared)
    return torch.where(instances.labels[of, :, None] > 0, shared.div_(union), -1.0)


def _match_anchors(matcher: Any, anchors: Tensor, instances: Instances, of: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each anchor of some images the instance that it overlaps most, whether it lies on it and whether it
    lies beside all: (b, A) each. The anchors that overlap an instance most lie on one, however little that is."""
    overlaps = ious(instances, of, anchors)
    most, matched = overlaps.max(dim=1)
    best = overlaps.amax(dim=2, keepdim=True)
    is_best = ((overlaps == best) & (best >= 0)).any(dim=1)
    return matched, (most >= matcher.high_threshold) | is_best, (most < matcher.low_threshold) & ~is_best


def encode(truth: Tensor, boxes: Tensor, weights: Sequence[float]) -> Tensor:
    """Return how boxes are to be moved onto others, (..., 4): torchvision's `BoxCoder.encode` for any leading axes.

    Args:
        truth: (..., 4) x1 y1 x2 y2, where to.
        boxes: (..., 4) x1 y1 x2 y2, from where.
        weights: by what the moves of x, y, width and height are multiplied.
    """
    sides, wanted = boxes[..., 2:] - boxes[..., :2], truth[..., 2:] - truth[..., :2]
    centres, aims = boxes[..., :2] + 0.5 * sides, truth[..., :2] + 0.5 * wanted
    x, y = ((aims - centres) / sides).unbind(-1)
    width, height = torch.log(wanted / sides).unbind(-1)
    return torch.stack([one * weight for one, weight in zip((x, y, width, height), weights, strict=True)], dim=-1)


def decode(moves: Tensor, boxes: Tensor, coder: Any) -> Tensor:
    """Return boxes moved, (..., 4) x1 y1 x2 y2: torchvision's `BoxCoder.decode`.

    Args:
        moves: (..., 4), as `encode` returns them.
        boxes: (..., 4) x1 y1 x2 y2.
        coder: torchvision's, which says the weights and how much larger a box may become.
    """
    sides = boxes[..., 2:] - boxes[..., :2]
    centres = boxes[..., :2] + 0.5 * sides
    x, y, width, height = (one / weight for one, weight in zip(moves.unbind(-1), coder.weights, strict=True))
    centres = torch.stack((x, y), dim=-1) * sides + centres
    half = 0.5 * torch.exp(torch.stack((width, height), dim=-1).clamp(max=coder.bbox_xform_clip)) * sides
    return torch.cat((centres - half, centres + half), dim=-1)
