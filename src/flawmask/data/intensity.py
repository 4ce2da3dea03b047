"""How values of more than 8 bits become the 0 to 255 that networks see: one pair of levels for a whole data set.

A camera of 10, 12 or 14 bits writes files of 16, whose upper 8 bits are then black or nearly so. What the file uses of
its 16 bits, no format says; the values of all images together do. Levels found once are kept: in `dataset_info.json`,
and in the checkpoint of a network that learned by them.
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
"""How many bits a camera has, as a rule: `auto` takes the first that holds all values."""

PERCENTILES = (0.5, 99.5)
"""Of all values of all images, the ones that become black and white by `percentile`."""

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class IntensitySettings(Settings):
    """How values of more than 8 bits become 0 to 255."""

    intensity: IntensityRule = "auto"
    """How many bits images of more than 8 use, of which networks see the upper 8; or percentile: what all but 0.5 % of
    the values lie between; auto: as many bits as all images together need. A line says which."""


def of_bits(bits: int) -> Levels:
    """Return the levels that keep the upper 8 of so many bits."""
    return 0, 2**bits - 1


def of_images(rule: IntensityRule, paths: Sequence[Path], what: str) -> Levels:
    """Return the levels for a set of images, and say in a line what they are and why, unless all have 8 bits.

    Args:
        rule: as `--intensity` has it.
        paths: the images. One that cannot be read is left to whoever reads it for good.
        what: what they are, for the line.
    """
    if rule not in ("auto", "percentile"):
        return of_bits(int(rule))
    counts, deep = np.zeros(65536, np.int64), 0
    with ThreadPoolExecutor(usable_cores()) as pool:
        for one in track(pool.map(_counts, paths), "range of grey", total=len(paths)):
            if one is not None:
                counts, deep = counts + one, deep + 1
    if not deep:
        return UPPER_BITS
    levels, why = (_by_percentiles if rule == "percentile" else _by_bits)(counts)
    log.info(
        "%s: %d of %d images hold more than 8 bits, %s: %d to %d become 0 to 255 (--intensity says otherwise)",
        what,
        deep,
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
    low, high = (int(np.searchsorted(share, one)) for one in PERCENTILES)
    high = min(max(high, low + 255), 65535)  # no more than 256 steps are made of what has fewer
    return (min(low, high - 255), high), f"{PERCENTILES[0]} % of their values are lower and as many higher"


def _counts(path: Path) -> Counts | None:
    """Return how often each 16-bit value occurs in an image; None in one of 8 bits, whose pixels are not decoded, or in
    one that cannot be read."""
    try:
        if not images.is_deep(path):
            return None
        return np.bincount(images.read_pixels(path).ravel(), minlength=65536)
    except ImageError:
        return None


def of_dataset(rule: IntensityRule, splits: Sequence[CocoSplit]) -> Levels:
    """Return the levels for splits of a COCO folder: those that its `dataset_info.json` says it was prepared with, or
    `of_images` where it says none, or the rule is another.

    Args:
        rule: as `--intensity` has it.
        splits: at least one; variants of images say nothing of the camera.
    """
    folder = splits[0].folder.parent
    known = _kept(folder / dataset_info.NAME)
    if known is not None and rule in ("auto", known[0]):
        return known[1]
    paths = [split.image_path(image) for split in splits for image in split.images if "augmentation" not in image]
    return of_images(rule, paths, str(folder))


def to_keep(rule: IntensityRule, levels: Levels) -> dict[str, Any]:
    """Return what `dataset_info.json` says of the levels."""
    return {"rule": rule, "levels": list(levels)}


def _kept(path: Path) -> tuple[str, Levels] | None:
    found = read_json(path) if path.is_file() else None
    kept = found.get("intensity") if isinstance(found, dict) else None
    if kept is None:
        return None
    try:
        low, high = (int(level) for level in kept["levels"])
        return str(kept["rule"]), (low, high)
    except (KeyError, TypeError, ValueError):
        raise FlawmaskError(f"{path} is damaged: its `intensity` is {kept!r}; prepare the data set anew") from None
