"""Masks written row by row are those that the image reader reads."""

from pathlib import Path

import numpy as np
import pytest

from flawmask import png_rows
from flawmask.images import read_image, read_mask
from flawmask.masks import to_rle
from flawmask.png_rows import write_mask


@pytest.mark.parametrize("shape", [(1, 1), (9, 4), (10, 37), (25, 8)])
def test_a_mask_written_row_by_row_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    monkeypatch.setattr(png_rows, "ROWS", 5)
    mask = np.random.default_rng(3).random(shape) > 0.6
    write_mask(tmp_path / "mask.png", to_rle(mask))
    assert np.array_equal(read_mask(tmp_path / "mask.png"), mask)
    assert set(np.unique(read_image(tmp_path / "mask.png"))) <= {0, 255}
