"""`evaluate --predictions`: the figures of stored predictions are those of the network."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from files_read_back import rows
from patchy_split import SPEC, run
from random_network import network, spec_of

from flawmask.errors import FlawmaskError
from flawmask.evaluation.config import EvaluateConfig
from flawmask.evaluation.evaluate import Evaluated, evaluate
from flawmask.evaluation.summary import summary
from flawmask.images import read_image, write_png
from flawmask.inference import calibration
from flawmask.inference.archive import predict_records
from flawmask.inference.calibration import Calibration
from flawmask.inference.config import PredictConfig
from flawmask.model import checkpoint
from flawmask.model.spec import ModelSpec
from flawmask.report.report import write_report

pytestmark = pytest.mark.usefixtures("undrawn", "small_network")

NEED_MAPS = {"pixel_auroc", "pixel_ap", "pixel_aupro", "pixel_aupro_05", "pixel_f1_max", "pixel_f1_max_threshold"}
OF_THE_RUN = {"seconds", "seconds_per_image", "notes", "calibration", "predictions", "threshold", "model"}


def store(run_dir: Path, dataset: Path, **settings: Any) -> Path:
    settings = {"records": "parquet", "rows_per_part": 2, "output_dir": dataset.parent / "rows", **settings}
    images = (str(dataset / "val" / "images"),)
    predict_records(PredictConfig(model=run_dir / "best.pt", input=images, device="cpu", **settings))
    return Path(settings["output_dir"])


def stored(predictions: Path, dataset: Path, **settings: Any) -> Evaluated:
    settings = {"output_dir": dataset.parent / "stored", **settings}
    return evaluate(EvaluateConfig(predictions=predictions, dataset_dir=dataset, **settings))


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_rows_give_the_figures_of_the_network_to_the_last_digit(run_dir: Path, dataset: Path, form: Any) -> None:
    expected = run(run_dir, dataset, conf=0.6, min_area=20)
    done = stored(store(run_dir, dataset, records=form), dataset, conf=0.6, min_area=20)
    assert_same(done, expected)
    (note,) = [note for note in done.metrics["notes"] if "no score maps" in note]
    assert f"Note: {note}" in summary(done.metrics)


@pytest.mark.parametrize("spec", [replace(SPEC, tile=32, overlap=8), spec_of("maskrcnn_efficientnet_lite0_fpn")])
def test_rows_of_tiles_and_of_scored_pixels_give_the_figures_of_the_network(
    dataset: Path, spec: ModelSpec, tmp_path: Path
) -> None:
    spec = replace(spec, classes=SPEC.classes)
    checkpoint.save(tmp_path / "run" / "best.pt", network(spec), spec)
    expected = run(tmp_path / "run", dataset, conf=0.6)
    done = stored(store(tmp_path / "run", dataset), dataset, conf=0.6)
    assert_same(done, expected)
    assert [done.metrics[name] for name in spec.tiles_as_json] == list(spec.tiles_as_json.values())


def assert_same(done: Evaluated, expected: Evaluated) -> None:
    names = expected.metrics.keys() - OF_THE_RUN - NEED_MAPS - {"intervals", "interval_method", "model_sha256"}
    if done.metrics["predictions"].endswith(".json"):  # a file in COCO's format names no model
        names -= {"join", "tile", "overlap", "tile_from", "intensity"}
    assert {name: done.metrics[name] for name in names} == {name: expected.metrics[name] for name in names}
    assert {done.metrics[name] for name in NEED_MAPS} == {None}
    for name in ("intervals", "interval_method"):
        known = {key: value for key, value in expected.metrics[name].items() if key not in NEED_MAPS}
        assert done.metrics[name] == known
    of_network, of_stored = (rows(one.results_dir / "predictions.csv") for one in (expected, done))
    assert of_stored == of_network
    curves, others = (json.loads((one.results_dir / "curves.json").read_text()) for one in (expected, done))
    assert others == {name: curve for name, curve in curves.items() if name not in ("pixel_roc", "pixel_pr", "pro")}
    results, same = (json.loads((one.results_dir / "predictions.json").read_text()) for one in (expected, done))
    assert same == results


def test_predictions_of_an_earlier_evaluation_give_its_figures(run_dir: Path, dataset: Path) -> None:
    expected = run(run_dir, dataset, conf=0.6)
    assert_same(stored(expected.results_dir / "predictions.json", dataset, conf=0.6), expected)


def test_the_records_of_a_file_may_be_in_any_order(run_dir: Path, dataset: Path) -> None:
    expected = run(run_dir, dataset, conf=0.6)
    records = json.loads((expected.results_dir / "predictions.json").read_text())
    mixed = dataset.parent / "mixed.json"
    mixed.write_text(json.dumps([*records[::2], *records[1::2]]))
    assert_same(stored(mixed, dataset, conf=0.6), expected)


def test_shards_are_evaluated_together_in_the_splits_order(run_dir: Path, dataset: Path) -> None:
    expected = run(run_dir, dataset, conf=0.6)
    for number in (1, 2):
        folder = store(run_dir, dataset, shard=f"{number}/2")
    assert_same(stored(folder, dataset, conf=0.6), expected)


def test_what_does_not_belong_together_is_refused(run_dir: Path, dataset: Path) -> None:
    folder = store(run_dir, dataset)
    (part, *_) = sorted(folder.glob("part-*"))
    kept = part.read_bytes()
    part.unlink()
    with pytest.raises(FlawmaskError, match="has 2 of 3 parts"):
        stored(folder, dataset)
    part.write_bytes(b"no rows")
    with pytest.raises(FlawmaskError, match="is no part that flawmask predict --records wrote"):
        stored(folder, dataset)
    part.write_bytes(kept)
    (dataset / "val" / "images" / "crack_1.png").rename(dataset / "crack_1.png")
    other = store(run_dir, dataset, output_dir=dataset.parent / "fewer")
    (dataset / "crack_1.png").rename(dataset / "val" / "images" / "crack_1.png")
    with pytest.raises(FlawmaskError, match="has no row for 1 of 5 images"):
        stored(other, dataset)
    with pytest.raises(FlawmaskError, match=r"holds no records\.json"):
        stored(dataset, dataset)
    assert not (dataset.parent / "stored").exists()


def test_images_without_a_verdict_are_refused_or_left_out_and_said(run_dir: Path, dataset: Path) -> None:
    path = dataset / "val" / "images" / "crack_1.png"
    kept = path.read_bytes()
    path.write_bytes(b"no image")
    folder = store(run_dir, dataset)
    path.write_bytes(kept)
    with pytest.raises(FlawmaskError, match=r"1 of 5 images have no verdict, for example crack_1\.png"):
        stored(folder, dataset)
    done = stored(folder, dataset, on_error="skip")
    assert done.metrics["total_images"] == 4
    assert any("1 images without a verdict were left out" in note for note in done.metrics["notes"])
    pages = [(done.results_dir / "report.html").read_text()]
    write_report(done.results_dir)
    pages.append((done.results_dir / "report.html").read_text())
    for page in pages:
        assert '"file":"crack_5.png"' in page
        assert '"file":"crack_1.png"' not in page


def test_a_calibration_holds_on_other_splits_for_the_min_area_that_it_was_fitted_with(
    dataset: Path, tmp_path: Path
) -> None:
    checkpoint.save(tmp_path / "run" / "best.pt", network(SPEC), SPEC)
    calibration.save(Calibration(1.5, -0.5, "val", 9, 9, 3), tmp_path / "run" / "best.pt")
    shutil.copytree(dataset / "val", dataset / "test")
    expected = run(tmp_path / "run", dataset, conf=0.6, min_area=3, split="test")
    folder = store(tmp_path / "run", dataset, min_area=3)
    done = stored(folder, dataset, conf=0.6, min_area=3, split="test")
    assert expected.metrics["ece_calibrated"] is not None
    assert_same(done, expected)
    other = stored(folder, dataset, conf=0.6, split="test")
    assert "ece_calibrated" not in other.metrics


def test_what_predict_left_out_is_refused_or_said(run_dir: Path, dataset: Path) -> None:
    high = store(run_dir, dataset, score_floor=0.4, output_dir=dataset.parent / "high")
    with pytest.raises(FlawmaskError, match=r"lacks instances with a score up to 0\.4, so --conf 0\.3"):
        stored(high, dataset, conf=0.3)
    assert stored(high, dataset, conf=0.4).metrics["total_images"] == 5
    first = min((dataset / "val" / "images").glob("*.png"))
    write_png(dataset / "roi.png", np.full(read_image(first).shape[:2], 255, np.uint8))
    cut = store(run_dir, dataset, roi=dataset / "roi.png", output_dir=dataset.parent / "cut")
    done = stored(cut, dataset, on_error="skip")
    assert any("are cut to" in note for note in done.metrics["notes"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": Path("best.pt")}, "give the checkpoint with --model, or stored predictions"),
        ({"predictions": None}, "give the checkpoint with --model, or stored predictions"),
        ({"conf": "auto"}, "--conf auto needs the checkpoint"),
        ({"against": Path("run")}, "--against needs --model"),
        ({"tile": 512}, "--tile needs --model"),
        ({"score_floor": 0.3}, "--score_floor needs --model"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FlawmaskError, match=message):
        EvaluateConfig(**{"dataset_dir": Path("data"), "predictions": Path("rows"), **settings})
