"""Copy-paste: the defects of one training image are pasted into another one, together with their masks.

Few parts have defects, and a network learns these parts by heart instead of their defects. Pasted, a defect lies on the
ground of other parts, good ones among them. The method follows Ghiasi et al., "Simple Copy-Paste is a Strong Data
Augmentation Method for Instance Segmentation", CVPR 2021. Edges are smooth, as in Dwibedi et al., "Cut, Paste and
Learn", ICCV 2017, so that a network cannot learn the seam.
"""

from typing import NamedTuple

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

MAX_GAIN = 2.0
"""A defect is pasted only where the ground is at most so many times as bright or as dark as its own."""

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

    A defect keeps its size and its pixels. Only its brightness is adapted, per channel, to the ground around it. It
    lies at about the same place of the image as before. If it reaches an edge of the image, it stays there. If one
    image is wide and the other tall, the source is transposed. An image with a pasted defect is no longer good: its
    instance of class good is left out.

    A defect is left out if it covers more than `MAX_SHARE` of its image, does not fit into the target, would touch
    another defect there, or would lie on ground of another brightness (`MAX_GAIN`).

    Args:
        target: the image to paste into, which is changed in place.
        source: the image with the defects.
        draw: decides the places.
    """
    image, masks, names = target
    others, kinds = list(masks), list(names)
    if (source.image.shape[0] > source.image.shape[1]) != (image.shape[0] > image.shape[1]):
        source = Shown(source.image.transpose(1, 0, 2), source.masks.transpose(0, 2, 1), source.names)
    for mask, name in zip(source.masks, source.names, strict=True):
        if name == GOOD or not 0 < mask.mean() <= MAX_SHARE:
            continue
        part = _with_margin(mask)
        patch, outline = source.image[part], mask[part]
        free = np.array(image.shape[:2]) - outline.shape
        if free.min() < 0:
            continue
        y, x = np.rint(free * _place(part, mask.shape, draw)).astype(int).tolist()
        window = slice(y, y + outline.shape[0]), slice(x, x + outline.shape[1])
        moved = np.zeros(image.shape[:2], bool)
        moved[window] = outline
        near = cv2.dilate(moved.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
        if any((near & other).any() for other, kind in zip(others, kinds, strict=True) if kind != GOOD):
            continue
        blended = _blended(image[window], patch, outline)
        if blended is None:
            continue
        image[window] = blended
        others.append(moved)
        kinds.append(name)
    if len(kinds) > len(names):
        kept = [at for at, kind in enumerate(kinds) if kind != GOOD]
        others, kinds = [others[at] for at in kept], [kinds[at] for at in kept]
    return Shown(image, np.array(others, bool).reshape(-1, *image.shape[:2]), kinds)


def _with_margin(mask: npt.NDArray[np.bool_]) -> tuple[slice, slice]:
    """Return rows and columns of a mask's box, enlarged by ground around it within the image."""
    x, y, width, height = box_of(mask)
    margin = max(MIN_MARGIN, max(width, height) // 4)
    rows = slice(max(0, y - margin), min(mask.shape[0], y + height + margin))
    return rows, slice(max(0, x - margin), min(mask.shape[1], x + width + margin))


def _place(part: tuple[slice, slice], size: tuple[int, ...], draw: np.random.Generator) -> npt.NDArray[np.float64]:
    """Return a place near that of `part`, a window of an image of `size`: for rows and columns, 0 to 1 of the free way.

    In a direction in which the window reaches an edge, it stays there.
    """
    places = []
    for one, side in zip(part, size, strict=True):
        free = side - (one.stop - one.start)
        shift = draw.uniform(-SHIFT, SHIFT)
        at = one.start / free if free else 0.5
        places.append(float(np.clip(at + shift, 0, 1)) if 0 < one.start < free else at)
    return np.array(places)


def _blended(
    ground: npt.NDArray[np.uint8], patch: npt.NDArray[np.uint8], outline: npt.NDArray[np.bool_]
) -> npt.NDArray[np.uint8] | None:
    """Return a window of the target with the defect in it; None if the brightness of the ground differs too much.

    Args:
        ground: (height, width, 3), the window.
        patch: (height, width, 3), the defect with the ground around it.
        outline: (height, width), the defect's mask.
    """
    gain = (ground[~outline].mean(axis=0) + 1) / (patch[~outline].mean(axis=0) + 1)
    if gain.max() > MAX_GAIN or gain.min() < 1 / MAX_GAIN:
        return None
    rim = max(1, round(RIM * max(box_of(outline)[2:])))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * rim + 1, 2 * rim + 1))
    share = cv2.GaussianBlur(cv2.dilate(outline.astype(np.float32), disc), (0, 0), max(0.7, rim / 2))
    share = np.where(outline, 1, share)[..., None]
    mixed = share * patch * gain + (1 - share) * ground
    return np.asarray(np.clip(np.rint(mixed), 0, 255), np.uint8)
