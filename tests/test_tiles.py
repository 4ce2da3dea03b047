"""The grid of tiles: it covers each pixel, nothing else, and neighbours overlap as asked."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flawmask.errors import FlawmaskError
from flawmask.tiles import Tiling, Window, check_sizes, cut, padded, starts


@given(st.integers(1, 500), st.integers(32, 200), st.data())
def test_tiles_cover_a_side_overlap_enough_and_stay_inside(length: int, tile: int, data: st.DataObject) -> None:
    overlap, shift = data.draw(st.integers(1, tile // 2)), data.draw(st.integers(0, 300))
    places = starts(length, tile, overlap, shift)
    assert places == sorted(set(places))
    assert places[0] == 0 and places[-1] == max(0, length - tile)
    assert all(after - before <= tile - overlap for before, after in pairwise(places))


def test_a_shift_moves_the_inner_tiles_and_a_whole_step_changes_nothing() -> None:
    assert starts(100, 40, 10) == [0, 30, 60]
    assert starts(100, 40, 10, 10) == [0, 20, 50, 60]
    assert starts(100, 40, 10, 30) == starts(100, 40, 10)
    assert starts(40, 40, 10) == starts(7, 40, 10) == [0]


def test_tiles_of_a_small_image_are_cut_off_and_padded_with_black() -> None:
    image = np.full((20, 50, 3), 7, np.uint8)
    windows = Tiling(32, 8).windows(20, 50)
    assert windows == [Window(0, 0, 32, 20), Window(18, 0, 32, 20)]
    tile = padded(cut(image, windows[1]), 32)
    assert tile.shape == (32, 32, 3)
    assert (tile[:20] == 7).all() and not tile[20:].any()


def test_windows_share_what_both_hold() -> None:
    one = Window(0, 0, 10, 10)
    assert one.overlap(Window(8, 6, 10, 10)) == Window(8, 6, 2, 4)
    assert one.overlap(Window(10, 0, 5, 5)) is None
    assert one.overlap(one) == one


@pytest.mark.parametrize(
    ("size", "overlap", "message"),
    [
        (31, 8, "--tile is 31: it must be 32 to 65536"),
        (64, 0, "--overlap is 0: it must be 1 to 32"),
        (64, 33, "half of the tile"),
        (64, 80, "half of the tile of 64"),
    ],
)
def test_a_tile_and_an_overlap_that_do_not_fit_are_refused(size: int, overlap: int, message: str) -> None:
    with pytest.raises(FlawmaskError, match=message):
        Tiling(size, overlap)


def test_a_tile_larger_than_every_image_is_refused_and_smaller_images_are_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    check_sizes(Tiling(64, 8), [(64, 64), (63, 200), (200, 300)], "parts")
    assert "1 of 3 images of parts are smaller than a tile of 64 pixels in height or width" in caplog.text
    with pytest.raises(
        FlawmaskError, match=r"larger than every image of parts \(the largest is 63x40\): give at most 63"
    ):
        check_sizes(Tiling(64, 8), [(40, 63), (20, 30)], "parts")
    check_sizes(Tiling(64, 8), [(63, 200), (20, 30)], "parts")  # a line scan is longer than a tile
    assert "2 of 2 images" in caplog.text
    check_sizes(Tiling(64, 8), [(40, 63)], "parts", refuse=False)
    assert "1 of 1 images" in caplog.text
