"""The architectures by name, and everything that decides what a network computes, in one value."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, maskrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d

from flawmask.errors import FlawmaskError
from flawmask.model.arch import Arch
from flawmask.model.roi_align import PyramidRoIAlign

Norm = Literal["batch", "frozen", "group"]

TORCHVISION_SIZE, TORCHVISION_MAX_SIZE = 800, 1333
TORCHVISION_ANCHORS = (32, 64, 128, 256, 512)


@dataclass(frozen=True)
class ModelSpec:
    """Everything but the weights: two networks of one spec and one state dict give the same results.

    Attributes:
        arch: the architecture's name.
        classes: the classes' names in the order of the network's labels 1, 2, ...; background is not among them.
        image_size: the shorter side, in pixels, to which an image is resized.
        norm: what normalises: BatchNorm that learns, BatchNorm with fixed statistics, or GroupNorm.
        norm_eps: the epsilon of frozen norms; None for the architecture's own.
        anchor_sizes: the five anchor sizes, in pixels of the resized image, smallest first.
        max_detections: the most instances that one image can have.
        proposals: the most regions of an image that the heads look at; twice as many in training.
    """

    arch: Arch
    classes: tuple[str, ...]
    image_size: int = TORCHVISION_SIZE
    norm: Norm = "frozen"
    norm_eps: float | None = None
    anchor_sizes: tuple[int, ...] = TORCHVISION_ANCHORS
    max_detections: int = 100
    proposals: int = 1000

    def __post_init__(self) -> None:
        if self.arch not in get_args(Arch):
            raise FlawmaskError(f"there is no architecture {self.arch}: there are {', '.join(get_args(Arch))}")
        if self.norm not in get_args(Norm) or not self.classes or len(self.anchor_sizes) != len(TORCHVISION_ANCHORS):
            raise FlawmaskError(f"{self} does not describe a network")

    @property
    def max_size(self) -> int:
        """The most, in pixels, that the longer side may have after resizing."""
        return round(self.image_size * TORCHVISION_MAX_SIZE / TORCHVISION_SIZE)


def anchors_for(image_size: int) -> tuple[int, ...]:
    """Return anchor sizes that cover the same share of a resized image as torchvision's do at 800 pixels."""
    return tuple(max(4, round(size * image_size / TORCHVISION_SIZE)) for size in TORCHVISION_ANCHORS)


def proposals_for(image_size: int) -> int:
    """Return how many regions the heads look at: torchvision's 1000 at 800 pixels, fewer on images with less room."""
    return max(200, round(1000 * image_size / TORCHVISION_SIZE))


def build(spec: ModelSpec) -> MaskRCNN:
    """Return the network that the spec describes, its weights drawn at random."""
    limits: dict[str, Any] = {
        "min_size": spec.image_size,
        "max_size": spec.max_size,
        "box_detections_per_img": spec.max_detections,
        "rpn_pre_nms_top_n_train": 2 * spec.proposals,
        "rpn_post_nms_top_n_train": 2 * spec.proposals,
        "rpn_pre_nms_top_n_test": spec.proposals,
        "rpn_post_nms_top_n_test": spec.proposals,
    }
    model: MaskRCNN = _BUILDERS[spec.arch](len(spec.classes) + 1, limits)
    ratios = model.rpn.anchor_generator.aspect_ratios
    model.rpn.anchor_generator = Float32Anchors(_anchors_per_level(spec.anchor_sizes, levels=len(ratios)), ratios)
    for name in ("box_roi_pool", "mask_roi_pool"):
        pool = getattr(model.roi_heads, name)
        setattr(model.roi_heads, name, PyramidRoIAlign(pool.featmap_names, list(pool.output_size), pool.sampling_ratio))
    _replace_norms(model, spec.norm, spec.norm_eps)
    return model


