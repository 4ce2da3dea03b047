"""The losses equal torchvision's on the same regions, and the number of regions follows the instances."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from outlined_images import batch, boxes_for, gradients, masks_of_all_kinds, network, rectangle, target_of
from torch import Tensor
from torchvision.models.detection.roi_heads import project_masks_on_boxes

from flawmask.masks import Mask
from flawmask.model.arch import Arch
from flawmask.model.draws import generator_for
from flawmask.model.rcnn_losses import MAX_SAMPLES, MIN_SAMPLES, _draw, losses, mask_targets, samples_for
from flawmask.model.targets import Target


class OfOneImage:
    """Replaces torchvision's sampler: it samples as Flawmask does for one image, and nothing of the other images."""

    def __init__(self, sampler: Any, at: int, draw: torch.Generator) -> None:
        self.count, self.share, self.at, self.draw = sampler.batch_size_per_image, sampler.positive_fraction, at, draw

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        on, beside = ([torch.zeros(len(one), dtype=torch.bool) for one in labels] for _ in range(2))
        drawn = _draw(labels[self.at], self.count, self.share, self.draw)
        on[self.at][drawn[0]] = beside[self.at][drawn[1]] = True
        return on, beside


def torchvisions_losses(
    model: Any, images: list[Tensor], masks: list[list[Mask]], targets: list[Target]
) -> dict[str, Tensor]:
    """Return what torchvision gives for the regions of each image, averaged over the images; of the masks, over those
    that have any."""
    inputs = [image / 255 for image in images]
    of_images: list[dict[str, Tensor]] = []
    samplers = [(owner, owner.fg_bg_sampler) for owner in (model.rpn, model.roi_heads)]
    for at, target in enumerate(targets):
        draw = generator_for(target, torch.device("cpu"))
        for owner, sampler in samplers:
            owner.fg_bg_sampler = OfOneImage(sampler, at, draw)
        of_images.append(model(inputs, [whole(*one) for one in zip(images, masks, targets, strict=True)]))
    for owner, sampler in samplers:
        owner.fg_bg_sampler = sampler
    counts = {name: len(images) for name in of_images[0]} | {"loss_mask": max(1, sum(bool(one) for one in masks))}
    return {name: torch.stack([one[name] for one in of_images]).sum() / counts[name] for name in of_images[0]}


def whole(image: Tensor, masks: list[Mask], target: Target) -> dict[str, Tensor]:
    """Return a target as torchvision wants it."""
    outlines = torch.from_numpy(np.array(masks, dtype=np.uint8).reshape(-1, *image.shape[1:]))
    return {"boxes": target["boxes"], "labels": target["labels"], "masks": outlines}


@pytest.mark.parametrize("roi_samples", [512, 16])
@pytest.mark.parametrize("chosen", [[0, 1, 2, 3], [1], [3, 1]])
@pytest.mark.parametrize("arch", ["maskrcnn_resnet18_fpn", "fasterrcnn_mobilenet_v3_large_fpn"])
def test_losses_and_gradients_are_the_mean_of_torchvisions_for_each_image(
    arch: Arch, chosen: list[int], roi_samples: int
) -> None:
    model = network(roi_samples, arch)
    images, masks, targets = batch()
    images, masks, targets = ([every[at] for at in chosen] for every in (images, masks, targets))  # type: ignore[assignment]
    torch.manual_seed(7)
    expected = torchvisions_losses(model, images, masks, targets)
    wanted = gradients(model, expected)
    before = torch.get_rng_state()
    found = losses(model, images, targets, roi_samples)
    assert found.keys() == expected.keys()
    for name, loss in found.items():
        assert float(loss.detach()) == pytest.approx(float(expected[name].detach()), rel=1e-4, abs=1e-6), name
    ours = gradients(model, found)
    assert ours.keys() == wanted.keys()
    longest = max(float(one.abs().max()) for one in wanted.values())
    for name, one in ours.items():
        torch.testing.assert_close(one, wanted[name], atol=1e-4 * longest, rtol=1e-3, msg=name)
    assert torch.equal(torch.get_rng_state(), before), "PyTorch's own generator was drawn from"


