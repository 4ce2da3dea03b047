"""GPU passes give the same gradients as the plain computation, recorded or not."""

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from outlined_images import batch, gradients, network, rectangle, target_of
from questions import counted, pooled_as_on_a_gpu
from random_network import SPEC, patchwork
from stained_plates import make_dataset, settings
from torch import Tensor

from flawmask.distributed import Processes
from flawmask.errors import FlawmaskError
from flawmask.model import rcnn_losses
from flawmask.model.arch import Arch
from flawmask.model.build import build
from flawmask.model.layers import to_device
from flawmask.model.rcnn import train_in
from flawmask.training import recording
from flawmask.training.epoch import _with_memory
from flawmask.training.loader import Batch
from flawmask.training.loop import train
from flawmask.training.recording import Passes, _copied, _copy, _tensors
from flawmask.training.step import Step, StepFigures, can_record, make_step

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LOSSES = SPEC.architecture.loss_names
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="only CUDA records")

ENOUGH = 128
"""Sampled regions per image: more than there are of each kind, with the proposals of `without_chance`."""


def without_chance() -> Any:
    """Return a network that trains on all anchors and, with `ENOUGH`, on all regions."""
    model = network(1024)
    model.rpn.fg_bg_sampler.batch_size_per_image = 10**6
    model.rpn._post_nms_top_n["training"] = 20
    return model


def four_images() -> Batch:
    images, _, targets = batch()
    return Batch.of(list(zip(images, targets, strict=True)))


def images_with(instances: int, images: int = 4, seed: int = 0) -> Batch:
    """Return a batch of images of 64 x 96, each with this number of instances."""
    size = (64, 96)
    draw = torch.Generator().manual_seed(seed)
    items = []
    for at in range(images):
        image = torch.from_numpy(patchwork(*size, 10 * seed + at).copy()).permute(2, 0, 1)
        corners = torch.randint(0, 40, (instances, 2), generator=draw).tolist()
        sides = torch.randint(6, 24, (instances, 2), generator=draw).tolist()
        masks = [rectangle(size, *corner, *side) for corner, side in zip(corners, sides, strict=True)]
        items.append((image, target_of(masks, size)))
    return Batch.of(items)


def five_on_each(seed: int = 0) -> Batch:
    """Four images of one size."""
    return images_with(5, seed=seed)


def scaler_of(scale: float, device: torch.device = CPU) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(device.type, init_scale=scale, growth_interval=2**31 - 1)


def step_of(model: Any, tmp_path: Path, *, micro_batch_size: int = 4, scale: float = 1.0, **changes: Any) -> Step:
    config = settings(tmp_path / "data", scheduler="constant", warmup_steps=0, **({"roi_samples": ENOUGH} | changes))
    device = next(model.parameters()).device
    made = make_step(config, model, SPEC, device, torch.float32, "detector", micro_batch_size=micro_batch_size)
    made.scaler = scaler_of(scale, device)
    if made.passes is not None:
        made.passes.scaler = made.scaler
    return made


def gradients_of(model: Any) -> dict[str, Tensor]:
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """Compare gradients with a tolerance relative to the largest gradient."""
    assert found.keys() == wanted.keys()
    longest = max(float(one.abs().max()) for one in wanted.values())
    assert math.isfinite(longest)
    for name, one in found.items():
        torch.testing.assert_close(one, wanted[name], atol=tolerance * longest, rtol=tolerance, msg=name)


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize(("micro_batch_size", "is_of_one_size"), [(4, False), (3, False), (3, True)])
def test_losses_and_gradients_of_passes_equal_the_plain_computation(
    tmp_path: Path, micro_batch_size: int, is_of_one_size: bool, scale: float
) -> None:
    model, images = without_chance(), five_on_each() if is_of_one_size else four_images()
    step = step_of(model, tmp_path, micro_batch_size=micro_batch_size, scale=scale)
    assert step.passes is None
    expected = step.add_gradients(images)
    wanted = gradients_of(model)
    step.passes = Passes(model, step.losses, ENOUGH, step.scaler, is_recording=False)
    found = step.add_gradients(images)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert not found.requires_grad
    assert_close(gradients_of(model), wanted, 3e-5)
    if scale > 1:
        step.scaler = scaler_of(1.0)
        step.passes.scaler = step.scaler
        step.add_gradients(images)
        assert_close({name: one * scale for name, one in gradients_of(model).items()}, wanted, 3e-5)


