"""Training: eight images are learned, what is written says what happened, and what must stop it does."""

import importlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from files_read_back import names
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from torch import Tensor, nn

from flawmask.coco import annotation, read_split, write_split
from flawmask.errors import FlawmaskError
from flawmask.images import read_image, write_png
from flawmask.inference.predictor import Predictor
from flawmask.masks import Mask
from flawmask.model import checkpoint
from flawmask.model.build import ModelSpec, build
from flawmask.training import loader, loop
from flawmask.training.config import TrainConfig
from flawmask.training.loop import Trained, train
from flawmask.training.pictures import draw_train_batch

SIDE = 72
CATEGORIES = [{"id": 1, "name": "good"}, {"id": 2, "name": "defect"}]
RUN_FILES = sorted(
    "best.pt last.pt config.json history.json training_images.json curves.png labels.png train_batch.jpg".split()
)
LOSSES = ("loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg")


def part(seed: int) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], Mask]:
    """A grey plate with one dark stain on it, and the stain's mask."""
    random = np.random.default_rng(seed)
    pixels = random.normal(170, 6, (SIDE, SIDE, 3)).clip(0, 255).astype(np.uint8)
    height, width = (int(side) for side in random.integers(14, 24, 2))
    y, x = int(random.integers(2, SIDE - height - 2)), int(random.integers(2, SIDE - width - 2))
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    mask[y : y + height, x : x + width] = True
    pixels[mask] = pixels[mask] // 4
    return pixels, mask


