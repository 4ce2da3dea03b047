"""Signals: the step is finished and saved, the exit status tells the signal, and the training can be resumed."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from files_read_back import names
from forked import Forked
from stained_plates import make_dataset, same_weights

from flawmask.training.stop import Stop

QUICK = Path(__file__).parents[1] / "quick_flawmask.py"
EPOCHS = 10
FLAGS = (
    f"--arch maskrcnn_resnet18_fpn --image_size 64 --proposals 30 --roi_samples 16 --weights none --epochs {EPOCHS} "
    "--batch_size 1 --device cpu --precision fp32 --workers 1"
).split()


def started(folder: Path, name: str, *more: str) -> Forked:
    """Start a training in a process group of its own, as a terminal does."""
    command = [str(QUICK), "train", "--dataset_dir", str(folder / "data")]
    command += ["--output_dir", str(folder / name), *FLAGS, *more]
    return Forked(command, os.environ | {"COLUMNS": "200"})


@pytest.mark.slow
def test_a_stopped_training_saves_its_step_and_a_resume_gives_the_same_result(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data")
    whole = started(tmp_path, "whole")
    printed, _ = whole.communicate(timeout=200)
    assert whole.returncode == 0, printed
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        run = tmp_path / f"stopped_{status}"
        process = started(tmp_path, run.name)
        begun = time.monotonic()
        while not (run / "state.pt").is_file() and time.monotonic() - begun < 100:
            time.sleep(0.01)
        os.killpg(process.pid, number)  # the signal also reaches its reading process, as from a terminal or a scheduler
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == status, printed
        assert f"saved: flawmask train --resume {run} continues from here" in printed
        assert "Traceback" not in printed
        history = json.loads((run / "history.json").read_text())
        assert len(history["epoch"]) < EPOCHS
        assert not [name for name in names(run) if name.startswith(".")]
        going_on = started(tmp_path, "unused", "--resume", str(run))
        printed, _ = going_on.communicate(timeout=200)
        assert going_on.returncode == 0, printed
        assert same_weights(run / "last.pt", tmp_path / "whole" / "last.pt")
        assert same_weights(run / "best.pt", tmp_path / "whole" / "best.pt")
    assert not (tmp_path / "unused").exists()


def test_a_signal_is_deferred_during_a_step_and_ends_the_program_at_once_otherwise() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Stop() as stop:
        stop.deferring = True
        signal.raise_signal(signal.SIGTERM)
        assert stop.received_signal == signal.SIGTERM
        with pytest.raises(SystemExit) as ended:  # the second signal ends the program
            signal.raise_signal(signal.SIGTERM)
        assert ended.value.code == 143
    with Stop() as stop:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.received_signal == signal.SIGINT, (
            "a destructor that drops the exception hides nothing from the next step"
        )
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
