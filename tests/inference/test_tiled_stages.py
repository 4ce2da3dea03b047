"""Tiles in `predict`, `Predictor` and their settings: results, memory that does not grow, warnings, and bad input."""

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from oracle import Oracle, image_of, numbered, spec_for
from random_network import SPEC, network, patchwork

from flawmask import strips
from flawmask.errors import FlawmaskError, ImageError
from flawmask.images import read_image, read_mask, write_png
from flawmask.inference.backend import detect
from flawmask.inference.config import InferenceSettings, PredictConfig
from flawmask.inference.predict import predict
from flawmask.inference.predictor import Predictor, load
from flawmask.inference.stream import NetworkOutput, predict_all
from flawmask.model import checkpoint
from flawmask.prediction import Prediction, RawDetections
from flawmask.strips import opened

pytestmark = pytest.mark.usefixtures("small_network")

TILED = replace(SPEC, tile=64, overlap=16)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same network as trained on whole images and as trained on tiles."""
    folder = tmp_path_factory.mktemp("runs")
    paths = {"whole": folder / "whole" / "best.pt", "tiles": folder / "tiles" / "best.pt"}
    for path, spec in zip(paths.values(), (SPEC, TILED), strict=True):
        path.parent.mkdir()
        checkpoint.save(path, network(SPEC), spec)
    return paths


@pytest.fixture
def in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyvips", reason='pyvips is not installed: pip install "flawmask[large]"')
    monkeypatch.setattr(strips, "MIN_PIXELS", 1)
    monkeypatch.setattr(strips, "ROWS", 16)


def scratched(height: int, width: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    canvas = np.zeros((height, width), np.uint8)
    cv2.line(canvas, (3, 5), (width - 9, height - 4), 1, 1)
    cv2.circle(canvas, (width - 30, 20), 9, 1, -1)
    return numbered(canvas > 0)


def finish(_: Any, output: NetworkOutput | FlawmaskError) -> Prediction | FlawmaskError:
    return output if isinstance(output, FlawmaskError) else output.prediction(spec_for(64, 16))


def test_a_stream_of_images_gives_the_result_of_each_in_order_whatever_its_size(tmp_path: Path) -> None:
    pictures = [image_of(scratched(*size)) for size in ((200, 150), (64, 64), (30, 400), (90, 100))]
    found = list(predict_all(Oracle(spec_for(64, 16)), pictures, lambda one: one, finish, batch_size=5))
    assert found == [detect(Oracle(spec_for(64, 16)), one) for one in pictures]


@pytest.mark.usefixtures("in_strips")
def test_an_image_read_in_strips_has_the_result_of_the_whole_image_and_errors_stay_with_their_image(
    tmp_path: Path,
) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for number, path in enumerate(paths):
        write_png(path, image_of(scratched(200 + 10 * number, 150)))
    paths[1].write_bytes(paths[1].read_bytes()[:-300])
    paths[2].write_bytes(b"no image")

    def read(path: Path) -> Any:
        return opened(path) or read_image(path)

    results = list(predict_all(Oracle(spec_for(64, 16)), paths, read, finish))
    assert [type(one) for one in results] == [Prediction, ImageError, ImageError, Prediction]
    for path, result in zip(paths, results, strict=True):
        if isinstance(result, Prediction):
            assert result == detect(Oracle(spec_for(64, 16)), read_image(path))
        else:
            assert path.name in str(result)


def test_coarse_tiles_are_those_where_the_whole_image_shows_something() -> None:
    numbers = np.zeros((640, 640), np.int32)
    numbers[20:60, 20:60], numbers[500:540, 300:340] = 1, 2
    every, coarse = Oracle(spec_for(64, 16)), Oracle(spec_for(64, 16, tile_from="coarse"))
    assert detect(coarse, image_of(numbers)) == detect(every, image_of(numbers))
    assert every.seen == 13 * 13
    assert coarse.seen <= 1 + 9 + 9
    nothing = Oracle(spec_for(64, 16, tile_from="coarse"))
    assert len(detect(nothing, np.zeros((640, 640, 3), np.uint8))) == 0
    assert nothing.seen == 1


def test_coarse_tiles_allow_for_the_larger_side_of_a_pixel_of_a_stretched_image() -> None:
    """SSD makes all images square. A pixel of the small picture of a wide image is then wide, not high."""

    class Marked(Oracle):
        def infer(self, batch: Any, /) -> Any:
            if self.seen:
                return super().infer(batch)
            self.seen = 1
            box = np.array([[66, 10, 67, 11]], np.float32)
            return [RawDetections(box, np.array([2]), np.array([0.9], np.float32))]

    spec = spec_for(64, 16, tile_from="coarse", arch="ssd300_vgg16")
    assert spec.resized(64, 6400) == (300, 300)
    network = Marked(spec)  # a pixel is 21 wide: the defect may lie at 45, which only the first tile holds whole
    numbers = np.zeros((64, 6400), np.int32)
    numbers[10:12, 44:46] = 1
    prediction = detect(network, image_of(numbers))
    assert network.seen == 1 + 2
    assert len(prediction) == 1


@pytest.mark.usefixtures("in_strips")
def test_predict_writes_the_same_for_an_image_read_in_strips(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_png(tmp_path / "parts" / "a.png", patchwork(300, 260))
    monkeypatch.setattr(strips, "LONGEST_SIDE", 2000)  # then the shrunk picture is the image itself
    outputs = {}
    for name, at_least in (("strips", 1), ("whole", 10**9)):
        monkeypatch.setattr(strips, "MIN_PIXELS", at_least)
        config = PredictConfig(
            model=models["tiles"],
            input=(str(tmp_path / "parts"),),
            output_dir=tmp_path / name,
            device="cpu",
            conf=0.3,
            save_masks=True,
        )
        predict(config)
        outputs[name] = tmp_path / name
    records = {name: json.loads((path / "predictions.json").read_text()) for name, path in outputs.items()}
    assert records["strips"] == records["whole"]
    assert [records["strips"][name] for name in ("tile", "overlap", "tile_from")] == [64, 16, "all"]
    assert records["strips"]["images"][0]["instances"]
    for name in ("overlays/a.png", "masks/a.png"):
        assert np.array_equal(read_image(outputs["strips"] / name), read_image(outputs["whole"] / name))
    assert read_mask(outputs["strips"] / "masks" / "a.png").any()


@pytest.mark.usefixtures("in_strips")
def test_a_predictor_reads_large_files_in_strips_and_then_keeps_no_image(
    models: dict[str, Path], tmp_path: Path
) -> None:
    write_png(tmp_path / "a.png", patchwork(200, 150))
    predictor = Predictor(models["tiles"], "cpu")
    (streamed,) = predictor.predict([tmp_path / "a.png"])
    single = predictor(tmp_path / "a.png")
    whole = predictor(read_image(tmp_path / "a.png"))
    assert streamed == single == whole
    assert streamed.image is None and single.image is None and whole.image is not None


@pytest.mark.parametrize(
    ("model", "given", "expected", "warned"),
    [
        ("whole", {}, (None, 0), ""),
        ("whole", {"tile": "auto"}, (None, 0), ""),
        ("whole", {"tile": 96}, (96, 12), "was trained on whole images and is used on tiles of 96 pixels"),
        ("tiles", {}, (64, 16), ""),
        ("tiles", {"tile": "auto", "overlap": 20}, (64, 20), ""),
        ("tiles", {"tile": 64}, (64, 16), ""),
        ("tiles", {"tile": 96, "overlap": 24}, (96, 24), "trained on tiles of 64 pixels and is used on tiles of 96"),
        ("tiles", {"tile": "off"}, (None, 0), "was trained on tiles of 64 pixels and is used on whole images"),
    ],
)
def test_the_checkpoint_keeps_its_tiles_and_a_warning_says_what_other_tiles_change(
    models: dict[str, Path],
    caplog: pytest.LogCaptureFixture,
    model: str,
    given: dict[str, Any],
    expected: tuple[int | None, int],
    warned: str,
) -> None:
    with caplog.at_level(logging.WARNING):
        spec = load(models[model], InferenceSettings(device="cpu", **given)).spec
    assert (spec.tile, spec.overlap) == expected
    assert bool(caplog.records) == bool(warned)
    assert warned in caplog.text
    if warned:
        assert "Figures, threshold and calibration of its training do not hold" in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tile": 10}, "--tile is 10: it must be 32 to 65536"),
        ({"tile": "half"}, "--tile is half: it must be off, auto or a number of pixels"),
        ({"tile": 64, "overlap": 33}, "--overlap is 33: it must be 1 to 32, half of the tile of 64 pixels"),
        ({"tile": 64, "overlap": 65}, "--overlap is 65: it must be 1 to 32"),
        ({"tile": 64, "overlap": 0}, "--overlap is 0: it must be auto or a number of pixels"),
        ({"tile": "off", "overlap": 8}, "leave it out with --tile off"),
        ({"tile": "off", "tile_from": "coarse"}, "--tile_from coarse is for tiles"),
        ({"tile_from": "fine"}, "--tile_from is fine: it must be all or coarse"),
    ],
)
def test_settings_of_tiles_that_do_not_fit_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(FlawmaskError, match=re.escape(message)):
        InferenceSettings(**given)


@pytest.mark.parametrize("given", [{"tile_from": "coarse"}, {"overlap": 8}])
def test_settings_of_tiles_without_tiles_are_refused(models: dict[str, Path], given: dict[str, Any]) -> None:
    with pytest.raises(FlawmaskError, match="was trained on whole images: give the side of tiles with --tile"):
        load(models["whole"], InferenceSettings(device="cpu", **given))
    with pytest.raises(FlawmaskError, match="half of the tile of 64"):
        load(models["tiles"], InferenceSettings(device="cpu", overlap=40))


@pytest.mark.parametrize("at_least", [1, 10**9])
def test_images_that_are_smaller_than_a_tile_are_counted_also_if_they_are_read_in_strips(
    models: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    at_least: int,
) -> None:
    monkeypatch.setattr(strips, "MIN_PIXELS", at_least)
    for name, size in (("a.png", (50, 64)), ("b.png", (50, 65)), ("c.png", (100, 100))):
        write_png(tmp_path / "parts" / name, patchwork(*size))
    predict(PredictConfig(model=models["tiles"], input=(str(tmp_path / "parts"),), output_dir=tmp_path / "out"))
    assert "2 of 3 images of --input are smaller than a tile of 64 pixels in height or width" in caplog.text


def test_instances_of_a_padded_tile_stay_inside_the_image(models: dict[str, Path]) -> None:
    for prediction in Predictor(models["tiles"], "cpu", score_floor=0.0).predict(
        [patchwork(40, 50), patchwork(30, 90)]
    ):
        assert len(prediction)
        assert (prediction.boxes[:, 2] <= prediction.width).all() and (
            prediction.boxes[:, 3] <= prediction.height
        ).all()
        assert prediction.score_map().shape == (prediction.height, prediction.width)
