"""Resized masks: exact at the original size, otherwise the pixels whose centres they cover."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flawmask.coco import annotation
from flawmask.masks import Mask, as_rle, box_of, encode, to_rle
from flawmask.model.targets import make_target, resized_mask

SIZES = st.tuples(st.integers(8, 60), st.integers(8, 60))


@st.composite
def masks(draw: st.DrawFn) -> Mask:
    """Draw a mask with a few blobs: some one pixel wide, some with a hole, some at an edge."""
    height, width = draw(SIZES)
    mask = np.zeros((height, width), dtype=bool)
    for _ in range(draw(st.integers(1, 3))):
        y, x = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        mask[y : y + draw(st.integers(1, 25)), x : x + draw(st.integers(1, 25))] = True
    if draw(st.booleans()):
        y, x = draw(st.integers(0, height - 3)), draw(st.integers(0, width - 3))
        keep = mask.copy()
        mask[y : y + 3, x : x + 3] = False
        mask = mask if mask.any() else keep
    return mask


def in_place(found: tuple[Mask, int, int], resized: tuple[int, int]) -> Mask:
    crop, left, top = found
    whole = np.zeros(resized, dtype=bool)
    whole[top : top + crop.shape[0], left : left + crop.shape[1]] = crop
    return whole


def at_centres(mask: Mask, resized: tuple[int, int]) -> Mask:
    """Return the mask at another size: a pixel is set where its centre lies in a pixel of the mask."""
    rows = [int(Fraction(2 * row + 1, 2) * mask.shape[0] / resized[0]) for row in range(resized[0])]
    columns = [int(Fraction(2 * column + 1, 2) * mask.shape[1] / resized[1]) for column in range(resized[1])]
    return mask[np.ix_(rows, columns)]


@given(masks(), st.booleans())
def test_at_its_own_size_a_mask_is_exact(mask: Mask, as_polygons: bool) -> None:
    segmentation = encode(mask) if as_polygons else to_rle(mask)
    found = resized_mask(segmentation, to_rle(mask), mask.shape, mask.shape)
    assert (in_place(found, mask.shape) == mask).all()


LOWER_HALF = np.repeat(np.arange(14)[:, None] >= 7, 8, axis=1)
"""With 9 rows instead of 14, the centre of row 4 is exactly at the start of an original row: 4.5 * 14 / 9 is 7."""


@given(masks(), SIZES)
@example(LOWER_HALF, (9, 8))
@settings(max_examples=200)
def test_a_resized_rle_is_sampled_at_pixel_centres(mask: Mask, resized: tuple[int, int]) -> None:
    found = in_place(resized_mask(to_rle(mask), to_rle(mask), mask.shape, resized), resized)
    expected = at_centres(mask, resized)
    if expected.any():
        assert (found == expected).all()
    else:
        assert found.any()


@given(masks(), SIZES)
@settings(max_examples=200)
def test_resized_polygons_differ_only_along_their_edges(mask: Mask, resized: tuple[int, int]) -> None:
    found = in_place(resized_mask(encode(mask), to_rle(mask), mask.shape, resized), resized)
    assert found.any()
    if at_centres(mask, resized).any():
        # pycocotools has a resolution of a fifth of a pixel, so only neighbours of an edge may differ. The edges are
        # those of the original mask: a gap narrower than a pixel has edges but holds no centre.
        around = np.array(
            [[mask[rows, columns].mean() for columns in near(1, mask, resized)] for rows in near(0, mask, resized)]
        )
        assert found[around == 1].all()
        assert not found[around == 0].any()


def near(axis: int, mask: Mask, resized: tuple[int, int]) -> list[slice]:
    """Return which rows (or columns) of a mask lie within a pixel of the centre of each row of the resized one."""
    scale = Fraction(mask.shape[axis], resized[axis])
    centres = [Fraction(2 * at + 1, 2) for at in range(resized[axis])]
    return [slice(max(0, math.floor((at - 1) * scale)), math.ceil((at + 1) * scale)) for at in centres]


def test_resized_polygons_and_rles_differ_by_few_pixels_on_average() -> None:
    random = np.random.default_rng(0)
    differing = outline = 0
    for _ in range(300):
        height, width = random.integers(30, 60, 2).tolist()
        mask = np.zeros((height, width), dtype=bool)
        y, x = int(random.integers(0, height - 12)), int(random.integers(0, width - 12))
        mask[y : y + int(random.integers(6, 12)), x : x + int(random.integers(6, 12))] = True
        resized = (int(random.integers(30, 90)), int(random.integers(30, 90)))
        found = in_place(resized_mask(encode(mask), to_rle(mask), mask.shape, resized), resized)
        expected = at_centres(mask, resized)
        differing += int((found != expected).sum())
        outline += 2 * sum(box_of(expected)[2:])
    assert differing < 0.15 * outline


@given(masks(), SIZES, st.booleans())
@settings(max_examples=200)
def test_a_window_has_an_empty_margin_except_at_the_edges_of_the_image(
    mask: Mask, resized: tuple[int, int], as_polygons: bool
) -> None:
    crop, left, top = resized_mask(encode(mask) if as_polygons else to_rle(mask), to_rle(mask), mask.shape, resized)
    bottom, right = top + crop.shape[0], left + crop.shape[1]
    assert 0 <= top < bottom <= resized[0]
    assert 0 <= left < right <= resized[1]
    assert top == 0 or not crop[0].any()
    assert left == 0 or not crop[:, 0].any()
    assert bottom == resized[0] or not crop[-1].any()
    assert right == resized[1] or not crop[:, -1].any()


@pytest.mark.parametrize("as_polygons", [False, True])
@pytest.mark.parametrize("column", [0, 1, 57, 198, 199])
def test_a_mask_thinner_than_a_pixel_is_a_pixel_wide(column: int, as_polygons: bool) -> None:
    mask = np.zeros((200, 200), dtype=bool)
    mask[40:160, column] = True
    found = in_place(
        resized_mask(encode(mask) if as_polygons else to_rle(mask), to_rle(mask), (200, 200), (50, 50)), (50, 50)
    )
    columns = np.flatnonzero(found.any(axis=0))
    assert columns.tolist() == [column // 4]
    assert found[10:40, column // 4].all()


def test_a_polygon_is_clipped_to_its_image() -> None:
    ring = [-10.0, 5.0, 30.0, 5.0, 30.0, 40.0, -10.0, 40.0]
    rle = as_rle([ring], 32, 24)  # type: ignore[list-item]  # as other programs write it, with fractions
    crop, left, top = resized_mask([ring], rle, (32, 24), (64, 48))  # type: ignore[list-item]
    whole = in_place((crop, left, top), (64, 48))
    assert whole[11:, :].all()
    assert not whole[:9, :].any()


def test_boxes_lie_along_the_edges_of_masks_and_scale_with_the_image() -> None:
    mask = np.zeros((40, 60), dtype=bool)
    mask[10:12, 30:45] = True
    record: dict[str, Any] = annotation(mask, id=1, image_id=7, category_id=3)
    target = make_target([record], {3: 2}, 7, (40, 60), (60, 120), "an image")
    assert target["boxes"].tolist() == [[60, 15, 90, 18]]
    assert (target["labels"].tolist(), target["image_id"].tolist()) == ([2], [7])
