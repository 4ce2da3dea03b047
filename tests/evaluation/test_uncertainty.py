"""Intervals and tests, checked against SciPy, against explicit sums, and by how often they hold the truth."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, norm

from flawmask.evaluation import uncertainty
from flawmask.evaluation.ranking import auroc, rank
from flawmask.evaluation.uncertainty import (
    LEVEL,
    Flags,
    Floats,
    Groups,
    Z,
    auroc_interval,
    f1_interval,
    mcnemar,
    percentiles,
    resample,
    wilson,
)


@given(st.integers(1, 300).flatmap(lambda whole: st.tuples(st.integers(0, whole), st.just(whole))))
def test_wilsons_interval_is_scipys(counts: tuple[int, int]) -> None:
    part, whole = counts
    expected = binomtest(part, whole).proportion_ci(0.95, method="wilson")
    assert wilson(part, whole) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_the_number_of_standard_deviations_is_scipys() -> None:
    assert norm.ppf((1 + LEVEL) / 2) == Z


def test_wilsons_interval_of_the_readmes_example() -> None:
    assert wilson(54, 63) == pytest.approx((0.750, 0.923), abs=0.001)
    assert wilson(0, 0) is None
    assert wilson(17, 17) == pytest.approx((0.816, 1.0), abs=0.001)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50))
def test_the_interval_of_f1_holds_it_and_has_a_width(tp: int, fp: int, fn: int) -> None:
    bounds = f1_interval(tp, fp, fn)
    if tp + fp + fn == 0:
        assert bounds is None
        return
    assert bounds is not None
    assert 0 <= bounds[0] <= 2 * tp / (2 * tp + fp + fn) <= bounds[1] <= 1
    assert bounds[0] < bounds[1]


@given(st.floats(0, 1), st.integers(1, 200), st.integers(1, 200))
def test_the_interval_of_the_auroc_holds_it_and_has_a_width(area: float, positives: int, negatives: int) -> None:
    low, high = auroc_interval(area, positives, negatives)
    assert 0 <= low <= area + 1e-8
    assert area - 1e-8 <= high <= 1
    assert low < high
    mirrored = auroc_interval(1 - area, positives, negatives)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-6)


def test_the_interval_of_the_auroc_is_hanleys_and_mcneils_where_samples_are_large() -> None:
    area, n = 0.85, 20_000
    first, second = area / (2 - area), 2 * area**2 / (1 + area)
    variance = (area * (1 - area) + (n - 1) * (first - area**2) + (n - 1) * (second - area**2)) / n**2
    half = 1.959964 * math.sqrt(variance)
    assert auroc_interval(area, n, n) == pytest.approx((area - half, area + half), abs=1e-4)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(3)
    samples, shift, hits = 300, 1.2, {"auroc": 0, "bootstrap": 0}
    known = 0.5 * (1 + math.erf(shift / 2))  # of two normal distributions that far apart
    for _ in range(samples):
        truth = np.arange(40) < 20
        scores = rng.normal(0, 1, 40) + shift * truth
        low, high = auroc_interval(float(auroc(rank(truth, scores))[0]), 20, 20)
        hits["auroc"] += low <= known <= high
        bounds = percentiles(auroc(rank(truth, scores, resample(truth, 200, 0))))
        assert bounds is not None
        hits["bootstrap"] += bounds[0] <= known <= bounds[1]
    assert 0.90 <= hits["auroc"] / samples <= 0.99
    assert 0.86 <= hits["bootstrap"] / samples <= 0.99


def test_resampling_keeps_the_number_of_defective_and_of_good_images() -> None:
    truth = np.array([True] * 5 + [False] * 12)
    weights = resample(truth, 500, seed=1)
    assert weights.shape == (500, 17)
    assert (weights[:, truth].sum(axis=1) == 5).all()
    assert (weights[:, ~truth].sum(axis=1) == 12).all()
    assert weights.mean(axis=0) == pytest.approx(np.ones(17), abs=0.2)
    assert np.array_equal(weights, resample(truth, 500, seed=1))
    assert not np.array_equal(weights, resample(truth, 500, seed=2))
    assert resample(np.array([True]), 3, seed=0).tolist() == [[1.0]] * 3


def test_there_is_no_interval_for_mostly_undefined_values() -> None:
    values = np.linspace(0, 1, 100)
    assert percentiles(values) == pytest.approx((0.025, 0.975))
    values[:6] = np.nan
    assert percentiles(values) is None
    assert percentiles(np.full(10, np.nan)) is None
    assert percentiles(np.zeros(0)) is None


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_mcnemars_p_is_the_chance_of_a_split_at_least_as_uneven(pairs: list[tuple[bool, bool]]) -> None:
    one, other = np.array(pairs).T
    first, second = int((one & ~other).sum()), int((other & ~one).sum())
    together = first + second
    tail = sum(math.comb(together, k) for k in range(min(first, second) + 1)) / 2**together
    assert mcnemar(one, other) == pytest.approx(min(1.0, 2 * tail))


@pytest.mark.parametrize("with_groups", [False, True])
@pytest.mark.parametrize("images", [1, 7, 40])
def test_weights_drawn_in_blocks_are_those_drawn_at_once(
    images: int, with_groups: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = np.random.default_rng(images).random(images) < 0.4
    groups = np.arange(images) // 2 if with_groups else None
    expected = drawn_at_once(truth, 50, 3, np.arange(images) if groups is None else groups)
    assert np.array_equal(resample(truth, 50, 3, groups), expected)
    for block in (1, 3 * images, 10**6):
        monkeypatch.setattr(uncertainty, "BLOCK", block)
        blocks = list(uncertainty.resample_blocks(truth, 50, 3, groups))
        assert max(len(one) for one in blocks) <= max(1, block // images)
        assert np.array_equal(np.concatenate(blocks), expected)
    assert resample(truth, 0, 3, groups).shape == (0, images)


def drawn_at_once(truth: Flags, resamples: int, seed: int, groups: Groups) -> Floats:
    draw, defective = np.random.default_rng(seed), np.bincount(groups, truth) > 0
    weights = np.zeros((resamples, len(defective)))
    for stratum in (defective, ~defective):
        if stratum.any():
            shares = np.full(stratum.sum(), 1 / stratum.sum())
            weights[:, stratum] = draw.multinomial(stratum.sum(), shares, size=resamples)
    return weights[:, groups]
