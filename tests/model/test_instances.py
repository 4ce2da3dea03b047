"""The instances of a batch in tensors of one size: their capacity, and the mask targets."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_regions import instances_of
from outlined_images import boxes_for, masks_of_all_kinds
from stirred_network import chosen_of
from torchvision.models.detection.roi_heads import project_masks_on_boxes

from flawmask.model import instances as instances_module
from flawmask.model import rcnn_losses
from flawmask.model.instances import Capacity, mask_targets, rounded


@pytest.mark.parametrize("most_pixels", [instances_module.MAX_MASK_PIXELS, 20_000, 1])
@pytest.mark.parametrize("side", [28, 14])
@pytest.mark.parametrize("size", [(64, 90), (37, 33)])
def test_mask_targets_equal_those_of_each_image_alone_and_torchvisions(
    size: tuple[int, int], side: int, most_pixels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instances_module, "MAX_MASK_PIXELS", most_pixels)
    every = masks_of_all_kinds(size)
    masks = [every[:4], [], every[4:], every[1:2]]
    targets, instances = instances_of(masks, size)
    images, numbers, boxes, expected, alone = [], [], [], [], []
    for at, (of_image, target) in enumerate(zip(masks, targets, strict=True)):
        if not of_image:
            continue
        made, of_instance = boxes_for(of_image, size, np.random.default_rng(at))
        # Boxes inside the image. Some at its edge are thinner than a pixel; RoIAlign treats these as one pixel thick.
        edges = torch.tensor([size[1] - 0.5, size[0] - 0.5, size[1], size[0]])
        made = torch.minimum(made.clamp(min=0), edges)
        boxes.append(made)
        numbers.append(of_instance)
        images.append(torch.full((len(made),), at))
        expected.append(project_masks_on_boxes(torch.from_numpy(np.stack(of_image)).float(), made, of_instance, side))
        alone.append(rcnn_losses.mask_targets(target, made, of_instance, side))
    order = torch.randperm(sum(map(len, boxes)), generator=torch.Generator().manual_seed(0))
    image_of, number, every_box = (torch.cat(one)[order] for one in (images, numbers, boxes))
    found = mask_targets(instances, image_of, number, every_box, side)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.cat(expected)[order], atol=1e-4, rtol=0)
    torch.testing.assert_close(found, torch.cat(alone)[order], atol=1e-4, rtol=0)


def test_images_without_instances_have_empty_slots_only() -> None:
    _, instances = instances_of([[], []], (20, 30))
    assert instances.counts == (0, 0)
    assert instances.labels.tolist() == [[0], [0]]
    image_of = torch.tensor([0, 1, 1])
    found = mask_targets(instances, image_of, torch.zeros(3, dtype=torch.int64), torch.zeros(3, 4), 28)
    assert found.shape == (3, 28, 28)
    assert not found.any()


def test_the_capacity_holds_all_instances_and_rounding_adds_some() -> None:
    _, targets = chosen_of([0, 1, 2, 3])
    room = Capacity.of(targets)
    assert room.instances == 3
    assert room.mask_pixels == sum(len(one["mask_pixels"]) for one in targets)
    windows = torch.cat([one["windows"] for one in targets])
    assert room.window == (int(windows[:, 3].max()), int(windows[:, 2].max()))
    assert Capacity.of(targets[1:2]) == Capacity(1, 1, (1, 1))
    assert room.rounded(4, 96, 128) == Capacity(4, 4 * 96 * 128, (64, 64))
    assert Capacity(5, 10**6, (70, 20)).rounded(1, 96, 128) == Capacity(8, 2**20, (96, 128))


@given(st.integers(1, 10**6), st.sampled_from([1, 4, 16, 64]))
def test_counts_are_rounded_up_to_a_power_of_two_and_a_minimum(count: int, least: int) -> None:
    found = rounded(count, least)
    assert found >= max(count, least)
    assert found & (found - 1) == 0
    assert found == least or found < 2 * count
