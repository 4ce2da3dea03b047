"""Draws a category of large images with small defects, in MVTec AD's layout: docs/results.md.

    python benchmarks/sheets.py --mvtec_root datasets/mvtec

A sheet is a rough grey surface of 4000 x 3000 pixels. A dot is 6 to 30 pixels wide, a nick 6 to 30 pixels long. A hair,
which is drawn only if named, is a scratch of 2 to 3 pixels that runs across the sheet.
"""

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt
import tyro

from flawmask.images import encode_png

Type = Literal["dot", "nick", "hair"]
Rng = np.random.Generator
Pixels = npt.NDArray[np.uint8]

SMALLEST, LARGEST = 6, 30
"""The sizes of dots and nicks, in pixels."""

FINE = 4
"""Defects are drawn on a grid of so many points to a pixel. A pixel is part of a defect if it covers half of them."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The category."""

    mvtec_root: Path = Path("datasets/mvtec")
    """The folder in which the category is made."""
    category: str = "sheets"
    """Its name."""
    good: int = 40
    """Good images."""
    defective: int = 40
    """Defective images of each type."""
    types: tuple[Type, ...] = ("dot", "nick")
    """Types of defects."""
    width: int = 4000
    """In pixels."""
    height: int = 3000
    """In pixels."""
    seed: int = 20
    """Seed of everything random."""


def surface(rng: Rng, height: int, width: int) -> npt.NDArray[np.float32]:
    """Return a rough surface under a lamp, (height, width) float32, about 100 to 170."""
    coarse = cv2.resize(rng.normal(0, 5, (9, 12)), (width, height), interpolation=cv2.INTER_CUBIC)
    fine = cv2.resize(rng.normal(0, 4, (height // 3 + 1, width // 3 + 1)).astype(np.float32), (width, height))
    return np.asarray(135 + coarse + fine + rng.normal(0, 3, (height, width)), np.float32)


def outline(rng: Rng, kind: Type, height: int, width: int) -> tuple[npt.NDArray[np.float64], float]:
    """Return the points (x, y) of a line, in pixels, and its width."""
    if kind == "hair":
        x, y = rng.uniform(0.05, 0.3) * width, rng.uniform(0.1, 0.9) * height
        steps = np.linspace(0, rng.uniform(0.4, 0.65) * width, 200)
        waves = sum(rng.normal(0, 20) * np.sin(steps / rng.uniform(150, 700)) for _ in range(3))
        return np.stack((x + steps, np.clip(y + rng.uniform(-0.3, 0.3) * steps + waves, 5, height - 5)), 1), 2.5
    size, angle = rng.uniform(SMALLEST, LARGEST), rng.uniform(0, np.pi)
    thick = size * rng.uniform(0.7, 0.9) if kind == "dot" else min(3.5, size / 2)
    half = (size - thick) / 2 * np.array([np.cos(angle), np.sin(angle)])
    centre = rng.uniform(LARGEST, [width - LARGEST, height - LARGEST])
    return np.stack((centre - half, centre + half)), thick


def draw(rng: Rng, kind: Type | None, height: int, width: int) -> tuple[Pixels, npt.NDArray[np.bool_]]:
    """Return a sheet, (height, width) uint8, and the mask of its defects; a good sheet without a type."""
    picture, mask = surface(rng, height, width), np.zeros((height, width), dtype=bool)
    for _ in range(0 if kind is None else 1 if kind == "hair" else int(rng.integers(1, 7))):
        points, thick = outline(rng, kind or "dot", height, width)
        low = np.maximum(np.floor(points.min(0) - thick - 2).astype(int), 0)
        high = np.minimum(np.ceil(points.max(0) + thick + 2).astype(int), [width, height])
        canvas = np.zeros(((high - low) * FINE)[::-1], np.uint8)
        cv2.polylines(canvas, [np.rint((points - low) * FINE).astype(np.int32)], False, 255, round(thick * FINE))
        cover = cv2.resize(canvas, (high - low).tolist(), interpolation=cv2.INTER_AREA) / np.float32(255)
        window = np.s_[low[1] : high[1], low[0] : high[0]]
        mask[window] |= cover >= 0.5
        picture[window] += rng.choice([-1, 1]) * rng.uniform(35, 70) * cover
    return picture.clip(0, 255).astype(np.uint8), mask


def main(config: Config) -> None:
    """Draw the category."""
    folder = config.mvtec_root / config.category
    kinds: list[tuple[Type | None, int]] = [(None, config.good), *((kind, config.defective) for kind in config.types)]
    for kind, count in kinds:
        name = kind or "good"
        images, masks = folder / "test" / name, folder / "ground_truth" / name
        for place in (images, masks) if kind else (images,):
            place.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            rng = np.random.default_rng([config.seed, zlib.crc32(name.encode()), number])
            picture, mask = draw(rng, kind, config.height, config.width)
            (images / f"{number:03d}.png").write_bytes(encode_png(picture))
            if kind:
                (masks / f"{number:03d}_mask.png").write_bytes(encode_png(mask.astype(np.uint8) * 255))
    print(f"{sum(count for _, count in kinds)} images in {folder}")


if __name__ == "__main__":
    main(tyro.cli(Config))