class Float32Anchors(AnchorGenerator):  # type: ignore[misc]  # torchvision has no types
    """Anchors in float32 whatever the features are in: bfloat16 cannot tell 286 from 287."""

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Return the anchors of each image, (N, 4) float32."""
        # Only their sizes, type and device are looked at.
        float32 = [features.new_empty((), dtype=torch.float32).expand(features.shape) for features in feature_maps]
        anchors: list[Tensor] = super().forward(image_list, float32)
        return anchors


def _anchors_per_level(sizes: tuple[int, ...], levels: int) -> tuple[tuple[int, ...], ...]:
    """Return one size per pyramid level, or all of them on each where there are fewer levels, as torchvision does."""
    return tuple((size,) for size in sizes) if levels == len(sizes) else (sizes,) * levels


def _resnet18(classes: int, limits: dict[str, Any]) -> MaskRCNN:
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )
    return MaskRCNN(backbone, classes, **limits)


def _resnet50(torchvision_builder: Callable[..., MaskRCNN], classes: int, limits: dict[str, Any]) -> MaskRCNN:
    return torchvision_builder(weights=None, weights_backbone=None, num_classes=classes, **limits)


def _mobilenet(classes: int, limits: dict[str, Any]) -> MaskRCNN:
    # MobileNetV3 was trained with this epsilon and momentum; torchvision's detectors drop them.
    norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.01)
    backbone = mobilenet_backbone(
        backbone_name="mobilenet_v3_large", weights=None, fpn=True, norm_layer=norm, trainable_layers=6
    )
    generator = AnchorGenerator((TORCHVISION_ANCHORS,) * 3, ((0.5, 1.0, 2.0),) * 3)
    return MaskRCNN(backbone, classes, rpn_anchor_generator=generator, **limits)


_BUILDERS: dict[str, Callable[[int, dict[str, Any]], MaskRCNN]] = {
    "maskrcnn_resnet50_fpn": partial(_resnet50, maskrcnn_resnet50_fpn),
    "maskrcnn_resnet50_fpn_v2": partial(_resnet50, maskrcnn_resnet50_fpn_v2),
    "maskrcnn_resnet18_fpn": _resnet18,
    "maskrcnn_mobilenet_v3_large_fpn": _mobilenet,
}


def _replace_norms(module: nn.Module, norm: Norm, eps: float | None) -> None:
    """Replace every BatchNorm2d under `module`.

    In a small batch, BatchNorm's statistics are noisy: pretrained ones are best frozen, and GroupNorm does not look
    at the batch at all (Wu and He, ECCV 2018).
    """
    if norm == "batch":
        return
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            channels = child.num_features
            fresh = (
                FrozenBatchNorm2d(channels, eps=child.eps if eps is None else eps)
                if norm == "frozen"
                else nn.GroupNorm(math.gcd(32, channels), channels)
            )
            setattr(module, name, fresh)
        else:
            _replace_norms(child, norm, eps)


def freeze(model: MaskRCNN, trainable_layers: int) -> None:
    """Leave only the last `trainable_layers` stages of the backbone's body trainable; 5 leaves all, 0 none.

    Args:
        model: a network that `build` made.
        trainable_layers: 0 to 5, counted from the stage nearest to the heads, as torchvision counts them.
    """
    stages = _stages(model.backbone.body)
    for stage in stages[: len(stages) - trainable_layers]:
        for module in stage:
            module.requires_grad_(False)


def _stages(body: nn.Module) -> list[list[nn.Module]]:
    """Return the backbone's five stages, the one nearest to the image first, each as a list of modules."""
    children = dict(body.named_children())
    if "layer1" in children:
        return [[children["conv1"], children["bn1"]], *([children[f"layer{number}"]] for number in range(1, 5))]
    # MobileNetV3: a stage begins where the resolution halves; a block that does so says it in `_is_cn`.
    blocks = list(children.values())
    starts = [0, *(place for place, block in enumerate(blocks) if getattr(block, "_is_cn", False))]
    return [blocks[start:end] for start, end in zip(starts, [*starts[1:], len(blocks)], strict=True)]


def count_parameters(model: nn.Module) -> int:
    """Return how many numbers the network learns."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def to_device(model: MaskRCNN, device: torch.device) -> MaskRCNN:
    """Return the network on the device, its convolutions laid out channels-last, which is faster on CPU and CUDA."""
    return model.to(device, memory_format=torch.channels_last)
