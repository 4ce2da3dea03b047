"""Joining of predictions: exact results for masks made by hand, and properties of any masks."""

from collections.abc import Sequence
from random import Random

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from flawmask.masks import Mask, box_of, decode, dilated, to_rle, touching
from flawmask.prediction import Instance, Prediction, RawDetections, post_process

HEIGHT, WIDTH = 7, 9
EVERYWHERE = np.ones((3, 3), dtype=bool)

any_masks = st.lists(
    arrays.arrays(np.bool_, (HEIGHT, WIDTH), elements=st.integers(0, 9).map(lambda one: one == 0)), max_size=6
)
any_instances = st.lists(
    st.tuples(
        st.sampled_from(["crack", "scratch", "good"]),
        st.sampled_from([0.06, 0.2, 0.35, 0.5, 0.7, 0.9]),
        st.tuples(st.integers(0, HEIGHT - 1), st.integers(0, WIDTH - 1), st.integers(0, 3), st.integers(0, 3)),
    ),
    max_size=8,
)


def rectangle(y: int, x: int, height: int, width: int) -> Mask:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[y : y + height, x : x + width] = True
    return mask


def instance(label: str, score: float, mask: Mask) -> Instance:
    x, y, width, height = box_of(mask) if mask.any() else (0, 0, 0, 0)
    box = (float(x), float(y), float(x + width), float(y + height))
    return Instance(label, score, box, to_rle(mask), int(mask.sum()))


def prediction(instances: Sequence[Instance]) -> Prediction:
    return Prediction(HEIGHT, WIDTH, tuple(sorted(instances, key=lambda one: -one.score)))


def drawn(records: Sequence[tuple[str, float, tuple[int, int, int, int]]]) -> list[Instance]:
    return [instance(label, score, rectangle(*place)) for label, score, place in records]


def described(joined: Prediction) -> list[tuple[str, float, bytes]]:
    return sorted((one.label, one.score, one.mask.tobytes()) for one in joined.instances)


@settings(deadline=None)
@given(arrays.arrays(np.bool_, arrays.array_shapes(min_dims=2, max_dims=2, max_side=12)))
def test_a_dilated_mask_is_that_of_scipy(mask: Mask) -> None:
    assert (decode(dilated(to_rle(mask)), *mask.shape) == ndimage.binary_dilation(mask, EVERYWHERE)).all()


@settings(deadline=None)
@given(any_masks)
def test_masks_touch_if_one_dilated_by_a_pixel_overlaps_the_other(masks: list[Mask]) -> None:
    expected = [[bool((ndimage.binary_dilation(one, EVERYWHERE) & other).any()) for other in masks] for one in masks]
    assert touching([to_rle(mask) for mask in masks]).tolist() == expected


@pytest.mark.parametrize(
    ("left", "right", "score", "parts"),
    [
        (rectangle(1, 0, 2, 4), rectangle(1, 3, 2, 4), 0.8, 1),  # they overlap
        (rectangle(1, 0, 2, 4), rectangle(1, 4, 2, 4), 0.8, 1),  # by a side
        (rectangle(1, 0, 2, 4), rectangle(3, 4, 2, 4), 0.8, 1),  # by a corner
        (rectangle(1, 0, 2, 4), rectangle(1, 5, 2, 4), 0.8, 2),  # a pixel apart
        (rectangle(1, 0, 2, 4), rectangle(1, 3, 2, 4), 0.5, 1),  # the lowest score that is joined
        (rectangle(1, 0, 2, 4), rectangle(1, 3, 2, 4), 0.49, 2),  # a lower score
        (rectangle(0, 0, 3, 3), rectangle(0, 0, 3, 3), 0.8, 1),  # the same mask
        (rectangle(0, 0, 7, 9), rectangle(2, 2, 1, 1), 0.8, 1),  # inside
    ],
)
def test_masks_made_by_hand(left: Mask, right: Mask, score: float, parts: int) -> None:
    joined = prediction([instance("crack", 0.9, left), instance("crack", score, right)]).joined()
    if parts == 2:
        assert [one.score for one in joined.instances] == [0.9, score]
        return
    (one,) = joined.instances
    x, y, width, height = box_of(left | right)
    assert (one.mask == (left | right)).all()
    assert (one.score, one.area, one.xywh) == (0.9, (left | right).sum(), [x, y, width, height])
    assert [part.score for part in one.parts] == [0.9, score]


def test_three_pieces_of_a_scratch_become_one_and_another_class_stays() -> None:
    pieces = [instance("scratch", score, rectangle(3, x, 1, 3)) for score, x in ((0.6, 0), (0.9, 3), (0.7, 6))]
    crack = instance("crack", 0.8, rectangle(2, 4, 3, 1))
    joined = prediction([*pieces, crack]).joined()
    assert [(one.label, one.score, one.area) for one in joined.instances] == [("scratch", 0.9, 9), ("crack", 0.8, 3)]


def test_a_blurred_mask_with_a_low_score_does_not_join_two_defects() -> None:
    sharp = [instance("crack", 0.9, rectangle(0, x, 7, 3)) for x in (0, 6)]
    blurred = instance("crack", 0.2, rectangle(0, 0, 7, 9))
    assert prediction([*sharp, blurred]).joined() == prediction([*sharp, blurred])


@settings(deadline=None)
@given(any_instances, st.randoms())
def test_properties_of_joining_hold_for_any_instances(
    records: list[tuple[str, float, tuple[int, int, int, int]]], random: Random
) -> None:
    instances = drawn(records)
    before = prediction(instances)
    after = before.joined()
    parts = [part for one in after.instances for part in one.parts or (one,)]
    assert sorted(map(id, parts)) == sorted(map(id, instances)), "each prediction is in exactly one defect"
    for one in after.instances:
        own = one.parts or (one,)
        assert (one.mask == np.any([part.mask for part in own], axis=0)).all()
        assert {part.label for part in own} == {one.label}
        assert one.score == max(part.score for part in own)
        assert one.area == one.mask.sum()
    assert list(after.scores) == sorted(after.scores, reverse=True)
    assert after.joined() == after
    random.shuffle(instances)
    assert described(prediction(instances).joined()) == described(after)
    for conf in (0.0, 0.5, 0.9):
        assert after.verdict(conf) == before.verdict(conf)
    assert (after.score_map() == before.score_map()).all()


def test_nothing_is_joined_with_off_or_for_a_network_that_predicts_boxes() -> None:
    boxes, scores = np.array([[0, 0, 4, 4], [2, 2, 6, 6]], np.float32), np.array([0.9, 0.8], np.float32)
    raw = RawDetections(boxes, np.array([1, 1]), scores, np.ones((2, 28, 28), np.float32))
    assert [len(post_process(raw, ("crack",), HEIGHT, WIDTH, join=rule)) for rule in ("off", "touching")] == [2, 1]
    without = RawDetections(raw.boxes, raw.labels, raw.scores)
    assert len(post_process(without, ("crack",), HEIGHT, WIDTH, join="touching")) == 2
