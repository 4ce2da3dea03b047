"""A training that was interrupted goes on as if it had not been."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from files_read_back import names
from stained_plates import make_dataset, same_weights, settings

from flawmask.errors import FlawmaskError
from flawmask.files import write_json
from flawmask.images import write_png
from flawmask.settings import as_json
from flawmask.training import fit, loop, resume
from flawmask.training.config import TrainConfig
from flawmask.training.loop import train
from flawmask.training.step import Step

TIMES = {"seconds", "images_per_second", "waiting"}


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Four images to learn from and two to validate on."""
    return make_dataset(tmp_path / "data")


class PowerCutError(Exception):
    """What nobody catches."""


def interrupted(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, after: int) -> Path:
    """Train so many epochs, and some more that are lost."""
    train_epoch = loop._train_epoch
    done = []

    def epoch(*given: Any) -> Any:
        figures = train_epoch(*given)
        done.append(figures)
        if len(done) > after:
            raise PowerCutError
        return figures

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_train_epoch", epoch)
        with pytest.raises(PowerCutError):
            train(config)
    assert config.output_dir is not None
    return config.output_dir


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ema": True, "optimizer": "sgd"},
        {"norm": "batch", "ema": True, "select_by": "val_loss"},
        {"precision": "bf16", "norm": "frozen", "anchor_sizes": (4, 8, 16, 24, 32)},
    ],
)
def test_an_interrupted_training_ends_with_the_weights_of_one_that_was_not(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    whole = train(settings(dataset, epochs=4, **changes))
    run = interrupted(settings(dataset, epochs=4, output_dir=dataset.parent / "cut", **changes), monkeypatch, after=2)
    assert json.loads((run / "history.json").read_text())["epoch"] == [1, 2]
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


def test_a_run_that_was_moved_goes_on_where_it_lies_now(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = interrupted(settings(dataset, epochs=2), monkeypatch, after=1)
    run = run.rename(dataset.parent / "elsewhere")
    assert train(TrainConfig(resume=run)).history["epoch"] == [1, 2]
    assert not (dataset.parent / "run").exists()


def test_a_finished_run_has_nothing_left_to_do(dataset: Path) -> None:
    done = train(settings(dataset))
    before = (done.run_dir / "last.pt").read_bytes()
    again = train(TrainConfig(resume=done.run_dir))
    assert again.history == done.history
    assert (done.run_dir / "last.pt").read_bytes() == before


def test_time_that_was_spent_before_counts(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "image_size_for", lambda *_: 64)
    run = interrupted(settings(dataset, time_budget="1h"), monkeypatch, after=1)
    content = torch.load(run / "state.pt", weights_only=True)
    assert 0 < content["seconds"] < 600
    torch.save(content | {"seconds": 3601.0}, run / "state.pt")
    assert train(TrainConfig(resume=run)).history["epoch"] == [1]


def test_images_that_passed_at_once_are_remembered(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step.__call__

    def stepping(self: Any, *given: Any) -> Any:
        self.at_once = 1  # as after memory ran out
        return step(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", stepping)
        run = interrupted(settings(dataset, epochs=2), monkeypatch, after=1)
    train(TrainConfig(resume=run))
    assert torch.load(run / "state.pt", weights_only=True)["at_once"] == 1


def refused(says: str, run: Path) -> None:
    before = names(run) if run.exists() else None
    with pytest.raises(FlawmaskError, match=says) as caught:
        train(TrainConfig(resume=run))
    assert "\n" not in str(caught.value)
    assert (names(run) if run.exists() else None) == before


def test_other_images_than_it_began_with_are_refused(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = interrupted(settings(dataset, epochs=2), monkeypatch, after=1)
    path = dataset / "train" / "images" / "2.png"
    original = path.read_bytes()
    write_png(path, np.zeros((72, 72, 3), np.uint8))
    refused(r"--resume .*run: the images of .*data are not those that it began with", run)
    path.write_bytes(original)
    train(TrainConfig(resume=run))


def test_what_is_no_run_is_refused(dataset: Path) -> None:
    refused(r"--resume .*nowhere: there is no state\.pt", dataset.parent / "nowhere")
    refused(r"--resume .*data: there is no state\.pt", dataset)
    run = train(settings(dataset)).run_dir
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


def test_settings_are_read_back_as_they_were(dataset: Path) -> None:
    config = settings(dataset, anchor_sizes=(4, 8, 16, 24, 32), batch_size="auto", time_budget="3s", log="none")
    write_json(dataset.parent / "run" / "config.json", {"settings": as_json(config)})
    assert resume.settings_of(dataset.parent / "run") == config


@pytest.mark.slow
def test_a_file_of_weights_that_a_run_started_from_need_not_be_there_any_more(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train(settings(dataset)).run_dir / "best.pt"
    changed = settings(dataset, epochs=2, weights=str(first), output_dir=dataset.parent / "more")
    run = interrupted(changed, monkeypatch, after=1)
    first.rename(dataset.parent / "first.pt")
    done = train(TrainConfig(resume=run))
    # And it learns what it learned before: from pretrained weights, the first two stages do not.
    again = replace(changed, weights=str(dataset.parent / "first.pt"), output_dir=dataset.parent / "whole")
    whole = train(again)
    assert done.history["train_loss"] == whole.history["train_loss"]
    assert same_weights(done.run_dir / "last.pt", whole.run_dir / "last.pt")
