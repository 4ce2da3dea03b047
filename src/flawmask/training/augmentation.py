"""Augmentation while training: another image of each training image, every time that it is shown.

Flips, turns by right angles and crops move pixels and change none, so masks stay exact. A stretch resizes masks to
their nearest pixels. All other changes leave the masks as they are. By torchvision's transforms v2
(https://docs.pytorch.org/vision/stable/transforms.html), which take an image together with its masks.
"""

from functools import cache
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flawmask import torchvision_alone  # noqa: F401
from flawmask.good_names import GOOD

Level = Literal["off", "light", "strong"]
"""How much images are changed."""

GAMMA = 0.25
"""The logarithm of the exponent of light and strong is drawn from plus and minus this."""

CROPPED, LEAST_SHARE, STRETCH = 0.7, 0.35, 0.15
"""Of strong: how often an image is cropped, the least share of its area that stays, and by how much, as a logarithm,
each side may grow or shrink."""


class Augmentation:
    """A `loader.Transform` of one level. A process that reads images may be handed one."""

    def __init__(self, level: Literal["light", "strong"]) -> None:
        """Take the level."""
        self.level = level

    def __call__(
        self,
        image: npt.NDArray[np.uint8],
        masks: npt.NDArray[np.bool_],
        names: list[str],
        draw: np.random.Generator,
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_], list[str]]:
        """Return another image, its masks and their names, as `loader.Transform` says. All that is drawn follows from
        `draw`. A mask that the crop leaves out is empty."""
        from torchvision import tv_tensors
        from torchvision.transforms.v2 import functional

        if self.level == "strong" and draw.random() < CROPPED:
            image, masks = _cropped(image, masks, names, draw)
        if draw.random() < 0.5:  # and so, with the flips, every turn by a right angle
            image, masks = image.transpose(1, 0, 2), masks.transpose(0, 2, 1)
        picture = tv_tensors.Image(torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))))
        outlined = tv_tensors.Mask(torch.from_numpy(np.ascontiguousarray(masks)))
        if self.level == "strong":
            height, width = (max(1, round(side * np.exp(draw.uniform(-STRETCH, STRETCH)))) for side in image.shape[:2])
            picture = functional.resize(picture, [height, width], antialias=False)
            outlined = (
                functional.resize(outlined, [height, width]) if len(masks) else outlined.new_empty(0, height, width)
            )
        with torch.random.fork_rng(devices=[]):  # v2 draws from PyTorch's own generator, which the network draws from
            torch.manual_seed(int(draw.integers(2**63)))
            picture, outlined = _transforms(self.level)(picture, tv_tensors.Mask(outlined))
        picture = functional.adjust_gamma(picture, float(np.exp(draw.uniform(-GAMMA, GAMMA))))
        changed = _array(picture.permute(1, 2, 0))
        if self.level == "strong" and draw.random() < 0.2:
            changed = _compressed(changed, int(draw.integers(40, 96)))
        return changed, _array(outlined), names


@cache
def _transforms(level: str) -> Any:
    from torchvision.transforms import v2

    flips = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]
    if level == "light":
        return v2.Compose([*flips, v2.ColorJitter(brightness=0.2, contrast=0.2)])
    noise = [v2.ToDtype({_image_type(): torch.float32, "others": None}, scale=True), v2.GaussianNoise(sigma=0.02)]
    back = v2.ToDtype({_image_type(): torch.uint8, "others": None}, scale=True)
    return v2.Compose(
        [
            *flips,
            v2.ColorJitter(brightness=0.3, contrast=0.3),
            v2.RandomApply([v2.GaussianBlur(5, sigma=(0.3, 1.2))], p=0.2),
            v2.RandomApply([*noise, back], p=0.2),
        ]
    )


def _image_type() -> Any:
    from torchvision import tv_tensors

    return tv_tensors.Image


def _array(tensor: Tensor) -> npt.NDArray[Any]:
    return np.ascontiguousarray(tensor.numpy())


def _compressed(image: npt.NDArray[np.uint8], quality: int) -> npt.NDArray[np.uint8]:
    """Return what JPEG leaves of the image. (v2's own warns that torchvision will have it no more.)"""
    _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)


def _cropped(
    image: npt.NDArray[np.uint8], masks: npt.NDArray[np.bool_], names: list[str], draw: np.random.Generator
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """Return a window of the image and its masks. Where there is a defect, a pixel of one lies in the window."""
    sides = np.array(image.shape[:2])
    share, ratio = draw.uniform(LEAST_SHARE, 1), np.exp(draw.uniform(-0.2, 0.2))
    window = np.clip(np.ceil(sides * np.sqrt([share * ratio, share / ratio])).astype(int), 1, sides)
    first, last = np.zeros(2, int), sides - window
    defects = [mask for mask, name in zip(masks, names, strict=True) if name != GOOD and mask.any()]
    if defects:
        inside = np.argwhere(defects[draw.integers(len(defects))])
        kept = inside[draw.integers(len(inside))]
        first, last = np.maximum(first, kept - window + 1), np.minimum(last, kept)
    y, x = draw.integers(first, last + 1)
    height, width = window
    return image[y : y + height, x : x + width], masks[:, y : y + height, x : x + width]
