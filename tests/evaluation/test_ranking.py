"""Metrics that need no threshold, checked against scikit-learn, also for weighted images."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score, roc_curve

from flawmask.evaluation import ranking

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

counts = st.integers(2, 60)
samples = counts.flatmap(
    lambda count: st.tuples(
        arrays(bool, count),
        arrays(float, count, elements=st.sampled_from([0.0, 0.2, 0.5, 0.500001, 1.0]) | st.floats(0, 1, width=32)),
        arrays(float, (2, count), elements=st.integers(0, 3).map(float)),
    )
)


def has_both(truth: Flags, weights: Floats) -> bool:
    return bool((weights * truth).sum() > 0 and (weights * ~truth).sum() > 0)


@settings(max_examples=300, deadline=None)
@given(samples)
def test_auroc_and_average_precision_are_scikit_learns(sample: tuple[Flags, Floats, Floats]) -> None:
    truth, scores, weights = sample
    ranked = ranking.rank(truth, scores, weights)
    areas, precisions = ranking.auroc(ranked), ranking.average_precision_score(ranked)
    for row, area, precision in zip(weights, areas, precisions, strict=True):
        if has_both(truth, row):
            assert area == pytest.approx(roc_auc_score(truth, scores, sample_weight=row), abs=1e-9)
        else:
            assert np.isnan(area)
        if (row * truth).sum() > 0:
            assert precision == pytest.approx(average_precision_score(truth, scores, sample_weight=row), abs=1e-9)
        else:
            assert np.isnan(precision)


@settings(max_examples=200, deadline=None)
@given(samples)
def test_the_best_f1_is_the_best_that_any_threshold_gives(sample: tuple[Flags, Floats, Floats]) -> None:
    truth, scores, _ = sample
    (best,), (threshold,) = ranking.best_f1(ranking.rank(truth, scores))
    if not truth.any():
        assert np.isnan(best)
        assert np.isnan(threshold)
        return
    by_hand = {float(score): f1_score(truth, scores >= score, zero_division=0) for score in scores if score > 0}
    if not by_hand:  # nothing was found anywhere, so nothing can be rejected
        assert best == 0
        return
    assert best == pytest.approx(max(by_hand.values()))
    assert by_hand[float(threshold)] == pytest.approx(best)


@settings(max_examples=200, deadline=None)
@given(samples, st.sampled_from([1.0, 0.99, 0.95, 0.5]))
def test_false_alarms_at_a_recall_are_the_fewest_that_reach_it(
    sample: tuple[Flags, Floats, Floats], recall: float
) -> None:
    truth, scores, _ = sample
    (rate,) = ranking.false_alarms_at(ranking.rank(truth, scores), recall)
    if not truth.any() or truth.all():
        assert np.isnan(rate)
        return
    false_rate, found, _ = roc_curve(truth, scores, drop_intermediate=False)
    assert rate == pytest.approx(min(false_rate[found >= recall - 1e-9]))


@settings(max_examples=200, deadline=None)
@given(samples, st.sampled_from([0.0, 0.01, 0.05, 0.5, 1.0]))
def test_the_recall_at_a_false_alarm_rate_is_the_highest_within_it(
    sample: tuple[Flags, Floats, Floats], allowed: float
) -> None:
    truth, scores, _ = sample
    (found,) = ranking.recall_at(ranking.rank(truth, scores), allowed)
    if not truth.any() or truth.all():
        assert np.isnan(found)
        return
    false_rate, recall, thresholds = roc_curve(truth, scores, drop_intermediate=False)
    assert found == pytest.approx(max(recall[(false_rate <= allowed + 1e-9) & (thresholds > 0)]))


def test_a_threshold_of_zero_does_not_count_as_recall() -> None:
    """An image without a predicted defect has the score 0, and is never rejected."""
    ranked = ranking.rank(np.array([True, True, False]), np.array([0.9, 0.0, 0.0]))
    assert ranking.recall_at(ranked, 1.0) == pytest.approx([0.5])


def test_the_curves_start_and_end_where_they_must() -> None:
    truth, scores = np.array([True, True, False, False]), np.array([0.9, 0.4, 0.6, 0.1])
    ranked = ranking.rank(truth, scores)
    roc = ranking.roc_curve(ranked)
    assert roc == {"x": [0.0, 0.0, 0.5, 0.5, 1.0], "y": [0.0, 0.5, 0.5, 1.0, 1.0]}
    pr = ranking.precision_recall_curve(ranked)
    assert pr is not None
    assert pr["x"] == [0.5, 0.5, 1.0, 1.0]
    assert pr["y"] == pytest.approx([1.0, 0.5, 2 / 3, 0.5])
    assert ranking.roc_curve(ranking.rank(np.ones(4, dtype=bool), scores)) is None
    assert ranking.precision_recall_curve(ranking.rank(np.zeros(4, dtype=bool), scores)) is None


def test_a_long_curve_is_thinned_and_keeps_its_ends() -> None:
    rng = np.random.default_rng(0)
    curve = ranking.roc_curve(ranking.rank(rng.random(5000) < 0.5, rng.random(5000)))
    assert curve is not None
    assert len(curve["x"]) <= ranking.CURVE_POINTS
    assert (curve["x"][0], curve["y"][0], curve["x"][-1], curve["y"][-1]) == (0.0, 0.0, 1.0, 1.0)


@settings(max_examples=100, deadline=None)
@given(samples)
def test_the_calibration_error_is_the_mean_gap_of_the_bins(sample: tuple[Flags, Floats, Floats]) -> None:
    truth, scores, weights = sample
    bins = ranking.calibration(truth, scores)
    assert sum(one["count"] for one in bins) == len(truth)
    gap = sum(one["count"] * abs(one["mean_score"] - one["share_defective"]) for one in bins) / len(truth)
    ones = np.ones((1, len(truth)))
    assert ranking.expected_calibration_error(truth, scores, ones)[0] == pytest.approx(gap)
    for row in weights:
        copies = np.repeat(np.arange(len(truth)), row.astype(int))
        (error,) = ranking.expected_calibration_error(truth, scores, row[None])
        if len(copies):
            ones = np.ones((1, len(copies)))
            assert error == pytest.approx(ranking.expected_calibration_error(truth[copies], scores[copies], ones)[0])
        else:
            assert np.isnan(error)


def test_a_confusion_matrix_has_the_truth_in_rows() -> None:
    found = ranking.confusion(["good", "crack", "crack"], ["crack", "crack", "good"], ["good", "crack", "hole"])
    assert found == {"classes": ["good", "crack", "hole"], "rows": [[0, 1, 0], [1, 1, 0], [0, 0, 0]]}
