"""The stage `evaluate`: what it writes, what `--conf` acts on, what stops it."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_network
from files_read_back import names, rows
from pycocotools.coco import COCO
from random_network import detect, network, patchwork
from report.test_report import words

from flawmask.coco import annotation, read_split, write_split
from flawmask.comparison import table
from flawmask.comparison.entry import Entry
from flawmask.errors import FlawmaskError
from flawmask.evaluation import evaluate as stage
from flawmask.evaluation import results
from flawmask.evaluation.config import EvaluateConfig
from flawmask.evaluation.evaluate import Evaluated, evaluate, predict_split
from flawmask.evaluation.leak import content_digests, write_training_images
from flawmask.evaluation.measure import Evidence
from flawmask.evaluation.metrics import METRICS, Floats, Metric, proportion
from flawmask.evaluation.summary import summary
from flawmask.folds import spreads
from flawmask.images import read_image, write_png
from flawmask.inference.backend import Resized
from flawmask.inference.torch_backend import TorchBackend
from flawmask.model import checkpoint
from flawmask.report.headline import NBSP, decimal, lookup
from flawmask.report.side_by_side import compare_reports

pytestmark = pytest.mark.usefixtures("undrawn", "small_network")

SPEC = replace(random_network.SPEC, classes=("good", "defect"))
CATEGORIES = [{"id": 1, "name": "good"}, {"id": 2, "name": "defect"}]


@pytest.fixture(scope="module")
def run_dir(small_network: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    checkpoint.save(folder / "best.pt", network(SPEC), SPEC)
    return folder


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A split of three defective images and two good ones, of two sizes."""
    return make_dataset(tmp_path / "data")


def make_dataset(folder: Path) -> Path:
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


@pytest.fixture(scope="module")
def judged(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Evaluated]:
    """A function that judges the split as it is, with the same settings once: what it gives is to be looked at only."""
    dataset = make_dataset(tmp_path_factory.mktemp("judged") / "data")

    @cache
    def judge(**settings: Any) -> Evaluated:
        name = "_".join(f"{name}_{value}" for name, value in settings.items())
        return run(run_dir, dataset, output_dir=dataset.parent / f"out_{name}", **settings)

    return judge


def edit(dataset: Path, **changes: Any) -> None:
    path = dataset / "val" / "annotations.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_every_figure_is_written_under_the_name_that_users_know(judged: Callable[..., Evaluated]) -> None:
    done = judged()
    metrics = json.loads((done.results_dir / "metrics.json").read_text())
    assert metrics == json.loads(json.dumps(done.metrics))
    promised = (
        "accuracy, precision, recall, f1_score, defect_detection_rate, composite_score, confidence, tp_defect, "
        "fp_defect, tn_good, fn_defect, total_images"
    ).split(", ")
    ranked = "image_auroc image_ap image_f1_max image_f1_max_threshold false_alarms_at_recall ece".split()
    counted = "false_alarm_rate recall_by_type confusion instances instance_errors".split()
    listed = ("missed_instances", "spurious_instances")
    areas = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar")
    overlaps = [f"{kind}_{name}" for kind in ("mask", "box") for name in areas] + ["ap_by_class", "mean_mask_iou"]
    pixels = ("auroc", "ap", "aupro", "aupro_05", "iou", "dice", "f1_max", "f1_max_threshold")
    speed = ("seconds", "seconds_per_image")
    sure = ("intervals", "interval_method", "resamples", "threshold", "notes")
    settings = ("conf", "min_area", "split", "dataset", "model", "seed", "allow_leak", "finds")
    beyond = {*ranked, *counted, *listed, *overlaps, *(f"pixel_{name}" for name in pixels), *speed, *sure, *settings}
    assert set(metrics) == {*promised, *beyond}
    assert metrics["total_images"] == 5
    assert metrics["tp_defect"] + metrics["fn_defect"] == 3
    assert metrics["fp_defect"] + metrics["tn_good"] == 2
    assert set(metrics["recall_by_type"]) == {"crack", "scratch"}
    assert metrics["seconds_per_image"] > 0
    assert set(metrics["seconds"]) == {"read", "network", "post"}
    assert names(done.results_dir) == sorted(stage.ENTRIES)


def test_every_interval_holds_its_figure_and_says_how_it_was_made(
    run_dir: Path, dataset: Path, judged: Callable[..., Evaluated]
) -> None:
    metrics = judged(conf=0.6).metrics
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
    without = judged(conf=0.6, resamples=0)
    assert set(without.metrics["interval_method"].values()) == {"wilson", "newcombe"}


def test_a_figure_is_not_made_up_where_one_kind_of_image_is_missing(run_dir: Path, dataset: Path) -> None:
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


