"""Image-level metrics: the known values of an example, and ratios whose denominator is 0."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flawmask.evaluation.measure import measure_scores
from flawmask.evaluation.summary import metrics_block, percent
from flawmask.evaluation.uncertainty import wilson
from flawmask.evaluation.verdicts import EvaluatedImage, rates

GOLDEN_BLOCK = """OVERALL METRICS
============================================================
Accuracy : 88.24%
Precision: 92.31%
Recall   : 85.71%
F1-Score : 88.89%
Defect detection rate: 85.71%
Composite: 88.42%
Confidence: 78.45%
============================================================"""


def evaluated(truth: bool, verdict: bool, defect_type: str | None = None, score: float = 0.5) -> EvaluatedImage:
    return EvaluatedImage("x.png", defect_type or ("crack" if truth else "good"), truth, verdict, score)


def verdicts_of(tp: int, fp: int, fn: int, tn: int) -> list[EvaluatedImage]:
    return (
        [evaluated(True, True)] * tp
        + [evaluated(False, True)] * fp
        + [evaluated(True, False)] * fn
        + [evaluated(False, False)] * tn
    )


def image_metrics(evaluated: list[EvaluatedImage]) -> dict[str, Any]:
    return measure_scores(evaluated, resamples=0, seed=0)


def test_the_golden_counts_give_the_golden_block_to_the_letter() -> None:
    metrics = image_metrics(verdicts_of(tp=24, fp=2, fn=4, tn=21))
    assert metrics_block({**metrics, "confidence": 0.7845}) == GOLDEN_BLOCK


def test_the_golden_counts_give_the_golden_fractions() -> None:
    metrics = image_metrics(verdicts_of(tp=24, fp=2, fn=4, tn=21))
    expected = {
        "accuracy": pytest.approx(45 / 51),
        "precision": pytest.approx(24 / 26),
        "recall": pytest.approx(24 / 28),
        "f1_score": pytest.approx(48 / 54),
        "defect_detection_rate": pytest.approx(24 / 28),
        "composite_score": pytest.approx(0.3 * 45 / 51 + 0.2 * 24 / 26 + 0.3 * 24 / 28 + 0.2 * 48 / 54),
        "tp_defect": 24,
        "fp_defect": 2,
        "tn_good": 21,
        "fn_defect": 4,
        "total_images": 51,
        "false_alarm_rate": pytest.approx(2 / 23),
        "recall_by_type": {
            "crack": {"images": 28, "found": 24, "recall": pytest.approx(24 / 28), "interval": wilson(24, 28)}
        },
    }
    assert {name: metrics[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("counts", "undefined"),
    [
        ((0, 0, 0, 5), {"precision", "recall", "f1_score", "defect_detection_rate", "composite_score"}),
        ((0, 0, 5, 5), {"precision", "composite_score"}),
        ((0, 2, 0, 5), {"recall", "defect_detection_rate", "composite_score"}),
        (
            (0, 0, 0, 0),
            {"accuracy", "precision", "recall", "f1_score", "defect_detection_rate", "composite_score"},
        ),
        ((1, 0, 0, 0), set()),
    ],
)
def test_a_ratio_with_denominator_0_is_none_and_not_0(counts: tuple[int, int, int, int], undefined: set[str]) -> None:
    figures = rates(*counts)
    assert {name for name, value in figures.items() if value is None} == undefined
    assert "null" in json.dumps(figures) or not undefined


def test_the_block_shows_a_ratio_with_denominator_0_as_na() -> None:
    metrics = image_metrics(verdicts_of(tp=0, fp=0, fn=0, tn=3))
    assert metrics_block({**metrics, "confidence": None}).splitlines()[2:-1] == [
        "Accuracy : 100.00%",
        "Precision: n/a",
        "Recall   : n/a",
        "F1-Score : n/a",
        "Defect detection rate: n/a",
        "Composite: n/a",
        "Confidence: n/a",
    ]


@pytest.mark.parametrize(("value", "text"), [(0.0, "0.00%"), (1.0, "100.00%"), (45 / 51, "88.24%"), (None, "n/a")])
def test_a_fraction_is_shown_in_per_cent_with_two_digits(value: float | None, text: str) -> None:
    assert percent(value) == text


def test_there_is_a_recall_for_each_type_of_defect_and_none_for_good() -> None:
    metrics = image_metrics(
        [
            evaluated(True, True, "scratch"),
            evaluated(True, False, "scratch"),
            evaluated(True, False, "crack"),
            evaluated(False, True, "good"),
            evaluated(True, True, "unknown"),
        ]
    )
    assert metrics["recall_by_type"] == {
        "crack": {"images": 1, "found": 0, "recall": 0.0, "interval": wilson(0, 1)},
        "scratch": {"images": 2, "found": 1, "recall": 0.5, "interval": wilson(1, 2)},
        "unknown": {"images": 1, "found": 1, "recall": 1.0, "interval": wilson(1, 1)},
    }


@given(
    st.lists(
        st.builds(
            evaluated, st.booleans(), st.booleans(), st.sampled_from(["crack", "scratch", "hole"]), st.floats(0, 1)
        ),
        max_size=40,
    )
)
def test_the_figures_are_those_counted_by_hand(images: list[EvaluatedImage]) -> None:
    metrics = image_metrics(images)
    pairs = [(one.truth, one.verdict) for one in images]
    tp, fp = pairs.count((True, True)), pairs.count((False, True))
    fn, tn = pairs.count((True, False)), pairs.count((False, False))
    assert (metrics["tp_defect"], metrics["fp_defect"], metrics["fn_defect"], metrics["tn_good"]) == (tp, fp, fn, tn)
    expected: dict[str, Any] = {
        "accuracy": (tp + tn) / len(images) if images else None,
        "precision": tp / (tp + fp) if tp + fp else None,
        "recall": tp / (tp + fn) if tp + fn else None,
    }
    if tp:
        harmonic = 2 / (1 / expected["precision"] + 1 / expected["recall"])
        assert metrics["f1_score"] == pytest.approx(harmonic)
        weighted = 0.3 * expected["accuracy"] + 0.2 * expected["precision"] + 0.3 * expected["recall"] + 0.2 * harmonic
        assert metrics["composite_score"] == pytest.approx(weighted)
    for name, value in expected.items():
        assert metrics[name] == (None if value is None else pytest.approx(value))
    assert sum(row["images"] for row in metrics["recall_by_type"].values()) == tp + fn
    assert sum(row["found"] for row in metrics["recall_by_type"].values()) == tp


@pytest.mark.parametrize(
    ("truth", "verdict", "outcome"),
    [(True, True, "right"), (False, False, "right"), (True, False, "missed"), (False, True, "false_alarm")],
)
def test_an_outcome_has_a_name(truth: bool, verdict: bool, outcome: str) -> None:
    assert evaluated(truth, verdict).outcome == outcome