def make_split(folder: Path, seeds: range) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, seed in enumerate(seeds, start=1):
        pixels, mask = part(seed)
        write_png(folder / "images" / f"{number}.png", pixels)
        images.append({"id": number, "file_name": f"{number}.png", "width": SIDE, "height": SIDE})
        annotations.append(annotation(mask, id=number, image_id=number, category_id=2))
    write_split(folder, images, annotations, CATEGORIES)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Four images to learn from and two to validate on."""
    make_split(tmp_path / "data" / "train", range(4))
    make_split(tmp_path / "data" / "val", range(100, 102))
    return tmp_path / "data"


def settings(dataset: Path, **changes: Any) -> TrainConfig:
    small: dict[str, Any] = {
        "dataset_dir": dataset,
        "output_dir": dataset.parent / "run",
        "arch": "maskrcnn_resnet18_fpn",
        "weights": "none",
        "image_size": 64,
        "epochs": 1,
        "batch_size": 2,
        "device": "cpu",
        "precision": "fp32",
        "workers": 0,
        "proposals": 30,
        "roi_samples": 16,
        "max_detections": 10,
        "seed": 0,
    }
    return TrainConfig(**(small | changes))


@pytest.mark.slow
def test_eight_images_are_learned_from_nothing_until_every_defect_is_found(tmp_path: Path) -> None:
    make_split(tmp_path / "data" / "train", range(8))
    done = train(settings(tmp_path / "data", epochs=30, proposals=100, lr=0.01))
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
    expected = {"epoch", "train_loss", "val_loss", "learning_rate", "seconds", "images_per_second", *LOSSES}
    assert set(history) == expected
    assert {len(values) for values in history.values()} == {3}
    assert history["epoch"] == [1, 2, 3]
    for epoch in range(3):
        assert history["train_loss"][epoch] == pytest.approx(sum(history[name][epoch] for name in LOSSES), rel=1e-5)
        assert history["images_per_second"][epoch] == pytest.approx(4 / history["seconds"][epoch])
    assert all(math.isfinite(value) and value > 0 for value in history["val_loss"])
    assert history["learning_rate"][-1] == pytest.approx(0)

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

    def epoch(*_: Any) -> dict[str, float | None]:
        return {"train_loss": next(told) if select_by == "train_loss" else 1.0, "loss_mask": 0.5}

    monkeypatch.setattr(loop, "_train_epoch", epoch)
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


def test_selecting_by_a_figure_of_the_validation_split_writes_it_down(dataset: Path) -> None:
    done = train(settings(dataset, select_by="f1"))
    assert set(done.history) >= {"segm_ap", "f1"}
    assert 0 <= done.history["segm_ap"][0] <= 1


def same_weights(one: Path, other: Path) -> bool:
    states = [torch.load(path, weights_only=True)["model_state_dict"] for path in (one, other)]
    return all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


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

    def epoch(step: Any, batches: Any, label: str) -> Any:
        if label == f"epoch {broken_epoch}/2":
            raise FlawmaskError("the loss is nan")
        return train_epoch(step, batches, label)

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
    assert there == [None, RUN_FILES]


def test_the_batches_shown_are_those_that_the_network_learned_from_first(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: list[list[int]] = []
    shown: list[list[int]] = []
    step = loop.Step.__call__

    def stepping(self: Any, batch: loader.Batch) -> Any:
        learned.append([int(target["image_id"]) for target in batch[1]])
        return step(self, batch)

    def drawing(network: Any, batches: Any, *given: Any) -> None:
        listed = list(batches)
        shown.extend([int(target["image_id"]) for target in targets] for _, targets in listed)
        draw_train_batch(network, listed, *given)

    monkeypatch.setattr(loop.Step, "__call__", stepping)
    monkeypatch.setattr(loop, "draw_train_batch", drawing)
    train(settings(dataset, seed=3))
    assert shown == learned
    assert len(shown) == 2


def test_each_epoch_is_a_row_of_one_table(caplog: pytest.LogCaptureFixture) -> None:
    figures = {"train_loss": 1.25, "val_loss": None, "segm_ap": None, "learning_rate": 0.005, "images_per_second": 7.0}
    with caplog.at_level("INFO"):
        for epoch in (1, 2, 21, 120):
            loop._log_epoch(figures | {"epoch": epoch, "f1": epoch / 200}, 120, 60.0 * epoch, epoch == 2)
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


def small_network() -> Any:
    torch.manual_seed(0)
    return build(ModelSpec("maskrcnn_resnet18_fpn", ("good", "defect"), image_size=64, norm="group", proposals=20))


def test_the_validation_loss_is_the_same_each_time_and_touches_neither_weights_nor_random_state(dataset: Path) -> None:
    model = small_network().train()
    batches = loader.make_loader(read_split(dataset, "val"), 2, shuffle=False, seed=0, workers=0, pin=False)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = torch.get_rng_state()
    losses = [loop._validation_loss(model, batches, torch.device("cpu"), seed=7) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert losses[0] == losses[1]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_validation_loss_that_is_not_finite_is_null_and_stops_nothing(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(model: Any) -> None:
        forward = model.forward

        def infinite_without_gradients(images: list[Tensor], targets: Any = None) -> Any:
            losses = forward(images, targets)
            return losses if torch.is_grad_enabled() else {name: value * math.inf for name, value in losses.items()}

        monkeypatch.setattr(model, "forward", infinite_without_gradients)

    with_changed_network(monkeypatch, change)
    assert train(settings(dataset)).history["val_loss"] == [None]


def with_changed_network(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]) -> None:
    start = loop._start

    def started(*given: Any) -> Any:
        model = start(*given)
        change(model)
        return model

    monkeypatch.setattr(loop, "_start", started)


def _infinite_loss(model: Any) -> None:
    nn.init.constant_(model.roi_heads.mask_predictor.mask_fcn_logits.bias, math.inf)


def _infinite_gradient(model: Any) -> None:
    model.rpn.head.bbox_pred.weight.register_hook(lambda gradient: gradient * math.inf)


@pytest.mark.parametrize(("change", "what"), [(_infinite_loss, "loss"), (_infinite_gradient, "gradient")])
def test_a_loss_or_gradient_that_is_not_finite_stops_with_the_images_and_writes_nothing(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None], what: str
) -> None:
    with_changed_network(monkeypatch, change)
    with pytest.raises(
        FlawmaskError, match=rf"the {what} is (nan|inf) on the images with the ids [1-4], [1-4]: "
    ) as caught:
        train(settings(dataset))
    assert "--lr" in str(caught.value)
    assert not (dataset.parent / "run").exists()


@pytest.mark.slow
def test_plain_sgd_at_the_default_rate_stays_finite_from_nothing(dataset: Path) -> None:
    done = train(settings(dataset, epochs=6, optimizer="sgd", lr=0.005))
    assert done.history["train_loss"][-1] < done.history["train_loss"][0]


@pytest.mark.parametrize(
    ("step", "factor"),
    [(0, 1 / 11), (4, 5 / 11), (9, 10 / 11), (10, 1.0), (55, 0.5), (100, 0.0), (150, 0.0)],
)
def test_the_rate_rises_over_the_warm_up_and_falls_along_a_cosine(step: int, factor: float) -> None:
    assert loop._rate_factor(step, 100, 10, "cosine") == pytest.approx(factor, abs=1e-9)


def test_the_rate_falls_in_steps_or_not_at_all_as_asked() -> None:
    assert [loop._rate_factor(step, 90, 0, "step") for step in (0, 59, 60, 79, 80, 90)] == [1, 1, 0.1, 0.1, 0.01, 0.01]
    assert {loop._rate_factor(step, 90, 0, "constant") for step in range(91)} == {1.0}


def test_the_warm_up_is_at_most_a_tenth_of_all_steps(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def factor(step: int, total: int, warmup: int, scheduler: str) -> float:
        seen.append((total, warmup))
        return 1.0

    monkeypatch.setattr(loop, "_rate_factor", factor)
    for total in (5, 50, 5000):
        loop._make_step(settings(dataset), small_network(), torch.device("cpu"), torch.float32, total, True)
    assert sorted(set(seen)) == [(5, 0), (50, 5), (5000, 200)]


@pytest.mark.parametrize(
    ("optimizer", "is_pretrained", "kind", "rate"),
    [
        ("auto", True, torch.optim.SGD, 0.005),
        ("auto", False, torch.optim.AdamW, 0.0005),
        ("sgd", False, torch.optim.SGD, 0.005),
        ("adamw", True, torch.optim.AdamW, 0.005),
    ],
)
def test_the_optimiser_suits_the_start_unless_one_is_named(
    dataset: Path, optimizer: str, is_pretrained: bool, kind: type, rate: float
) -> None:
    config = settings(dataset, optimizer=optimizer, scheduler="constant", warmup_steps=0)
    step = loop._make_step(config, small_network(), torch.device("cpu"), torch.float32, 100, is_pretrained)
    assert type(step.optimizer) is kind
    assert step.optimizer.param_groups[0]["lr"] == pytest.approx(rate)


def test_a_gradient_is_clipped_to_the_length_asked(dataset: Path) -> None:
    step = loop._make_step(
        settings(dataset, clip_norm=0.01), small_network().train(), torch.device("cpu"), torch.float32, 10, True
    )
    split = read_split(dataset, "train")
    step(next(iter(loader.read(loader.make_loader(split, 2, shuffle=False, seed=0, workers=0, pin=False)))))
    gradients = [one.grad for one in step.model.parameters() if one.grad is not None]
    length = float(torch.stack([one.norm() for one in gradients]).norm())
    assert length == pytest.approx(0.01, rel=1e-3)


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
    assert names(done.run_dir) == RUN_FILES


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


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"lr": 0.0},
        {"lr": math.nan},
        {"lr": math.inf},
        {"image_size": 63},
        {"clip_norm": 0.0},
        {"workers": -1},
        {"warmup_steps": -1},
        {"trainable_layers": 6},
        {"anchor_sizes": (0, 1, 2, 3, 4)},
        {"seed": -1},
        {"max_detections": 0},
    ],
)
def test_settings_out_of_range_are_refused_by_name(dataset: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(FlawmaskError, match=f"--{next(iter(wrong))}"):
        settings(dataset, **wrong)
