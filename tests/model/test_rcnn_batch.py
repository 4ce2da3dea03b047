"""A whole batch's losses without a loop over images are those of `rcnn_losses.losses`, and what is drawn is allowed."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from outlined_images import (
    batch,
    boxes_for,
    gradients,
    masks_of_all_kinds,
    network,
    rectangle,
    target_of,
)
from questions import counted, pooled_as_on_a_gpu
from random_network import patchwork
from torch import Tensor
from torchvision.models.detection.roi_heads import project_masks_on_boxes

from flawmask.model import instances as instances_module
from flawmask.model import matching, nms, rcnn_batch, rcnn_losses
from flawmask.model.arch import Arch
from flawmask.model.instances import Instances, Room, mask_targets, rounded
from flawmask.model.layers import batched, stacked
from flawmask.model.matching import AnchorSamples
from flawmask.model.rcnn_batch import (
    Drawn,
    DrawnMasks,
    Proposed,
    RcnnBatch,
    Regions,
)
from flawmask.model.targets import Target

pytestmark = pytest.mark.usefixtures("small_network")

CPU = torch.device("cpu")
PROPOSALS, ENOUGH = 20, 96
"""Of an image. A quarter of so many regions is more than the proposals and true boxes that can lie on an instance."""


def without_chance(arch: Arch = "maskrcnn_resnet18_fpn", seed: int | None = None) -> Any:
    """A network that learns on all anchors, and with `ENOUGH` on all regions; its weights changed by a seed."""
    model = network(1024, arch)
    model.rpn.fg_bg_sampler.batch_size_per_image = 10**6
    model.rpn.fg_bg_sampler.positive_fraction = 0.5
    model.rpn._post_nms_top_n["training"] = PROPOSALS
    if seed is not None:
        stir(model, seed)
    return model


@torch.no_grad()
def stir(model: Any, seed: int) -> None:
    """Let the network propose other regions, large and small ones, and take them for something."""
    torch.manual_seed(seed)
    for layer, spread in (
        (model.rpn.head.cls_logits, 0.3),
        (model.rpn.head.bbox_pred, 0.15),
        (model.roi_heads.box_predictor.cls_score, 0.05),
        (model.roi_heads.box_predictor.bbox_pred, 0.05),
    ):
        layer.weight += torch.randn_like(layer.weight) * spread


def chosen_of(places: Sequence[int]) -> tuple[list[Tensor], list[Target]]:
    images, _, targets = batch()
    return [images[at] for at in places], [targets[at] for at in places]


FLAT = [(40, 200), (20, 200), (64, 96)]
"""Heights and widths. Padding makes the first two, wide and flat, 1.6 times as high."""


def flat_of(places: Sequence[int]) -> tuple[list[Tensor], list[Target]]:
    sizes = [FLAT[at] for at in places]
    images = [
        torch.from_numpy(patchwork(*size, seed=at).copy()).permute(2, 0, 1)
        for at, size in zip(places, sizes, strict=True)
    ]
    spots = [(2, 3, 12, 20), (5, 60, 9, 35)]  # y x height width
    return images, [target_of([rectangle(size, *spot) for spot in spots], size) for size in sizes]


def assert_same_losses(model: Any, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To five digits; and all gradients but for 0.00003 of the largest: biases add up thousands of numbers."""
    assert found.keys() == expected.keys()
    for name, loss in found.items():
        assert loss.dtype == torch.float32
        assert float(loss.detach()) == pytest.approx(float(expected[name].detach()), rel=1e-5, abs=1e-7), name
    wanted, ours = gradients(model, expected), gradients(model, found)
    assert ours.keys() == wanted.keys()
    longest = max(float(one.abs().max()) for one in wanted.values())
    for name, one in ours.items():
        torch.testing.assert_close(one, wanted[name], atol=3e-5 * longest, rtol=1e-5, msg=name)


