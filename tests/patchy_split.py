"""A split of patchy images for the stage `evaluate`, and a network with random weights to evaluate on it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import random_network
from random_network import patchwork

from flawmask.coco import annotation, write_split
from flawmask.evaluation.config import EvaluateConfig
from flawmask.evaluation.evaluate import Evaluated, evaluate
from flawmask.images import write_png

SPEC = replace(random_network.SPEC, classes=("good", "defect"))
CATEGORIES = [{"id": 1, "name": "good"}, {"id": 2, "name": "defect"}]


def make_dataset(folder: Path) -> Path:
    images, annotations = [], []
    for number, kind in enumerate(["crack", "good", "scratch", "good", "crack"], start=1):
        height, width = (60, 80) if number % 2 else (70, 50)
        name = f"{kind}_{number}.png"
        write_png(folder / "val" / "images" / name, patchwork(height, width, number))
        images.append({"id": number, "file_name": name, "width": width, "height": height, "defect_type": kind})
        mask = np.zeros((height, width), dtype=bool)
        if kind == "good":
            mask[:] = True
        else:
            mask[10:30, 10 : 12 + 5 * number] = True
        annotations.append(annotation(mask, id=number, image_id=number, category_id=1 if kind == "good" else 2))
    write_split(folder / "val", images, annotations, CATEGORIES)
    return folder


def run(run_dir: Path, dataset: Path, **settings: Any) -> Evaluated:
    settings = {"output_dir": dataset.parent / "out", "device": "cpu", **settings}
    return evaluate(EvaluateConfig(model=run_dir / "best.pt", dataset_dir=dataset, **settings))


def edit(dataset: Path, **changes: Any) -> None:
    path = dataset / "val" / "annotations.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
