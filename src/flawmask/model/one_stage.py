"""One-stage detectors, which predict boxes without masks: torchvision's RetinaNet, FCOS, SSD and SSDlite.

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
from flawmask.model.one_stage_graph import Graph
from flawmask.model.spec import ModelSpec
from flawmask.model.targets import Target


def build(spec: ModelSpec) -> Any:
    """Return the network that the spec describes, with random weights."""
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
    """A BatchNorm that accepts a single value per channel, as in SSDlite's last level for a single image.

    A single value has no variance. It is normalised by the running statistics.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == self.num_features:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class _Counting:
    """Stores the divisor of the losses of the last pass: the number of anchors or places matched to an instance."""

    positives: Tensor | int = 0

    def compute_loss(self, targets: Any, outputs: Any, anchors: Any, matched: list[Tensor]) -> dict[str, Tensor]:
        """Return the losses as torchvision computes them.

        Args:
            targets: of each image.
            outputs: of the heads.
            anchors: of each image.
            matched: for each image (A,) int64, the instance of each anchor, -1 for none.
        """
        self.positives = torch.stack([(one >= 0).sum() for one in matched]).sum()
        losses: dict[str, Tensor] = super().compute_loss(targets, outputs, anchors, matched)  # type: ignore[misc]
        return losses


class _SSD(_Counting, SSD):  # type: ignore[misc]  # torchvision has no types
    pass


class _FCOSHead(_Counting, FCOSHead):  # type: ignore[misc]
    pass


def losses(model: Any, images: list[Tensor], targets: list[Target], _: int | None) -> dict[str, Tensor]:
    """Return the losses by torchvision's names, each a scalar float32, as in the papers above.

    RetinaNet averages them over the images. The others average over all anchors or places that are matched to an
    instance. SSD learns nothing from an image without instances.

    Args:
        model: in training mode.
        images: (3, H, W) uint8, resized for the network, on its device.
        targets: one for each image.
    """
    torchvision_targets = [{name: target[name] for name in ("boxes", "labels")} for target in targets]
    by_name: dict[str, Tensor] = model([image.float() / 255 for image in images], torchvision_targets)
    return {name: loss.float() for name, loss in by_name.items()}


def counts(model: Any, targets: list[Target]) -> dict[str, float]:
    """Return the divisor of each loss in the last pass: the images, or the anchors or places on an instance."""
    if isinstance(model, FCOS | SSD):
        owner: _Counting = model.head if isinstance(model, FCOS) else model
        return dict.fromkeys(model.flawmask.architecture.loss_names, float(owner.positives))
    return dict.fromkeys(model.flawmask.architecture.loss_names, float(len(targets)))


network_input = unnormalised


def train_in(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Prepare the layers for training in `dtype`. The last layers, boxes and losses stay float32."""
    compute.train_in(model, _layers(model, device), device, dtype)


def infer_in(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Convert the layers to `dtype` for inference. The last layers and boxes stay float32.

    The network cannot be trained any more.
    """
    compute.infer_in(model, _layers(model, device), dtype)


def _layers(model: Any, device: torch.device) -> Layers:
    """Return the layers that may compute in lower precision: all except those that output scores and boxes, and those
    that would be slower."""
    heads = (model.head.classification_head, model.head.regression_head)
    if not isinstance(model, SSD):
        return Layers([], [model.backbone, *(head.conv for head in heads)])
    # At each level, a head of SSD has one layer, and a head of SSDlite has two.
    levels = [level for head in heads for level in head.module_list]
    backbone = [] if compute.is_slow(model.backbone, device) else [model.backbone]
    return Layers([], [*backbone, *(level[0] for level in levels if isinstance(level, nn.Sequential))])


def infer(model: Any, images: list[Tensor], sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
    """Return the instances predicted on each image: `boxes` (N, 4) float32, x1 y1 x2 y2 in pixels of the original,
    `labels` (N,) int64, `scores` (N,) float32, 0 to 1.

    Args:
        model: in evaluation mode.
        images: (3, H, W) uint8, resized for the network, which pads them to one size.
        sizes: height and width of each original.
    """
    outputs: list[dict[str, Tensor]] = model([image.float() / 255 for image in images])
    # RetinaNet and FCOS also score label 0, which no instance has.
    predicted = [{name: tensor[one["labels"] > 0] for name, tensor in one.items()} for one in outputs]
    return to_original(predicted, [(image.shape[1], image.shape[2]) for image in images], sizes)


def graph(model: Any, spec: ModelSpec) -> Graph:
    """Return the network as it is exported, see `build.Detector.graph`."""
    return Graph(model, spec)


def stages(model: Any) -> list[list[nn.Module]]:
    """Return the stages of the backbone, the one nearest to the image first, each as a list of modules."""
    if hasattr(model.backbone, "body"):
        body = dict(model.backbone.body.named_children())
        return [[body["conv1"], body["bn1"]], *([body[f"layer{number}"]] for number in range(1, 5))]
    # SSD's backbone has two parts. A stage begins at each layer that halves the resolution, and at the second part.
    features = model.backbone.features
    parts = [[*features], [*model.backbone.extra[0]]] if _is_vgg(model) else [[*part] for part in features]
    blocks = [*parts[0], *parts[1]]
    halving = {at for at, one in enumerate(blocks) if isinstance(one, nn.MaxPool2d) or getattr(one, "_is_cn", False)}
    starts = sorted({0, len(parts[0]), *halving})
    return [blocks[start:end] for start, end in zip(starts, [*starts[1:], len(blocks)], strict=True)]


def _is_vgg(model: Any) -> bool:
    return any(isinstance(block, nn.MaxPool2d) for block in model.backbone.features)