def test_samples_are_of_the_wanted_kind_distinct_and_uniform() -> None:
    labels = torch.tensor([0, 1, -1, 2, 0, 0, 1, -1, 0, 3])
    draw = torch.Generator().manual_seed(0)
    on, beside = [], []
    for _ in range(3000):
        some, others = _draw(labels, 5, 0.4, draw)
        assert (len(set(some.tolist())), len(set(others.tolist()))) == (len(some), len(others)) == (2, 3)
        on += some.tolist()
        beside += others.tolist()
    assert sorted(set(on)) == [1, 3, 6, 9]
    assert sorted(set(beside)) == [0, 4, 5, 8]
    for found in (on, beside):  # within four standard deviations
        counts = np.array(list(Counter(found).values()))
        share = len(found) / 3000 / 4
        assert np.abs(counts - 3000 * share).max() < 4 * np.sqrt(3000 * share * (1 - share))
    # Missing positives are replaced by negatives. If there are too few boxes, all are sampled.
    few = torch.tensor([0, 0, 0, 1, 0])
    assert _draw(few, 4, 0.5, draw)[0].tolist() == [3]
    assert [len(one) for one in _draw(few, 4, 0.5, draw)] == [1, 3]
    assert [sorted(one.tolist()) for one in _draw(few, 99, 0.5, draw)] == [[3], [0, 1, 2, 4]]


def test_samples_of_an_image_depend_only_on_the_seed_and_its_id() -> None:
    def drawn(seed: int, image_id: int) -> list[float]:
        torch.manual_seed(seed)
        torch.rand(3)
        return torch.rand(
            2, generator=generator_for({"image_id": torch.tensor([image_id])}, torch.device("cpu"))
        ).tolist()

    assert drawn(1, 5) == drawn(1, 5)
    assert len({tuple(drawn(seed, image_id)) for seed in range(5) for image_id in range(5)}) == 25


def test_every_parameter_has_a_gradient_on_an_image_without_an_instance() -> None:
    model = network()
    images, _, targets = batch()
    found = gradients(model, losses(model, images[1:2], targets[1:2], None))
    assert found.keys() == {name for name, one in model.named_parameters() if one.requires_grad}


def test_more_instances_mean_more_sampled_regions_within_bounds() -> None:
    counts = [samples_for(instances) for instances in range(100)]
    assert counts == sorted(counts)
    assert (counts[0], counts[1], counts[-1]) == (MIN_SAMPLES, 32, MAX_SAMPLES)
    assert counts[5] > counts[2]


def seen_by(heads: Any, name: str, seen: list[list[int]]) -> None:
    """Record how many boxes of each image a head's pooling gets."""
    pool = getattr(heads, name)
    delattr(heads, name)  # torch does not let a function replace a module

    def counting(features: Any, boxes: list[Tensor], sizes: Any) -> Any:
        seen.append([len(of_image) for of_image in boxes])
        return pool(features, boxes, sizes)

    setattr(heads, name, counting)


@pytest.mark.parametrize(("roi_samples", "expected"), [(None, [64, 32, 96, 32]), (20, [20, 20, 20, 20])])
def test_the_number_of_sampled_regions_follows_the_instances_of_each_image(
    roi_samples: int | None, expected: list[int]
) -> None:
    model = network()
    drawn: list[list[int]] = []
    seen_by(model.roi_heads, "box_roi_pool", drawn)
    model.rpn._post_nms_top_n["training"] = 1000
    model.rpn.nms_thresh = 0.99  # so that enough proposals remain
    losses(model, *batch()[::2], roi_samples)
    assert drawn == [expected]


@pytest.mark.parametrize(("roi_samples", "expected"), [(None, [8, 0, 12, 4]), (128, [32, 0, 32, 32])])
def test_the_number_of_learned_masks_is_limited(roi_samples: int | None, expected: list[int]) -> None:
    model = network()
    drawn: list[list[int]] = []
    seen_by(model.roi_heads, "mask_roi_pool", drawn)
    images, _, targets = batch()
    with_copies = model.roi_heads.add_gt_proposals
    # Each true box is forty times among the proposals, so there are more than enough positive regions.
    model.roi_heads.add_gt_proposals = lambda proposals, truth: with_copies(
        proposals, [of_image.repeat(40, 1) for of_image in truth]
    )
    losses(model, images, targets, roi_samples)
    assert drawn == [expected]


@pytest.mark.parametrize("side", [28, 14])
@pytest.mark.parametrize("size", [(64, 90), (37, 33)])
def test_mask_targets_are_those_of_torchvision_on_masks_as_large_as_the_image(size: tuple[int, int], side: int) -> None:
    masks = masks_of_all_kinds(size)
    for seed in range(5):
        boxes, instances = boxes_for(masks, size, np.random.default_rng(seed))
        whole = torch.from_numpy(np.stack(masks)).float()
        expected = project_masks_on_boxes(whole, boxes, instances, side)
        found = mask_targets(target_of(masks, size), boxes, instances, side)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_an_image_without_positive_boxes_has_no_mask_targets() -> None:
    size = (20, 30)
    none, nowhere = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    assert mask_targets(target_of([], size), none, nowhere, 28).shape == (0, 28, 28)
    assert mask_targets(target_of([rectangle(size, 1, 1, 5, 5)], size), none, nowhere, 28).shape == (0, 28, 28)
