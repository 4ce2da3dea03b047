"""What a person can look at while a network learns: the batches it is shown, their labels, and what it finds."""

import io
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from PIL import Image

from flawmask import images
from flawmask.coco import GOOD, CocoSplit, Record
from flawmask.draw import (
    TRUTH,
    Colour,
    Picture,
    box_labels,
    contact_sheet,
    fit,
    fit_mask,
    outline,
)
from flawmask.files import write_bytes
from flawmask.inference.overlay import truth_beside_prediction
from flawmask.inference.predictor import detect
from flawmask.model.build import Detector
from flawmask.model.spec import TORCHVISION_ANCHORS, ModelSpec
from flawmask.model.targets import Target, crops
from flawmask.training.curves import COLOURS, write_figure
from flawmask.training.loader import Batch

BATCHES = 3
"""How many batches `train_batch.jpg` shows."""

MOST_OF_A_BATCH = 8
"""How many images of a batch are shown: they stand in one row."""

SHEET_WIDTH, LARGEST_CELL = 1920, 480
"""Of `train_batch.jpg`, in pixels."""

CLASS_COLOURS: tuple[Colour, ...] = (TRUTH, (0, 114, 178), (230, 159, 0), (204, 121, 167), (86, 180, 233))
"""Of the defect classes, over and over; Okabe and Ito's."""

GOOD_COLOUR: Colour = (160, 160, 160)

EXAMPLES = 4
"""How many validation images are drawn after each epoch."""

GRID = 50
"""Rows and columns of the heat map of positions."""

MOST_CLASSES = 15
"""How many classes have a bar of their own."""


def draw_train_batch(network: Any, detector: Detector, batches: Iterable[Batch], split: CocoSplit, path: Path) -> None:
    """Write the first three batches as the network sees them: resized, padded, with masks, boxes and classes.

    Padding has the colour that the network takes for nothing: the mean of the images it was first trained on.

    Args:
        network: whose view is shown; its weights take no part.
        detector: the functions for its kind.
        batches: what it learns from, as the loader gives it.
        split: what the batches were made of.
        path: where the JPEG goes.
    """
    names = {image["id"]: str(image["file_name"]) for image in split.images}
    shown: list[tuple[Picture, Target, str]] = []
    for number, batch in enumerate(islice(batches, BATCHES), start=1):
        for picture, target in _seen(network, detector, batch):
            shown.append((picture, target, f"batch {number}: {Path(names[int(target['image_id'])]).name}"))
    # A later batch may be smaller, and is the last then.
    columns = sum(caption.startswith("batch 1:") for *_, caption in shown)
    width = min(LARGEST_CELL, SHEET_WIDTH // columns)
    tallest = max(picture.shape[0] / picture.shape[1] for picture, *_ in shown)
    cell = (width, max(1, round(width * min(tallest, 2.0))))
    pictures = [_labelled(picture, target, split.class_names, cell) for picture, target, _ in shown]
    sheet = contact_sheet(pictures, columns, cell, [caption for *_, caption in shown])
    jpeg = io.BytesIO()
    Image.fromarray(sheet).save(jpeg, "JPEG", quality=90, subsampling=0)  # halved colours would blur the outlines
    write_bytes(path, jpeg.getvalue())


def _seen(network: Any, detector: Detector, batch: Batch) -> list[tuple[Picture, Target]]:
    """Return the first images of the batch, padded as the network sees them, with their targets."""
    colours = detector.seen(network, batch.images[:MOST_OF_A_BATCH]).clamp(0, 1) * 255
    pictures = colours.round().byte().permute(0, 2, 3, 1).numpy()
    return list(zip(pictures, batch.targets, strict=False))


def _labelled(picture: Picture, target: Target, classes: tuple[str, ...], cell: tuple[int, int]) -> Picture:
    """Return the picture at the size of the cell with each instance's box and class, and each defect's mask."""
    drawn = fit(picture, *cell)
    scale = drawn.shape[1] / picture.shape[1]
    names = [classes[int(label) - 1] for label in target["labels"]]
    corners = [tuple(round(float(corner) * scale) for corner in box) for box in target["boxes"]]
    for name, crop, (left, top, *_) in zip(names, crops(target), target["windows"].tolist(), strict=True):
        if name != GOOD:  # the whole image as a rule, which would grey it all
            mask = np.zeros(picture.shape[:2], dtype=bool)
            mask[top : top + crop.shape[0], left : left + crop.shape[1]] = crop.numpy() > 0
            drawn = outline(drawn, fit_mask(mask, *cell), _colour(name, classes))
    drawn = drawn.copy()
    for name, (left, top, right, bottom) in zip(names, corners, strict=True):
        cv2.rectangle(drawn, (left, top), (right - 1, bottom - 1), _colour(name, classes))
    for one in sorted(set(names)):  # tags last, so that nothing runs over them
        places = [(name, left, top) for name, (left, top, *_) in zip(names, corners, strict=True) if name == one]
        drawn = box_labels(drawn, places, _colour(one, classes))
    return drawn


def _colour(name: str, classes: tuple[str, ...]) -> Colour:
    if name == GOOD:
        return GOOD_COLOUR
    defects = [one for one in classes if one != GOOD]
    return CLASS_COLOURS[defects.index(name) % len(CLASS_COLOURS)]


def draw_predictions(network: Any, spec: ModelSpec, split: CocoSplit, conf: float = 0.5) -> dict[str, Picture]:
    """Return truth beside prediction by file name, for the same few images each time: up to four with a defect.

    Args:
        network: what predicts; it is left in evaluation mode.
        spec: what it was built from.
        split: where the images are; one without a defect gives some of its good images.
        conf: the score from which on an instance is drawn.
    """
    network.eval()
    shown = [image for image in split.images if split.is_defective(image)] or list(split.images)
    places = np.linspace(0, len(shown) - 1, min(EXAMPLES, len(shown))).round().astype(int)
    return {str(shown[place]["file_name"]): _predicted(network, spec, split, shown[place], conf) for place in places}


def _predicted(network: Any, spec: ModelSpec, split: CocoSplit, image: Record, conf: float) -> Picture:
    pixels = images.read_image(split.image_path(image))
    prediction = detect(network, spec, pixels)
    found = prediction.defects(conf)
    title = f"{len(found)} found from {conf:g} on, best score {prediction.verdict(conf).score:.2f}"
    captions = f"truth: {image.get('defect_type', 'as marked')}", title
    return truth_beside_prediction(split, image, pixels, found, captions)


@dataclass(frozen=True)
class Labels:
    """The defect instances of a split in figures; `good` is none, and neither is a crowd.

    Attributes:
        counts: instances by class, the most frequent first; every defect class is there.
        per_image: (images,) int64, how many instances each image has.
        sizes: (N,) float64, the square root of each box's area in pixels of the image as the network sees it.
        aspects: (N,) float64, each box's width over its height.
        coverage: (GRID, GRID) float64, the share of the boxes that reach into each cell of the image, its sides
            taken as 1; row 0 is the top. All 0 where there is no box.
    """

    counts: dict[str, int]
    per_image: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.float64]
    aspects: npt.NDArray[np.float64]
    coverage: npt.NDArray[np.float64]


