"""What goes wrong around it: killed processes, full disks, readers that die, two at one folder. Nothing is lost.

With TORTURE=1 in the environment (`make torture`) as often as docs/reliability.md says; else a few times.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dying_reader import DyingDataset
from files_read_back import names
from forked import Forked
from small_network import STANDS_IN_FOR
from stained_plates import light, make_dataset, same_weights

from flawmask.data.demo import DemoConfig, generate
from flawmask.errors import FlawmaskError
from flawmask.evaluation import evaluate
from flawmask.files import atomic_folder, folder_lock
from flawmask.pipeline import run
from flawmask.stages import RunConfig
from flawmask.training import loader, step
from flawmask.training.config import TrainConfig
from flawmask.training.loop import train

pytestmark = pytest.mark.usefixtures("small_network", "undrawn")

SMALL: dict[str, Any] = {
    **{"category": "demo", "mvtec_root": Path("datasets/demo"), "weights": "none", "image_size": 64},
    **{"arch": STANDS_IN_FOR, "proposals": 30, "roi_samples": 16, "augmentation_factor": 1, "workers": 0},
    **{"precision": "fp32", "device": "cpu", "resamples": 20, "overlays": 3},
}
"""A run of the whole pipeline that takes a moment."""

TORTURE = bool(os.environ.get("TORTURE"))
HERE = Path(__file__).parent
QUICK = HERE / "quick_flawmask.py"


def killed(task: str, folder: Path, kills: int, seed: int = 0) -> dict[str, Any]:
    """Return what `killed.py` says."""
    folder.mkdir()
    running = Forked([HERE / "killed.py", task, folder, str(kills), str(seed)], os.environ)
    printed, _ = running.communicate()
    assert running.returncode == 0, printed
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    print(task, found)  # what docs/reliability.md tells
    return found


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_training_killed_at_random_moments_ends_as_one_that_was_not(tmp_path: Path) -> None:
    found = killed("train", tmp_path / "a", 30 if TORTURE else 5)
    assert found["wrong"] == []
    assert found["killed"] == (30 if TORTURE else 5)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("task", ["prepare", "augment", "evaluate", "predict"])
def test_a_stage_killed_at_random_moments_leaves_a_whole_folder_or_none(tmp_path: Path, task: str) -> None:
    found = killed(task, tmp_path / "a", 100 if TORTURE else 3)
    assert found["wrong"] == []
    assert found["absent"] + found["complete"] == found["rounds"]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kind", ["folder", "pattern", "list"])
def test_rows_killed_at_random_moments_are_those_of_a_run_that_was_not(tmp_path: Path, kind: str) -> None:
    found = killed(f"records of a {kind}", tmp_path / "a", 100 if TORTURE else 30)
    assert found["wrong"] == []
    assert found["killed"] == (100 if TORTURE else 30)


@dataclass(frozen=True)
class Done:
    """What a command came to."""

    returncode: int | None
    stderr: str


def with_room_for(bytes_: int, *command: str) -> Done:
    """Run a command that may write no file of more bytes, as on a disk that is full."""
    running = Forked([QUICK, *command], os.environ | {"COLUMNS": "200"}, most_bytes=bytes_)
    printed, _ = running.communicate(timeout=300)
    return Done(running.returncode, printed)


def more_epochs(data: Path) -> Path:
    """Train an epoch and say that there are to be three."""
    run = train(light(data)).run_dir
    content = json.loads((run / "config.json").read_text())
    content["settings"]["epochs"] = 3
    (run / "config.json").write_text(json.dumps(content))
    return run


@pytest.mark.slow
def test_a_disk_that_is_full_is_told_in_a_line_and_the_training_goes_on_once_there_is_room(tmp_path: Path) -> None:
    run = more_epochs(make_dataset(tmp_path / "data"))
    before = {name: (run / name).read_bytes() for name in names(run)}
    done = with_room_for(10_000_000, "train", "--resume", str(run))
    assert done.returncode == 2, done.stderr
    (line,) = [one for one in done.stderr.splitlines() if one.startswith("error: ")]
    assert re.search(r"(last|best|state)\.pt", line)
    assert "disk is full" in line or "File too large" in line
    assert "Traceback" not in done.stderr
    assert {name: (run / name).read_bytes() for name in names(run)} == before
    done = with_room_for(10**9, "train", "--resume", str(run))
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "history.json").read_text())["epoch"] == [1, 2, 3]


ON_A_SMALL_DISK = """
mount -t tmpfs -o size="$1" none "$2" && cp -r "$3" "$2/run" && cd "$2/run" || exit 1
shift 3
sha256sum *
"$@"
echo "status $?"
sha256sum *
mount -o remount,size=8g ..
"$@"
echo "status $?"
"""


def can_mount() -> bool:
    try:
        return subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], check=False).returncode == 0
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="needs a system that lets anybody mount a file system in a namespace")
def test_a_small_disk_keeps_its_files_when_it_is_full_and_the_training_goes_on_when_it_has_grown(
    tmp_path: Path,
) -> None:
    run, disk = more_epochs(make_dataset(tmp_path / "data")), tmp_path / "disk"
    disk.mkdir()
    room = sum(path.stat().st_size for path in run.iterdir()) + 5_000_000
    train_on = [sys.executable, str(QUICK), "train", "--resume", str(disk / "run")]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", ON_A_SMALL_DISK, "sh", str(room), str(disk), str(run), *train_on],
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=True,
    )
    before, status, after, status_with_room = re.split(r"^status (\d+)\n", done.stdout, flags=re.MULTILINE)[:4]
    assert (status, status_with_room) == ("2", "0"), done.stderr
    assert after == before
    (line,) = [one for one in done.stderr.splitlines() if one.startswith("error: ")]
    assert re.search(r"run/(last|best|state)\.pt", line)
    assert re.search("disk is full|No space left on device", line)
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("room", [50, 500])
def test_a_full_disk_leaves_the_earlier_folder_of_a_stage(tmp_path: Path, room: int) -> None:
    data = make_dataset(tmp_path / "data")
    out = tmp_path / "out"
    command = ["augment", "--dataset_dir", str(data), "--output_dir", str(out), "--augmentation_factor", "2"]
    assert with_room_for(10**9, *command).returncode == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    done = with_room_for(room, *command, "--overwrite")
    assert done.returncode == 2
    (line,) = [one for one in done.stderr.splitlines() if one.startswith("error: ")]
    assert "File too large" in line
    assert str(out) in line
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert names(tmp_path) == ["data", "out"]


@pytest.mark.slow
def test_a_run_goes_on_at_the_stage_that_it_was_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    generate(DemoConfig(image_size=64, good=6, defective=3, train_good=0))
    small = SMALL | {"epochs": 2}
    (whole,) = run(RunConfig(**small))
    assert whole.run_dir is not None
    for stage, name, last in ((step.Step, "__call__", 4), (evaluate, "write_evaluation", 1)):
        with monkeypatch.context() as patch:
            plain, count = getattr(stage, name), [0]

            def failing(
                *given: Any, plain: Any = plain, count: list[int] = count, last: int = last, **more: Any
            ) -> Any:
                count[0] += 1
                if count[0] == last:
                    raise PowerCutError
                return plain(*given, **more)

            patch.setattr(stage, name, failing)
            with pytest.raises(PowerCutError):
                run(RunConfig(**small, save_every="3"))
        cut = max(Path("model_maskrcnn").iterdir())
        assert not (cut / "inference_val").exists()
        (done,) = run(RunConfig(resume=cut))
        assert done.run_dir == cut
        assert done.name == "demo"
        for one in ("best.pt", "last.pt"):
            assert same_weights(whole.run_dir / one, cut / one)
        assert done.metrics is not None
        assert whole.metrics is not None
        volatile = {"seconds", "seconds_per_image", "model"}
        assert {key: value for key, value in done.metrics.items() if key not in volatile} == {
            key: value for key, value in whole.metrics.items() if key not in volatile
        }
    trained = train(light(make_dataset(tmp_path / "data"), output_dir=tmp_path / "run")).run_dir
    with pytest.raises(FlawmaskError, match=r"is not a folder of flawmask run: use flawmask train --resume"):
        run(RunConfig(resume=trained))
    with pytest.raises(FlawmaskError, match=r"config\.json does not exist"):
        run(RunConfig(resume=tmp_path / "data"))


class PowerCutError(Exception):
    """What nobody catches."""


def test_two_that_write_into_one_folder_are_told_apart(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data")
    code = "import sys; from pathlib import Path; from flawmask.files import folder_lock\n"
    code += "with folder_lock(Path(sys.argv[1])): print('here', flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "here\n"
    with pytest.raises(FlawmaskError, match=r"another process writes into .*run: wait for it, or name another folder"):
        train(light(data))
    assert names(tmp_path) == ["data"]
    other.kill()
    other.communicate()
    with folder_lock(tmp_path / "run"):
        pass  # whoever was killed is no longer there


def test_what_a_killed_process_left_beside_a_folder_goes_and_what_it_put_aside_comes_back(tmp_path: Path) -> None:
    (tmp_path / f".out.{'a' * 16}.partial").mkdir()
    (tmp_path / f".out.{'b' * 16}.old").mkdir()
    (tmp_path / f".out.{'b' * 16}.old" / "kept").touch()
    (tmp_path / f".other.{'c' * 16}.partial").mkdir()

    def fill_and_fail() -> None:
        with atomic_folder(tmp_path / "out"):
            raise ValueError

    with pytest.raises(ValueError):
        fill_and_fail()
    assert names(tmp_path) == [f".other.{'c' * 16}.partial", "out"]
    assert names(tmp_path / "out") == ["kept"]


def test_a_reading_process_that_dies_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "SplitDataset", DyingDataset)
    with pytest.raises(FlawmaskError, match=r"a process that reads images died \(DataLoader worker") as caught:
        train(light(make_dataset(tmp_path / "data"), workers=1))
    assert "--workers" in str(caught.value)
    assert not (tmp_path / "run").exists()


LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
import flawmask.training.loop
from flawmask.cli import main
pages = int(Path("/proc/self/statm").read_text().split()[0])
most = pages * resource.getpagesize() + 1_500_000_000
resource.setrlimit(resource.RLIMIT_AS, (most, most))
main()
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_memory_that_runs_out_is_told_in_a_line_with_the_batch_and_the_size(tmp_path: Path) -> None:
    data, run = make_dataset(tmp_path / "data"), tmp_path / "run"
    command = ["train", "--dataset_dir", str(data), "--output_dir", str(run), "--weights", "none", "--device", "cpu"]
    command += ["--arch", "maskrcnn_resnet18_fpn", "--image_size", "2500", "--batch_size", "4", "--workers", "0"]
    done = subprocess.run(
        [sys.executable, "-c", LITTLE_MEMORY, *command],
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "out of memory: continuing with micro-batches of 1 images" in done.stderr
    assert done.stderr.splitlines()[-1] == (
        "error: memory ran out with --batch_size 4 and --image_size 2500, and a smaller micro-batch did not help: "
        "lower --image_size"
    )
    assert not run.exists()


def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_dataset(tmp_path / "data")
    whole = train(light(data, epochs=2, output_dir=tmp_path / "whole"))
    clock, draw = time.time, np.random.default_rng(0)
    monkeypatch.setattr(time, "time", lambda: clock() + float(draw.uniform(-(10**9), 10**9)))
    jumped = train(light(data, epochs=2, save_every="1h", log="tensorboard"))
    assert same_weights(jumped.run_dir / "last.pt", whole.run_dir / "last.pt")
    assert all(0 < seconds < 600 for seconds in jumped.history["seconds"])


@pytest.mark.slow
@pytest.mark.usefixtures("drawn")
def test_a_whole_run_speaks_to_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any, **_: Any) -> Any:
        raise AssertionError(f"it wants to speak to {given}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    generate(DemoConfig(image_size=64, good=6, defective=3, train_good=0))
    (done,) = run(RunConfig(**SMALL, epochs=1))
    assert done.metrics is not None


def test_a_data_set_that_vanishes_is_told_and_the_training_goes_on_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_dataset(tmp_path / "data")
    read, count = loader.SplitDataset._read_resized, [0]

    def reading(self: Any, place: int) -> Any:
        count[0] += 1
        if count[0] == 10:
            data.rename(tmp_path / "unplugged")
        return read(self, place)

    with monkeypatch.context() as patch:
        patch.setattr(loader.SplitDataset, "_read_resized", reading)
        with pytest.raises(FlawmaskError, match=r"data/train/images/\d\.png"):
            train(light(data, epochs=4, cache_gb=0.0))
    (tmp_path / "unplugged").rename(data)
    done = train(TrainConfig(resume=tmp_path / "run"))
    assert done.history["epoch"] == [1, 2, 3, 4]
    whole = train(light(data, epochs=4, output_dir=tmp_path / "whole"))
    assert same_weights(done.run_dir / "last.pt", whole.run_dir / "last.pt")
