"""RF-DETR: built without a download, with rfdetr's losses and predictions, trained, saved, loaded and evaluated."""

import socket
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from random_network import resized
from stained_plates import make_dataset, part, settings
from torch import Tensor
from torchvision.ops import box_convert

from flawmask.coco import read_split
from flawmask.errors import FlawmaskError
from flawmask.evaluation.config import EvaluateConfig
from flawmask.evaluation.evaluate import evaluate
from flawmask.inference.predictor import Predictor
from flawmask.model import rfdetr
from flawmask.model.arch import Arch
from flawmask.model.build import build, for_inference, freeze
from flawmask.model.spec import ModelSpec
from flawmask.model.targets import Target
from flawmask.model.weights import load_matching, pretrained
from flawmask.training.loader import Batch, SplitDataset
from flawmask.training.loop import train

needs_rfdetr = pytest.mark.skipif(
    find_spec("rfdetr") is None, reason='rfdetr is not installed: pip install "flawmask[rfdetr]"'
)

ARCHITECTURES: tuple[Arch, ...] = ("rfdetr_seg_nano", "rfdetr_seg_small")
CLASSES = ("good", "defect")
SPEC = ModelSpec("rfdetr_seg_nano", CLASSES, image_size=120)
CPU = torch.device("cpu")


@cache
def network() -> Any:
    """Return a cached network for tests that do not change it."""
    torch.manual_seed(0)
    return build(SPEC)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("plates") / "data")


def batch_of(dataset: Path) -> Batch:
    split = read_split(dataset, "train")
    return Batch.of([SplitDataset(split, SPEC)[place] for place in (0, 1)])


def nothing() -> Target:
    return {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "windows": torch.zeros(0, 4, dtype=torch.int64),
        "mask_pixels": torch.zeros(0, dtype=torch.uint8),
        "image_id": torch.zeros(1, dtype=torch.int64),
    }


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rfdetr", None)
    rfdetr._rfdetr.cache_clear()
    with pytest.raises(FlawmaskError, match=r'pip install "flawmask\[rfdetr\]"'):
        build(SPEC)


@pytest.mark.parametrize(
    ("arch", "image_size", "side"),
    [
        ("rfdetr_seg_nano", 64, 120),
        ("rfdetr_seg_nano", 312, 312),
        ("rfdetr_seg_nano", 313, 324),
        ("rfdetr_seg_small", 64, 120),
        ("rfdetr_seg_small", 384, 384),
        ("rfdetr_seg_small", 385, 408),
    ],
)
def test_images_are_resized_to_a_square_of_whole_windows(arch: Arch, image_size: int, side: int) -> None:
    spec = ModelSpec(arch, CLASSES, image_size=image_size)
    assert spec.resized(70, 300) == spec.resized(300, 70) == (side, side)


