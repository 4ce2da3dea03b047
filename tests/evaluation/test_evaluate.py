"""The stage `evaluate`: what it writes, what `--conf` acts on, what stops it."""

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
from helpers import names, network, patchwork, rows
from pycocotools.coco import COCO

from flawmask.coco import annotation, write_split
from flawmask.errors import FlawmaskError
from flawmask.evaluation import evaluate as stage
from flawmask.evaluation.config import EvaluateConfig
from flawmask.evaluation.evaluate import Evaluated, evaluate
from flawmask.images import read_image, write_png
from flawmask.model import checkpoint

SPEC = replace(helpers.SPEC, classes=("good", "defect"))
CATEGORIES = [{"id": 1, "name": "good"}, {"id": 2, "name": "defect"}]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    checkpoint.save(folder / "best.pt", network(SPEC), SPEC)
    return folder


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A split of three defective images and two good ones, of two sizes."""
    folder = tmp_path / "data"
    images, annotations = [], []
    for number, kind in enumerate(["crack", "good", "scratch", "good", "crack"], start=1):
        height, width = (60, 80) if number % 2 else (70, 50)
        name = f"{kind}_{number}.png"
        write_png(folder / "val" / "images" / name, patchwork(height, width, number))
        images.append({"id": number, "file_name": name, "width": width, "height": height, "defect_type": kind})
        mask = np.zeros((height, width), dtype=bool)
        if kind == "good":
            mask[:] = True
        else:
            mask[10:30, 10 : 12 + 5 * number] = True
        annotations.append(annotation(mask, id=number, image_id=number, category_id=1 if kind == "good" else 2))
    write_split(folder / "val", images, annotations, CATEGORIES)
    return folder


def run(run_dir: Path, dataset: Path, **settings: Any) -> Evaluated:
    settings = {"output_dir": dataset.parent / "out", "device": "cpu", **settings}
    return evaluate(EvaluateConfig(model=run_dir / "best.pt", dataset_dir=dataset, **settings))


def edit(dataset: Path, **changes: Any) -> None:
    path = dataset / "val" / "annotations.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_every_figure_is_written_under_the_name_that_users_know(run_dir: Path, dataset: Path) -> None:
    done = run(run_dir, dataset)
    metrics = json.loads((done.results_dir / "metrics.json").read_text())
    assert metrics == done.metrics
    promised = (
        "accuracy, precision, recall, f1_score, defect_detection_rate, composite_score, confidence, tp_defect, "
        "fp_defect, tn_good, fn_defect, total_images"
    ).split(", ")
    beyond = (
        "recall_by_type mask_ap mask_ap50 mask_ap75 box_ap box_ap50 box_ap75 mean_mask_iou seconds_per_image".split()
    )
    settings = "conf min_area split dataset model".split()
    assert set(metrics) == {*promised, *beyond, *settings}
    assert metrics["total_images"] == 5
    assert metrics["tp_defect"] + metrics["fn_defect"] == 3
    assert metrics["fp_defect"] + metrics["tn_good"] == 2
    assert set(metrics["recall_by_type"]) == {"crack", "scratch"}
    assert metrics["seconds_per_image"] > 0
    assert names(done.results_dir) == ["metrics.json", "overlays", "predictions.csv", "predictions.json"]


def test_the_predictions_are_coco_results_that_pycocotools_loads(run_dir: Path, dataset: Path) -> None:
    done = run(run_dir, dataset)
    results = json.loads((done.results_dir / "predictions.json").read_text())
    assert len(results) > 10
    assert min(one["score"] for one in results) < 0.5
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(dataset / "val" / "annotations.json"))
        loaded = truth.loadRes(str(done.results_dir / "predictions.json"))
    assert len(loaded.getAnnIds()) == len(results)
    sizes = {image["id"]: [image["height"], image["width"]] for image in truth.dataset["images"]}
    assert all(one["segmentation"]["size"] == sizes[one["image_id"]] for one in results)


def test_conf_acts_on_verdicts_table_and_confidence_and_not_on_the_predictions_and_ap(
    run_dir: Path, dataset: Path
) -> None:
    low = run(run_dir, dataset, conf=0.05)
    low_rows, predictions = (
        rows(low.results_dir / "predictions.csv"),
        (low.results_dir / "predictions.json").read_bytes(),
    )
    high = run(run_dir, dataset, conf=1.0)
    assert (high.results_dir / "predictions.json").read_bytes() == predictions
    assert [row["score"] for row in rows(high.results_dir / "predictions.csv")] == [row["score"] for row in low_rows]
    assert {row["verdict"] for row in low_rows} == {"defect"}
    assert {row["verdict"] for row in rows(high.results_dir / "predictions.csv")} == {"good"}
    assert {row["instances"] for row in rows(high.results_dir / "predictions.csv")} == {"0"}
    assert {row["defect_area_px"] for row in rows(high.results_dir / "predictions.csv")} == {"0"}
    assert (low.metrics["recall"], high.metrics["recall"]) == (1.0, 0.0)
    assert high.metrics["confidence"] is None
    scores = [one["score"] for one in json.loads(predictions)]
    assert low.metrics["confidence"] == pytest.approx(np.mean(scores))
    assert low.metrics["mask_ap"] == high.metrics["mask_ap"]
    assert (low.metrics["mean_mask_iou"], high.metrics["mean_mask_iou"]) == (pytest.approx(0.2, abs=0.2), 0.0)


def test_the_table_has_a_line_an_image_that_agrees_with_the_figures(run_dir: Path, dataset: Path) -> None:
    done = run(run_dir, dataset, conf=0.6)
    table = rows(done.results_dir / "predictions.csv")
    assert [(row["file"], row["defect_type"], row["truth"]) for row in table] == [
        ("crack_1.png", "crack", "defect"),
        ("good_2.png", "good", "good"),
        ("scratch_3.png", "scratch", "defect"),
        ("good_4.png", "good", "good"),
        ("crack_5.png", "crack", "defect"),
    ]
    assert sum(row["truth"] == row["verdict"] for row in table) == 5 * done.metrics["accuracy"]
    for row in table:
        assert (float(row["score"]) >= 0.6) == (row["verdict"] == "defect") == (int(row["instances"]) > 0)
        assert float(row["defect_area_percent"]) == pytest.approx(
            100 * int(row["defect_area_px"]) / (4800 if "_1" in row["file"] or row["file"][-5] in "35" else 3500),
            abs=1e-4,
        )


def test_min_area_acts_on_the_verdict(run_dir: Path, dataset: Path) -> None:
    assert run(run_dir, dataset, conf=0.05).metrics["recall"] == 1.0
    assert run(run_dir, dataset, conf=0.05, min_area=10**6).metrics["recall"] == 0.0


def test_pictures_are_named_by_rank_and_the_worst_come_first(run_dir: Path, dataset: Path) -> None:
    done = run(run_dir, dataset, conf=0.05)
    order = names(done.results_dir / "overlays")
    assert [name[:3] for name in order] == ["001", "002", "003", "004", "005"]
    scores = {row["file"]: float(row["score"]) for row in rows(done.results_dir / "predictions.csv")}
    wrong = sorted(("good_2.png", "good_4.png"), key=lambda name: -scores[name])
    right = sorted(("crack_1.png", "scratch_3.png", "crack_5.png"), key=lambda name: scores[name])
    assert [name[4:] for name in order] == [f"false_alarm_{name}" for name in wrong] + [
        f"right_{name}" for name in right
    ]
    missed = names(run(run_dir, dataset, conf=1.0).results_dir / "overlays")
    assert [name[4:10] for name in missed[:3]] == ["missed"] * 3


def test_pictures_of_small_images_are_large_enough_to_read_and_no_more_are_drawn_than_asked(
    run_dir: Path, dataset: Path
) -> None:
    folder = run(run_dir, dataset, overlays=2).results_dir / "overlays"
    assert len(names(folder)) == 2
    for path in folder.iterdir():
        height, width = read_image(path).shape[:2]
        assert height > 400
        assert 800 <= width <= 1600
    assert names(run(run_dir, dataset, overlays=0).results_dir / "overlays") == []


def test_results_go_beside_the_checkpoint_or_into_the_run_named(run_dir: Path, dataset: Path) -> None:
    assert EvaluateConfig(model=run_dir / "best.pt", dataset_dir=dataset).results_dir == run_dir / "inference_val"
    config = EvaluateConfig(model=run_dir / "best.pt", dataset_dir=dataset, output_dir=run_dir, split="train")
    assert config.results_dir == run_dir / "inference_train"
    assert run(run_dir, dataset, output_dir=run_dir).results_dir == run_dir / "inference_val"
    assert (run_dir / "best.pt").is_file()


def test_earlier_results_are_replaced_whole(run_dir: Path, dataset: Path) -> None:
    done = run(run_dir, dataset)
    (done.results_dir / "overlays" / "999_old.png").touch()
    (done.results_dir / ".DS_Store").touch()
    run(run_dir, dataset, overlays=1)
    assert len(names(done.results_dir / "overlays")) == 1
    assert ".DS_Store" not in names(done.results_dir)
    assert names(dataset.parent) == ["data", "out"]


def test_earlier_results_with_a_strange_file_among_them_are_refused_and_left(run_dir: Path, dataset: Path) -> None:
    done = run(run_dir, dataset)
    (done.results_dir / "thesis.txt").touch()
    with pytest.raises(FlawmaskError, match=r"holds something else \(thesis\.txt\)"):
        run(run_dir, dataset)
    assert "thesis.txt" in names(done.results_dir)


def test_a_folder_that_holds_something_else_is_refused_and_left(run_dir: Path, dataset: Path) -> None:
    out = dataset.parent / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(FlawmaskError, match="out holds something else"):
        run(run_dir, dataset)
    assert names(out) == ["thesis.txt"]


def test_a_failure_on_the_way_leaves_the_earlier_results(
    run_dir: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run(run_dir, dataset)
    before = (done.results_dir / "metrics.json").read_bytes()

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stage, "_draw_worst", full_disk)
    with pytest.raises(OSError, match="No space"):
        run(run_dir, dataset, conf=0.9)
    assert (done.results_dir / "metrics.json").read_bytes() == before
    assert names(dataset.parent) == ["data", "out"]


def nothing_written(run_dir: Path, dataset: Path, says: str, **settings: Any) -> None:
    with pytest.raises(FlawmaskError, match=says) as caught:
        run(run_dir, dataset, **settings)
    assert "\n" not in str(caught.value)
    assert not (dataset.parent / "out").exists()


def test_a_number_of_classes_that_is_not_the_models_is_refused(run_dir: Path, dataset: Path) -> None:
    nothing_written(run_dir, dataset, "--num_classes is 3, but .*best.pt has 2: good, defect", num_classes=3)
    run(run_dir, dataset, num_classes=2)


def test_data_of_other_classes_is_refused(run_dir: Path, dataset: Path) -> None:
    edit(dataset, categories=[{"id": 1, "name": "good"}, {"id": 2, "name": "crack"}])
    nothing_written(run_dir, dataset, "knows the classes good, defect, but .*data has good, crack")


def test_an_image_of_another_size_than_its_record_is_refused(run_dir: Path, dataset: Path) -> None:
    write_png(dataset / "val" / "images" / "crack_1.png", patchwork(61, 80, 1))
    nothing_written(run_dir, dataset, r"crack_1\.png is 80x61 but its record says 80x60")


def test_a_truncated_image_is_refused(run_dir: Path, dataset: Path) -> None:
    path = dataset / "val" / "images" / "crack_1.png"
    path.write_bytes(path.read_bytes()[:-40])
    nothing_written(run_dir, dataset, r"crack_1\.png cannot be read as an image")


def test_an_image_that_is_not_there_is_refused(run_dir: Path, dataset: Path) -> None:
    (dataset / "val" / "images" / "crack_1.png").unlink()
    nothing_written(run_dir, dataset, r"crack_1\.png")


def test_an_unknown_category_is_refused(run_dir: Path, dataset: Path) -> None:
    edit(dataset, categories=[{"id": 2, "name": "defect"}])
    nothing_written(run_dir, dataset, "has category 1, which is not listed")


def test_a_split_that_is_not_there_is_refused_with_those_that_are(run_dir: Path, dataset: Path) -> None:
    nothing_written(run_dir, dataset, "data has no split test: it holds val", split="test")


def test_a_data_set_without_types_is_judged_all_the_same(run_dir: Path, dataset: Path) -> None:
    content = json.loads((dataset / "val" / "annotations.json").read_text())
    edit(dataset, images=[{k: v for k, v in image.items() if k != "defect_type"} for image in content["images"]])
    assert run(run_dir, dataset).metrics["recall_by_type"]["unknown"]["images"] == 3


def test_images_without_annotations_are_good(run_dir: Path, dataset: Path) -> None:
    edit(dataset, annotations=[])
    metrics = run(run_dir, dataset, conf=1.0).metrics
    assert (metrics["tn_good"], metrics["accuracy"], metrics["recall"], metrics["mask_ap"]) == (5, 1.0, None, None)
