"""The images that an export is calibrated with, and the odd ones of its proof."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from data_to_export import data_set
from random_network import SPEC, patchwork, random_network

from flawmask import images
from flawmask.coco import CocoSplit, read_split, write_split
from flawmask.export.config import ExportConfig
from flawmask.export.export import export
from flawmask.export.int8 import _calibration_image, _places
from flawmask.export.parity import LARGEST, _Limits, _odd, odd_images
from flawmask.inference.torch_backend import TorchBackend
from flawmask.model import checkpoint

TILED = replace(SPEC, norm="frozen", tile=32, overlap=4)


@pytest.fixture
def split(tmp_path: Path) -> CocoSplit:
    """The training images of a small data set, of 60 x 80 pixels."""
    return read_split(data_set(tmp_path / "data"), "train")


def with_image(folder: Path, pixels: np.ndarray) -> CocoSplit:
    """Return a split of one image."""
    images.write_png(folder / "train" / "images" / "one.png", pixels)
    record = {"id": 1, "file_name": "one.png", "width": pixels.shape[1], "height": pixels.shape[0]}
    write_split(folder / "train", [record], [], [{"id": 1, "name": "good"}, {"id": 2, "name": "crack"}])
    return read_split(folder, "train")


def test_a_network_that_sees_tiles_is_calibrated_on_tiles(split: CocoSplit) -> None:
    places = _places(split)
    assert places == list(range(8))
    corners = set()
    for place in places:
        whole = images.read_image(split.image_path(split.images[place]))
        (tile,) = _calibration_image(place, split, TILED)
        assert tile.shape == (32, 32, 3)
        windows = [whole[y : y + 32, x : x + 32] for y in range(29) for x in range(49)]
        (found,) = (at for at, one in enumerate(windows) if np.array_equal(one, tile))
        corners.add(found)
        (untiled,) = _calibration_image(place, split, SPEC)
        np.testing.assert_array_equal(untiled, whole)
    assert len(corners) > 1


def test_a_tile_of_a_smaller_image_is_padded(split: CocoSplit) -> None:
    (tile,) = _calibration_image(0, split, replace(TILED, tile=100))
    whole = images.read_image(split.image_path(split.images[0]))
    np.testing.assert_array_equal(tile[:60, :80], whole)
    assert not tile[60:].any()
    assert not tile[:, 80:].any()


def test_odd_images_of_16_bits_use_the_levels_of_the_training(tmp_path: Path) -> None:
    grey = patchwork(40, 50)[..., 0].astype(np.uint16)
    levels = (100, 4100)
    split = with_image(tmp_path, (100 + grey * 15).astype(np.uint16))
    seen = images.read_image(split.image_path(split.images[0]), levels)
    assert seen.max() > 200
    found = odd_images(split, replace(SPEC, intensity=levels))
    np.testing.assert_array_equal(found["odd sizes"][0], seen[:33, :47])
    (deep,) = found["16 bits"]
    assert np.abs(deep.astype(int) - seen).max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (5, 2), (28, 90), (1100, 1030)])
def test_no_odd_image_is_empty_or_larger_than_asked(size: tuple[int, int], tmp_path: Path) -> None:
    split = with_image(tmp_path, patchwork(*size))
    for spec, side in ((SPEC, LARGEST), (TILED, 48)):
        for several in odd_images(split, spec).values():
            assert all(min(one.shape) > 0 and max(one.shape[:2]) <= side for one in several)


@pytest.mark.usefixtures("small_network")
def test_odd_images_are_seen_in_tiles(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "best.pt", random_network(TILED), TILED)
    backend = TorchBackend.load(tmp_path / "best.pt", "cpu", precision="fp32")
    with patch.object(backend, "infer", wraps=backend.infer) as infer:
        report = _odd(backend, backend, [patchwork(40, 50)], _Limits(0.5, 0, 0.0))
    seen = [(one.height, one.width) for call in infer.call_args_list for one in call.args[0]]
    assert set(seen) == {(32, 32)}
    assert report["largest_score"] == 0


@pytest.mark.services
@pytest.mark.usefixtures("small_network")
def test_the_export_of_a_network_that_sees_tiles_is_proven(split: CocoSplit, tmp_path: Path) -> None:
    spec = replace(TILED, tile=64)
    checkpoint.save(tmp_path / "best.pt", random_network(spec), spec)
    config = ExportConfig(model=tmp_path / "best.pt", dataset_dir=split.folder.parent, resamples=0)
    content = export(config).parity
    assert content is not None
    assert content["failures"] == []
