"""Every architecture trains, saves, loads and predicts through the same interface."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from random_network import (
    KINDS,
    OTHERS,
    detect,
    infer,
    network_of,
    patchwork,
    random_network,
    resized,
    spec_of,
    tensors_of,
)
from stained_plates import settings
from torch import Tensor

from flawmask.coco import annotation
from flawmask.inference.config import MAX_PROPOSALS
from flawmask.inference.predictor import Predictor
from flawmask.model import checkpoint
from flawmask.model.arch import Arch
from flawmask.model.build import Detector, build, detector_of, for_inference, set_score_floor
from flawmask.model.layers import to_device
from flawmask.model.spec import ModelSpec
from flawmask.model.targets import Target, make_target
from flawmask.prediction import Prediction, post_process
from flawmask.training.loader import Batch
from flawmask.training.step import StepFigures, make_step

CPU = torch.device("cpu")
FLOOR = 0.05
BOX_LOSSES = ("loss_box_reg", "bbox_regression", "box_loss", "loss_bbox")


@dataclass(frozen=True)
class Case:
    """A random network that predicts something. It must not be changed."""

    spec: ModelSpec
    detector: Detector
    network: Any


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest) -> Case:
    """Build one network of each kind, one after the other: together they would take a gigabyte."""
    spec = spec_of(request.param)
    case = Case(spec, detector_of(spec), to_device(random_network(spec), CPU))
    set_score_floor(case.network, FLOOR)
    return case


@pytest.fixture(scope="module")
def path(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("run") / "best.pt"
    checkpoint.save(path, case.network, case.spec)
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def predictor(path: Path) -> Predictor:
    return Predictor(path, "cpu", precision="fp32", score_floor=FLOOR)


def target_of(size: tuple[int, int], *boxes: tuple[int, int, int, int]) -> Target:
    """Return the target of a (height, width) image that is not resized, with a defect in each box x y width height."""
    records: list[dict[str, Any]] = []
    for x, y, width, height in boxes:
        mask: npt.NDArray[np.bool_] = np.zeros(size, dtype=bool)
        mask[y : y + height, x : x + width] = True
        records.append(annotation(mask, id=1, image_id=1, category_id=2 + len(records) % 2))
    return make_target(records, {2: 2, 3: 3}, 1, size, size, "an image")


def batch_for(spec: ModelSpec, *instances: int, side: int = 64) -> Batch:
    """Return images with these numbers of instances, in several shapes unless the network has a fixed size."""
    shapes = [(spec.fixed_size or side, spec.fixed_size or side + 16 * at) for at in range(len(instances))]
    boxes = [(8, 12, 20, 15), (30, 20, 24, 40)]
    images = [torch.from_numpy(patchwork(*shape, at).copy()).permute(2, 0, 1) for at, shape in enumerate(shapes)]
    targets = [target_of(shape, *boxes[:count]) for shape, count in zip(shapes, instances, strict=True)]
    return Batch.of(list(zip(images, targets, strict=True)))


@dataclass(frozen=True)
class Trained:
    """The results of two steps: one on an image with two instances and an image without, one on an image without.

    Attributes:
        names: of the losses.
        figures: of both steps.
        gradients: of both, of what learns, by name; None where there was none.
        moved: names of the parameters that the first step changed.
        stages: names of the parameters of each of the backbone's stages.
    """

    names: tuple[str, ...]
    figures: list[StepFigures]
    gradients: list[dict[str, Tensor | None]]
    moved: set[str]
    stages: list[set[str]]


@pytest.fixture(scope="module")
def trained(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    model = copy.deepcopy(case.network)
    places = {id(one): name for name, one in model.named_parameters()}
    stages = [
        {places[id(one)] for module in stage for one in module.parameters()} for stage in case.detector.stages(model)
    ]
    case.detector.train_in(model.train(), CPU, torch.float32)
    config = settings(tmp_path_factory.mktemp("data"), arch=case.spec.arch, warmup_steps=0, roi_samples=None)
    step = make_step(config, model, case.spec, CPU, torch.float32, "detector", micro_batch_size=2)
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    torch.manual_seed(0)
    figures: list[StepFigures] = []
    gradients: list[dict[str, Tensor | None]] = []
    moved: set[str] = set()
    for batch in (batch_for(case.spec, 2, 0), batch_for(case.spec, 0)):
        figures.append(StepFigures.read(step(batch, 0.0)))
        learned = {name: one for name, one in model.named_parameters() if one.requires_grad}
        gradients.append({name: None if one.grad is None else one.grad.clone() for name, one in learned.items()})
        moved = moved or {name for name, one in learned.items() if not torch.equal(one, before[name])}
    return Trained(step.losses, figures, gradients, moved, stages)


def test_the_losses_have_the_names_of_the_record(case: Case) -> None:
    model = copy.deepcopy(case.network).train()
    with torch.no_grad():
        found = case.detector.losses(model, *batch_for(case.spec, 1).on(CPU), None)
    assert set(found) == set(case.spec.loss_names)
    assert all(loss.shape == () and loss.dtype == torch.float32 for loss in found.values())


def test_a_step_on_an_instance_has_finite_losses_and_changes_the_weights(trained: Trained) -> None:
    figures = trained.figures[0]
    assert figures.not_finite == ""
    assert len(figures.losses) == len(trained.names)
    assert all(loss > 0 for loss in figures.losses), dict(zip(trained.names, figures.losses, strict=True))
    assert all(stage & trained.moved for stage in trained.stages)
    assert trained.moved - {one for stage in trained.stages for one in stage}, "nothing but the backbone"


def test_an_image_without_instances_has_finite_losses_and_a_box_loss_of_zero(case: Case, trained: Trained) -> None:
    figures = trained.figures[1]
    assert figures.not_finite == ""
    of_boxes = next(at for at, name in enumerate(trained.names) if name in BOX_LOSSES)
    assert figures.losses[of_boxes] == 0
    # SSD samples three background places for each instance. Here there is no instance, so there is none.
    assert (sum(figures.losses) > 0) == (not case.spec.arch.startswith("ssd"))


def test_the_same_parameters_have_a_gradient_for_any_images(trained: Trained) -> None:
    """The all-reduce concatenates all gradients. If one process lacked one, all later ones would be shifted."""
    without = [{name for name, one in gradients.items() if one is None} for gradients in trained.gradients]
    assert without[0] == without[1]
    assert len(without[0]) < 0.01 * len(trained.gradients[0])
    reached = {name for name, one in trained.gradients[0].items() if one is not None and bool(one.any())}
    assert all(stage & reached for stage in trained.stages)


def test_a_loaded_network_has_the_same_weights_and_predictions(case: Case, path: Path) -> None:
    comes_back(path, case.spec, case.network)


def comes_back(path: Path, saved: ModelSpec, network: Any) -> None:
    """Compare a loaded network with the spec and the network that were saved."""
    loaded, spec = checkpoint.load(path)
    assert spec == saved
    assert not loaded.training
    state = loaded.state_dict()
    assert state.keys() == network.state_dict().keys()
    assert all(torch.equal(state[name], one) for name, one in network.state_dict().items())
    for one in (loaded, network):
        set_score_floor(one, FLOOR)
    pixels = patchwork(75, 91)
    expected = detect(network, spec, pixels)
    assert len(expected.instances) > 5
    assert_same(detect(to_device(loaded, CPU), spec, pixels), expected)


def assert_same(one: Prediction, other: Prediction) -> None:
    """Sums in another order have other last digits."""
    assert [each.label for each in one.instances] == [each.label for each in other.instances]
    assert one.has_masks == other.has_masks
    for mine, theirs in zip(one.instances, other.instances, strict=True):
        assert mine.score == pytest.approx(theirs.score, abs=1e-4)
        assert mine.box == pytest.approx(theirs.box, abs=2e-2)
        assert np.count_nonzero(mine.mask != theirs.mask) <= 0.02 * mine.mask.size


def test_a_loaded_network_equals_an_initialised_one_with_the_same_weights_to_the_bit(
    case: Case, path: Path, predictor: Predictor
) -> None:
    filled = build(case.spec).eval()
    filled.load_state_dict(case.network.state_dict())
    loaded, _ = checkpoint.load(path)
    learning = [{name for name, one in model.named_parameters() if one.requires_grad} for model in (filled, loaded)]
    assert learning[0] == learning[1]
    narrow = for_inference(filled, case.spec, CPU, next(network_of(predictor).parameters()).dtype, MAX_PROPOSALS)
    for model in (filled, loaded, narrow):
        set_score_floor(model, FLOOR)
    for old, new in ((to_device(filled, CPU), to_device(loaded, CPU)), (narrow, network_of(predictor))):
        states = old.state_dict(), new.state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        expected, found = (tensors_of(infer(model, case.spec, [patchwork(80, 90)])[0]) for model in (old, new))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        assert len(found["scores"])


def test_the_network_for_inference_predicts_like_the_trained_one(case: Case, predictor: Predictor) -> None:
    pixels = patchwork(75, 91, 2)
    with torch.inference_mode():
        (expected,) = case.detector.infer(case.network, *resized(case.spec, pixels))
        (found,) = case.detector.infer(network_of(predictor), *resized(case.spec, pixels))
    assert len(expected["scores"]) > 5
    assert found.keys() == expected.keys() == {"boxes", "labels", "scores"} | ({"masks", "maps"} & expected.keys())
    assert ("masks" in found) == case.spec.has_masks
    assert ("maps" in found) == case.spec.semantic_head
    assert torch.equal(found["labels"], expected["labels"])
    torch.testing.assert_close(found["scores"], expected["scores"], atol=1e-4, rtol=0)
    torch.testing.assert_close(found["boxes"], expected["boxes"], atol=2e-2, rtol=0)
    if case.spec.has_masks:
        torch.testing.assert_close(found["masks"], expected["masks"], atol=1e-2, rtol=0)


def test_the_network_for_inference_has_no_trainable_parameters(predictor: Predictor) -> None:
    network: Any = network_of(predictor)
    assert not network.training
    assert not any(one.requires_grad for one in network.parameters())


@pytest.mark.parametrize("size", [(121, 67), (31, 200)])
def test_predictions_lie_on_the_image_and_have_known_classes(
    case: Case, predictor: Predictor, size: tuple[int, int]
) -> None:
    height, width = size
    prediction = predictor(patchwork(height, width, 3))
    assert (prediction.height, prediction.width) == size
    assert prediction.has_masks == case.spec.has_masks
    assert 0 < len(prediction.instances) <= case.spec.max_detections
    for one in prediction.instances:
        assert 0 <= one.box[0] <= one.box[2] <= width
        assert 0 <= one.box[1] <= one.box[3] <= height
        assert one.label in case.spec.classes
        assert FLOOR < one.score <= 1
        assert one.mask.shape == size
        assert one.mask.sum() == one.area
        assert (one.probabilities is not None) == case.spec.has_masks
        if not case.spec.has_masks:
            assert 0 < one.area <= (one.box[2] - one.box[0] + 2) * (one.box[3] - one.box[1] + 2)
    scores = [one.score for one in prediction.instances]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("size", [(9, 1300), (1300, 9)])
def test_an_image_that_is_one_row_of_pixels_after_resizing_is_predicted(
    case: Case, predictor: Predictor, size: tuple[int, int]
) -> None:
    assert case.spec.fixed_size or min(case.spec.resized(*size)) == 1
    prediction = predictor(patchwork(*size, 3))
    assert (prediction.height, prediction.width) == size
    for one in prediction.instances:
        assert 0 <= one.box[0] <= one.box[2] <= size[1]
        assert 0 <= one.box[1] <= one.box[3] <= size[0]


def test_labels_are_positions_of_classes_counted_from_1(case: Case) -> None:
    """This includes networks that score the background, and score it high."""
    with torch.inference_mode():
        found = case.detector.infer(case.network, *resized(case.spec, *(patchwork(75, 91, seed) for seed in range(2))))
    labels = torch.cat([one["labels"] for one in found]).tolist()
    assert set(labels) <= {1, 2, 3}
    assert labels


def test_two_images_in_a_batch_have_the_predictions_of_each_alone(case: Case, predictor: Predictor) -> None:
    pair = [patchwork(75, 91, seed) for seed in (4, 5)]
    together = [
        post_process(found, case.spec.classes, 75, 91) for found in infer(network_of(predictor), case.spec, pair)
    ]
    assert sum(len(one.instances) for one in together) > 5
    for one, pixels in zip(together, pair, strict=True):
        assert_same(one, predictor(pixels))
    assert together[0] != together[1]


def test_a_score_floor_drops_only_lower_scores(case: Case, predictor: Predictor) -> None:
    pixels = patchwork(75, 91, 6)
    everything = infer(network_of(predictor), case.spec, [pixels])[0].scores
    floor = float(np.sort(everything)[len(everything) // 2])
    set_score_floor(network_of(predictor), floor)
    try:
        above = infer(network_of(predictor), case.spec, [pixels])[0].scores
    finally:
        set_score_floor(network_of(predictor), FLOOR)
    kept = everything[everything > floor]
    assert len(kept)
    assert np.sort(above) == pytest.approx(np.sort(kept), abs=1e-4)


def test_the_network_input_is_the_images_padded_at_the_right_and_below(case: Case) -> None:
    images = batch_for(case.spec, 1, 1).images
    seen = case.detector.network_input(case.network, images)
    assert seen.shape[:2] == (2, 3)
    for of_image, image in zip(seen, images, strict=True):
        height, width = image.shape[1:]
        torch.testing.assert_close(of_image[:, :height, :width], image / 255, atol=1e-4, rtol=0)
        padding = torch.cat([of_image[:, height:].flatten(1), of_image[:, :, width:].flatten(1)], dim=1)
        assert not padding.numel() or bool((padding == padding[:, :1]).all())


def test_training_in_bfloat16_has_finite_float32_losses_and_gradients(case: Case) -> None:
    model = copy.deepcopy(case.network).train()
    case.detector.train_in(model, CPU, torch.bfloat16)
    inside: set[torch.dtype] = set()
    for module in (one for stage in case.detector.stages(model) for each in stage for one in each.modules()):
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda _, __, output: inside.add(output.dtype))
    found = case.detector.losses(model, *batch_for(case.spec, 1, side=96).on(CPU), None)
    torch.autograd.backward(list(found.values()))
    gradients = [one.grad for one in model.parameters() if one.grad is not None]
    assert gradients
    assert {one.dtype for one in (*found.values(), *gradients)} == {torch.float32}
    assert all(bool(torch.isfinite(one).all()) for one in (*found.values(), *gradients))
    is_slow = any(name in case.spec.arch for name in ("efficientnet", "mobilenet"))  # see `compute.is_slow`
    assert inside == {torch.float32 if is_slow else torch.bfloat16}


@pytest.mark.parametrize("arch", OTHERS)
def test_other_networks_of_a_kind_train_and_load_with_the_same_weights_and_predictions(
    tmp_path: Path, arch: Arch
) -> None:
    spec = spec_of(arch)
    network = random_network(spec).train()
    found = detector_of(spec).losses(network, *batch_for(spec, 1).on(CPU), None)
    assert set(found) == set(spec.loss_names)
    torch.autograd.backward(list(found.values()))
    gradients = [one.grad for one in network.parameters() if one.grad is not None]
    assert len(gradients) > 0.99 * len(list(network.parameters()))
    assert all(bool(torch.isfinite(one).all()) for one in (*found.values(), *gradients))
    network = to_device(random_network(spec), CPU)
    checkpoint.save(tmp_path / "best.pt", network, spec)
    comes_back(tmp_path / "best.pt", spec, network)


@pytest.mark.parametrize("arch", ["ssdlite320_mobilenet_v3_large", "retinanet_resnet50_fpn", "yolo11n"])
def test_batch_norm_that_learns_accepts_a_batch_of_one_image(arch: Arch) -> None:
    """A last level of a single value has no variance."""
    spec = spec_of(arch, norm="batch")
    torch.manual_seed(0)
    model = build(spec).train()
    norms = [one for one in model.modules() if isinstance(one, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        found = detector_of(spec).losses(model, *batch_for(spec, 1).on(CPU), None)
    assert all(bool(torch.isfinite(loss)) for loss in found.values())
    assert all(bool(torch.isfinite(one.running_var).all()) for one in norms if one.running_var is not None)
    assert sum(int(one.num_batches_tracked or 0) for one in norms) > 0.9 * len(norms), "they do not learn"