def proposed_by(model: Any, images: Sequence[Tensor], targets: Sequence[Target]) -> Proposed:
    together = RcnnBatch(model, None)
    return together.propose(together.given(*stacked(images), targets))


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("chosen", [[0, 1, 2, 3], [1], [3, 1], [2]])
@pytest.mark.parametrize(
    "arch", ["maskrcnn_resnet18_fpn", "maskrcnn_mobilenet_v3_large_fpn", "fasterrcnn_mobilenet_v3_large_fpn"]
)
def test_losses_and_gradients_are_those_of_the_plain_way_where_nothing_is_left_to_chance(
    arch: Arch, chosen: list[int], seed: int | None
) -> None:
    model = without_chance(arch, seed)
    images, targets = chosen_of(chosen)
    expected = rcnn_losses.losses(model, images, targets, ENOUGH)
    assert_same_losses(model, RcnnBatch(model, ENOUGH).losses(images, targets), expected)


@pytest.mark.parametrize("chosen", [[0], [1], [1, 0], [0, 2], [1, 2]])
@pytest.mark.parametrize("arch", ["maskrcnn_resnet18_fpn", "maskrcnn_mobilenet_v3_large_fpn"])
def test_losses_and_gradients_on_wide_flat_images_are_those_of_the_plain_way(arch: Arch, chosen: list[int]) -> None:
    model = without_chance(arch, seed=3)
    images, targets = flat_of(chosen)
    expected = rcnn_losses.losses(model, images, targets, ENOUGH)
    assert_same_losses(model, RcnnBatch(model, ENOUGH).losses(images, targets), expected)


def test_as_many_regions_and_masks_as_follow_the_instances_give_the_losses_of_the_plain_way() -> None:
    model = without_chance(seed=5)
    model.rpn._post_nms_top_n["training"] = 3  # so few that none is left out
    images, targets = chosen_of([0, 1, 2, 3])
    expected = rcnn_losses.losses(model, images, targets, None)
    assert_same_losses(model, RcnnBatch(model, None).losses(images, targets), expected)


def test_after_a_few_steps_losses_and_gradients_are_still_those_of_the_plain_way() -> None:
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


