"""Masks: every written form decodes to exactly the mask, with pycocotools instead of our own decoder."""

from typing import Any

import cv2
import hypothesis.extra.numpy as arrays
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as rle_tools
from scipy import ndimage

from flawmask.masks import (
    Mask,
    Segmentation,
    area,
    as_rle,
    box_of,
    box_of_rle,
    components,
    cropped,
    decode,
    encode,
    enlarged,
    intersection,
    moved,
    part_of_rle,
    rle_of_changes,
    shared_pixels,
    to_polygons,
    to_rle,
    union,
)

ANY_MASK = arrays.arrays(np.bool_, arrays.array_shapes(min_dims=2, max_dims=2, max_side=14))


def drawing(*rows: str) -> Mask:
    return np.array([[letter == "#" for letter in row] for row in rows])


def decoded(segmentation: Segmentation, height: int, width: int) -> Mask:
    """Return the mask from pycocotools' own `COCO.annToMask`."""
    rle: Any = segmentation
    if isinstance(segmentation, list):
        rle = rle_tools.merge(rle_tools.frPyObjects(segmentation, height, width))
    return np.asarray(rle_tools.decode(rle), dtype=bool)


SHAPES = {
    "one pixel": drawing("#"),
    "one pixel inside": drawing("...", ".#.", "..."),
    "full": np.ones((5, 7), dtype=bool),
    "a diagonal": np.eye(6, dtype=bool),
    "the other diagonal": np.eye(6, dtype=bool)[::-1],
    "a hole": drawing("###", "#.#", "###"),
    "a hole that touches a corner": drawing("##.", "#.#", "###"),
    "a hole closed by corners alone": drawing(".#.", "#.#", ".#."),
    "a chessboard": np.indices((6, 7)).sum(axis=0) % 2 == 0,
    "a frame along the border": np.pad(np.zeros((3, 4), dtype=bool), 1, constant_values=True),
    "an island in a hole": drawing("#####", "#...#", "#.#.#", "#...#", "#####"),
    "a column": np.ones((9, 1), dtype=bool),
    "a row": np.ones((1, 9), dtype=bool),
    "a comb": drawing("#.#.#", "#.#.#", "#####"),
    "a spiral": drawing("######", "#.....", "#.####", "#.#..#", "#.##.#", "#....#", "######"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_decoded_exactly(name: str) -> None:
    mask = SHAPES[name]
    assert np.array_equal(decoded(encode(mask), *mask.shape), mask)


@settings(max_examples=400, deadline=None)
@given(ANY_MASK.filter(np.any))
def test_any_mask_is_decoded_exactly(mask: Mask) -> None:
    assert np.array_equal(decoded(encode(mask), *mask.shape), mask)
    assert np.array_equal(decode(encode(mask), *mask.shape), mask)
    assert np.array_equal(decoded(to_rle(mask), *mask.shape), mask)


@pytest.mark.parametrize("threshold", [-0.3, 0.0, 0.2])
def test_a_large_smooth_mask_far_from_the_corner_is_decoded_exactly(threshold: float) -> None:
    noise = cv2.GaussianBlur(np.random.default_rng(3).normal(size=(180, 260)), (0, 0), 4)
    mask = np.pad(noise / noise.std() > threshold, ((300, 11), (500, 0)))
    for region in components(mask):
        assert np.array_equal(decoded(encode(region), *mask.shape), region)


@settings(max_examples=300, deadline=None)
@given(ANY_MASK.filter(np.any))
def test_polygons_run_along_pixel_edges_and_enclose_the_area(mask: Mask) -> None:
    polygons = to_polygons(mask)
    # Background that is connected to the outside only by a corner counts as outside: it is 8-connected.
    holes = ndimage.label(np.pad(~mask, 1, constant_values=True), structure=np.ones((3, 3)))[1] - 1
    assert (polygons is None) == (holes > 0)
    area = 0.0
    for polygon in polygons or []:
        x, y = np.array(polygon[0::2]), np.array(polygon[1::2])
        assert all(isinstance(value, int) for value in polygon)
        assert len(x) >= 4
        assert x.min() >= 0
        assert y.min() >= 0
        assert x.max() <= mask.shape[1]
        assert y.max() <= mask.shape[0]
        moves_x, moves_y = np.roll(x, -1) != x, np.roll(y, -1) != y
        assert np.array_equal(moves_x, ~moves_y), "each edge must be horizontal or vertical, with a length above 0"
        assert np.array_equal(moves_x, ~np.roll(moves_x, 1)), "horizontal and vertical edges must alternate"
        area += abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2
    assert polygons is None or area == mask.sum()


def test_a_region_without_a_hole_becomes_polygons_and_one_with_a_hole_becomes_rle_for_json() -> None:
    assert encode(drawing("....", ".##.", "....")) == [[1, 1, 3, 1, 3, 2, 1, 2]]
    assert encode(np.ones((3, 5), dtype=bool)) == [[0, 0, 5, 0, 5, 3, 0, 3]]
    ring = encode(SHAPES["a hole"])
    assert isinstance(ring, dict)
    assert ring["size"] == [3, 3]
    assert isinstance(ring["counts"], str)


@settings(max_examples=200, deadline=None)
@given(ANY_MASK)
def test_components_are_those_of_scipy_in_reading_order(mask: Mask) -> None:
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    found = list(components(mask))
    assert len(found) == count
    assert [region.tobytes() for region in found] == [(labels == label).tobytes() for label in range(1, count + 1)]


@settings(max_examples=200, deadline=None)
@given(ANY_MASK.filter(np.any))
def test_a_box_covers_the_mask_and_no_more(mask: Mask) -> None:
    x, y, width, height = box_of(mask)
    box = np.zeros_like(mask)
    box[y : y + height, x : x + width] = True
    assert not (mask & ~box).any()
    for edge in (mask[y, :], mask[y + height - 1, :], mask[:, x], mask[:, x + width - 1]):
        assert edge.any()
    assert list(box_of(mask)) == rle_tools.toBbox(rle_tools.encode(np.asfortranarray(mask, np.uint8))).tolist()


def test_a_scratch_one_pixel_wide_has_a_box_of_width_1_and_an_empty_mask_has_none() -> None:
    assert box_of(drawing("...", ".#.", ".#.")) == (1, 1, 1, 2)
    with pytest.raises(ValueError, match="empty"):
        box_of(np.zeros((3, 3), dtype=bool))


@settings(max_examples=300, deadline=None)
@given(ANY_MASK)
def test_the_rle_from_a_masks_runs_equals_that_of_pycocotools(mask: Mask) -> None:
    changes = np.flatnonzero(np.diff(np.concatenate(([False], mask.T.ravel(), [False]))))
    wanted = rle_tools.encode(np.asfortranarray(mask, np.uint8))
    rle, pixels = rle_of_changes(changes, *mask.shape)
    assert rle == {"size": list(mask.shape), "counts": wanted["counts"].decode()}
    assert pixels == mask.sum()
    if pixels:
        assert box_of_rle(rle) == box_of(mask)


@settings(max_examples=200, deadline=None)
@given(
    arrays.arrays(
        np.bool_, st.tuples(st.integers(2, 4), st.integers(1, 14), st.integers(1, 14)), elements=st.booleans()
    )
)
def test_operations_on_rle_equal_those_on_pixels(stack: npt.NDArray[np.bool_]) -> None:
    size = stack.shape[1:]
    rles = [to_rle(mask) for mask in stack]
    assert union(rles, *size) == to_rle(np.asarray(stack.any(axis=0)))
    assert union(rles[:1], *size) == rles[0]
    assert union([], *size) == to_rle(np.zeros(size, dtype=bool))
    assert intersection(rles[0], rles[1]) == to_rle(stack[0] & stack[1])
    assert area(rles[0]) == stack[0].sum()


@settings(max_examples=100, deadline=None)
@given(ANY_MASK)
def test_every_kind_of_coco_segmentation_is_decoded(mask: Mask) -> None:
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate(([2], mask.T.ravel(), [2])))))
    counts = ([0] if mask.T.flat[0] else []) + runs.tolist()
    uncompressed = {"size": list(mask.shape), "counts": counts}
    for segmentation in (uncompressed, to_rle(mask), encode(mask) if mask.any() else []):
        assert np.array_equal(decode(segmentation, *mask.shape), mask)
        assert as_rle(segmentation, *mask.shape) == to_rle(mask)


