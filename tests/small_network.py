"""A Mask R-CNN of a million weights that replaces `maskrcnn_resnet18_fpn` in tests that work with any network.

With the real one, a training in a test writes 600 MB of states. No setting names the small one: it is built instead of
`maskrcnn_resnet18_fpn`, in a test or in a process that a test starts. Its stages have the names and strides of a
ResNet, so it is frozen, loaded and saved like one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.resnet import BasicBlock, ResNet

from flawmask.model.arch import ARCHITECTURES

STANDS_IN_FOR = "maskrcnn_resnet18_fpn"
CHANNELS, BOX_HEAD = 64, 128


class _Narrow(ResNet):  # type: ignore[misc]
    """A ResNet-18 of half the depth. All its stages have the width of the first."""

    def _make_layer(self, block: Any, planes: int, blocks: int, stride: int = 1, dilate: bool = False) -> Any:
        return super()._make_layer(block, CHANNELS, blocks, stride, dilate)


def build(classes: int, limits: dict[str, Any]) -> MaskRCNN:
    """Return the network with random weights, like the `network` of an R-CNN's record."""
    stages = {f"layer{number}": str(number - 1) for number in range(1, 5)}
    backbone = BackboneWithFPN(_Narrow(BasicBlock, [1, 1, 1, 1]), stages, [CHANNELS] * 4, CHANNELS)
    return MaskRCNN(
        backbone,
        num_classes=None,
        box_head=TwoMLPHead(CHANNELS * 7 * 7, BOX_HEAD),
        box_predictor=FastRCNNPredictor(BOX_HEAD, classes),
        mask_head=MaskRCNNHeads(CHANNELS, [CHANNELS] * 4, 1),
        mask_predictor=MaskRCNNPredictor(CHANNELS, CHANNELS, classes),
        **limits,
    )


SMALL = replace(ARCHITECTURES[STANDS_IN_FOR], network=build)


@contextmanager
def in_place() -> Iterator[None]:
    """Build the small network instead of the real one in this process, until the context ends."""
    with patch.dict(ARCHITECTURES, {STANDS_IN_FOR: SMALL}):
        yield


def is_in_place() -> bool:
    """Return whether the small network is built instead of the real one."""
    return ARCHITECTURES[STANDS_IN_FOR] is SMALL


def put_in_place() -> None:
    """Build the small network from now on. Processes that a test starts call this."""
    ARCHITECTURES[STANDS_IN_FOR] = SMALL
