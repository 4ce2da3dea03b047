"""The graph of Mask R-CNN and Faster R-CNN. It computes what `rcnn.infer` computes, with operators of any runtime."""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.rpn import permute_and_flatten
from torchvision.ops import roi_align

from flawmask.model.graph import (
    EMPTY,
    Batch,
    Detections,
    Normalise,
    anchors_at,
    at_most,
    batch_of,
    best_of,
    clipped,
    found,
    interpolated,
    taken,
)
from flawmask.model.roi_align import PyramidRoIAlign
from flawmask.model.semantic import STRIDE
from flawmask.model.spec import ModelSpec

PROBE = 256
"""The side, in pixels, of the image with which the scales of the pyramid's levels are measured."""

SMALLEST_PROPOSAL, SMALLEST_BOX = 1e-3, 1e-2
"""torchvision drops boxes with a side below these, in pixels of the resized image."""


class Graph(nn.Module):
    """A Mask R-CNN or a Faster R-CNN. See `build.Detector.graph` for its inputs and outputs."""

    def __init__(self, model: Any, spec: ModelSpec) -> None:
        super().__init__()
        self.spec, self.backbone, self.rpn, self.heads = spec, model.backbone, model.rpn, model.roi_heads
        self.normalise = Normalise(model.transform.image_mean, model.transform.image_std)
        with torch.no_grad():
            levels = model.backbone(torch.zeros(1, 3, PROBE, PROBE))
        self.scales = {name: level.shape[-1] / PROBE for name, level in levels.items()}
        self.semantic_head = getattr(model, "semantic_head", None)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the instances on the images, (B, H, W, 3) uint8."""
        batch = batch_of(images, self.spec)
        features = self.backbone(self.normalise(batch))
        detections = self._detections(features, self._proposals(features, batch), batch)
        boxes, labels, scores, image_of, _ = found(detections, batch)
        if not self.heads.has_mask():
            return boxes, labels, scores, image_of
        pooled, order = self._pooled(self.heads.mask_roi_pool, features, boxes / batch.ratio, image_of)
        boxes, labels, scores, image_of = (one.index_select(0, order) for one in (boxes, labels, scores, image_of))
        logits = self.heads.mask_predictor(self.heads.mask_head(pooled))
        chosen = labels[:, None, None, None].expand(-1, 1, *logits.shape[-2:])
        instances = (boxes, labels, scores, image_of, logits.gather(1, chosen)[:, 0].sigmoid())
        return instances if self.semantic_head is None else (*instances, self._maps(features, batch))

    def _maps(self, features: dict[str, Tensor], batch: Batch) -> Tensor:
        """Return what `semantic.maps` returns, for all images: (B, D, rows, columns) float32."""
        assert self.semantic_head is not None
        values = self.semantic_head(features["0"])
        for axis, size in ((2, batch.size[1]), (3, batch.size[0])):
            values = interpolated(values, axis, torch.ceil(size / STRIDE).to(torch.int64), size / STRIDE)
        maps: Tensor = values.sigmoid()
        return maps

    def _proposals(self, features: dict[str, Tensor], batch: Batch) -> Detections:
        """Return the region proposals of each image, by the steps of torchvision's `RegionProposalNetwork`."""
        rpn = self.rpn
        boxes, scores, levels = [], [], []
        each = zip(*rpn.head(list(features.values())), rpn.anchor_generator.cell_anchors, strict=True)
        for level, (logit, code, cells) in enumerate(each):
            images, anchors, height, width = logit.shape
            objectness = permute_and_flatten(logit, images, anchors, 1, height, width)[..., 0]
            codes = permute_and_flatten(code, images, anchors, 4, height, width)
            best, places = objectness.topk(at_most(rpn.pre_nms_top_n(), anchors * height * width), dim=1)
            near = anchors_at(places, cells, (height, width), batch.pixels.shape[-2:])
            decoded = rpn.box_coder.decode_single(taken(codes, places).reshape(-1, 4), near.reshape(-1, 4))
            boxes.append(decoded.view(images, -1, 4))
            scores.append(best.sigmoid())
            levels.append(torch.full_like(places, level))
        every = clipped(torch.cat(boxes, dim=1), batch)
        objectness = torch.where(_is_large(every, SMALLEST_PROPOSAL), torch.cat(scores, dim=1), EMPTY)
        limit = rpn.post_nms_top_n()
        return best_of(every, objectness, torch.cat(levels, dim=1), len(levels), rpn.nms_thresh, EMPTY / 2, limit)

    def _detections(self, features: dict[str, Tensor], proposals: Detections, batch: Batch) -> Detections:
        """Return the detections of each image, by the steps of torchvision's `RoIHeads`. Each class has its own box."""
        heads, classes = self.heads, len(self.spec.classes)
        images, count = proposals.scores.shape
        flat = proposals.boxes.reshape(-1, 4)
        image_of = torch.arange(images)[:, None].expand(images, count).reshape(-1)
        pooled, order = self._pooled(heads.box_roi_pool, features, flat, image_of)
        back = torch.zeros_like(order).scatter(0, order, torch.arange(images * count))
        logits, codes = (one.index_select(0, back) for one in heads.box_predictor(heads.box_head(pooled)))
        scores = logits.softmax(-1).view(images, count, -1)[..., 1:]
        boxes = heads.box_coder.decode_single(codes, flat).view(images, count, -1, 4)[:, :, 1:]
        boxes = clipped(boxes.reshape(images, -1, 4), batch)
        is_box = _is_large(boxes, SMALLEST_BOX) & (proposals.scores > EMPTY)[..., None].expand_as(scores).flatten(1)
        labels = torch.arange(1, classes + 1).expand_as(scores).flatten(1)
        scores = torch.where(is_box, scores.flatten(1), EMPTY)
        limit = self.spec.max_detections
        return best_of(boxes, scores, labels, classes + 1, heads.nms_thresh, heads.score_thresh, limit)

    def _pooled(
        self, pool: PyramidRoIAlign, features: dict[str, Tensor], boxes: Tensor, image_of: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the pooled features of R boxes, (R, channels, height, width), level after level, and the box that each
        row is of, (R,) int64."""
        names = [name for name in pool.featmap_names if name in self.scales]
        level_of = pool.level_of(boxes, [self.scales[name] for name in names])
        placed = torch.cat((image_of[:, None].to(boxes.dtype), boxes), dim=1)
        chosen = [(level_of == level).nonzero().view(-1) for level in range(len(names))]
        pooled = [
            roi_align(features[name], placed[here], pool.output_size, self.scales[name], pool.sampling_ratio)
            for name, here in zip(names, chosen, strict=True)
        ]
        return torch.cat(pooled), torch.cat(chosen)


def _is_large(boxes: Tensor, side: float) -> Tensor:
    """Return which boxes have sides of at least `side` pixels: (..., 4) to (...)."""
    return ((boxes[..., 2:] - boxes[..., :2]) >= side).all(-1)
