"""Detectors that find boxes in one pass and outline nothing: RetinaNet, FCOS, SSD and SSDlite, as torchvision has them.

Lin et al., "Focal loss for dense object detection", ICCV 2017; Tian et al., "FCOS", ICCV 2019; Liu et al., "SSD: Single
shot multibox detector", ECCV 2016; Howard et al., "Searching for MobileNetV3", ICCV 2019.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.fcos import FCOS, FCOSHead
from torchvision.models.detection.ssd import SSD

from flawmask.model import compute
from flawmask.model.compute import Layers
from flawmask.model.layers import replace_norms, skip_resize, to_original, unnormalised
from flawmask.model.spec import ModelSpec
from flawmask.model.targets import Target


def build(spec: ModelSpec) -> Any:
    """Return the network that the spec describes, its weights drawn at random."""
    model: Any = spec.architecture.network(spec)
    model.detections_per_img = spec.max_detections
    model.flawmask = spec
    skip_resize(model)
    replace_norms(model, spec.norm, spec.norm_eps)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = _BatchNorm2d
    if isinstance(model, FCOS):
        model.head.__class__ = _FCOSHead
    elif isinstance(model, SSD):
        model.__class__ = _SSD
    return model


class _BatchNorm2d(nn.BatchNorm2d):
    """A BatchNorm that takes a single value, such as SSDlite's last level of a single image. That has no spread: it is
    normalised by the statistics so far."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == self.num_features:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class _Counting:
    """Remembers what the losses of the last pass are divided by: how many anchors, or places, belong to an instance."""

    on_instances: Tensor | int = 0

    def compute_loss(self, targets: Any, found: Any, anchors: Any, matched: list[Tensor]) -> dict[str, Tensor]:
        """Return the losses as torchvision computes them.

        Args:
            targets: of each image.
            found: what the heads give.
            anchors: of each image.
            matched: which instance each anchor belongs to, (A,) int64, -1 for none, of each image.
        """
        self.on_instances = torch.stack([(one >= 0).sum() for one in matched]).sum()
        losses: dict[str, Tensor] = super().compute_loss(targets, found, anchors, matched)  # type: ignore[misc]
        return losses


class _SSD(_Counting, SSD):  # type: ignore[misc]  # torchvision has no types
    pass


class _FCOSHead(_Counting, FCOSHead):  # type: ignore[misc]
    pass


def losses(model: Any, images: list[Tensor], targets: list[Target], _: int | None) -> dict[str, Tensor]:
    """Return the losses by torchvision's names, each a scalar float32: of RetinaNet averaged over the images, of the
    others over all anchors or places that belong to an instance. SSD learns nothing from an image without any. They are
    those of the papers named above, as torchvision computes them.

    Args:
        model: in training mode.
        images: (3, H, W) uint8, at the size at which the network sees them, on its device.
        targets: one each.
    """
    wanted = [{name: target[name] for name in ("boxes", "labels")} for target in targets]
    found: dict[str, Tensor] = model([image.float() / 255 for image in images], wanted)
    return {name: loss.float() for name, loss in found.items()}


def counts(model: Any, targets: list[Target]) -> dict[str, float]:
    """Return how many each loss of the last pass was divided by: images, or anchors and places on an instance."""
    if isinstance(model, FCOS | SSD):
        owner: _Counting = model.head if isinstance(model, FCOS) else model
        return dict.fromkeys(model.flawmask.architecture.loss_names, float(owner.on_instances))
    return dict.fromkeys(model.flawmask.architecture.loss_names, float(len(targets)))


network_input = unnormalised


def train_in(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Let the network's layers train in `dtype`; the last ones, boxes and losses stay float32."""
    compute.train_in(model, _layers(model, device), device, dtype)


def infer_in(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Let the network's layers hold `dtype`; the last ones and boxes stay float32. It cannot be trained any more."""
    compute.infer_in(model, _layers(model, device), dtype)


def _layers(model: Any, device: torch.device) -> Layers:
    """Return the layers that compute in lower precision: all but those that give scores and boxes, and those that would
    be slower for it."""
    heads = (model.head.classification_head, model.head.regression_head)
    if not isinstance(model, SSD):
        return Layers([], [model.backbone, *(head.conv for head in heads)])
    # SSD has one layer at each level, SSDlite has two.
    levels = [level for head in heads for level in head.module_list]
    backbone = [] if compute.is_slow(model.backbone, device) else [model.backbone]
    return Layers([], [*backbone, *(level[0] for level in levels if isinstance(level, nn.Sequential))])


def infer(model: Any, images: list[Tensor], sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
    """Return what is found on each image: `boxes` (N, 4) float32, x1 y1 x2 y2 in pixels of the original, `labels` (N,)
    int64, `scores` (N,) float32, 0 to 1.

    Args:
        model: in evaluation mode.
        images: (3, H, W) uint8, at the size at which the network sees them, padded to one size by it.
        sizes: height and width of each original.
    """
    seen: list[dict[str, Tensor]] = model([image.float() / 255 for image in images])
    # RetinaNet and FCOS have a score for label 0 too, which no instance has.
    found = [{name: tensor[one["labels"] > 0] for name, tensor in one.items()} for one in seen]
    return to_original(found, [(image.shape[1], image.shape[2]) for image in images], sizes)


def stages(model: Any) -> list[list[nn.Module]]:
    """Return the backbone's stages, the one nearest to the image first, each as a list of modules."""
    if hasattr(model.backbone, "body"):
        body = dict(model.backbone.body.named_children())
        return [[body["conv1"], body["bn1"]], *([body[f"layer{number}"]] for number in range(1, 5))]
    # SSD's: a stage begins where the resolution halves, as it does where the second of its two parts begins.
    features = model.backbone.features
    parts = [[*features], [*model.backbone.extra[0]]] if _is_vgg(model) else [[*part] for part in features]
    blocks = [*parts[0], *parts[1]]
    halving = {at for at, one in enumerate(blocks) if isinstance(one, nn.MaxPool2d) or getattr(one, "_is_cn", False)}
    starts = sorted({0, len(parts[0]), *halving})
    return [blocks[start:end] for start, end in zip(starts, [*starts[1:], len(blocks)], strict=True)]


def _is_vgg(model: Any) -> bool:
    return any(isinstance(block, nn.MaxPool2d) for block in model.backbone.features)
