"""A batch gives the same gradients at once, in micro-batches and in several processes, with every kind of network.

Its images are of one size: others are padded for each other.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from random_network import KINDS, random_network, spec_of
from splitting import batch_for
from stained_plates import settings
from torch import Tensor

from flawmask.model.build import detector_of
from flawmask.model.layers import to_device
from flawmask.model.spec import ModelSpec
from flawmask.training.epoch import validation_loss
from flawmask.training.loader import Batch
from flawmask.training.recording import Passes
from flawmask.training.step import Step, make_step

CPU = torch.device("cpu")
BY_WHAT_IS_DIVIDED = ["maskrcnn_resnet18_fpn", "fcos_resnet50_fpn", "ssdlite320_mobilenet_v3_large", "yolo11n-seg"]
"""One network for each kind of count: images, positive places, positive anchors, and ultralytics' alignment scores."""

one_of_each = pytest.mark.parametrize("case", BY_WHAT_IS_DIVIDED, indirect=True)


@dataclass(frozen=True)
class Case:
    """A random network in training mode that predicts something. It must not be changed."""

    spec: ModelSpec
    network: Any


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    """Build one architecture of each kind in turn, with the default norms without and with pretrained weights."""
    spec = spec_of(request.param)
    yield Case(spec, to_device(random_network(spec), CPU).train())


def step_of(case: Case, micro_batch_size: int, tmp_path: Any, **changes: Any) -> Step:
    model = copy.deepcopy(case.network)
    config = settings(tmp_path, arch=case.spec.arch, roi_samples=None)
    detector_of(case.spec).train_in(model, CPU, torch.float32)
    made = make_step(config, model, case.spec, CPU, torch.float32, "detector", micro_batch_size=micro_batch_size)
    return replace(made, **changes)


def learned(step: Step, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the losses of a step and the gradient that it leaves."""
    torch.manual_seed(3)
    losses = step.add_gradients(batch)
    return losses, {name: one.grad for name, one in step.model.named_parameters() if one.grad is not None}


def assert_same(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    """Sums in another order end in other digits, by which ultralytics' assignment moves a little, and layers with kinks
    now and then by more: gradients of the network's parts are compared, not each of their numbers."""
    torch.testing.assert_close(found[0], expected[0], atol=1e-6, rtol=1e-3)
    assert found[1].keys() == expected[1].keys()
    for part in {part_of(name) for name in expected[1]}:
        names = [name for name in expected[1] if part_of(name) == part]
        ours, theirs = (torch.cat([each[1][name].flatten() for name in names]).double() for each in (found, expected))
        assert float((ours - theirs).norm()) <= 0.01 * float(theirs.norm()), part


def part_of(name: str) -> str:
    """Return the backbone, or one of the heads' parts, or one of ultralytics' layers."""
    return ".".join(name.split(".")[: 1 if name.startswith("backbone") else 2])


def test_the_gradient_does_not_depend_on_the_micro_batch_size(case: Case, tmp_path: Any) -> None:
    batch = batch_for(case.spec)
    expected = learned(step_of(case, 4, tmp_path), batch)
    assert all(float(loss) > 0 for loss in expected[0])
    for micro_batch_size in (2, 1):
        assert_same(learned(step_of(case, micro_batch_size, tmp_path), batch), expected)


@one_of_each
def test_two_processes_have_the_same_gradient_as_one(case: Case, tmp_path: Any) -> None:
    batch = batch_for(case.spec)
    expected = learned(step_of(case, 4, tmp_path), batch)
    shards = [Batch(batch.pixels[rank::2], batch.sizes[rank::2], batch.targets[rank::2]) for rank in range(2)]
    step = step_of(case, 4, tmp_path)
    torch.manual_seed(3)
    # What the processes exchange: the sum of their counts.
    totals = torch.stack([one for shard in shards for one in step._counts(shard)]).sum(dim=0)
    losses = torch.zeros(len(step.losses))
    gradients: dict[str, Tensor] = {}
    for shard in shards:
        losses += step.add_gradients(shard, totals)
        for name, one in step.model.named_parameters():
            if one.grad is not None:
                gradients[name] = gradients.get(name, torch.zeros_like(one)) + one.grad
    assert_same((losses, gradients), expected)


@one_of_each
def test_the_validation_loss_does_not_depend_on_the_batches(case: Case, tmp_path: Any) -> None:
    batch = batch_for(case.spec)
    found = []
    for micro_batch_size, size in ((4, 4), (2, 4), (4, 3), (1, 1)):
        step = step_of(case, micro_batch_size, tmp_path)
        batches: Any = [
            Batch(batch.pixels[at : at + size], batch.sizes[at : at + size], batch.targets[at : at + size])
            for at in range(0, 4, size)
        ]
        found.append(validation_loss(step.model, batches, step, seed=7)["val_loss"])
    assert found == pytest.approx([found[0]] * 4, rel=1e-3)


@pytest.mark.parametrize("arch", ["maskrcnn_resnet18_fpn", "fasterrcnn_mobilenet_v3_large_fpn"])
def test_the_gpu_way_of_an_r_cnn_does_not_depend_on_micro_batches_either(arch: Any, tmp_path: Any) -> None:
    """The GPU's computation runs on the CPU here. It only samples differently, and each image has its own samples."""
    spec = spec_of(arch)
    case = Case(spec, to_device(random_network(spec), CPU).train())
    batch = batch_for(spec)
    found = []
    for micro_batch_size in (4, 2, 1):
        step = step_of(case, micro_batch_size, tmp_path)
        step.passes = Passes(step.model, step.losses, None, step.scaler, is_recording=False)
        found.append(learned(step, batch))
    for one in found[1:]:
        assert_same(one, found[0])


def test_a_crowded_image_has_the_same_weight_as_others(tmp_path: Any) -> None:
    """The gradient of two images is the mean of those of each alone."""
    spec = spec_of("maskrcnn_resnet18_fpn")
    case = Case(spec, to_device(random_network(spec), CPU).train())
    whole = batch_for(spec)
    alone = []
    for at in (0, 3):
        one = Batch(whole.pixels[at : at + 1], whole.sizes[at : at + 1], [whole.targets[at]])
        alone.append(learned(step_of(case, 1, tmp_path), one)[0])
    both = Batch(whole.pixels[[0, 3]], [whole.sizes[0], whole.sizes[3]], [whole.targets[0], whole.targets[3]])
    torch.testing.assert_close(learned(step_of(case, 2, tmp_path), both)[0], torch.stack(alone).mean(dim=0))
