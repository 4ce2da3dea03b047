"""The branch for pixels: its targets pixel by pixel, its loss, its map, and the same losses on every path."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from outlined_images import gradients, rectangle
from random_network import SPEC, patchwork
from torch import Tensor

from flawmask.coco import annotation
from flawmask.errors import FlawmaskError
from flawmask.masks import Mask
from flawmask.model import rcnn, rcnn_losses
from flawmask.model.build import build, for_inference
from flawmask.model.rcnn_batch import RcnnBatch
from flawmask.model.semantic import SemanticHead, maps, semantic_loss, semantic_targets
from flawmask.model.targets import Target, make_target

LITE = replace(
    SPEC,
    arch="maskrcnn_efficientnet_lite0_fpn",
    classes=("good", "dent", "crack"),
    norm="frozen",
    max_detections=5,
    semantic_head=True,
)
SIZES = [(64, 96), (80, 64), (50, 70)]


def target_of(size: tuple[int, int], instances: Sequence[tuple[int, Mask]]) -> Target:
    """Return the target of an image at its original size, with the label of each instance."""
    records: list[dict[str, Any]] = [annotation(mask, id=1, image_id=1, category_id=label) for label, mask in instances]
    return make_target(records, {1: 1, 2: 2, 3: 3}, 1, size, size, "an image")


def examples() -> tuple[list[Tensor], list[Target], list[list[tuple[int, Mask]]]]:
    """Images, their targets, and their instances: two that overlap and a third; a good image; and one at the edge."""
    instances = [
        [
            (2, rectangle(SIZES[0], 5, 7, 12, 9)),
            (2, rectangle(SIZES[0], 9, 11, 10, 9)),
            (3, rectangle(SIZES[0], 10, 10, 21, 3)),
        ],
        [(1, np.ones(SIZES[1], dtype=bool))],
        [(3, rectangle(SIZES[2], 49, 0, 1, 70))],
    ]
    targets = [target_of(size, of_image) for size, of_image in zip(SIZES, instances, strict=True)]
    images = [torch.from_numpy(patchwork(*size, seed).copy()).permute(2, 0, 1) for seed, size in enumerate(SIZES)]
    return images, targets, instances


def test_targets_are_the_share_of_defective_pixels_of_each_cell() -> None:
    _, targets, instances = examples()
    found = semantic_targets(SemanticHead(8, [2, 3]), targets, (96, 96))
    assert found.shape == (3, 2, 24, 24)
    for image, of_image in enumerate(instances):
        for place, wanted in enumerate((2, 3)):
            whole = np.zeros((96, 96), dtype=bool)
            for label, mask in of_image:
                if label == wanted:
                    whole[: mask.shape[0], : mask.shape[1]] |= mask
            cells = whole.reshape(24, 4, 24, 4).mean(axis=(1, 3))
            assert (found[image, place].numpy() == cells).all()


def test_the_loss_is_low_where_the_map_is_right() -> None:
    wanted = torch.zeros(2, 1, 6, 6)
    wanted[0, 0, 2:4, 1:5] = 1
    right = torch.where(wanted > 0, 12.0, -12.0)
    assert float(semantic_loss(right, wanted)) < 1e-3
    missed = torch.full((2, 1, 6, 6), -12.0)
    assert float(semantic_loss(missed, wanted)) > 1
    everything = torch.full((2, 1, 6, 6), 12.0)
    assert float(semantic_loss(everything, wanted)) > float(semantic_loss(missed, wanted))
    assert semantic_loss(right, wanted).dtype == torch.float32


def test_each_image_weighs_the_same() -> None:
    random = torch.Generator().manual_seed(0)
    logits, wanted = torch.randn(3, 2, 5, 7, generator=random), torch.rand(3, 2, 5, 7, generator=random)
    each = [float(semantic_loss(logits[at : at + 1], wanted[at : at + 1])) for at in range(3)]
    assert float(semantic_loss(logits, wanted)) == pytest.approx(np.mean(each), rel=1e-6)


def test_maps_are_the_cells_of_the_image_without_padding() -> None:
    logits = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    whole, part = maps(logits, [(32, 32), (12, 28)])
    assert torch.equal(whole, logits[0].sigmoid())
    assert torch.equal(part, logits[1, :, :3, :7].sigmoid())


@pytest.mark.parametrize(("height", "width"), [(10, 30), (32, 31), (1, 1), (5, 32)])
def test_maps_cover_images_of_any_size_exactly(height: int, width: int) -> None:
    """A linear ramp over the padded image must be the same ramp over the image, at the centres of its cells."""
    centres = (torch.arange(8) + 0.5) * 4
    logits = (0.1 * centres[None, :] + 0.03 * centres[:, None]).expand(1, 1, 8, 8)
    (found,) = maps(logits, [(height, width)])
    rows, columns = -(-height // 4), -(-width // 4)
    assert found.shape == (1, rows, columns)
    y = ((torch.arange(rows) + 0.5) * height / rows).clamp(2, 30)
    x = ((torch.arange(columns) + 0.5) * width / columns).clamp(2, 30)
    torch.testing.assert_close(found[0], (0.1 * x[None, :] + 0.03 * y[:, None]).sigmoid(), atol=1e-5, rtol=0)


def network() -> Any:
    torch.manual_seed(1)
    return build(LITE).train()


def test_losses_go_image_by_image_or_by_batch_alike() -> None:
    images, targets, _ = examples()
    model = network()
    plain = rcnn_losses.losses(model, images, targets, None)
    together = RcnnBatch(model, None).losses(images, targets)
    assert set(plain) == set(together) == set(LITE.loss_names)
    assert rcnn_losses.counts(model, targets)["loss_semantic"] == 3
    wanted = gradients(model, {"loss_semantic": plain["loss_semantic"]})
    found = gradients(model, {"loss_semantic": together["loss_semantic"]})
    torch.testing.assert_close(together["loss_semantic"], plain["loss_semantic"], rtol=1e-5, atol=0)
    assert wanted.keys() == found.keys()
    assert any(name.startswith("backbone.body") for name in wanted), "it teaches the body"
    longest = max(float(one.abs().max()) for one in wanted.values())
    for name, one in found.items():
        torch.testing.assert_close(one, wanted[name], atol=3e-5 * longest, rtol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predicted_maps_have_a_value_for_each_cell_and_class_and_few_are_equal(dtype: torch.dtype) -> None:
    images, _, _ = examples()
    cpu = torch.device("cpu")
    model = network().eval()
    model.semantic_head.last.weight.data *= 20  # so that its values spread
    fast = for_inference(model, LITE, cpu, dtype)
    with torch.inference_mode():
        (whole,) = rcnn.infer(fast, [images[0]], [(640, 960)])
        plain = model.semantic_head(model.backbone(model.transform([images[0].float() / 255])[0].tensors)["0"])
    found = whole["maps"]
    assert found.shape == (2, 16, 24)
    assert found.dtype == torch.float32
    assert len(set(found.flatten().tolist())) > 600, "the last layer is float32"
    expected = maps(plain, [(64, 96)])[0]
    torch.testing.assert_close(found, expected, atol=1e-5 if dtype == torch.float32 else 0.05, rtol=0)


def test_only_networks_that_can_have_the_branch_have_it() -> None:
    assert hasattr(build(LITE), "semantic_head")
    assert not hasattr(build(replace(LITE, semantic_head=False)), "semantic_head")
    assert "loss_semantic" not in replace(LITE, semantic_head=False).loss_names
    with pytest.raises(FlawmaskError, match="does not describe a network"):
        replace(LITE, arch="fasterrcnn_efficientnet_lite0_fpn")
