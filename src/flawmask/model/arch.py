"""The names of the architectures, apart from the networks, so that `--help` need not import torch."""

from typing import Literal

Arch = Literal[
    "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2",
    "maskrcnn_resnet18_fpn",
    "maskrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "retinanet_resnet50_fpn",
    "fcos_resnet50_fpn",
    "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
    "yolo11n",
    "yolo11n-seg",
    "yolo11s",
    "yolo11s-seg",
    "rfdetr_seg_nano",
    "rfdetr_seg_small",
]

FIXED_SIZES = {"ssd300_vgg16": 300, "ssdlite320_mobilenet_v3_large": 320}
"""Architectures that see every image squeezed to a square of so many pixels."""

SQUARES = {"rfdetr_seg_nano": 12, "rfdetr_seg_small": 24}
"""Architectures that see every image squeezed to a square of any size, its sides multiples of so many pixels."""

SMALLEST_SQUARE = 120
"""Sides of such a square, in pixels: on a smaller one there are fewer patches than the network has queries."""


def has_masks(arch: Arch) -> bool:
    """Return whether the network outlines what it finds; the others find boxes."""
    return arch.startswith("maskrcnn") or "seg" in arch
