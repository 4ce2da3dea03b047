"""Memory of `flawmask predict --records` while it goes through an archive: a section of docs/benchmarks.md.

    python benchmarks/archive.py --images 100000

A quick stand-in takes the network's place: it returns one square for each image. All other work is done: listing,
reading, masks, rows and parts. All files are links to a few. The peak memory of the process is read when the first
parts are there, and at its end.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import numpy as np
import tyro
from measuring import table

from flawmask.images import write_png
from flawmask.inference import archive
from flawmask.inference.backend import Resized
from flawmask.inference.config import PredictConfig
from flawmask.model.spec import ModelSpec
from flawmask.prediction import RawDetections

SIDE = 64
LINKS = 50_000
"""Links to one file: ext4 allows 65,000."""

SAMPLES = 10
"""The peak memory is read after each tenth of the images."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The archive."""

    images: int = 100_000
    """The number of images."""
    records: Literal["jsonl", "parquet"] = "parquet"
    """The format of the rows."""
    kind: Literal["folder", "pattern", "list"] = "folder"
    """How the images are named."""
    child: Path | None = None
    """Predict the archive in this folder: what the benchmark starts."""


class Square:
    """A backend without a network."""

    def __init__(self) -> None:
        self.spec = ModelSpec("maskrcnn_resnet18_fpn", ("good", "defect"), image_size=SIDE)
        self.batch_size, self.uses_cores, self.resizes = 8, True, False

    def infer(self, batch: Sequence[Resized], /) -> list[RawDetections]:
        """Return a square for each image. Its score is the image's mean."""
        box, mask = np.array([[8, 8, 40, 40]], np.float32), np.ones((1, 28, 28), np.float32)
        scores = (np.array([one.pixels.mean() / 255], np.float32) for one in batch)
        return [RawDetections(box, np.array([2]), score, mask) for score in scores]


def write_archive(folder: Path, count: int) -> None:
    """Write the images, a thousand in each subfolder, and a list of them."""
    draw = np.random.default_rng(0)
    with (folder / "list.txt").open("w") as listed:
        for number in range(count):
            path = folder / "archive" / f"{number // 1000:04d}" / f"{number:08d}.png"
            if number % LINKS == 0:
                source = path
                write_png(source, draw.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8))
            else:
                path.parent.mkdir(exist_ok=True)
                os.link(source, path)
            listed.write(f"{path}\n")


def predict(config: Config, folder: Path) -> None:
    """Predict the archive, as `flawmask predict --records` does."""
    inputs = {
        "folder": f"{folder}/archive",
        "pattern": f"{folder}/archive/*/*.png",
        "list": f"@{folder}/list.txt",
    }
    settings = PredictConfig(
        model=folder / "best.pt",
        input=(inputs[config.kind],),
        output_dir=folder / "rows",
        records=config.records,
    )
    with patch.object(archive, "load", lambda *_: Square()):
        archive.predict_records(settings)


def peak_of(process: int) -> float:
    """Return the peak memory of a process in MB."""
    status = Path(f"/proc/{process}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 2**10


def main(config: Config) -> None:
    """Write the archive, predict it in a process of its own, and print the section."""
    if config.child is not None:
        predict(config, config.child)
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_archive(folder, config.images)
        (folder / "best.pt").write_bytes(b"no network")
        began = time.perf_counter()
        rows: list[list[str]] = []
        options = ["--records", config.records, "--kind", config.kind, "--images", str(config.images)]
        with subprocess.Popen([sys.executable, __file__, *options, "--child", place]) as process:
            while process.poll() is None:
                time.sleep(0.2)
                done = 1000 * len(list((folder / "rows").glob("part-*")))
                if len(rows) < SAMPLES and done >= (len(rows) + 1) * config.images // SAMPLES:
                    rows.append([f"{done:,}", f"{time.perf_counter() - began:.0f}", f"{peak_of(process.pid):.1f}"])
        print(f"\n## {config.images:,} images ({config.kind}, {config.records})\n")
        print(table(["images", "seconds", "peak memory, MB"], rows))


if __name__ == "__main__":
    main(tyro.cli(Config))
