"""Joining of what several tiles predict: worked out by hand."""

import numpy as np
import pytest

from flawmask.joining import across_tiles, repeats, same_defect
from flawmask.masks import Mask, to_rle
from flawmask.tiles import Window

HEIGHT, WIDTH = 10, 30
LEFT, RIGHT = Window(0, 0, 20, HEIGHT), Window(10, 0, 20, HEIGHT)  # they share the columns 10 to 19


def bar(first: int, last: int, top: int = 2, bottom: int = 4) -> Mask:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[top:bottom, first:last] = True
    return mask


def defects(*seen: tuple[Mask, Window, float], labels: str = "") -> tuple[list[list[int]], list[list[int]]]:
    """Return the predictions of each defect, and those that are left of them."""
    rles, tiles, scores = [to_rle(mask) for mask, _, _ in seen], [one[1] for one in seen], [one[2] for one in seen]
    classes = list(labels or "a" * len(seen))
    pairs = across_tiles(rles, classes, scores, tiles)
    found = same_defect(rles, classes, scores, pairs)
    left = [[at for at in one.tolist() if at not in repeats(scores, pairs)] for one in found]
    return [one.tolist() for one in found], left


def test_parts_on_both_sides_of_a_seam_are_one_defect_and_both_are_left() -> None:
    assert defects((bar(3, 20), LEFT, 0.7), (bar(10, 28), RIGHT, 0.9)) == ([[0, 1]], [[0, 1]])


def test_a_part_is_left_out_where_the_other_tile_shows_all_of_the_defect_whatever_the_scores() -> None:
    assert defects((bar(12, 20), LEFT, 0.9), (bar(12, 28), RIGHT, 0.6)) == ([[0, 1]], [[1]])
    assert defects((bar(3, 18), LEFT, 0.6), (bar(10, 18), RIGHT, 0.9)) == ([[0, 1]], [[0]])


def test_of_two_tiles_that_show_all_of_a_defect_the_higher_score_wins() -> None:
    assert defects((bar(12, 17), LEFT, 0.6), (bar(12, 18), RIGHT, 0.9)) == ([[0, 1]], [[1]])
    assert defects((bar(12, 17), LEFT, 0.9), (bar(12, 18), RIGHT, 0.6)) == ([[0, 1]], [[0]])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (bar(3, 20), bar(10, 28, 6, 8)),  # apart
        (bar(3, 20), bar(10, 28, 4, 6)),  # they touch
        (bar(3, 20), bar(18, 28, 3, 9)),  # they share a sixth of the smaller one in the overlap
        (bar(3, 9), bar(21, 28)),  # neither reaches the overlap
    ],
)
def test_masks_that_do_not_agree_in_the_overlap_are_different_defects(one: Mask, other: Mask) -> None:
    assert defects((one, LEFT, 0.9), (other, RIGHT, 0.9))[0] == [[0], [1]]


def test_predictions_of_one_tile_and_of_other_classes_are_not_compared() -> None:
    assert defects((bar(3, 20), LEFT, 0.9), (bar(3, 20), LEFT, 0.8))[0] == [[0], [1]]
    assert defects((bar(12, 17), LEFT, 0.9), (bar(12, 17), RIGHT, 0.8), labels="ab")[0] == [[0], [1]]


def test_two_ends_that_one_tile_shows_are_joined_by_the_tile_that_shows_them_as_one() -> None:
    bent = bar(12, 20, 1, 9)
    bent[3:7, 12:18] = False  # open to the left: the left tile shows two ends
    upper, lower = bent.copy(), bent.copy()
    upper[5:], lower[:5] = False, False
    upper[:, 18:] = lower[:, 18:] = False
    together, left = defects((upper, LEFT, 0.9), (lower, LEFT, 0.8), (bent, RIGHT, 0.7))
    assert together == [[0, 1, 2]]
    assert 2 in left[0]


def test_a_weak_mask_has_to_agree_better_because_it_may_cover_several_defects() -> None:
    small, wide = bar(12, 17), bar(11, 20, 1, 6)
    assert defects((small, LEFT, 0.9), (wide, RIGHT, 0.6))[0] == [[0, 1]]
    assert defects((small, LEFT, 0.9), (wide, RIGHT, 0.4))[0] == [[0], [1]]
    assert defects((small, LEFT, 0.3), (bar(12, 18), RIGHT, 0.2)) == ([[0, 1]], [[0]])


def test_without_predictions_there_is_no_defect() -> None:
    assert across_tiles([], [], [], []) == []
    assert same_defect([], [], [], []) == []
