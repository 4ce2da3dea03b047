"""Tiles with a trained network: the counts of whole-image inference, masks that agree with it, and verdicts that hardly
depend on where the grid lies."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stained_plates import CATEGORIES, good_plate, part, settings

from flawmask import masks
from flawmask.coco import annotation, write_split
from flawmask.images import write_png
from flawmask.inference.backend import Backend, detect
from flawmask.inference.config import InferenceSettings
from flawmask.inference.predictor import load
from flawmask.prediction import Instance
from flawmask.tiles import Window
from flawmask.training.loop import train

pytestmark = [pytest.mark.usefixtures("small_network", "undrawn"), pytest.mark.services]

PLATES = 3
SIDE = 72 * PLATES
TILE, OVERLAP = 96, 32

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def sheet(seed: int, *, is_good: bool = False) -> tuple[Pixels, list[masks.Mask]]:
    """Return nine plates side by side, four of them with a stain, and the masks of the stains."""
    draw = np.random.default_rng(seed)
    stained = set() if is_good else set(draw.choice(PLATES**2, 4, replace=False).tolist())
    pixels, found = np.zeros((SIDE, SIDE, 3), np.uint8), []
    for number in range(PLATES**2):
        y, x = 72 * (number // PLATES), 72 * (number % PLATES)
        plate = good_plate(100 * seed + number)
        if number in stained:
            plate, mask = part(100 * seed + number)
            whole = np.zeros((SIDE, SIDE), dtype=bool)
            whole[y : y + 72, x : x + 72] = mask
            found.append(whole)
        pixels[y : y + 72, x : x + 72] = plate
    return pixels, found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network trained on tiles in half a minute."""
    folder = tmp_path_factory.mktemp("sheets")
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(1, 13):
        pixels, stains = sheet(number, is_good=number > 10)
        write_png(folder / "data" / "train" / "images" / f"{number}.png", pixels)
        images.append({"id": number, "file_name": f"{number}.png", "width": SIDE, "height": SIDE})
        for mask in stains:
            annotations.append(annotation(mask, id=len(annotations) + 1, image_id=number, category_id=2))
    write_split(folder / "data" / "train", images, annotations, CATEGORIES)
    config = settings(
        folder / "data", tile=TILE, overlap=OVERLAP, image_size=TILE, epochs=16, lr=0.02, train_augment="off"
    )
    return train(config).run_dir / "best.pt"


def defects(backend: Backend, pixels: Pixels) -> list[Instance]:
    return detect(backend, pixels).defects(0.5)


def iou(one: Instance, other: Instance) -> float:
    shared = masks.area(masks.intersection(one.rle, other.rle))
    return shared / (one.area + other.area - shared)


def is_unclear(backend: Backend, pixels: Pixels) -> bool:
    """Return whether an instance scores so close to the threshold that rounding decides whether it counts."""
    return any(0.4 < one.score < 0.6 for one in detect(backend, pixels).instances)


def test_tiles_count_like_the_whole_image_and_their_masks_agree_with_it(model: Path) -> None:
    tiles, whole = (load(model, InferenceSettings(device="cpu", precision="fp32")) for _ in range(2))
    # The whole image at the same resolution: the network is trained on tiles, but sees any size.
    whole.spec = replace(whole.spec, tile=None, image_size=SIDE)
    assert tiles.spec.tiling is not None
    windows = tiles.spec.tiling.windows(SIDE, SIDE)
    agreements, counts, truth, unclear = [], [], 0, 0
    for seed in range(200, 212):
        pixels, stains = sheet(seed)
        if is_unclear(tiles, pixels) or is_unclear(whole, pixels):
            unclear += 1
            continue
        found, expected = defects(tiles, pixels), defects(whole, pixels)
        counts.append((len(found), len(expected)))
        truth += len(stains)
        for one in expected:
            x1, y1, x2, y2 = one.box
            holds = [
                Window(*masks.box_of_rle(one.rle)) == Window(*masks.box_of_rle(one.rle)).overlap(w) for w in windows
            ]
            cut = [w for w in windows if w.overlap(Window(*masks.box_of_rle(one.rle)))]
            if all(holds[windows.index(w)] for w in cut):  # every tile that shows it shows all of it
                agreements.append(max((iou(one, other) for other in found), default=0.0))
            assert x1 < x2 and y1 < y2
    print(f"{len(agreements)} defects that no seam cuts: mean IoU {np.mean(agreements):.3f}; counts {counts}")
    assert unclear <= 3
    assert [found for found, _ in counts] == [expected for _, expected in counts]
    assert sum(found for found, _ in counts) >= 0.9 * truth
    assert np.mean(agreements) >= 0.9


def test_verdicts_that_change_when_the_grid_moves_by_half_a_tile_are_few(model: Path) -> None:
    backend, moved = (load(model, InferenceSettings(device="cpu", precision="fp32")) for _ in range(2))
    moved.spec = replace(moved.spec, tile_shift=TILE // 2)
    changed = 0
    for seed in range(300, 320):
        pixels, _ = sheet(seed, is_good=seed % 2 == 0)
        changed += bool(defects(backend, pixels)) != bool(defects(moved, pixels))
    print(f"{changed} of 20 verdicts changed")
    assert changed <= 1
