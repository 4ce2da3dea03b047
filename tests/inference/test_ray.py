"""`predict --ray` with a real Ray on this machine."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from random_network import SPEC, network, patchwork

from flawmask.errors import FlawmaskError
from flawmask.files import walk
from flawmask.images import write_png
from flawmask.inference import records
from flawmask.inference.archive import predict_records
from flawmask.inference.config import PredictConfig
from flawmask.model import checkpoint

pytest.importorskip("ray", reason='Ray is not installed: pip install "flawmask[ray]"')
pytestmark = pytest.mark.services


def workers() -> list[int]:
    """Return the processes of Ray's workers that this process started, and that have a network."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            names[int(folder.name)] = (folder / "cmdline").read_bytes().decode(errors="replace")
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
    return [pid for pid, name in names.items() if "Worker" in name and "ray::" in name and is_below(pid, parents)]


def is_below(pid: int, parents: dict[int, int]) -> bool:
    while pid in parents and pid != os.getpid():
        pid = parents[pid]
    return pid == os.getpid()


def kill_one(output: Path, killed: list[int]) -> None:
    """Kill a worker as soon as a few parts are written."""
    while len(list(output.glob("part-*"))) < 3:
        time.sleep(0.01)
    killed += workers()[:1]
    os.kill(killed[0], signal.SIGKILL)


def rows(model: Path, folder: Path, **settings: Any) -> list[dict[str, Any]]:
    config = PredictConfig(
        model=model, input=(str(folder),), records="parquet", rows_per_part=2, device="cpu", **settings
    )
    predict_records(config)
    return [row for part in sorted(config.output_dir.glob("part-*")) for row in records.read_part(part)]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the workers in /proc")
def test_each_image_is_there_once_even_if_a_worker_is_killed(tmp_path: Path) -> None:
    folder, output = tmp_path / "archive", tmp_path / "rows"
    for seed in range(60):
        write_png(folder / f"{seed:02d}.png", patchwork(60, 64, seed))
    (folder / "bad.png").write_bytes(b"no image")
    checkpoint.save(tmp_path / "best.pt", network(), SPEC)
    killed: list[int] = []
    killer = Thread(target=kill_one, args=(output, killed), daemon=True)
    killer.start()
    found = rows(tmp_path / "best.pt", folder, output_dir=output, ray="local")
    killer.join(1)
    assert killed, "no worker was killed"
    assert [row["file"] for row in found] == [path.as_posix() for path in walk(folder)]
    assert found == rows(tmp_path / "best.pt", folder, output_dir=tmp_path / "alone")
    assert [row["file"] for row in found if row["reason"]] == [(folder / "bad.png").as_posix()]
    for part in (1, 17):  # a run that was interrupted goes on
        (output / f"part-{part:06d}.parquet").unlink()
    before = {path: path.stat().st_mtime_ns for path in output.glob("part-*")}
    assert rows(tmp_path / "best.pt", folder, output_dir=output, ray="local") == found
    assert all(path.stat().st_mtime_ns == time_before for path, time_before in before.items())
    example = Path(__file__).parents[2] / "examples" / "ray_predict.py"
    arguments = [str(one) for one in (tmp_path / "best.pt", folder, tmp_path / "other")]
    said = subprocess.run([sys.executable, example, *arguments], capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1].startswith("61 images: ")
    assert said.endswith(" 1 not read\n")


def test_a_cluster_that_does_not_answer_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    write_png(tmp_path / "archive" / "a.png", patchwork(60, 64))
    checkpoint.save(tmp_path / "best.pt", network(), SPEC)
    with pytest.raises(FlawmaskError, match=r"--ray 127\.0\.0\.1:9: no cluster answers"):
        rows(tmp_path / "best.pt", tmp_path / "archive", output_dir=tmp_path / "rows", ray="127.0.0.1:9")
    assert not (tmp_path / "rows").exists()
