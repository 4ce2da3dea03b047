"""Suppression of many sets at once keeps the boxes that torchvision keeps, and tells whether it has finished."""

from collections.abc import Sequence
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import box_iou
from torchvision.ops import nms as torchvision_nms

from flawmask.model import nms
from flawmask.model.nms import keep_best

THRESHOLDS = (0.25, 0.5, 0.7)
"""There is no float32 between the float32 and the float64 value of these thresholds. torchvision's CPU code compares in
float64, so both give the same result."""

Box = tuple[int, int, int, int]


def torchvisions(boxes: Tensor, valid: Tensor, threshold: float, scores: Tensor | None = None) -> Tensor:
    """Return which boxes torchvision keeps of each set: (S, N) bool. Without scores, all boxes have the same score."""
    kept = torch.zeros_like(valid)
    scores = torch.ones(valid.shape) if scores is None else scores
    for one, of_set, is_valid, of_boxes in zip(kept, boxes, valid, scores, strict=True):
        places = torch.where(is_valid)[0]
        one[places[torchvision_nms(of_set[places], of_boxes[places], threshold)]] = True
    return kept


def clustered(sets: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw boxes around a few places, some equal, some empty, and which of them are valid."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.rand(sets, 3, 4, generator=draw) * 60
    at = torch.randint(3, (sets, count), generator=draw)
    corners = centres.gather(1, at[..., None].expand(-1, -1, 4)) + torch.randn(sets, count, 4, generator=draw) * 4
    boxes = torch.cat((corners[..., :2], corners[..., :2] + corners[..., 2:].clamp(min=0)), dim=-1)
    source = torch.randint(max(1, count), (sets, count), generator=draw)
    is_copy = torch.rand(sets, count, generator=draw) < 0.2
    boxes = torch.where(is_copy[..., None], boxes.gather(1, source[..., None].expand(-1, -1, 4)), boxes)
    return boxes, torch.rand(sets, count, generator=draw) < 0.85


def as_set(corners: Sequence[Box]) -> Tensor:
    """Convert boxes x y width height to one set, (1, N, 4) x1 y1 x2 y2."""
    boxes = torch.tensor(corners, dtype=torch.float32).reshape(-1, 4)
    return torch.cat((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), dim=1)[None]


def chain(length: int) -> Tensor:
    """Return a chain of boxes, (1, N, 4): each has an IoU of 0.6 with the next and of 1/3 with the one after that."""
    return as_set([(2 * at, 0, 8, 8) for at in range(length)])


@given(
    sets=st.integers(1, 4),
    count=st.integers(0, 70),
    seed=st.integers(0, 10**6),
    levels=st.integers(1, 60),
    threshold=st.sampled_from(THRESHOLDS),
    block=st.sampled_from([1, 3, 16, nms.BLOCK]),
    pairs=st.sampled_from([1, 500, nms.MAX_PAIRS]),
)
@example(sets=2, count=0, seed=0, levels=1, threshold=0.5, block=nms.BLOCK, pairs=nms.MAX_PAIRS)
@example(sets=3, count=1, seed=0, levels=1, threshold=0.5, block=nms.BLOCK, pairs=nms.MAX_PAIRS)
@example(sets=3, count=33, seed=1, levels=2, threshold=0.25, block=16, pairs=1100)
@settings(max_examples=150, deadline=None)
def test_each_set_keeps_what_torchvision_keeps_whatever_the_blocks_and_chunks(
    sets: int, count: int, seed: int, levels: int, threshold: float, block: int, pairs: int
) -> None:
    boxes, valid = clustered(sets, count, seed)
    scores = torch.randint(levels, (sets, count), generator=torch.Generator().manual_seed(seed)).float()
    scores = scores.sort(dim=1, descending=True).values  # with ties, which keep their order
    with mock.patch.object(nms, "BLOCK", block), mock.patch.object(nms, "MAX_PAIRS", pairs):
        kept, settled = keep_best(boxes, valid, threshold)
    assert kept.dtype == torch.bool
    assert torch.equal(kept, torchvisions(boxes, valid, threshold, scores))
    assert bool(settled)


@given(
    corners=st.lists(st.tuples(*[st.integers(0, 6)] * 4), max_size=24),
    threshold=st.sampled_from(THRESHOLDS),
    block=st.sampled_from([2, 5, nms.BLOCK]),
)
@example(corners=[(0, 0, 4, 4), (0, 0, 4, 2)], threshold=0.5, block=nms.BLOCK)  # an IoU of exactly 0.5
@example(corners=[(0, 0, 4, 4), (0, 0, 2, 2)], threshold=0.25, block=nms.BLOCK)
@example(corners=[(0, 0, 5, 2), (0, 0, 7, 1)], threshold=0.7, block=nms.BLOCK)
@example(corners=[(0, 0, 10, 1), (0, 0, 7, 1)], threshold=0.7, block=nms.BLOCK)
@example(corners=[(3, 3, 0, 0), (3, 3, 0, 0), (3, 3, 0, 2), (2, 2, 4, 4)], threshold=0.25, block=2)
@settings(max_examples=300, deadline=None)
def test_neither_an_iou_of_the_threshold_nor_an_empty_box_suppresses(
    corners: list[Box], threshold: float, block: int
) -> None:
    boxes = as_set(corners)
    valid = torch.ones(boxes.shape[:2], dtype=torch.bool)
    with mock.patch.object(nms, "BLOCK", block):
        kept, _ = keep_best(boxes, valid, threshold)
    assert torch.equal(kept, torchvisions(boxes, valid, threshold))


@pytest.mark.parametrize("corners", [((0, 0, 10, 1), (0, 0, 7, 1)), ((0, 0, 4, 4), (2, 0, 4, 4))])
def test_the_second_of_two_boxes_is_suppressed_above_the_threshold(
    corners: tuple[Box, Box],
) -> None:
    boxes = as_set(corners)
    overlap = float(box_iou(boxes[0], boxes[0])[0, 1])
    for threshold, second in ((overlap, True), (overlap - 0.01, False)):
        for one in (boxes, boxes.flip(1)):
            kept, _ = keep_best(one, torch.ones(1, 2, dtype=torch.bool), threshold)
            assert kept.tolist() == [[True, second]]


def test_an_invalid_box_suppresses_none() -> None:
    boxes = as_set([(0, 0, 8, 8)] * 3)
    kept, settled = keep_best(boxes, torch.tensor([[False, True, True]]), 0.5)
    assert kept.tolist() == [[False, True, False]]
    assert bool(settled)


@given(
    sets=st.integers(1, 3),
    count=st.integers(0, 60),
    seed=st.integers(0, 10**6),
    rounds=st.integers(1, 8),
    threshold=st.sampled_from(THRESHOLDS),
    block=st.sampled_from([4, 16, nms.BLOCK]),
)
@settings(max_examples=200, deadline=None)
def test_a_settled_result_of_few_rounds_equals_that_of_all_rounds(
    sets: int, count: int, seed: int, rounds: int, threshold: float, block: int
) -> None:
    boxes, valid = clustered(sets, count, seed)
    with mock.patch.object(nms, "BLOCK", block):
        kept, settled = keep_best(boxes, valid, threshold, rounds)
    assert not bool(settled) or torch.equal(kept, torchvisions(boxes, valid, threshold))


@pytest.mark.parametrize("rounds", [1, 2, 5, 8, 30])
@pytest.mark.parametrize("block", [8, 13, nms.BLOCK])
def test_a_chain_of_boxes_needs_as_many_rounds_as_its_block_is_long(
    rounds: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nms, "BLOCK", block)
    boxes = torch.cat(
        (chain(24), as_set([(0, 50 * at, 9, 9) for at in range(24)]))
    )  # followed by boxes that are all kept
    valid = torch.ones(2, 24, dtype=torch.bool)
    expected = torch.stack((torch.arange(24) % 2 == 0, valid[1]))
    assert torch.equal(torchvisions(boxes, valid, 0.5), expected)
    kept, settled = keep_best(boxes, valid, 0.5, rounds)
    assert bool(settled) == (rounds >= min(block, 24))
    assert torch.equal(kept, expected) == (rounds >= min(block, 24) - 1)
    kept, settled = keep_best(boxes, valid, 0.5, block)
    assert bool(settled)
    assert torch.equal(kept, expected)


def test_a_settled_block_does_not_hide_an_unsettled_one() -> None:
    boxes = torch.cat((as_set([(0, 100 + 50 * at, 9, 9) for at in range(nms.BLOCK)]), chain(nms.BLOCK)), dim=1)
    for one in (boxes, boxes.flip(1)):
        valid = torch.ones(1, 2 * nms.BLOCK, dtype=torch.bool)
        assert not bool(keep_best(one, valid, 0.5, 5)[1])
        assert torch.equal(keep_best(one, valid, 0.5)[0], torchvisions(one, valid, 0.5))
