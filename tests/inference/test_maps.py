"""Maps of scores: those of tiles become one, and only a region of interest counts."""

import numpy as np
import numpy.typing as npt
import pytest

from flawmask.inference import maps
from flawmask.tiles import Tiling

Floats = npt.NDArray[np.float32]


def ramps(height: int, width: int, rows: int, columns: int, y: float, x: float) -> Floats:
    """Return two linear functions of the place at the centres of a grid over a part of an image."""
    down = y + (np.arange(rows) + 0.5) * height / rows
    across = x + (np.arange(columns) + 0.5) * width / columns
    both = [0.001 * down[:, None] + 0.0003 * across, 0.5 - 0.0002 * down[:, None] - 0.0004 * across]
    return np.array(both, dtype=np.float32)


@pytest.mark.parametrize(("height", "width"), [(300, 420), (301, 333), (128, 640), (129, 131)])
def test_the_maps_of_tiles_become_that_of_the_image(height: int, width: int) -> None:
    seen = [(one, ramps(128, 128, 16, 16, one.y, one.x)) for one in Tiling(128, 40).windows(height, width)]
    found = maps.of_tiles(seen, 128, height, width)
    assert found.shape == (2, round(height / 8), round(width / 8))
    expected = ramps(height, width, *found.shape[1:], 0, 0)
    # At the edge of a tile, the outermost cells go on, by at most a cell.
    np.testing.assert_allclose(found[:, 1:-1, 1:-1], expected[:, 1:-1, 1:-1], atol=8 * (0.001 + 0.0003))
    middle = maps.of_tiles([(one, tile) for one, tile in seen if one.x == one.y == 0], 128, height, width)
    np.testing.assert_allclose(middle[:, 1:14, 1:14], expected[:, 1:14, 1:14], atol=1e-4)
    assert (middle[:, 18:] == 0).all(), "no tile covers it"


def test_a_small_image_has_the_part_of_the_map_that_is_not_padding() -> None:
    (window,) = Tiling(128, 16).windows(40, 96)
    found = maps.of_tiles([(window, ramps(128, 128, 16, 16, 0, 0))], 128, 40, 96)
    np.testing.assert_allclose(found, ramps(40, 96, 5, 12, 0, 0), atol=1e-5)


def test_the_highest_value_of_any_tile_is_kept() -> None:
    tiling = Tiling(64, 32)
    seen = [(one, np.zeros((1, 16, 16), np.float32)) for one in tiling.windows(200, 200)]
    seen[4][1][0, 10, 3] = 0.9
    found = maps.of_tiles(seen, 64, 200, 200)
    window = seen[4][0]
    row, column = np.unravel_index(found[0].argmax(), found[0].shape)
    assert found.max() == pytest.approx(0.9, abs=1e-3)
    assert (row, column) == (window.y // 4 + 10, window.x // 4 + 3)


def test_cells_outside_of_a_region_are_0() -> None:
    region = np.zeros((40, 60), dtype=bool)
    region[12:20, 30:31] = True
    found = maps.within(np.ones((2, 10, 15), np.float32), region)
    assert (np.argwhere(found[0]) == [[3, 7], [4, 7]]).all()
    assert (found[1] == found[0]).all()
