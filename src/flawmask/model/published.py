"""Pretrained weights that others have published: where they lie, what they want, what their layers are called."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torchvision.models import (
    MobileNet_V3_Large_Weights,
    ResNet18_Weights,
    ResNet50_Weights,
    VGG16_Weights,
    WeightsEnum,
)
from torchvision.models.detection import (
    FasterRCNN_MobileNet_V3_Large_FPN_Weights,
    FasterRCNN_ResNet50_FPN_Weights,
    FCOS_ResNet50_FPN_Weights,
    MaskRCNN_ResNet50_FPN_V2_Weights,
    MaskRCNN_ResNet50_FPN_Weights,
    RetinaNet_ResNet50_FPN_Weights,
    SSD300_VGG16_Weights,
    SSDLite320_MobileNet_V3_Large_Weights,
)

Rules = tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...]

COCO: dict[str, WeightsEnum] = {
    "maskrcnn_resnet50_fpn": MaskRCNN_ResNet50_FPN_Weights.COCO_V1,
    "maskrcnn_resnet50_fpn_v2": MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1,
    "fasterrcnn_resnet50_fpn": FasterRCNN_ResNet50_FPN_Weights.COCO_V1,
    "fasterrcnn_mobilenet_v3_large_fpn": FasterRCNN_MobileNet_V3_Large_FPN_Weights.COCO_V1,
    "retinanet_resnet50_fpn": RetinaNet_ResNet50_FPN_Weights.COCO_V1,
    "fcos_resnet50_fpn": FCOS_ResNet50_FPN_Weights.COCO_V1,
    "ssd300_vgg16": SSD300_VGG16_Weights.COCO_V1,
    "ssdlite320_mobilenet_v3_large": SSDLite320_MobileNet_V3_Large_Weights.COCO_V1,
}
IMAGENET: dict[str, WeightsEnum] = {
    "maskrcnn_resnet50_fpn": ResNet50_Weights.IMAGENET1K_V1,
    "maskrcnn_resnet50_fpn_v2": ResNet50_Weights.IMAGENET1K_V1,
    "maskrcnn_resnet18_fpn": ResNet18_Weights.IMAGENET1K_V1,
    "maskrcnn_mobilenet_v3_large_fpn": MobileNet_V3_Large_Weights.IMAGENET1K_V1,
    "fasterrcnn_resnet50_fpn": ResNet50_Weights.IMAGENET1K_V1,
    "fasterrcnn_mobilenet_v3_large_fpn": MobileNet_V3_Large_Weights.IMAGENET1K_V1,
    "retinanet_resnet50_fpn": ResNet50_Weights.IMAGENET1K_V1,
    "fcos_resnet50_fpn": ResNet50_Weights.IMAGENET1K_V1,
    "ssd300_vgg16": VGG16_Weights.IMAGENET1K_FEATURES,  # for images as SSD normalises them
    "ssdlite320_mobilenet_v3_large": MobileNet_V3_Large_Weights.IMAGENET1K_V1,
}


@dataclass(frozen=True)
class Elsewhere:
    """A file of COCO weights that others than torchvision publish.

    Attributes:
        url: where it is.
        md5: its checksum, where its publisher says one.
    """

    url: str
    md5: str | None = None


ELSEWHERE = {
    **{
        arch: Elsewhere(f"https://github.com/ultralytics/assets/releases/download/v8.3.0/{arch}.pt")
        for arch in ("yolo11n", "yolo11n-seg", "yolo11s", "yolo11s-seg")
    },
    "rfdetr_seg_nano": Elsewhere(
        "https://storage.googleapis.com/rfdetr/rf-detr-seg-n-ft.pth", "9995497791d0ff1664a1d9ddee9cfd20"
    ),
    "rfdetr_seg_small": Elsewhere(
        "https://storage.googleapis.com/rfdetr/rf-detr-seg-s-ft.pth", "0a2a3006381d0c42853907e700eadd08"
    ),
}
"""By architecture. Checksums are those in rfdetr's `assets/model_weights.py`; ultralytics publishes none."""

COCO_EPS = {
    "maskrcnn_resnet50_fpn": 0.0,
    "fasterrcnn_resnet50_fpn": 0.0,
    "retinanet_resnet50_fpn": 0.0,
    "fasterrcnn_mobilenet_v3_large_fpn": 1e-5,
}
"""The epsilon of frozen norms with which torchvision trained COCO weights, where it is not the architecture's own: that
of a classifier's MobileNetV3 is 0.001."""

OLD_NAMES: Rules = (
    (re.compile(r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d)\.(weight|bias)"), r"\1.0.\2"),
    (re.compile(r"rpn\.head\.conv\.(weight|bias)"), r"rpn.head.conv.0.0.\1"),
    *(
        (
            re.compile(rf"roi_heads\.mask_head\.mask_fcn{number}\.(weight|bias)"),
            rf"roi_heads.mask_head.{number - 1}.0.\1",
        )
        for number in range(1, 5)
    ),
)
"""What layers were called before torchvision 0.13, whose COCO files still say so, and what they are called now."""

OLD_NAMES_OF: dict[str, Rules] = {
    "retinanet_resnet50_fpn": (
        (
            re.compile(r"(head\.(?:classification|regression)_head\.conv)\.([0246])\.(weight|bias)"),
            lambda found: f"{found[1]}.{int(found[2]) // 2}.0.{found[3]}",
        ),
    )
}
"""The same for names that mean something else in another architecture: FCOS calls its layers so to this day."""

BODY: Rules = ((re.compile(r"(?:features\.)?(.+)"), r"backbone.body.\1"),)
IN_BACKBONE: dict[str, Rules] = {
    "ssd300_vgg16": (
        (re.compile(r"features\.(2[3-9])\.(.+)"), lambda found: f"backbone.extra.0.{int(found[1]) - 23}.{found[2]}"),
        (re.compile(r"features\.(.+)"), r"backbone.features.\1"),
    ),
    "ssdlite320_mobilenet_v3_large": (
        (re.compile(r"features\.13\.block\.0\.(.+)"), r"backbone.features.0.13.\1"),
        (re.compile(r"features\.13\.block\.(.+)"), r"backbone.features.1.0.\1"),
        (re.compile(r"features\.(1[4-6])\.(.+)"), lambda found: f"backbone.features.1.{int(found[1]) - 13}.{found[2]}"),
        (re.compile(r"features\.(.+)"), r"backbone.features.0.\1"),
    ),
}
"""What a classifier's layers are called inside a detector; where it is not named here, `BODY` says it."""


def renamed(state: dict[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """Return the state dict with its tensors called as the first rule says that fits the whole of a name."""
    new = {}
    for name, tensor in state.items():
        new[next((rule.sub(to, name) for rule, to in rules if rule.fullmatch(name)), name)] = tensor
    return new


def in_backbone(state: dict[str, Tensor], arch: str) -> dict[str, Tensor]:
    """Return a classifier's state dict under the names that its layers have inside the detector, without those that
    name ImageNet's classes."""
    layers = {name: tensor for name, tensor in state.items() if not name.startswith(("fc.", "classifier."))}
    return renamed(layers, IN_BACKBONE.get(arch, BODY))
