"""RoIAlign that uses all cores of a CPU, forward and backward, and never waits for a GPU."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops import roi_align as torchvision_roi_align

from flawmask.model.layers import padded_shape

NOWHERE = -1e4
"""The coordinate to which boxes are moved for levels that they are not pooled from. All samples there count as 0."""


class PyramidRoIAlign(MultiScaleRoIAlign):  # type: ignore[misc]  # torchvision has no types
    """torchvision's `MultiScaleRoIAlign`, with a faster computation for each device.

    On a CPU, RoIAlign (He et al., "Mask R-CNN", ICCV 2017) is computed by `embedding_bag`. A bin of RoIAlign is a
    weighted sum of cells of the feature map, and `embedding_bag` computes weighted sums of the rows of a table. It is
    vectorised over the channels and runs on all cores. torchvision's own kernel runs on one core, channel by channel;
    its backward pass takes ten times as long (docs/benchmarks.md).

    On other devices, torchvision's kernel is fast. But to select the boxes of each level, the host would have to wait
    for their number. So all boxes are pooled from each level, after the boxes of other levels are moved outside
    (`NOWHERE`), and the results are added.

    The features may have any floating dtype. The result is float32, because sums of gradients of overlapping regions
    would lose too much in bfloat16.
    """

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Return the pooled features of the N boxes of all images, in order: (N, channels, height, width) float32."""
        rois = torch.cat(boxes)
        image_of = torch.cat([one.new_full((len(one),), at, dtype=torch.int64) for at, one in enumerate(boxes)])
        return self.pool(self.levels_of(x), rois, image_of, image_shapes)

    def levels_of(self, x: dict[str, Tensor]) -> list[Tensor]:
        """Return the levels that boxes are pooled from, in float32 and in the layout that `pool` needs."""
        levels = [x[name] for name in self.featmap_names if name in x]
        if levels[0].device.type == "cpu":
            return [level.float() for level in levels]
        return [level.to(torch.float32, memory_format=torch.contiguous_format) for level in levels]

    def pool(self, levels: list[Tensor], rois: Tensor, image_of: Tensor, image_shapes: list[tuple[int, int]]) -> Tensor:
        """Return the pooled features of the boxes: (N, channels, height, width) float32.

        Args:
            levels: as `levels_of` returns them.
            rois: (N, 4) x1 y1 x2 y2 in pixels of the resized images.
            image_of: (N,) int64, the image of each box.
            image_shapes: height and width of each image, without padding.
        """
        scales = [_scale(level, image_shapes) for level in levels]
        level_of = self.level_of(rois, scales)
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
        """Return the result of `pool`. No tensor's size depends on the level of each box."""
        parts = []
        for number, (features, scale) in enumerate(zip(levels, scales, strict=True)):
            here = torch.where((level_of == number)[:, None], rois, NOWHERE)
            placed = torch.cat((image_of[:, None].to(rois.dtype), here), dim=1)
            parts.append(torchvision_roi_align(features, placed, self.output_size, scale, self.sampling_ratio))
        pooled: Tensor = parts[0]
        for part in parts[1:]:
            pooled = pooled + part
        return pooled

    def level_of(self, rois: Tensor, scales: list[float]) -> Tensor:
        """Return the level of each box, by equation 1 of Lin et al., "Feature Pyramid Networks", CVPR 2017."""
        sides = ((rois[:, 2] - rois[:, 0]) * (rois[:, 3] - rois[:, 1])).sqrt()
        wanted = torch.floor(self.canonical_level + torch.log2(sides / self.canonical_scale) + 1e-6)
        first, last = -math.log2(scales[0]), -math.log2(scales[-1])
        return wanted.clamp(first, last).to(torch.int64) - round(first)


def _scale(level: Tensor, image_shapes: list[tuple[int, int]]) -> float:
    """Return the scale of a level relative to the images: a power of two.

    It is computed from the padded height. torchvision uses the height without padding, so its scale for images less
    than 68 pixels high may be two or four times too large.
    """
    height, _ = padded_shape(image_shapes)
    return 2.0 ** round(math.log2(level.shape[-2] / height))


def roi_align(
    features: Tensor, rois: Tensor, image_of: Tensor, size: tuple[int, int], scale: float, samples: int
) -> Tensor:
    """Return the pooled features, (K, height, width, channels). Each bin is the mean of `samples` x `samples` bilinear
    samples.

    The result is that of `torchvision.ops.roi_align(..., aligned=False)` with another order of axes.

    Args:
        features: (B, channels, H, W); in channels-last layout they are not copied.
        rois: (K, 4) x1 y1 x2 y2 in pixels of the image.
        image_of: (K,) int64, the image of each box.
        size: rows and columns of bins.
        scale: of the features relative to the image.
        samples: per bin and axis, at least 1.
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
    """Return the cells along one axis that each bin uses, and their weights: (K, bins, 2 x samples) each.

    A sample up to one cell outside the map takes the value of the cell at the edge. Samples further outside count as 0.
    """
    steps = (torch.arange(bins * samples, dtype=start.dtype) + 0.5) / samples
    at = start[:, None] + steps * ((end - start).clamp(min=1.0) / bins)[:, None]
    counts = (at >= -1.0) & (at <= limit)
    at = at.clamp(0, limit - 1)
    low = at.to(torch.int64)
    high = (low + 1).clamp(max=limit - 1)
    fraction = at - low
    weights = torch.stack((1 - fraction, fraction), dim=-1) * (counts[..., None] / samples)
    return torch.stack((low, high), dim=-1).view(-1, bins, 2 * samples), weights.view(-1, bins, 2 * samples)
