"""Pictures of predictions, at a size that suits a screen."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from flawmask.coco import CocoSplit, Record, instance_rles
from flawmask.draw import (
    PREDICTION,
    TRUTH,
    Colour,
    box_labels,
    fit,
    fit_rle,
    outline,
    side_by_side,
    title_bar,
)
from flawmask.fonts import first_writable

if TYPE_CHECKING:
    from flawmask.prediction import Instance

Image = npt.NDArray[np.uint8]

SHORTEST_SIDE, LONGEST_SIDE = 400, 1600
"""In pixels. Small pictures are enlarged so that text on them is readable; large ones are shrunk to fit a screen."""


def viewing_size(image: Image, panels: int = 1) -> tuple[int, int]:
    """Return the width and height in pixels at which to draw an image. They keep its proportions.

    Args:
        image: (height, width, 3) uint8 RGB.
        panels: how many images stand side by side in the picture.
    """
    height, width = image.shape[:2]
    longest = LONGEST_SIDE // panels - 20  # room for the title above and the gap between
    scale = min(max(1.0, SHORTEST_SIDE / min(height, width)), longest / max(height, width))
    return max(1, round(width * scale)), max(1, round(height * scale))


def draw_instances(image: Image, instances: "Sequence[Instance]", colour: Colour, size: tuple[int, int]) -> Image:
    """Return the image with each instance outlined, and tagged with class and score where there is room.

    The result is (height, width, 3) uint8 RGB of the given size.

    Args:
        image: (height, width, 3) uint8 RGB; it may be a smaller picture of the predicted image.
        instances: the predicted instances, the highest score first.
        colour: RGB of outlines and tags.
        size: the width and height in pixels to draw at, with the image's proportions.
    """
    drawn = fit(image, *size)
    corners = []
    for one in instances:
        drawn = outline(drawn, fit_rle(one.rle, *size), colour)
        scale = size[0] / one.rle["size"][1]
        corners.append((round(one.box[0] * scale), round(one.box[1] * scale)))
    texts = [first_writable(f"{one.label} {one.score:.2f}", f"{one.score:.2f}") for one in instances]
    labels = [(text, x, y) for text, (x, y) in zip(texts, corners, strict=True)]
    return box_labels(drawn, labels, colour)  # tags come last, so that no outline covers one


def truth_beside_prediction(
    split: CocoSplit, image: Record, pixels: Image, predicted: "Sequence[Instance]", captions: tuple[str, str]
) -> Image:
    """Return a picture of an image with its true defects beside one with its predicted defects, each with a caption.

    The result is (height, width, 3) uint8 RGB.

    Args:
        split: the split of the image.
        image: the image's record.
        pixels: (height, width, 3) uint8 RGB.
        predicted: the predicted instances to draw, the highest score first.
        captions: for the left and the right picture.
    """
    size = viewing_size(pixels, panels=2)
    left = fit(pixels, *size)
    height, width = pixels.shape[:2]
    for rle in instance_rles(split.defects(image), height, width, str(split.image_path(image))):
        left = outline(left, fit_rle(rle, *size), TRUTH)
    right = draw_instances(pixels, predicted, PREDICTION, size)
    return side_by_side(title_bar(left, captions[0]), title_bar(right, captions[1]))
