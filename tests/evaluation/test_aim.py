"""Choosing a threshold for an aim, and the file that keeps it beside its checkpoint."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from flawmask.errors import FlawmaskError
from flawmask.evaluation.aim import choose
from flawmask.evaluation.config import parse_aim
from flawmask.evaluation.uncertainty import resample
from flawmask.inference import threshold
from flawmask.inference.threshold import Threshold
from flawmask.tiles import WHOLE_IMAGES

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

samples = st.integers(2, 30).flatmap(
    lambda count: st.tuples(
        arrays(bool, count).filter(lambda truth: truth.any() and not truth.all()),
        arrays(float, count, elements=st.sampled_from([0.0, 0.3, 0.5]) | st.floats(0, 1, width=32)).filter(np.any),
    )
)


def chosen(truth: Flags, scores: Floats, aim: str) -> Threshold:
    return choose(truth, scores, resample(truth, 50, 0), aim, "val", 0)


def counts(truth: Flags, scores: Floats, value: float) -> tuple[int, int]:
    """True and false positives of the verdict. An image without detections is never rejected."""
    called = (scores >= value) & (scores > 0)
    return int((called & truth).sum()), int((called & ~truth).sum())


def every_verdict(truth: Flags, scores: Floats) -> list[tuple[int, int]]:
    return [counts(truth, scores, value) for value in {*scores[scores > 0].tolist(), 2.0}]


@settings(max_examples=200, deadline=None)
@given(samples)
def test_no_threshold_has_a_higher_f1_than_the_one_chosen_for_it(sample: tuple[Flags, Floats]) -> None:
    truth, scores = sample
    positives = int(truth.sum())
    best = max(2 * tp / (tp + fp + positives) for tp, fp in every_verdict(truth, scores))
    found = chosen(truth, scores, "f1")
    assert found.reached == bool(scores[truth].any())
    tp, fp = counts(truth, scores, found.value)
    assert 2 * tp / (tp + fp + positives) == pytest.approx(best)


@settings(max_examples=200, deadline=None)
@given(samples, st.sampled_from([0.5, 0.9, 1.0]))
def test_a_recall_is_reached_with_the_fewest_false_alarms(sample: tuple[Flags, Floats], recall: float) -> None:
    truth, scores = sample
    found = chosen(truth, scores, f"recall={recall}")
    tp, fp = counts(truth, scores, found.value)
    enough = [fp for tp, fp in every_verdict(truth, scores) if tp >= recall * truth.sum() - 1e-9]
    assert found.reached == bool(enough)
    assert fp == min(enough) if enough else tp == counts(truth, scores, 0.0)[0]


@settings(max_examples=200, deadline=None)
@given(samples, st.sampled_from([0.0, 0.1, 0.5]))
def test_false_alarms_are_kept_with_the_fewest_misses(sample: tuple[Flags, Floats], share: float) -> None:
    truth, scores = sample
    found = chosen(truth, scores, f"false_alarms={share}")
    tp, fp = counts(truth, scores, found.value)
    negatives = int((~truth).sum())
    allowed = [(one, other) for one, other in every_verdict(truth, scores) if other <= share * negatives + 1e-9]
    out_of_reach = int((scores[~truth] == 1.0).sum()) > share * negatives  # no threshold lets the highest score pass
    assert found.reached == (not out_of_reach)
    if found.reached:
        assert fp <= share * negatives + 1e-9
        assert tp == max(one for one, _ in allowed)


def test_the_threshold_lies_between_the_scores_and_has_an_interval() -> None:
    truth = np.array([True] * 10 + [False] * 10)
    scores = np.concatenate((np.linspace(0.6, 0.9, 10), np.linspace(0.1, 0.4, 10)))
    found = chosen(truth, scores, "f1")
    assert found.value == pytest.approx(0.5)
    assert (found.how, found.aim, found.chosen_on, found.images) == ("aim", "f1", "val", 20)
    assert found.interval is not None
    assert 0.1 < found.interval[0] <= 0.5 <= found.interval[1] < 0.9


def test_groups_widen_the_interval_and_do_not_change_the_threshold() -> None:
    rng = np.random.default_rng(1)
    truth = np.repeat(np.arange(20) % 2 == 0, 4)
    scores = np.repeat(np.clip(0.3 + 0.3 * truth[::4] + rng.normal(0, 0.15, 20), 0.01, 0.99), 4)
    groups = np.repeat(np.arange(20), 4)
    for aim in ("f1", "recall=0.9", "false_alarms=0.1"):
        alone = choose(truth, scores, resample(truth, 500, 0), aim, "val", 0)
        found = choose(truth, scores, resample(truth, 500, 0, groups), aim, "val", 0, groups)
        assert (found.value, found.images, found.groups, alone.groups) == (alone.value, 80, 20, None)
        assert found.interval is not None
        assert alone.interval is not None
        assert found.interval[1] - found.interval[0] > alone.interval[1] - alone.interval[0]


@pytest.mark.parametrize(
    ("truth", "scores", "says"),
    [
        ([True, True], [0.4, 0.5], "no good image"),
        ([False] * 2, [0.4, 0.5], "no defective image"),
    ],
)
def test_a_split_with_one_kind_of_image_is_refused(truth: list[bool], scores: list[float], says: str) -> None:
    with pytest.raises(FlawmaskError, match=says):
        chosen(np.array(truth), np.array(scores, dtype=float), "f1")


@pytest.mark.parametrize("aim", ["f1", "recall=0.5", "false_alarms=0.5"])
def test_without_detections_the_threshold_is_the_default_and_the_aim_is_not_reached(aim: str) -> None:
    found = chosen(np.array([True, False]), np.zeros(2), aim)
    assert (found.value, found.reached, found.aim) == (0.5, False, aim)


@pytest.mark.parametrize("aim", ["recall", "f1=0.9", "recall=2", "false_alarms=x", "precision=0.9", "", "recall=nan"])
def test_an_unknown_aim_is_refused(aim: str) -> None:
    with pytest.raises(FlawmaskError, match="is not known: give f1"):
        parse_aim(aim)


def test_a_threshold_comes_back_from_its_file(tmp_path: Path) -> None:
    model = tmp_path / "best.pt"
    model.write_bytes(b"weights")
    assert threshold.load(model) is None
    kept = Threshold(0.42, "aim", "recall=0.99", "val", 17, (0.3, 0.6), 5, reached=False, chosen_by=("ab", "cd"))
    threshold.save(kept, model)
    assert threshold.load(model) == kept
    assert threshold.of("auto", model, 5, WHOLE_IMAGES) == kept
    assert threshold.of(0.7, model, 5, WHOLE_IMAGES) == Threshold(0.7, "given")
    assert "groups" not in json.loads((tmp_path / "best.threshold.json").read_text())
    of_parts = replace(kept, groups=9)
    threshold.save(of_parts, model)
    assert threshold.load(model) == of_parts


def test_a_threshold_for_another_checkpoint_min_area_or_tiles_is_not_used(tmp_path: Path) -> None:
    model = tmp_path / "best.pt"
    model.write_bytes(b"weights")
    threshold.save(Threshold(0.42, "aim", "f1", "val", 17), model)
    with pytest.raises(FlawmaskError, match="--min_area 9: run flawmask evaluate --conf auto --min_area 9 first"):
        threshold.of("auto", model, 9, WHOLE_IMAGES)
    tiles = {"tile": 64, "overlap": 16, "tile_from": "all"}
    flags = "--min_area 0 --tile 64 --overlap 16 --tile_from all"
    with pytest.raises(FlawmaskError, match=f"for {flags}: run flawmask evaluate --conf auto {flags} first"):
        threshold.of("auto", model, 0, tiles)
    of_tiles = Threshold(0.42, "aim", "f1", "val", 17, tile=64, overlap=16)
    threshold.save(of_tiles, model)
    assert threshold.of("auto", model, 0, tiles) == of_tiles
    for other in (tiles | {"overlap": 20}, tiles | {"tile_from": "coarse"}):
        with pytest.raises(FlawmaskError, match="has no threshold"):
            threshold.of("auto", model, 0, other)
    with pytest.raises(FlawmaskError, match="run flawmask evaluate --conf auto --min_area 0 --tile off first"):
        threshold.of("auto", model, 0, WHOLE_IMAGES)
    model.write_bytes(b"other weights")
    assert threshold.load(model) is None
    with pytest.raises(FlawmaskError, match="has no threshold"):
        threshold.of("auto", model, 0, WHOLE_IMAGES)


@pytest.mark.parametrize("change", [{"value": 3}, {"value": "high"}, {"interval": 5}, {"unknown": 1}, {"chosen_by": 4}])
def test_a_damaged_threshold_file_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    model = tmp_path / "best.pt"
    model.write_bytes(b"weights")
    threshold.save(Threshold(0.42, "aim", "f1", "val", 17), model)
    path = tmp_path / "best.threshold.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FlawmaskError, match=r"best\.threshold\.json is damaged"):
        threshold.load(model)
