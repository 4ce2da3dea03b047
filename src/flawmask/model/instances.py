"""The instances of a batch in tensors whose sizes do not depend on the individual images."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import roi_align

from flawmask.model.layers import upload
from flawmask.model.targets import Target

MAX_MASK_PIXELS = 2**24
"""The most mask pixels that are unpacked at a time: 64 MiB for each of a few float32 tensors."""

MIN_INSTANCES, SMALLEST_WINDOW = 4, 64
"""The smallest capacities. Larger ones are rounded up to powers of two."""


@dataclass(frozen=True)
class Capacity:
    """The sizes of the tensors that hold a batch's instances.

    Attributes:
        instances: slots for instances per image.
        mask_pixels: slots for the mask pixels of all windows together.
        window: height and width of a window into which each instance's window fits.
    """

    instances: int
    mask_pixels: int
    window: tuple[int, int]

    @classmethod
    def of(cls, targets: Sequence[Target]) -> "Capacity":
        """Return the capacity that the targets need. It is at least 1, so that no tensor is empty."""
        windows = torch.cat([target["windows"] for target in targets])
        high, wide = (int(windows[:, at].max()) if len(windows) else 1 for at in (3, 2))
        pixels = sum(len(target["mask_pixels"]) for target in targets)
        return cls(max(1, *(len(target["boxes"]) for target in targets)), max(1, pixels), (high, wide))

    def rounded(self, images: int, height: int, width: int) -> "Capacity":
        """Return a capacity that is rounded up, so that batches of one size have few different capacities.

        Args:
            images: the number of images.
            height: of a padded image, in pixels.
            width: of a padded image, in pixels.
        """
        side = rounded(max(self.window), SMALLEST_WINDOW)
        return Capacity(
            rounded(self.instances, MIN_INSTANCES),
            max(images * height * width, rounded(self.mask_pixels, 1)),
            (min(side, height), min(side, width)),
        )


def rounded(count: int, smallest: int) -> int:
    """Return `count` rounded up to a power of two, and at least `smallest`."""
    return max(smallest, 1 << (count - 1).bit_length())


@dataclass(frozen=True)
class Instances:
    """The instances of B images. Each image has the same number G of slots.

    Attributes:
        boxes: (B, G, 4) float32, x1 y1 x2 y2; zeros in empty slots.
        labels: (B, G) int64, 0 in empty slots.
        windows: (B, G, 4) int64, x y width height of the part of the image that holds the mask.
        starts: (B, G) int64, the position in `mask_pixels` at which the window's pixels begin.
        mask_pixels: (P,) uint8, 0 or 1, of all windows.
        counts: the number of instances of each image.
        window: height and width of a window into which each instance's window fits.
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
        """Return the instances of a batch on the device. By default the capacity is just what the targets need."""
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
    """Return the mask head's target for each of M boxes: (M, side, side) float32, 0 to 1.

    The result is that of `rcnn_losses.mask_targets`, but computed by torchvision's own RoIAlign. Each instance's window
    is copied into the lower right corner of a crop, and RoIAlign samples the crop. A window ends either in empty pixels
    or at the edge of its image. So samples at the edge of the crop, and beyond it, are as in the image.

    Args:
        instances: of the images.
        image_of: (M,) int64, the image of each box.
        of_instance: (M,) int64, the instance of each box, as its number in that image.
        boxes: (M, 4) float32, x1 y1 x2 y2 in pixels of the image.
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
