"""Intervals over groups, checked against slow versions, and against intervals over images for groups of one image."""

import math
from collections.abc import Sequence
from itertools import product

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student_t

from flawmask.evaluation import by_group, uncertainty
from flawmask.evaluation.by_group import auroc_interval, auroc_variance, bootstrap_interval, numbered
from flawmask.evaluation.ranking import auroc, average_precision_score, rank
from flawmask.evaluation.uncertainty import Interval, Z, holds_defect, mcnemar, resample, widened

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Groups = npt.NDArray[np.int64]

counts = st.lists(
    st.integers(1, 6).flatmap(lambda whole: st.tuples(st.integers(0, whole), st.just(whole))), min_size=1, max_size=40
)


def wilson(part: Floats, whole: Floats) -> Interval | None:
    """The interval of a proportion where every group has a defective image."""
    return by_group.wilson(part, whole, np.ones(len(part), dtype=bool))


def design_effect(part: Floats, whole: Floats) -> float:
    return by_group.design_effect(part, whole, np.ones(len(part), dtype=bool))


def f1_interval(tp: Floats, fp: Floats, fn: Floats) -> Interval | None:
    return by_group.f1_interval(tp, fp, fn, np.ones(len(tp), dtype=bool))


def columns(rows: Sequence[tuple[int, ...]]) -> list[Floats]:
    return [np.array(column, dtype=float) for column in zip(*rows, strict=True)]


