"""Several processes: they communicate, train like a single process, and report it when one of them dies."""

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from files_read_back import names
from forked import Forked
from random_network import SPEC, network
from small_network import STANDS_IN_FOR
from stained_plates import make_dataset

from flawmask.distributed import Processes, _peers_alive, processes
from flawmask.errors import FlawmaskError
from flawmask.launch import local_rank, world_size
from flawmask.model import checkpoint

pytestmark = pytest.mark.usefixtures("small_network")

TASKS, QUICK = (str(Path(__file__).parent / name) for name in ("process_tasks.py", "quick_flawmask.py"))
Started = list[subprocess.Popen[str] | Forked]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@contextmanager
def started(command: list[str], count: int = 2) -> Iterator[Started]:
    """Start a Python command in `count` processes that know of each other, as torchrun does, and end all afterwards."""
    port = str(free_port())
    running: Started = []
    try:
        for rank in range(count):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
            environment = os.environ | {name: str(value) for name, value in variables.items()}
            environment |= {"MASTER_PORT": port, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
            if command[0] == "-m":  # a launcher, which starts the processes itself
                pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
                running.append(subprocess.Popen([sys.executable, *command], env=environment, **pipes))
            else:
                running.append(Forked(command, environment))
        yield running
    finally:
        for one in running:
            one.kill()
            one.communicate()


def run(command: list[str], count: int = 2) -> list[str]:
    """Run a command in `count` processes. Return what each printed, after all have succeeded."""
    with started(command, count) as running:
        printed = [one.communicate(timeout=300)[0] for one in running]
        assert [one.returncode for one in running] == [0] * count, "\n".join(printed)
    return printed


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def test_a_single_process_has_every_item_and_waits_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert (world_size(), local_rank()) == (1, 0)
    with processes(torch.device("cpu")) as alone:
        assert alone == Processes(0, 1)
    assert alone.is_main
    assert alone.shard([3, 1, 2]) == alone.gather([3, 1, 2]) == [3, 1, 2]
    assert alone.from_main(lambda: "made") == "made"
    one = torch.ones(3)
    alone.all_reduce_sum([one])
    assert torch.equal(one, torch.ones(3))


def test_the_error_of_a_collective_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "flawmask")
    with (
        pytest.raises(FlawmaskError, match=r"out of reach \(DistBackendError: NCCL error in: utils.hpp\)") as caught,
        _peers_alive(),
    ):
        raise torch.distributed.DistBackendError("NCCL error in: utils.hpp\nLast error: shapes differ")
    assert "\n" not in str(caught.value)
    assert "DistBackendError: NCCL error in: utils.hpp\nLast error: shapes differ" in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.distributed.DistBackendError("NCCL error in: utils.hpp\nCuda failure 2 'out of memory'"),
    ],
)
def test_out_of_memory_in_a_collective_is_not_reported_as_a_dead_process(error: RuntimeError) -> None:
    with pytest.raises(RuntimeError) as caught, _peers_alive():
        raise error
    assert caught.value is error


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_item_is_in_exactly_one_shard(count: int) -> None:
    shards = [Processes(rank, count).shard(range(11)) for rank in range(count)]
    assert sorted(item for shard in shards for item in shard) == list(range(11))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.slow
def test_three_processes_all_reduce_gather_and_broadcast(tmp_path: Path) -> None:
    run([TASKS, "speak", str(tmp_path)], 3)
    for rank in range(3):
        found = load(tmp_path / f"{rank}.pt")
        assert torch.equal(found["sums"][0], torch.tensor([111.0, 222.0]))
        assert torch.equal(found["sums"][1], torch.full((2, 2), 3.0))
        assert (found["broadcast"], found["made"]) == ("made by 0", [0] if rank == 0 else [])
        assert found["shard"] == list("abcde")[rank::3]
        assert (found["gathered"], found["few"], found["none"]) == (list("abcde"), ["alone"], [])


def make_good(split: Path, count: int) -> None:
    """Remove the annotations of `count` images of a split."""
    content = json.loads((split / "annotations.json").read_text())
    content["annotations"] = content["annotations"][count:]
    (split / "annotations.json").write_text(json.dumps(content))


