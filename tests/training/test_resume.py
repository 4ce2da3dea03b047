"""A resumed training gives the same result as one that was not interrupted."""

import json
import logging
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pytest
import torch
from files_read_back import names
from stained_plates import light, make_dataset, same_weights, settings

from flawmask.errors import FlawmaskError
from flawmask.files import atomic_folder, write_json
from flawmask.images import write_png
from flawmask.model import checkpoint, weights
from flawmask.settings import as_json
from flawmask.training import callbacks, epoch, fit, resume
from flawmask.training.config import TrainConfig
from flawmask.training.loop import Trained, train
from flawmask.training.step import Step

TIMES = {"elapsed", "seconds", "images_per_second", "waiting"}


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Four training images and two validation images."""
    return make_dataset(tmp_path / "data")


class PowerCutError(Exception):
    """An error that no code catches."""


def cut_off(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, place: Any, name: str, failing: Any) -> Path:
    """Train with a patched function that raises a power cut, and return the run folder."""
    with monkeypatch.context() as patch:
        patch.setattr(place, name, failing)
        with pytest.raises(PowerCutError):
            train(config)
    assert config.output_dir is not None
    return config.output_dir


def interrupted(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, after: int) -> Path:
    """Train the given number of epochs, and part of another that is lost."""
    plain = epoch.train_epoch
    done = []

    def failing(*inputs: Any) -> Any:
        figures = plain(*inputs)
        done.append(figures)
        if len(done) > after:
            raise PowerCutError
        return figures

    return cut_off(config, monkeypatch, epoch, "train_epoch", failing)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (settings, {}),
        (light, {"arch": "ssdlite320_mobilenet_v3_large", "norm": "batch", "ema": True, "select_by": "val_loss"}),
        (settings, {"precision": "bf16", "norm": "frozen", "anchor_sizes": (4, 8, 16, 24, 32)}),
    ],
)
def test_an_interrupted_training_ends_with_the_same_weights(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[..., TrainConfig], changes: dict[str, Any]
) -> None:
    whole = train(make(dataset, epochs=3, **changes))
    run = interrupted(make(dataset, epochs=3, output_dir=dataset.parent / "cut", **changes), monkeypatch, after=1)
    assert json.loads((run / "history.json").read_text())["epoch"] == [1]
    done = train(TrainConfig(resume=run))
    assert done.run_dir == run
    assert done.best_epoch == whole.best_epoch
    for name in ("best.pt", "last.pt"):
        assert same_weights(whole.run_dir / name, run / name), name
    assert {name: values for name, values in done.history.items() if name not in TIMES} == {
        name: values for name, values in whole.history.items() if name not in TIMES
    }
    assert json.loads((run / "history.json").read_text()) == done.history
    assert names(run) == names(whole.run_dir)


def cut_at_step(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, number: int) -> Path:
    """Train the given number of steps; the next one raises a power cut."""
    step = Step.__call__
    taken: list[int] = []

    def stepping(self: Any, *inputs: Any, **more: Any) -> Any:
        if len(taken) == number:
            raise PowerCutError
        taken.append(1)
        return step(self, *inputs, **more)

    return cut_off(config, monkeypatch, Step, "__call__", stepping)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "changes", "numbers"),
    [(settings, {"roi_samples": None}, (4,)), (light, {"norm": "batch", "ema": True, "optimizer": "sgd"}, (3, 11))],
)
def test_a_training_interrupted_within_an_epoch_resumes_from_its_last_saved_step(
    dataset: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[..., TrainConfig],
    changes: dict[str, Any],
    numbers: tuple[int, ...],
) -> None:
    whole = train(make(dataset, epochs=3, batch_size=1, **changes))
    for number in numbers:
        place = {"output_dir": dataset.parent / f"at_{number}", "save_every": "2"}
        run = cut_at_step(make(dataset, epochs=3, batch_size=1, **place, **changes), monkeypatch, number)
        done = train(TrainConfig(resume=run))
        for name in ("best.pt", "last.pt"):
            assert same_weights(whole.run_dir / name, run / name), f"{name}, cut after step {number}"
        assert {name: values for name, values in done.history.items() if name not in TIMES} == {
            name: values for name, values in whole.history.items() if name not in TIMES
        }
        # A run that was saved only once does not have the previous state.
        assert set(names(run)) - {"state_before.pt"} == set(names(whole.run_dir)) - {"state_before.pt"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """An uninterrupted training of two epochs on the same images as in all these tests."""
    return train(light(make_dataset(tmp_path_factory.mktemp("whole") / "data"), epochs=2))


@pytest.mark.parametrize(("written", "number"), [("checkpoint.save", 1), ("draw_curves", 1), ("checkpoint.save", 3)])
def test_a_training_killed_while_writing_an_epoch_has_that_epoch_once(
    dataset: Path, whole: Trained, monkeypatch: pytest.MonkeyPatch, written: str, number: int
) -> None:
    place: Any = checkpoint if written == "checkpoint.save" else callbacks
    name, count = written.removeprefix("checkpoint."), [0]
    plain = getattr(place, name)

    def failing(*inputs: Any, **more: Any) -> Any:
        count[0] += 1
        if count[0] == number:
            raise PowerCutError
        return plain(*inputs, **more)

    cut = light(dataset, epochs=2, output_dir=dataset.parent / "cut")
    run = cut_off(cut, monkeypatch, place, name, failing)
    done = train(TrainConfig(resume=run))
    assert done.history["epoch"] == [1, 2]
    assert done.history["train_loss"] == whole.history["train_loss"]
    assert done.best_epoch == whole.best_epoch
    assert names(done.run_dir) == names(whole.run_dir)
    assert json.loads((done.run_dir / "history.json").read_text()) == done.history
    for one in ("best.pt", "last.pt"):
        assert same_weights(done.run_dir / one, whole.run_dir / one)


def test_save_every_counts_steps_or_time(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[tuple[int, Any]] = []

    def saving(state: resume.State, run_dir: Path) -> None:
        saved.append((state.epoch, state.within and state.within["batches"]))

    monkeypatch.setattr(resume, "save", saving)
    train(light(dataset, epochs=2, batch_size=1, save_every="3"))
    assert saved == [(1, 3), (1, None), (2, 2), (2, None)]
    saved.clear()
    train(light(dataset, epochs=1, batch_size=1, save_every="1s", overwrite=True))
    assert saved[-1] == (1, None)
    monkeypatch.setattr("flawmask.training.run.seconds_in", lambda *_: 0.0)
    saved.clear()
    train(light(dataset, epochs=1, batch_size=2, save_every="1h", overwrite=True))
    assert saved == [(1, 1), (1, 2), (1, None)]


def test_a_damaged_state_is_detected_by_its_checksum_and_the_previous_one_is_used(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = train(light(dataset, epochs=3))
    run = interrupted(light(dataset, epochs=3, output_dir=dataset.parent / "cut"), monkeypatch, after=2)
    state = bytearray((run / "state.pt").read_bytes())
    middle = len(state) // 2
    state[middle] ^= 1  # a bit of a tensor: only its checksum can tell
    for data, says in (
        (b"", "EOFError: "),
        (state[:middle], "RuntimeError: PytorchStreamReader failed"),
        (state, "BadZipFile: the checksum of "),
    ):
        (run / "state.pt").write_bytes(data)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert resume.newest(run) == "state_before.pt"
        _, found = resume.load(run, "state_before.pt")
        assert found is not None
        assert found.history["epoch"] == [1]
        (warning,) = caplog.messages
        assert f"state.pt is not a file of weights, or is damaged ({says}" in warning
        assert warning.endswith("continuing from state_before.pt, which was saved before it")
    done = train(TrainConfig(resume=run))
    assert same_weights(whole.run_dir / "last.pt", run / "last.pt")
    assert done.history["train_loss"] == whole.history["train_loss"]
    (run / "state_before.pt").unlink()
    (run / "state.pt").write_bytes(state)
    with pytest.raises(FlawmaskError, match="the checksum of "):
        train(TrainConfig(resume=run))


def test_a_state_that_cannot_be_written_keeps_the_last_one(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(light(dataset, epochs=2)).run_dir
    before = {name: (run / name).read_bytes() for name in ("state.pt", "state_before.pt")}
    _, state = resume.load(run, "state.pt")
    assert state is not None

    def damaged(path: Path) -> None:
        raise BadZipFile("the checksum of data is wrong")

    monkeypatch.setattr(weights, "check_sums", damaged)
    with pytest.raises(FlawmaskError, match=r"state\.pt\.new cannot be written, perhaps the disk is full: the "):
        resume.save(state, run)
    assert {name: (run / name).read_bytes() for name in before} == before
    assert not [name for name in names(run) if name.startswith(".")]


def test_a_moved_run_resumes_in_its_new_folder(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = interrupted(light(dataset, epochs=2), monkeypatch, after=1)
    run = run.rename(dataset.parent / "elsewhere")
    assert train(TrainConfig(resume=run)).history["epoch"] == [1, 2]
    assert not (dataset.parent / "run").exists()


def test_files_of_a_killed_evaluation_do_not_prevent_a_resume(dataset: Path) -> None:
    run = train(light(dataset)).run_dir
    left = run / f".inference_val.{'a' * 16}.partial"
    left.mkdir()
    (run / f".last.pt.{'b' * 16}.partial").touch()
    assert train(TrainConfig(resume=run)).history["epoch"] == [1]
    assert [name for name in names(run) if name.startswith(".")] == [left.name]
    with atomic_folder(run / "inference_val"):
        pass
    assert not left.exists()


def test_a_finished_run_has_nothing_left_to_do(dataset: Path) -> None:
    done = train(light(dataset))
    before = (done.run_dir / "last.pt").read_bytes()
    again = train(TrainConfig(resume=done.run_dir))
    assert again.history == done.history
    assert (done.run_dir / "last.pt").read_bytes() == before


def test_time_of_earlier_sessions_counts(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "image_size_for", lambda *_: 64)
    run = interrupted(light(dataset, time_budget="1h"), monkeypatch, after=1)
    content = torch.load(run / "state.pt", weights_only=True)
    assert 0 < content["seconds"] < 600
    assert 0 < content["before_steps"] < content["seconds"]
    del content["before_steps"]  # as in the states of older versions
    torch.save(content | {"seconds": 3601.0}, run / "state.pt")
    assert train(TrainConfig(resume=run)).history["epoch"] == [1]


def test_the_micro_batch_size_is_restored(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step.__call__

    def stepping(self: Any, *inputs: Any, **more: Any) -> Any:
        self.micro_batch_size = 1  # as after memory ran out
        return step(self, *inputs, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", stepping)
        run = interrupted(light(dataset, epochs=2), monkeypatch, after=1)
    train(TrainConfig(resume=run))
    assert torch.load(run / "state.pt", weights_only=True)["at_once"] == 1


def refused(says: str, run: Path) -> None:
    before = names(run) if run.exists() else None
    with pytest.raises(FlawmaskError, match=says) as caught:
        train(TrainConfig(resume=run))
    assert "\n" not in str(caught.value)
    assert (names(run) if run.exists() else None) == before


def test_a_resume_with_other_images_is_refused(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = interrupted(light(dataset, epochs=2), monkeypatch, after=1)
    path = dataset / "train" / "images" / "2.png"
    original = path.read_bytes()
    write_png(path, np.zeros((72, 72, 3), np.uint8))
    refused(r"--resume .*run: .*data has other images than when it began", run)
    path.write_bytes(original)
    train(TrainConfig(resume=run))


def test_a_folder_that_is_no_run_is_refused(dataset: Path) -> None:
    refused(r"--resume .*nowhere: it is not a run folder, because it has no config\.json", dataset.parent / "nowhere")
    refused(r"--resume .*data: it is not a run folder, because it has no config\.json", dataset)
    run = train(light(dataset)).run_dir
    state = (run / "state.pt").read_bytes()
    (run / "state.pt").write_bytes(state[: len(state) // 2])
    refused(r"state\.pt is not a file of weights, or is damaged", run)
    torch.save({"epoch": 3}, run / "state.pt")
    refused(r"state\.pt was written by another version of Flawmask", run)
    (run / "state.pt").write_bytes(state)
    (run / "config.json").write_text('{"settings": {"epochs": 3, "colour": "red"}}')
    refused(r"config\.json was written by another version of Flawmask", run)
    (run / "config.json").write_text('{"settings": {"epochs": 3}}')
    refused(r"config\.json was written by another version of Flawmask", run)


def test_an_unsaved_run_starts_again_and_a_run_without_its_state_is_refused(dataset: Path) -> None:
    run = train(light(dataset)).run_dir
    before = (run / "last.pt").read_bytes()
    (run / "state.pt").unlink()
    refused(r"--resume .*run: there is no state\.pt to resume from", run)
    for name in names(run):
        if name != "config.json":
            (run / name).unlink()
    done = train(TrainConfig(resume=run))
    assert done.history["epoch"] == [1]
    assert (run / "last.pt").read_bytes() == before


def test_a_pipeline_stage_stays_one_and_names_the_command_to_resume(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, whole = dataset.parent / "run", {"category": "plates"}
    step = Step.__call__

    def signalled(self: Any, *inputs: Any, **more: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return step(self, *inputs, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", signalled)
        for part_of, config in ((whole, light(dataset)), (None, TrainConfig(resume=run))):
            caplog.clear()
            with pytest.raises(SystemExit) as ended:
                train(config, part_of=part_of)
            assert ended.value.code == 143
            assert f"saved: flawmask run --resume {run} continues from here" in caplog.messages
            assert json.loads((run / "config.json").read_text())["part_of"] == whole
            for name in names(run):
                if name != "config.json":
                    (run / name).unlink()


def test_settings_are_read_back_as_they_were(dataset: Path) -> None:
    config = settings(dataset, anchor_sizes=(4, 8, 16, 24, 32), batch_size="auto", time_budget="3s", log="none")
    write_json(dataset.parent / "run" / "config.json", {"settings": as_json(config)})
    assert resume.settings_of(dataset.parent / "run") == config


@pytest.mark.slow
def test_the_initial_weights_file_is_not_needed_for_a_resume(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(settings(dataset)).run_dir / "best.pt"
    changed = settings(dataset, epochs=2, weights=str(first), output_dir=dataset.parent / "more")
    run = interrupted(changed, monkeypatch, after=1)
    first.rename(dataset.parent / "first.pt")
    done = train(TrainConfig(resume=run))
    # The same layers are trained as before: with pretrained weights, not the first two stages.
    again = replace(changed, weights=str(dataset.parent / "first.pt"), output_dir=dataset.parent / "whole")
    whole = train(again)
    assert done.history["train_loss"] == whole.history["train_loss"]
    assert same_weights(done.run_dir / "last.pt", whole.run_dir / "last.pt")