def parts(seed: int, count: int = 30, agree: float = 0.5) -> tuple[Flags, Floats, Groups]:
    """Truth, scores and groups of 1 to 6 images. Scores in a group are similar; a third of groups has both kinds."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(count), rng.integers(1, 7, count))
    kind = np.arange(count)[groups] % 3
    truth = np.where(kind == 2, rng.random(len(groups)) < 0.5, kind == 1)
    noise = math.sqrt(agree) * rng.normal(size=count)[groups] + math.sqrt(1 - agree) * rng.normal(size=len(groups))
    return truth, np.round(1 / (1 + np.exp(-noise - 1.5 * truth)), 2), groups


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_where_each_image_is_a_group_wilsons_interval_is_that_of_images(right: list[bool]) -> None:
    part = np.array(right, dtype=float)
    assert wilson(part, np.ones(len(part))) == pytest.approx(uncertainty.wilson(sum(right), len(right)), abs=1e-12)


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 6))
def test_where_images_of_a_group_agree_groups_count_as_images(right: list[bool], size: int) -> None:
    part = size * np.array(right, dtype=float)
    expected = uncertainty.wilson(sum(right), len(right))
    assert wilson(part, np.full(len(part), float(size))) == pytest.approx(expected, abs=1e-9)


@given(counts)
def test_wilsons_interval_holds_the_proportion_and_is_never_narrower_than_that_of_images(
    rows: list[tuple[int, int]],
) -> None:
    part, whole = columns(rows)
    bounds, of_images = wilson(part, whole), uncertainty.wilson(part.sum(), whole.sum())
    assert bounds is not None
    assert of_images is not None
    assert 0 <= bounds[0] <= part.sum() / whole.sum() <= bounds[1] <= 1
    assert bounds[0] <= of_images[0] + 1e-12
    assert bounds[1] >= of_images[1] - 1e-12
    assert 1 <= design_effect(part, whole) <= max(1, (whole**2).sum() / whole.sum()) + 1e-12


def test_a_stratum_without_images_does_not_count_and_without_images_there_is_no_interval() -> None:
    part, whole, defective = np.array([3.0, 1, 2, 0, 0]), np.array([4.0, 3, 2, 0, 0]), np.array([1, 1, 1, 0, 0]) > 0
    assert by_group.wilson(part, whole, defective) == wilson(part[:3], whole[:3])
    assert wilson(np.zeros(3), np.zeros(3)) is None
    assert f1_interval(np.zeros(2), np.zeros(2), np.zeros(2)) is None


def test_where_all_images_are_right_the_groups_count_and_not_the_images() -> None:
    assert wilson(np.full(15, 4.0), np.full(15, 4.0)) == uncertainty.wilson(15, 15)
    low, high = wilson(np.zeros(15), np.full(15, 4.0)) or (1.0, 0.0)
    assert (low, high) == pytest.approx(uncertainty.wilson(0, 15))


def test_the_design_effect_is_the_jackknifes() -> None:
    rng = np.random.default_rng(2)
    whole = rng.integers(1, 7, 400).astype(float)
    part = np.array([rng.binomial(int(n), rng.beta(1.5, 0.5)) for n in whole], dtype=float)
    share = part.sum() / whole.sum()
    without = (part.sum() - part) / (whole.sum() - whole)
    jackknife = 399 / 400 * ((without - without.mean()) ** 2).sum()
    quantile = student_t.ppf(0.975, 399) / Z
    expected = jackknife / (share * (1 - share) / whole.sum())
    assert design_effect(part, whole) == pytest.approx(expected * quantile**2, rel=0.02)


def test_the_variance_is_taken_within_each_stratum() -> None:
    rng = np.random.default_rng(1)
    whole, defective = rng.integers(1, 7, 400).astype(float), np.arange(400) < 250
    part = np.array(
        [rng.binomial(int(n), rng.beta(2, 2) if high else 0.05) for n, high in zip(whole, defective, strict=True)]
    )
    share = part.sum() / whole.sum()
    drawn = resample(defective, 4000, 0)  # of the groups, as many of each kind as there are
    spread = ((drawn @ part) / (drawn @ whole)).std()
    expected = (spread**2 / (share * (1 - share) / whole.sum())) * (1.005 * student_t.ppf(0.975, 398) / Z) ** 2
    assert by_group.design_effect(part.astype(float), whole, defective) == pytest.approx(expected, rel=0.05)
    assert by_group.wilson(np.array([1.0, 2]), np.array([2.0, 3]), np.array([True, False])) == pytest.approx(
        uncertainty.wilson(3 / 5 * 25 / 13, 25 / 13)
    )


def test_students_quantile_has_fewer_degrees_of_freedom_where_few_groups_make_the_variance() -> None:
    rng = np.random.default_rng(0)
    assert by_group.student(np.ones(12)) == pytest.approx(student_t.ppf(0.975, 11))
    assert by_group.student(rng.normal(size=5000)) == pytest.approx(Z, abs=0.01)
    few = np.append(np.ones(3), np.zeros(27))
    assert by_group.student(few) == pytest.approx(student_t.ppf(0.975, 2 / (1 / 3 - 1 / 30)))
    assert by_group.student(np.zeros(4)) == pytest.approx(student_t.ppf(0.975, 3))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_the_interval_of_f1_holds_it(rows: list[tuple[int, int, int]]) -> None:
    tp, fp, fn = columns(rows)
    bounds = f1_interval(tp, fp, fn)
    total = 2 * tp.sum() + fp.sum() + fn.sum()
    assert (bounds is None) == (total == 0)
    if bounds is not None:
        assert 0 <= bounds[0] <= 2 * tp.sum() / total <= bounds[1] <= 1
        assert bounds[0] < bounds[1]


def test_where_each_image_is_a_group_the_interval_of_f1_is_that_of_images() -> None:
    tp, fp, fn = (np.array([kind == one for one in "aaaaabbcccdd"], dtype=float) for kind in "abc")
    assert f1_interval(tp, fp, fn) == pytest.approx(uncertainty.f1_interval(5, 2, 3))


def slow_variance(truth: Flags, scores: Floats, groups: Groups) -> float:
    """Obuchowski's variance, pair by pair, as the paper writes it."""
    high, low = np.flatnonzero(truth).tolist(), np.flatnonzero(~truth).tolist()

    def wins(one: int, other: int) -> float:
        return float(scores[one] > scores[other]) + 0.5 * float(scores[one] == scores[other])

    area = float(np.mean([wins(one, other) for one in high for other in low]))
    of_high = {one: float(np.mean([wins(one, other) for other in low])) for one in high}
    of_low = {other: float(np.mean([wins(one, other) for one in high])) for other in low}
    sum_high, sum_low, sum_both, held_high, held_low = 0.0, 0.0, 0.0, 0, 0
    for group in set(groups.tolist()):
        mine = [of_high[one] for one in high if groups[one] == group]
        theirs = [of_low[one] for one in low if groups[one] == group]
        apart, other = sum(mine) - len(mine) * area, sum(theirs) - len(theirs) * area
        sum_high, sum_low, sum_both = sum_high + apart**2, sum_low + other**2, sum_both + apart * other
        held_high, held_low = held_high + bool(mine), held_low + bool(theirs)
    count, m, n = len(set(groups.tolist())), len(high), len(low)
    first = held_high / ((held_high - 1) * m) * sum_high
    second = held_low / ((held_low - 1) * n) * sum_low
    third = count / (count - 1) * sum_both
    return first / m + second / n + 2 * third / (m * n)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("agree", [0.0, 0.5, 1.0])
