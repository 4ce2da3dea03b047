"""The step: learning rate, gradient, values that are not finite, lack of memory, and the moving average."""

import copy
import itertools
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stained_plates import make_dataset, settings
from torch import Tensor, nn

from flawmask.coco import read_split
from flawmask.errors import FlawmaskError
from flawmask.model import rcnn, rcnn_losses
from flawmask.model.arch import Arch
from flawmask.model.architecture import Start
from flawmask.model.build import build
from flawmask.model.rcnn import train_in
from flawmask.model.spec import ModelSpec
from flawmask.model.targets import Target
from flawmask.training import loader, loop, resume, step
from flawmask.training.config import TrainConfig
from flawmask.training.epoch import validation_loss
from flawmask.training.loop import train
from flawmask.training.network import build_for_training, prepare_for_training
from flawmask.training.step import (
    EMA_DECAY,
    Schedule,
    Step,
    make_step,
    update_average,
)

CPU = torch.device("cpu")
SPEC = ModelSpec("maskrcnn_resnet18_fpn", ("good", "defect"), image_size=64, norm="group", proposals=20)

LOSSES = SPEC.architecture.loss_names


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Four training images and two validation images."""
    return make_dataset(tmp_path / "data")


def small_network() -> Any:
    torch.manual_seed(0)
    return build(SPEC).train()


def batch_of(dataset: Path, count: int, split: str = "train") -> loader.Batch:
    items = loader.SplitDataset(read_split(dataset, split), SPEC)
    order = loader.Order(items.shapes, count, seed=None)
    batch: loader.Batch = next(iter(loader.read(loader.make_loader(items, order, workers=0, pin=False))))
    return batch


def made_step(dataset: Path, micro_batch_size: int = 4, model: Any = None, **changes: Any) -> Step:
    config = settings(dataset, scheduler="constant", warmup_steps=0, **changes)
    return make_step(
        config, model or small_network(), SPEC, CPU, torch.float32, "detector", micro_batch_size=micro_batch_size
    )


def with_changed_network(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]) -> None:
    def started(*inputs: Any, **more: Any) -> Any:
        model = build_for_training(*inputs, **more)
        change(model)
        return model

    monkeypatch.setattr(loop, "build_for_training", started)


def _infinite_loss(model: Any) -> None:
    nn.init.constant_(model.roi_heads.mask_predictor.mask_fcn_logits.bias, math.inf)


def _infinite_gradient(model: Any) -> None:
    model.rpn.head.bbox_pred.weight.register_hook(lambda gradient: gradient * math.inf)


@pytest.mark.parametrize(("change", "what"), [(_infinite_loss, "loss"), (_infinite_gradient, "gradient")])
def test_an_epoch_without_a_finite_loss_or_gradient_stops_with_the_images_and_writes_nothing(
    dataset: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[Any], None],
    what: str,
) -> None:
    with_changed_network(monkeypatch, change)
    image = r"\S*data/train/images/[1-4]\.png"
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(
            FlawmaskError,
            match=rf"all steps of epoch 1 were skipped, .* because the {what} is (nan|inf) on {image}, {image}: ",
        ) as caught,
    ):
        train(settings(dataset))
    assert "--lr" in str(caught.value)
    assert len([one for one in caplog.records if one.getMessage().startswith("a step was skipped: ")]) == 2
    assert not (dataset.parent / "run").exists()


def bad_at(steps: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the loss of some steps NaN; steps are counted from 0."""
    plain, taken = rcnn_losses.losses, [0]

    def found(*inputs: Any) -> dict[str, Tensor]:
        result = plain(*inputs)
        if torch.is_grad_enabled():
            taken[0] += 1
            if taken[0] - 1 in steps:
                result["loss_mask"] = result["loss_mask"] * math.nan
        return result

    monkeypatch.setattr(rcnn, "losses", found)


