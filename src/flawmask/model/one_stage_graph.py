"""The graph of RetinaNet, FCOS, SSD and SSDlite. It computes what `one_stage.infer` computes, with operators of any
runtime."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD

from flawmask.model.graph import (
    EMPTY,
    Batch,
    Normalise,
    anchors_at,
    at_most,
    batch_of,
    best_of,
    clipped,
    found,
    taken,
)
from flawmask.model.spec import ModelSpec

Candidates = tuple[Tensor, Tensor, Tensor]
"""Boxes (B, N, 4) in pixels of the resized image, scores (B, N) and labels (B, N)."""


class Graph(nn.Module):
    """A one-stage detector. See `build.Detector.graph` for its inputs and outputs."""

    def __init__(self, model: Any, spec: ModelSpec) -> None:
        super().__init__()
        self.spec, self.model = spec, model
        self.normalise = Normalise(model.transform.image_mean, model.transform.image_std)
        self.anchors = _all_anchors(model, spec) if isinstance(model, SSD) else None

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the instances on the images, (B, H, W, 3) uint8."""
        model = self.model
        batch = batch_of(images, self.spec)
        features = list(model.backbone(self.normalise(batch)).values())
        outputs = model.head(features)
        make = self._of_anchors if self.anchors is not None else self._of_levels
        parts = list(make(outputs, features, batch))
        boxes, scores, labels = (torch.cat(one, dim=1) for one in zip(*parts, strict=True))
        classes, limit = len(self.spec.classes) + 1, self.spec.max_detections
        best = best_of(clipped(boxes, batch), scores, labels, classes, model.nms_thresh, model.score_thresh, limit)
        # RetinaNet and FCOS also score label 0, which no instance has.
        return found(best._replace(scores=torch.where(best.labels > 0, best.scores, EMPTY)), batch)[:-1]

    def _of_levels(self, outputs: dict[str, Tensor], features: list[Tensor], batch: Batch) -> Iterator[Candidates]:
        """Yield the best pairs of an anchor and a class on each level, as RetinaNet and FCOS choose them."""
        model = self.model
        scores = outputs["cls_logits"].sigmoid()
        if isinstance(model, FCOS):
            scores = (scores * outputs["bbox_ctrness"].sigmoid()).sqrt()
        images, _, classes = scores.shape
        start: Any = 0
        for level, cells in zip(features, model.anchor_generator.cell_anchors, strict=True):
            height, width = level.shape[-2:]
            end = start + height * width * len(cells)
            of_level = scores[:, start:end].flatten(1)
            best, pairs = of_level.topk(at_most(model.topk_candidates, of_level.shape[1]), dim=1)
            places = pairs // classes
            near = anchors_at(places, cells, (height, width), batch.pixels.shape[-2:]).reshape(-1, 4)
            codes = taken(outputs["bbox_regression"][:, start:end], places).reshape(-1, 4)
            decode = model.box_coder.decode if isinstance(model, FCOS) else model.box_coder.decode_single
            yield decode(codes, near).view(images, -1, 4), best, pairs % classes
            start = end

    def _of_anchors(self, outputs: dict[str, Tensor], _: list[Tensor], __: Batch) -> Iterator[Candidates]:
        """Yield the best anchors of each class, as SSD chooses them."""
        model, anchors = self.model, self.anchors
        assert anchors is not None
        scores = outputs["cls_logits"].softmax(-1)
        images = scores.shape[0]  # `len` would be a constant in the graph
        every = anchors.expand(images, -1, -1).reshape(-1, 4)
        boxes = model.box_coder.decode_single(outputs["bbox_regression"].reshape(-1, 4), every).view(images, -1, 4)
        for label in range(1, len(self.spec.classes) + 1):
            best, places = scores[..., label].topk(min(model.topk_candidates, len(anchors)), dim=1)
            yield taken(boxes, places), best, torch.full_like(places, label)


@torch.no_grad()
def _all_anchors(model: Any, spec: ModelSpec) -> Tensor:
    """Return the anchors of an SSD, (N, 4) float32, which are the same for every image."""
    side = spec.image_size
    image = torch.zeros(1, 3, side, side)
    anchors: Tensor = model.anchor_generator(ImageList(image, [(side, side)]), list(model.backbone(image).values()))[0]
    return anchors
