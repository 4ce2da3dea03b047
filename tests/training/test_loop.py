"""Training: eight images are learned, what is written says what happened, and what must stop it does."""

import importlib
import json
import math
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from files_read_back import names
from mlflow import MlflowClient
from stained_plates import make_dataset, make_split, part, same_weights, settings, weights_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from flawmask.coco import read_split
from flawmask.errors import FlawmaskError
from flawmask.images import read_image
from flawmask.inference.predictor import Predictor
from flawmask.model import checkpoint
from flawmask.model.weights import Pretrained
from flawmask.training import loader, loop
from flawmask.training.config import TrainConfig
from flawmask.training.loop import Trained, train
from flawmask.training.pictures import draw_train_batch
from flawmask.training.resume import Within
from flawmask.training.start import spec_for
from flawmask.training.step import Step

CHECKPOINTS, PICTURES = "best.pt last.pt state.pt state_before.pt", "curves.png labels.png train_batch.jpg"
RUN_FILES = sorted(f"{CHECKPOINTS} {PICTURES} config.json history.json training_images.json".split())
FIRST_FILES = [name for name in RUN_FILES if name != "state_before.pt"]  # after one epoch
LOSSES = ("loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Four images to learn from and two to validate on."""
    return make_dataset(tmp_path / "data")


@pytest.mark.slow
def test_eight_images_are_learned_from_nothing_until_every_defect_is_found(tmp_path: Path) -> None:
    make_split(tmp_path / "data" / "train", range(8))
    done = train(settings(tmp_path / "data", epochs=30, proposals=100, lr=0.01, seed=3))
    losses = done.history["train_loss"]
    assert losses[-1] < 0.25 * losses[0]
    predictor = Predictor(done.run_dir / "best.pt", "cpu")
    for number in range(8):
        pixels, mask = part(number)
        prediction = predictor(pixels)
        found = prediction.defect_mask(0.5)
        assert prediction.verdict(0.5).is_defect
        assert (found & mask).sum() / (found | mask).sum() > 0.6


def test_a_run_is_written_whole_and_says_what_happened(dataset: Path) -> None:
    done = train(settings(dataset, epochs=3))
    assert names(done.run_dir) == RUN_FILES
    history = json.loads((done.run_dir / "history.json").read_text())
    assert history == done.history
    expected = {"epoch", "train_loss", "val_loss", "learning_rate", "seconds", "images_per_second", "waiting"} | {
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
    # Of the last of an epoch's two steps, from nothing AdamW at a tenth of 0.005.
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


def learned(loss: float | None) -> Within:
    """Return what an epoch of four images with that mean loss has added up."""
    assert loss is not None
    return Within(sums=[4 * loss, 0.0, 0.0, 0.0, 0.0], learned=4, seen=4, seconds=1.0)


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
def test_the_best_epoch_is_the_one_that_select_by_names(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, select_by: str, values: list[float | None], best: int
) -> None:
    told = iter(values)

    monkeypatch.setattr(loop, "_train_epoch", lambda *_: learned(next(told) if select_by == "train_loss" else 1.0))
    monkeypatch.setattr(
        loop, "_validation_loss", lambda *_: {"val_loss": next(told) if select_by == "val_loss" else 1.0}
    )
    monkeypatch.setattr(
        loop,
        "_validation_figures",
        lambda *_: {"segm_ap": 0.5, "f1": 0.5} | {select_by: next(told)},
    )
    monkeypatch.setattr(checkpoint, "save", lambda path, *_, epoch, **__: path.write_text(str(epoch)))
    done = train(settings(dataset, epochs=3, select_by=select_by))
    assert done.best_epoch == best
    assert (done.run_dir / "best.pt").read_text() == str(best)
    assert (done.run_dir / "last.pt").read_text() == "3"


@pytest.mark.parametrize(
    ("size", "asked", "expected"), [(800, None, 1000), (512, None, 640), (64, None, 200), (64, 9, 9)]
)
def test_a_network_looks_at_as_many_regions_as_asked_or_as_the_images_have_room_for(
    dataset: Path, size: int, asked: int | None, expected: int
) -> None:
    given = Pretrained({}, "group", None, "")
    spec = spec_for(settings(dataset, proposals=asked), read_split(dataset, "train"), given, size, 4)
    assert (spec.image_size, spec.proposals) == (size, expected)


def test_selecting_by_a_figure_of_the_validation_split_writes_it_down(dataset: Path) -> None:
    done = train(settings(dataset, select_by="f1"))
    assert set(done.history) >= {"segm_ap", "f1"}
    assert 0 <= done.history["segm_ap"][0] <= 1


def test_the_export_of_another_tool_trains_as_the_folder_that_it_is_of(dataset: Path) -> None:
    whole = train(settings(dataset)).run_dir
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
    run = train(settings(export, output_dir=export.parent / "other")).run_dir
    assert same_weights(whole / "last.pt", run / "last.pt")
    assert (run / "best.pt").is_file()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_and_another_one_others(dataset: Path) -> None:
    runs = [
        train(settings(dataset, output_dir=dataset.parent / f"run_{at}", seed=seed)).run_dir / "last.pt"
        for at, seed in enumerate([0, 0, 1])
    ]
    assert same_weights(runs[0], runs[1])
    assert not same_weights(runs[0], runs[2])


@pytest.mark.slow
@pytest.mark.parametrize("log", ["tensorboard", "mlflow"])
def test_logging_tells_the_history_and_some_masks_and_changes_no_weight(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, log: str
) -> None:
    quiet = train(settings(dataset, epochs=2))
    monkeypatch.chdir(dataset.parent)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{(dataset.parent / 'tracking.db').as_posix()}")
    told = train(settings(dataset, epochs=2, log=log, output_dir=dataset.parent / "told"))
    assert same_weights(quiet.run_dir / "last.pt", told.run_dir / "last.pt")
    assert {name: told.history[name] for name in LOSSES} == {name: quiet.history[name] for name in LOSSES}
    assert told.history["val_loss"] == quiet.history["val_loss"]
    assert set(told.history) - set(quiet.history) == {"segm_ap", "f1"}
    figures, pictures = (in_tensorboard if log == "tensorboard" else in_mlflow)(told.run_dir)
    assert set(figures) == set(told.history) - {"epoch"}
    for name, values in figures.items():
        assert values == pytest.approx([value for value in told.history[name] if value is not None], rel=1e-6)
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
def test_a_training_that_stops_is_failed_in_mlflow(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, broken_epoch: int
) -> None:
    train_epoch = loop._train_epoch

    def epoch(run: Any, batches: Any) -> Within:
        if run.epoch == broken_epoch:
            raise FlawmaskError("the loss is nan")
        return train_epoch(run, batches)

    monkeypatch.chdir(dataset.parent)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{(dataset.parent / 'tracking.db').as_posix()}")
    monkeypatch.setattr(loop, "_train_epoch", epoch)
    refused("the loss is nan", settings(dataset, epochs=2, log="mlflow"))
    client = MlflowClient()
    (run,) = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert run.info.status == "FAILED"
    assert ("train_loss" in run.data.metrics) == (dataset.parent / "run").exists() == (broken_epoch == 2)


@pytest.mark.parametrize("log", ["tensorboard", "mlflow"])
def test_a_log_that_is_not_installed_is_refused_with_what_installs_it(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, log: str
) -> None:
    monkeypatch.setitem(sys.modules, log, None)  # an import of it fails from now on
    with pytest.raises(ImportError):
        importlib.import_module(log)
    with pytest.raises(FlawmaskError, match=rf'--log {log} .* pip install "flawmask\[{log}\]"$'):
        train(settings(dataset, log=log))
    settings(dataset)
    assert names(dataset.parent) == ["data"]


def test_the_pictures_can_be_looked_at_while_it_trains(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_epoch = loop._train_epoch
    there = []

    def epoch(*given: Any) -> Any:
        run = dataset.parent / "run"
        there.append(names(run) if run.exists() else None)
        return train_epoch(*given)

    monkeypatch.setattr(loop, "_train_epoch", epoch)
    train(settings(dataset, epochs=2))
    assert there == [None, FIRST_FILES]


def test_the_batches_shown_are_those_that_the_network_learned_from_first(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: list[list[int]] = []
    shown: list[list[int]] = []
    step = Step.__call__

    def stepping(self: Any, batch: loader.Batch, *given: Any, **more: Any) -> Any:
        learned.append([int(target["image_id"]) for target in batch[1]])
        return step(self, batch, *given, **more)

    def drawing(network: Any, batches: Any, *given: Any) -> None:
        listed = list(batches)
        shown.extend([int(target["image_id"]) for target in targets] for _, targets in listed)
        draw_train_batch(network, listed, *given)

    monkeypatch.setattr(Step, "__call__", stepping)
    monkeypatch.setattr(loop, "draw_train_batch", drawing)
    train(settings(dataset, seed=3))
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


@pytest.mark.slow
def test_the_validation_split_leaves_no_trace_on_the_training(dataset: Path) -> None:
    with_val = train(settings(dataset, epochs=2))
    (dataset / "val").rename(dataset / "unused")
    without = train(settings(dataset, epochs=2, output_dir=dataset.parent / "without"))
    assert without.history["val_loss"] == [None, None]
    assert without.history["train_loss"] == with_val.history["train_loss"]
    assert same_weights(with_val.run_dir / "last.pt", without.run_dir / "last.pt")


@pytest.mark.slow
def test_plain_sgd_at_the_default_rate_stays_finite_from_nothing(dataset: Path) -> None:
    done = train(settings(dataset, epochs=6, optimizer="sgd", lr=0.005))
    assert done.history["train_loss"][-1] < done.history["train_loss"][0]


def test_training_goes_on_from_a_file_and_lists_what_did_not_fit(
    dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = train(settings(dataset)).run_dir / "best.pt"
    for split in ("train", "val"):
        path = dataset / split / "annotations.json"
        content = json.loads(path.read_text())
        content["categories"].append({"id": 3, "name": "hole"})
        path.write_text(json.dumps(content))
    with caplog.at_level("INFO"):
        done = train(settings(dataset, weights=str(first), output_dir=dataset.parent / "more", trainable_layers=0))
    assert caplog.text.count("not loaded: ") == 6
    assert "roi_heads.box_predictor.cls_score.weight [4, 1024]: the file has [3, 1024]" in caplog.text
    before = torch.load(first, weights_only=True)["model_state_dict"]
    after = torch.load(done.run_dir / "last.pt", weights_only=True)["model_state_dict"]
    bodies = [name for name in before if name.startswith("backbone.body")]
    assert all(torch.equal(before[name], after[name]) for name in bodies), "a frozen stage has changed"
    assert not torch.equal(before["rpn.head.bbox_pred.weight"], after["rpn.head.bbox_pred.weight"])


def test_bf16_trains_and_is_written_in_float32(dataset: Path) -> None:
    done = train(settings(dataset, precision="bf16"))
    assert json.loads((done.run_dir / "config.json").read_text())["precision"] == "bfloat16"
    state = torch.load(done.run_dir / "best.pt", weights_only=True)["model_state_dict"]
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def refused(says: str, config: TrainConfig) -> None:
    with pytest.raises(FlawmaskError, match=says) as caught:
        train(config)
    assert "\n" not in str(caught.value)


def test_an_earlier_run_is_replaced_only_when_asked_and_whole(dataset: Path) -> None:
    done: Trained = train(settings(dataset))
    (done.run_dir / "inference_val").mkdir()
    refused("run already holds a run: .* --overwrite", settings(dataset))
    assert "inference_val" in names(done.run_dir)
    train(settings(dataset, overwrite=True))
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
def test_a_bad_image_stops_the_training_in_one_line_and_keeps_the_earlier_run(dataset: Path, workers: int) -> None:
    done = train(settings(dataset))
    before = (done.run_dir / "best.pt").read_bytes()
    path = dataset / "train" / "images" / "3.png"
    path.write_bytes(path.read_bytes()[:-60])
    refused(r"3\.png cannot be read as an image", settings(dataset, overwrite=True, workers=workers))
    assert (done.run_dir / "best.pt").read_bytes() == before


def edit(dataset: Path, split: str, **changes: Any) -> None:
    path = dataset / split / "annotations.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_data_that_cannot_be_trained_on_is_refused_and_nothing_written(dataset: Path) -> None:
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


def test_a_device_and_a_precision_that_are_not_there_are_refused(dataset: Path) -> None:
    refused("--device tpu is not there", settings(dataset, device="tpu"))
    refused("--precision fp16 needs CUDA", settings(dataset, precision="fp16"))
    assert names(dataset.parent) == ["data"]


@pytest.mark.parametrize("select_by", ["train_loss", "val_loss"])
def test_patience_ends_a_training_that_no_longer_gets_better(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, select_by: str
) -> None:
    told = iter([3.0, 1.0, 2.0, 1.0, 0.5])

    monkeypatch.setattr(loop, "_train_epoch", lambda *_: learned(next(told) if select_by == "train_loss" else 1.0))
    monkeypatch.setattr(
        loop, "_validation_loss", lambda *_: {"val_loss": next(told) if select_by == "val_loss" else 1.0}
    )
    done = train(settings(dataset, epochs=9, select_by=select_by, patience=2))
    assert (done.best_epoch, done.history["epoch"]) == (2, [1, 2, 3, 4])


@pytest.mark.parametrize("ema", [False, True])
def test_images_kept_decoded_change_no_weight(dataset: Path, ema: bool) -> None:
    kept = train(settings(dataset, epochs=2, ema=ema))
    anew = train(settings(dataset, epochs=2, ema=ema, cache_gb=0.0, output_dir=dataset.parent / "anew"))
    assert same_weights(kept.run_dir / "last.pt", anew.run_dir / "last.pt")
    assert kept.history["val_loss"] == anew.history["val_loss"]


@pytest.mark.parametrize(("kept", "decodings"), [(4.0, 1), (0.0, 3)])
def test_each_image_is_decoded_for_its_first_epoch_alone_where_it_is_kept(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, kept: float, decodings: int
) -> None:
    decoded: Counter[Path] = Counter()
    read = loader.SplitDataset._read

    def counting(self: loader.SplitDataset, place: int) -> Any:
        decoded[self.split.image_path(self.split.images[place])] += 1
        return read(self, place)

    monkeypatch.setattr(loader.SplitDataset, "_read", counting)
    monkeypatch.setattr(loop, "draw_train_batch", lambda *_: None)
    train(settings(dataset, epochs=3, cache_gb=kept))
    assert set(decoded.values()) == {decodings}
    assert len(decoded) == 6


def test_what_is_kept_decoded_is_deleted_in_the_end_also_of_a_training_that_fails(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = dataset.parent / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    train(settings(dataset))
    assert names(scratch) == []
    (dataset / "train" / "images" / "3.png").write_bytes(b"no image")
    with pytest.raises(FlawmaskError):
        train(settings(dataset, overwrite=True))
    assert names(scratch) == []


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_an_average_of_the_weights_is_what_is_judged_and_written(dataset: Path, norm: str) -> None:
    plain = train(settings(dataset, epochs=2, norm=norm))
    averaged = train(settings(dataset, epochs=2, norm=norm, ema=True, output_dir=dataset.parent / "averaged"))
    # What is learned is the same: the average only follows.
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


@pytest.mark.parametrize(("norm", "at_once"), [("batch", 2), ("group", 1)])
def test_the_effective_batch_size_is_what_a_step_learns_from_and_a_cpu_takes_one_by_one_what_it_can(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, norm: str, at_once: int
) -> None:
    passes: list[tuple[int, int]] = []
    step = Step.__call__

    def stepping(self: Any, batch: loader.Batch, *given: Any, **more: Any) -> Any:
        passes.append((len(batch[0]), self.at_once))
        return step(self, batch, *given, **more)

    monkeypatch.setattr(Step, "__call__", stepping)
    done = train(settings(dataset, epochs=2, batch_size=2, effective_batch_size=4, norm=norm))
    assert passes == [(4, at_once), (4, at_once)]
    written = json.loads((done.run_dir / "config.json").read_text())
    assert (written["images_at_once"], written["images_per_step"], written["processes"]) == (at_once, 4, 1)
