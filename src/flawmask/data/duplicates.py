"""Images that are there twice: files with the same bytes, and files with other bytes that show the same picture."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from flawmask.draw import Picture

LOOK_SIDE = 64  # pixels
LOOK_SIGMA = 2.0  # of the smoothing that is taken off, in those pixels
BLOCK = 1024  # images compared with as many others at a time
ALIKE = 0.98
"""Correlation of two looks (see `look_of`) from which two images count as one picture.

Measured on MVTec AD bottle (17 images), magnetic tile (400 of its 938) and the demo category (360, 3 products): a
picture against its own JPEG of quality 95, or its copy made 1 % brighter, correlates at 0.998 or more in every case;
against its JPEG of quality 75 at 0.99 or more in 95 % of cases. Two different bottles correlate at 0.964 at most, two
different demo parts at 0.971. (A DCT hash of 256 bits does not part them: JPEGs of quality 75 differ from their source
in up to 16 bits, two different demo parts in 10.)
"""

Look = npt.NDArray[np.float16]
"""What an image looks like: (4096,) float16, see `look_of`."""


@dataclass(frozen=True)
class Compared:
    """What two images are compared by.

    Attributes:
        digest: SHA-256 of the file.
        look: what the image looks like.
        split: the split it belongs to.
        variant: whether it was made from another image by augmentation.
    """

    digest: str
    look: Look
    split: str
    variant: bool


def look_of(image: Picture) -> Look:
    """Return what an image looks like: (4096,) float16 of length 1; the product of two is their correlation.

    The smoothed image is taken off, because well-aligned product photos share their coarse shapes and lighting and
    differ in detail. An image without detail gives a shorter vector and is like no other.
    """
    # As float32: rounded to whole grey levels, what little detail a dark image has would be lost in the rounding.
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    small = cv2.resize(grey, (LOOK_SIDE, LOOK_SIDE), interpolation=cv2.INTER_AREA)
    detail = small - cv2.GaussianBlur(small, (0, 0), LOOK_SIGMA)
    detail -= detail.mean()
    return (detail / max(float(np.linalg.norm(detail)), 1.0)).ravel().astype(np.float16)


def identical(digests: Sequence[str]) -> list[list[int]]:
    """Return the places of each digest that is there more than once, in the order in which they first occur."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, digest in enumerate(digests):
        places[digest].append(place)
    return [same for same in places.values() if len(same) > 1]


def alike(images: Sequence[Compared]) -> list[tuple[int, int]]:
    """Return pairs (later, earlier) of places in `images` that look alike and are not the same bytes.

    Each image is paired with the first it is like on its own split and the first on another, so that a data set of
    nothing but copies gives a long list and not a square one. Blocks keep the memory within tens of MB.
    """
    if not images:
        return []
    looks = np.stack([each.look for each in images])
    _, digest = np.unique([each.digest for each in images], return_inverse=True)
    _, split = np.unique([each.split for each in images], return_inverse=True)
    variant = np.array([each.variant for each in images])
    first: dict[tuple[int, bool], int] = {}
    for top in range(0, len(images), BLOCK):
        a = np.arange(top, min(top + BLOCK, len(images)))[:, None]
        rows = looks[top : top + BLOCK].astype(np.float32)
        for left in range(top, len(images), BLOCK):
            b = np.arange(left, min(left + BLOCK, len(images)))[None, :]
            alike = (
                (rows @ looks[left : left + BLOCK].astype(np.float32).T >= ALIKE) & (a < b) & (digest[a] != digest[b])
            )
            across = split[a] != split[b]
            # On one split a variant is meant to look like its source.
            for which in (alike & across, alike & ~across & ~(variant[a] | variant[b])):
                for column in np.flatnonzero(which.any(axis=0)):
                    row = int(np.argmax(which[:, column]))
                    first.setdefault((left + int(column), bool(across[row, column])), top + row)
    return sorted((later, earlier) for (later, _), earlier in first.items())
