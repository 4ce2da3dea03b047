"""What the graphs of all networks share when they are exported: images as they come in, suppression, detections.

A graph is a network of plain layers and operators that every runtime has. Everything has the same number of rows for
each image of a batch, and empty rows have the score `EMPTY`. So the only numbers that depend on the predictions are
those of the regions of a pyramid level and of the detections at the end.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms, roi_align

from flawmask.model.architecture import Proportional
from flawmask.model.layers import CELLS
from flawmask.model.spec import ModelSpec

EMPTY = -1.0
"""The score of a row that holds no instance. All others have scores from 0 to 1."""


class Batch(NamedTuple):
    """Images as a network sees them.

    Attributes:
        pixels: (B, 3, H, W) float32, 0 to 1, with padding of zeros at the right and below.
        inside: (1, 1, H, W) float32, 1 in the image and 0 in the padding.
        size: (4,) float32, width, height, width, height of the resized image, without padding.
        ratio: (4,) float32, pixels of the original per pixel of the resized image, as `layers.to_pixels` returns it.
    """

    pixels: Tensor
    inside: Tensor
    size: Tensor
    ratio: Tensor


class Detections(NamedTuple):
    """The instances of a batch of B images, with D rows for each image.

    Attributes:
        boxes: (B, D, 4) float32, x1 y1 x2 y2 in pixels of the resized image.
        scores: (B, D) float32, 0 to 1; `EMPTY` for empty rows.
        labels: (B, D) int64.
        rows: (B, D) int64, the place of each among the candidates; 0 for empty rows.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    rows: Tensor


def batch_of(images: Tensor, spec: ModelSpec) -> Batch:
    """Return images as a network sees them.

    Args:
        images: (B, H, W, 3) uint8 RGB, at their own size.
        spec: of the network.
    """
    height, width = images.shape[1:3]
    rows, columns = resized_shape(spec, height, width)
    pixels = interpolated(interpolated(images.float(), 1, rows), 2, columns).round().permute(0, 3, 1, 2) / 255
    inside = pixels.new_ones((1, 1, rows, columns))
    size = _tensor(columns, rows, columns, rows)
    if isinstance(spec.architecture.size, Proportional):
        stride = spec.architecture.size.stride
        padding = (0, -columns % stride, 0, -rows % stride)
        pixels, inside = F.pad(pixels, padding), F.pad(inside, padding)
    return Batch(pixels, inside, size, _tensor(width, height, width, height) / size)