def test_a_step_that_is_not_finite_is_skipped_and_counted_and_the_training_goes_on(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bad_at({1, 6}, monkeypatch)
    with caplog.at_level(logging.WARNING):
        done = train(settings(dataset, batch_size=1, epochs=2))
    assert done.history["skipped_steps"] == [1, 1]
    assert all(math.isfinite(one) for one in done.history["train_loss"])
    assert len([one for one in caplog.records if "the loss is nan on" in one.getMessage()]) == 2
    weights = torch.load(done.run_dir / "last.pt", weights_only=True)["model_state_dict"]
    assert all(torch.isfinite(one).all() for one in weights.values())


def test_too_many_skipped_steps_in_a_row_end_training_and_keep_the_last_save(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad_at(set(range(5, 100)), monkeypatch)
    monkeypatch.setattr("flawmask.training.epoch.MAX_SKIPPED_IN_A_ROW", 3)
    with pytest.raises(
        FlawmaskError, match=r"3 steps in a row were skipped, the last one because the loss is nan on \S+png: "
    ):
        train(settings(dataset, batch_size=1, epochs=9))
    run = dataset.parent / "run"
    assert torch.load(run / "last.pt", weights_only=True)["epoch"] == 1
    # A resumed training meets the same images again and goes on counting.
    with pytest.raises(FlawmaskError, match=r"3 steps in a row"):
        train(TrainConfig(resume=run))


def _gradient_that_is_no_number(model: Any) -> None:
    model.backbone.body.conv1.weight.register_hook(lambda gradient: gradient * math.nan)


@pytest.mark.parametrize("change", [_infinite_gradient, _gradient_that_is_no_number])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_whose_gradient_is_not_finite_changes_no_weight(
    dataset: Path, change: Callable[[Any], None], optimizer: str
) -> None:
    taken = made_step(dataset, optimizer=optimizer)
    batch = batch_of(dataset, 2)
    taken(batch, 0.0)  # so that the optimiser has a momentum
    change(taken.model)
    before = {name: one.clone() for name, one in taken.model.state_dict().items()}
    figures = taken(batch, 0.0)
    assert not torch.isfinite(figures.values).all()
    assert all(torch.equal(one, before[name]) for name, one in taken.model.state_dict().items())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_updates_weights_like_the_plain_optimiser(dataset: Path, optimizer: str) -> None:
    taken = made_step(dataset, optimizer=optimizer, clip_norm=1e6)
    plain: Any = copy.deepcopy(taken.model)
    weights = [one.weight for one in plain.modules() if isinstance(one, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)]
    decaying = {id(one) for one in weights}
    groups: list[dict[str, Any]] = [
        {"params": weights},
        {"params": [one for one in plain.parameters() if id(one) not in decaying], "weight_decay": 0.0},
    ]
    assert len(weights) > 20
    assert len(groups[1]["params"]) > 20
    kinds: dict[str, Any] = {
        "sgd": lambda: torch.optim.SGD(groups, lr=0.005, momentum=0.9, weight_decay=0.0005),
        "adamw": lambda: torch.optim.AdamW(groups, lr=0.005, weight_decay=0.01),
    }
    expected = kinds[optimizer]()
    batch = batch_of(dataset, 2)
    for seed in range(2):
        torch.manual_seed(seed)
        taken(batch, 0.0)
        torch.manual_seed(seed)
        expected.zero_grad()
        torch.autograd.backward(list(rcnn_losses.losses(plain, batch.images, batch.targets, 16).values()))
        expected.step()
    gradients = {name: one.grad.abs() for name, one in plain.named_parameters() if one.grad is not None}
    for name, one in plain.state_dict().items():
        same = torch.isclose(taken.model.state_dict()[name], one, atol=2e-4, rtol=1e-3)
        # AdamW divides by the size of the gradient. If that is only rounding, its sign is arbitrary.
        rounding = gradients[name] < 1e-5 * gradients[name].max() if name in gradients else torch.zeros_like(same)
        assert bool((same | rounding).all()), name
        assert float(same.float().mean()) > 0.999, name


def test_weight_decay_applies_to_weights_but_not_to_norms_and_biases(dataset: Path) -> None:
    taken = made_step(dataset, optimizer="adamw")
    before = {name: one.clone() for name, one in taken.model.named_parameters()}
    for one in taken.model.parameters():
        one.grad = torch.zeros_like(one)
    taken.optimizer.step()
    for name, one in taken.model.named_parameters():
        expected = before[name] if one.ndim == 1 else before[name] * (1 - 0.005 * 0.01)
        torch.testing.assert_close(one, expected, atol=0, rtol=1e-6, msg=name)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_backbone_learns_at_its_share_of_the_rate(dataset: Path, optimizer: str) -> None:
    taken = made_step(dataset, optimizer=optimizer, backbone_lr=0.25)
    taken(batch_of(dataset, 2), 0.5)
    rates = {id(one): group["lr"] for group in taken.optimizer.param_groups for one in group["params"]}
    trained = {name: one for name, one in taken.model.named_parameters() if one.requires_grad}
    assert len(rates) == len(trained) == sum(len(group["params"]) for group in taken.optimizer.param_groups)
    inside = {name for name in trained if name.startswith("backbone.body.")}
    assert 0 < len(inside) < len(trained)
    for name, one in trained.items():
        assert rates[id(one)] == pytest.approx(0.005 * (0.25 if name in inside else 1)), name
    resumed = made_step(dataset, optimizer=optimizer, backbone_lr=0.25)
    resume.restore(SimpleNamespace(tensors=resume.tensors_of(taken), taken=1), resumed)  # type: ignore[arg-type]
    saved, restored = taken.optimizer.state_dict(), resumed.optimizer.state_dict()
    assert saved["param_groups"] == restored["param_groups"]


@pytest.mark.parametrize(
    ("progress", "factor"),
    [(0, 0.01), (0.05, 0.5), (0.09, 0.9), (0.1, 1.0), (0.55, 0.5), (1.0, 0.0), (1.5, 0.0)],
)
def test_the_rate_rises_over_the_warm_up_and_falls_along_a_cosine(progress: float, factor: float) -> None:
    assert Schedule(0.02, "cosine", 200).at(progress, round(1000 * progress)) == pytest.approx(0.02 * factor, abs=1e-9)


def test_the_rate_falls_in_steps_or_stays_constant() -> None:
    by_steps = [Schedule(1.0, "step", 0).at(step / 90, step) for step in (0, 59, 61, 79, 81, 90)]
    assert by_steps == [1, 1, 0.1, 0.1, 0.01, 0.01]
    assert {Schedule(1.0, "constant", 0).at(step / 90, step) for step in range(91)} == {1.0}


@pytest.mark.parametrize("warmup_steps", [0, 1, 200, 10**9])
@pytest.mark.parametrize("kind", ["cosine", "step", "constant"])
def test_the_rate_never_exceeds_lr_whatever_the_warm_up(kind: str, warmup_steps: int) -> None:
    schedule = Schedule(0.005, kind, warmup_steps)
    rates = [schedule.at(step / 5000, step) for step in range(5001)]
    assert max(rates) <= 0.005
    assert warmup_steps == 0 or rates[0] < 0.1 * 0.005


@pytest.mark.parametrize(("steps", "warm"), [(50, 5), (500, 50), (1000, 100), (5000, 200), (100_000, 200)])
def test_the_rate_rises_over_the_warm_up_steps_and_at_most_a_tenth_of_the_training(steps: int, warm: int) -> None:
    schedule = Schedule(1.0, "cosine", 200)
    rates = [schedule.at(step / steps, step) for step in range(steps + 1)]
    assert rates[:warm] == pytest.approx([max(step / warm, 0.01) for step in range(warm)])
    falling = [0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm))) for step in range(warm, steps + 1)]
    assert rates[warm:] == pytest.approx(falling)


