"""The table of metrics: each follows from the evidence and weights, and weights of 1 give the figure itself."""

from dataclasses import replace

import numpy as np
import pytest
from handmade_split import blob, grouped, instance, make_split, predicted, shaken

from flawmask.evaluation.measure import Evidence, gather, measure, measure_scores
from flawmask.evaluation.metrics import METRICS, values
from flawmask.evaluation.summary import summary
from flawmask.evaluation.verdicts import Judged
from flawmask.report.headline import lookup


def evidence(seed: int, images: int = 12) -> Evidence:
    rng = np.random.default_rng(seed)
    truths = [[(3, blob(rng))] if at % 2 else [] for at in range(images)]
    found = [
        predicted(*(instance("crack", float(rng.random()), shaken(mask, rng)) for _, mask in [*truth, (3, blob(rng))]))
        for truth in truths
    ]
    return gather(make_split(truths), found, 0.5, 0)


@pytest.mark.parametrize("seed", range(5))
def test_weights_of_1_give_the_figure_itself(seed: int) -> None:
    case = evidence(seed)
    figures, weighted = (values(METRICS.values(), case, weights) for weights in (None, np.ones((3, 12))))
    assert set(figures) == set(METRICS)
    for key, drawn in weighted.items():
        group = METRICS[key].group
        if group == "verdicts" or (group == "ranking" and key != "confidence"):
            np.testing.assert_array_equal(drawn, np.repeat(figures[key], 3), err_msg=key)
        else:  # other sums, or for pixels scores in groups
            assert drawn == pytest.approx(np.repeat(figures[key], 3), abs=1e-3 if group == "pixels" else 1e-6), key


def test_only_what_is_asked_for_is_computed() -> None:
    case = evidence(0)
    assert list(values([METRICS["recall"], METRICS["image_auroc"]], case)) == ["recall", "image_auroc"]
    assert case.detections is not None
    assert not {"evaluations", "errors", "pixels"} & vars(case.detections).keys()


def test_scores_alone_give_the_metrics_of_images_and_no_others() -> None:
    found = values(METRICS.values(), Evidence(evidence(0).judged))
    assert {METRICS[key].group for key in found} == {"verdicts", "ranking"}
    assert "confidence" not in found


def test_where_groups_are_known_every_interval_is_over_them_and_the_figures_are_the_same() -> None:
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
    judged = [Judged(f"{at}.png", "crack", at % 2 == 0, at % 3 == 0, at / 9, f"part {at // 2}") for at in range(9)]
    metrics = measure_scores(judged, resamples=30, seed=0)
    facts = {"threshold": {"how": "given", "value": 0.5}, "seconds_per_image": 0.0, "seconds": {}, "notes": []}
    nothing = {"instances": {"matched": 0, "truth": 0}, "instance_errors": {}}
    lines = summary({**metrics, **facts, **nothing}).splitlines()
    assert "Judged: 9 images of 5 parts; intervals are over parts" in lines
    assert metrics["recall_by_type"]["crack"]["groups"] == 5
    chosen = {"how": "aim", "aim": "f1", "value": 0.5, "images": 9, "groups": 5, "chosen_on": "val", "interval": None}
    assert "Threshold: 0.500 (chosen for f1 on 9 images (5 parts) of val)" in summary(
        {**metrics, **facts, **nothing, "threshold": chosen}
    )
    ungrouped = measure_scores([replace(one, group=None) for one in judged], resamples=30, seed=0)
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