def test_a_step_by_passes_updates_weights_like_a_plain_step(tmp_path: Path) -> None:
    figures, weights = [], []
    for is_by_passes in (False, True):
        model = without_chance()
        step = step_of(model, tmp_path, micro_batch_size=2)
        if is_by_passes:
            step.passes = Passes(model, step.losses, ENOUGH, step.scaler, is_recording=False)
        for _ in range(2):
            read = StepFigures.read(step(five_on_each(), 0.5))
        figures.append([*read.losses, read.length])
        weights.append({name: one.detach().clone() for name, one in model.named_parameters()})
    assert figures[1] == pytest.approx(figures[0], rel=1e-3)
    for name, one in weights[1].items():
        torch.testing.assert_close(one, weights[0][name], atol=1e-5, rtol=1e-3, msg=name)


def test_a_pass_reads_one_value_from_the_device_whatever_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = network()
    passes = Passes(model, LOSSES, None, scaler_of(1.0), is_recording=False)
    prepare, weights = passes.network.inputs, torch.ones(len(LOSSES))
    by_pass, plain = {}, {}
    for case in [(1, 2), (5, 2), (1, 4), (5, 4)]:
        images = images_with(*case)
        inputs = prepare(images.pixels, images.sizes, images.targets)  # this reads values that are still on the CPU
        monkeypatch.setattr(passes.network, "inputs", lambda *_, inputs=inputs, **__: inputs)
        with pooled_as_on_a_gpu(), counted() as of_pass:
            passes(images, weights)
        with counted() as of_plain:
            gradients(model, rcnn_losses.losses(model, *images.on(CPU), None))
        by_pass[case], plain[case] = of_pass.total(), of_plain.total()
    assert set(by_pass.values()) == {1}, by_pass
    assert 100 < plain[5, 4] < 2 * plain[5, 2], plain
    assert plain[5, 4] > 1.5 * plain[1, 4], plain


@dataclass(frozen=True)
class Inner:
    values: Tensor
    name: str


@dataclass(frozen=True)
class Outer:
    first: Tensor
    inner: Inner | None
    counts: tuple[int, ...]


def test_copied_inputs_have_their_own_memory_and_later_inputs_are_copied_into_it() -> None:
    source = Outer(torch.arange(3.0), Inner(torch.ones(2, dtype=torch.bool), "a name"), (1, 2))
    copied = _copied(source, CPU)
    assert isinstance(copied, Outer)
    assert isinstance(copied.inner, Inner)
    assert (copied.counts, copied.inner.name) == ((1, 2), "a name")
    places = [one.data_ptr() for one in _tensors(copied)]
    assert len(places) == 2
    assert not set(places) & {one.data_ptr() for one in _tensors(source)}
    for one, other in zip(_tensors(copied), _tensors(source), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    following = Outer(torch.full((3,), 7.0), Inner(torch.tensor([False, True]), "a name"), (1, 2))
    _copy(following, copied)
    assert [one.data_ptr() for one in _tensors(copied)] == places
    assert copied.first.tolist() == [7, 7, 7]
    assert copied.inner.values.tolist() == [False, True]
    assert source.first.tolist() == [0, 1, 2]


def test_inputs_with_a_missing_tensor_are_not_copied() -> None:
    """This would happen with inputs of a network without masks and a recording of one with masks."""
    whole = Outer(torch.zeros(1), Inner(torch.zeros(1), ""), ())
    with pytest.raises(ValueError, match="zip"):
        _copy(replace(whole, inner=None), _copied(whole, CPU))


class Recorded:
    """Stands in for a recorded pass."""


def forgetful(model: Any) -> Passes:
    """Return passes that have a recording."""
    passes = Passes(model, LOSSES, ENOUGH, scaler_of(1.0), is_recording=True)
    recorded: Any = Recorded()
    passes._recorded["a shape",] = recorded
    return passes


def test_release_frees_recordings_once_and_stops_recording() -> None:
    passes = forgetful(without_chance())
    assert passes.release()
    assert not passes.is_recording
    assert not passes._recorded
    assert not passes.release()


def test_out_of_memory_first_releases_recordings_and_then_shrinks_the_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, images = without_chance(), five_on_each()
    step = step_of(model, tmp_path)
    step.passes = forgetful(model)
    tried: list[tuple[int, bool]] = []
    call = Passes.__call__

    def limited(self: Passes, part: Batch, weights: Tensor) -> Tensor:
        tried.append((len(part), self.is_recording))
        self.is_recording = False
        found = call(self, part, weights)
        if len(part) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return found

    monkeypatch.setattr(Passes, "__call__", limited)
    with caplog.at_level(logging.WARNING):
        step.add_gradients(images)
    assert tried == [(4, True), (4, False), (2, False), (2, False)]
    assert step.micro_batch_size == 2
    found = gradients_of(model)
    step.passes = None
    step.add_gradients(images)
    assert_close(found, gradients_of(model), 3e-5)


def test_a_failed_recording_is_logged_once_and_training_goes_on_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more lines")

    monkeypatch.setattr(recording, "_Recorded", refuse)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: None)
    model, images = without_chance(), four_images()
    step = step_of(model, tmp_path)
    expected = step.add_gradients(images)
    wanted = gradients_of(model)
    step.passes = Passes(model, step.losses, ENOUGH, step.scaler, is_recording=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            found = step.add_gradients(images)
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
            assert_close(gradients_of(model), wanted, 3e-5)
    (said,) = [one.getMessage() for one in caplog.records]
    assert "cannot be recorded (RuntimeError: operation not permitted when stream is capturing): training" in said
    assert not step.passes.is_recording


@pytest.mark.parametrize(("was_recorded", "processes"), [(True, 1), (False, 1), (True, 2)])
def test_validation_out_of_memory_is_retried_after_a_release_in_a_single_process(
    was_recorded: bool, processes: int, caplog: pytest.LogCaptureFixture
) -> None:
    left = [torch.OutOfMemoryError("CUDA out of memory")]

    def measure() -> dict[str, float | None]:
        if left:
            raise left.pop()
        return {"val_loss": 1.0}

    recorded = SimpleNamespace(release=lambda: was_recorded)
    step: Any = SimpleNamespace(passes=recorded, team=Processes(0, processes))
    if was_recorded and processes == 1:
        assert _with_memory(step, measure) == {"val_loss": 1.0}
        assert "recorded CUDA graphs are released" in caplog.text
    else:
        with pytest.raises(torch.OutOfMemoryError):
            _with_memory(step, measure)


def test_a_shape_is_recorded_the_second_time_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Pretended:
        def __init__(self, passes: Any, pool: Any, stream: Any, inputs: Any, *rest: Any) -> None:
            made.append(len(inputs.pixels))

        def __call__(self, *_: Any) -> Tensor:
            return torch.full((len(LOSSES),), -1.0)

    monkeypatch.setattr(recording, "_Recorded", Pretended)
    monkeypatch.setattr(recording, "MAX_RECORDED", 2)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: None)
    passes = Passes(without_chance(), LOSSES, ENOUGH, scaler_of(1.0), is_recording=True)
    images, weights = four_images(), torch.ones(len(LOSSES))
    replayed = []
    for count in (1, 2, 1, 2, 1, 3, 3, 3):
        (part,) = list(replace(images, **{name: getattr(images, name)[:count] for name in NAMES}).parts(4))
        replayed.append(float(passes(part, weights)[0]) == -1)
    assert made == [1, 2]
    assert replayed == [False, False, True, True, True, False, False, False]