def test_the_variance_of_the_auroc_is_obuchowskis_written_out(seed: int, agree: float) -> None:
    case = parts(seed, agree=agree)
    assert auroc_variance(*case) == pytest.approx(slow_variance(*case), rel=1e-9)


def test_the_variance_of_the_auroc_is_delongs_where_each_image_is_a_group() -> None:
    truth, scores, _ = parts(1)
    high, low = scores[truth], scores[~truth]
    wins = (high[:, None] > low) + 0.5 * (high[:, None] == low)
    expected = np.var(wins.mean(axis=1), ddof=1) / len(high) + np.var(wins.mean(axis=0), ddof=1) / len(low)
    assert auroc_variance(truth, scores, np.arange(len(truth))) == pytest.approx(float(expected))


def test_the_variance_of_the_auroc_is_that_of_a_jackknife_over_groups() -> None:
    truth, scores, groups = parts(5, count=300)
    without = [float(auroc(rank(truth[groups != one], scores[groups != one]))[0]) for one in range(300)]
    jackknife = 299 / 300 * ((np.array(without) - np.mean(without)) ** 2).sum()
    assert auroc_variance(truth, scores, groups) == pytest.approx(jackknife, rel=0.03)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 25), st.floats(0, 1))
def test_the_interval_of_the_auroc_holds_it_and_has_a_width(seed: int, count: int, agree: float) -> None:
    truth, scores, groups = parts(seed, count, agree)
    if truth.all() or not truth.any():
        return
    low, high = auroc_interval(truth, scores, groups)
    area = float(auroc(rank(truth, scores))[0])
    assert 0 <= low <= area + 1e-8
    assert area - 1e-8 <= high <= 1
    assert low < high


def test_copies_of_an_image_make_the_interval_of_the_auroc_no_narrower() -> None:
    truth, scores, _ = parts(3)
    each = np.arange(len(truth))
    once, often = (
        auroc_interval(np.repeat(truth, times), np.repeat(scores, times), np.repeat(each, times)) for times in (1, 4)
    )
    assert often == pytest.approx(once)


@pytest.mark.parametrize("size", [1, 4])
def test_at_an_area_of_1_the_interval_is_newcombes_of_the_groups(size: int) -> None:
    truth = np.repeat(np.array([True] * 6 + [False] * 9), size)
    groups = np.repeat(np.arange(15), size)
    assert auroc_interval(truth, truth * 0.8 + 0.1, groups) == pytest.approx(uncertainty.auroc_interval(1.0, 6, 9))
    assert auroc_interval(truth, 0.9 - truth * 0.8, groups) == pytest.approx(uncertainty.auroc_interval(0.0, 6, 9))


