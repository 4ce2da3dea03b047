"""A category of grey plates, with and without a stain, which models learn to tell apart in a second or two."""

from pathlib import Path

import numpy as np
import pytest
from stained_plates import good_plate, part

from flawmask.images import write_png


@pytest.fixture(scope="session")
def mvtec_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds the category `plate`: 10 stained plates and 10 good ones, and 6 more in train/good."""
    root = tmp_path_factory.mktemp("mvtec")
    folder = root / "plate"
    for seed in range(10):
        pixels, mask = part(seed)
        write_png(folder / "test" / "stain" / f"{seed:03d}.png", pixels)
        write_png(folder / "ground_truth" / "stain" / f"{seed:03d}_mask.png", mask.astype(np.uint8) * 255)
        write_png(folder / "test" / "good" / f"{seed:03d}.png", good_plate(200 + seed))
    for seed in range(6):
        write_png(folder / "train" / "good" / f"{seed:03d}.png", good_plate(300 + seed))
    return root