@pytest.mark.parametrize("slower", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("steps", [100, 1000, 20_000])
def test_with_a_time_budget_the_rate_rises_once_and_then_falls_smoothly(steps: int, slower: float) -> None:
    """Steps in the first half of the time are slower or faster than those in the second half."""
    times = torch.cat((torch.full((steps,), slower), torch.ones(round(steps * slower)))).cumsum(0)
    schedule = Schedule(1.0, "cosine", 200)
    rates = [schedule.at(float(time / times[-1]), taken) for taken, time in enumerate(times, start=1)]
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[top] == pytest.approx(1, abs=0.03)
    assert top <= 200
    assert times[top] <= 0.12 * times[-1]
    leap = 1.5 / min(200, 0.1 * steps) + 0.05
    assert max(abs(one - other) for one, other in itertools.pairwise(rates)) < leap


@pytest.mark.parametrize(
    ("optimizer", "start", "kind", "rate", "backbone"),
    [
        ("auto", "detector", torch.optim.SGD, 0.005, 1),
        ("auto", "backbone", torch.optim.AdamW, 0.0005, 0.1),
        ("auto", "nothing", torch.optim.AdamW, 0.0005, 1),
        ("sgd", "nothing", torch.optim.SGD, 0.005, 1),
        ("adamw", "detector", torch.optim.AdamW, 0.005, 1),
    ],
)
def test_the_default_optimiser_depends_on_the_initial_weights(
    dataset: Path, optimizer: str, start: Start, kind: type, rate: float, backbone: float
) -> None:
    config = settings(dataset, optimizer=optimizer, scheduler="constant", warmup_steps=0)
    made = make_step(config, small_network(), SPEC, CPU, torch.float32, start, micro_batch_size=2)
    assert type(made.optimizer) is kind
    made(batch_of(dataset, 2), 0.5)
    assert made.optimizer.param_groups[0]["lr"] == made.schedule.at(0.5, 1) == pytest.approx(rate)
    assert made.optimizer.param_groups[-1]["lr"] == pytest.approx(rate * backbone)


@pytest.mark.parametrize(
    ("arch", "start", "trained"),
    [
        ("maskrcnn_resnet18_fpn", "detector", 3),
        ("maskrcnn_resnet18_fpn", "backbone", 5),
        ("maskrcnn_resnet18_fpn", "nothing", 5),
        ("maskrcnn_efficientnet_lite0_fpn", "detector", 5),
    ],
)
def test_the_stages_that_learn_depend_on_the_initial_weights(
    dataset: Path, arch: Arch, start: Start, trained: int
) -> None:
    spec = replace(SPEC, arch=arch)
    model = prepare_for_training(settings(dataset, arch=arch), build(spec), spec, CPU, torch.float32, start=start)
    learn = [any(one.requires_grad for part in stage for one in part.parameters()) for stage in rcnn.stages(model)]
    assert learn == [False] * (5 - trained) + [True] * trained


def test_a_trained_efficientnet_lite_goes_on_with_adamw_and_a_slow_backbone(dataset: Path) -> None:
    spec = replace(SPEC, arch="maskrcnn_efficientnet_lite0_fpn")
    config = settings(dataset, arch=spec.arch)
    made = make_step(config, build(spec), spec, CPU, torch.float32, "detector", micro_batch_size=2)
    assert type(made.optimizer) is torch.optim.AdamW
    assert [group["share"] for group in made.optimizer.param_groups] == [1, 1, 0.1, 0.1]


def test_the_gradient_is_clipped_to_clip_norm(dataset: Path) -> None:
    taken = made_step(dataset, clip_norm=0.01)
    figures = taken(batch_of(dataset, 2), 0.0)
    gradients = [one.grad for one in taken.model.parameters() if one.grad is not None]
    length = float(torch.stack([one.norm() for one in gradients]).norm())
    assert length == pytest.approx(0.01, rel=1e-3)
    assert step.StepFigures.read(figures).length > 0.02, "the length told is the one before it was clipped"


def gradients_of(model: Any) -> dict[str, Tensor]:
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def emptied(target: Target) -> Target:
    """Return the target of an image without instances."""
    return {name: one if name == "image_id" else one[:0] for name, one in target.items()}


def test_mask_losses_do_not_depend_on_images_without_masks_or_on_micro_batches(dataset: Path) -> None:
    batch = batch_of(dataset, 4)
    images, targets = batch.images, batch.targets
    batch = replace(batch, targets=[targets[0], *map(emptied, targets[1:])])
    place = LOSSES.index("loss_mask")
    alone: Any = made_step(dataset, 1)
    torch.manual_seed(5)
    expected = rcnn_losses.losses(alone.model, images[:1], targets[:1], 16)["loss_mask"]
    torch.manual_seed(5)
    figures = alone.add_gradients(batch)
    assert float(figures[place]) == pytest.approx(float(expected.detach()), rel=1e-5)


def out_of_memory_with_more_than(limit: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make a pass of more than `limit` images run out of memory. Return the list of the passes' sizes."""
    passed: list[int] = []
    plain = rcnn_losses.losses

    def limited(model: Any, images: list[Tensor], *inputs: Any) -> dict[str, Tensor]:
        passed.append(len(images))
        found = plain(model, images, *inputs)
        if len(images) > limit:
            # Fail in the backward pass, when there are some gradients already.
            torch.autograd.backward(list(found.values()), retain_graph=True)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return found

    monkeypatch.setattr(rcnn, "losses", limited)
    return passed


def test_out_of_memory_shrinks_the_micro_batch_and_the_step_uses_the_whole_batch(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    batch = batch_of(dataset, 4)
    expected = made_step(dataset, 1)
    for _ in range(2):
        torch.manual_seed(3)
        expected.add_gradients(batch)
    taken = made_step(dataset, 4)
    passed = out_of_memory_with_more_than(1, monkeypatch)
    with caplog.at_level(logging.WARNING):
        taken(batch, 0.0)
    assert passed == [4, 2, 1, 1, 1, 1]
    assert taken.micro_batch_size == 1
    assert [one.getMessage() for one in caplog.records] == [
        f"out of memory: continuing with micro-batches of {count} images; the batch size does not change"
        for count in (2, 1)
    ]
    torch.manual_seed(3)
    taken.add_gradients(batch)
    assert passed[6:] == [1, 1, 1, 1], "it tries again what did not fit"


def test_out_of_memory_does_not_change_the_gradient(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of(dataset, 4)
    plain = made_step(dataset, 4)
    torch.manual_seed(9)
    expected = plain.add_gradients(batch)
    taken = made_step(dataset, 4)
    passed = out_of_memory_with_more_than(2, monkeypatch)
    torch.manual_seed(9)
    torch.testing.assert_close(taken.add_gradients(batch), expected)
    assert passed == [4, 2, 2]
    wanted = gradients_of(plain.model)
    longest = max(float(one.abs().max()) for one in wanted.values())
    for name, one in gradients_of(taken.model).items():
        torch.testing.assert_close(one, wanted[name], atol=1e-4 * longest, rtol=1e-4, msg=name)


def test_memory_too_small_for_one_image_is_an_error(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = made_step(dataset, 1)
    out_of_memory_with_more_than(0, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        taken(batch_of(dataset, 4), 0.0)


def test_other_errors_are_not_taken_for_out_of_memory(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(rcnn, "losses", broken)
    taken = made_step(dataset, 4)
    with pytest.raises(RuntimeError, match="multiplied"):
        taken(batch_of(dataset, 4), 0.0)
    assert taken.micro_batch_size == 4


def test_the_moving_average_follows_its_recurrence() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    averaged = copy.deepcopy(model)
    expected = {name: one.clone().double() for name, one in model.state_dict().items()}
    for steps in (1, 2, 3, 50, 10**6):
        with torch.no_grad():
            for one in model.parameters():
                one.normal_()
        model.train()(torch.randn(4, 3))
        update_average(averaged, model, steps)
        decay = min(EMA_DECAY, (1 + steps) / (10 + steps))
        for name, one in model.state_dict().items():
            moved = decay * expected[name] + (1 - decay) * one.double()
            expected[name] = moved if one.is_floating_point() else one.clone().double()
    for name, found in averaged.state_dict().items():
        torch.testing.assert_close(found.double(), expected[name], atol=1e-5, rtol=1e-5)
    assert int(averaged[1].num_batches_tracked) == 5  # type: ignore[arg-type]


def test_a_step_updates_the_moving_average(dataset: Path) -> None:
    taken = made_step(dataset)
    taken.averaged = copy.deepcopy(taken.model)
    first = {name: one.clone() for name, one in taken.model.state_dict().items()}
    taken(batch_of(dataset, 2), 0.0)
    assert taken.steps_taken == 1
    for name, one in taken.averaged.state_dict().items():
        expected = first[name] * 2 / 11 + taken.model.state_dict()[name] * 9 / 11
        torch.testing.assert_close(one, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_the_validation_loss_is_repeatable_and_changes_neither_weights_nor_random_state(
    dataset: Path, norm: Any
) -> None:
    torch.manual_seed(0)
    model: Any = build(ModelSpec("maskrcnn_resnet18_fpn", ("good", "defect"), image_size=64, norm=norm, proposals=20))
    train_in(model, CPU, torch.float32)
    taken = made_step(dataset, 1, model)
    items = loader.SplitDataset(read_split(dataset, "val"), SPEC)
    batches = loader.make_loader(items, loader.Order([(8, 8)] * 2, 2, seed=None), workers=0, pin=False)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = torch.get_rng_state()
    found = [validation_loss(model, batches, taken, seed=7) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert found[0] == found[1]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_validation_loss_that_is_not_finite_is_null_and_training_goes_on(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = rcnn_losses.losses

    def infinite_without_gradients(*inputs: Any) -> dict[str, Tensor]:
        found = plain(*inputs)
        return found if torch.is_grad_enabled() else {name: value * math.inf for name, value in found.items()}

    monkeypatch.setattr(rcnn, "losses", infinite_without_gradients)
    assert train(settings(dataset)).history["val_loss"] == [None]
