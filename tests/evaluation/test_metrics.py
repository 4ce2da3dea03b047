"""The table of metrics: each follows from the evidence and weights, and weights of 1 give the figure itself.

A further one is one entry.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from files_read_back import rows
from handmade_split import blob, grouped, instance, make_split, predicted, shaken
from patchy_split import run
from report.test_report import words

from flawmask.comparison import table
from flawmask.comparison.entry import Entry
from flawmask.evaluation.evaluate import Evaluated
from flawmask.evaluation.measure import Evidence, gather, measure, measure_scores
from flawmask.evaluation.metrics import METRICS, Floats, Metric, proportion, values
from flawmask.evaluation.summary import summary
from flawmask.evaluation.verdicts import EvaluatedImage
from flawmask.folds import spreads
from flawmask.inference.calibration import Calibration
from flawmask.report.headline import NBSP, decimal, lookup
from flawmask.report.side_by_side import compare_reports


def evidence(seed: int, images: int = 12) -> Evidence:
    rng = np.random.default_rng(seed)
    truths = [[(3, blob(rng))] if at % 2 else [] for at in range(images)]
    found = [
        predicted(*(instance("crack", float(rng.random()), shaken(mask, rng)) for _, mask in [*truth, (3, blob(rng))]))
        for truth in truths
    ]
    curve = Calibration(0.8, -0.2, "val", 9, 5)
    return gather(make_split(truths), [replace(one, calibration=curve) for one in found], 0.5, 0)


@pytest.mark.parametrize("seed", range(5))
def test_weights_of_1_give_the_metric_itself(seed: int) -> None:
    case = evidence(seed)
    figures, weighted = (values(METRICS.values(), case, weights) for weights in (None, np.ones((3, 12))))
    assert set(figures) == set(METRICS)
    for key, drawn in weighted.items():
        group = METRICS[key].group
        if group == "verdicts" or (group == "ranking" and key not in ("confidence", "ece_calibrated")):
            np.testing.assert_array_equal(drawn, np.repeat(figures[key], 3), err_msg=key)
        else:  # other sums, or for pixels scores in groups
            assert drawn == pytest.approx(np.repeat(figures[key], 3), abs=1e-3 if group == "pixels" else 1e-6), key


def test_only_the_requested_metrics_are_computed() -> None:
    case = evidence(0)
    assert list(values([METRICS["recall"], METRICS["image_auroc"]], case)) == ["recall", "image_auroc"]
    assert case.detections is not None
    assert not {"evaluations", "errors", "pixels"} & vars(case.detections).keys()


def test_scores_alone_give_the_metrics_of_images_and_no_others() -> None:
    found = values(METRICS.values(), Evidence(evidence(0).images))
    assert {METRICS[key].group for key in found} == {"verdicts", "ranking"}
    assert "confidence" not in found


def test_where_groups_are_known_every_interval_is_over_them_and_the_metrics_are_the_same() -> None:
    detections = evidence(1).detections
    assert detections is not None
    split, predictions = detections.split, detections.predictions
    alone, parts, each = (
        measure(of, predictions, 0.5, 0, resamples=50, seed=0).metrics
        for of in (split, grouped(split, 3), grouped(split, 1))
    )
    said = ("intervals", "interval_method", "recall_by_type", "groups")
    assert {key: value for key, value in parts.items() if key not in said} == {
        key: value for key, value in alone.items() if key not in said
    }
    assert "groups" not in alone
    assert (parts["groups"], each["groups"]) == (4, 12)
    assert set(alone["interval_method"].values()) == {"wilson", "newcombe", "bootstrap"}
    assert all(method.endswith(", by group") for method in parts["interval_method"].values())
    for name, (low, high) in parts["intervals"].items():
        key = next(key for key in METRICS if key.replace(".", "_") == name)
        value = lookup(parts, key)[1]
        assert value is not None
        assert low - 1e-3 <= value <= high + 1e-3, key
    for key in ("accuracy", "recall", "precision", "f1_score", "false_alarm_rate"):
        assert each["intervals"][key] == pytest.approx(alone["intervals"][key])
        assert parts["intervals"][key][0] <= alone["intervals"][key][0] + 1e-12


def test_the_summary_says_how_many_images_of_how_many_parts() -> None:
    evaluated = [
        EvaluatedImage(f"{at}.png", "crack", at % 2 == 0, at % 3 == 0, at / 9, f"part {at // 2}") for at in range(9)
    ]
    metrics = measure_scores(evaluated, resamples=30, seed=0)
    facts = {"threshold": {"how": "given", "value": 0.5}, "seconds_per_image": 0.0, "seconds": {}, "notes": []}
    nothing = {"instances": {"matched": 0, "truth": 0}, "instance_errors": {}}
    lines = summary({**metrics, **facts, **nothing}).splitlines()
    assert "Images: 9 images of 5 parts; intervals are over parts" in lines
    assert metrics["recall_by_type"]["crack"]["groups"] == 5
    chosen = {"how": "aim", "aim": "f1", "value": 0.5, "images": 9, "groups": 5, "chosen_on": "val", "interval": None}
    assert "Threshold: 0.500 (chosen for f1 on 9 images (5 parts) of val)" in summary(
        {**metrics, **facts, **nothing, "threshold": chosen}
    )
    ungrouped = measure_scores([replace(one, group=None) for one in evaluated], resamples=30, seed=0)
    assert "parts;" not in summary({**ungrouped, **facts, **nothing})


def test_every_metric_of_the_table_is_in_metrics_json() -> None:
    detections = evidence(1).detections
    assert detections is not None
    metrics = measure(detections.split, detections.predictions, 0.5, 0, resamples=20, seed=0).metrics
    for key, metric in METRICS.items():
        there, value = lookup(metrics, key)
        assert there, key
        assert isinstance(value, int) == (metric.shown == "count"), key
        assert metric.has_interval or key.replace(".", "_") not in metrics["intervals"], key


def specificity(evidence: Evidence, weights: Floats | None) -> dict[str, Floats]:
    good = ~evidence.truth
    weights = np.ones((1, len(good))) if weights is None else weights
    return {"specificity": (weights @ (good & ~evidence.verdicts)) / (weights @ good)}


def wrong(evidence: Evidence, weights: Floats | None) -> dict[str, Floats]:
    weights = np.ones((1, len(evidence.images))) if weights is None else weights
    return {"wrong.verdicts": weights @ (evidence.truth != evidence.verdicts)}


def score_gap(evidence: Evidence, weights: Floats | None) -> dict[str, Floats]:
    weights = np.ones((1, len(evidence.images))) if weights is None else weights
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


@pytest.mark.usefixtures("undrawn", "small_network")
@pytest.mark.parametrize("shown", FURTHER)
def test_a_new_metric_is_one_entry(run_dir: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch, shown: str) -> None:
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
    assert f"{further.label} " in words(second.results_dir / "report.html").split("Compared with another model")[1]
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