NAMES = ("pixels", "sizes", "targets")


@pytest.mark.parametrize("compile", ["auto", "off"])
def test_a_cpu_records_nothing(tmp_path: Path, compile: str) -> None:
    assert step_of(without_chance(), tmp_path, compile=compile).passes is None


@pytest.mark.parametrize("arch", ["maskrcnn_resnet18_fpn", "ssdlite320_mobilenet_v3_large"])
def test_compile_on_is_refused_on_a_cpu_before_anything_is_written(tmp_path: Path, arch: Arch) -> None:
    dataset = make_dataset(tmp_path / "data")
    with pytest.raises(FlawmaskError, match=rf"--compile on: {arch}.* cannot be recorded") as caught:
        train(settings(dataset, arch=arch, compile="on"))
    assert "\n" not in str(caught.value)
    assert [one.name for one in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("arch", "norm", "device", "expected"),
    [
        ("maskrcnn_resnet18_fpn", "group", CUDA, True),
        ("maskrcnn_resnet18_fpn", "batch", CUDA, True),
        ("fasterrcnn_mobilenet_v3_large_fpn", "frozen", CUDA, True),
        ("maskrcnn_resnet18_fpn", "group", CPU, False),
        ("ssdlite320_mobilenet_v3_large", "batch", CUDA, False),
    ],
)
def test_only_an_rcnn_on_cuda_can_be_recorded(arch: Arch, norm: Any, device: torch.device, expected: bool) -> None:
    size = 320 if arch.startswith("ssd") else 64
    spec = replace(SPEC, arch=arch, norm=norm, image_size=size)
    assert can_record(spec, build(spec), device) == expected


def test_heads_with_batch_norm_are_not_recorded() -> None:
    """Their statistics would include unused slots."""
    model = without_chance()
    assert can_record(SPEC, model, CUDA)
    model.roi_heads.box_head.append = torch.nn.BatchNorm2d(4)
    assert not can_record(SPEC, model, CUDA)


def on_cuda(dtype: torch.dtype) -> Any:
    """Two such networks train alike: nothing is random."""
    model = to_device(without_chance(), CUDA)
    train_in(model, CUDA, dtype)
    return model


BATCHES = 3


