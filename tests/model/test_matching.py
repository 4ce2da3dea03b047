"""Sampled anchors could be torchvision's, and each is about as frequent as any other."""

from dataclasses import fields

import pytest
import torch
from made_regions import SIZE, anchors_of, made_regions
from outlined_images import network

from flawmask.model import matching
from flawmask.model.matching import AnchorSamples
from flawmask.model.rcnn_batch import RcnnBatch

pytestmark = pytest.mark.usefixtures("small_network")


@pytest.mark.parametrize(("count", "fraction"), [(10**6, 0.5), (256, 0.5), (32, 0.5), (40, 0.1)])
def test_sampled_anchors_could_be_torchvisions_in_kind_and_number(count: int, fraction: float) -> None:
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


def test_anchors_of_a_kind_are_sampled_uniformly() -> None:
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
def test_overlaps_do_not_depend_on_chunks(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    _, instances = made_regions((2, 0, 3, 1), 1, 1)
    anchors, _ = RcnnBatch(model, None).anchors(SIZE)
    found = []
    for limit in (matching.MAX_OVERLAPS, most):
        monkeypatch.setattr(matching, "MAX_OVERLAPS", limit)
        torch.manual_seed(0)
        found.append(AnchorSamples.draw(model.rpn, anchors, instances))
    for one in fields(AnchorSamples):
        assert torch.equal(getattr(found[0], one.name), getattr(found[1], one.name)), one.name
