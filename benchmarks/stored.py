"""Memory and time of `flawmask evaluate --predictions` and `flawmask report` on many generated predictions: a section
of docs/benchmarks.md.

    python benchmarks/stored.py --images 1000000

One image in twenty has a defect. Each image has at least one predicted instance, as with a network that scores pixels.
All image files are links to a few, because evaluation reads only those that the report shows. Each command runs in a
process of its own, whose peak memory is measured.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tyro
from huge import MEASURE
from measuring import table

from flawmask import masks
from flawmask.coco import write_split
from flawmask.files import write_json
from flawmask.images import write_png
from flawmask.inference import records
from flawmask.inference.archive import MARKER
from flawmask.prediction import Instance, Prediction

SIDE = 256
CLASSES = ("good", "crack", "scratch")
LINKS = 50_000
"""Links to one file: ext4 allows 65,000."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """How many predictions."""

    images: int = 1_000_000
    """The number of images."""
    shapes: int = 500
    """Distinct masks. With as many as images, the rows are as large as those of a real archive."""
    resamples: int = 1000
    """The number of bootstrap samples."""
    form: records.Format = "parquet"
    """The format of the rows."""


@dataclass(frozen=True)
class Shape:
    """A mask with its records.

    Attributes:
        rle: compressed RLE.
        box: x, y, width and height.
        area: in pixels.
    """

    rle: dict[str, Any]
    box: tuple[int, int, int, int]
    area: int


def shapes(draw: np.random.Generator, count: int) -> list[list[Shape]]:
    """Return random ellipses. Each is followed by three that are like it."""
    made = []
    for _ in range(count):
        x, y = draw.integers(60, SIDE - 60, 2)
        axes, angle = draw.integers(3, 40, 2), int(draw.integers(0, 180))
        variants = []
        for shift in (0, 1, 2, 4):
            canvas = np.zeros((SIDE, SIDE), np.uint8)
            cv2.ellipse(canvas, (int(x) + shift, int(y)), tuple(map(int, axes)), angle, 0, 360, 1, -1)
            rle = masks.to_rle(canvas > 0)
            variants.append(Shape(rle, masks.box_of_rle(rle), masks.area(rle)))
        made.append(variants)
    return made


def generate(folder: Path, count: int, form: records.Format, distinct: int = 500) -> None:
    """Write a COCO folder and its predictions as `predict --records` writes them, both in a new folder."""
    draw = np.random.default_rng(23)
    known, images, annotations = shapes(draw, distinct), [], []
    pictures = folder / "data" / "val" / "images"
    rows = folder / "rows"
    rows.mkdir(parents=True)

    def predicted() -> Iterator[records.Row]:
        for number in range(count):
            if number % LINKS == 0:
                source = pictures / f"{number:07d}.png"
                write_png(source, draw.integers(90, 160, (SIDE, SIDE, 3), dtype=np.uint8))
            else:
                os.link(source, pictures / f"{number:07d}.png")
            images.append({"id": number, "file_name": f"{number:07d}.png", "width": SIDE, "height": SIDE})
            found = []
            if number % 20 == 0:
                true, category = known[draw.integers(distinct)], int(draw.integers(2, 4))
                one = {"bbox": true[0].box, "area": true[0].area, "segmentation": true[0].rle, "iscrowd": 0}
                annotations.append({"id": number + 1, "image_id": number, "category_id": category, **one})
                if draw.random() < 0.97:
                    found.append(instance(true[draw.integers(4)], CLASSES[category - 1], draw.beta(5, 1.5)))
            if not found or draw.random() < 0.1:
                found.append(instance(known[draw.integers(distinct)][0], CLASSES[draw.integers(1, 3)], draw.beta(1, 9)))
            found.sort(key=lambda one: -one.score)
            prediction = Prediction(SIDE, SIDE, tuple(found), classes=CLASSES)
            yield records.row(f"archive/{number:07d}.png", prediction, 0.5, 0)

    made, per_part = predicted(), 1000
    for part in range(-(-count // per_part)):
        records.write_part(rows / f"part-{part:06d}.{form}", list(islice(made, per_part)))
    facts = {"model": "best.pt", "model_sha256": "", "classes": CLASSES, "finds": "masks", "conf": 0.5, "min_area": 0}
    tiles = {"tile": None, "overlap": 0, "tile_from": "all", "join": "off"}
    settings = {"rows_per_part": per_part, "records": form}
    others = {"intensity": [0, 65535], "calibration": None, "notes": [], "settings": settings, "images": count}
    write_json(rows / MARKER, facts | tiles | others)
    categories = [{"id": at, "name": name} for at, name in enumerate(CLASSES, start=1)]
    write_split(folder / "data" / "val", images, annotations, categories)


def instance(shape: Shape, label: str, score: float) -> Instance:
    """Return an instance with this mask."""
    x, y, width, height = shape.box
    return Instance(label, float(score), (x, y, x + width, y + height), shape.rle, shape.area)


def measured(*arguments: str | Path) -> dict[str, float]:
    """Return the seconds and the peak memory of a command of Flawmask."""
    command = [sys.executable, "-c", MEASURE, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main(config: Config) -> None:
    """Generate, measure, and print the section."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        began = time.perf_counter()
        generate(folder, config.images, config.form, config.shapes)
        print(f"generated in {time.perf_counter() - began:.0f} s", file=sys.stderr)
        out = folder / "out"
        paths = ("--predictions", folder / "rows", "--dataset_dir", folder / "data", "--output_dir", out)
        commands = {
            "evaluate --predictions": ("evaluate", *paths, "--resamples", str(config.resamples)),
            "report": ("report", out),
        }
        lines = []
        for name, command in commands.items():
            found = measured(*command)
            lines.append([name, f"{found['seconds']:.0f}", f"{found['megabytes']:.0f}"])
        sizes = [sum(path.stat().st_size for path in (folder / name).glob("*")) for name in ("rows", "out")]
    print(f"\n## {config.images:,} stored predictions\n\n" + table(["command", "seconds", "peak memory, MB"], lines))
    print(f"\nThe rows take {sizes[0] / 1e6:.0f} MB as {config.form}, the results {sizes[1] / 1e6:.0f} MB.")


if __name__ == "__main__":
    main(tyro.cli(Config))
