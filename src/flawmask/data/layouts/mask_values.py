"""Masks with more grey levels than black and white: rules for reading them, and counts of their levels."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flawmask.errors import ImageError
from flawmask.images import Pixels, read_pixels
from flawmask.launch import usable_cores
from flawmask.masks import Mask

LOSSY = frozenset({".jpg", ".jpeg"})
"""Suffixes of files with lossy compression, in which black may have noise."""


def not_black(pixels: Pixels) -> Mask:
    """Return (height, width) bool: True where a channel is above 0."""
    return np.asarray(_grey(pixels) > 0)


def of_values(pixels: Pixels, values: Sequence[int]) -> Mask:
    """Return (height, width) bool: True where the brightest channel has one of the values."""
    return np.isin(_grey(pixels), values)


def _grey(pixels: Pixels) -> npt.NDArray[np.uint8] | npt.NDArray[np.uint16]:
    return pixels.max(axis=2) if pixels.ndim == 3 else pixels


def counts_of(paths: Iterable[Path]) -> list[dict[int, int]]:
    """Return, for each mask, its values with their numbers of pixels.

    An unreadable mask gives an empty dictionary; it is reported when it is used. The files are read on all cores, and a
    file that has not changed is read once.
    """
    with ThreadPoolExecutor(usable_cores()) as pool:
        return list(pool.map(_counts, paths))


def are_black(paths: Iterable[Path]) -> list[bool]:
    """Return, for each mask, whether it can be read and marks nothing."""
    paths = list(paths)
    brightest = [max(counts, default=None) for counts in counts_of(paths)]
    limits = [127 if path.suffix.lower() in LOSSY else 0 for path in paths]
    return [value is not None and value <= limit for value, limit in zip(brightest, limits, strict=True)]


def _counts(path: Path) -> dict[int, int]:
    try:
        status = path.stat()
        return _counts_of_version(path, status.st_mtime_ns, status.st_size)
    except (ImageError, OSError):
        return {}


@cache
def _counts_of_version(path: Path, mtime: int, size: int) -> dict[int, int]:
    """Return the counts of one version of a file. Time and size identify the version in the cache."""
    values, counts = np.unique(_grey(read_pixels(path)), return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))
