"""What a comparison says, from draws that are made by hand."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from flawmask.comparison.differences import Difference, Ranked, rank_models, recommendation, sentences
from flawmask.evaluation.metrics import METRICS

DRAWS = np.random.default_rng(3).normal(0, 0.01, 4000)


def drawn(value: float, spread: float = 1.0) -> npt.NDArray[np.float64]:
    return np.concatenate(([value], value + spread * DRAWS))


def test_the_best_comes_first_and_the_others_by_how_far_they_are_from_it() -> None:
    ranked = rank_models("image_auroc", {"a": drawn(0.7), "b": drawn(0.9), "c": drawn(0.8)})
    assert ranked is not None
    assert (ranked.best, ranked.value) == ("b", 0.9)
    assert [one.name for one in ranked.others] == ["c", "a"]
    assert [one.value for one in ranked.others] == pytest.approx([0.1, 0.2])


def test_models_are_compared_draw_by_draw_so_that_hard_images_widen_nothing() -> None:
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


def test_the_share_of_an_interval_may_be_another_one() -> None:
    ranked = rank_models("mask_ap", {"a": drawn(0.9, 0.0), "b": drawn(0.87)}, lambda level: (1 + level) / 2)
    assert ranked is not None
    assert ranked.others[0].interval == pytest.approx(tuple(np.quantile(0.03 - DRAWS, (0.0125, 0.9875))))
    untested = rank_models("mask_ap", {"a": drawn(0.9, 0.0), "b": drawn(0.87)}, lambda level: None)
    assert untested is not None
    assert untested.others[0].interval is None


def test_a_model_that_lacks_the_figure_does_not_rank_and_where_all_do_nothing_ranks() -> None:
    nothing = np.full(5, np.nan)
    ranked = rank_models("mask_ap", {"a": nothing, "b": drawn(0.0)})
    assert ranked == Ranked("mask_ap", "b", 0.0, ())
    assert rank_models("mask_ap", {"a": nothing}) is None
    assert rank_models("mask_ap", {}) is None


def test_without_samples_nothing_is_tested_and_the_highest_figure_is_taken() -> None:
    ranked = rank_models("image_auroc", {"a": np.array([0.9]), "b": np.array([0.1])})
    assert ranked is not None
    assert ranked.others[0].interval is None
    assert ranked.level_with_best == ("a",)
    assert sentences([ranked])[0].endswith("Not tested, for too few of the resampled images have the figure: b.")
    (said,) = recommendation([ranked], {"a": 0.5, "b": 0.1}, {}, [])
    assert said == "To tell good from defective: a. None is shown to be better (0.5 s an image)."


def test_sentences_say_what_is_shown_and_what_is_not() -> None:
    ranked = Ranked(
        "image_auroc", "a", 0.982, (Difference("b", 0.004, (-0.01, 0.02)), Difference("c", 0.3, (0.21, 0.4)))
    )
    assert sentences([ranked]) == [
        "Telling good from defective (image AUROC): no figure is higher than that of a, 98.2%. "
        "No difference shown from b (0.4 points less, interval -1.0 to 2.0). "
        "Shown to be worse: c (30.0 points less, interval 21.0 to 40.0)."
    ]
    assert sentences([Ranked("mask_ap", "a", 0.0, ())]) == [
        "Outlining defects (mask AP): a alone has this figure, 0.0%."
    ]


def test_where_less_is_better_the_lowest_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = replace(METRICS["false_alarm_rate"], question="Sparing good parts (false-alarm rate)")
    monkeypatch.setitem(METRICS, metric.key, metric)
    ranked = rank_models(metric.key, {"a": drawn(0.3, 0.0), "b": drawn(0.1, 0.0), "c": drawn(0.2, 0.0)})
    assert ranked is not None
    assert ranked.best == "b"
    assert [one.name for one in ranked.others] == ["c", "a"]
    assert [one.value for one in ranked.others] == pytest.approx([0.1, 0.2])
    assert sentences([ranked]) == [
        "Sparing good parts (false-alarm rate): no figure is lower than that of b, 10.0%. Shown to be worse: "
        "c (10.0 points more, interval 10.0 to 10.0) and a (20.0 points more, interval 20.0 to 20.0)."
    ]


AUROC = Ranked("image_auroc", "a", 0.98, (Difference("b", 0.0, (-0.01, 0.02)), Difference("c", 0.3, (0.21, 0.4))))
SECONDS = {"a": 0.5, "b": 0.02, "c": 0.001}


def test_of_models_between_which_no_difference_is_shown_the_fastest_is_taken() -> None:
    (said,) = recommendation([AUROC], SECONDS, {}, [])
    assert said == (
        "To tell good from defective: b. None is shown to be better, and of the 2 of which that can be said it is the "
        "fastest (0.02 s an image)."
    )


def test_the_best_is_taken_and_none_called_the_fastest_where_not_all_were_timed() -> None:
    (said,) = recommendation([AUROC], {"b": 0.02, "c": 0.001}, {}, [])
    assert said == "To tell good from defective: a. None is shown to be better."


def test_one_that_is_shown_to_be_better_than_all_is_taken_however_slow() -> None:
    alone = Ranked("image_auroc", "a", 0.98, (Difference("b", 0.2, (0.1, 0.3)),))
    (said,) = recommendation([alone], SECONDS, {}, [])
    assert said == "To tell good from defective: a. All others are shown to be worse (0.5 s an image)."
    (said,) = recommendation([Ranked("image_auroc", "a", 0.98, ())], SECONDS, {}, [])
    assert said == "To tell good from defective: a. There is no other to compare it with (0.5 s an image)."


def test_a_baseline_is_not_taken_and_one_that_is_as_good_is_named() -> None:
    said = recommendation([AUROC], SECONDS, {}, ["b"])
    assert said == [
        "To tell good from defective: a. None is shown to be better (0.5 s an image).",
        "b, a baseline, is not shown to be worse at that.",
    ]
    better = Ranked("image_auroc", "b", 0.98, (Difference("a", 0.2, (0.1, 0.3)),))
    (said_of_none,) = recommendation([better], SECONDS, {}, ["b"])
    assert said_of_none == (
        "To tell good from defective: no detector yet. Of none is it shown that it does better than guessing and no "
        "worse than b, a baseline."
    )


def test_outlines_have_a_sentence_of_their_own_where_another_model_outlines_better() -> None:
    masks = Ranked("mask_ap", "c", 0.4, (Difference("a", 0.2, (0.1, 0.3)),))
    said = recommendation([AUROC, masks], SECONDS, {}, [])
    assert said[1] == (
        "Where outlines count: c. All others are shown to be worse (0.001 s an image). "
        "It is not level with the best at telling good from defective."
    )
    level = Ranked("mask_ap", "c", 0.4, (Difference("a", 0.02, (-0.1, 0.3)),))
    said = recommendation([AUROC, level], SECONDS, {}, [])
    assert said[1] == "Where outlines count: a. None is shown to be better (0.5 s an image)."
    assert len(recommendation([AUROC, Ranked("mask_ap", "b", 0.4, ())], SECONDS, {}, [])) == 1


def test_nothing_is_recommended_that_may_be_guessing() -> None:
    assert recommendation([AUROC], SECONDS, {"image_auroc": ["a", "c"]}, []) == [
        "Take none of them: not even the best is shown to tell good from defective better than guessing does."
    ]
    (said,) = recommendation([AUROC], SECONDS, {"image_auroc": ["b"]}, [])
    assert said == "To tell good from defective: a. None is shown to be better (0.5 s an image)."
    nothing = Ranked("mask_ap", "a", 0.0, (Difference("b", 0.0, (0.0, 0.0)),))
    said_of_outlines = recommendation([AUROC, nothing], SECONDS, {"mask_ap": ["a", "b"]}, [])
    assert said_of_outlines[1] == "Where outlines count: none. Not even the best is shown to outline any defect."
    assert "Nothing can be recommended" in recommendation([], SECONDS, {}, [])[0]
