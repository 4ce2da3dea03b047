"""A user's own kind of network, in one module: it predicts a score and a box for each cell of an image.

Its record is made like Flawmask's own records. Tests add it to them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flawmask.model import compute
from flawmask.model.architecture import Architecture, FixedSquare
from flawmask.model.build import Detector
from flawmask.model.compute import Layers
from flawmask.model.graph import EMPTY, Detections, batch_of, found
from flawmask.model.layers import replace_norms, to_original
from flawmask.model.spec import ModelSpec
from flawmask.model.targets import Target

SIDE, CELL = 64, 16
"""The sides of a resized image and of a cell of it, in pixels."""


def kind() -> Detector:
    import toy_network

    return toy_network


TOY = Architecture(
    name="toy",
    kind=kind,
    has_masks=False,
    loss_names=("loss_score", "loss_box"),
    size=FixedSquare(SIDE),
    has_known_counts=True,
)


def build(spec: ModelSpec) -> nn.Module:
    blocks = []
    for inside, outside, stride in ((3, 8, 1), (8, 8, 2), (8, 16, 2), (16, 16, 2), (16, 32, 2)):
        convolution = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        blocks.append(nn.Sequential(convolution, nn.BatchNorm2d(outside), nn.ReLU()))
    model = nn.Module()
    model.body, model.head = nn.Sequential(*blocks), nn.Conv2d(32, len(spec.classes) + 4, 1)
    replace_norms(model, spec.norm, spec.norm_eps)
    return model


def network_input(_: Any, images: list[Tensor]) -> Tensor:
    return torch.stack([image.float() / 255 for image in images])


def _forward(model: Any, images: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return (B, cells, classes) logits, and (B, cells, 4) boxes as two corners in pixels, in any order."""
    cells = model.head(model.body(network_input(model, images))).flatten(2).transpose(1, 2)
    return cells[..., :-4], SIDE * cells[..., -4:].sigmoid()


def losses(model: Any, images: list[Tensor], targets: list[Target], _: int | None) -> dict[str, Tensor]:
    logits, boxes = _forward(model, images)
    classes, box_loss = torch.zeros_like(logits), boxes.new_zeros(())
    for at, target in enumerate(targets):
        column, row = ((target["boxes"][:, :2] + target["boxes"][:, 2:]) / 2 / CELL).long().unbind(1)
        cell = row * (SIDE // CELL) + column
        classes[at, cell, target["labels"] - 1] = 1
        box_loss = box_loss + (boxes[at, cell] - target["boxes"]).abs().sum() / SIDE
    instances = sum(len(target["labels"]) for target in targets)
    score = F.binary_cross_entropy_with_logits(logits, classes, reduction="sum")
    return {"loss_score": score / len(images), "loss_box": box_loss / max(1, instances)}


def counts(_: Any, targets: list[Target]) -> dict[str, float]:
    return {"loss_score": float(len(targets)), "loss_box": float(sum(len(target["labels"]) for target in targets))}


def train_in(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    compute.train_in(model, Layers([], [model.body]), device, dtype)


def infer_in(model: Any, _: torch.device, dtype: torch.dtype) -> None:
    compute.infer_in(model, Layers([], [model.body]), dtype)


def infer(model: Any, images: list[Tensor], sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
    predicted = []
    for logits, boxes in zip(*_forward(model, images), strict=True):
        scores, labels = logits.sigmoid().max(dim=1)
        above = scores > getattr(model, "score_thresh", 0.0)
        corners = torch.minimum(boxes[:, :2], boxes[:, 2:]), torch.maximum(boxes[:, :2], boxes[:, 2:])
        predicted.append({"boxes": torch.cat(corners, 1)[above], "labels": labels[above] + 1, "scores": scores[above]})
    return to_original(predicted, [(SIDE, SIDE)] * len(images), sizes)


class Graph(nn.Module):
    def __init__(self, model: Any, spec: ModelSpec) -> None:
        super().__init__()
        self.model, self.spec = model, spec

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        batch = batch_of(images, self.spec)
        cells = self.model.head(self.model.body(batch.pixels)).flatten(2).transpose(1, 2)
        scores, labels = cells[..., :-4].sigmoid().max(dim=2)
        ends = SIDE * cells[..., -4:].sigmoid()
        corners = torch.minimum(ends[..., :2], ends[..., 2:]), torch.maximum(ends[..., :2], ends[..., 2:])
        scores = torch.where(scores > getattr(self.model, "score_thresh", 0.0), scores, EMPTY)
        return found(Detections(torch.cat(corners, 2), scores, labels + 1, labels), batch)[:-1]


def graph(model: Any, spec: ModelSpec) -> nn.Module:
    return Graph(model, spec)


def stages(model: Any) -> list[list[nn.Module]]:
    return [[block] for block in model.body]