def test_defective_images_of_a_single_group_count_as_one_image() -> None:
    truth = np.array([True] * 4 + [False] * 8)
    scores = np.concatenate((np.full(4, 0.55), np.linspace(0.1, 0.8, 8)))
    groups = np.array([0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8])
    area = float(auroc(rank(truth, scores))[0])
    assert auroc_interval(truth, scores, groups) == pytest.approx(uncertainty.auroc_interval(area, 1, 8))


def test_whole_groups_are_drawn_as_many_with_and_without_a_defect_as_there_are() -> None:
    truth, _, groups = parts(7)
    weights = resample(truth, 300, 1, groups)
    holds = np.bincount(groups, truth) > 0
    first = np.unique(groups, return_index=True)[1]
    np.testing.assert_array_equal(weights, weights[:, first][:, groups])
    assert (weights[:, first][:, holds].sum(axis=1) == holds.sum()).all()
    assert (weights[:, first][:, ~holds].sum(axis=1) == (~holds).sum()).all()
    assert weights.mean(axis=0) == pytest.approx(np.ones(len(truth)), abs=0.25)


def test_where_each_image_is_a_group_the_same_images_are_drawn() -> None:
    truth, _, _ = parts(8)
    np.testing.assert_array_equal(resample(truth, 50, 3, np.arange(len(truth))), resample(truth, 50, 3))


def test_bootstrapped_intervals_are_wider_where_groups_are_few() -> None:
    truth = np.array([True, True, False, False, False])
    groups = np.arange(5)
    assert widened(truth, None) == 0.95
    reach = student_t.ppf(0.975, 3) * math.sqrt(5 / 3)
    assert widened(truth, groups) == pytest.approx(math.erf(reach / math.sqrt(2)))
    many = np.arange(5000) % 2 == 0
    assert widened(many, np.arange(5000), 0.99) == pytest.approx(0.99, abs=1e-3)
    assert widened(np.array([True, True, False]), np.array([0, 0, 1])) is None


def drawn_accuracy(right: Flags, truth: Flags, groups: Groups) -> tuple[Floats, Floats]:
    """The share of images that are right, of the sample and of 4,000 drawn ones, and how often each group is drawn."""
    weights = np.vstack((np.ones(len(truth)), resample(truth, 4000, 0, groups)))
    return weights @ right / weights.sum(axis=1), times_drawn(weights, groups)


def times_drawn(weights: Floats, groups: Groups) -> Floats:
    return weights[1:, np.unique(groups, return_index=True)[1]]


@pytest.mark.parametrize("agree", [0.0, 1.0])
def test_the_bootstrapped_interval_of_a_proportion_is_close_to_wilsons(agree: float) -> None:
    truth, scores, groups = parts(3, count=300, agree=agree)
    right = truth == (scores > 0.7)
    values, drawn = drawn_accuracy(right, truth, groups)
    found = bootstrap_interval(values, drawn, truth, groups)
    part, whole = (np.bincount(groups, one).astype(float) for one in (right, np.ones(len(right))))
    expected = by_group.wilson(part, whole, holds_defect(truth, groups))
    assert found is not None
    assert expected is not None
    assert found[1] - found[0] == pytest.approx(expected[1] - expected[0], rel=0.1)
    assert found == pytest.approx(expected, abs=0.005)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 12), st.floats(0, 1))
def test_the_bootstrapped_interval_holds_the_figure(seed: int, count: int, agree: float) -> None:
    truth, scores, groups = parts(seed, count, agree)
    weights = np.vstack((np.ones(len(truth)), resample(truth, 100, seed, groups)))
    values = average_precision_score(rank(truth, scores, weights))
    bounds = bootstrap_interval(values, times_drawn(weights, groups), truth, groups)
    if bounds is not None:
        assert 0 <= bounds[0] <= values[0] <= bounds[1] <= 1
        assert bounds[0] < bounds[1]


