"""The files and logs of a training, and the errors that stop it before it writes anything."""

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from files_read_back import names
from mlflow import MlflowClient
from stained_plates import light, make_dataset, same_weights, settings
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from flawmask.errors import FlawmaskError
from flawmask.evaluation.config import EvaluateConfig
from flawmask.evaluation.evaluate import evaluate
from flawmask.images import read_image
from flawmask.model import checkpoint
from flawmask.training import loader, loop
from flawmask.training.config import TrainConfig
from flawmask.training.epoch import train_epoch
from flawmask.training.loop import Trained, train
from flawmask.training.pictures import draw_train_batch
from flawmask.training.resume import EpochProgress
from flawmask.training.step import Step

CHECKPOINTS, PICTURES = "best.pt last.pt state.pt state_before.pt", "curves.png labels.png train_batch.jpg"
RUN_FILES = sorted(f"{CHECKPOINTS} {PICTURES} config.json history.json training_images.json".split())
FIRST_FILES = [name for name in RUN_FILES if name != "state_before.pt"]  # after one epoch
LOSSES = ("loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Four training images and two validation images."""
    return make_dataset(tmp_path / "data")


@pytest.mark.usefixtures("drawn")
def test_a_run_folder_is_complete_and_describes_the_run(dataset: Path) -> None:
    done = train(settings(dataset, epochs=3))
    assert names(done.run_dir) == RUN_FILES
    history = json.loads((done.run_dir / "history.json").read_text())
    assert history == done.history
    expected = {
        "epoch",
        "train_loss",
        "val_loss",
        "learning_rate",
        "elapsed",
        "seconds",
        "images_per_second",
        "waiting",
    } | {
        "skipped_steps",
        *LOSSES,
    }
    assert set(history) == expected
    assert {len(values) for values in history.values()} == {3}
    assert history["epoch"] == [1, 2, 3]
    for epoch in range(3):
        assert history["train_loss"][epoch] == pytest.approx(sum(history[name][epoch] for name in LOSSES), rel=1e-5)
        assert history["images_per_second"][epoch] == pytest.approx(4 / history["seconds"][epoch])
    assert all(math.isfinite(value) and value > 0 for value in history["val_loss"])
    assert all(0 <= share < 1 for share in history["waiting"])
    assert history["skipped_steps"] == [0, 0, 0]
    # The rate of the last of an epoch's two steps: AdamW from scratch at a tenth of 0.005.
    rates = [0.0005 * (1 + math.cos(math.pi * (done - 0.1) / 0.9)) / 2 for done in (1 / 6, 3 / 6, 5 / 6)]
    assert history["learning_rate"] == pytest.approx(rates)

    written = json.loads((done.run_dir / "config.json").read_text())
    assert written["settings"]["epochs"] == 3
    assert written["settings"]["seed"] == 0
    assert written["settings"]["dataset_dir"] == dataset.as_posix()
    assert written["model"]["classes"] == ["good", "defect"]
    assert written["model"]["norm"] == "group"
    assert written["precision"] == "float32"
    assert written["device"] == "cpu"
    assert {"flawmask", "torch", "torchvision", "python"} <= set(written["versions"])

    best = torch.load(done.run_dir / "best.pt", weights_only=True)
    last = torch.load(done.run_dir / "last.pt", weights_only=True)
    losses = history["train_loss"]
    assert best["epoch"] == done.best_epoch == 1 + losses.index(min(losses))
    assert best["train_loss"] == min(losses)
    assert last["epoch"] == 3
    _, spec = checkpoint.load(done.run_dir / "best.pt")
    assert (spec.image_size, spec.proposals, spec.max_detections) == (64, 30, 10)
    assert spec.anchor_sizes == (4, 5, 10, 20, 41)

    height, width = read_image(done.run_dir / "curves.png").shape[:2]
    assert width > 1000
    assert height > 300


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A training without a tracker."""
    return train(settings(make_dataset(tmp_path_factory.mktemp("quiet") / "data"), epochs=2))


@pytest.mark.slow
@pytest.mark.parametrize("log", ["tensorboard", "mlflow"])
def test_trackers_get_history_and_masks_and_change_no_weight(
    dataset: Path, quiet: Trained, monkeypatch: pytest.MonkeyPatch, log: str
) -> None:
    monkeypatch.chdir(dataset.parent)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{(dataset.parent / 'tracking.db').as_posix()}")
    tracked = train(settings(dataset, epochs=2, log=log, output_dir=dataset.parent / "tracked"))
    assert same_weights(quiet.run_dir / "last.pt", tracked.run_dir / "last.pt")
    assert {name: tracked.history[name] for name in LOSSES} == {name: quiet.history[name] for name in LOSSES}
    assert tracked.history["val_loss"] == quiet.history["val_loss"]
    assert set(tracked.history) - set(quiet.history) == {"segm_ap", "f1"}
    figures, pictures = (in_tensorboard if log == "tensorboard" else in_mlflow)(tracked.run_dir)
    assert set(figures) == set(tracked.history) - {"epoch"}
    for name, values in figures.items():
        assert values == pytest.approx([value for value in tracked.history[name] if value is not None], rel=1e-6)
    assert pictures == ["1.png", "2.png"]


def in_tensorboard(run_dir: Path) -> tuple[dict[str, list[float]], list[str]]:
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    tags = events.Tags()
    figures = {tag.split("/")[1]: [event.value for event in events.Scalars(tag)] for tag in tags["scalars"]}
    return figures, [tag.removeprefix("predictions/") for tag in tags["images"]]


def in_mlflow(run_dir: Path) -> tuple[dict[str, list[float]], list[str]]:
    client = MlflowClient()
    (run,) = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert (run.info.run_name, run.info.status) == (run_dir.name, "FINISHED")
    assert (run.data.params["epochs"], run.data.params["seed"]) == ("2", "0")
    figures = {
        name: [metric.value for metric in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics
    }
    return figures, sorted(
        {Path(file.path).name.split("+")[0] for file in client.list_artifacts(run.info.run_id, "images")}
    )


@pytest.mark.parametrize("broken_epoch", [1, 2])
def test_a_stopped_training_is_failed_in_mlflow(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, broken_epoch: int
) -> None:

    def epoch(run: Any, batches: Any) -> EpochProgress:
        if run.epoch == broken_epoch:
            raise FlawmaskError("the loss is nan")
        return train_epoch(run, batches)

    monkeypatch.chdir(dataset.parent)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{(dataset.parent / 'tracking.db').as_posix()}")
    monkeypatch.setattr("flawmask.training.epoch.train_epoch", epoch)
    refused("the loss is nan", light(dataset, epochs=2, log="mlflow"))
    client = MlflowClient()
    (run,) = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert run.info.status == "FAILED"
    assert ("train_loss" in run.data.metrics) == (dataset.parent / "run").exists() == (broken_epoch == 2)


@pytest.mark.parametrize("log", ["tensorboard", "mlflow"])
def test_a_missing_tracker_is_refused_with_the_command_to_install_it(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, log: str
) -> None:
    monkeypatch.setitem(sys.modules, log, None)  # an import of it fails from now on
    with pytest.raises(ImportError):
        importlib.import_module(log)
    with pytest.raises(FlawmaskError, match=rf'--log {log} .* pip install "flawmask\[{log}\]"$'):
        train(settings(dataset, log=log))
    settings(dataset)
    assert names(dataset.parent) == ["data"]


def test_pictures_are_there_during_training(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = []

    def epoch(*inputs: Any) -> Any:
        run = dataset.parent / "run"
        there.append(names(run) if run.exists() else None)
        return train_epoch(*inputs)

    monkeypatch.setattr("flawmask.training.epoch.train_epoch", epoch)
    train(light(dataset, epochs=2))
    assert there == [None, FIRST_FILES]


def test_the_pictured_batches_are_the_first_training_batches(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned: list[list[int]] = []
    shown: list[list[int]] = []
    step = Step.__call__

    def stepping(self: Any, batch: loader.Batch, *inputs: Any, **more: Any) -> Any:
        learned.append([int(target["image_id"]) for target in batch.targets])
        return step(self, batch, *inputs, **more)

    def drawing(network: Any, detector: Any, batches: Any, *inputs: Any) -> None:
        listed = list(batches)
        shown.extend([int(target["image_id"]) for target in batch.targets] for batch in listed)
        draw_train_batch(network, detector, listed, *inputs)

    monkeypatch.setattr(Step, "__call__", stepping)
    monkeypatch.setattr("flawmask.training.callbacks.draw_train_batch", drawing)
    train(light(dataset, seed=3))
    assert shown == learned
    assert len(shown) == 2


def test_each_epoch_is_a_row_of_one_table(caplog: pytest.LogCaptureFixture) -> None:
    figures = {"train_loss": 1.25, "val_loss": None, "segm_ap": None, "learning_rate": 0.005, "images_per_second": 7.0}
    with caplog.at_level("INFO"):
        for epoch in (1, 2, 21, 120):
            loop._log_epoch(figures | {"epoch": epoch, "f1": epoch / 200}, 120, 60.0 * (120 - epoch), epoch == 2)
    lines = [one.getMessage() for one in caplog.records]
    head = "   epoch  train_loss  val_loss   segm_ap        f1        lr  images/s  remaining"
    assert lines == [
        head,
        "   1/120      1.2500       n/a       n/a    0.0050  5.00e-03       7.0    1:59:00",
        "   2/120      1.2500       n/a       n/a    0.0100  5.00e-03       7.0    1:58:00  best so far",
        head,
        "  21/120      1.2500       n/a       n/a    0.1050  5.00e-03       7.0    1:39:00",
        " 120/120      1.2500       n/a       n/a    0.6000  5.00e-03       7.0    0:00:00",
    ]


def refused(says: str, config: TrainConfig) -> None:
    with pytest.raises(FlawmaskError, match=says) as caught:
        train(config)
    assert "\n" not in str(caught.value)


def test_an_earlier_run_is_replaced_only_with_overwrite_and_completely(dataset: Path) -> None:
    done: Trained = train(light(dataset))
    (done.run_dir / "inference_val").mkdir()
    refused("run already holds a run: .* --overwrite", light(dataset))
    assert "inference_val" in names(done.run_dir)
    train(light(dataset, overwrite=True))
    assert names(done.run_dir) == FIRST_FILES


@pytest.mark.parametrize("name", ["thesis.txt", "config.json"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_holds_something_else_is_never_replaced(dataset: Path, name: str, overwrite: bool) -> None:
    out = dataset.parent / "run"
    out.mkdir()
    (out / name).write_text('{"years": "of work"}')
    refused("run (holds something else|already holds)", settings(dataset, overwrite=overwrite))
    assert names(out) == [name]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_stops_training_with_one_line_and_keeps_the_earlier_run(dataset: Path, workers: int) -> None:
    done = train(light(dataset))
    before = (done.run_dir / "best.pt").read_bytes()
    path = dataset / "train" / "images" / "3.png"
    path.write_bytes(path.read_bytes()[:-60])
    refused(r"3\.png cannot be read as an image", light(dataset, overwrite=True, workers=workers))
    assert (done.run_dir / "best.pt").read_bytes() == before


def edit(dataset: Path, split: str, **changes: Any) -> None:
    path = dataset / split / "annotations.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_unusable_training_data_is_refused_and_nothing_is_written(dataset: Path) -> None:
    refused("--num_classes is 3, but .*train has 2: good, defect", settings(dataset, num_classes=3))
    edit(dataset, "val", categories=[{"id": 1, "name": "good"}, {"id": 2, "name": "crack"}])
    refused("other categories in train than in val", settings(dataset))
    (dataset / "val").rename(dataset / "test")
    refused(r"--select_by val_loss needs .*val", settings(dataset, select_by="val_loss"))
    edit(dataset, "train", annotations=[])
    refused("has no defect annotated", settings(dataset))
    (dataset / "train").rename(dataset / "training")
    refused("data has no split train: it holds test, training", settings(dataset))
    assert names(dataset.parent) == ["data"]


def test_a_missing_device_and_an_unsupported_precision_are_refused(dataset: Path) -> None:
    refused("--device tpu is not there", settings(dataset, device="tpu"))
    refused("--precision fp16 needs CUDA", settings(dataset, precision="fp16"))
    assert names(dataset.parent) == ["data"]


def test_a_run_records_its_training_groups_and_their_other_images_are_not_evaluated(dataset: Path) -> None:
    for split, groups in {"train": "abcc", "val": "dc"}.items():
        path = dataset / split / "annotations.json"
        content = json.loads(path.read_text())
        for image, group in zip(content["images"], groups, strict=True):
            image["group"] = group
        path.write_text(json.dumps(content))
    run_dir = train(light(dataset)).run_dir
    written = json.loads((run_dir / "training_images.json").read_text())
    assert written["groups"] == {"category": None, "group_by": None, "names": ["a", "b", "c"]}
    given: dict[str, Any] = {"model": run_dir / "best.pt", "dataset_dir": dataset, "device": "cpu"}
    with pytest.raises(FlawmaskError, match=r"1 of 2 images show parts that were used for training \(2\.png shows c"):
        evaluate(EvaluateConfig(**given))
    metrics = evaluate(EvaluateConfig(**given, allow_leak=True)).metrics
    assert "1 of these 2 images show parts that were used for training: the figures are too good." in metrics["notes"]
