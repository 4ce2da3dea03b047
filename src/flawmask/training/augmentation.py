"""Augmentation while training: each training image is changed anew every time that it is shown.

Flips, right-angle turns and crops move pixels without changing them, so masks stay exact. A stretch resizes masks to
their nearest pixels. All other changes leave masks as they are. Colours, blur and noise are those of torchvision's
transforms v2 (https://docs.pytorch.org/vision/stable/transforms.html).
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flawmask import torchvision_alone  # noqa: F401
from flawmask.good_names import GOOD
from flawmask.model.targets import Target, crops

GAMMA = 0.25
"""Gamma correction of `light` and `strong`: the logarithm of gamma is drawn between minus and plus this."""

CROP_PROBABILITY, MIN_CROP_AREA, STRETCH = 0.7, 0.35, 0.15
"""For `strong`: the probability of a crop, the smallest share of the area that a crop keeps, and the largest stretch of
a side, as the logarithm of its factor."""

ALL_VALUES = torch.arange(256, dtype=torch.uint8)[None, None]
"""A picture, (1, 1, 256), of each value of a pixel."""


@dataclass(frozen=True)
class Turn:
    """One of the eight flips and right-angle turns. Rows and columns change places first. Then the result is mirrored.

    Attributes:
        transposed: whether rows become columns.
        mirrored: whether left and right change places.
        upside_down: whether top and bottom change places.
    """

    transposed: bool
    mirrored: bool
    upside_down: bool

    def of(self, values: npt.NDArray[Any], rows: int = 0) -> npt.NDArray[Any]:
        """Return the values turned. Axis `rows` holds the rows, the next one the columns."""
        columns = rows + 1
        if self.transposed:
            values = values.swapaxes(rows, columns)
        if self.mirrored:
            values = np.flip(values, columns)
        # A copy in any case: NumPy counts a flipped side of one pixel as contiguous, with strides that PyTorch refuses.
        return np.array(np.flip(values, rows) if self.upside_down else values, order="C")

    def of_target(self, target: Target, height: int, width: int) -> Target:
        """Return the target of the turned image, from that of an image of this height and width."""
        boxes, windows = target["boxes"], target["windows"]
        corners = torch.cat((windows[:, :2], windows[:, :2] + windows[:, 2:]), dim=1)
        pixels = [torch.from_numpy(self.of(crop.numpy())).flatten() for crop in crops(target)]
        turned = self._of_corners(corners, height, width)
        return target | {
            "boxes": self._of_corners(boxes, height, width),
            "windows": torch.cat((turned[:, :2], turned[:, 2:] - turned[:, :2]), dim=1),
            "mask_pixels": torch.cat(pixels) if pixels else target["mask_pixels"],
        }

    def _of_corners(self, corners: Tensor, height: int, width: int) -> Tensor:
        """Return boxes, (N, 4) x1 y1 x2 y2, in the turned image."""
        if self.transposed:
            corners, height, width = corners[:, [1, 0, 3, 2]], width, height
        left, top, right, bottom = corners.unbind(dim=1)
        if self.mirrored:
            left, right = width - right, width - left
        if self.upside_down:
            top, bottom = height - bottom, height - top
        return torch.stack((left, top, right, bottom), dim=1)


class Augmentation:
    """A `loader.Transform` of one level. It can be pickled, and so sent to processes that read images."""

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
        """Return the changed image, its masks and their names, as `loader.Transform` says.

        Everything random comes from `draw`. A mask outside the crop becomes empty.
        """
        if self.level == "strong":
            if draw.random() < CROP_PROBABILITY:
                image, masks = _crop(image, masks, names, draw)
            image, masks = _stretched(image, masks, draw)
        image, turn = self._changed(image, draw)
        return image, turn.of(masks, rows=1), names

    def transposes(self, draw: np.random.Generator) -> bool:
        """Return whether rows and columns change places. For `light`, it is what `draw` decides first."""
        return bool(draw.random() < 0.5)

    @property
    def needs_whole_images(self) -> bool:
        """Whether images are cut before they are resized. If not, `of_resized` does the same to resized images."""
        return self.level == "strong"

    def of_resized(
        self, image: npt.NDArray[np.uint8], target: Target, draw: np.random.Generator
    ) -> tuple[npt.NDArray[np.uint8], Target]:
        """Return a resized image, (height, width, 3) uint8, and its target, changed as a whole image would be.

        It saves decoding, changing and resizing a large image and its masks anew each time.
        """
        height, width = image.shape[:2]
        image, turn = self._changed(image, draw)
        return image, turn.of_target(target, height, width)

    def _changed(self, image: npt.NDArray[np.uint8], draw: np.random.Generator) -> tuple[npt.NDArray[np.uint8], Turn]:
        """Return the image with other colours and turned, and the turn."""
        from torchvision import tv_tensors
        from torchvision.transforms.v2 import functional

        transposed = self.transposes(draw)
        jitter, noise = _transforms(self.level)
        # v2 draws from PyTorch's own generator, which the network uses too. `torch.manual_seed` would seed a GPU's too.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(draw.integers(2**63)))
            turn = Turn(transposed, *(torch.rand(2) < 0.5).tolist())
            changed = _jittered(turn.of(image), jitter.make_params([]))
            if noise is not None:
                picture = torch.from_numpy(changed).permute(2, 0, 1).contiguous()
                changed = np.ascontiguousarray(noise(tv_tensors.Image(picture)).permute(1, 2, 0).numpy())
        changed = _mapped(changed, functional.adjust_gamma(ALL_VALUES, float(np.exp(draw.uniform(-GAMMA, GAMMA)))))
        if self.level == "strong" and draw.random() < 0.2:
            changed = _jpeg(changed, int(draw.integers(40, 96)))
        return changed, turn


def _stretched(
    image: npt.NDArray[np.uint8], masks: npt.NDArray[np.bool_], draw: np.random.Generator
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """Return image and masks with each side longer or shorter."""
    from torchvision.transforms.v2 import functional

    size = [max(1, round(side * np.exp(draw.uniform(-STRETCH, STRETCH)))) for side in image.shape[:2]]
    picture = functional.resize_image(torch.from_numpy(image).permute(2, 0, 1), size, antialias=False)
    stretched = functional.resize_mask(torch.from_numpy(masks), size) if len(masks) else torch.empty(0, *size).bool()
    return np.ascontiguousarray(picture.permute(1, 2, 0).numpy()), stretched.numpy()


@cache
def _transforms(level: str) -> tuple[Any, Any]:
    """Return the jitter of colours, and blur with noise, which `light` does not have."""
    from torchvision.transforms import v2

    if level == "light":
        return v2.ColorJitter(brightness=0.2, contrast=0.2), None
    noise = [v2.ToDtype({_image_type(): torch.float32, "others": None}, scale=True), v2.GaussianNoise(sigma=0.02)]
    back = v2.ToDtype({_image_type(): torch.uint8, "others": None}, scale=True)
    blurred = v2.RandomApply([v2.GaussianBlur(5, sigma=(0.3, 1.2))], p=0.2)
    noisy = v2.RandomApply([*noise, back], p=0.2)
    return v2.ColorJitter(brightness=0.3, contrast=0.3), v2.Compose([blurred, noisy])


def _image_type() -> Any:
    from torchvision import tv_tensors

    return tv_tensors.Image


def _jittered(image: npt.NDArray[np.uint8], drawn: dict[str, Any]) -> npt.NDArray[np.uint8]:
    """Return the image that `v2.ColorJitter` makes with the parameters that it has drawn, in half of its time.

    Brightness and contrast map each value by itself, so a table of all 256 values is enough.
    """
    from torchvision.transforms.v2 import functional

    for number in drawn["fn_idx"].tolist():
        if number == 0:
            image = _mapped(image, functional.adjust_brightness(ALL_VALUES, drawn["brightness_factor"]))
        elif number == 1:
            grey = functional.rgb_to_grayscale(torch.from_numpy(image).permute(2, 0, 1))
            factor, mean = drawn["contrast_factor"], grey.float().mean(dim=(-3, -2, -1), keepdim=True)
            image = _mapped(image, ALL_VALUES.mul(factor).add(mean, alpha=1 - factor).clamp(0, 255).to(torch.uint8))
    return image


def _mapped(image: npt.NDArray[np.uint8], table: Tensor) -> npt.NDArray[np.uint8]:
    """Return the image with each value replaced by its entry in a (1, 1, 256) table."""
    return np.asarray(cv2.LUT(image, table.numpy().ravel()), np.uint8)


def _jpeg(image: npt.NDArray[np.uint8], quality: int) -> npt.NDArray[np.uint8]:
    """Return the image after JPEG compression. (v2 has a transform for this, but it is deprecated.)"""
    _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)


def _crop(
    image: npt.NDArray[np.uint8], masks: npt.NDArray[np.bool_], names: list[str], draw: np.random.Generator
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """Return a random window of the image and of its masks. If there are defects, the window holds a pixel of one."""
    sides = np.array(image.shape[:2])
    area, ratio = draw.uniform(MIN_CROP_AREA, 1), np.exp(draw.uniform(-0.2, 0.2))
    window = np.clip(np.ceil(sides * np.sqrt([area * ratio, area / ratio])).astype(int), 1, sides)
    first, last = np.zeros(2, int), sides - window
    defects = [mask for mask, name in zip(masks, names, strict=True) if name != GOOD and mask.any()]
    if defects:
        pixels = np.argwhere(defects[draw.integers(len(defects))])
        pixel = pixels[draw.integers(len(pixels))]
        first, last = np.maximum(first, pixel - window + 1), np.minimum(last, pixel)
    y, x = draw.integers(first, last + 1)
    height, width = window
    return image[y : y + height, x : x + width], masks[:, y : y + height, x : x + width]
