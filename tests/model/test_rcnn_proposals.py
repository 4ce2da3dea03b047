"""The region proposals of a whole batch equal torchvision's, in the same order."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from stirred_network import chosen_of, flat_of, without_chance
from torch import Tensor

from flawmask.model import nms, rcnn_batch
from flawmask.model.layers import batched, stacked
from flawmask.model.rcnn_batch import Proposals, RcnnBatch
from flawmask.model.targets import Target

pytestmark = pytest.mark.usefixtures("small_network")


def proposed_by(model: Any, images: Sequence[Tensor], targets: Sequence[Target]) -> Proposals:
    together = RcnnBatch(model, None)
    return together.propose(together.inputs(*stacked(images), targets))


@pytest.mark.parametrize("rounds", [nms.ROUNDS, 1])
@pytest.mark.parametrize("seed", range(4))
def test_region_proposals_equal_torchvisions_in_order(seed: int, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rcnn_batch, "ROUNDS", rounds)
    model = without_chance(seed=seed)
    model.rpn._post_nms_top_n["training"] = 200
    images, targets = chosen_of([0, 1, 2, 3])
    with torch.no_grad():
        plain = batched(model, images)
        expected, _ = model.rpn(plain, model.backbone(plain.tensors), targets)
        proposed = proposed_by(model, images, targets)
        regions = RcnnBatch(model, None).settled(proposed.regions, proposed.candidates)
    assert bool(proposed.regions.settled) == (rounds > 1), "what there is to be seen"
    for boxes, is_box, wanted in zip(regions.boxes, regions.is_box, expected, strict=True):
        torch.testing.assert_close(boxes[is_box], wanted, atol=1e-4, rtol=1e-5)
        assert bool(is_box[: len(wanted)].all())
    sides = torch.cat([wanted[:, 2:] - wanted[:, :2] for wanted in expected])
    assert float(sides.max()) > 30, "all are small"
    assert float(sides.min()) < 10, "all are large"


@pytest.mark.parametrize("chosen", [[0], [1], [1, 0], [0, 2], [1, 2]])
def test_region_proposals_on_wide_images_equal_torchvisions(chosen: list[int]) -> None:
    model = without_chance(seed=0)
    model.rpn._post_nms_top_n["training"] = 200
    images, targets = flat_of(chosen)
    with torch.no_grad():
        plain = batched(model, images)
        expected, _ = model.rpn(plain, model.backbone(plain.tensors), targets)
        regions = proposed_by(model, images, targets).regions
    assert bool(regions.settled)
    for boxes, is_box, wanted in zip(regions.boxes, regions.is_box, expected, strict=True):
        assert len(wanted) > 20
        torch.testing.assert_close(boxes[is_box], wanted, atol=1e-4, rtol=1e-5)


def test_a_limited_number_of_candidates_equals_torchvisions() -> None:
    model = without_chance(seed=2)
    model.rpn._pre_nms_top_n["training"], model.rpn._post_nms_top_n["training"] = 70, 13
    images, targets = chosen_of([2, 0])
    with torch.no_grad():
        plain = batched(model, images)
        expected, _ = model.rpn(plain, model.backbone(plain.tensors), targets)
        regions = proposed_by(model, images, targets).regions
    for boxes, is_box, wanted in zip(regions.boxes, regions.is_box, expected, strict=True):
        torch.testing.assert_close(boxes[is_box], wanted, atol=1e-4, rtol=1e-5)
