"""Training targets: the instances of one image at the network's size. Masks are stored as small windows."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pycocotools import mask as rle_tools
from torch import Tensor

from flawmask import masks
from flawmask.coco import Record, instance_rles, without_crowds
from flawmask.masks import Mask
from flawmask.model.layers import upload

Target = dict[str, Tensor]
"""The training target of an image with N instances:

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

    An image without annotations has N = 0 and is a valid example. Crowds and empty masks are left out, because neither
    is an instance to learn from.

    Args:
        annotations: of the image.
        labels: the network's label of each category id.
        image_id: of the image.
        original: height and width of the image.
        resized: height and width of the resized image.
        where: the image's name for error messages.

    Raises:
        FlawmaskError: a segmentation cannot be used.
    """
    height, width = original
    down, across = resized[0] / height, resized[1] / width
    single = without_crowds(annotations)
    boxes, instance_labels, windows, pixels = [], [], [], []
    for record, rle in zip(single, instance_rles(single, height, width, where), strict=True):
        # A box without mask may have fractional corners. Its mask then covers all pixels that it touches.
        x, y, wide, high = record["bbox"] if record.get("is_box") else rle_tools.toBbox(rle).tolist()
        if not wide or not high:
            continue
        boxes.append([x * across, y * down, (x + wide) * across, (y + high) * down])
        instance_labels.append(labels[record["category_id"]])
        crop, left, top = resized_mask(record["segmentation"], rle, original, resized)
        windows.append([left, top, crop.shape[1], crop.shape[0]])
        pixels.append(crop.ravel())
    flat = np.concatenate(pixels) if pixels else np.zeros(0, dtype=bool)
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(instance_labels, dtype=torch.int64),
        "windows": torch.tensor(windows, dtype=torch.int64).reshape(-1, 4),
        "mask_pixels": torch.from_numpy(flat.astype(np.uint8)),
        "image_id": torch.tensor([image_id], dtype=torch.int64),
    }


def resized_mask(
    segmentation: masks.Segmentation, rle: Record, original: tuple[int, int], resized: tuple[int, int]
) -> tuple[Mask, int, int]:
    """Return an instance's mask for the resized image, cropped to a window.

    A pixel is set if its centre lies on the mask. The window has an empty margin of at least one row or column, except
    at the edges of the image. So bilinear samples of the window are equal to those of the whole mask.

    Args:
        segmentation: the mask as COCO writes it.
        rle: the same mask as compressed RLE; it is not empty.
        original: height and width of the original image.
        resized: height and width of the resized image.

    Returns:
        The window's mask, (rows, columns) bool, and the window's left and top edge in pixels of the resized image.
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
    if not crop.any():  # the mask is thinner than a pixel: keep the pixels that it touches
        crop = _touched(masks.decode(rle, *original), (left, top, right, bottom), (down, across))
    return crop, left, top


def _centres(start: int, end: int, original: int, resized: int) -> npt.NDArray[np.int64]:
    """Return for each pixel of a resized side, from start to end, the pixel of the original side that holds its centre.

    The computation is in integers, so that a centre exactly between two pixels has a well-defined result.
    """
    return (2 * np.arange(start, end) + 1) * original // (2 * resized)


def _touched(mask: Mask, window: tuple[int, int, int, int], scales: tuple[float, float]) -> Mask:
    """Return the pixels of the window that hold the centre of at least one pixel of the original mask."""
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
    """Return the target with its tensors on the device. Windows and ids stay on the CPU: only Python code uses them."""
    return {
        name: tensor if name in ("windows", "image_id") else upload(tensor, device) for name, tensor in target.items()
    }
