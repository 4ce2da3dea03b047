"""The split: stratified and seeded, no group in two splits, and as close to the ratio as the groups allow."""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
import scipy.optimize
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flawmask.data.split import Member, fold_groups, split_groups, split_method

RATIOS = st.floats(0.02, 0.98)
SEEDS = st.integers(0, 2**32)


def singles(**counts: int) -> list[Member]:
    """Return members that are each their own group."""
    return [Member(f"{kind} {number}", kind) for kind, count in counts.items() for number in range(count)]


def in_training(members: Sequence[Member], training: frozenset[str]) -> Counter[str]:
    return Counter(member.defect_type for member in members if member.group in training)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 30), min_size=1), RATIOS, SEEDS)
def test_each_type_of_single_images_is_split_to_the_nearest_image(
    counts: dict[str, int], ratio: float, seed: int
) -> None:
    members = singles(**counts)
    found = in_training(members, split_groups(members, ratio, seed))
    for kind, count in counts.items():
        wanted = math.floor(ratio * count + 0.5)
        assert found[kind] == (1 if count == 1 else min(max(wanted, 1), count - 1))


def test_counts_computed_by_hand() -> None:
    members = singles(good=20, crack=3, hole=2, scratch=1)
    assert in_training(members, split_groups(members, 0.8, 42)) == {"good": 16, "crack": 2, "hole": 1, "scratch": 1}
    members = singles(good=17, crack=8)
    assert in_training(members, split_groups(members, 0.8, 42)) == {"good": 14, "crack": 6}  # 13.6 and 6.4


def cost(members: Sequence[Member], training: frozenset[str], ratio: float) -> tuple[int, float]:
    """Return how many types are missing in a split that they could be in, and the distance to the wanted counts."""
    groups = defaultdict(set)
    for member in members:
        groups[member.defect_type].add(member.group)
    found, totals = in_training(members, training), Counter(member.defect_type for member in members)
    missing = sum(
        (not groups[kind] & training) + (len(groups[kind]) > 1 and groups[kind] <= training) for kind in groups
    )
    wanted = {kind: math.floor(ratio * total + 0.5) for kind, total in totals.items()}
    return missing, sum(abs(found[kind] - wanted[kind]) for kind in totals)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.builds(Member, st.sampled_from("12345678"), st.sampled_from("abc")), min_size=1, max_size=24),
    RATIOS,
    SEEDS,
)
def test_no_other_split_of_groups_that_may_span_types_is_better(members: list[Member], ratio: float, seed: int) -> None:
    groups = sorted({member.group for member in members})
    chosen = split_groups(members, ratio, seed)
    assert chosen <= set(groups)
    every = (frozenset(side) for size in range(len(groups) + 1) for side in itertools.combinations(groups, size))
    assert cost(members, chosen, ratio) == min(cost(members, side, ratio) for side in every)


def test_single_images_are_shuffled_in_an_order_that_no_library_version_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def solved(*_: Any, **__: Any) -> None:
        raise AssertionError("a solver chose among equally good divisions, as its version pleases")

    monkeypatch.setattr(scipy.optimize, "milp", solved)
    members = singles(good=6, crack=4)
    assert split_groups(members, 0.5, 42) == {"crack 0", "crack 3", "good 0", "good 1", "good 5"}
    assert split_method(members) == "shuffle"
    assert [len(fold) for fold in fold_groups(members, 2, 42)] == [5, 5]


def test_groups_of_several_images_are_split_by_the_integer_program() -> None:
    assert split_method([*singles(good=6), Member("good 1", "good")]) == "integer program"
    assert split_method([*singles(good=6), Member("good 1", "crack")]) == "integer program"


def test_adding_an_image_to_one_type_does_not_move_images_of_other_types() -> None:
    for seed in range(5):
        before = split_groups(singles(crack=9, good=20), 0.8, seed)
        after = split_groups(singles(crack=10, good=20), 0.8, seed)
        assert {name for name in before ^ after if name.startswith("good")} == set()


def test_a_group_stays_together_even_if_that_misses_the_ratio() -> None:
    members = [Member("big", "crack")] * 9 + [Member("small", "crack")]
    for seed in range(5):
        assert split_groups(members, 0.5, seed) in ({"big"}, {"small"})


def test_a_type_with_two_groups_is_in_both_splits_and_a_single_group_goes_to_training() -> None:
    members = [Member(group, kind) for kind, groups in {"crack": "abb", "hole": "c"}.items() for group in groups]
    for seed in range(5):
        training = split_groups(members, 0.8, seed)
        assert "c" in training
        assert len(training & {"a", "b"}) == 1


def test_the_same_seed_gives_the_same_split_and_0_is_a_valid_seed() -> None:
    members = singles(good=20, crack=10)
    drawn = [split_groups(members, 0.8, seed) for seed in (0, 1, 2, 42)]
    assert drawn == [split_groups(list(reversed(members)), 0.8, seed) for seed in (0, 1, 2, 42)]
    assert len(set(drawn)) == 4


def test_every_image_is_in_training_for_some_seeds_and_not_for_others() -> None:
    members = singles(good=10)
    times = Counter(group for seed in range(60) for group in split_groups(members, 0.5, seed))
    assert len(times) == 10
    assert min(times.values()) > 10
    assert max(times.values()) < 50


def test_a_large_group_is_in_training_for_some_seeds_and_not_for_others() -> None:
    members = [Member("large", "good")] * 3 + singles(good=5)
    times = sum("large" in split_groups(members, 0.5, seed) for seed in range(60))
    assert 10 < times < 50


@pytest.mark.timeout(60)
def test_thousands_of_images_are_split_in_seconds() -> None:
    members = singles(good=2500, crack=250, hole=250)
    assert in_training(members, split_groups(members, 0.8, 0)) == {"good": 2000, "crack": 200, "hole": 200}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 25), st.sampled_from("abc")), min_size=6, max_size=60),
    st.integers(2, 5),
    SEEDS,
)
@example([(0, "a"), *[(1, "a")] * 5], 2, 142)  # without presolve, HiGHS gives up here
def test_each_group_is_in_exactly_one_fold(pairs: list[tuple[int, str]], folds: int, seed: int) -> None:
    members = [Member(f"group {group}", kind) for group, kind in pairs]
    groups = {member.group for member in members}
    found = fold_groups(members, min(folds, len(groups)), seed)
    assert len(found) == min(folds, len(groups))
    assert sorted(itertools.chain.from_iterable(found)) == sorted(groups)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from("abcd"), st.integers(1, 30), min_size=1), st.integers(2, 5), SEEDS)
def test_each_fold_holds_its_share_of_each_type_of_single_images(counts: dict[str, int], folds: int, seed: int) -> None:
    members = singles(**counts)
    found = fold_groups(members, min(folds, len(members)), seed)
    for kind, count in counts.items():
        held = [in_training(members, fold)[kind] for fold in found]
        assert sum(held) == count
        if count >= 2 * len(found):
            assert max(held) - min(held) <= 1


def test_folds_are_seeded() -> None:
    members = singles(good=20, crack=10)
    assert fold_groups(members, 5, 0) == fold_groups(members, 5, 0)
    assert fold_groups(members, 5, 0) != fold_groups(members, 5, 1)