@needs_rfdetr
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_it_is_built_silently_without_internet(
    arch: Arch, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> NoReturn:
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    model = build(ModelSpec(arch, CLASSES, image_size=120)).eval()
    with torch.inference_mode():
        (found,) = rfdetr.infer(model, [torch.randint(0, 256, (3, 120, 120), dtype=torch.uint8)], [(70, 90)])
    assert {name: one.shape[1:] for name, one in found.items()} == {
        "boxes": (4,),
        "labels": (),
        "scores": (),
        "masks": (1, 28, 28),
    }
    assert len(found["scores"]) == 100
    assert set(found["labels"].tolist()) <= {1, 2}
    assert ((found["boxes"] >= 0) & (found["boxes"] <= torch.tensor([90, 70, 90, 70]))).all()
    assert capfd.readouterr() == ("", "")


@needs_rfdetr
def test_rfdetr_targets_are_relative_boxes_with_whole_masks(dataset: Path) -> None:
    targets = batch_of(dataset).targets
    found = rfdetr._rfdetr_target(targets[0], 120, 120)
    _, mask = part(0)
    rows, columns = (torch.from_numpy(mask).any(axis).nonzero().squeeze(1) for axis in (1, 0))
    ends = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / mask.shape[0]
    assert found["labels"].tolist() == [1]
    assert torch.allclose(box_convert(found["boxes"], "cxcywh", "xyxy"), ends[None])
    centres = (2 * torch.arange(120) + 1) * mask.shape[0] // 240
    assert torch.equal(found["masks"], torch.from_numpy(mask)[centres][:, centres][None])


@needs_rfdetr
def test_the_sums_of_the_losses_equal_rfdetrs(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network().train()
    images, targets = batch_of(dataset).on(CPU)
    points = torch.rand(5000, 2)
    # rfdetr compares masks at random points, drawn for a whole batch. Here they are the same for every instance.
    monkeypatch.setattr(torch, "rand", lambda *size, **_: points[: size[1]].expand(*size).clone())
    with torch.no_grad():
        ours = rfdetr.losses(model, images, targets, None)
        wanted = [rfdetr._rfdetr_target(target, 120, 120) for target in targets]
        theirs = model.criterion(model(rfdetr._normalised(rfdetr.network_input(model, images))), wanted)
    assert tuple(ours) == SPEC.architecture.loss_names
    total = sum(weight * theirs[name] for name, weight in model.criterion.weight_dict.items())
    assert float(sum(ours.values())) == pytest.approx(float(total), rel=1e-5)


@needs_rfdetr
def test_a_batch_without_instances_can_be_learned(dataset: Path) -> None:
    model = build(SPEC).train()
    images, targets = batch_of(dataset).on(CPU)
    full = rfdetr.losses(model, images, targets, None)
    empty = rfdetr.losses(model, images, [nothing(), nothing()], None)
    assert [name for name, loss in empty.items() if loss] == ["loss_ce"]
    # The loss of the full batch is divided by two images, so that of the empty image may be twice as large.
    assert 0 < float(empty["loss_ce"].detach()) < 3 * float(full["loss_ce"].detach())
    torch.autograd.backward(torch.stack([*empty.values()]).sum())
    gradients = [one.grad for one in model.parameters() if one.grad is not None]
    assert gradients
    assert all(one.isfinite().all() for one in gradients)


def outputs(spec: ModelSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, boxes and masks like the network's outputs for an image."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(40, len(spec.classes) + 1, generator=draw)
    logits[:, -1] = 9.0  # the class for no object
    boxes = torch.rand(40, 4, generator=draw) * 0.5 + 0.2
    return logits, boxes, torch.randn(40, 30, 30, generator=draw)


@needs_rfdetr
def test_detections_are_rfdetrs_own() -> None:
    from rfdetr.models.postprocess import PostProcess

    spec = ModelSpec("rfdetr_seg_nano", ("good", "crack", "scratch"), max_detections=30)
    logits, boxes, masks = outputs(spec)
    found = rfdetr._instances(logits, boxes, masks, spec, 0.0, (70, 90))
    whole = {"pred_logits": logits[None, :, :-1], "pred_boxes": boxes[None]}
    (theirs,) = PostProcess(num_select=30)(whole, torch.tensor([[70, 90]]))
    assert torch.equal(found["labels"], theirs["labels"] + 1)
    assert torch.equal(found["scores"], theirs["scores"])
    assert torch.allclose(found["boxes"], theirs["boxes"])


def test_predictions_up_to_the_score_floor_are_dropped() -> None:
    spec = ModelSpec("rfdetr_seg_nano", CLASSES)
    everything = rfdetr._instances(*outputs(spec), spec, 0.0, (70, 90))
    floor = float(everything["scores"][5])
    found = rfdetr._instances(*outputs(spec), spec, floor, (70, 90))
    assert all(torch.equal(one, everything[name][:5]) for name, one in found.items())


def test_a_mask_in_its_box_equals_the_mask_on_the_image() -> None:
    logits, boxes, masks = torch.full((1, 3), -9.0), torch.tensor([[0.5, 0.5, 0.4, 0.8]]), torch.full((1, 40, 80), -9.0)
    logits[0, 1] = 9.0
    masks[:, :20, 32:40] = 9.0  # the box's upper left quarter, and above it
    found = rfdetr._instances(logits, boxes, masks, ModelSpec("rfdetr_seg_nano", CLASSES), 0.5, (100, 200))
    assert torch.allclose(found["boxes"], torch.tensor([[60.0, 10.0, 140.0, 90.0]]))
    assert found["labels"].tolist() == [2]
    inside = found["masks"][0, 0]
    assert (inside[:13, 7:13] > 0.99).all()
    assert (inside[15:] < 0.01).all()
    assert (inside[:, 15:] < 0.01).all()


@needs_rfdetr
@pytest.mark.parametrize("trainable", range(6))
def test_freezing_spares_the_layers_nearest_the_heads_and_all_outside_the_encoder(trainable: int) -> None:
    model = network()
    freeze(model, SPEC, trainable)
    learned = {name for name, one in model.named_parameters() if one.requires_grad}
    model.requires_grad_(True)
    inside = "backbone.0.encoder.encoder."
    stages = [("embeddings.",), *(tuple(f"encoder.layer.{3 * at + one}." for one in range(3)) for at in range(4))]
    stages[4] += ("layernorm.",)
    frozen = tuple(inside + layer for stage in stages[: 5 - trainable] for layer in stage)
    assert learned == {name for name, _ in model.named_parameters() if not name.startswith(frozen)}
    assert any(name.startswith(inside) for name in learned) == (trainable > 0)


def test_a_nan_score_is_dropped_and_takes_no_place() -> None:
    logits, boxes, masks = outputs(SPEC)
    spec = ModelSpec("rfdetr_seg_nano", CLASSES, max_detections=5)
    logits[0] = -20.0
    expected = rfdetr._instances(logits, boxes, masks, spec, 0.1, (100, 200))
    logits[0] = torch.nan
    found = rfdetr._instances(logits, boxes, masks, spec, 0.1, (100, 200))
    assert len(expected["scores"]) == 5
    assert all(torch.equal(found[name], one) for name, one in expected.items())


@needs_rfdetr
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
def test_the_copy_for_inference_predicts_the_same_and_shares_no_memory(dtype: torch.dtype, tolerance: float) -> None:
    model = network().eval()
    noise = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    inputs = resized(SPEC, noise)
    fast = for_inference(model, SPEC, CPU, dtype)
    with torch.inference_mode():
        (expected,), (found,) = rfdetr.infer(model, *inputs), rfdetr.infer(fast, *inputs)
    assert all(one.dtype in (torch.float32, torch.int64) for one in found.values())
    assert torch.allclose(found["scores"], expected["scores"], rtol=0, atol=tolerance)
    if dtype == torch.float32:
        assert torch.equal(found["labels"], expected["labels"])
        assert torch.allclose(found["boxes"], expected["boxes"], rtol=0, atol=1e-3)
        assert torch.allclose(found["masks"], expected["masks"], rtol=0, atol=1e-3)
    places = {one.data_ptr() for one in model.parameters()}
    assert not places & {one.data_ptr() for one in fast.parameters()}


@needs_rfdetr
def test_a_plain_state_dict_is_loaded_by_name(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"model": network().state_dict()}, path)
    initial_weights = pretrained(SPEC.arch, str(path))
    same = build(SPEC)
    filled, left = load_matching(same, initial_weights)
    assert (filled, left) == (len(network().state_dict()), [])
    assert all(torch.equal(one, network().state_dict()[name]) for name, one in same.state_dict().items())
    other = build(ModelSpec("rfdetr_seg_nano", ("crack", "good", "scratch"), image_size=240))
    _, left = load_matching(other, initial_weights)
    assert left
    assert all("class_embed" in line for line in left)


@needs_rfdetr
@pytest.mark.slow
@pytest.mark.services
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_loss_falls(dataset: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = build(SPEC).train()
    rfdetr.train_in(model, CPU, dtype)
    images, targets = batch_of(dataset).on(CPU)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    course = []
    for _ in range(5):
        optimizer.zero_grad()
        found = rfdetr.losses(model, images, targets, None)
        assert {one.dtype for one in found.values()} == {torch.float32}
        loss = torch.stack([*found.values()]).sum()
        torch.autograd.backward(loss)
        optimizer.step()
        course.append(loss.item())
    assert sum(course[-2:]) < 0.8 * sum(course[:2])


@needs_rfdetr
@pytest.mark.slow
@pytest.mark.services
def test_it_is_trained_saved_loaded_and_evaluated(dataset: Path, tmp_path: Path) -> None:
    trained = train(settings(dataset, output_dir=tmp_path / "run", arch="rfdetr_seg_nano"))
    assert set(SPEC.architecture.loss_names) < set(trained.history)
    assert trained.history["skipped_steps"] == [0]
    pixels, _ = part(100)
    best = tmp_path / "run" / "best.pt"
    found = Predictor(best, "cpu", score_floor=0.0)(pixels)
    assert len(found.instances) == 10
    assert all(one.area <= pixels.shape[0] * pixels.shape[1] for one in found.instances)
    results = evaluate(EvaluateConfig(model=best, dataset_dir=dataset, device="cpu", resamples=20))
    assert results.metrics["mask_ap"] is not None
