"""Small random networks of every kind with some high scores, and images for them."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from typing import Any, get_args
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import pytest
import torch
from small_network import STANDS_IN_FOR, is_in_place
from torch import Tensor

from flawmask.images import resize
from flawmask.inference import backend
from flawmask.inference.predictor import Predictor
from flawmask.inference.torch_backend import TorchBackend
from flawmask.model import rcnn_archs, rfdetr_archs, yolo_archs
from flawmask.model.arch import Arch, architecture
from flawmask.model.build import build
from flawmask.model.spec import ModelSpec, anchors_for
from flawmask.prediction import Prediction, RawDetections

needs_rfdetr = pytest.mark.skipif(
    find_spec("rfdetr") is None, reason='rfdetr is not installed: pip install "flawmask[rfdetr]"'
)

ARCHITECTURES: tuple[Arch, ...] = get_args(Arch)
KIND_BY_KIND: tuple[Arch, ...] = (
    *("maskrcnn_resnet18_fpn", "maskrcnn_efficientnet_lite0_fpn", "fasterrcnn_efficientnet_lite0_fpn"),
    *("retinanet_resnet50_fpn", "fcos_resnet50_fpn", "ssd300_vgg16", "ssdlite320_mobilenet_v3_large"),
    *("yolo11n", "yolo11n-seg", "rfdetr_seg_nano"),
)
"""One architecture of each kind. Mask R-CNN with a ResNet represents all ResNets. Mask R-CNN with EfficientNet-Lite has
the branch for pixels. Faster R-CNN with EfficientNet-Lite represents R-CNNs without masks and backbones of depthwise
convolutions. Larger networks differ only in width and depth."""


def built(archs: Iterable[Arch], *marks: pytest.MarkDecorator) -> list[Any]:
    """Return architectures as parameters of a test that builds them."""
    transformers = [record.name for record in rfdetr_archs.RECORDS]
    return [pytest.param(arch, marks=[*marks, needs_rfdetr] if arch in transformers else marks) for arch in archs]


SLOW: tuple[Arch, ...] = ("ssd300_vgg16", "rfdetr_seg_nano")
"""These take as long as all others together, so they run in `make test-services` only. `make test` has another SSD and
RF-DETR's own tests instead."""

LARGER = tuple(arch for arch in ARCHITECTURES if arch not in KIND_BY_KIND)
_DEEPER = tuple(arch for arch in LARGER if "lite1" in arch or "lite2" in arch)
BUILDABLE = built(ARCHITECTURES)
OTHERS = [*built(arch for arch in LARGER if arch not in _DEEPER), *built(_DEEPER, pytest.mark.services)]
KINDS = [*built(arch for arch in KIND_BY_KIND if arch not in SLOW), *built(SLOW, pytest.mark.services)]
KINDS_AND_MORE = [*KINDS, *built(LARGER, pytest.mark.services)]
"""Parameters of tests. BUILDABLE: all architectures. OTHERS: those that represent no kind. KINDS: one of each kind, for
properties of a kind. KINDS_AND_MORE: one of each kind, and all others in `make test-services`."""

REGIONS: tuple[Arch, ...] = tuple(arch for arch in ARCHITECTURES if architecture(arch).kind is rcnn_archs.kind)
MASK_REGIONS: tuple[Arch, ...] = tuple(arch for arch in REGIONS if architecture(arch).has_masks)
"""REGIONS: Mask R-CNN and Faster R-CNN. MASK_REGIONS: Mask R-CNN only."""

SPEC = ModelSpec(
    "maskrcnn_resnet18_fpn",
    ("good", "crack", "scratch"),
    image_size=64,
    norm="group",
    anchor_sizes=anchors_for(64),
    max_detections=20,
    proposals=50,
)


def infer(network: Any, spec: ModelSpec, batch: Sequence[npt.NDArray[np.uint8]]) -> list[RawDetections]:
    """Return a network's raw outputs for images of one size."""
    return TorchBackend(network, spec).infer([backend.resized(pixels, spec) for pixels in batch])


def network_of(predictor: Predictor) -> Any:
    """Return the network of a predictor."""
    assert isinstance(predictor.backend, TorchBackend)
    return predictor.backend.network


def tensors_of(raw: RawDetections) -> dict[str, Tensor]:
    """Return the arrays as PyTorch tensors by name, for comparisons."""
    parts = {"boxes": raw.boxes, "labels": raw.labels, "scores": raw.scores, "masks": raw.masks}
    return {name: torch.from_numpy(part) for name, part in parts.items() if part is not None}


def detect(network: Any, spec: ModelSpec, pixels: npt.NDArray[np.uint8]) -> Prediction:
    """Return a network's prediction for an image."""
    return backend.detect(TorchBackend(network, spec), pixels)


