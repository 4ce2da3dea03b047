"""Drawing: arguments and pixels far from a defect do not change, and the defect stays visible."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flawmask import draw
from flawmask.draw import PREDICTION, TRUTH, Picture
from flawmask.masks import Mask, to_rle


def picture(height: int, width: int, seed: int = 0) -> Picture:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def square(height: int, width: int, y: int, x: int, side: int) -> Mask:
    mask = np.zeros((height, width), dtype=bool)
    mask[y : y + side, x : x + side] = True
    return mask


def distance_to(mask: Mask) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.asarray(cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE), np.float32)


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(1, 120),
    width=st.integers(1, 120),
    box=st.tuples(*[st.integers(0, 119)] * 2, st.integers(1, 40)),
    thickness=st.one_of(st.none(), st.integers(1, 6)),
)
def test_an_outline_changes_the_mask_lightly_its_surroundings_and_nothing_else(
    height: int, width: int, box: tuple[int, int, int], thickness: int | None
) -> None:
    image, mask = picture(height, width), square(height, width, *box)
    before, marked = image.copy(), mask.copy()
    drawn = draw.outline(image, mask, TRUTH, thickness)
    assert (image == before).all()
    assert (mask == marked).all()
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8
    if not mask.any():
        assert (drawn == image).all()
        return
    line = thickness or 2
    assert (drawn == image)[distance_to(mask) >= line + max(1, line // 3) + 1].all()
    assert (np.abs(drawn[mask].astype(int) - image[mask]) <= np.ceil(255 * draw.FILL)).all()
    beside = distance_to(mask) == 1
    assert (drawn[beside] == TRUTH).all()


@pytest.mark.parametrize("side", [100, 900, 4000])
def test_a_single_pixel_stays_visible_at_every_image_size_once_the_image_is_shown_at_500(side: int) -> None:
    image = np.full((side, side, 3), 128, np.uint8)
    drawn = draw.outline(image, square(side, side, side // 2, side // 2, 1), PREDICTION)
    shown = draw.fit(drawn, 500, 500).astype(int)
    assert (np.abs(shown - 128).max(axis=2) > 40).sum() >= 9


def test_an_outline_is_anti_aliased() -> None:
    mask = cv2.circle(np.zeros((200, 200), np.uint8), (100, 100), 40, 1, -1).astype(bool)
    drawn = draw.outline(np.full((200, 200, 3), 255, np.uint8), mask, TRUTH, 3)
    assert len(np.unique(drawn[~mask].reshape(-1, 3), axis=0)) > 5


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    x=st.integers(-50, 100),
    y=st.integers(-50, 100),
    text=st.text(max_size=20),
)
def test_a_tag_stays_inside_an_image_of_any_size(height: int, width: int, x: int, y: int, text: str) -> None:
    image = picture(height, width)
    before = image.copy()
    drawn = draw.box_labels(image, [(text.replace("\n", " "), x, y)] * 2, PREDICTION)
    assert (image == before).all()
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8


@pytest.mark.parametrize("colour", [TRUTH, PREDICTION])
def test_a_tag_stands_above_its_box_and_changes_no_other_pixel(colour: draw.Colour) -> None:
    image = np.full((400, 400, 3), 200, np.uint8)
    drawn = draw.box_labels(image, [("defect 0.93", 100, 200)], colour)
    rows, columns = np.nonzero((drawn != image).any(axis=2))
    assert columns.min() == 100
    assert columns.max() < 200
    assert 170 < rows.min() < rows.max() < 200
    assert (drawn[rows.min(), columns.min()] == colour).all()
    outlined = draw.outline(image, square(400, 400, 200, 100, 20), colour)
    assert not ((outlined != image) & (drawn != image)).any()


def test_a_tag_at_the_corner_is_shown_whole() -> None:
    image = np.full((300, 300, 3), 200, np.uint8)
    shown = [draw.box_labels(image, [("defect 0.93", *place)], TRUTH) for place in [(100, 200), (299, 0), (-9, 999)]]
    assert len({int((drawn != image).any(axis=2).sum()) for drawn in shown}) == 1


def test_a_tag_that_would_cover_an_earlier_one_is_left_out() -> None:
    image = np.full((400, 400, 3), 200, np.uint8)
    first, below = ("defect 0.93", 100, 200), ("defect 0.41", 100, 300)
    drawn = draw.box_labels(image, [first, ("defect 0.52", 110, 195), below], PREDICTION)
    assert (drawn == draw.box_labels(image, [first, below], PREDICTION)).all()
    assert (drawn != draw.box_labels(image, [first], PREDICTION)).any()


@pytest.mark.parametrize("width", [20, 100, 900])
def test_a_title_is_a_strip_on_top_and_the_image_below_is_untouched(width: int) -> None:
    image = picture(100, width)
    drawn = draw.title_bar(image, "bottle/test/broken_small/a_very_long_name_of_a_file_014.png", PREDICTION)
    strip = drawn.shape[0] - 100
    assert 11 < strip < 30
    assert drawn.shape[1:] == (width, 3)
    assert (drawn[strip:] == image).all()
    assert (drawn[:strip] == 255).all(axis=2).any()
    assert (drawn[:strip, -2:] == 255).all(), "the text reaches the edge"


def test_a_long_name_loses_its_middle_and_keeps_both_ends() -> None:
    name = "magnetic_tile_blowhole_exp1_num_54246.jpg"
    shortened = draw._shortened(name, 11, 120)
    start, end = shortened.split("…")
    assert name.startswith(start)
    assert name.endswith(end)
    assert len(start) > 3
    assert len(end) > 3
    assert draw._shortened(name, 11, 1000) == name


def test_two_images_of_different_height_stand_side_by_side_on_white() -> None:
    left, right = picture(50, 30), picture(70, 40, seed=1)
    both = draw.side_by_side(left, right)
    assert (both[:50, :30] == left).all()
    assert (both[:, -40:] == right).all()
    assert (both[50:, :30] == 255).all()
    assert both.shape[0] == 70
    assert 70 < both.shape[1] < 80


@pytest.mark.parametrize("shape", [(100, 100), (400, 30), (30, 400), (4000, 7), (240, 240)])
def test_an_image_and_its_mask_fit_the_same_size_and_a_thin_mask_survives(shape: tuple[int, int]) -> None:
    mask = np.zeros(shape, dtype=bool)
    mask[:, shape[1] // 2] = True
    image = draw.fit(picture(*shape), 240, 240)
    fitted = draw.fit_mask(mask, 240, 240)
    assert image.shape[:2] == fitted.shape
    assert max(fitted.shape) == 240
    assert fitted.any(axis=1).all()


@settings(max_examples=100, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 400), st.integers(1, 400)),
    box=st.tuples(st.integers(0, 399), st.integers(0, 399), st.integers(1, 60), st.integers(1, 60)),
    most=st.integers(1, 60),
    seed=st.integers(0, 99),
)
def test_an_rle_shrinks_to_every_cell_that_its_mask_touches(
    shape: tuple[int, int], box: tuple[int, int, int, int], most: int, seed: int
) -> None:
    mask = np.zeros(shape, dtype=bool)
    window = mask[box[0] : box[0] + box[2], box[1] : box[1] + box[3]]
    window[:] = np.random.default_rng(seed).random(window.shape) > 0.8
    if not mask.any():
        return
    width, height = min(most, shape[1]), min(most, shape[0])
    found = draw.fit_rle(to_rle(mask), width, height)
    rows, columns = found.shape
    assert found.shape == draw.fit_mask(mask, width, height).shape
    expected = np.zeros_like(found)
    for y, x in zip(*np.nonzero(mask), strict=True):
        down, across = (
            slice(at * few // many, -(-(at + 1) * few // many))
            for at, few, many in ((y, rows, shape[0]), (x, columns, shape[1]))
        )
        expected[down, across] = True
    assert (found == expected).all()


def test_a_contact_sheet_shows_all_images_in_cells_of_one_size() -> None:
    images = [np.full((height, width, 3), 90, np.uint8) for height, width in [(100, 100), (500, 100), (10, 900)]]
    befores = [image.copy() for image in images]
    sheet = draw.contact_sheet(images, 2, (96, 96))
    assert all((image == before).all() for image, before in zip(images, befores, strict=True))
    assert sheet.dtype == np.uint8
    assert sheet.shape == (2 * 96 + 3 * 4, 2 * 96 + 3 * 4, 3)
    assert (sheet[4:100, 4:100] == 90).all(), "a small image is not enlarged to its cell"
    assert (sheet[104:200, 104:200] == 255).all(), "the empty cell is not white"


def test_captions_of_a_contact_sheet_are_as_sharp_over_small_images_as_over_large_ones() -> None:
    small, large = np.full((50, 50, 3), 90, np.uint8), np.full((900, 900, 3), 90, np.uint8)
    sheet = draw.contact_sheet([small, large], 2, (240, 240), ["crack  1.png", "crack  1.png"])
    strip, gap = sheet.shape[0] - 240 - 20, 10
    first, second = sheet[gap : gap + strip, gap : gap + 240], sheet[gap : gap + strip, 2 * gap + 240 : 2 * gap + 480]
    assert strip > 11
    assert (first == second).all()
    assert (first < 100).any()