def test_where_the_values_do_not_vary_the_interval_is_wilsons_for_the_groups() -> None:
    truth = np.repeat(np.array([True] * 6 + [False] * 9), 4)
    groups = np.repeat(np.arange(15), 4)
    values, drawn = drawn_accuracy(np.ones(60, dtype=bool), truth, groups)
    assert bootstrap_interval(values, drawn, truth, groups) == uncertainty.wilson(6, 6)
    low, high = bootstrap_interval(values / 2, drawn, truth, groups) or (1.0, 0.0)
    assert (low, high) == pytest.approx(uncertainty.wilson(3, 6))


def test_a_figure_that_varies_too_much_for_the_logit_has_percentiles_and_wilsons_interval() -> None:
    """A mask AP of 0.13 %, which jumps if one part is drawn often, as that of a network that has learnt nothing."""
    truth = np.ones(66, dtype=bool)
    groups = np.repeat(np.arange(11), 6)
    drawn = times_drawn(np.vstack((np.ones(66), resample(truth, 400, 0, groups))), groups)
    values = 0.0013 * np.concatenate(([1.0], 1 + 10 * (drawn[:, 3] >= 3)))
    expected = uncertainty.wilson(0.0013 * 11, 11)
    assert bootstrap_interval(values, drawn, truth, groups) == expected
    assert expected is not None
    assert expected[1] < 0.3
    values[1:][drawn[:, 3] >= 3] = 0.6  # now the percentiles reach further
    assert bootstrap_interval(values, drawn, truth, groups) == (expected[0], 0.6)


def test_there_is_no_interval_for_a_mostly_undefined_metric_or_for_two_groups() -> None:
    truth, scores, groups = parts(2)
    values, drawn = drawn_accuracy(scores > 0.5, truth, groups)
    undefined = np.where(np.arange(len(values)) % 10 == 1, np.nan, values)
    assert bootstrap_interval(undefined, drawn, truth, groups) is None
    assert bootstrap_interval(np.full(len(values), np.nan), drawn, truth, groups) is None
    two = np.array([True, True, False, False])
    values, drawn = drawn_accuracy(np.array([True, False, True, True]), two, np.array([0, 0, 1, 1]))
    assert bootstrap_interval(values, drawn, two, np.array([0, 0, 1, 1])) is None


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.booleans()), min_size=1, max_size=20))
def test_p_over_groups_is_the_share_of_sign_combinations_at_least_as_far_from_0(
    rows: list[tuple[int, bool, bool]],
) -> None:
    groups = numbered([str(row[0]) for row in rows])
    right, other = np.array([row[1:] for row in rows]).T
    assert groups is not None
    leads = np.bincount(groups, right.astype(float) - other)
    sums = [abs(np.dot(signs, leads)) for signs in product((-1, 1), repeat=len(leads))]
    assert mcnemar(right, other, groups) == pytest.approx(np.mean([one >= abs(leads.sum()) for one in sums]))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40), st.integers(1, 4))
def test_p_is_mcnemars_for_groups_of_one_image_and_copies_do_not_change_it(
    pairs: list[tuple[bool, bool]], times: int
) -> None:
    right, other = np.array(pairs).T
    often = [np.repeat(one, times) for one in (right, other, np.arange(len(right)))]
    assert mcnemar(*often) == pytest.approx(mcnemar(right, other))


def test_intervals_over_groups_hold_the_truth_where_those_of_images_do_not() -> None:
    rng, samples = np.random.default_rng(4), 400
    hits = {"groups": 0, "images": 0}
    for _ in range(samples):
        whole = rng.integers(1, 7, 50).astype(float)
        part = whole * (rng.random(50) < 0.85)
        for name, bounds in {
            "groups": wilson(part, whole),
            "images": uncertainty.wilson(part.sum(), whole.sum()),
        }.items():
            assert bounds is not None
            hits[name] += bounds[0] <= 0.85 <= bounds[1]
    assert 0.92 <= hits["groups"] / samples <= 0.98
    assert hits["images"] / samples < 0.75