@needs_cuda
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_recorded_passes_give_the_same_losses_and_gradients(dtype: torch.dtype, tolerance: float, scale: float) -> None:
    """bfloat16 has 8 bits of precision. A sum in another order may round an objectness to a neighbouring value."""
    model = on_cuda(dtype)
    weights = torch.rand(len(LOSSES), device=CUDA) + 0.5
    plain = Passes(model, LOSSES, ENOUGH, scaler_of(scale, CUDA), is_recording=False)
    recorded = Passes(model, LOSSES, ENOUGH, scaler_of(scale, CUDA), is_recording=True)
    figures = []
    for seed in (0, *range(BATCHES)):
        images = five_on_each(seed)
        results = []
        for passes in (plain, recorded):
            for one in model.parameters():
                if one.grad is not None:
                    one.grad.zero_()
            results.append((passes(images, weights).cpu(), gradients_of(model)))
        (expected, wanted), (found, ours) = results
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
        assert_close(ours, wanted, tolerance)
        figures.append(tuple(found.tolist()))
    assert recorded.is_recording
    assert recorded.recorded == 1, "nothing was recorded"
    assert len(set(figures[1:])) == BATCHES, "what was recorded is given again"


@needs_cuda
def test_a_recorded_pass_accumulates_gradients_and_its_losses_are_not_overwritten() -> None:
    model, weights = on_cuda(torch.float32), torch.ones(len(LOSSES), device=CUDA)
    passes = Passes(model, LOSSES, ENOUGH, scaler_of(1.0, CUDA), is_recording=True)
    passes(five_on_each(0), weights)
    passes(five_on_each(0), weights)
    for one in model.parameters():
        if one.grad is not None:
            one.grad.zero_()
    figures = passes(five_on_each(0), weights)
    kept, once = figures.clone(), gradients_of(model)
    passes(five_on_each(0), weights)
    assert_close(gradients_of(model), {name: 2 * one for name, one in once.items()}, 1e-4)
    passes(five_on_each(1), weights)
    assert torch.equal(figures, kept)


@needs_cuda
@pytest.mark.parametrize("compile", ["auto", "off"])
def test_a_step_waits_for_the_gpu_at_most_five_times(
    tmp_path: Path, compile: str, recwarn: pytest.WarningsRecorder
) -> None:
    step = step_of(to_device(network(), CUDA), tmp_path, compile=compile, roi_samples=None)
    for _ in range(3):
        step(five_on_each(), 0.5).tolist()
    torch.cuda.synchronize()
    recwarn.clear()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        step(five_on_each(), 0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waited = [str(one.message) for one in recwarn if "synchroniz" in str(one.message)]
    assert 1 <= len(waited) <= 5, waited


@needs_cuda
@pytest.mark.parametrize(("compile", "is_recording"), [("auto", True), ("on", True), ("off", False)])
def test_the_flag_compile_decides_whether_a_gpu_records(tmp_path: Path, compile: str, is_recording: bool) -> None:
    step = step_of(to_device(network(), CUDA), tmp_path, compile=compile)
    assert step.passes is not None
    assert step.passes.is_recording == is_recording
    for _ in range(3):
        step(five_on_each(), 0.5).tolist()
    assert bool(step.passes.recorded) == is_recording


@needs_cuda
@pytest.mark.slow
@pytest.mark.parametrize("compile", ["auto", "off"])
def test_a_training_on_a_gpu_has_a_finite_loss_on_both_splits(tmp_path: Path, compile: str) -> None:
    dataset = make_dataset(tmp_path / "data")
    done = train(settings(dataset, device="cuda", compile=compile, epochs=3, roi_samples=None))
    assert all(math.isfinite(one) for name in ("train_loss", "val_loss") for one in done.history[name])
    assert done.history["skipped_steps"] == [0, 0, 0]


@needs_cuda
def test_losses_without_gradients_are_the_same_on_gpu_and_cpu(tmp_path: Path) -> None:
    """Validation computes such losses."""
    images = four_images()
    expected = step_of(without_chance(), tmp_path)
    on_gpu = step_of(on_cuda(torch.float32), tmp_path)
    with torch.no_grad():
        wanted = expected.losses_of(expected.model, images)
        found = on_gpu.losses_of(on_gpu.model, images)
    torch.testing.assert_close(found.cpu(), wanted, atol=1e-3, rtol=1e-3)


def test_only_page_locked_memory_is_copied_asynchronously(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Pair:
        pinned: Tensor
        other: Tensor

    plain, copies = Tensor.copy_, []

    def copy(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        copies.append((source, non_blocking))
        return plain(self, source)

    new, old = Pair(torch.ones(2), torch.ones(3)), Pair(torch.zeros(2), torch.zeros(3))
    monkeypatch.setattr(Tensor, "is_pinned", lambda self: self is new.pinned)
    monkeypatch.setattr(Tensor, "copy_", copy)
    _copy(new, old)
    assert [without for _, without in copies] == [True, False]
    assert bool((old.pinned == 1).all() and (old.other == 1).all())