def measure_labels(split: CocoSplit, spec: ModelSpec) -> Labels:
    """Return the figures of a split's labels, from their boxes; a box that is not four numbers or is empty is left out.

    Args:
        split: what is measured.
        spec: the network, whose resizing decides how large an instance is.
    """
    names = {category["id"]: str(category["name"]) for category in split.categories}
    counts = Counter({names[number]: 0 for number in sorted(split.defect_ids)})
    per_image, sizes, aspects = [], [], []
    coverage = np.zeros((GRID, GRID))
    for image in split.images:
        width, height = image["width"], image["height"]
        high, wide = spec.scales(height, width)
        found = [one for one in split.defects(image) if not one.get("iscrowd") and _is_box(one["bbox"])]
        per_image.append(len(found))
        for one in found:
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
    """Return whether it is four finite numbers with something between them: programs also write `[]`."""
    if not isinstance(box, list) or len(box) != 4:
        return False
    return all(isinstance(side, int | float) and math.isfinite(side) for side in box) and min(box[2:]) > 0


def _cells(start: float, length: float, side: int) -> slice:
    """Return the rows or columns of the grid that an extent reaches into."""
    return slice(max(0, math.floor(GRID * start / side)), max(0, math.ceil(GRID * (start + length) / side)))


def draw_labels(split: CocoSplit, spec: ModelSpec, path: Path) -> None:
    """Write what the labels of a split are like as a PNG: classes, instances per image, sizes, aspects, positions.

    Args:
        split: what is drawn, its defect classes alone.
        spec: the network, to whose anchors the sizes are compared.
        path: where the PNG goes.
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
    if len(bars) > MOST_CLASSES:
        rest = bars[MOST_CLASSES - 1 :]
        bars = [*bars[: MOST_CLASSES - 1], (f"{len(rest)} others", sum(count for _, count in rest))]
    places = range(len(bars))
    drawn = axes.barh(places, [count for _, count in bars], color=COLOURS[0], height=0.7)
    axes.bar_label(drawn, [f"{count:,}" for _, count in bars], padding=3)
    axes.set_yticks(places, [name if len(name) <= 24 else f"{name[:23]}…" for name, _ in bars])
    axes.set_ylim(max(len(bars), 3) - 0.5, -0.5)  # one class alone is a bar, not a wall
    axes.margins(x=0.2)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_title("Instances per class")


def _plot_per_image(axes: Axes, per_image: npt.NDArray[np.int64]) -> None:
    found = per_image[per_image > 0]
    most = int(found.max(initial=1))
    counts = np.arange(1, most + 2)
    if most > 30:  # one crowded image must not press all others into one bar
        counts = np.unique(np.geomspace(1, most + 1, 30).round().astype(int))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
    axes.hist(found, bins=(counts - 0.5).tolist(), color=COLOURS[0], rwidth=0.85)
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
    """Return how many edges a histogram has: more for more values, as many as can be told apart at most."""
    return int(np.clip(2 * math.sqrt(len(values)), 12, 50)) + 1
