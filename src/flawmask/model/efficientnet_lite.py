"""R-CNNs with an EfficientNet-Lite backbone (Tan and Le, ICML 2019; TensorFlow's EfficientNet-Lite), small enough for a
CPU.

The body has no squeeze-and-excitation and uses ReLU6, so it suits int8. Its weights come from TensorFlow, so layers
follow TensorFlow's conventions: with stride 2, padding is at the right and below, and norms have an epsilon of 0.001.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

MEAN, DEVIATION = 0.498, 0.502
"""Normalisation of all three colours, equal to TensorFlow's (x - 127) / 128 with x from 0 to 255."""

EPS = 1e-3
STEM = 32
DIVISOR = 8

BLOCKS = (
    # repeats, kernel, stride, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
"""EfficientNet-B0's blocks (Tan and Le 2019, table 1); the other sizes are scaled from these."""

PYRAMID = 64
"""Channels of the feature pyramid and of the mask head. docs/benchmarks.md shows their cost."""
REGION = 256
"""Features per region in the box head."""


@dataclass(frozen=True)
class Size:
    """How a body is scaled from EfficientNet-B0.

    Attributes:
        width: the factor of the channels, except those of the stem.
        depth: the factor of the repeats of each block, except the first and the last.
    """

    width: float
    depth: float


SIZES = {"lite0": Size(1.0, 1.0), "lite1": Size(1.0, 1.1), "lite2": Size(1.1, 1.2)}


class SamePadding(nn.Module):
    """Zero padding as TensorFlow's "same" mode adds it before a convolution. If the number of rows or columns is odd,
    the extra one is at the right or below."""

    def __init__(self, kernel: int, stride: int) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        """Return the padded image."""
        rows, columns = (max(0, self.kernel - (side % self.stride or self.stride)) for side in x.shape[-2:])
        return F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


def convolution(
    inside: int, outside: int, kernel: int = 1, stride: int = 1, *, depthwise: bool = False, activation: bool = True
) -> nn.Sequential:
    """Return a convolution followed by its norm and, if `activation`, ReLU6."""
    padding = {"pad": SamePadding(kernel, stride)} if stride > 1 else {}
    groups = inside if depthwise else 1
    around = 0 if padding else kernel // 2
    return nn.Sequential(
        OrderedDict(
            **padding,
            conv=nn.Conv2d(inside, outside, kernel, stride, around, groups=groups, bias=False),
            norm=nn.BatchNorm2d(outside, eps=EPS, momentum=0.01),
            **({"activation": nn.ReLU6(inplace=True)} if activation else {}),
        )
    )


class Block(nn.Module):
    """An inverted residual block (Sandler et al., CVPR 2018)."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inside * expansion
        if expansion != 1:
            self.expand = convolution(inside, wide)
        self.depthwise = convolution(wide, wide, kernel, stride, depthwise=True)
        self.project = convolution(wide, outside, activation=False)
        self.is_residual = stride == 1 and inside == outside
        self._is_cn = stride > 1  # marks the start of a stage; torchvision's MobileNetV3 uses this name

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        wide = self.expand(x) if hasattr(self, "expand") else x
        narrow: Tensor = self.project(self.depthwise(wide))
        return x + narrow if self.is_residual else narrow


def body(size: Size) -> nn.Sequential:
    """Return an EfficientNet-Lite without its classifier, with random weights: the stem, then the blocks."""
    layers: list[nn.Module] = [convolution(3, STEM, 3, 2)]
    inside = STEM
    for number, (repeats, kernel, stride, expansion, channels) in enumerate(BLOCKS):
        outside = _scaled(channels, size.width)
        is_outermost = number in (0, len(BLOCKS) - 1)
        for at in range(repeats if is_outermost else -int(-(repeats * size.depth) // 1)):
            layers.append(Block(inside, outside, kernel, stride if at == 0 else 1, expansion))
            inside = outside
    return nn.Sequential(*layers)


def _scaled(channels: int, width: float) -> int:
    """Return the scaled number of channels, rounded to a multiple of `DIVISOR` that is at most a tenth too low."""
    wanted = channels * width
    nearest = max(DIVISOR, int(wanted + DIVISOR / 2) // DIVISOR * DIVISOR)
    return nearest + DIVISOR if nearest < 0.9 * wanted else nearest


def network(name: str, has_masks: bool, classes: int, limits: dict[str, Any]) -> FasterRCNN:
    """Return the network with random weights.

    Args:
        name: of its size, as in `SIZES`.
        has_masks: Mask R-CNN or Faster R-CNN.
        classes: their number, background included.
        limits: see `rcnn_build.build`.
    """
    layers: Any = body(SIZES[name])
    # The last block of each stage is the one before a block that halves the resolution.
    ends = [at - 1 for at, one in enumerate(layers) if getattr(one, "_is_cn", False)][1:]
    ends.append(len(layers) - 1)
    backbone = BackboneWithFPN(
        layers,
        {str(end): str(level) for level, end in enumerate(ends)},
        [layers[end].project.conv.out_channels for end in ends],
        PYRAMID,
    )
    heads = {
        "box_head": TwoMLPHead(PYRAMID * 7 * 7, REGION),
        "box_predictor": FastRCNNPredictor(REGION, classes),
        "image_mean": (MEAN,) * 3,
        "image_std": (DEVIATION,) * 3,
        **limits,
    }
    if not has_masks:
        return FasterRCNN(backbone, **heads)
    mask_head = MaskRCNNHeads(PYRAMID, (PYRAMID,) * 4, 1)
    return MaskRCNN(backbone, mask_head=mask_head, mask_predictor=MaskRCNNPredictor(PYRAMID, PYRAMID, classes), **heads)
