"""A batch teaches the same however it is split: at once, in parts, in several processes; with every network."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from random_network import BUILDABLE, patchwork, random_network, spec_of
from stained_plates import settings
from torch import Tensor

from flawmask.coco import annotation
from flawmask.model.build import detector_of
from flawmask.model.layers import to_device
from flawmask.model.spec import ModelSpec
from flawmask.model.targets import Target, make_target
from flawmask.training.loader import Batch
from flawmask.training.step import Step, make_step

CPU = torch.device("cpu")
BOXES = [(8, 12, 20, 15), (30, 20, 24, 40), (2, 40, 18, 18), (40, 4, 12, 10), (20, 30, 30, 14)]
"""x y width height of defects on an image of 64 x 64 pixels."""

INSTANCES = (5, 0, 2, 1)
"""On each of four images."""


@dataclass(frozen=True)
class Case:
    """A random network that finds something, in training mode; nobody may change it."""

    spec: ModelSpec
    network: Any


@pytest.fixture(scope="module", params=BUILDABLE)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    """One of each architecture, one after the other, its norms as they are by default without and with weights."""
    spec = spec_of(request.param)
    yield Case(spec, to_device(random_network(spec), CPU).train())


def target_of(size: int, image_id: int, count: int) -> Target:
    records: list[dict[str, Any]] = []
    for at, box in enumerate(BOXES[:count]):
        x, y, width, height = (round(side * size / 64) for side in box)
        mask: npt.NDArray[np.bool_] = np.zeros((size, size), dtype=bool)
        mask[y : y + height, x : x + width] = True
        records.append(annotation(mask, id=at + 1, image_id=image_id, category_id=2 + at % 2))
    return make_target(records, {2: 2, 3: 3}, image_id, (size, size), (size, size), "an image")


def batch_for(spec: ModelSpec) -> Batch:
    """Four images with five, no, two and one instance."""
    size = spec.resized(64, 64)[0]
    images = [torch.from_numpy(patchwork(size, size, at).copy()).permute(2, 0, 1) for at in range(len(INSTANCES))]
    targets = [target_of(size, 10 + at, count) for at, count in enumerate(INSTANCES)]
    return Batch.of(list(zip(images, targets, strict=True)))


def step_of(case: Case, at_once: int, tmp_path: Any, **changes: Any) -> Step:
    model = copy.deepcopy(case.network)
    config = settings(tmp_path, arch=case.spec.arch, roi_samples=None)
    detector_of(case.spec).train_in(model, CPU, torch.float32)
    made = make_step(config, model, case.spec, CPU, torch.float32, True, at_once=at_once)
    return replace(made, **changes)


def learned(step: Step, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the losses of a step and the gradient that it leaves."""
    torch.manual_seed(3)
    losses = step.add_gradients(batch)
    return losses, {name: one.grad for name, one in step.model.named_parameters() if one.grad is not None}


def assert_same(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    """Sums in another order end in other digits."""
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-4)
    assert found[1].keys() == expected[1].keys()
    longest = max(float(one.abs().max()) for one in expected[1].values())
    for name, one in found[1].items():
        torch.testing.assert_close(one, expected[1][name], atol=2e-4 * longest, rtol=0, msg=name)


def test_the_gradient_of_four_images_is_the_same_however_many_pass_at_once(case: Case, tmp_path: Any) -> None:
    batch = batch_for(case.spec)
    expected = learned(step_of(case, 4, tmp_path), batch)
    assert all(float(loss) > 0 for loss in expected[0])
    for at_once in (2, 1, 3):
        assert_same(learned(step_of(case, at_once, tmp_path), batch), expected)
