"""Training: eight images are learned, the best epoch is chosen, and irrelevant settings change no weight."""

import json
import logging
import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from files_read_back import names
from small_network import BOX_HEAD
from stained_plates import light, make_dataset, make_split, part, same_weights, settings, weights_of

from flawmask.coco import read_split
from flawmask.errors import FlawmaskError
from flawmask.inference.predictor import Predictor
from flawmask.model import checkpoint
from flawmask.model.weights import Pretrained
from flawmask.training import epoch, loader, loop
from flawmask.training.loop import train
from flawmask.training.network import spec_for
from flawmask.training.resume import EpochProgress
from flawmask.training.step import Step


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Four training images and two validation images."""
    return make_dataset(tmp_path / "data")


@pytest.mark.slow
def test_eight_images_are_learned_from_scratch_until_every_defect_is_detected(tmp_path: Path) -> None:
    make_split(tmp_path / "data" / "train", range(8))
    changes = {"epochs": 30, "batch_size": 1, "proposals": 100, "lr": 0.01, "seed": 3, "train_augment": "off"}
    done = train(settings(tmp_path / "data", **changes))
    losses = done.history["train_loss"]
    assert losses[-1] < 0.25 * losses[0]
    predictor = Predictor(done.run_dir / "best.pt", "cpu")
    for number in range(8):
        pixels, mask = part(number)
        prediction = predictor(pixels)
        found = prediction.defect_mask(0.5)
        assert prediction.verdict(0.5).is_defect
        assert (found & mask).sum() / (found | mask).sum() > 0.6


def learned(loss: float | None, losses: int = 5) -> EpochProgress:
    """Return what an epoch of four images with that mean loss, all of it in the first of several, has added up."""
    assert loss is not None
    return EpochProgress(sums=[4 * loss, *[0.0] * (losses - 1)], learned=4, seen=4, seconds=1.0)


@pytest.mark.parametrize(
    ("select_by", "values", "best"),
    [
        ("train_loss", [3.0, 1.0, 2.0], 2),
        ("val_loss", [3.0, 2.0, 2.0], 2),
        ("val_loss", [None, 2.0, 3.0], 2),
        ("segm_ap", [0.1, 0.3, 0.3], 2),
        ("segm_ap", [0.0, None, 0.1], 3),
        ("f1", [None, None, None], 3),
        ("f1", [0.9, 0.5, 0.8], 1),
    ],
)
def test_select_by_decides_the_best_epoch(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, select_by: str, values: list[float | None], best: int
) -> None:
    losses_of_epochs = iter(values)

    monkeypatch.setattr(
        epoch,
        "train_epoch",
        lambda *_: learned(next(losses_of_epochs) if select_by == "train_loss" else 1.0),
    )
    monkeypatch.setattr(
        epoch,
        "validation_loss",
        lambda *_: {"val_loss": next(losses_of_epochs) if select_by == "val_loss" else 1.0},
    )
    monkeypatch.setattr(
        epoch,
        "_validation_metrics",
        lambda *_: {"segm_ap": 0.5, "f1": 0.5} | {select_by: next(losses_of_epochs)},
    )
    monkeypatch.setattr(checkpoint, "save", lambda path, *_, epoch, **__: path.write_text(str(epoch)))
    done = train(light(dataset, epochs=3, select_by=select_by))
    assert done.best_epoch == best
    assert (done.run_dir / "best.pt").read_text() == str(best)
    assert (done.run_dir / "last.pt").read_text() == "3"


@pytest.mark.parametrize(
    ("size", "asked", "expected"), [(800, None, 1000), (512, None, 640), (64, None, 200), (64, 9, 9)]
)
def test_the_number_of_region_proposals_is_as_set_or_follows_the_image_size(
    dataset: Path, size: int, asked: int | None, expected: int
) -> None:
    initial_weights = Pretrained({}, "group", None, "")
    spec = spec_for(settings(dataset, proposals=asked), read_split(dataset, "train"), initial_weights, size, 4)
    assert (spec.image_size, spec.proposals) == (size, expected)


def test_a_validation_metric_that_selects_is_in_the_history(dataset: Path) -> None:
    done = train(settings(dataset, select_by="f1"))
    assert set(done.history) >= {"segm_ap", "f1"}
    assert 0 <= done.history["segm_ap"][0] <= 1


def test_the_export_of_another_tool_trains_like_the_original_folder(dataset: Path) -> None:
    whole = train(light(dataset)).run_dir
    export = dataset.rename(dataset.parent / "export")
    (export / "val").rename(export / "valid")
    for name in ("train", "valid"):
        for path in (export / name / "images").iterdir():
            path.rename(export / name / path.name)
        records = json.loads((export / name / "annotations.json").read_text())
        for record in records["annotations"]:
            for field in ("area", "iscrowd", "bbox"):
                del record[field]
        (export / name / "annotations.json").unlink()
        (export / name / "_annotations.coco.json").write_text(json.dumps(records))
    run = train(light(export, output_dir=export.parent / "other")).run_dir
    assert same_weights(whole / "last.pt", run / "last.pt")
    assert (run / "best.pt").is_file()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_and_another_seed_other_weights(dataset: Path) -> None:
    runs = [
        train(settings(dataset, output_dir=dataset.parent / f"run_{at}", seed=seed)).run_dir / "last.pt"
        for at, seed in enumerate([0, 0, 1])
    ]
    assert same_weights(runs[0], runs[1])
    assert not same_weights(runs[0], runs[2])


@pytest.mark.slow
def test_the_validation_split_does_not_affect_training(dataset: Path) -> None:
    with_val = train(settings(dataset, epochs=2))
    (dataset / "val").rename(dataset / "unused")
    without = train(settings(dataset, epochs=2, output_dir=dataset.parent / "without"))
    assert without.history["val_loss"] == [None, None]
    assert without.history["train_loss"] == with_val.history["train_loss"]
    assert same_weights(with_val.run_dir / "last.pt", without.run_dir / "last.pt")


@pytest.mark.slow
def test_plain_sgd_at_the_default_rate_stays_finite_from_scratch(dataset: Path) -> None:
    done = train(settings(dataset, epochs=6, optimizer="sgd", lr=0.005))
    assert done.history["train_loss"][-1] < done.history["train_loss"][0]


def test_training_starts_from_a_file_and_logs_what_did_not_match(
    dataset: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train(settings(dataset)).run_dir / "best.pt"
    for split in ("train", "val"):
        path = dataset / split / "annotations.json"
        content = json.loads(path.read_text())
        content["categories"].append({"id": 3, "name": "hole"})
        path.write_text(json.dumps(content))
    with caplog.at_level(logging.DEBUG, "flawmask"):
        changes = {
            "batch_size": "auto",
            "time_budget": "1h",
            "epochs": 1,
            "trainable_layers": 0,
        }  # with trials before training
        monkeypatch.setattr(loop, "_is_done", lambda run: run.epoch > 0)
        done = train(settings(dataset, weights=str(first), output_dir=dataset.parent / "more", **changes))
    said = [one.getMessage() for one in caplog.records if one.levelno == logging.INFO and "tensors" in one.getMessage()]
    before = torch.load(first, weights_only=True)["model_state_dict"]
    filled = f"{len(before) - 6} tensors loaded (backbone.body, backbone.fpn, rpn, roi_heads)"
    assert said == [f"weights of {first}: {filled}; 6 drawn at random (roi_heads)"]
    lines = json.loads((done.run_dir / "config.json").read_text())["not_loaded"]
    assert len(lines) == 6
    assert f"roi_heads.box_predictor.cls_score.weight [4, {BOX_HEAD}]: the file has [3, {BOX_HEAD}]" in lines
    details = [one.getMessage() for one in caplog.records if one.levelno == logging.DEBUG]
    assert [f"  not loaded: {line}" for line in lines] == [one for one in details if "not loaded" in one]
    after = torch.load(done.run_dir / "last.pt", weights_only=True)["model_state_dict"]
    bodies = [name for name in before if name.startswith("backbone.body")]
    assert all(torch.equal(before[name], after[name]) for name in bodies), "a frozen stage has changed"
    assert not torch.equal(before["rpn.head.bbox_pred.weight"], after["rpn.head.bbox_pred.weight"])


def test_bf16_trains_and_is_written_in_float32(dataset: Path) -> None:
    done = train(settings(dataset, precision="bf16"))
    assert json.loads((done.run_dir / "config.json").read_text())["precision"] == "bfloat16"
    state = torch.load(done.run_dir / "best.pt", weights_only=True)["model_state_dict"]
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


@pytest.mark.parametrize("select_by", ["train_loss", "val_loss"])
def test_patience_ends_a_training_that_no_longer_improves(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, select_by: str
) -> None:
    losses_of_epochs = iter([3.0, 1.0, 2.0, 1.0, 0.5])

    monkeypatch.setattr(
        epoch, "train_epoch", lambda *_: learned(next(losses_of_epochs) if select_by == "train_loss" else 1.0)
    )
    monkeypatch.setattr(
        epoch,
        "validation_loss",
        lambda *_: {"val_loss": next(losses_of_epochs) if select_by == "val_loss" else 1.0},
    )
    done = train(light(dataset, epochs=9, select_by=select_by, patience=2))
    assert (done.best_epoch, done.history["epoch"]) == (2, [1, 2, 3, 4])


@pytest.mark.parametrize("changes", [{}, {"ema": True}, {"train_augment": "strong"}, {"train_augment": "off"}])
def test_the_image_cache_changes_no_weight(dataset: Path, changes: dict[str, Any]) -> None:
    kept = train(light(dataset, epochs=2, **changes))
    anew = train(light(dataset, epochs=2, **changes, cache_gb=0.0, output_dir=dataset.parent / "anew"))
    assert same_weights(kept.run_dir / "last.pt", anew.run_dir / "last.pt")
    assert kept.history["val_loss"] == anew.history["val_loss"]


@pytest.mark.parametrize("augment", ["off", "light"])
@pytest.mark.parametrize(("kept", "decodings"), [(4.0, 1), (0.0, 3)])
def test_a_cached_image_is_decoded_only_once(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, kept: float, decodings: int, augment: Literal["off", "light"]
) -> None:
    decoded: Counter[Path] = Counter()
    read = loader.SplitDataset._read_original

    def counting(self: loader.SplitDataset, place: int) -> Any:
        decoded[self.split.image_path(self.split.images[place])] += 1
        return read(self, place)

    monkeypatch.setattr(loader.SplitDataset, "_read_original", counting)
    monkeypatch.setattr("flawmask.training.callbacks.draw_train_batch", lambda *_: None)
    train(light(dataset, epochs=3, cache_gb=kept, train_augment=augment))
    assert set(decoded.values()) == {decodings}
    assert len(decoded) == 6


def test_the_image_cache_is_deleted_even_if_training_fails(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = dataset.parent / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    train(light(dataset))
    assert names(scratch) == []
    (dataset / "train" / "images" / "3.png").write_bytes(b"no image")
    with pytest.raises(FlawmaskError):
        train(light(dataset, overwrite=True))
    assert names(scratch) == []


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_the_moving_average_is_evaluated_and_saved(dataset: Path, norm: str) -> None:
    make = settings if norm == "group" else light
    plain = train(make(dataset, epochs=2, norm=norm))
    averaged = train(make(dataset, epochs=2, norm=norm, ema=True, output_dir=dataset.parent / "averaged"))
    # The trained weights are the same: the average only follows them.
    assert averaged.history["train_loss"] == plain.history["train_loss"]
    assert averaged.history["val_loss"] != plain.history["val_loss"]
    assert all(math.isfinite(value) for name in ("train_loss", "val_loss") for value in averaged.history[name])
    for name in ("best.pt", "last.pt"):
        assert not same_weights(plain.run_dir / name, averaged.run_dir / name)
    states = [torch.load(run.run_dir / "state.pt", weights_only=True)["tensors"] for run in (plain, averaged)]
    assert states[0]["averaged"] is None
    assert all(torch.equal(one, states[0]["model"][name]) for name, one in states[1]["model"].items())
    written = weights_of(averaged.run_dir / "last.pt")
    assert all(torch.equal(one, written[name]) for name, one in states[1]["averaged"].items())


@pytest.mark.parametrize(("norm", "micro_batch_size"), [("batch", 2), ("group", 1)])
def test_a_step_uses_the_effective_batch_size_and_a_cpu_goes_image_by_image_where_possible(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, norm: str, micro_batch_size: int
) -> None:
    passes: list[tuple[int, int]] = []
    step = Step.__call__

    def stepping(self: Any, batch: loader.Batch, *inputs: Any, **more: Any) -> Any:
        passes.append((len(batch), self.micro_batch_size))
        return step(self, batch, *inputs, **more)

    monkeypatch.setattr(Step, "__call__", stepping)
    done = train(settings(dataset, epochs=2, batch_size=2, effective_batch_size=4, norm=norm))
    assert passes == [(4, micro_batch_size), (4, micro_batch_size)]
    written = json.loads((done.run_dir / "config.json").read_text())
    assert (written["images_at_once"], written["images_per_step"], written["processes"]) == (micro_batch_size, 4, 1)
