"""Copy-paste: the defects of one training image are pasted into another one, together with their masks.

Few parts have defects, and a network learns these parts by heart instead of their defects. Pasted, a defect lies on the
ground of other parts, good ones among them. The method follows Ghiasi et al., "Simple Copy-Paste is a Strong Data
Augmentation Method for Instance Segmentation", CVPR 2021. Edges are smooth, as in Dwibedi et al., "Cut, Paste and
Learn", ICCV 2017, so that a network cannot learn the seam.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from flawmask.good_names import GOOD
from flawmask.masks import box_of

MAX_SHARE = 0.1
"""The largest share of its image that a pasted defect covers. A larger one is often a change of the whole ground, such
as uneven grinding, and its seam would be what the network learns (docs/results.md)."""

SHIFT = 0.15
"""A defect is pasted at about its own place: in each direction, this share of the free way is the largest change."""

PLACES = 8
"""So many places are tried. The one whose ground is most like the defect's own is taken."""

MAX_GAIN = 2.0
"""A defect is pasted only where the ground is at most so many times as bright or as dark as its own."""

MAX_DIFFERENCE = 0.3
"""A defect is pasted only where the ground differs from its own, made as bright, by at most this share of the
brightness, as the mean over the pixels around the defect. Otherwise defects of a part would be pasted beside it."""

MIN_MARGIN = 4
"""Pixels of ground around a defect that are looked at; a quarter of its longer side if that is more."""

RIM = 0.06
"""The width of the smooth seam around a defect, as a share of its longer side."""


class Shown(NamedTuple):
    """An image with its instances.

    Attributes:
        image: (height, width, 3) uint8 RGB.
        masks: (N, height, width) bool.
        names: the N class names.
    """

    image: npt.NDArray[np.uint8]
    masks: npt.NDArray[np.bool_]
    names: list[str]


def pasted(target: Shown, source: Shown, draw: np.random.Generator) -> Shown:
    """Return the target with the defects of the source.

    A defect keeps its size and its pixels. Only its brightness is adapted to the ground around it. Of
    `PLACES` places near its own, it gets the one with the most similar ground. If it reaches an edge of the image, it
    stays there. If one image is wide and the other tall, the source is transposed. An image with a pasted defect is no
    longer good: its instance of class good is left out.

    A defect is not pasted if it covers more than `MAX_SHARE` of its image, or if at none of the places it fits into
    the target, touches no other defect and has similar ground (`MAX_GAIN`, `MAX_DIFFERENCE`).

    Args:
        target: the image to paste into, which is changed in place.
        source: the image with the defects.
        draw: decides the places.
    """
    image, masks, names = target
    if (source.image.shape[0] > source.image.shape[1]) != (image.shape[0] > image.shape[1]):
        source = Shown(source.image.transpose(1, 0, 2), source.masks.transpose(0, 2, 1), source.names)
    defective, taken = _union(source), _union(target)
    new: list[tuple[npt.NDArray[np.bool_], str]] = []
    for mask, name in zip(source.masks, source.names, strict=True):
        if name == GOOD or not 0 < mask.mean() <= MAX_SHARE:
            continue
        part = _with_margin(mask)
        patch, outline, own_ground = source.image[part], mask[part], ~defective[part]
        around = cv2.dilate(outline.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
        best, smallest = None, MAX_DIFFERENCE
        for window in _places(part, mask.shape, image.shape, draw):
            if (taken[window] & around).any():
                continue
            ground = own_ground & ~taken[window]
            gain, difference = _fit(image[window][ground], patch[ground])
            if difference <= smallest:
                best, smallest = (window, ground, gain), difference
        if best is None:
            continue
        window, ground, gain = best
        image[window] = _blended(image[window], patch * gain, outline, ground)
        taken[window] |= outline
        moved = np.zeros_like(taken)
        moved[window] = outline
        new.append((moved, name))
    if not new:
        return target
    kept = [at for at, name in enumerate(names) if name != GOOD]
    stack = np.concatenate([masks[kept], np.array([mask for mask, _ in new])])
    return Shown(image, stack, [*(names[at] for at in kept), *(name for _, name in new)])


def _union(shown: Shown) -> npt.NDArray[np.bool_]:
    """Return the pixels of all defects of an image, (height, width)."""
    is_defect = [name != GOOD for name in shown.names]
    return np.asarray(shown.masks[is_defect].any(axis=0))


def _with_margin(mask: npt.NDArray[np.bool_]) -> tuple[slice, slice]:
    """Return rows and columns of a mask's box, enlarged by ground around it within the image."""
    x, y, width, height = box_of(mask)
    margin = max(MIN_MARGIN, max(width, height) // 4)
    rows = slice(max(0, y - margin), min(mask.shape[0], y + height + margin))
    return rows, slice(max(0, x - margin), min(mask.shape[1], x + width + margin))


def _places(
    part: tuple[slice, slice], size: tuple[int, ...], new_size: tuple[int, ...], draw: np.random.Generator
) -> Iterator[tuple[slice, slice]]:
    """Yield windows of an image of `new_size`, near the place that `part` has in an image of `size`.

    In a direction in which the part reaches an edge, it stays there. If it does not fit, there are no windows.
    """
    for _ in range(PLACES):
        window = []
        for one, side, new_side in zip(part, size, new_size, strict=False):
            length = one.stop - one.start
            free, new_free = side - length, new_side - length
            if new_free < 0:
                return
            shift = draw.uniform(-SHIFT, SHIFT) if 0 < one.start < free else 0.0
            start = round(new_free * min(max(one.start / max(free, 1) + shift, 0.0), 1.0))
            window.append(slice(start, start + length))
        yield window[0], window[1]


def _fit(ground: npt.NDArray[np.uint8], own: npt.NDArray[np.uint8]) -> tuple[float, float]:
    """Return the gain that makes a defect's own ground as bright as other ground, and how much the two differ then, as
    a share of the brightness; infinite beyond `MAX_GAIN` and without pixels. Another colour counts as a difference.

    Args:
        ground: (N, 3), pixels of the target.
        own: (N, 3), the pixels around the defect that come to lie there.
    """
    if not len(own):
        return 1.0, np.inf
    brightness = float(ground.mean()) + 1
    gain = brightness / (float(own.mean()) + 1)
    if not 1 / MAX_GAIN <= gain <= MAX_GAIN:
        return gain, np.inf
    return gain, float(np.abs(own * gain - ground).mean()) / brightness


def _blended(
    window: npt.NDArray[np.uint8],
    patch: npt.NDArray[np.floating[Any]],
    outline: npt.NDArray[np.bool_],
    ground: npt.NDArray[np.bool_],
) -> npt.NDArray[np.uint8]:
    """Return a window of the target with the defect in it.

    Args:
        window: (height, width, 3).
        patch: (height, width, 3), the defect with the ground around it, made as bright as the window.
        outline: (height, width), the defect's mask.
        ground: (height, width), the pixels around it where neither image has a defect. Only they get the seam.
    """
    rim = max(1, round(RIM * max(box_of(outline)[2:])))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * rim + 1, 2 * rim + 1))
    share = cv2.GaussianBlur(cv2.dilate(outline.astype(np.float32), disc), (0, 0), max(0.7, rim / 2))
    share = np.where(outline, 1, share * ground)[..., None]
    return np.asarray(np.clip(np.rint(share * patch + (1 - share) * window), 0, 255), np.uint8)
