"""The losses are torchvision's, on the same regions; fewer regions where an image has few instances."""

from typing import Any

import numpy as np
import pytest
import torch
from outlined_images import batch, boxes_for, gradients, masks_of_all_kinds, network, rectangle, target_of
from torch import Tensor
from torchvision.models.detection.roi_heads import project_masks_on_boxes

from flawmask.model.arch import Arch
from flawmask.model.rcnn_losses import FEWEST_SAMPLES, MOST_SAMPLES, losses, mask_targets, samples_for


@pytest.mark.parametrize("roi_samples", [512, 16])
@pytest.mark.parametrize("chosen", [[0, 1, 2, 3], [1], [3, 1]])
@pytest.mark.parametrize("arch", ["maskrcnn_resnet18_fpn", "fasterrcnn_mobilenet_v3_large_fpn"])
def test_the_losses_and_their_gradients_are_those_of_torchvision(
    arch: Arch, chosen: list[int], roi_samples: int
) -> None:
    model = network(roi_samples, arch)
    images, masks, targets = batch()
    images, masks, targets = ([every[at] for at in chosen] for every in (images, masks, targets))  # type: ignore[assignment]
    whole = [
        {
            "boxes": target["boxes"],
            "labels": target["labels"],
            "masks": torch.from_numpy(np.array(of_image, dtype=np.uint8).reshape(-1, *image.shape[1:])),
        }
        for image, of_image, target in zip(images, masks, targets, strict=True)
    ]
    torch.manual_seed(7)
    expected = model([image / 255 for image in images], whole)
    wanted = gradients(model, expected)
    after = torch.rand(1)
    torch.manual_seed(7)
    found = losses(model, images, targets, roi_samples)
    assert found.keys() == expected.keys()
    for name, loss in found.items():
        assert float(loss.detach()) == pytest.approx(float(expected[name].detach()), rel=1e-4, abs=1e-6), name
    ours = gradients(model, found)
    assert ours.keys() == wanted.keys()
    longest = max(float(one.abs().max()) for one in wanted.values())
    for name, one in ours.items():
        torch.testing.assert_close(one, wanted[name], atol=1e-4 * longest, rtol=1e-3, msg=name)
    assert torch.equal(torch.rand(1), after), "more or less was drawn at random"


def test_every_parameter_has_a_gradient_on_an_image_without_an_instance() -> None:
    model = network()
    images, _, targets = batch()
    found = gradients(model, losses(model, images[1:2], targets[1:2], None))
    assert found.keys() == {name for name, one in model.named_parameters() if one.requires_grad}


def test_an_image_with_more_instances_has_more_regions_within_bounds() -> None:
    counts = [samples_for(instances) for instances in range(100)]
    assert counts == sorted(counts)
    assert (counts[0], counts[1], counts[-1]) == (FEWEST_SAMPLES, 32, MOST_SAMPLES)
    assert counts[5] > counts[2]


def seen_by(heads: Any, name: str, seen: list[list[int]]) -> None:
    """Let a head's pooling write down how many boxes of each image it is given."""
    pool = getattr(heads, name)
    delattr(heads, name)  # a module in a module's place: it takes no function

    def counting(features: Any, boxes: list[Tensor], sizes: Any) -> Any:
        seen.append([len(of_image) for of_image in boxes])
        return pool(features, boxes, sizes)

    setattr(heads, name, counting)


@pytest.mark.parametrize(("roi_samples", "expected"), [(None, [64, 32, 96, 32]), (20, [20, 20, 20, 20])])
def test_as_many_regions_are_drawn_as_the_instances_of_each_image_ask_for(
    roi_samples: int | None, expected: list[int]
) -> None:
    model = network()
    drawn: list[list[int]] = []
    seen_by(model.roi_heads, "box_roi_pool", drawn)
    model.rpn._post_nms_top_n["training"] = 1000
    model.rpn.nms_thresh = 0.99  # leaves enough of them
    losses(model, *batch()[::2], roi_samples)
    assert drawn == [expected]


@pytest.mark.parametrize(("roi_samples", "expected"), [(None, [8, 0, 12, 4]), (128, [32, 0, 32, 32])])
def test_as_many_masks_are_learned_as_there_is_use_for(roi_samples: int | None, expected: list[int]) -> None:
    model = network()
    drawn: list[list[int]] = []
    seen_by(model.roi_heads, "mask_roi_pool", drawn)
    images, _, targets = batch()
    with_copies = model.roi_heads.add_gt_proposals
    # Each true box forty times among the proposals: more than enough regions lie on an instance.
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


def test_an_image_without_boxes_on_an_instance_has_no_mask_targets() -> None:
    size = (20, 30)
    none, nowhere = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    assert mask_targets(target_of([], size), none, nowhere, 28).shape == (0, 28, 28)
    assert mask_targets(target_of([rectangle(size, 1, 1, 5, 5)], size), none, nowhere, 28).shape == (0, 28, 28)
