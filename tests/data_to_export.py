"""A small data set with training, validation and test images, for tests of exports."""

from pathlib import Path

import numpy as np

from flawmask.coco import annotation, write_split
from flawmask.images import write_png


def data_set(folder: Path) -> Path:
    """Write a COCO folder with three splits of eight small images, half of them with a bright defect."""
    draw = np.random.default_rng(0)
    for number, split in enumerate(("train", "val", "test")):
        images, annotations = [], []
        for at in range(1, 9):
            pixels = draw.integers(0, 90, (60, 80, 3), dtype=np.uint8)
            mask = np.zeros((60, 80), dtype=bool)
            if at % 2:
                mask[10 + number : 30, 20 : 40 + at] = True
                pixels[mask] += 150
                annotations.append(annotation(mask, id=at, image_id=at, category_id=2))
            name = f"{split}_{at}.png"
            write_png(folder / split / "images" / name, pixels)
            images.append({"id": at, "file_name": name, "width": 80, "height": 60})
        categories = [{"id": 1, "name": "good"}, {"id": 2, "name": "crack"}, {"id": 3, "name": "scratch"}]
        write_split(folder / split, images, annotations, categories)
    return folder
