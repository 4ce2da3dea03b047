"""A branch of Mask R-CNN that scores each pixel for each class of defects (semantic segmentation).

Mask R-CNN's other losses see only sampled regions of an image. This one sees every pixel, also those of good images. It
teaches the features of the finest level. The branch predicts the map of `Prediction.score_map`, and the map's highest
value is a second opinion on the image. Kirillov et al., "Panoptic feature pyramid networks", CVPR 2019, and Chen et
al., "Hybrid task cascade for instance segmentation", CVPR 2019, have such a branch beside the heads for regions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flawmask.model.targets import Target, crops

STRIDE = 4
"""The pixels of the resized image per cell of the finest level, in each direction."""

CHANNELS = 32
"""The channels of the branch's hidden layers."""

PRIOR = -3.0
"""The logit of every pixel before training: defective pixels are rare (Lin et al., "Focal loss", ICCV 2017)."""

DICE_WEIGHT = 0.5
"""The weight of the Dice loss, relative to that of the cross-entropy."""


class SemanticHead(nn.Module):
    """The branch: two convolutions on the finest level of the feature pyramid, and D outputs for each cell.

    Attributes:
        defect_labels: the network's labels of the D classes of defects. The other class is `good`.
    """

    def __init__(self, channels: int, defect_labels: Sequence[int]) -> None:
        """Take the number of channels of the feature pyramid, and the labels of defects."""
        super().__init__()
        self.defect_labels = tuple(defect_labels)
        self.layers = nn.Sequential(
            nn.Conv2d(channels, CHANNELS, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
            nn.ReLU(inplace=True),
        )
        self.last = nn.Conv2d(CHANNELS, len(self.defect_labels), 1)
        nn.init.constant_(self.last.bias, PRIOR)  # type: ignore[arg-type]  # this layer has a bias

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits, (B, D, rows, columns) float32, for the finest level, (B, channels, rows, columns)."""
        logits: Tensor = self.last(self.layers(features).float())
        return logits


def semantic_targets(head: SemanticHead, targets: Sequence[Target], shape: Sequence[int]) -> Tensor:
    """Return the share of each cell's pixels that show each class of defects: (B, D, rows, columns) float32, 0 to 1.

    Args:
        head: the branch.
        targets: one for each image.
        shape: height and width of the padded images: multiples of `STRIDE`.
    """
    device = targets[0]["mask_pixels"].device
    whole = torch.zeros(len(targets), len(head.defect_labels), *shape, dtype=torch.uint8, device=device)
    for image, target in zip(whole, targets, strict=True):
        parts = zip(crops(target), target["windows"].tolist(), target["labels"].tolist(), strict=True)
        for crop, (left, top, wide, high), label in parts:
            if label in head.defect_labels:
                image[head.defect_labels.index(label), top : top + high, left : left + wide] |= crop
    return F.avg_pool2d(whole.float(), STRIDE)


def semantic_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Return the branch's loss, a scalar float32: cross-entropy and Dice loss of each image and class, then the mean.

    The Dice loss is that of Milletari et al., "V-Net", 3DV 2016, without squares. A small defect weighs as much in it
    as a large one.

    Args:
        logits: (B, D, rows, columns) float32.
        wanted: (B, D, rows, columns) float32, 0 to 1.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, wanted)
    likely = logits.sigmoid()
    shared, both = (likely * wanted).sum(dim=(2, 3)), likely.sum(dim=(2, 3)) + wanted.sum(dim=(2, 3))
    dice = 1 - (2 * shared + 1) / (both + 1)
    return entropy + DICE_WEIGHT * dice.mean()


def maps(logits: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Return the probability of each class of defects in each cell of each image, (D, rows, columns) float32.

    The cells of an image cover it exactly, without padding. Where its sides are multiples of `STRIDE`, they are those
    of the logits. Otherwise they are a little smaller, and their logits are interpolated.

    Args:
        logits: (B, D, rows, columns) float32.
        sizes: height and width of each resized image.
    """
    result = []
    for one, size in zip(logits, sizes, strict=True):
        cells = [-(-side // STRIDE) for side in size]
        if all(side % STRIDE == 0 for side in size):
            result.append(one[:, : cells[0], : cells[1]].sigmoid())
            continue
        # The share of the padded image that the image covers, from the upper left corner (-1, -1).
        down, across = (side / (STRIDE * all_cells) for side, all_cells in zip(size, one.shape[-2:], strict=True))
        place = one.new_tensor([[[across, 0, across - 1], [0, down, down - 1]]])
        grid = F.affine_grid(place, [1, len(one), *cells], align_corners=False)
        result.append(F.grid_sample(one[None], grid, padding_mode="border", align_corners=False)[0].sigmoid())
    return result
