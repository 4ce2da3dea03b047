"""The graph of RF-DETR. It computes what `rfdetr.infer` computes, with operators of any runtime."""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from flawmask.model.graph import EMPTY, Detections, Normalise, batch_of, cut_out, found, taken
from flawmask.model.layers import IMAGENET_DEVIATION, IMAGENET_MEAN
from flawmask.model.spec import ModelSpec


class Graph(nn.Module):
    """An RF-DETR with masks. See `build.Detector.graph` for its inputs and outputs."""

    def __init__(self, model: Any, spec: ModelSpec) -> None:
        super().__init__()
        self.spec, self.model = spec, model
        self.normalise = Normalise(IMAGENET_MEAN, IMAGENET_DEVIATION)
        # rfdetr's own preparation for export: it resizes the position embeddings for this size, once and for all.
        model.backbone[0].encoder.shape = spec.resized(1, 1)
        model.export()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the instances on the images, (B, H, W, 3) uint8."""
        spec = self.spec
        batch = batch_of(images, spec)
        relative, logits, masks = self.model(self.normalise(batch))
        classes = len(spec.classes)
        every = logits[..., :classes].sigmoid().flatten(1)
        queries = relative.shape[1]
        scores, places = every.topk(min(spec.max_detections, queries * classes), dim=1)
        scores = torch.where(scores > getattr(self.model, "score_thresh", 0.0), scores, EMPTY)
        corners = box_convert(relative, "cxcywh", "xyxy").clamp(0, 1)
        boxes = taken(corners, places // classes) * batch.size
        best = Detections(boxes, scores, places % classes + 1, places // classes)
        boxes, labels, scores, image_of, query = found(best, batch)
        cells = torch.tensor([masks.shape[-1], masks.shape[-2]] * 2)
        number = image_of * queries + query
        rois = torch.cat((number[:, None].to(boxes.dtype), boxes / batch.ratio / batch.size * cells), dim=1)
        inside = cut_out(masks.flatten(0, 1)[:, None], rois, 1.0)
        return boxes, labels, scores, image_of, inside[:, 0].sigmoid()
