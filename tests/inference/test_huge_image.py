"""An image of 400 million pixels is predicted in little more memory than one of a million."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from random_network import SPEC, random_network

from flawmask.model import checkpoint

pytestmark = [pytest.mark.usefixtures("small_network"), pytest.mark.services]

TESTS = Path(__file__).parents[1]

MEASURED = """
import sys
from pathlib import Path
import quick_flawmask
from flawmask.cli import main
try:
    main()
finally:
    lines = Path("/proc/self/status").read_text().splitlines()
    print(next(line for line in lines if line.startswith("VmHWM")).split()[1])
"""


def predicted(model: Path, folder: Path, side: int) -> tuple[float, dict[str, object]]:
    """Return the peak memory of `predict` on a square image in MB, and its record."""
    grain = np.random.default_rng(1).integers(100, 156, (500, side, 3), dtype=np.uint8)
    grain[200:300, ::400] = 0
    rows = (np.roll(grain, 31 * top, axis=1)[: side - 500 * top] for top in range(-(-side // 500)))
    path = folder / f"{side}.tif"
    tifffile.imwrite(
        path, rows, shape=(side, side, 3), dtype=np.uint8, rowsperstrip=500, photometric="rgb", bigtiff=True
    )
    command = ["predict", "--model", str(model), "--input", str(path), "--output_dir", str(folder / str(side))]
    environment = {**os.environ, "FLAWMASK_MAX_PIXELS": str(500_000_000), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *command, "--save_masks", "--device", "cpu"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=TESTS,
        env=environment,
    )
    path.unlink()
    (record,) = json.loads((folder / str(side) / "predictions.json").read_text())["images"]
    return int(done.stdout.split()[-1]) / 1024, record


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak memory of one process")
def test_400_million_pixels_take_at_most_1500_megabytes_more_than_one_million(tmp_path: Path) -> None:
    pytest.importorskip("pyvips", reason='pyvips is not installed: pip install "flawmask[large]"')
    spec = replace(SPEC, tile=1024, overlap=128)
    checkpoint.save(tmp_path / "best.pt", random_network(SPEC), spec)
    small, _ = predicted(tmp_path / "best.pt", tmp_path, 1000)
    large, record = predicted(tmp_path / "best.pt", tmp_path, 20_000)
    print(f"{small:.0f} MB for a million pixels, {large:.0f} MB for 400 million")
    assert record["instances"]
    assert (record["width"], record["height"]) == (20_000, 20_000)
    assert large - small <= 1500
