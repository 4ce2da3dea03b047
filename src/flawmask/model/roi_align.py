"""RoIAlign that keeps all cores of a CPU busy, forwards and backwards, and asks a GPU nothing."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops import roi_align as torchvision_roi_align

from flawmask.model.layers import padded_shape

NOWHERE = -1e4
"""Where boxes are put that are not pooled from a level: every sample there lies outside and counts nothing."""


class PyramidRoIAlign(MultiScaleRoIAlign):  # type: ignore[misc]  # torchvision has no types
    """torchvision's `MultiScaleRoIAlign`, computed as suits the device.

    A bin of RoIAlign (He et al., "Mask R-CNN", ICCV 2017) is a weighted sum of cells of the feature map, and a weighted
    sum of rows of a table is what `embedding_bag` computes: vectorised over the channels, on all cores of a CPU.
    torchvision's own kernel runs on one core, channel by channel; backwards it takes ten times as long
    (docs/benchmarks.md).

    On other devices that kernel is fast, but picking out the boxes of each level means to ask the device how many there
    are. So each level is asked for all boxes, those of the others being nowhere, and the levels are added up.

    Takes features of any floating type and returns float32: in bfloat16, gradients of overlapping regions would not
    add up.
    """

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Return (N, channels, height, width) float32 of the N boxes of all images, in their order."""
        rois = torch.cat(boxes)
        image_of = torch.cat([one.new_full((len(one),), at, dtype=torch.int64) for at, one in enumerate(boxes)])
        return self.pool(self.levels_of(x), rois, image_of, image_shapes)

    def levels_of(self, x: dict[str, Tensor]) -> list[Tensor]:
        """Return the levels that boxes are pooled from, in float32 and laid out as `pool` wants them: copied once."""
        levels = [x[name] for name in self.featmap_names if name in x]
        if levels[0].device.type == "cpu":
            return [level.float() for level in levels]
        return [level.to(torch.float32, memory_format=torch.contiguous_format) for level in levels]

    def pool(self, levels: list[Tensor], rois: Tensor, image_of: Tensor, image_shapes: list[tuple[int, int]]) -> Tensor:
        """Return (N, channels, height, width) float32.

        Args:
            levels: as `levels_of` returns them.
            rois: (N, 4) x1 y1 x2 y2 in pixels of the images as the network sees them.
            image_of: (N,) int64, which image of the batch each lies on.
            image_shapes: height and width of each image, without padding.
        """
        scales = [_scale(level, image_shapes) for level in levels]
        level_of = self._level_of(rois, scales)
        if rois.device.type != "cpu":
            return self._pool_each(levels, rois, image_of, scales, level_of)
        order = torch.argsort(level_of, stable=True)
        bins = []
        for number, (features, scale) in enumerate(zip(levels, scales, strict=True)):
            chosen = order[level_of[order] == number]
            bins.append(
                roi_align(features, rois[chosen], image_of[chosen], self.output_size, scale, self.sampling_ratio)
            )
        in_order = torch.empty_like(order)
        in_order[order] = torch.arange(len(order))
        return torch.cat(bins)[in_order].permute(0, 3, 1, 2)

    def _pool_each(
        self, levels: list[Tensor], rois: Tensor, image_of: Tensor, scales: list[float], level_of: Tensor
    ) -> Tensor:
        """Return what `pool` does, with nothing whose size depends on which box is pooled from where."""
        parts = []
        for number, (features, scale) in enumerate(zip(levels, scales, strict=True)):
            here = torch.where((level_of == number)[:, None], rois, NOWHERE)
            placed = torch.cat((image_of[:, None].to(rois.dtype), here), dim=1)
            parts.append(torchvision_roi_align(features, placed, self.output_size, scale, self.sampling_ratio))
        pooled: Tensor = parts[0]
        for part in parts[1:]:
            pooled = pooled + part
        return pooled

    def _level_of(self, rois: Tensor, scales: list[float]) -> Tensor:
        """Return which level each box is pooled from: eq. 1 of Lin et al., "Feature Pyramid Networks", CVPR 2017."""
        sides = ((rois[:, 2] - rois[:, 0]) * (rois[:, 3] - rois[:, 1])).sqrt()
        wanted = torch.floor(self.canonical_level + torch.log2(sides / self.canonical_scale) + 1e-6)
        first, last = -math.log2(scales[0]), -math.log2(scales[-1])
        return wanted.clamp(first, last).to(torch.int64) - round(first)


def _scale(level: Tensor, image_shapes: list[tuple[int, int]]) -> float:
    """Return by how much, a power of two, the level is smaller than the images.

    Levels are those of images that are padded. torchvision takes their heights without padding, by which the levels of
    images less than 68 pixels high may come out two or four times too large.
    """
    height, _ = padded_shape(image_shapes)
    return 2.0 ** round(math.log2(level.shape[-2] / height))


def roi_align(
    features: Tensor, rois: Tensor, image_of: Tensor, size: tuple[int, int], scale: float, samples: int
) -> Tensor:
    """Return (K, height, width, channels), each bin the mean of `samples` x `samples` bilinear samples.

    The same as `torchvision.ops.roi_align(..., aligned=False)`, its axes in another order.

    Args:
        features: (B, channels, H, W); laid out channels-last, nothing is copied.
        rois: (K, 4) x1 y1 x2 y2 in pixels of the image.
        image_of: (K,) int64, which image of the batch each lies on.
        size: rows and columns of bins.
        scale: of the features against the image.
        samples: per bin and axis, 1 or more.
    """
    _, channels, height, width = features.shape
    x1, y1, x2, y2 = (rois * scale).unbind(dim=1)
    rows, row_weights = _samples(y1, y2, size[0], height, samples)
    columns, column_weights = _samples(x1, x2, size[1], width, samples)
    image_rows = image_of[:, None, None] * height + rows
    cells = image_rows[:, :, None, :, None] * width + columns[:, None, :, None, :]
    weights = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
    table = features.permute(0, 2, 3, 1).reshape(-1, channels)
    in_bin = 4 * samples * samples
    pooled = F.embedding_bag(
        cells.reshape(-1, in_bin), table, per_sample_weights=weights.reshape(-1, in_bin), mode="sum"
    )
    return pooled.view(-1, *size, channels)


def _samples(start: Tensor, end: Tensor, bins: int, limit: int, samples: int) -> tuple[Tensor, Tensor]:
    """Return the cells along one axis that each bin draws on, and their weights: (K, bins, 2 x samples) each.

    A sample beyond a cell outside the map counts nothing; one closer takes the cell at the edge.
    """
    steps = (torch.arange(bins * samples, dtype=start.dtype) + 0.5) / samples
    at = start[:, None] + steps * ((end - start).clamp(min=1.0) / bins)[:, None]
    counts = (at >= -1.0) & (at <= limit)
    at = at.clamp(0, limit - 1)
    low = at.to(torch.int64)
    high = (low + 1).clamp(max=limit - 1)
    share = at - low
    weights = torch.stack((1 - share, share), dim=-1) * (counts[..., None] / samples)
    return torch.stack((low, high), dim=-1).view(-1, bins, 2 * samples), weights.view(-1, bins, 2 * samples)
