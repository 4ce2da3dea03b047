"""Scale images with more than 8 bits to 0 to 255, with one pair of levels for a whole data set.

A 10-, 12- or 14-bit camera writes 16-bit files whose upper 8 bits are nearly black. No file format says how many bits
are used, but the values of all images together do. The levels are stored in `dataset_info.json`, and in the checkpoint
of a network that was trained with them.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from flawmask import images
from flawmask.coco import CocoSplit
from flawmask.data import dataset_info
from flawmask.errors import FlawmaskError, ImageError
from flawmask.files import read_json
from flawmask.images import UPPER_BITS, Levels
from flawmask.launch import usable_cores
from flawmask.progress import track
from flawmask.settings import Settings

log = logging.getLogger(__name__)

IntensityRule = Literal["auto", "8", "10", "12", "14", "16", "percentile"]

BITS = (8, 10, 12, 14, 16)
"""The usual bit depths of cameras. `auto` uses the smallest one that holds all values."""

PERCENTILES = (0.5, 99.5)
"""The percentiles of all values of all images that become black and white with the rule `percentile`."""

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class IntensitySettings(Settings):
    """How images with more than 8 bits are scaled to 0 to 255."""

    intensity: IntensityRule = "auto"
    """Bit depth of images with more than 8 bits; auto detects it. percentile: drop the darkest and brightest 0.5 %."""


def of_bits(bits: int) -> Levels:
    """Return the levels that keep the upper 8 of this many bits."""
    return 0, 2**bits - 1


def of_images(rule: IntensityRule, paths: Sequence[Path], what: str) -> Levels:
    """Return the levels for a set of images, and log them with the reason, unless all images have 8 bits.

    Args:
        rule: the value of `--intensity`.
        paths: the images. Unreadable ones are skipped here; they are reported when they are used.
        what: the name of the data set, for the log.
    """
    if rule not in ("auto", "percentile"):
        return of_bits(int(rule))
    counts, used = np.zeros(65536, np.int64), 0
    with ThreadPoolExecutor(usable_cores()) as pool:
        for of_image in track(pool.map(_counts, paths), "range of grey", total=len(paths)):
            if of_image is not None:
                counts, used = counts + of_image, used + 1
    if not used:
        return UPPER_BITS
    levels, why = (_by_percentiles if rule == "percentile" else _by_bits)(counts)
    log.info(
        "%s: %d of %d images hold more than 8 bits, %s: %d to %d become 0 to 255 (--intensity changes this)",
        what,
        used,
        len(paths),
        why,
        *levels,
    )
    return levels


def _by_bits(counts: Counts) -> tuple[Levels, str]:
    brightest = int(np.flatnonzero(counts)[-1])
    bits = next(bits for bits in BITS if brightest < 2**bits)
    return of_bits(bits), f"their highest value {brightest} needs {bits}"


def _by_percentiles(counts: Counts) -> tuple[Levels, str]:
    share = 100 * counts.cumsum() / counts.sum()
    low, high = (int(np.searchsorted(share, percentile)) for percentile in PERCENTILES)
    high = min(max(high, low + 255), 65535)  # at least 256 values, since scaling up a smaller range adds no detail
    return (min(low, high - 255), high), f"{PERCENTILES[0]} % of their values are lower and as many higher"


def _counts(path: Path) -> Counts | None:
    """Return how often each 16-bit value occurs in an image.

    Returns None if the image cannot be read or has 8 bits. 8-bit images are not decoded.
    """
    try:
        if not images.exceeds_8_bits(path):
            return None
        return np.bincount(images.read_pixels(path).ravel(), minlength=65536)
    except ImageError:
        return None


def of_dataset(rule: IntensityRule, splits: Sequence[CocoSplit]) -> Levels:
    """Return the levels for splits of a COCO folder.

    They are those in its `dataset_info.json`, if there are any and the rule is the same. Otherwise `of_images` finds
    them. Variants made by augmentation are ignored.

    Args:
        rule: the value of `--intensity`.
        splits: the splits, at least one.
    """
    folder = splits[0].folder.parent
    stored = _stored_levels(folder / dataset_info.NAME)
    if stored is not None and rule in ("auto", stored[0]):
        return stored[1]
    paths = [split.image_path(image) for split in splits for image in split.images if "augmentation" not in image]
    return of_images(rule, paths, str(folder))


def to_json(rule: IntensityRule, levels: Levels) -> dict[str, Any]:
    """Return the entry of `dataset_info.json` for the levels."""
    return {"rule": rule, "levels": list(levels)}


def _stored_levels(path: Path) -> tuple[str, Levels] | None:
    info = read_json(path) if path.is_file() else None
    stored = info.get("intensity") if isinstance(info, dict) else None
    if stored is None:
        return None
    try:
        low, high = (int(level) for level in stored["levels"])
        return str(stored["rule"]), (low, high)
    except (KeyError, TypeError, ValueError):
        raise FlawmaskError(f"{path} is damaged: its `intensity` is {stored!r}; prepare the data set anew") from None
