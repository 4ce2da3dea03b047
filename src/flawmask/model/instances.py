"""What is on the images of a batch, in tensors whose sizes do not depend on what is on each of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import roi_align

from flawmask.model.layers import upload
from flawmask.model.targets import Target

MAX_MASK_PIXELS = 2**24
"""Pixels of masks that are laid out at a time: 64 MiB for each of a few float32 tensors."""

MIN_INSTANCES, SMALLEST_WINDOW = 4, 64
"""From here on, room for instances and sides of windows are rounded to powers of two."""


@dataclass(frozen=True)
class Capacity:
    """How much room there is for what is on a batch's images.

    Attributes:
        instances: of each image.
        mask_pixels: of all masks' windows together.
        window: height and width of a window that each fits into.
    """

    instances: int
    mask_pixels: int
    window: tuple[int, int]

    @classmethod
    def of(cls, targets: Sequence[Target]) -> "Capacity":
        """Return what the targets need: never nothing, so that there is always something to look at."""
        windows = torch.cat([target["windows"] for target in targets])
        high, wide = (int(windows[:, at].max()) if len(windows) else 1 for at in (3, 2))
        pixels = sum(len(target["mask_pixels"]) for target in targets)
        return cls(max(1, *(len(target["boxes"]) for target in targets)), max(1, pixels), (high, wide))

    def rounded(self, images: int, height: int, width: int) -> "Capacity":
        """Return at least as much, so that batches of one size have few different ones.

        Args:
            images: of the batch.
            height: of an image, in pixels, with padding.
            width: likewise.
        """
        side = rounded(max(self.window), SMALLEST_WINDOW)
        return Capacity(
            rounded(self.instances, MIN_INSTANCES),
            max(images * height * width, rounded(self.mask_pixels, 1)),
            (min(side, height), min(side, width)),
        )


def rounded(count: int, least: int) -> int:
    """Return the next power of two, or the least that is wanted."""
    return max(least, 1 << (count - 1).bit_length())


@dataclass(frozen=True)
class Instances:
    """What is on B images, each with room for the same number G of instances.

    Attributes:
        boxes: (B, G, 4) float32, x1 y1 x2 y2; zeros where there is no instance.
        labels: (B, G) int64, 0 where there is no instance.
        windows: (B, G, 4) int64, x y width height of the part of the image that holds the mask.
        starts: (B, G) int64, where the window's pixels begin in `mask_pixels`.
        mask_pixels: (P,) uint8, 0 or 1, of all windows.
        counts: how many there are on each image.
        window: height and width of a window that each fits into.
    """

    boxes: Tensor
    labels: Tensor
    windows: Tensor
    starts: Tensor
    mask_pixels: Tensor
    counts: tuple[int, ...]
    window: tuple[int, int]

    @classmethod
    def of(cls, targets: Sequence[Target], device: torch.device, room: "Capacity | None" = None) -> "Instances":
        """Return the targets of a batch on the device, with room for as many as there are or as is said."""
        counts = tuple(len(target["boxes"]) for target in targets)
        room = room or Capacity.of(targets)
        boxes = torch.zeros(len(targets), room.instances, 4)
        numbers = torch.zeros(len(targets), room.instances, 6, dtype=torch.int64)
        pixels = torch.zeros(room.mask_pixels, dtype=torch.uint8)
        end = 0
        for at, (target, count) in enumerate(zip(targets, counts, strict=True)):
            areas = target["windows"][:, 2] * target["windows"][:, 3]
            boxes[at, :count] = target["boxes"]
            numbers[at, :count, 0] = target["labels"]
            numbers[at, :count, 1:5] = target["windows"]
            numbers[at, :count, 5] = areas.cumsum(0) - areas + end
            start, end = end, end + len(target["mask_pixels"])
            pixels[start:end] = target["mask_pixels"]
        boxes, numbers, pixels = (upload(one, device) for one in (boxes, numbers, pixels))
        return cls(boxes, numbers[..., 0], numbers[..., 1:5], numbers[..., 5], pixels, counts, room.window)


def mask_targets(instances: Instances, image_of: Tensor, of_instance: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Return what the mask head should give for each of M boxes: (M, side, side) float32, 0 to 1.

    The same as `rcnn_losses.mask_targets`, by torchvision's own RoIAlign: each instance's window is laid out so that it
    ends where the picture ends that RoIAlign is given, at the right and below. A window ends in empty pixels or with
    its image; so what RoIAlign finds at the edge and beyond is what it would find in the image.

    Args:
        instances: what is on the images.
        image_of: (M,) int64, which image each box lies on.
        of_instance: (M,) int64, and which of its instances.
        boxes: (M, 4) float32, x1 y1 x2 y2 in pixels of the images, on which they lie.
        side: rows and columns of the result.
    """
    high, wide = instances.window
    rows, columns = (torch.arange(edge, device=boxes.device) for edge in (high, wide))
    chunk = max(1, MAX_MASK_PIXELS // (high * wide))
    parts = []
    for start in range(0, len(boxes), chunk):
        of = image_of[start : start + chunk], of_instance[start : start + chunk]
        x, y, width, height = instances.windows[of].unbind(1)
        down, right = high - height, wide - width
        row, column = rows - down[:, None], columns - right[:, None]
        inside = (row >= 0)[:, :, None] & (column >= 0)[:, None]
        first = instances.starts[of][:, None] + row.clamp(min=0) * width[:, None]
        places = first[:, :, None] + column.clamp(min=0)[:, None]
        crops = torch.where(inside, instances.mask_pixels[places], 0).float()[:, None]
        corner = torch.stack((x - right, y - down) * 2, dim=1)
        number = torch.arange(len(x), device=boxes.device)[:, None]
        rois = torch.cat((number, boxes[start : start + chunk] - corner), dim=1)
        parts.append(roi_align(crops, rois, (side, side), 1.0, -1)[:, 0])
    return torch.cat(parts)
