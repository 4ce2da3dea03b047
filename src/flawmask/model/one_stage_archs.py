"""RetinaNet, FCOS, SSD and SSDlite by name: what is to be known of each, and how its layers are made. PyTorch is
imported where it is needed.

A record's `network` is a function that returns torchvision's network for a spec, its weights drawn at random.
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
"""In torchvision's words; FCOS has one more."""

OCTAVES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
"""RetinaNet has an anchor of each of these sizes, relative to the level's, at each place."""

RETINANET_OLD_NAMES: Rules = (
    (
        re.compile(r"(head\.(?:classification|regression)_head\.conv)\.([0246])\.(weight|bias)"),
        lambda found: f"{found[1]}.{int(found[2]) // 2}.0.{found[3]}",
    ),
)
"""RetinaNet's alone: FCOS calls its layers so to this day."""

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
    """Return the functions for detectors of one stage."""
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
        # For images as SSD normalises them.
        imagenet=TorchvisionFile(f"{ADDRESS}/vgg16_features-amdegroot-88682ab5.pth"),
        backbone_names=VGG_NAMES,
    ),
    _one_stage(
        name="ssdlite320_mobilenet_v3_large",
        size=FixedSquare(320),
        init_assumes_norms=True,
        # Of one image, as an epoch may end with, BatchNorm cannot take the mean of the single cell of the last level.
        allows_batch_norm=False,
        coco=TorchvisionFile(f"{ADDRESS}/ssdlite320_mobilenet_v3_large_coco-a79551df.pth"),
        imagenet=MOBILENET_V3_LARGE,
        backbone_names=MOBILENET_NAMES,
    ),
)
