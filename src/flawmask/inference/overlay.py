"""Pictures of what was found."""

from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt

from flawmask.draw import Colour, box_label, outline
from flawmask.inference.predictor import Instance

Image = npt.NDArray[np.uint8]

LONGEST_SIDE = 1600
"""Pictures to look through are not made larger than this, in pixels."""


def draw_instances(image: Image, instances: Sequence[Instance], colour: Colour) -> Image:
    """Return the image, (height, width, 3) uint8 RGB, with each instance outlined and tagged with class and score."""
    for instance in instances:
        image = outline(image, instance.mask, colour)
    for instance in instances:  # tags last, so that no outline runs over one
        image = box_label(image, f"{instance.label} {instance.score:.2f}", *map(round, instance.box[:2]), colour)
    return image


def shrink(image: Image) -> Image:
    """Return the image no larger than `LONGEST_SIDE` on either side."""
    height, width = image.shape[:2]
    scale = LONGEST_SIDE / max(height, width)
    if scale >= 1:
        return image
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