@pytest.mark.slow
def test_two_processes_take_the_same_steps_as_one_with_the_whole_batch(tmp_path: Path) -> None:
    # One image has no instance, so the two processes have different numbers of images with masks.
    make_good(make_dataset(tmp_path / "data") / "train", 1)
    for count in (1, 2):
        run([TASKS, "take_steps", str(tmp_path)], count)
    alone, *both = (load(tmp_path / f"steps_{name}.pt") for name in ("0_of_1", "0_of_2", "1_of_2"))
    for name, one in both[0]["weights"].items():
        assert torch.equal(one, both[1]["weights"][name]), "the two have drifted apart"
        torch.testing.assert_close(one, alone["weights"][name], atol=1e-5, rtol=1e-4, msg=name)
    for step in range(2):
        assert torch.equal(both[0]["figures"][step], both[1]["figures"][step])
        torch.testing.assert_close(both[0]["figures"][step], alone["figures"][step], atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_a_training_by_two_processes_is_written_by_one_and_the_same_in_both(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data", training=5, validation=1)
    run([TASKS, "train", str(tmp_path)])
    for epoch in (1, 2):
        first, second = (load(tmp_path / f"epoch_{epoch}_{rank}.pt") for rank in range(2))
        assert first["figures"] == second["figures"]
        for which in ("model", "kept"):
            for name, one in first[which].items():
                # The number of batches of a norm has no effect, and one process had one pass more.
                assert name.endswith("num_batches_tracked") or torch.equal(one, second[which][name]), f"{which} {name}"
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert (history["epoch"], len(history["f1"])) == ([1, 2], 2)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["processes"], config["images_at_once"], config["images_per_step"]) == (2, 2, 4)
    written = load(tmp_path / "run" / "last.pt")["model_state_dict"]
    assert all(torch.equal(one, written[name]) for name, one in first["kept"].items())
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1, "more than one has written"


TWO = {
    "torchrun": ["torch.distributed.run", "--nproc_per_node", "2", "--master_port"],
    # With --cpu, accelerate always starts one process. The device of the network is set by --device.
    "accelerate launch": [
        *["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"],
        *["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port"],
    ],
}
"""Commands that start two processes, up to the option for the port."""


@pytest.mark.services
def test_two_processes_evaluate_like_one_with_any_launcher(tmp_path: Path) -> None:
    make_good(make_dataset(tmp_path / "data", validation=7) / "val", 2)
    spec = replace(SPEC, classes=("good", "defect"), max_detections=5)
    checkpoint.save(tmp_path / "model.pt", network(spec), spec)
    found = {}
    for name, launcher in {"alone": [], **TWO}.items():
        out = tmp_path / name
        flags = ["--model", tmp_path / "model.pt", "--dataset_dir", tmp_path / "data", "--output_dir", out]
        command = [QUICK, "evaluate", *map(str, flags), "--conf", "auto", "--device", "cpu"]
        run(["-m", *launcher, str(free_port()), *command] if launcher else command, 1)
        content = json.loads((out / "metrics.json").read_text())
        assert set(content["seconds"]) == {"read", "network", "post"}
        for cost in ("seconds", "seconds_per_image"):
            del content[cost]
        found[name] = content, json.loads((out / "predictions.json").read_text())
    assert len(found["alone"][1]) > 20, "it found next to nothing, of which all figures agree"
    assert found["torchrun"] == found["alone"]
    assert found["accelerate launch"] == found["alone"]


def train_command(folder: Path, epochs: int) -> list[str]:
    flags: dict[str, object] = {
        "dataset_dir": folder / "data",
        "output_dir": folder / "run",
        "arch": STANDS_IN_FOR,
        "image_size": 64,
        "proposals": 30,
        "roi_samples": 16,
        "weights": "none",
        "epochs": epochs,
        "batch_size": 1,
        "device": "cpu",
        "precision": "fp32",
        "workers": 0,
    }
    return [QUICK, "train", *(part for name, value in flags.items() for part in (f"--{name}", str(value)))]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_whose_partner_was_killed_reports_it_and_the_run_can_be_resumed(tmp_path: Path, killed: int) -> None:
    make_dataset(tmp_path / "data", validation=1)
    with started(train_command(tmp_path, epochs=10)) as running:
        wait_for(tmp_path / "run" / "state.pt", running)
        running[killed].send_signal(signal.SIGKILL)
        left = running[1 - killed]
        printed, _ = left.communicate(timeout=60)
        assert left.returncode == 2, printed
    (line,) = [one for one in printed.splitlines() if "error" in one.lower()]
    assert line.startswith("error: another process of this run has died or is out of reach (")
    assert line.endswith("start all of them again; --resume continues a training")
    assert "Traceback" not in printed
    assert not [name for name in names(tmp_path) if name not in ("data", "run")]

    run([QUICK, "train", "--resume", str(tmp_path / "run")], 1)
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert history["epoch"] == list(range(1, 11))
    # Still two images per step, now in a single process, so the cosine goes on from the same point.
    assert load(tmp_path / "run" / "state.pt")["taken"] == 20


@pytest.mark.slow
@pytest.mark.parametrize("save_every", ["1", "10m"])
def test_a_signal_to_one_process_ends_all_at_the_same_step(tmp_path: Path, save_every: str) -> None:
    shutil.rmtree(make_dataset(tmp_path / "data", training=12) / "val")  # so that steps take nearly all the time
    with started([*train_command(tmp_path, epochs=50), "--save_every", save_every]) as running:
        wait_for(tmp_path / "run" / "state.pt", running)
        running[1].send_signal(signal.SIGTERM)
        for one in running:
            printed, _ = one.communicate(timeout=60)
            assert one.returncode == 143, printed
            assert "Traceback" not in printed
    state = load(tmp_path / "run" / "state.pt")
    assert 0 < state["taken"] < 300
    assert state["within"]["batches"] == state["taken"] - 6 * (state["epoch"] - 1)


def wait_for(path: Path, running: Started) -> None:
    begun = time.monotonic()
    while not path.is_file():
        ended = [one for one in running if one.poll() is not None]
        assert not ended, "a process has ended early"
        assert time.monotonic() - begun < 200, "nothing was written"
        time.sleep(0.02)


@pytest.mark.slow
def test_more_processes_than_images_in_a_batch_are_refused(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data", validation=1)
    command = [*train_command(tmp_path, epochs=1), "--effective_batch_size", "1"]
    with started(command) as running:
        printed = [one.communicate(timeout=120)[0] for one in running]
        assert [one.returncode for one in running] == [2, 2]
    for one in printed:
        assert "error: 2 processes cannot share a batch of 1 of 4 images" in one
    assert names(tmp_path) == ["data"]