def test_overlapping_polygons_are_joined_and_no_polygon_gives_an_empty_mask() -> None:
    assert np.array_equal(decode([[0, 0, 2, 0, 2, 2, 0, 2], [1, 0, 3, 0, 3, 2, 1, 2]], 2, 4), drawing("###.", "###."))
    assert not decode([], 4, 5).any()
    assert decode([], 4, 5).shape == (4, 5)


def test_an_rle_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="3x2 on an image of 5x4"):
        decode(to_rle(np.ones((2, 3), dtype=bool)), 4, 5)


@given(ANY_MASK, st.integers(0, 9), st.integers(0, 9), st.integers(1, 12), st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_a_part_of_an_rle_equals_the_part_of_its_decoded_mask(mask: Mask, x: int, y: int, wide: int, high: int) -> None:
    whole = np.zeros((40, 40), dtype=bool)
    whole[: mask.shape[0], : mask.shape[1]] = mask[:40, :40]
    part = whole[y : y + high, x : x + wide]
    assert np.array_equal(part_of_rle(to_rle(whole), x, y, wide, high), part)
    assert cropped(to_rle(whole), x, y, wide, high) == to_rle(part)


@given(ANY_MASK, st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_an_rle_that_is_moved_into_a_larger_image_is_the_mask_there(
    mask: Mask, left: int, top: int, right: int, bottom: int
) -> None:
    expected = np.pad(mask, ((top, bottom), (left, right)))
    assert moved(to_rle(mask), left, top, *expected.shape) == to_rle(expected)


@given(ANY_MASK, ANY_MASK)
@settings(max_examples=100, deadline=None)
def test_the_pixels_that_masks_share_are_counted(one: Mask, other: Mask) -> None:
    first, second = (np.zeros((40, 40), dtype=bool) for _ in range(2))
    first[: one.shape[0], : one.shape[1]], second[: other.shape[0], : other.shape[1]] = one[:40, :40], other[:40, :40]
    assert shared_pixels([to_rle(first)], [to_rle(second)] * 2).tolist() == [[(first & second).sum()] * 2]


@settings(max_examples=150, deadline=None)
@given(
    cells=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    image=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    seed=st.integers(0, 99),
)
def test_enlarged_cells_are_the_pixels_with_their_centres_in_them(
    cells: tuple[int, int], image: tuple[int, int], seed: int
) -> None:
    grid = np.random.default_rng(seed).random(cells) < 0.3
    grid[seed % cells[0], seed % cells[1]] = True
    found = decode(enlarged(grid, *image), *image)
    rows, columns = ((2 * np.arange(side) + 1) * count // (2 * side) for side, count in zip(image, cells, strict=True))
    expected = grid[np.ix_(rows, columns)]
    if expected.any():
        assert (found == expected).all()
    else:
        assert found.sum() == 1
