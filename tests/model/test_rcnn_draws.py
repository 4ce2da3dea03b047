"""The regions that train the heads are sampled correctly for a whole batch at once."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_regions import SIZE, anchors_of, made_regions
from outlined_images import network
from stirred_network import ENOUGH, without_chance
from torch import Tensor

from flawmask.model import rcnn_batch, rcnn_losses
from flawmask.model.instances import Instances
from flawmask.model.matching import AnchorSamples
from flawmask.model.rcnn_batch import RcnnBatch, Regions, SampledMasks, SampledRegions

pytestmark = pytest.mark.usefixtures("small_network")


def on_instance_of(model: Any, regions: Regions, instances: Instances, at: int) -> tuple[Tensor, Tensor]:
    """Return all valid regions of an image, the true boxes included, with the labels that torchvision gives them."""
    truth = instances.boxes[at, : instances.counts[at]]
    boxes = torch.cat((regions.boxes[at][regions.is_box[at]], truth))
    of_image = instances.labels[at, : instances.counts[at]]
    (_,), (labels,) = model.roi_heads.assign_targets_to_proposals([boxes], [truth], [of_image])
    return boxes, labels


@pytest.mark.parametrize("roi_samples", [None, 20, 41])
@pytest.mark.parametrize(("around", "beside"), [(40, 60), (1, 60), (40, 2), (3, 0)])
def test_the_wanted_number_of_distinct_regions_is_sampled_at_most_a_quarter_positive(
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
def test_masks_are_learned_from_positive_regions_by_default_four_per_instance(
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


def test_regions_of_a_kind_are_sampled_uniformly() -> None:
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
            chosen: tuple[tuple[list[Tensor], SampledRegions | SampledMasks], ...] = (
                (times, drawn),
                (of_masks, drawn.masks),
            )
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
    """Return the targets of each region of an image as sorted rows."""
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


def test_samples_of_an_image_do_not_depend_on_its_batch() -> None:
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


def test_the_heads_targets_for_a_region_equal_torchvisions() -> None:
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


@given(
    quotas=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    more=st.integers(0, 9),
)
@settings(deadline=None)
def test_slots_belong_to_the_images_in_order(quotas: list[int], more: int) -> None:
    expected = [(at, number) for at, quota in enumerate(quotas) for number in range(quota)]
    image_of, number, is_slot = rcnn_batch._slots(torch.tensor(quotas), len(expected) + more)
    assert is_slot.tolist() == [True] * len(expected) + [False] * more
    assert list(zip(image_of[is_slot].tolist(), number[is_slot].tolist(), strict=True)) == expected
    assert bool((image_of < len(quotas)).all())