@pytest.mark.parametrize("rounds", [nms.ROUNDS, 1])
@pytest.mark.parametrize("seed", range(4))
def test_region_proposals_are_those_of_torchvision_in_their_order(
    seed: int, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
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
def test_region_proposals_on_wide_flat_images_are_those_of_torchvision(chosen: list[int]) -> None:
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


def test_fewer_candidates_than_there_are_anchors_are_those_of_torchvision() -> None:
    model = without_chance(seed=2)
    model.rpn._pre_nms_top_n["training"], model.rpn._post_nms_top_n["training"] = 70, 13
    images, targets = chosen_of([2, 0])
    with torch.no_grad():
        plain = batched(model, images)
        expected, _ = model.rpn(plain, model.backbone(plain.tensors), targets)
        regions = proposed_by(model, images, targets).regions
    for boxes, is_box, wanted in zip(regions.boxes, regions.is_box, expected, strict=True):
        torch.testing.assert_close(boxes[is_box], wanted, atol=1e-4, rtol=1e-5)


def instances_of(masks: Sequence[Sequence[Any]], size: tuple[int, int]) -> tuple[list[Target], Instances]:
    targets = [target_of(list(of_image), size) for of_image in masks]
    return targets, Instances.of(targets, CPU)


@pytest.mark.parametrize("most_pixels", [instances_module.MOST_MASK_PIXELS, 20_000, 1])
@pytest.mark.parametrize("side", [28, 14])
@pytest.mark.parametrize("size", [(64, 90), (37, 33)])
def test_mask_targets_are_those_of_each_image_alone_and_of_torchvision(
    size: tuple[int, int], side: int, most_pixels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instances_module, "MOST_MASK_PIXELS", most_pixels)
    every = masks_of_all_kinds(size)
    masks = [every[:4], [], every[4:], every[1:2]]
    targets, instances = instances_of(masks, size)
    images, numbers, boxes, expected, alone = [], [], [], [], []
    for at, (of_image, target) in enumerate(zip(masks, targets, strict=True)):
        if not of_image:
            continue
        made, of_instance = boxes_for(of_image, size, np.random.default_rng(at))
        # On the image; at its end thinner than a pixel, which RoIAlign takes for as thick as one.
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


def test_images_without_an_instance_have_nothing_to_look_at_and_that_is_enough() -> None:
    _, instances = instances_of([[], []], (20, 30))
    assert instances.counts == (0, 0)
    assert instances.labels.tolist() == [[0], [0]]
    image_of = torch.tensor([0, 1, 1])
    found = mask_targets(instances, image_of, torch.zeros(3, dtype=torch.int64), torch.zeros(3, 4), 28)
    assert found.shape == (3, 28, 28)
    assert not found.any()


SIZE = (64, 96)
BESIDE = torch.tensor([[60.0, 40, 70, 50], [70, 2, 95, 30], [2, 50, 30, 63]])


def made_regions(counts: Sequence[int], around: int, beside: int, seed: int = 0) -> tuple[Regions, Instances]:
    """Images with so many instances each, `around` boxes on each of them and `beside` ones on none; some are invalid.

    No two are the same, and those that are no boxes have a corner at 0.
    """
    spots = [(4, 4, 16, 20), (6, 40, 18, 14), (36, 36, 20, 16)]  # y x height width
    _, instances = instances_of([[rectangle(SIZE, *spot) for spot in spots[:count]] for count in counts], SIZE)
    draw = torch.Generator().manual_seed(seed)

    def shaken(boxes: Tensor, times: int) -> Tensor:
        copies = boxes.repeat(times, 1)
        return copies + torch.rand(copies.shape, generator=draw) - 0.5

    most = max(counts) * around + 3 * beside
    boxes, valid = torch.zeros(len(counts), most, 4), torch.zeros(len(counts), most, dtype=torch.bool)
    for at, count in enumerate(counts):
        one = torch.cat((shaken(instances.boxes[at, :count], around), shaken(BESIDE, beside)))
        order = torch.randperm(len(one), generator=draw)
        boxes[at, : len(one)], valid[at, : len(one)] = one[order], True
        gone = torch.randperm(len(one), generator=draw)[: len(one) // 10]
        boxes[at, gone, 0], valid[at, gone] = 0.0, False
    return Regions(boxes, valid, torch.ones((), dtype=torch.bool)), instances


def on_instance_of(model: Any, regions: Regions, instances: Instances, at: int) -> tuple[Tensor, Tensor]:
    """All valid regions of an image, the true boxes among them, and each one's label, as torchvision has them."""
    truth = instances.boxes[at, : instances.counts[at]]
    boxes = torch.cat((regions.boxes[at][regions.is_box[at]], truth))
    of_image = instances.labels[at, : instances.counts[at]]
    (_,), (labels,) = model.roi_heads.assign_targets_to_proposals([boxes], [truth], [of_image])
    return boxes, labels


@pytest.mark.parametrize("roi_samples", [None, 20, 41])
@pytest.mark.parametrize(("around", "beside"), [(40, 60), (1, 60), (40, 2), (3, 0)])
def test_of_each_image_as_many_regions_as_asked_for_are_drawn_a_quarter_on_an_instance_and_none_twice(
    around: int, beside: int, roi_samples: int | None
) -> None:
    model = network()
    counts = (2, 0, 3, 1)
    regions, instances = made_regions(counts, around, beside)
    together = RcnnBatch(model, roi_samples)
    known = [on_instance_of(model, regions, instances, at) for at in range(4)]
    for seed in range(10):
        torch.manual_seed(seed)
        drawn = together.draw(regions, instances)
        for at, (boxes, labels) in enumerate(known):
            quota = roi_samples or rcnn_losses.samples_for(counts[at])
            here = (drawn.image_of == at) & drawn.used
            rois, found = drawn.rois[here], drawn.labels[here]
            on_instance = min(int((labels > 0).sum()), quota // 4)
            assert int((found > 0).sum()) == on_instance
            assert len(rois) == on_instance + min(int((labels == 0).sum()), quota - on_instance)
            assert len({tuple(roi) for roi in rois.tolist()}) == len(rois), "a region was drawn twice"
            places = (rois[:, None] == boxes).all(dim=-1)
            assert bool(places.any(dim=1).all()), "what was drawn is no valid region of this image"
            assert bool((labels[torch.where(places)[1]] == found).all())
        assert not drawn.rois[~drawn.used].any()
        assert not drawn.labels[~drawn.used].any()


@pytest.mark.parametrize("roi_samples", [None, 20])
def test_masks_are_learned_of_regions_on_an_instance_four_for_each_where_their_number_follows(
    roi_samples: int | None,
) -> None:
    model = network()
    counts = (2, 0, 3, 1)
    regions, instances = made_regions(counts, 40, 40)
    for seed in range(10):
        torch.manual_seed(seed)
        drawn = RcnnBatch(model, roi_samples).draw(regions, instances)
        masks = drawn.masks
        assert masks is not None
        for at, count in enumerate(counts):
            here = (masks.image_of == at) & masks.used
            assert int(here.sum()) == (4 * count if roi_samples is None else 5 * (count > 0))
            rois = masks.rois[here]
            assert len({tuple(roi) for roi in rois.tolist()}) == len(rois)
            among = drawn.rois[(drawn.image_of == at) & (drawn.labels > 0)]
            assert bool((rois[:, None] == among).all(dim=-1).any(dim=1).all())
        assert bool((masks.labels[masks.used] == 2).all())
        assert not masks.labels[~masks.used].any()


def test_each_region_is_drawn_about_as_often_as_every_other_of_its_kind() -> None:
    model = network()
    regions, instances = made_regions((2, 1), 20, 20)
    together = RcnnBatch(model, 40)
    known = [on_instance_of(model, regions, instances, at) for at in range(2)]
    times = [torch.zeros(len(boxes)) for boxes, _ in known]
    of_masks = [torch.zeros(len(boxes)) for boxes, _ in known]
    draws = 400
    torch.manual_seed(0)
    for _ in range(draws):
        drawn = together.draw(regions, instances)
        assert drawn.masks is not None
        for at, (boxes, _) in enumerate(known):
            chosen: tuple[tuple[list[Tensor], Drawn | DrawnMasks], ...] = ((times, drawn), (of_masks, drawn.masks))
            for counter, one in chosen:
                here = (one.image_of == at) & one.used
                counter[at] += (boxes[:, None] == one.rois[here]).all(dim=-1).any(dim=1)
    for of_image, masks, (_, labels) in zip(times, of_masks, known, strict=True):
        for is_kind, count, found in (
            (labels > 0, 10, of_image),
            (labels == 0, 30, of_image),
            (labels > 0, 10, masks),
        ):
            share = count / int(is_kind.sum())
            spread = (draws * share * (1 - share)) ** 0.5
            assert float((found[is_kind] - draws * share).abs().max()) < 4.5 * spread


def rows_of(drawn: Any, at: int) -> Tensor:
    """What is learned on each region of an image, as sorted rows."""
    here = (drawn.image_of == at) & drawn.used
    parts = [getattr(drawn, one.name) for one in fields(drawn) if one.name not in ("image_of", "counts", "masks")]
    rows = torch.cat([one[here].flatten(1) if one.ndim > 1 else one[here][:, None] for one in parts], dim=1)
    return rows[torch.from_numpy(np.lexsort(rows.numpy().T))]


def alone(regions: Regions, instances: Instances, at: int) -> tuple[Regions, Instances]:
    one = slice(at, at + 1)
    return replace(regions, boxes=regions.boxes[one], is_box=regions.is_box[one]), replace(
        instances,
        boxes=instances.boxes[one],
        labels=instances.labels[one],
        windows=instances.windows[one],
        starts=instances.starts[one],
        counts=instances.counts[one],
    )


def test_what_is_learned_of_an_image_does_not_depend_on_those_beside_it() -> None:
    model = without_chance()
    regions, instances = made_regions((2, 0, 3, 1), 5, 5)
    together = RcnnBatch(model, ENOUGH)
    anchors, _ = together.anchors(SIZE)
    drawn, samples = together.draw(regions, instances), AnchorSamples.draw(model.rpn, anchors, instances)
    for at in range(4):
        by_itself = together.draw(*alone(regions, instances, at))
        assert torch.equal(rows_of(drawn, at), rows_of(by_itself, 0))
        assert drawn.masks is not None
        assert by_itself.masks is not None
        assert torch.equal(rows_of(drawn.masks, at), rows_of(by_itself.masks, 0))
        apart = AnchorSamples.draw(model.rpn, anchors, alone(regions, instances, at)[1])
        assert torch.equal(anchors_of(samples, at), anchors_of(apart, 0))


def anchors_of(samples: AnchorSamples, at: int) -> Tensor:
    """Which anchors are learned, whether they lie on an instance and how they are moved, as rows sorted by place."""
    positive = samples.corrections.shape[1]
    rows = torch.zeros(samples.places.shape[1], 6)
    rows[:, 0] = samples.places[at]
    rows[:positive, 1], rows[:positive, 2:] = 1, samples.corrections[at]
    rows = rows[samples.used[at]]
    return rows[rows[:, 0].argsort()]


def test_what_the_heads_learn_of_a_region_is_what_torchvision_says() -> None:
    model = network()
    regions, instances = made_regions((2, 0, 3, 1), 6, 6)
    drawn = RcnnBatch(model, ENOUGH).draw(regions, instances)
    for at, count in enumerate(instances.counts):
        here = (drawn.image_of == at) & (drawn.labels > 0)
        truth = instances.boxes[at, :count]
        rois = drawn.rois[here]
        assert len(rois) > 5 * count - 1
        if not count:
            continue
        (matched,), (labels,) = model.roi_heads.assign_targets_to_proposals([rois], [truth], [instances.labels[at]])
        assert torch.equal(labels, drawn.labels[here])
        (wanted,) = model.roi_heads.box_coder.encode([truth[matched]], [rois])
        torch.testing.assert_close(drawn.corrections[here], wanted, atol=1e-5, rtol=1e-5)
    assert not drawn.corrections[drawn.labels == 0].any()


@pytest.mark.parametrize(("count", "fraction"), [(10**6, 0.5), (256, 0.5), (32, 0.5), (40, 0.1)])
def test_anchors_are_those_that_torchvision_could_draw_and_as_many(count: int, fraction: float) -> None:
    model = network()
    sampler = model.rpn.fg_bg_sampler
    sampler.batch_size_per_image, sampler.positive_fraction = count, fraction
    _, instances = made_regions((2, 0, 3, 1), 1, 1)
    anchors, _ = RcnnBatch(model, None).anchors(SIZE)
    truth = [{"boxes": boxes[:number]} for boxes, number in zip(instances.boxes, instances.counts, strict=True)]
    labels, matched = model.rpn.assign_targets_to_anchors([anchors] * 4, truth)
    for seed in range(5):
        torch.manual_seed(seed)
        samples = AnchorSamples.draw(model.rpn, anchors, instances)
        for at in range(4):
            rows = anchors_of(samples, at)
            places, on_instance = rows[:, 0].long(), rows[:, 1] > 0
            assert len(set(places.tolist())) == len(places), "an anchor was drawn twice"
            assert bool((labels[at][places] == on_instance).all())
            positive = min(int((labels[at] == 1).sum()), int(count * fraction))
            assert int(on_instance.sum()) == positive
            assert len(places) == positive + min(int((labels[at] == 0).sum()), count - positive)
            of_these = places[on_instance]
            (wanted,) = model.rpn.box_coder.encode([matched[at][of_these]], [anchors[of_these]])
            torch.testing.assert_close(rows[on_instance, 2:], wanted, atol=1e-5, rtol=1e-5)


def test_each_anchor_is_drawn_about_as_often_as_every_other_of_its_kind() -> None:
    model = network()
    sampler = model.rpn.fg_bg_sampler
    sampler.batch_size_per_image, sampler.positive_fraction = 40, 0.05
    _, instances = made_regions((3, 0), 1, 1)
    anchors, _ = RcnnBatch(model, None).anchors(SIZE)
    truth = [{"boxes": instances.boxes[0]}, {"boxes": instances.boxes[1, :0]}]
    labels, _ = model.rpn.assign_targets_to_anchors([anchors] * 2, truth)
    draws = 400
    times = torch.zeros(2, len(anchors))
    torch.manual_seed(1)
    for _ in range(draws):
        samples = AnchorSamples.draw(model.rpn, anchors, instances)
        for at in range(2):
            times[at, samples.places[at][samples.used[at]]] += 1
    for of_image, of_labels, quotas in zip(times, labels, ((2, 38), (0, 40)), strict=True):
        for label, quota in zip((1, 0), quotas, strict=True):
            found = of_image[of_labels == label]
            if not len(found):
                continue
            assert int(found.sum()) == draws * quota
            share = quota / len(found)
            assert float((found - draws * share).abs().max()) < 5.5 * (draws * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("most", [1, 10**4])
def test_overlaps_worked_out_in_chunks_are_the_same(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    _, instances = made_regions((2, 0, 3, 1), 1, 1)
    anchors, _ = RcnnBatch(model, None).anchors(SIZE)
    found = []
    for limit in (matching.MOST_OVERLAPS, most):
        monkeypatch.setattr(matching, "MOST_OVERLAPS", limit)
        torch.manual_seed(0)
        found.append(AnchorSamples.draw(model.rpn, anchors, instances))
    for one in fields(AnchorSamples):
        assert torch.equal(getattr(found[0], one.name), getattr(found[1], one.name)), one.name


@pytest.mark.parametrize("places", [[0, 1, 2, 3], [1]])
def test_slots_that_do_not_count_change_neither_losses_nor_gradients(places: list[int]) -> None:
    model = network()
    stir(model, 1)
    images, targets = chosen_of(places)
    together = RcnnBatch(model, None)
    pixels, sizes = stacked(images)
    exact = together.given(pixels, sizes, targets)
    larger = together.given(pixels, sizes, targets, is_rounded=True)
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


def test_a_batch_has_room_for_all_that_is_on_it_and_rounded_a_little_more() -> None:
    _, targets = chosen_of([0, 1, 2, 3])
    room = Room.of(targets)
    assert room.instances == 3
    assert room.mask_pixels == sum(len(one["mask_pixels"]) for one in targets)
    windows = torch.cat([one["windows"] for one in targets])
    assert room.window == (int(windows[:, 3].max()), int(windows[:, 2].max()))
    assert Room.of(targets[1:2]) == Room(1, 1, (1, 1))
    assert room.rounded(4, 96, 128) == Room(4, 4 * 96 * 128, (64, 64))
    assert Room(5, 10**6, (70, 20)).rounded(1, 96, 128) == Room(8, 2**20, (96, 128))


@given(st.integers(1, 10**6), st.sampled_from([1, 4, 16, 64]))
def test_counts_are_rounded_up_to_the_next_power_of_two_or_the_least_that_is_wanted(count: int, least: int) -> None:
    found = rounded(count, least)
    assert found >= max(count, least)
    assert found & (found - 1) == 0
    assert found == least or found < 2 * count


@given(
    quotas=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    more=st.integers(0, 9),
)
@settings(deadline=None)
def test_slots_are_the_images_one_after_the_other(quotas: list[int], more: int) -> None:
    expected = [(at, number) for at, quota in enumerate(quotas) for number in range(quota)]
    image_of, number, is_slot = rcnn_batch._slots(torch.tensor(quotas), len(expected) + more)
    assert is_slot.tolist() == [True] * len(expected) + [False] * more
    assert list(zip(image_of[is_slot].tolist(), number[is_slot].tolist(), strict=True)) == expected
    assert bool((image_of < len(quotas)).all())


def test_every_parameter_has_a_gradient_on_images_without_an_instance() -> None:
    model = network()
    images, targets = chosen_of([1])
    found = gradients(model, RcnnBatch(model, None).losses(images, targets))
    assert found.keys() == {name for name, one in model.named_parameters() if one.requires_grad}


def test_a_look_at_the_features_sizes_changes_no_norm_and_no_mode() -> None:
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


def test_a_pass_asks_the_device_one_question_where_the_plain_way_asks_dozens() -> None:
    model = network()
    images, targets = five_on_each_of_four()
    together = RcnnBatch(model, None)
    pixels, sizes = stacked(images)
    given_here = together.given(pixels, sizes, targets)  # looks at what is on the CPU still
    with pooled_as_on_a_gpu(), counted() as asked:
        proposed = together.propose(given_here)
        regions = together.settled(proposed.regions, proposed.candidates)
        gradients(model, together.losses_of(given_here, proposed, regions))
    assert dict(asked) == {"_local_scalar_dense": 1}
    with counted() as asked:
        gradients(model, rcnn_losses.losses(model, images, targets, None))
    assert asked.total() > 50
