"""The graph of YOLO11. It computes what `yolo.infer` computes, with operators of any runtime."""

from typing import Any

import torch
from torch import Tensor, nn

from flawmask.model.graph import batch_of, best_of, clipped, cut_out, found
from flawmask.model.spec import ModelSpec

MASK_RATIO = 4
"""Pixels of the image per cell of the prototypes, along each side."""


class Graph(nn.Module):
    """A YOLO11. See `build.Detector.graph` for its inputs and outputs."""

    def __init__(self, model: Any, spec: ModelSpec, grey: float, iou: float) -> None:
        """Take the network, its spec, the colour of padding, and the IoU above which boxes are suppressed."""
        super().__init__()
        self.spec, self.model, self.grey, self.iou = spec, model, grey, iou
        model.model[-1].dynamic = True  # its grid then follows from the image, and not from the last one's size

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the instances on the images, (B, H, W, 3) uint8."""
        spec = self.spec
        batch = batch_of(images, spec)
        outputs, _ = self.model(batch.pixels + (1 - batch.inside) * self.grey)
        outputs, prototypes = outputs if spec.has_masks else (outputs, None)
        rows, end = outputs.transpose(1, 2), 4 + len(spec.classes)
        centres, sides, each, coefficients = rows[..., :2], rows[..., 2:4], rows[..., 4:end], rows[..., end:]
        candidates = torch.cat((centres - sides / 2, centres + sides / 2), dim=2)
        score, label = each.max(dim=2)
        floor = getattr(self.model, "score_thresh", 0.0)
        best = best_of(candidates, score, label, len(spec.classes), self.iou, floor, spec.max_detections)
        best = best._replace(boxes=clipped(best.boxes, batch), labels=best.labels + 1)
        boxes, labels, scores, image_of, chosen = found(best, batch)
        if prototypes is None:
            return boxes, labels, scores, image_of
        # A mask is a weighted sum of prototypes, and RoIAlign is linear. So the prototypes are cut out first.
        places = torch.cat((image_of[:, None].to(boxes.dtype), boxes / batch.ratio), dim=1)
        inside = cut_out(prototypes, places, 1 / MASK_RATIO)
        masks = (coefficients[image_of, chosen][:, :, None, None] * inside).sum(1)
        return boxes, labels, scores, image_of, masks.sigmoid()
