"""Small random networks of every kind that give some high scores, and images for them."""

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
    *("maskrcnn_resnet18_fpn", "fasterrcnn_efficientnet_lite0_fpn", "retinanet_resnet50_fpn", "fcos_resnet50_fpn"),
    *("ssd300_vgg16", "ssdlite320_mobilenet_v3_large", "yolo11n", "yolo11n-seg", "rfdetr_seg_nano"),
)
"""One architecture of each kind. Mask R-CNN with a ResNet represents all ResNets. Faster R-CNN with an
EfficientNet-Lite represents R-CNNs without masks, and depthwise convolutions. Larger networks differ only in width and
depth."""


def built(archs: Iterable[Arch], *marks: pytest.MarkDecorator) -> list[Any]:
    """Return architectures as parameters of a test that builds them."""
    transformers = [record.name for record in rfdetr_archs.RECORDS]
    return [pytest.param(arch, marks=[*marks, needs_rfdetr] if arch in transformers else marks) for arch in archs]


SLOW: tuple[Arch, ...] = ("ssd300_vgg16", "rfdetr_seg_nano")
"""Architectures that take as long as all others together. Instead, `make test` has another SSD and RF-DETR's own tests.
`make test-services` has all."""

LARGER = tuple(arch for arch in ARCHITECTURES if arch not in KIND_BY_KIND)
_DEEPER = tuple(arch for arch in LARGER if "lite1" in arch or "lite2" in arch)
BUILDABLE = built(ARCHITECTURES)
OTHERS = [*built(arch for arch in LARGER if arch not in _DEEPER), *built(_DEEPER, pytest.mark.services)]
KINDS = [*built(arch for arch in KIND_BY_KIND if arch not in SLOW), *built(SLOW, pytest.mark.services)]
KINDS_AND_MORE = [*KINDS, *built(LARGER, pytest.mark.services)]
"""Test parameters: all architectures; those that represent no kind; one of each kind, for properties of the kind; and
one of each kind, with all others in `make test-services`."""

REGIONS: tuple[Arch, ...] = tuple(arch for arch in ARCHITECTURES if architecture(arch).kind is rcnn_archs.kind)
OUTLINING_REGIONS: tuple[Arch, ...] = tuple(arch for arch in REGIONS if architecture(arch).has_masks)
"""All R-CNNs; and only Mask R-CNNs."""

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
    """The output of a network for images of one size."""
    return TorchBackend(network, spec).infer([backend.resized(pixels, spec) for pixels in batch])


def network_of(predictor: Predictor) -> Any:
    """The network of a predictor."""
    assert isinstance(predictor.backend, TorchBackend)
    return predictor.backend.network


def tensors_of(found: RawDetections) -> dict[str, Tensor]:
    """The same as PyTorch's tensors by name, to be compared."""
    parts = {"boxes": found.boxes, "labels": found.labels, "scores": found.scores, "masks": found.masks}
    return {name: torch.from_numpy(part) for name, part in parts.items() if part is not None}


def detect(network: Any, spec: ModelSpec, pixels: npt.NDArray[np.uint8]) -> Prediction:
    """The detections of a network on an image."""
    return backend.detect(TorchBackend(network, spec), pixels)


def spec_of(arch: Arch, **changes: Any) -> ModelSpec:
    """SPEC for another architecture, as small as possible."""
    size = architecture(arch).image_size(SPEC.image_size)
    return replace(SPEC, arch=arch, image_size=size, anchor_sizes=anchors_for(size), **changes)


def network(spec: ModelSpec = SPEC) -> Any:
    """A random network with low and high scores. Tests must not change it."""
    return _network(spec, is_in_place())


@cache
def _network(spec: ModelSpec, _: bool) -> Any:
    """Build it once for each architecture, and once more where the small network replaces one."""
    return random_network(spec)


def random_network(spec: ModelSpec) -> Any:
    """The same network as a copy that tests may change."""
    torch.manual_seed(4)
    model = build(spec).eval()
    wake(model, spec)
    return model


@torch.no_grad()
def wake(model: Any, spec: ModelSpec) -> None:
    """Change a new network, of Flawmask or of torchvision, so that it gives some high scores."""
    if spec.arch in REGIONS:
        _wake_regions(model, spec)
    elif spec.architecture.kind is yolo_archs.kind:
        _wake_yolo(model, spec)
    elif spec.architecture.kind is rfdetr_archs.kind:
        model.class_embed.weight *= 5
        model.class_embed.bias.fill_(-1)
    elif spec.arch == "ssd300_vgg16":  # without a norm it is sure of everything
        for scores in model.head.classification_head.module_list:
            scores.weight *= 0.1
    elif not spec.arch.startswith("ssd"):
        head, boxes = model.head.classification_head.cls_logits, model.head.regression_head
        head.weight *= 40
        head.bias.fill_(-2)
        boxes.bbox_reg.weight *= 20
        if spec.arch.startswith("fcos"):
            boxes.bbox_reg.bias.fill_(2)  # a box about each place; less is none
            boxes.bbox_ctrness.weight *= 30


def _wake_regions(model: Any, spec: ModelSpec) -> None:
    model.rpn.head.bbox_pred.weight *= 10
    model.roi_heads.box_predictor.bbox_pred.weight *= 10
    if spec.has_masks:
        model.roi_heads.mask_predictor.mask_fcn_logits.weight *= 3
    scores = model.roi_heads.box_predictor.cls_score.weight
    scores *= 10
    if is_in_place() and spec.arch == STANDS_IN_FOR:  # what all of its few features have in common would decide
        scores -= scores.mean(dim=1, keepdim=True)
    if len(spec.classes) > 2:  # background and good stand back
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
    """An image of random patches: fine noise would look like one grey to a network."""
    patches = np.random.default_rng(seed).integers(0, 256, (-(-height // 16), -(-width // 16), 3), dtype=np.uint8)
    return patches.repeat(16, axis=0).repeat(16, axis=1)[:height, :width]


def resized(spec: ModelSpec, *originals: npt.NDArray[np.uint8]) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """The arguments of a detector's `infer`: images at the size of the network's input, and their original sizes."""
    sizes = [(one.shape[0], one.shape[1]) for one in originals]
    small = [torch.from_numpy(resize(one, spec.resized(*size))) for one, size in zip(originals, sizes, strict=True)]
    return [one.permute(2, 0, 1) for one in small], sizes


def torchvision_finds(model: Any, spec: ModelSpec, pixels: npt.NDArray[np.uint8]) -> dict[str, Tensor]:
    """The detections of torchvision's own forward. The image is resized as in Flawmask, which rounds to integers;
    torchvision's transform does not round."""
    seen = model.transform.normalize(as_tensor(resize(pixels, spec.resized(*pixels.shape[:2]))))
    with torch.inference_mode(), patch.object(model.transform, "resize", lambda _, target: (seen, target)):
        (found,) = model.eval()([as_tensor(pixels)])
    return dict(found)


def as_tensor(pixels: npt.NDArray[np.uint8]) -> Tensor:
    """(height, width, 3) pixels as torchvision's networks take them: (3, height, width) float32, 0 to 1."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255