def spec_of(arch: Arch, **changes: Any) -> ModelSpec:
    """Return SPEC for another architecture, with the smallest image size that it allows."""
    size = architecture(arch).image_size(SPEC.image_size)
    made = replace(SPEC, arch=arch, image_size=size, anchor_sizes=anchors_for(size))
    return replace(made, semantic_head=architecture(arch).has_semantic_head, **changes)


def network(spec: ModelSpec = SPEC) -> Any:
    """Return a random network that predicts defects of all scores, some high. It is cached and must not be changed."""
    return _network(spec, is_in_place())


@cache
def _network(spec: ModelSpec, _: bool) -> Any:
    """Cache one network for each spec, and one more if the small network replaces the real one."""
    return random_network(spec)


def random_network(spec: ModelSpec) -> Any:
    """Return such a network that may be changed."""
    torch.manual_seed(4)
    model = build(spec).eval()
    wake(model, spec)
    return model


@torch.no_grad()
def wake(model: Any, spec: ModelSpec) -> None:
    """Change the weights of a new network of Flawmask or torchvision so that some of its scores are high."""
    if spec.arch in REGIONS:
        _wake_regions(model, spec)
    elif spec.architecture.kind is yolo_archs.kind:
        _wake_yolo(model, spec)
    elif spec.architecture.kind is rfdetr_archs.kind:
        model.class_embed.weight *= 5
        model.class_embed.bias.fill_(-1)
    elif spec.arch == "ssd300_vgg16":  # it has no norms, so all its scores would be high
        for scores in model.head.classification_head.module_list:
            scores.weight *= 0.1
    elif not spec.arch.startswith("ssd"):
        head, boxes = model.head.classification_head.cls_logits, model.head.regression_head
        head.weight *= 40
        head.bias.fill_(-2)
        boxes.bbox_reg.weight *= 20
        if spec.arch.startswith("fcos"):
            boxes.bbox_reg.bias.fill_(2)  # so that the box around each place is not empty
            boxes.bbox_ctrness.weight *= 30


def _wake_regions(model: Any, spec: ModelSpec) -> None:
    model.rpn.head.bbox_pred.weight *= 10
    model.roi_heads.box_predictor.bbox_pred.weight *= 10
    if spec.has_masks:
        model.roi_heads.mask_predictor.mask_fcn_logits.weight *= 3
    scores = model.roi_heads.box_predictor.cls_score.weight
    scores *= 10
    if is_in_place() and spec.arch == STANDS_IN_FOR:  # otherwise the common part of its few features would decide
        scores -= scores.mean(dim=1, keepdim=True)
    if len(spec.classes) > 2:  # lower the scores of background and good
        scores[0], scores[1] = scores[1:].mean(dim=0), scores[2:].mean(dim=0)


def _wake_yolo(model: Any, spec: ModelSpec) -> None:
    head = model.model[-1]
    for scores in head.cv3:
        scores[-1].weight *= 12
        scores[-1].bias.fill_(-2)
    for boxes in head.cv2:
        boxes[-1].weight *= 5
    for coefficients in head.cv4 if spec.has_masks else ():
        coefficients[-1].weight *= 5


def patchwork(height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Return an image of random patches. In fine noise, a network would see only one grey."""
    patches = np.random.default_rng(seed).integers(0, 256, (-(-height // 16), -(-width // 16), 3), dtype=np.uint8)
    return patches.repeat(16, axis=0).repeat(16, axis=1)[:height, :width]


def resized(spec: ModelSpec, *originals: npt.NDArray[np.uint8]) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """Return the resized images that a detector's `infer` takes, and the original sizes."""
    sizes = [(one.shape[0], one.shape[1]) for one in originals]
    small = [torch.from_numpy(resize(one, spec.resized(*size))) for one, size in zip(originals, sizes, strict=True)]
    return [one.permute(2, 0, 1) for one in small], sizes


def torchvision_finds(model: Any, spec: ModelSpec, pixels: npt.NDArray[np.uint8]) -> dict[str, Tensor]:
    """Return the predictions of torchvision's own forward for an image that Flawmask has resized.

    Flawmask rounds resized images to whole grey levels; torchvision's transform would not.
    """
    image = model.transform.normalize(as_tensor(resize(pixels, spec.resized(*pixels.shape[:2]))))
    with torch.inference_mode(), patch.object(model.transform, "resize", lambda _, target: (image, target)):
        (predicted,) = model.eval()([as_tensor(pixels)])
    return dict(predicted)


def as_tensor(pixels: npt.NDArray[np.uint8]) -> Tensor:
    """Convert (height, width, 3) pixels to the input of torchvision's networks: (3, height, width) float32, 0 to 1."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255