def resized_shape(spec: ModelSpec, height: Any, width: Any) -> tuple[Any, Any]:
    """Return what `ModelSpec.resized` returns. While a graph is exported, sizes are tensors."""
    if spec.fixed_size is not None:
        return spec.fixed_size, spec.fixed_size
    height, width, one = torch.as_tensor(height), torch.as_tensor(width), torch.ones((), dtype=torch.int64)
    shorter, longer = torch.minimum(height, width), torch.maximum(height, width)
    rows, columns = (
        torch.maximum(torch.minimum(side * spec.image_size // shorter, side * spec.max_size // longer), one)
        for side in (height, width)
    )
    return rows, columns


def at_most(limit: int, count: Any) -> Any:
    """Return the smaller one. While a graph is exported, `count` is a tensor."""
    return (
        torch.minimum(torch.as_tensor(count), torch.tensor(limit)) if isinstance(count, Tensor) else min(limit, count)
    )


def _tensor(*values: Any) -> Tensor:
    return torch.stack([torch.as_tensor(value).float() for value in values])


def interpolated(values: Tensor, axis: int, length: Any, of: Any = None) -> Tensor:
    """Return the values resized along one axis, as `images.resize` does it.

    This is no Resize operator, because runtimes compute its positions in other ways than PyTorch does.

    Args:
        values: of any shape.
        axis: to resize along.
        length: how many values there shall be.
        of: how many of the old values they are of, from the first one, perhaps with a fraction; by default all.
    """
    before = values.shape[axis]
    scale = torch.as_tensor(before if of is None else of).float() / torch.as_tensor(length).float()
    at = (scale * (torch.arange(length, dtype=torch.float32) + 0.5) - 0.5).clamp(min=0)
    last = torch.as_tensor(before) - 1
    low = torch.minimum(at.to(torch.int64), last)
    high = torch.minimum(low + 1, last)
    shape = [1] * values.ndim
    shape[axis] = -1
    fraction = (at - low).view(shape)
    return values.index_select(axis, low) * (1 - fraction) + values.index_select(axis, high) * fraction


@torch.library.custom_op("flawmask::suppress", mutates_args=())
def suppress(boxes: Tensor, scores: Tensor, iou: float, floor: float) -> Tensor:
    """Return the boxes that non-maximum suppression keeps: (K, 3) int64, the image, the class and the box of each.

    Args:
        boxes: (B, N, 4) float32, x1 y1 x2 y2.
        scores: (B, C, N) float32.
        iou: if two boxes of a class have a larger IoU, the one with the lower score is suppressed.
        floor: boxes that score at most this are dropped first.
    """
    kept = []
    for image, of_classes in enumerate(scores):
        for label, of_boxes in enumerate(of_classes):
            (above,) = torch.where(of_boxes > floor)
            chosen = above[nms(boxes[image, above], of_boxes[above], iou)]
            kept.append(
                torch.stack((chosen.new_full(chosen.shape, image), chosen.new_full(chosen.shape, label), chosen))
            )
    return torch.cat(kept, 1).T.contiguous()


def best_of(
    boxes: Tensor, scores: Tensor, labels: Tensor, classes: int, iou: float, floor: float, limit: int
) -> Detections:
    """Return the highest-scoring boxes of each image that non-maximum suppression keeps, the best first.

    Args:
        boxes: (B, N, 4) float32, x1 y1 x2 y2.
        scores: (B, N) float32; `EMPTY` for boxes that do not count.
        labels: (B, N) int64, from 0. Boxes suppress only those with the same label.
        classes: the number of labels.
        iou: see `suppress`.
        floor: see `suppress`.
        limit: the number of rows for each image. `Detections.rows` counts the N boxes.
    """
    images, count = scores.shape
    is_label = labels[:, None] == torch.arange(classes)[:, None]
    kept = suppress(boxes, torch.where(is_label, scores[:, None], EMPTY), iou, floor)
    place = kept[:, 0] * count + kept[:, 2]
    flat = scores.reshape(-1)
    only = torch.full_like(flat, EMPTY).scatter(0, place, flat.index_select(0, place)).view(images, count)
    best, rows = F.pad(only, (0, limit), value=EMPTY).topk(limit, dim=1)  # there may be fewer boxes than rows
    rows = torch.where(best > EMPTY, rows, 0)
    return Detections(taken(boxes, rows), best, labels.gather(1, rows), rows)


def taken(values: Tensor, rows: Tensor) -> Tensor:
    """Return some rows of each image's values: (B, N, K) and (B, D) to (B, D, K)."""
    return values.gather(1, rows[..., None].expand(-1, -1, values.shape[-1]))


def clipped(boxes: Tensor, batch: Batch) -> Tensor:
    """Return (B, N, 4) boxes without their parts outside the image."""
    return torch.minimum(boxes.clamp(min=0), batch.size)


def found(detections: Detections, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the K rows that hold an instance, image after image.

    Returns:
        What `build.Detector.graph` says: boxes, labels, scores and images. And (K,) int64, the `rows` of `detections`.
    """
    count = detections.scores.shape[1]
    places = (detections.scores.reshape(-1) > EMPTY).nonzero().view(-1)
    boxes = detections.boxes.reshape(-1, 4).index_select(0, places) * batch.ratio
    each = (detections.labels, detections.scores, detections.rows)
    labels, scores, rows = (one.reshape(-1).index_select(0, places) for one in each)
    return boxes, labels, scores, places // count, rows


def cut_out(values: Tensor, places: Tensor, scale: float) -> Tensor:
    """Return the values in boxes, (K, C, 28, 28), as networks with masks of the whole image cut out theirs.

    Args:
        values: (B, C, H, W) float32.
        places: (K, 5) float32, the image of each box, and x1 y1 x2 y2.
        scale: cells of `values` per unit of the boxes.
    """
    inside: Tensor = roi_align(values, places, CELLS, scale, aligned=True)
    return inside.nan_to_num()  # in an empty box, OpenVINO divides by 0 samples where torchvision returns 0


def anchors_at(places: Tensor, cells: Tensor, grid: Any, padded: Any) -> Tensor:
    """Return some of the anchors that torchvision's `AnchorGenerator` makes for a level: (B, N) to (B, N, 4) float32.

    Args:
        places: (B, N) int64, their places among all anchors of the level, row by row, cell by cell.
        cells: (A, 4) float32, the anchors of a cell around its corner.
        grid: rows and columns of the level.
        padded: height and width of the padded images.
    """
    count = len(cells)
    across, down = (torch.as_tensor(padded[at]) // torch.as_tensor(grid[at]) for at in (1, 0))
    row, column = places // (grid[1] * count), places // count % grid[1]
    x, y = column * across, row * down
    return torch.stack((x, y, x, y), dim=2) + cells[places % count]


class Normalise(nn.Module):
    """torchvision's normalisation. Padding is 0 after it."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: Sequence[float], deviation: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("deviation", torch.tensor(deviation)[:, None, None])

    def forward(self, batch: Batch) -> Tensor:
        """Return the network's input, (B, 3, H, W) float32."""
        return (batch.pixels - self.mean) / self.deviation * batch.inside
