"""The losses of a whole batch at once equal those of `rcnn_losses.losses`, which goes image by image."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from outlined_images import batch, gradients, network, rectangle, target_of
from questions import counted, pooled_as_on_a_gpu
from stirred_network import ENOUGH, chosen_of, flat_of, stir, without_chance
from torch import Tensor

from flawmask.model import rcnn_losses
from flawmask.model.arch import Arch
from flawmask.model.layers import stacked
from flawmask.model.rcnn_batch import RcnnBatch
from flawmask.model.targets import Target

pytestmark = pytest.mark.usefixtures("small_network")


def assert_same_losses(model: Any, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Losses must agree to five digits, gradients to 0.00003 of the largest: biases sum thousands of numbers."""
    assert found.keys() == expected.keys()
    for name, loss in found.items():
        assert loss.dtype == torch.float32
        assert float(loss.detach()) == pytest.approx(float(expected[name].detach()), rel=1e-5, abs=1e-7), name
    wanted, ours = gradients(model, expected), gradients(model, found)
    assert ours.keys() == wanted.keys()
    longest = max(float(one.abs().max()) for one in wanted.values())
    for name, one in ours.items():
        torch.testing.assert_close(one, wanted[name], atol=3e-5 * longest, rtol=1e-5, msg=name)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("chosen", [[0, 1, 2, 3], [1], [3, 1], [2]])
@pytest.mark.parametrize(
    "arch", ["maskrcnn_resnet18_fpn", "maskrcnn_mobilenet_v3_large_fpn", "fasterrcnn_mobilenet_v3_large_fpn"]
)
def test_losses_and_gradients_equal_the_plain_ones_without_random_samples(
    arch: Arch, chosen: list[int], seed: int | None
) -> None:
    model = without_chance(arch, seed)
    images, targets = chosen_of(chosen)
    expected = rcnn_losses.losses(model, images, targets, ENOUGH)
    assert_same_losses(model, RcnnBatch(model, ENOUGH).losses(images, targets), expected)


@pytest.mark.parametrize("chosen", [[0], [1], [1, 0], [0, 2], [1, 2]])
@pytest.mark.parametrize("arch", ["maskrcnn_resnet18_fpn", "maskrcnn_mobilenet_v3_large_fpn"])
def test_losses_and_gradients_on_wide_images_equal_the_plain_ones(arch: Arch, chosen: list[int]) -> None:
    model = without_chance(arch, seed=3)
    images, targets = flat_of(chosen)
    expected = rcnn_losses.losses(model, images, targets, ENOUGH)
    assert_same_losses(model, RcnnBatch(model, ENOUGH).losses(images, targets), expected)


def test_default_numbers_of_regions_and_masks_give_the_plain_losses() -> None:
    model = without_chance(seed=5)
    model.rpn._post_nms_top_n["training"] = 3  # so few that all are sampled
    images, targets = chosen_of([0, 1, 2, 3])
    expected = rcnn_losses.losses(model, images, targets, None)
    assert_same_losses(model, RcnnBatch(model, None).losses(images, targets), expected)


def test_losses_and_gradients_equal_the_plain_ones_after_a_few_steps() -> None:
    model = without_chance(seed=7)
    images, targets = chosen_of([0, 1, 2, 3])
    together = RcnnBatch(model, ENOUGH)
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.02)
    for _ in range(3):
        gradients(model, together.losses(images, targets))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    expected = rcnn_losses.losses(model, images, targets, ENOUGH)
    assert_same_losses(model, together.losses(images, targets), expected)


@pytest.mark.parametrize("places", [[0, 1, 2, 3], [1]])
def test_unused_slots_change_neither_losses_nor_gradients(places: list[int]) -> None:
    model = network()
    stir(model, 1)
    images, targets = chosen_of(places)
    together = RcnnBatch(model, None)
    pixels, sizes = stacked(images)
    exact = together.inputs(pixels, sizes, targets)
    larger = together.inputs(pixels, sizes, targets, is_rounded=True)
    more = larger.instances.labels.shape[1] - exact.instances.labels.shape[1]
    assert more > 0
    assert larger.instances.window > exact.instances.window
    assert len(larger.instances.mask_pixels) > len(exact.instances.mask_pixels)
    quotas = replace(larger.quotas, regions=larger.quotas.regions + 37, masks=larger.quotas.masks + 13)
    draws = torch.cat((exact.region_draws, torch.rand(len(places), more)), dim=1)
    larger = replace(larger, quotas=quotas, anchor_draws=exact.anchor_draws, region_draws=draws)
    results = []
    for given_here in (exact, larger):
        proposed = together.propose(given_here)
        regions = together.settled(proposed.regions, proposed.candidates)
        results.append(together.losses_of(given_here, proposed, regions))
    assert_same_losses(model, results[1], results[0])


def test_every_parameter_has_a_gradient_on_images_without_an_instance() -> None:
    model = network()
    images, targets = chosen_of([1])
    found = gradients(model, RcnnBatch(model, None).losses(images, targets))
    assert found.keys() == {name for name, one in model.named_parameters() if one.requires_grad}


def test_measuring_feature_sizes_changes_no_norm_and_no_mode() -> None:
    model = network()
    model.backbone.body.conv1.eval()
    modes = [one.training for one in model.modules()]
    before = {name: one.clone() for name, one in model.state_dict().items()}
    together = RcnnBatch(model, None)
    (anchors, counts), (again, _) = together.anchors((64, 96)), together.anchors((64, 96))
    assert again is anchors
    assert len(anchors) == sum(counts)
    assert [one.training for one in model.modules()] == modes
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def five_on_each_of_four() -> tuple[list[Tensor], list[Target]]:
    images, _, _ = batch()
    sizes = [(int(image.shape[1]), int(image.shape[2])) for image in images]
    spots = [(2, 3, 12, 20), (20, 8, 9, 9), (30, 30, 18, 25), (0, 40, 14, 10), (50, 5, 12, 15)]
    return images, [target_of([rectangle(size, *spot) for spot in spots], size) for size in sizes]


def test_a_pass_reads_one_value_from_the_device_and_the_plain_way_dozens() -> None:
    model = network()
    images, targets = five_on_each_of_four()
    together = RcnnBatch(model, None)
    pixels, sizes = stacked(images)
    given_here = together.inputs(pixels, sizes, targets)  # looks at what is on the CPU still
    with pooled_as_on_a_gpu(), counted() as measured:
        proposed = together.propose(given_here)
        regions = together.settled(proposed.regions, proposed.candidates)
        gradients(model, together.losses_of(given_here, proposed, regions))
    assert dict(measured) == {"_local_scalar_dense": 1}
    with counted() as measured:
        gradients(model, rcnn_losses.losses(model, images, targets, None))
    assert measured.total() > 50
