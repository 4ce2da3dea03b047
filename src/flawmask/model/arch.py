"""The architectures by name. This module imports no PyTorch, so `--help` starts fast."""

from typing import Literal, TypeGuard

from flawmask.errors import FlawmaskError
from flawmask.model import efficientnet_lite_archs, one_stage_archs, rcnn_archs, rfdetr_archs, yolo_archs
from flawmask.model.architecture import Architecture

Arch = Literal[
    "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2",
    "maskrcnn_resnet18_fpn",
    "maskrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "maskrcnn_efficientnet_lite0_fpn",
    "maskrcnn_efficientnet_lite1_fpn",
    "maskrcnn_efficientnet_lite2_fpn",
    "fasterrcnn_efficientnet_lite0_fpn",
    "fasterrcnn_efficientnet_lite1_fpn",
    "fasterrcnn_efficientnet_lite2_fpn",
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
"""The names of the records in `ARCHITECTURES`, in the same order."""

ArchChoice = Literal["auto"] | Arch
"""The values of `--arch`. For `auto`, `training/choose.py` chooses a network."""

ARCHITECTURES: dict[str, Architecture] = {
    record.name: record
    for module in (rcnn_archs, efficientnet_lite_archs, one_stage_archs, yolo_archs, rfdetr_archs)
    for record in module.RECORDS
}
"""The record of each architecture. To use your own network, add its record here, in every process."""


def is_chosen(name: ArchChoice) -> TypeGuard[Arch]:
    """Return whether this names a network, rather than `auto`."""
    return name != "auto"


def architecture(name: str) -> Architecture:
    """Return the record of an architecture.

    Raises:
        FlawmaskError: there is none of that name.
    """
    if name not in tuple(ARCHITECTURES):  # a tuple, because a damaged file may hold something unhashable instead
        raise FlawmaskError(f"there is no architecture {name}: there are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]
