"""The calibration of scores: it is monotone and finite, and is fitted to other images than those it is measured on."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.linear_model import LogisticRegression

from flawmask.errors import FlawmaskError
from flawmask.evaluation import calibrate
from flawmask.evaluation.calibrate import fit, out_of_fold
from flawmask.evaluation.ranking import auroc, brier, expected_calibration_error, rank
from flawmask.inference import calibration
from flawmask.inference.calibration import HIGHEST, LOWEST, Calibration, logit
from flawmask.tiles import WHOLE_IMAGES

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

samples = st.integers(2, 40).flatmap(
    lambda count: st.tuples(
        arrays(bool, count).filter(lambda truth: truth.any() and not truth.all()),
        arrays(float, count, elements=st.sampled_from([0.0, 1.0]) | st.floats(0, 1, width=32)),
    )
)


def fitted(truth: Flags, scores: Floats) -> Calibration:
    curve = fit(truth, scores, "val", 0)
    assert curve is not None
    return curve


def drawn(images: int, seed: int) -> tuple[Flags, Floats]:
    """Return images whose scores are too extreme: the true logit is half of theirs, minus 1."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, images)
    return rng.random(images) < 1 / (1 + np.exp(1 - logits / 2)), 1 / (1 + np.exp(-logits))


@settings(max_examples=100, deadline=None)
@given(samples)
def test_the_probability_is_finite_and_never_falls_as_the_score_rises(sample: tuple[Flags, Floats]) -> None:
    curve = fitted(*sample)
    assert np.isfinite([curve.slope, curve.intercept]).all()
    probabilities = curve.probability(np.linspace(0, 1, 101))
    assert ((probabilities > 0) & (probabilities < 1)).all()
    assert (np.diff(probabilities) >= 0).all()


@settings(max_examples=100, deadline=None)
@given(samples)
def test_images_rank_as_before(sample: tuple[Flags, Floats]) -> None:
    truth, scores = sample
    scores = np.clip(scores, LOWEST, 0.99).round(3)  # beyond these limits, and between closer scores, it may be flat
    curve = fitted(truth, scores)
    if curve.slope > 1e-3:
        before, after = (
            auroc(rank(truth, one, np.ones((1, len(truth))))) for one in (scores, curve.probability(scores))
        )
        assert after == pytest.approx(before)


def test_it_is_the_logistic_regression_that_scikit_learn_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "PRIOR_SD", np.array([1e6, 1e6]))
    truth, scores = drawn(300, 0)
    other = LogisticRegression(C=np.inf, tol=1e-10).fit(logit(scores)[:, None], truth)
    curve = fitted(truth, scores)
    assert [curve.slope, curve.intercept] == pytest.approx([other.coef_[0, 0], other.intercept_[0]], rel=1e-3)


def test_scores_that_are_too_extreme_become_probabilities() -> None:
    curve = fitted(*drawn(2000, 1))
    assert [curve.slope, curve.intercept] == pytest.approx([0.5, -1.0], abs=0.15)
    truth, scores = drawn(2000, 2)
    weights = np.ones((1, len(truth)))
    for error in (expected_calibration_error, brier):
        assert error(truth, curve.probability(scores), weights)[0] < 0.9 * error(truth, scores, weights)[0]


def test_a_few_images_that_a_threshold_separates_change_the_scores_only_a_little() -> None:
    curve = fitted(np.array([True, True, False, False]), np.array([0.97, 0.9, 0.0, 0.1]))
    assert 0.5 < curve.slope < 2
    assert 0.9 < curve.probability(0.97) < 0.999
    assert 0.001 < curve.probability(0.0) < 0.1


def test_a_score_beyond_the_limits_counts_as_the_limit() -> None:
    curve = Calibration(1.0, 0.0, "val", 10, 5)
    assert curve.probability([0.0, LOWEST, 0.3, HIGHEST, 1.0]) == pytest.approx([LOWEST, LOWEST, 0.3, HIGHEST, HIGHEST])


def test_without_good_or_without_defective_images_there_is_none() -> None:
    assert fit(np.array([True, True]), np.array([0.9, 0.2]), "val", 0) is None
    alone = out_of_fold(np.array([True, False, False]), np.array([0.9, 0.2, 0.1]), None, 0, "val", 0)
    assert alone[0] is None, "there is no other defective image"
    assert alone[1] is not None


def test_the_calibration_of_an_image_does_not_depend_on_its_own_group() -> None:
    truth, scores = drawn(40, 3)
    groups = np.arange(40) // 4
    curves = out_of_fold(truth, scores, groups, 7, "val", 0)
    assert curves == out_of_fold(truth, scores, groups, 7, "val", 0)
    for group in range(10):
        own = groups == group
        others = out_of_fold(truth, np.where(own, 1 - scores, scores), groups, 7, "val", 0)
        assert [one for one, is_own in zip(curves, own, strict=True) if is_own] == [
            one for one, is_own in zip(others, own, strict=True) if is_own
        ]
    assert len(set(curves)) == calibrate.FOLDS


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "best.pt"
    path.write_bytes(b"weights")
    return path


STORED = Calibration(0.7, -0.3, "val", 44, 32, 5, ("ab", "cd"))


def test_a_calibration_is_loaded_for_its_own_checkpoint_min_area_and_tiles_only(model: Path) -> None:
    assert calibration.load(model, 5, WHOLE_IMAGES) is None
    calibration.save(STORED, model)
    assert calibration.load(model, 5, WHOLE_IMAGES) == STORED
    assert calibration.load(model, 0, WHOLE_IMAGES) is None, "of another --min_area"
    tiles = {"tile": 64, "overlap": 16, "tile_from": "all"}
    assert calibration.load(model, 5, tiles) is None, "of whole images"
    calibration.save(replace(STORED, tile=64, overlap=16), model)
    assert calibration.load(model, 5, tiles) == replace(STORED, tile=64, overlap=16)
    for other in (WHOLE_IMAGES, tiles | {"overlap": 20}, tiles | {"tile_from": "coarse"}):
        assert calibration.load(model, 5, other) is None, "of other tiles"
    model.write_bytes(b"other weights")
    assert calibration.load(model, 5, WHOLE_IMAGES) is None


@pytest.mark.parametrize(
    "change", [{"slope": -1}, {"slope": "steep"}, {"intercept": None}, {"unknown": 1}, {"fitted_by": 4}]
)
def test_a_damaged_file_is_refused(model: Path, change: dict[str, object]) -> None:
    calibration.save(STORED, model)
    path = model.with_name("best.calibration.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FlawmaskError, match=r"best\.calibration\.json is damaged: delete it"):
        calibration.load(model, 5, WHOLE_IMAGES)


def test_the_file_names_the_images_that_the_calibration_was_fitted_to(model: Path) -> None:
    calibration.save(replace(STORED, min_area=0), model)
    content = json.loads(model.with_name("best.calibration.json").read_text())
    assert content.pop("model_sha256")
    assert content == {**asdict(STORED), "min_area": 0, "fitted_by": ["ab", "cd"]}
