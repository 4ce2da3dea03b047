"""What the network learns of one image, at the size at which it sees it; masks never leave their boxes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pycocotools import mask as rle_tools
from torch import Tensor

from flawmask import masks
from flawmask.coco import Record, instance_rles, one_by_one
from flawmask.masks import Mask
from flawmask.model.layers import upload

Target = dict[str, Tensor]
"""What is on one image, with N instances:

`boxes` (N, 4) float32, x1 y1 x2 y2 in pixels of the resized image, along the outer edges of the masks;
`labels` (N,) int64; `image_id` (1,) int64;
`windows` (N, 4) int64, x y width height of the part of the resized image that holds an instance's mask;
`mask_pixels` (P,) uint8, 0 or 1: the windows' pixels row by row, one window after the other.
"""


def make_target(
    annotations: Sequence[Record],
    labels: dict[int, int],
    image_id: int,
    original: tuple[int, int],
    resized: tuple[int, int],
    where: str,
) -> Target:
    """Return the target of an image.

    An image without annotations has N = 0 and is as good an example as any. A crowd is a region that nobody outlined
    one by one, and an empty mask none at all: there is no instance to learn.

    Args:
        annotations: the image's.
        labels: the network's label of each category id.
        image_id: the image's.
        original: the image's height and width.
        resized: height and width at which the network sees it.
        where: names the image in an error.

    Raises:
        FlawmaskError: a segmentation cannot be used.
    """
    height, width = original
    down, across = resized[0] / height, resized[1] / width
    single = one_by_one(annotations)
    boxes, kept, windows, pixels = [], [], [], []
    for record, rle in zip(single, instance_rles(single, height, width, where), strict=True):
        # A box alone may lie between pixels: its mask is what it touches.
        x, y, wide, high = record["bbox"] if record.get("is_box") else rle_tools.toBbox(rle).tolist()
        if not wide or not high:
            continue
        boxes.append([x * across, y * down, (x + wide) * across, (y + high) * down])
        kept.append(labels[record["category_id"]])
        crop, left, top = resized_mask(record["segmentation"], rle, original, resized)
        windows.append([left, top, crop.shape[1], crop.shape[0]])
        pixels.append(crop.ravel())
    flat = np.concatenate(pixels) if pixels else np.zeros(0, dtype=bool)
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(kept, dtype=torch.int64),
        "windows": torch.tensor(windows, dtype=torch.int64).reshape(-1, 4),
        "mask_pixels": torch.from_numpy(flat.astype(np.uint8)),
        "image_id": torch.tensor([image_id], dtype=torch.int64),
    }


def resized_mask(
    segmentation: masks.Segmentation, rle: Record, original: tuple[int, int], resized: tuple[int, int]
) -> tuple[Mask, int, int]:
    """Return an instance's mask at another size of its image, (rows, columns) bool, cut to a window, and the window's
    corner (x, y) in pixels of that size.

    A pixel is set where its centre lies on the mask. Between the mask and the window's edges lies at least one empty
    row or column, but at the image's own edges: so a bilinear look-up finds in the window what it finds in the image.

    Args:
        segmentation: the mask as COCO writes it.
        rle: the same as compressed RLE; it is not empty.
        original: height and width of the image that it belongs to.
        resized: height and width wanted.
    """
    down, across = resized[0] / original[0], resized[1] / original[1]
    x, y, wide, high = rle_tools.toBbox(rle).tolist()
    left, top = max(int(x * across) - 1, 0), max(int(y * down) - 1, 0)
    right, bottom = min(int((x + wide) * across) + 2, resized[1]), min(int((y + high) * down) + 2, resized[0])
    size = (bottom - top, right - left)
    if isinstance(segmentation, list):
        moved: list[Any] = [
            np.asarray(ring, dtype=np.float64).reshape(-1, 2) * (across, down) - (left, top) for ring in segmentation
        ]
        crop = masks.decode([ring.ravel().tolist() for ring in moved], *size)
    else:
        whole = masks.decode(rle, *original)
        rows = _centres(top, bottom, original[0], resized[0])
        crop = whole[np.ix_(rows, _centres(left, right, original[1], resized[1]))]
    if not crop.any():  # thinner than a pixel: keep those that it runs through
        crop = _touched(masks.decode(rle, *original), (left, top, right, bottom), (down, across))
    return crop, left, top


def _centres(start: int, end: int, original: int, resized: int) -> npt.NDArray[np.int64]:
    """Return the pixel of the original side in which the centre of each pixel of the resized one, from start to end,
    lies. In whole numbers: a centre on the line between two pixels must not be rounded to either."""
    return (2 * np.arange(start, end) + 1) * original // (2 * resized)


def _touched(mask: Mask, window: tuple[int, int, int, int], scales: tuple[float, float]) -> Mask:
    """Return the pixels of the window that any pixel of the mask, each taken at its centre, falls into."""
    left, top, right, bottom = window
    rows, columns = np.nonzero(mask)
    crop = np.zeros((bottom - top, right - left), dtype=bool)
    crop[((rows + 0.5) * scales[0]).astype(int) - top, ((columns + 0.5) * scales[1]).astype(int) - left] = True
    return crop


def crops(target: Target) -> list[Tensor]:
    """Return each instance's mask inside its window, (height, width) uint8."""
    sizes = target["windows"][:, 2:].tolist()
    parts = torch.split(target["mask_pixels"], [wide * high for wide, high in sizes])
    return [part.view(high, wide) for part, (wide, high) in zip(parts, sizes, strict=True)]


def to_device(target: Target, device: torch.device) -> Target:
    """Return the target with its tensors on the device; windows and ids stay, since only Python looks at them."""
    return {
        name: tensor if name in ("windows", "image_id") else upload(tensor, device) for name, tensor in target.items()
    }