def test_a_model_is_not_judged_on_what_it_was_trained_on(
    run_dir: Path, dataset: Path, judged: Callable[..., Evaluated]
) -> None:
    assert any("not known" in note for note in judged().metrics["notes"])
    write_training_images(content_digests(read_split(dataset, "val")), run_dir)
    try:
        nothing_written(run_dir, dataset, r"5 of 5 images were trained on .*--allow_leak")
        allowed = run(run_dir, dataset, allow_leak=True)
    finally:
        (run_dir / "training_images.json").unlink()
    assert any("5 of these 5 images were trained on" in note for note in allowed.metrics["notes"])


def test_an_epoch_that_was_chosen_on_val_is_told(run_dir: Path, dataset: Path) -> None:
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


def test_of_images_that_name_their_part_everything_is_said_over_parts(run_dir: Path, dataset: Path) -> None:
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
    assert "Judged: 5 images of 4 parts; intervals are over parts" in said
    assert "chosen for f1 on 5 images (4 parts) of val" in said
    assert "only the other; exact, over 4 parts, p = " in said
    assert "5 images of 4 parts judged by" in words(done.results_dir / "report.html")


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


def specificity(evidence: Evidence, weights: Floats | None) -> dict[str, Floats]:
    good = ~evidence.truth
    weights = np.ones((1, len(good))) if weights is None else weights
    return {"specificity": (weights @ (good & ~evidence.verdicts)) / (weights @ good)}


def wrong(evidence: Evidence, weights: Floats | None) -> dict[str, Floats]:
    weights = np.ones((1, len(evidence.judged))) if weights is None else weights
    return {"wrong.verdicts": weights @ (evidence.truth != evidence.verdicts)}


def score_gap(evidence: Evidence, weights: Floats | None) -> dict[str, Floats]:
    weights = np.ones((1, len(evidence.judged))) if weights is None else weights
    bad, good = (weights * side @ evidence.scores / (weights @ side) for side in (evidence.truth, ~evidence.truth))
    return {"score_gap": bad - good}


PLACES: dict[str, Any] = {"report": 5, "comparison": (3, "Further"), "against": 1, "in_folds": True}

FURTHER = {
    "percent": Metric(
        "specificity",
        "Specificity",
        "good parts that pass",
        "verdicts",
        specificity,
        formula=proportion(["tn_good"], ["tn_good", "fp_defect"]),
        console={"block": "Specificity", "intervals": "specificity {}"},
        **PLACES,
    ),
    "count": Metric(
        "wrong.verdicts",
        "Wrong verdicts",
        "either way",
        "verdicts",
        wrong,
        lower_is_better=True,
        shown="count",
        console={"ranking": "wrong {}"},
        **PLACES,
    ),
    "decimal": Metric(
        "score_gap",
        "Score gap",
        "mean score of defective parts less that of good ones",
        "ranking",
        score_gap,
        shown="decimal",
        console={"ranking": "gap {}"},
        **PLACES,
    ),
}


@pytest.mark.parametrize("shown", FURTHER)
def test_a_further_metric_is_one_entry(
    run_dir: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch, shown: str
) -> None:
    further = FURTHER[shown]
    key, name = further.key, further.key.replace(".", "_")
    monkeypatch.setitem(METRICS, key, further)
    first = run(run_dir, dataset, conf=0.75, resamples=50, output_dir=dataset.parent / "first")
    second = run(run_dir, dataset, conf=0.05, resamples=50, against=first.results_dir)

    metrics = json.loads((first.results_dir / "metrics.json").read_text())
    good = metrics["tn_good"] + metrics["fp_defect"]
    value: float = {
        "percent": metrics["tn_good"] / good,
        "count": metrics["fp_defect"] + metrics["fn_defect"],
        "decimal": mean_score(first, "defect") - mean_score(first, "good"),
    }[shown]
    assert lookup(metrics, key)[1] == pytest.approx(value, abs=1e-6)
    low, high = metrics["intervals"][name]
    assert low <= value <= high
    assert metrics["interval_method"][name] == ("wilson" if shown == "percent" else "bootstrap")

    console, page, interval = TEXTS[shown](value, low, high)
    assert console in summary(metrics)
    assert f"{further.label} {further.meaning} {page} {interval}" in words(first.results_dir / "report.html")
    both = compare_reports([first.results_dir, second.results_dir], dataset.parent / "both.html")
    assert f"{further.label} {page} " in words(both)
    assert f" ({interval})" in words(both)
    cells = {row[0]: row[1].replace(NBSP, " ") for row in table.rows([table.Column(Entry("a"), metrics, {})])}
    assert cells["Further"] == f"{page} ({interval})"

    found = second.metrics["against"]["figures"][key]
    assert found["other"] == pytest.approx(value, abs=1e-6)
    assert f"  {key}: " in summary(second.metrics)
    assert f"{key} " in words(second.results_dir / "report.html").split("Compared with another model")[1]
    assert spreads([metrics, second.metrics])[key]["values"] == [
        lookup(metrics, key)[1],
        lookup(second.metrics, key)[1],
    ]
    assert spreads([{}, metrics])[key]["values"] == [None, lookup(metrics, key)[1]]  # a fold of another version
    assert summary({**metrics, "folds": spreads([metrics, metrics])}).count(f"{key} {console.split()[1]} ± ") == 1


