"""Find duplicate images: files with the same bytes, and files with other bytes that show the same picture."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from flawmask.draw import Picture

DESCRIPTOR_SIDE = 64  # pixels
DESCRIPTOR_SIGMA = 2.0  # of the blur that is subtracted, in pixels of the small picture
BLOCK = 1024  # compare this many images with as many others at a time
MIN_CORRELATION = 0.98
"""The correlation of two descriptors (see `descriptor_of`) above which two images count as the same picture.

It was measured on MVTec AD bottle (17 images), magnetic tile (400 of its 938) and the demo category (360 images, 3
products). A picture and its JPEG of quality 95, or its copy made 1 % brighter, always correlate at 0.998 or more. A
picture and its JPEG of quality 75 correlate at 0.99 or more in 95 % of cases. Two different bottles correlate at 0.964
at most, and two different demo parts at 0.971. (A 256-bit DCT hash does not separate them: a JPEG of quality 75 differs
from its source in up to 16 bits, but two different demo parts only in 10.)
"""

Descriptor = npt.NDArray[np.float16]
"""An image descriptor: (4096,) float16; see `descriptor_of`."""


@dataclass(frozen=True)
class Compared:
    """The data of an image that is compared with others.

    Attributes:
        digest: the SHA-256 of the file.
        descriptor: the image descriptor.
        split: the image's split.
        variant: whether the image was made by augmentation.
    """

    digest: str
    descriptor: Descriptor
    split: str
    variant: bool


def descriptor_of(image: Picture) -> Descriptor:
    """Return an image descriptor: (4096,) float16, with length 1. The dot product of two is their correlation.

    The descriptor is a small, high-pass filtered picture. Well-aligned product photos share their coarse shapes and
    lighting and differ in detail, so a blurred copy is subtracted. An image without detail gives a shorter vector,
    which is similar to no other.
    """
    # Use float32: rounding to whole grey levels would destroy the little detail of a dark image.
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    small = cv2.resize(grey, (DESCRIPTOR_SIDE, DESCRIPTOR_SIDE), interpolation=cv2.INTER_AREA)
    detail = small - cv2.GaussianBlur(small, (0, 0), DESCRIPTOR_SIGMA)
    detail -= detail.mean()
    return (detail / max(float(np.linalg.norm(detail)), 1.0)).ravel().astype(np.float16)


def exact_duplicates(digests: Sequence[str]) -> list[list[int]]:
    """Return the indices of each digest that occurs more than once, in the order of first occurrence."""
    indices: dict[str, list[int]] = defaultdict(list)
    for index, digest in enumerate(digests):
        indices[digest].append(index)
    return [same for same in indices.values() if len(same) > 1]


def near_duplicates(images: Sequence[Compared]) -> list[tuple[int, int]]:
    """Return index pairs (later, earlier) of images that look the same but have different bytes.

    Each image is paired only with the first similar image in its own split and the first one in another split. So for
    n copies of one picture, the list grows with n and not with n squared. Comparing block by block needs only tens of
    MB of memory.
    """
    if not images:
        return []
    descriptors = np.stack([each.descriptor for each in images])
    _, digest = np.unique([each.digest for each in images], return_inverse=True)
    _, split = np.unique([each.split for each in images], return_inverse=True)
    variant = np.array([each.variant for each in images])
    first: dict[tuple[int, bool], int] = {}
    for top in range(0, len(images), BLOCK):
        a = np.arange(top, min(top + BLOCK, len(images)))[:, None]
        rows = descriptors[top : top + BLOCK].astype(np.float32)
        for left in range(top, len(images), BLOCK):
            b = np.arange(left, min(left + BLOCK, len(images)))[None, :]
            similar = (
                (rows @ descriptors[left : left + BLOCK].astype(np.float32).T >= MIN_CORRELATION)
                & (a < b)
                & (digest[a] != digest[b])
            )
            across = split[a] != split[b]
            # Within a split, a variant is expected to look like its source.
            for pairs in (similar & across, similar & ~across & ~(variant[a] | variant[b])):
                for column in np.flatnonzero(pairs.any(axis=0)):
                    row = int(np.argmax(pairs[:, column]))
                    first.setdefault((left + int(column), bool(across[row, column])), top + row)
    return sorted((later, earlier) for (later, _), earlier in first.items())
