"""The stage `evaluate`: the files that it writes, and the effect of `--conf`."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from files_read_back import names, rows
from patchy_split import CATEGORIES, SPEC, edit, run
from pycocotools.coco import COCO
from random_network import detect, network, patchwork
from report.test_report import words

from flawmask.coco import read_split, write_split
from flawmask.errors import FlawmaskError
from flawmask.evaluation import evaluate as stage
from flawmask.evaluation.config import EvaluateConfig
from flawmask.evaluation.evaluate import Evaluated, predict_split
from flawmask.evaluation.metrics import METRICS
from flawmask.evaluation.summary import summary
from flawmask.images import read_image, write_png
from flawmask.inference.backend import Resized
from flawmask.inference.calibration import Calibration
from flawmask.inference.torch_backend import TorchBackend
from flawmask.report.headline import lookup

pytestmark = pytest.mark.usefixtures("undrawn", "small_network")


def test_every_figure_is_written_under_the_name_that_users_know(evaluated: Callable[..., Evaluated]) -> None:
    done = evaluated()
    metrics = json.loads((done.results_dir / "metrics.json").read_text())
    assert metrics == json.loads(json.dumps(done.metrics))
    promised = (
        "accuracy, precision, recall, f1_score, defect_detection_rate, composite_score, confidence, tp_defect, "
        "fp_defect, tn_good, fn_defect, total_images"
    ).split(", ")
    ranked = (
        "image_auroc image_ap image_f1_max image_f1_max_threshold false_alarms_at_recall recall_at_false_alarms "
        "ece brier"
    ).split()
    counted = "false_alarm_rate recall_by_type confusion instances instance_errors".split()
    listed = ("missed_instances", "spurious_instances")
    areas = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar")
    overlaps = [f"{kind}_{name}" for kind in ("mask", "box") for name in areas] + ["ap_by_class", "mean_mask_iou"]
    pixels = ("auroc", "ap", "aupro", "aupro_05", "iou", "dice", "f1_max", "f1_max_threshold")
    speed = ("seconds", "seconds_per_image")
    sure = ("intervals", "interval_method", "resamples", "threshold", "notes")
    settings = ("conf", "min_area", "split", "dataset", "model", "seed", "allow_leak", "finds", "crowds", "on_error")
    beyond = {
        *ranked,
        *counted,
        *listed,
        *overlaps,
        *(f"pixel_{name}" for name in pixels),
        *speed,
        *sure,
        *settings,
        "tally",
        "intensity",
        "model_sha256",
        "good_name",
        *("join", "tile", "overlap", "tile_from", "calibration", "ece_calibrated", "brier_calibrated"),
    }
    assert set(metrics) == {*promised, *beyond}
    assert metrics["total_images"] == 5
    assert metrics["tp_defect"] + metrics["fn_defect"] == 3
    assert metrics["fp_defect"] + metrics["tn_good"] == 2
    assert set(metrics["recall_by_type"]) == {"crack", "scratch"}
    assert metrics["seconds_per_image"] > 0
    assert set(metrics["seconds"]) == {"read", "network", "post"}
    assert {*names(done.results_dir)} == {*stage.ENTRIES} - {"table"}  # the table is of many images


def test_every_interval_holds_its_figure_and_says_how_it_was_made(
    run_dir: Path, dataset: Path, evaluated: Callable[..., Evaluated]
) -> None:
    metrics = evaluated(conf=0.6).metrics
    assert set(metrics["intervals"]) == set(metrics["interval_method"])
    assert set(metrics["interval_method"].values()) == {"wilson", "newcombe", "bootstrap"}
    for name in ("accuracy", "recall", "f1_score", "image_auroc", "mask_ap", "mean_mask_iou", "pixel_aupro"):
        low, high = metrics["intervals"][name]
        assert low <= high
    for name, method in metrics["interval_method"].items():
        if method != "bootstrap" and not name.startswith("false_alarms_at"):
            assert metrics["intervals"][name][0] <= metrics[name] <= metrics["intervals"][name][1]
    again = run(run_dir, dataset, conf=0.6)
    assert again.metrics["intervals"] == metrics["intervals"]
    other = run(run_dir, dataset, conf=0.6, seed=1)
    assert other.metrics["intervals"] != metrics["intervals"]
    without = evaluated(conf=0.6, resamples=0)
    assert set(without.metrics["interval_method"].values()) == {"wilson", "newcombe"}


def test_metrics_are_undefined_where_one_kind_of_image_is_missing(run_dir: Path, dataset: Path) -> None:
    content = json.loads((dataset / "val" / "annotations.json").read_text())
    content["images"] = [image for image in content["images"] if image["defect_type"] == "good"]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] in kept]
    (dataset / "val" / "annotations.json").write_text(json.dumps(content))
    done = run(run_dir, dataset)
    for name in ("recall", "image_auroc", "image_ap", "image_f1_max", "ece", "mask_ap", "box_ar", "pixel_auroc"):
        assert done.metrics[name] is None, name
        assert name not in done.metrics["intervals"], name
    assert any("no defective image" in note for note in done.metrics["notes"])
    assert "recall n/a" in summary(done.metrics)


def test_the_threshold_is_chosen_on_val_kept_and_used_for_test(run_dir: Path, dataset: Path) -> None:
    shutil.copytree(dataset / "val", dataset / "test")
    for number, path in enumerate(sorted((dataset / "test" / "images").iterdir()), start=50):
        height, width = read_image(path).shape[:2]
        write_png(path, patchwork(height, width, number))
    on_val = run(run_dir, dataset, conf="auto", aim="recall=0.99")
    assert on_val.metrics["threshold"]["same_split"]
    assert any("chosen on these very images" in note for note in on_val.metrics["notes"])
    kept = json.loads((run_dir / "best.threshold.json").read_text())
    assert (kept["value"], kept["aim"], kept["chosen_on"], kept["images"]) == (
        on_val.metrics["conf"],
        "recall=0.99",
        "val",
        5,
    )
    on_test = run(run_dir, dataset, conf="auto", aim="recall=0.99", split="test")
    assert on_test.metrics["conf"] == kept["value"]
    assert not on_test.metrics["threshold"]["same_split"]
    assert not any("chosen on these very images" in note for note in on_test.metrics["notes"])
    # Another aim was not chosen for: val decides first.
    other = run(run_dir, dataset, conf="auto", aim="false_alarms=0", split="test")
    assert other.metrics["threshold"]["aim"] == "false_alarms=0"
    assert json.loads((run_dir / "best.threshold.json").read_text())["aim"] == "false_alarms=0"
    # A test split that holds an image of val is no test split.
    shutil.copy(dataset / "val" / "images" / "crack_1.png", dataset / "test" / "images" / "crack_1.png")
    leaking = run(run_dir, dataset, conf="auto", aim="false_alarms=0", split="test")
    assert leaking.metrics["threshold"]["same_split"]
    assert any("chosen on 1 of these 5 images" in note for note in leaking.metrics["notes"])
    (run_dir / "best.threshold.json").unlink()


def test_the_score_is_calibrated_on_val_and_measured_on_other_images(run_dir: Path, dataset: Path) -> None:
    on_val = run(run_dir, dataset)
    stored = json.loads((run_dir / "best.calibration.json").read_text())
    assert (stored["images"], stored["defective"], stored["fitted_on"], len(stored["fitted_by"])) == (5, 3, "val", 5)
    assert on_val.metrics["calibration"]["cross_fitted"]
    shutil.copytree(dataset / "val", dataset / "test")
    for number, path in enumerate(sorted((dataset / "test" / "images").iterdir()), start=50):
        height, width = read_image(path).shape[:2]
        write_png(path, patchwork(height, width, number))
    on_test = run(run_dir, dataset, split="test")
    assert not on_test.metrics["calibration"]["cross_fitted"]
    assert on_test.metrics["calibration"]["slope"] == stored["slope"]
    assert {"ece", "brier", "ece_calibrated", "brier_calibrated"} <= set(on_test.metrics["intervals"])
    curve = Calibration(stored["slope"], stored["intercept"], "val", 5, 3)
    for row in rows(on_test.results_dir / "predictions.csv"):
        assert float(row["defect_probability"]) == pytest.approx(
            float(curve.probability(float(row["score"]))), abs=1e-4
        )
    shutil.copy(dataset / "val" / "images" / "crack_1.png", dataset / "test" / "images" / "crack_1.png")
    notes = run(run_dir, dataset, split="test").metrics["notes"]
    assert any("The calibration was fitted to 1 of these 5 images" in note for note in notes)
    without = run(run_dir, dataset, split="test", min_area=9)
    assert "calibration" not in without.metrics, "it was fitted with another --min_area"
    assert "ece_calibrated" not in without.metrics
    (run_dir / "best.calibration.json").unlink()


def test_threshold_and_calibration_are_kept_with_the_tiles_that_the_network_saw(run_dir: Path, dataset: Path) -> None:
    run(run_dir, dataset, conf="auto", tile=32)
    for name in ("threshold", "calibration"):
        stored = json.loads((run_dir / f"best.{name}.json").read_text())
        assert [stored[key] for key in ("tile", "overlap", "tile_from")] == [32, 4, "all"]
    shutil.copytree(dataset / "val", dataset / "test")
    assert "calibration" in run(run_dir, dataset, split="test", tile=32).metrics
    again = run(run_dir, dataset, split="test", conf="auto")  # so val chooses anew
    assert again.metrics["threshold"]["tile"] is None
    assert "calibration" not in again.metrics, "it is of tiles"
    for name in ("threshold", "calibration"):
        (run_dir / f"best.{name}.json").unlink()


def test_joining_changes_the_instances_and_no_images_score(run_dir: Path, dataset: Path) -> None:
    apart, together = (run(run_dir, dataset, join=rule).metrics for rule in ("off", "touching"))
    assert (apart["join"], together["join"]) == ("off", "touching")
    assert together["instances"]["found"] < apart["instances"]["found"]
    of_images = [
        one.key for one in METRICS.values() if one.group in ("verdicts", "ranking") and one.key != "confidence"
    ]
    for key in [*of_images, "pixel_aupro", "pixel_auroc"]:
        assert lookup(together, key) == lookup(apart, key), key
    assert run(run_dir, dataset).metrics["join"] == "off", "this checkpoint says so"


def test_a_note_says_that_the_epoch_was_chosen_on_val(run_dir: Path, dataset: Path) -> None:
    (run_dir / "config.json").write_text('{"made_by": "flawmask train", "settings": {"select_by": "f1"}}')
    try:
        told = run(run_dir, dataset).metrics["notes"]
    finally:
        (run_dir / "config.json").unlink()
    assert "The epoch was chosen by f1 on the validation split: its figures are too good." in told


def test_without_a_good_image_nothing_is_ranked(run_dir: Path, dataset: Path) -> None:
    content = json.loads((dataset / "val" / "annotations.json").read_text())
    content["images"] = [image for image in content["images"] if image["defect_type"] != "good"]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] in kept]
    (dataset / "val" / "annotations.json").write_text(json.dumps(content))
    done = run(run_dir, dataset)
    for name in ("image_auroc", "image_ap", "image_f1_max", "image_f1_max_threshold", "ece", "false_alarm_rate"):
        assert done.metrics[name] is None, name
        assert name not in done.metrics["intervals"], name
    assert done.metrics["mask_ap"] is not None
    assert any("no good image" in note for note in done.metrics["notes"])


def test_results_on_variants_are_marked_as_such(run_dir: Path, dataset: Path) -> None:
    path = dataset / "val" / "annotations.json"
    content = json.loads(path.read_text())
    content["images"][0] |= {"augmentation": "flip_h", "source_id": 3}
    path.write_text(json.dumps(content))
    assert "1 of these 5 images are augmented variants, not photographs." in run(run_dir, dataset).metrics["notes"]


def test_intervals_are_over_parts_where_images_name_their_part(run_dir: Path, dataset: Path) -> None:
    path = dataset / "val" / "annotations.json"
    content = json.loads(path.read_text())
    for image, part in zip(content["images"], ["tile 1", "tile 1", "tile 2", "tile 3", None], strict=True):
        image["group"] = part
    path.write_text(json.dumps(content))
    first = run(run_dir, dataset, conf=0.05)
    shutil.copytree(first.results_dir, dataset.parent / "first" / "inference_val")
    done = run(run_dir, dataset, conf="auto", resamples=50, against=dataset.parent / "first")
    (run_dir / "best.threshold.json").unlink()
    metrics = json.loads((done.results_dir / "metrics.json").read_text())
    assert metrics["groups"] == metrics["threshold"]["groups"] == metrics["against"]["groups"] == 4
    assert set(metrics["interval_method"].values()) <= {
        "wilson, by group",
        "obuchowski, by group",
        "bootstrap, by group",
    }
    said = summary(done.metrics)
    assert "Images: 5 images of 4 parts; intervals are over parts" in said
    assert "chosen for f1 on 5 images (4 parts) of val" in said
    assert "by the other only; exact, over 4 parts, p = " in said
    assert "5 images of 4 parts evaluated with" in words(done.results_dir / "report.html")


def test_another_run_is_compared_on_the_same_images(run_dir: Path, dataset: Path) -> None:
    first = run(run_dir, dataset, conf=0.05)
    shutil.copytree(first.results_dir, dataset.parent / "first" / "inference_val")
    second = run(run_dir, dataset, conf=1.0, against=dataset.parent / "first")
    found = second.metrics["against"]
    assert found["figures"]["recall"] == {"this": 0.0, "other": 1.0, "difference": -1.0, "interval": (-1.0, -1.0)}
    assert found["figures"]["mask_ap"]["difference"] == pytest.approx(0)
    assert found["mcnemar"]["only_other_right"] == 3
    assert "Compared with" in summary(second.metrics)
    nothing = dataset.parent / "nothing"
    with pytest.raises(FlawmaskError, match="nothing holds no results for val"):
        run(run_dir, dataset, against=nothing)


def test_the_confusion_matrix_and_the_lists_agree_with_the_counts(evaluated: Callable[..., Evaluated]) -> None:
    metrics = evaluated(conf=0.6).metrics
    assert metrics["confusion"] == {
        "classes": ["good", "defect"],
        "rows": [[metrics["tn_good"], metrics["fp_defect"]], [metrics["fn_defect"], metrics["tp_defect"]]],
    }
    assert len(metrics["missed_instances"]) == metrics["instance_errors"]["missed"]
    assert metrics["instances"]["matched"] == metrics["instances"]["truth"] - len(metrics["missed_instances"])
    wrong = sum(count for kind, count in metrics["instance_errors"].items() if kind != "missed")
    assert (
        len(metrics["spurious_instances"]) == wrong == metrics["instances"]["found"] - metrics["instances"]["matched"]
    )


def test_the_predictions_are_coco_results_that_pycocotools_loads(
    run_dir: Path, dataset: Path, evaluated: Callable[..., Evaluated]
) -> None:
    done = evaluated()
    results = json.loads((done.results_dir / "predictions.json").read_text())
    assert len(results) > 10
    assert min(one["score"] for one in results) < 0.5
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(dataset / "val" / "annotations.json"))
        loaded = truth.loadRes(str(done.results_dir / "predictions.json"))
    assert len(loaded.getAnnIds()) == len(results)
    sizes = {image["id"]: [image["height"], image["width"]] for image in truth.dataset["images"]}
    assert all(one["segmentation"]["size"] == sizes[one["image_id"]] for one in results)


def test_conf_changes_verdicts_table_and_confidence_but_not_predictions_and_ap(
    evaluated: Callable[..., Evaluated],
) -> None:
    low = evaluated(conf=0.05)
    low_rows, predictions = (
        rows(low.results_dir / "predictions.csv"),
        (low.results_dir / "predictions.json").read_bytes(),
    )
    high = evaluated(conf=1.0)
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


def test_the_table_has_a_line_for_each_image_and_agrees_with_the_metrics(evaluated: Callable[..., Evaluated]) -> None:
    done = evaluated(conf=0.6)
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


def test_min_area_changes_the_verdict(evaluated: Callable[..., Evaluated]) -> None:
    assert evaluated(conf=0.05).metrics["recall"] == 1.0
    assert evaluated(conf=0.05, min_area=10**6).metrics["recall"] == 0.0


def test_pictures_are_named_by_rank_and_the_worst_come_first(evaluated: Callable[..., Evaluated]) -> None:
    done = evaluated(conf=0.05)
    order = names(done.results_dir / "overlays")
    assert [name[:3] for name in order] == ["001", "002", "003", "004", "005"]
    scores = {row["file"]: float(row["score"]) for row in rows(done.results_dir / "predictions.csv")}
    wrong = sorted(("good_2.png", "good_4.png"), key=lambda name: -scores[name])
    right = sorted(("crack_1.png", "scratch_3.png", "crack_5.png"), key=lambda name: scores[name])
    assert [name[4:] for name in order] == [f"false_alarm_{name}" for name in wrong] + [
        f"right_{name}" for name in right
    ]
    missed = names(evaluated(conf=1.0).results_dir / "overlays")
    assert [name[4:10] for name in missed[:3]] == ["missed"] * 3


def test_pictures_of_small_images_are_readable_and_overlays_limits_their_number(run_dir: Path, dataset: Path) -> None:
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


def test_earlier_results_are_replaced_as_a_whole(run_dir: Path, dataset: Path) -> None:
    done = run(run_dir, dataset)
    (done.results_dir / "overlays" / "999_old.png").touch()
    (done.results_dir / ".DS_Store").touch()
    run(run_dir, dataset, overlays=1)
    assert len(names(done.results_dir / "overlays")) == 1
    assert ".DS_Store" not in names(done.results_dir)
    assert names(dataset.parent) == ["data", "out"]


def test_metrics_do_not_depend_on_the_batch_size(evaluated: Callable[..., Evaluated]) -> None:
    alone = evaluated(conf=0.6, resamples=0).metrics
    together = evaluated(conf=0.6, resamples=0, inference_batch_size=3).metrics
    for name, value in alone.items():
        if isinstance(value, float) and "seconds" not in name:
            assert together[name] == pytest.approx(value, abs=1e-5), name


def test_predictions_are_in_the_splits_order_although_the_network_gets_images_sorted_by_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [(60, 80), (70, 50), (60, 80), (64, 64), (70, 50), (64, 90), (60, 80)]
    records = []
    for number, (height, width) in enumerate(sizes):
        write_png(tmp_path / "val" / "images" / f"{number}.png", patchwork(height, width, number))
        records.append({"id": number + 1, "file_name": f"{number}.png", "height": height, "width": width})
    write_split(tmp_path / "val", records, [], CATEGORIES)
    batches: list[list[tuple[int, int]]] = []
    really = TorchBackend._infer

    def infer(self: TorchBackend, batch: Sequence[Resized]) -> Any:
        batches.append([(image.height, image.width) for image in batch])
        return really(self, batch)

    monkeypatch.setattr(TorchBackend, "_infer", infer)
    predictions, seconds = predict_split(TorchBackend(network(SPEC), SPEC), read_split(tmp_path, "val"), batch_size=4)
    # Seen at 64 by 85 and 64 by 90, padded to 64 by 96, are the second batch's.
    assert batches == [[(64, 64)], [(60, 80)] * 3 + [(64, 90)], [(70, 50)] * 2]
    assert seconds.keys() == {"read", "network", "post"}
    assert [(one.height, one.width) for one in predictions] == sizes
    for number, (found, size) in enumerate(zip(predictions, sizes, strict=True)):
        alone = detect(network(SPEC), SPEC, patchwork(*size, number))
        assert [one.rle for one in found.instances] == [one.rle for one in alone.instances]
    assert len({str(one) for one in predictions}) == len(sizes)


def test_limits_reach_the_network(evaluated: Callable[..., Evaluated]) -> None:
    def predictions(**settings: Any) -> list[dict[str, Any]]:
        done = evaluated(conf=0.6, resamples=0, **settings)
        found: list[dict[str, Any]] = json.loads((done.results_dir / "predictions.json").read_text())
        return found

    everything = predictions()
    above = [one["segmentation"] for one in everything if one["score"] > 0.4]
    assert 0 < len(above) < len(everything)
    assert [one["segmentation"] for one in predictions(score_floor=0.4)] == above
    assert len(predictions(max_proposals=1)) <= 2 * 5


def test_the_type_is_the_class_where_records_name_no_type(run_dir: Path, dataset: Path) -> None:
    content = json.loads((dataset / "val" / "annotations.json").read_text())
    edit(dataset, images=[{k: v for k, v in image.items() if k != "defect_type"} for image in content["images"]])
    assert run(run_dir, dataset).metrics["recall_by_type"]["defect"]["images"] == 3


def test_images_without_annotations_are_good(run_dir: Path, dataset: Path) -> None:
    edit(dataset, annotations=[])
    metrics = run(run_dir, dataset, conf=1.0).metrics
    assert (metrics["tn_good"], metrics["accuracy"], metrics["recall"], metrics["mask_ap"]) == (5, 1.0, None, None)