def mean_score(done: Evaluated, truth: str) -> float:
    of_kind = [row for row in rows(done.results_dir / "predictions.csv") if row["truth"] == truth]
    return float(np.mean([float(row["score"]) for row in of_kind]))


def as_count(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


TEXTS: dict[str, Callable[[float, float, float], tuple[str, str, str]]] = {
    "percent": lambda value, low, high: (
        f"Specificity: {value:.2%}",
        f"{100 * value:.1f} %",
        f"{100 * low:.1f}\u2013{100 * high:.1f} %",
    ),
    "count": lambda value, low, high: (
        f"wrong {as_count(value)} ({as_count(low)} to {as_count(high)})",
        as_count(value),
        f"{as_count(low)}\u2013{as_count(high)}",
    ),
    "decimal": lambda value, low, high: (
        f"gap {value:.3f} ({low:.3f} to {high:.3f})",
        decimal(value),
        f"{decimal(low)}\u2013{decimal(high)}",
    ),
}


def test_the_confusion_matrix_and_the_lists_agree_with_the_counts(judged: Callable[..., Evaluated]) -> None:
    metrics = judged(conf=0.6).metrics
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
    run_dir: Path, dataset: Path, judged: Callable[..., Evaluated]
) -> None:
    done = judged()
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
    judged: Callable[..., Evaluated],
) -> None:
    low = judged(conf=0.05)
    low_rows, predictions = (
        rows(low.results_dir / "predictions.csv"),
        (low.results_dir / "predictions.json").read_bytes(),
    )
    high = judged(conf=1.0)
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


def test_the_table_has_a_line_an_image_that_agrees_with_the_figures(judged: Callable[..., Evaluated]) -> None:
    done = judged(conf=0.6)
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


def test_min_area_acts_on_the_verdict(judged: Callable[..., Evaluated]) -> None:
    assert judged(conf=0.05).metrics["recall"] == 1.0
    assert judged(conf=0.05, min_area=10**6).metrics["recall"] == 0.0


def test_pictures_are_named_by_rank_and_the_worst_come_first(judged: Callable[..., Evaluated]) -> None:
    done = judged(conf=0.05)
    order = names(done.results_dir / "overlays")
    assert [name[:3] for name in order] == ["001", "002", "003", "004", "005"]
    scores = {row["file"]: float(row["score"]) for row in rows(done.results_dir / "predictions.csv")}
    wrong = sorted(("good_2.png", "good_4.png"), key=lambda name: -scores[name])
    right = sorted(("crack_1.png", "scratch_3.png", "crack_5.png"), key=lambda name: scores[name])
    assert [name[4:] for name in order] == [f"false_alarm_{name}" for name in wrong] + [
        f"right_{name}" for name in right
    ]
    missed = names(judged(conf=1.0).results_dir / "overlays")
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

    monkeypatch.setattr(results, "_draw_worst", full_disk)
    with pytest.raises(OSError, match="No space"):
        run(run_dir, dataset, conf=0.9)
    assert (done.results_dir / "metrics.json").read_bytes() == before
    assert names(dataset.parent) == ["data", "out"]


def nothing_written(run_dir: Path, dataset: Path, says: str, **settings: Any) -> None:
    with pytest.raises(FlawmaskError, match=says) as caught:
        run(run_dir, dataset, **settings)
    assert "\n" not in str(caught.value)
    assert not (dataset.parent / "out").exists()


def test_images_judged_together_have_the_figures_that_they_have_one_by_one(judged: Callable[..., Evaluated]) -> None:
    alone = judged(conf=0.6, resamples=0).metrics
    together = judged(conf=0.6, resamples=0, inference_batch_size=3).metrics
    for name, value in alone.items():
        if isinstance(value, float) and "seconds" not in name:
            assert together[name] == pytest.approx(value, abs=1e-5), name


def test_predictions_are_in_the_splits_order_though_images_go_by_size_through_the_network(
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


def test_limits_reach_the_network(judged: Callable[..., Evaluated]) -> None:
    def predictions(**settings: Any) -> list[dict[str, Any]]:
        done = judged(conf=0.6, resamples=0, **settings)
        found: list[dict[str, Any]] = json.loads((done.results_dir / "predictions.json").read_text())
        return found

    everything = predictions()
    above = [one["segmentation"] for one in everything if one["score"] > 0.4]
    assert 0 < len(above) < len(everything)
    assert [one["segmentation"] for one in predictions(score_floor=0.4)] == above
    assert len(predictions(max_proposals=1)) <= 2 * 5


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
