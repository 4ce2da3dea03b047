"""The records of RetinaNet, FCOS, SSD and SSDlite. PyTorch is imported only by the functions that need it.

A record's `network` is a function that returns torchvision's network for a spec, with random weights.
"""

import re
from functools import partial
from typing import TYPE_CHECKING, Any

from flawmask.model.architecture import Architecture, FixedSquare
from flawmask.model.published import ADDRESS, MOBILENET_V3_LARGE, RESNET50, Rules, TorchvisionFile

if TYPE_CHECKING:
    from flawmask.model.build import Detector
    from flawmask.model.spec import ModelSpec

LOSSES = ("classification", "bbox_regression")
"""torchvision's names of the losses. FCOS has one more."""

OCTAVES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
"""RetinaNet has anchors of these sizes at each place, relative to the anchor size of the level."""

RETINANET_OLD_NAMES: Rules = (
    (
        re.compile(r"(head\.(?:classification|regression)_head\.conv)\.([0246])\.(weight|bias)"),
        lambda found: f"{found[1]}.{int(found[2]) // 2}.0.{found[3]}",
    ),
)
"""For RetinaNet only: FCOS still uses these names."""

VGG_NAMES: Rules = (
    (re.compile(r"features\.(2[3-9])\.(.+)"), lambda found: f"backbone.extra.0.{int(found[1]) - 23}.{found[2]}"),
    (re.compile(r"features\.(.+)"), r"backbone.features.\1"),
)

MOBILENET_NAMES: Rules = (
    (re.compile(r"features\.13\.block\.0\.(.+)"), r"backbone.features.0.13.\1"),
    (re.compile(r"features\.13\.block\.(.+)"), r"backbone.features.1.0.\1"),
    (re.compile(r"features\.(1[4-6])\.(.+)"), lambda found: f"backbone.features.1.{int(found[1]) - 13}.{found[2]}"),
    (re.compile(r"features\.(.+)"), r"backbone.features.0.\1"),
)


def kind() -> "Detector":
    """Return the functions for one-stage detectors."""
    from flawmask.model import one_stage

    return one_stage


def _of_torchvision(spec: "ModelSpec") -> Any:
    from torchvision.models import get_model

    sizes = {} if spec.fixed_size else {"min_size": spec.image_size, "max_size": spec.max_size}
    return get_model(spec.arch, weights=None, weights_backbone=None, num_classes=len(spec.classes) + 1, **sizes)


def _retinanet(spec: "ModelSpec") -> Any:
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    model = _of_torchvision(spec)
    sizes = tuple(tuple(int(size * octave) for octave in OCTAVES) for size in spec.anchor_sizes)
    model.anchor_generator = AnchorGenerator(sizes, model.anchor_generator.aspect_ratios)
    return model


_one_stage = partial(Architecture, kind=kind, network=_of_torchvision, has_masks=False, loss_names=LOSSES)

RECORDS = (
    _one_stage(
        name="retinanet_resnet50_fpn",
        network=_retinanet,
        has_known_counts=True,
        has_anchor_sizes=True,
        coco=TorchvisionFile(f"{ADDRESS}/retinanet_resnet50_fpn_coco-eeacb38b.pth", eps=0.0),
        imagenet=RESNET50,
        old_names=RETINANET_OLD_NAMES,
    ),
    _one_stage(
        name="fcos_resnet50_fpn",
        loss_names=(*LOSSES, "bbox_ctrness"),
        coco=TorchvisionFile(f"{ADDRESS}/fcos_resnet50_fpn_coco-99b0c9b7.pth"),
        imagenet=RESNET50,
    ),
    _one_stage(
        name="ssd300_vgg16",
        size=FixedSquare(300),
        coco=TorchvisionFile(f"{ADDRESS}/ssd300_vgg16_coco-b556d3b4.pth"),
        # These weights expect images normalised as SSD normalises them.
        imagenet=TorchvisionFile(f"{ADDRESS}/vgg16_features-amdegroot-88682ab5.pth"),
        backbone_names=VGG_NAMES,
    ),
    _one_stage(
        name="ssdlite320_mobilenet_v3_large",
        size=FixedSquare(320),
        init_assumes_norms=True,
        # An epoch may end with a batch of one image. Its last level is a single cell, too little for BatchNorm.
        allows_batch_norm=False,
        coco=TorchvisionFile(f"{ADDRESS}/ssdlite320_mobilenet_v3_large_coco-a79551df.pth"),
        imagenet=MOBILENET_V3_LARGE,
        backbone_names=MOBILENET_NAMES,
    ),
)
