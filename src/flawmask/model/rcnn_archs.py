"""The records of the R-CNNs. PyTorch is imported only by the functions that need it.

A record's `network` is a function that returns torchvision's network with random weights. It takes the number of
classes, background included, and the limits that `rcnn_build.build` sets.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

from flawmask.model.architecture import Architecture
from flawmask.model.published import ADDRESS, MOBILENET_V3_LARGE, RESNET18, RESNET50, TorchvisionFile

if TYPE_CHECKING:
    from torchvision.models.detection import FasterRCNN

    from flawmask.model.build import Detector

LOSSES = ("loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg")
"""torchvision's names of the losses. Only Mask R-CNN has the loss of the masks."""


def kind() -> "Detector":
    """Return the functions for R-CNNs."""
    from flawmask.model import rcnn

    return rcnn


def _of_torchvision(name: str, classes: int, limits: dict[str, Any]) -> "FasterRCNN":
    from torchvision.models import get_model

    return get_model(name, weights=None, weights_backbone=None, num_classes=classes, **limits)


def _resnet18(classes: int, limits: dict[str, Any]) -> "FasterRCNN":
    from torch import nn
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )
    return MaskRCNN(backbone, classes, **limits)


def _mobilenet(has_masks: bool, classes: int, limits: dict[str, Any]) -> "FasterRCNN":
    from torch import nn
    from torchvision.models.detection import FasterRCNN, MaskRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import mobilenet_backbone

    from flawmask.model.spec import TORCHVISION_ANCHORS

    # MobileNetV3 was trained with this epsilon and momentum. torchvision's detectors do not keep them.
    norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.01)
    backbone = mobilenet_backbone(
        backbone_name="mobilenet_v3_large", weights=None, fpn=True, norm_layer=norm, trainable_layers=6
    )
    generator = AnchorGenerator((TORCHVISION_ANCHORS,) * 3, ((0.5, 1.0, 2.0),) * 3)
    network = MaskRCNN if has_masks else FasterRCNN
    return network(backbone, classes, rpn_anchor_generator=generator, **limits)


_rcnn = partial(Architecture, kind=kind, has_known_counts=True, has_anchor_sizes=True, is_recordable=True)
mask_rcnn = partial(_rcnn, has_masks=True, loss_names=LOSSES)
faster_rcnn = partial(_rcnn, has_masks=False, loss_names=tuple(name for name in LOSSES if name != "loss_mask"))

RECORDS = (
    mask_rcnn(
        name="maskrcnn_resnet50_fpn",
        network=partial(_of_torchvision, "maskrcnn_resnet50_fpn"),
        coco=TorchvisionFile(f"{ADDRESS}/maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth", eps=0.0),
        imagenet=RESNET50,
    ),
    mask_rcnn(
        name="maskrcnn_resnet50_fpn_v2",
        network=partial(_of_torchvision, "maskrcnn_resnet50_fpn_v2"),
        coco=TorchvisionFile(f"{ADDRESS}/maskrcnn_resnet50_fpn_v2_coco-73cbd019.pth"),
        imagenet=RESNET50,
    ),
    mask_rcnn(name="maskrcnn_resnet18_fpn", network=_resnet18, imagenet=RESNET18),
    mask_rcnn(
        name="maskrcnn_mobilenet_v3_large_fpn",
        network=partial(_mobilenet, True),
        imagenet=MOBILENET_V3_LARGE,
    ),
    faster_rcnn(
        name="fasterrcnn_resnet50_fpn",
        network=partial(_of_torchvision, "fasterrcnn_resnet50_fpn"),
        coco=TorchvisionFile(f"{ADDRESS}/fasterrcnn_resnet50_fpn_coco-258fb6c6.pth", eps=0.0),
        imagenet=RESNET50,
    ),
    faster_rcnn(
        name="fasterrcnn_mobilenet_v3_large_fpn",
        network=partial(_mobilenet, False),
        # Not the 0.001 of the MobileNetV3 classifier.
        coco=TorchvisionFile(f"{ADDRESS}/fasterrcnn_mobilenet_v3_large_fpn-fb6a3cc7.pth", eps=1e-5),
        imagenet=MOBILENET_V3_LARGE,
    ),
)
