"""The sentences of a comparison, from bootstrap values made by hand."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from flawmask.comparison.differences import Difference, Ranked, rank_models, recommendation, sentences
from flawmask.evaluation.metrics import METRICS

DRAWS = np.random.default_rng(3).normal(0, 0.01, 4000)


def drawn(value: float, spread: float = 1.0) -> npt.NDArray[np.float64]:
    return np.concatenate(([value], value + spread * DRAWS))


def test_the_best_model_comes_first_and_the_others_follow_by_their_difference() -> None:
    ranked = rank_models("image_auroc", {"a": drawn(0.7), "b": drawn(0.9), "c": drawn(0.8)})
    assert ranked is not None
    assert (ranked.best, ranked.value) == ("b", 0.9)
    assert [one.name for one in ranked.others] == ["c", "a"]
    assert [one.value for one in ranked.others] == pytest.approx([0.1, 0.2])


def test_models_are_compared_on_the_same_samples_so_hard_images_do_not_widen_the_interval() -> None:
    ranked = rank_models("mask_ap", {"a": drawn(0.50, spread=9.0), "b": drawn(0.49, spread=9.0)})
    assert ranked is not None
    assert ranked.others[0].interval == pytest.approx((0.01, 0.01))
    assert ranked.others[0].is_shown


def test_intervals_are_wider_the_more_models_there_are() -> None:
    others = {f"m{number}": drawn(0.1) for number in range(4)}
    two = rank_models("mask_ap", {"a": drawn(0.9, 0.0), "b": drawn(0.87)})
    six = rank_models("mask_ap", {"a": drawn(0.9, 0.0), "b": drawn(0.87), **others})
    assert two is not None
    assert six is not None
    interval = six.others[0].interval
    assert two.others[0].interval == pytest.approx(tuple(np.quantile(0.03 - DRAWS, (0.025, 0.975))))
    assert interval == pytest.approx(tuple(np.quantile(0.03 - DRAWS, (0.025 / 15, 1 - 0.025 / 15))))


def test_the_level_of_an_interval_can_be_widened() -> None:
    ranked = rank_models("mask_ap", {"a": drawn(0.9, 0.0), "b": drawn(0.87)}, lambda level: (1 + level) / 2)
    assert ranked is not None
    assert ranked.others[0].interval == pytest.approx(tuple(np.quantile(0.03 - DRAWS, (0.0125, 0.9875))))
    untested = rank_models("mask_ap", {"a": drawn(0.9, 0.0), "b": drawn(0.87)}, lambda level: None)
    assert untested is not None
    assert untested.others[0].interval is None


def test_a_model_without_the_metric_is_not_ranked() -> None:
    undefined = np.full(5, np.nan)
    ranked = rank_models("mask_ap", {"a": undefined, "b": drawn(0.0)})
    assert ranked == Ranked("mask_ap", "b", 0.0, ())
    assert rank_models("mask_ap", {"a": undefined}) is None
    assert rank_models("mask_ap", {}) is None


def test_without_samples_nothing_is_tested_and_the_highest_value_is_recommended() -> None:
    ranked = rank_models("image_auroc", {"a": np.array([0.9]), "b": np.array([0.1])})
    assert ranked is not None
    assert ranked.others[0].interval is None
    assert ranked.level_with_best == ("a",)
    assert sentences([ranked])[0].endswith(
        "Not tested, because the figure is undefined for too many of the resampled sets of images: b."
    )
    (sentence,) = recommendation([ranked], {"a": 0.5, "b": 0.1}, {}, [])
    assert sentence == "To tell good from defective: a. No model is shown to be better (0.5 s per image)."


def test_sentences_say_what_is_shown_and_what_is_not() -> None:
    ranked = Ranked(
        "image_auroc", "a", 0.982, (Difference("b", 0.004, (-0.01, 0.02)), Difference("c", 0.3, (0.21, 0.4)))
    )
    assert sentences([ranked]) == [
        "Telling good from defective (image AUROC): a has the highest figure, 98.2%. "
        "No difference shown from b (0.4 points less, interval -1.0 to 2.0). "
        "Shown to be worse: c (30.0 points less, interval 21.0 to 40.0)."
    ]
    ranked = Ranked("image_auroc", "a", 1.0, (Difference("b", 0.0, (0.0, 0.0)),))
    assert sentences([ranked]) == [
        "Telling good from defective (image AUROC): a has the highest figure, 100.0%. "
        "No difference shown from b (the same in every sample)."
    ]
    assert sentences([Ranked("mask_ap", "a", 0.0, ())]) == [
        "Segmenting defects (mask AP): a alone has this figure, 0.0%."
    ]


def test_the_lowest_value_comes_first_for_a_metric_of_which_less_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = replace(METRICS["false_alarm_rate"], question="Sparing good parts (false-alarm rate)")
    monkeypatch.setitem(METRICS, metric.key, metric)
    ranked = rank_models(metric.key, {"a": drawn(0.3, 0.0), "b": drawn(0.1, 0.0), "c": drawn(0.2, 0.0)})
    assert ranked is not None
    assert ranked.best == "b"
    assert [one.name for one in ranked.others] == ["c", "a"]
    assert [one.value for one in ranked.others] == pytest.approx([0.1, 0.2])
    assert sentences([ranked]) == [
        "Sparing good parts (false-alarm rate): b has the lowest figure, 10.0%. Shown to be worse: "
        "c (10.0 points more, interval 10.0 to 10.0) and a (20.0 points more, interval 20.0 to 20.0)."
    ]


AUROC = Ranked("image_auroc", "a", 0.98, (Difference("b", 0.0, (-0.01, 0.02)), Difference("c", 0.3, (0.21, 0.4))))
SECONDS = {"a": 0.5, "b": 0.02, "c": 0.001}


def test_the_fastest_is_recommended_of_models_without_a_shown_difference() -> None:
    (sentence,) = recommendation([AUROC], SECONDS, {}, [])
    assert sentence == (
        "To tell good from defective: b. No model is shown to be better. This holds for 2 detectors, and it is the "
        "fastest (0.02 s per image)."
    )


def test_the_best_is_recommended_without_a_word_on_speed_where_not_all_were_timed() -> None:
    (sentence,) = recommendation([AUROC], {"b": 0.02, "c": 0.001}, {}, [])
    assert sentence == "To tell good from defective: a. No model is shown to be better."


def test_a_model_that_is_shown_to_be_the_best_is_recommended_however_slow_it_is() -> None:
    alone = Ranked("image_auroc", "a", 0.98, (Difference("b", 0.2, (0.1, 0.3)),))
    (sentence,) = recommendation([alone], SECONDS, {}, [])
    assert sentence == "To tell good from defective: a. All others are shown to be worse (0.5 s per image)."
    (sentence,) = recommendation([Ranked("image_auroc", "a", 0.98, ())], SECONDS, {}, [])
    assert sentence == "To tell good from defective: a. There is no other to compare it with (0.5 s per image)."


def test_a_baseline_is_never_recommended_but_named_where_it_is_as_good() -> None:
    lines = recommendation([AUROC], SECONDS, {}, ["b"])
    assert lines == [
        "To tell good from defective: a. No model is shown to be better (0.5 s per image).",
        "b, a baseline, is not shown to be worse at that.",
    ]
    better = Ranked("image_auroc", "b", 0.98, (Difference("a", 0.2, (0.1, 0.3)),))
    (no_detector,) = recommendation([better], SECONDS, {}, ["b"])
    assert no_detector == (
        "To tell good from defective: no detector yet. A detector must be better than guessing, and must not be worse "
        "than b, a baseline. These images show this for none."
    )


def test_another_model_is_recommended_for_masks_where_its_masks_are_better() -> None:
    masks = Ranked("mask_ap", "c", 0.4, (Difference("a", 0.2, (0.1, 0.3)),))
    lines = recommendation([AUROC, masks], SECONDS, {}, [])
    assert lines[1] == (
        "Where masks count: c. All others are shown to be worse (0.001 s per image). "
        "At telling good from defective, it is shown to be worse than the best model, or could not be tested."
    )
    level = Ranked("mask_ap", "c", 0.4, (Difference("a", 0.02, (-0.1, 0.3)),))
    lines = recommendation([AUROC, level], SECONDS, {}, [])
    assert lines[1] == "Where masks count: a. No model is shown to be better (0.5 s per image)."
    assert len(recommendation([AUROC, Ranked("mask_ap", "b", 0.4, ())], SECONDS, {}, [])) == 1


def test_a_model_that_may_be_guessing_is_not_recommended() -> None:
    assert recommendation([AUROC], SECONDS, {"image_auroc": ["a", "c"]}, []) == [
        "Take none of them: even the best is not shown to be better than guessing at telling good from defective."
    ]
    (sentence,) = recommendation([AUROC], SECONDS, {"image_auroc": ["b"]}, [])
    assert sentence == "To tell good from defective: a. No model is shown to be better (0.5 s per image)."
    no_mask = Ranked("mask_ap", "a", 0.0, (Difference("b", 0.0, (0.0, 0.0)),))
    lines = recommendation([AUROC, no_mask], SECONDS, {"mask_ap": ["a", "b"]}, [])
    assert lines[1] == "Where masks count: none. Even the best is not shown to segment any defect."
    assert "Nothing can be recommended" in recommendation([], SECONDS, {}, [])[0]
