"""Memory and time of `flawmask predict` with tiles on a very large image, against one of a megapixel: a section of
docs/benchmarks.md.

    python benchmarks/huge.py --model run/best.pt --tile 512

Each prediction runs in a process of its own, whose peak memory is measured. The images are written row by row.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tifffile
import tyro
from measuring import table

ROWS = 500

MEASURE = """
import atexit, json, time
from flawmask.cli import main
from peak import peak_megabytes
began = time.perf_counter()
atexit.register(lambda: print(json.dumps({"seconds": time.perf_counter() - began, "megabytes": peak_megabytes()})))
main()
"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The network, and the sizes of the images."""

    model: Path
    """The checkpoint."""
    tile: int = 1024
    """The side of the tiles in pixels."""
    sides: tuple[int, ...] = (1000, 8000, 20_000)
    """The sides of the square images in pixels."""
    save_masks: bool = True
    """Also write masks."""


def strips(side: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield the rows of a grey, grainy surface with a dark scratch from corner to corner, and spots."""
    draw = np.random.default_rng(side)
    grain = draw.normal(150, 6, (ROWS, side)).clip(0, 255).astype(np.uint8)
    for top in range(0, side, ROWS):
        rows = np.repeat(np.roll(grain, top // ROWS * 37, axis=1)[: side - top, :, None], 3, axis=2)
        for row in range(len(rows)):
            rows[row, max(0, top + row - 2) : top + row + 2] = 40
        for x in range(300, side - 20, 700):
            rows[100:112, x : x + 9] = 30
        yield rows


def write_image(path: Path, side: int) -> None:
    """Write a square TIFF strip by strip."""
    tifffile.imwrite(
        path, strips(side), shape=(side, side, 3), dtype=np.uint8, rowsperstrip=ROWS, photometric="rgb", bigtiff=True
    )


def measure(config: Config, side: int, folder: Path) -> dict[str, float]:
    """Return the seconds and the peak memory of a prediction."""
    image = folder / f"{side}.tif"
    write_image(image, side)
    command = ["predict", "--model", str(config.model), "--input", str(image), "--output_dir", str(folder / "out")]
    command += ["--tile", str(config.tile), *(["--save_masks"] if config.save_masks else [])]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *command],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
    )
    image.unlink()
    record: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return record


def main(config: Config) -> None:
    """Measure and print the section."""
    rows: list[list[float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for side in config.sides:
            found = measure(config, side, Path(folder))
            first = rows[0][3] if rows else found["megabytes"]
            rows.append([side, side**2 / 1e6, found["seconds"], found["megabytes"], found["megabytes"] - float(first)])
    print("## Very large images\n")
    heads = ["image", "million pixels", "seconds", "peak memory, MB", "more than the first, MB"]
    shown = [[f"{side} x {side}", *(f"{value:.0f}" for value in values)] for side, *values in rows]
    print(table(heads, shown))


if __name__ == "__main__":
    main(tyro.cli(Config))
