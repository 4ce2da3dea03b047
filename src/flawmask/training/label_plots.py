"""`labels.png`: plots of a training split: classes, instances per image, sizes, aspect ratios and positions."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from flawmask.coco import CocoSplit
from flawmask.model.spec import TORCHVISION_ANCHORS, ModelSpec
from flawmask.training.curves import COLOURS, write_figure

GRID = 50
"""Rows and columns of the heat map of positions."""

MAX_CLASSES = 15
"""The largest number of bars. If there are more classes, the rest share the last bar."""


@dataclass(frozen=True)
class Labels:
    """Statistics of the defect instances of a split. The class `good` and crowds do not count.

    Attributes:
        counts: instances by class, the most frequent first; every defect class is listed.
        per_image: (images,) int64, the number of instances of each image.
        sizes: (N,) float64, the square root of each box's area in pixels of the resized image.
        aspects: (N,) float64, each box's width divided by its height.
        coverage: (GRID, GRID) float64, the share of the boxes that reach into each cell of a grid over the image;
            row 0 is the top. All 0 where there is no box.
    """

    counts: dict[str, int]
    per_image: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.float64]
    aspects: npt.NDArray[np.float64]
    coverage: npt.NDArray[np.float64]


def measure_labels(split: CocoSplit, spec: ModelSpec) -> Labels:
    """Return the statistics of a split's boxes. Empty boxes, and boxes that are not four numbers, are left out.

    Args:
        split: the split to measure.
        spec: of the network; its resizing decides the instances' sizes.
    """
    names = {category["id"]: str(category["name"]) for category in split.categories}
    counts = Counter({names[number]: 0 for number in sorted(split.defect_ids)})
    per_image, sizes, aspects = [], [], []
    coverage = np.zeros((GRID, GRID))
    for image in split.images:
        width, height = image["width"], image["height"]
        high, wide = spec.scales(*((height, width) if spec.tile is None else (spec.tile, spec.tile)))
        defects = [one for one in split.defects(image) if not one.get("iscrowd") and _is_box(one["bbox"])]
        per_image.append(len(defects))
        for one in defects:
            x, y, across, down = one["bbox"]
            counts[names[one["category_id"]]] += 1
            sizes.append(math.sqrt(wide * across * high * down))
            aspects.append(wide * across / (high * down))
            coverage[_cells(y, down, height), _cells(x, across, width)] += 1
    return Labels(
        counts=dict(counts.most_common()),
        per_image=np.array(per_image, dtype=np.int64),
        sizes=np.array(sizes, dtype=np.float64),
        aspects=np.array(aspects, dtype=np.float64),
        coverage=coverage / max(1, len(sizes)),
    )


def _is_box(box: Any) -> bool:
    """Return whether this is a box of four finite numbers with a positive width and height. Some tools write `[]`."""
    if not isinstance(box, list) or len(box) != 4:
        return False
    return all(isinstance(side, int | float) and math.isfinite(side) for side in box) and min(box[2:]) > 0


def _cells(start: float, length: float, side: int) -> slice:
    """Return the rows or columns of the grid that an interval reaches into."""
    return slice(max(0, math.floor(GRID * start / side)), max(0, math.ceil(GRID * (start + length) / side)))


def draw_labels(split: CocoSplit, spec: ModelSpec, path: Path) -> None:
    """Write the statistics of a split's labels as a PNG: classes, instances per image, sizes, aspects, positions.

    Args:
        split: the split to draw; only its defect classes are shown.
        spec: of the network; its anchor sizes are drawn beside the instances' sizes.
        path: the PNG to write.
    """
    labels = measure_labels(split, spec)
    figure = Figure(figsize=(16, 7), layout="constrained")
    axes = figure.subplot_mosaic(
        [["counts", "per_image", "positions"], ["sizes", "aspects", "positions"]], width_ratios=(1, 1, 1.5)
    )
    defective = int((labels.per_image > 0).sum())
    figure.suptitle(
        f"{split.name}: images {len(labels.per_image):,}, with a defect {defective:,}, instances {len(labels.sizes):,}"
    )
    _plot_counts(axes["counts"], labels.counts)
    _plot_per_image(axes["per_image"], labels.per_image)
    _plot_sizes(axes["sizes"], labels.sizes, spec)
    _plot_aspects(axes["aspects"], labels.aspects)
    _plot_positions(axes["positions"], labels.coverage)
    write_figure(figure, path)


def _plot_counts(axes: Axes, counts: dict[str, int]) -> None:
    bars = list(counts.items())
    if len(bars) > MAX_CLASSES:
        rest = bars[MAX_CLASSES - 1 :]
        bars = [*bars[: MAX_CLASSES - 1], (f"{len(rest)} others", sum(count for _, count in rest))]
    places = range(len(bars))
    drawn = axes.barh(places, [count for _, count in bars], color=COLOURS[0], height=0.7)
    axes.bar_label(drawn, [f"{count:,}" for _, count in bars], padding=3)
    axes.set_yticks(places, [name if len(name) <= 24 else f"{name[:23]}…" for name, _ in bars])
    axes.set_ylim(max(len(bars), 3) - 0.5, -0.5)  # keep a single bar narrow
    axes.margins(x=0.2)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_title("Instances per class")


def _plot_per_image(axes: Axes, per_image: npt.NDArray[np.int64]) -> None:
    defective = per_image[per_image > 0]
    largest = int(defective.max(initial=1))
    counts = np.arange(1, largest + 2)
    if largest > 30:  # with linear bins, one crowded image would put all others into one bar
        counts = np.unique(np.geomspace(1, largest + 1, 30).round().astype(int))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
    axes.hist(defective, bins=(counts - 0.5).tolist(), color=COLOURS[0], rwidth=0.85)
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set(title="Instances per image with a defect", xlabel="instances", ylabel="images")


def _plot_sizes(axes: Axes, sizes: npt.NDArray[np.float64], spec: ModelSpec) -> None:
    anchors = spec.anchor_sizes if spec.architecture.has_anchor_sizes else ()
    ends = np.append(sizes, anchors) if anchors or len(sizes) else np.array(TORCHVISION_ANCHORS)
    low, high = (ends.min(), ends.max()) if ends.min() < ends.max() else (ends[0] / 2, 2 * ends[0])
    axes.hist(sizes, bins=np.geomspace(low, high, _bins(sizes)).tolist(), color=COLOURS[0])
    for place, anchor in enumerate(anchors):
        label = "anchor sizes" if place == 0 else None
        axes.axvline(anchor, color=COLOURS[1], linestyle="--", linewidth=1.2, label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    if anchors:
        axes.legend(fontsize="small")
    axes.set(title="Size", xlabel="√(box area), pixels of the resized image", ylabel="instances")


def _plot_aspects(axes: Axes, aspects: npt.NDArray[np.float64]) -> None:
    powers = np.log2(aspects)
    reach = max(2, math.ceil(np.abs(powers).max(initial=0)))
    axes.hist(powers, bins=np.linspace(-reach, reach, _bins(aspects) | 1).tolist(), color=COLOURS[0])
    step = math.ceil(reach / 3)
    ticks = range(-(reach // step) * step, reach + 1, step)
    axes.set_xticks(ticks, [f"{2 ** max(tick, 0)}:{2 ** max(-tick, 0)}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set(title="Aspect", xlabel="width : height of the box", ylabel="instances")


def _plot_positions(axes: Axes, coverage: npt.NDArray[np.float64]) -> None:
    drawn = axes.imshow(coverage, cmap="cividis", vmin=0, extent=(0, 1, 1, 0), interpolation="nearest")
    shares = FuncFormatter(lambda share, _: f"{100 * share:g} %")
    axes.figure.colorbar(drawn, ax=axes, shrink=0.75, format=shares, label="share of the instances")
    axes.set(title="Position: where the boxes lie", xlabel="x / image width", ylabel="y / image height")


def _bins(values: npt.NDArray[np.float64]) -> int:
    """Return how many bin edges a histogram has. More values get more bins, at most 50."""
    return int(np.clip(2 * math.sqrt(len(values)), 12, 50)) + 1
