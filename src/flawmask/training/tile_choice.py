"""Chooses the tiles of a training: from the settings, or from the sizes of the defects and images."""

import logging
from dataclasses import replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from flawmask.coco import CocoSplit, without_crowds
from flawmask.model.arch import architecture
from flawmask.tiles import MIN_TILE, Tiling, check_sizes, default_overlap
from flawmask.training.config import TrainSettings
from flawmask.training.network import seen_size

log = logging.getLogger(__name__)

T = TypeVar("T", bound=TrainSettings)

NEEDED = 144
"""A defect should have so many pixels for the network: 3 x 3 cells of its finest features, whose cells are 4 pixels.
This is an estimate."""

SMALL, LONG = 10, 90
"""In percent. Of the training's defects, so many are smaller than the one that `auto` makes large enough, and so many
are shorter than the overlap."""

STEP = 32
"""`auto` chooses a multiple of this, in pixels."""


def choose_tiles(config: T, training: CocoSplit) -> T:
    """Return the settings with `auto` replaced by numbers, or by off; log the choice and its reason.

    Tiles are chosen where the network would see too few pixels of the smallest tenth of the defects on the images as
    they are resized. They are as large as these defects allow, but never smaller than the network's input: beyond their
    own resolution, images have no more to show.

    Args:
        config: the settings.
        training: the training split.

    Raises:
        FlawmaskError: a tile is larger than every image.
    """
    if config.tile in (None, "off"):
        return config
    areas, sides = _defects(training)
    side = architecture(config.network).image_size(config.image_size)
    sizes = [(image["height"], image["width"]) for image in training.images]
    tile = config.tile if isinstance(config.tile, int) else _tile(side, areas, sizes)
    if tile is None:
        return replace(config, tile="off", overlap="auto")
    overlap = config.overlap if isinstance(config.overlap, int) else _overlap(tile, sides)
    tiling = Tiling(tile, overlap)
    check_sizes(tiling, sizes, str(training.folder))
    seen = seen_size(config, config.image_size, tile)
    log.info(
        "tiles of %d pixels, which overlap by %d (%d %% of the defects are not longer). The network sees them at %d "
        "pixels%s",
        *(tile, overlap, round(100 * float(np.mean(sides <= overlap))) if len(sides) else 0, seen),
        f": --image_size {tile} would show them at their own resolution"
        if seen < tile == seen_size(config, tile, tile)
        else "",
    )
    return replace(config, tile=tile, overlap=overlap)


def needed_scale(training: CocoSplit) -> float:
    """Return the scale at which the smallest tenth of the defects have as many pixels as the network needs. It is 1 if
    there are no defects."""
    areas, _ = _defects(training)
    return float((NEEDED / np.percentile(areas, SMALL)) ** 0.5) if len(areas) else 1.0


def _defects(training: CocoSplit) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the area and the longer side of each defect, in pixels."""
    records = [one for image in training.images for one in without_crowds(training.defects(image))]
    areas = [float(one.get("area") or one["bbox"][2] * one["bbox"][3]) for one in records]
    return np.array(areas), np.array([max(one["bbox"][2:]) for one in records], dtype=np.float64)


def _tile(image_size: int, areas: npt.NDArray[np.float64], sizes: list[tuple[int, int]]) -> int | None:
    """Return the side of the tiles, or None for whole images; log the reason."""
    shorter = int(np.median([min(size) for size in sizes]))
    if not len(areas):
        return None
    small = float(np.percentile(areas, SMALL))
    seen = small * min(1.0, image_size / shorter) ** 2
    defects = f"A tenth of the {len(areas)} defects have at most {small:.0f} pixels"
    if seen >= NEEDED or shorter <= image_size:
        log.info(
            "--tile auto: off. %s, and %.0f of them on an image whose shorter side of %d pixels is resized to %d",
            *(defects, seen, shorter, min(shorter, image_size)),
        )
        return None
    largest = image_size * (small / NEEDED) ** 0.5
    tile = max(MIN_TILE, int(np.clip(largest, image_size, shorter)) // STEP * STEP)
    log.info(
        "--tile auto: %d. %s, and %.1f of them on an image whose shorter side of %d pixels is resized to %d. The "
        "network needs %d. In a tile it sees %.0f",
        *(tile, defects, seen, shorter, image_size, NEEDED),
        small * min(1.0, image_size / tile) ** 2,
    )
    return tile


def _overlap(tile: int, sides: npt.NDArray[np.float64]) -> int:
    """Return the overlap at which a tile shows nine of ten defects whole, but an eighth to half of a tile."""
    if not len(sides):
        return default_overlap(tile)
    return int(np.clip(np.ceil(np.percentile(sides, LONG)), default_overlap(tile), tile // 2))
