"""Rank models by their differences on the same images, and recommend one in plain words."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flawmask.evaluation.metrics import METRICS
from flawmask.evaluation.uncertainty import LEVEL, Interval, percentiles

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """How far a model is from the best one in a metric.

    Attributes:
        name: the model.
        value: by how much the best model is better, 0 or more.
        interval: the interval of `value` over resampled images; None where too few of them have the metric.
    """

    name: str
    value: float
    interval: Interval | None

    @property
    def is_shown(self) -> bool:
        """Whether the images show that the model is worse than the best one."""
        return self.interval is not None and self.interval[0] > 0


@dataclass(frozen=True)
class Ranked:
    """The ranking of the models for one metric.

    Attributes:
        figure: the metric's key.
        best: the model with the best value: the highest, or the lowest for a metric of which less is better.
        value: the best value.
        others: all other models that have the metric, the best of them first.
    """

    figure: str
    best: str
    value: float
    others: tuple[Difference, ...]

    @property
    def level_with_best(self) -> tuple[str, ...]:
        """The best model, and all models that were tested against it and not shown to be worse."""
        tested = (one for one in self.others if one.interval is not None)
        return (self.best, *(one.name for one in tested if not one.is_shown))


def questions() -> dict[str, str]:
    """Return the metrics by which models are ranked: by key, the question that each answers."""
    return {one.key: one.question for one in METRICS.values() if one.question}


def rank_models(
    figure: str, drawn: Mapping[str, Floats], widened: Callable[[float], float | None] = lambda level: level
) -> Ranked | None:
    """Return the ranking of the models for a metric; None where no model has it.

    Args:
        figure: the metric's key.
        drawn: (1 + B,) for each model: the metric's value, then its value for each of B resampled sets of images; NaN
            where it is undefined. The sets are the same for all models.
        widened: returns the share of the drawn values that makes an interval of a level, see `uncertainty.widened`.
    """
    known = {name: values for name, values in drawn.items() if not np.isnan(values[0])}
    if not known:
        return None
    sign = -1 if METRICS[figure].lower_is_better else 1
    best = max(known, key=lambda name: sign * float(known[name][0]))
    # Bonferroni over all pairs, not only those with the best model: the same images decide which model is the best.
    level = widened(1 - (1 - LEVEL) / max(1, math.comb(len(known), 2)))
    others = []
    for name, values in known.items():
        if name != best:
            difference = sign * (known[best] - values)
            others.append(Difference(name, float(difference[0]), percentiles(difference[1:], level)))
    others.sort(key=lambda one: one.value)
    return Ranked(figure, best, float(known[best][0]), tuple(others))


def sentences(ranked: Sequence[Ranked]) -> list[str]:
    """Return what each ranking shows, in one text of a few sentences for each."""
    return [_sentence(one) for one in ranked]


def _sentence(ranked: Ranked) -> str:
    text = f"{METRICS[ranked.figure].question}: "
    if not ranked.others:
        return text + f"{ranked.best} alone has this figure, {ranked.value:.1%}."
    best, less = ("lowest", "more") if METRICS[ranked.figure].lower_is_better else ("highest", "less")
    text += f"{ranked.best} has the {best} figure, {ranked.value:.1%}."
    tested = [one for one in ranked.others if one.interval is not None]
    for heading, names in {
        "No difference shown from": [_with_interval(one, less) for one in tested if not one.is_shown],
        "Shown to be worse:": [_with_interval(one, less) for one in tested if one.is_shown],
        "Not tested, because the figure is undefined for too many of the resampled sets of images:": [
            one.name for one in ranked.others if one.interval is None
        ],
    }.items():
        if names:
            text += f" {heading} {_listed(names)}."
    return text


def _with_interval(one: Difference, less: str) -> str:
    if one.interval == (0.0, 0.0):  # no interval: where two models rank all images right, samples show no more
        return f"{one.name} (the same in every sample)"
    low, high = (100 * bound for bound in one.interval or (0, 0))
    return f"{one.name} ({100 * one.value:.1f} points {less}, interval {low:.1f} to {high:.1f})"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def recommendation(
    ranked: Sequence[Ranked],
    seconds: Mapping[str, float],
    guessing: Mapping[str, Sequence[str]],
    baselines: Sequence[str],
) -> list[str]:
    """Return which detector to take, as sentences: the fastest of those that are not shown to be worse than the best.

    Args:
        ranked: the rankings, by `rank_models`.
        seconds: the median seconds per image of each model, one image at a time. Models without times are missing.
        guessing: for each metric, the models that are not shown to be better than guessing.
        baselines: the models that are there for comparison only, and never recommended.
    """
    by_figure = {one.figure: one for one in ranked}
    verdicts = by_figure.get("image_auroc")
    if verdicts is None:
        return ["Nothing can be recommended: no model has an image AUROC, which needs good and defective images."]
    may_guess = guessing.get("image_auroc", ())
    if verdicts.best in may_guess:
        return [
            "Take none of them: even the best is not shown to be better than guessing at telling good from defective."
        ]
    able = [name for name in verdicts.level_with_best if name not in (*may_guess, *baselines)]
    equal_baselines = [name for name in verdicts.level_with_best if name in baselines and name not in may_guess]
    taken = _fastest(able, seconds) if able else None
    if taken is None:
        lines = [
            "To tell good from defective: no detector yet. A detector must be better than guessing, and must not be "
            f"worse than {verdicts.best}, a baseline. These images show this for none."
        ]
    else:
        lines = [f"To tell good from defective: {taken}. {_why(verdicts, able, seconds, taken)}"]
        lines += [f"{name}, a baseline, is not shown to be worse at that." for name in equal_baselines]
    masks = by_figure.get("mask_ap")
    if masks is not None:
        lines += _for_masks(masks, verdicts, able, taken, seconds, guessing)
    return lines


def _for_masks(
    masks: Ranked,
    verdicts: Ranked,
    able: Sequence[str],
    taken: str | None,
    seconds: Mapping[str, float],
    guessing: Mapping[str, Sequence[str]],
) -> list[str]:
    """Return which model to take where masks count, if that is not `taken`.

    Models that also tell good from defective come first.
    """
    able_to_mask = [name for name in masks.level_with_best if name not in guessing.get("mask_ap", ())]
    if masks.best in guessing.get("mask_ap", ()):
        return ["Where masks count: none. Even the best is not shown to segment any defect."]
    candidates = [name for name in able_to_mask if name in able] or able_to_mask
    chosen = _fastest(candidates, seconds)
    if chosen == taken:
        return []
    caveat = ""
    if chosen in guessing.get("image_auroc", ()):
        caveat = " It is not shown to be better than guessing at telling good from defective."
    elif chosen not in verdicts.level_with_best:
        caveat = " At telling good from defective, it is shown to be worse than the best model, or could not be tested."
    return [f"Where masks count: {chosen}. {_why(masks, candidates, seconds, chosen)}{caveat}"]


def _fastest(names: Sequence[str], seconds: Mapping[str, float]) -> str:
    """Return the fastest model. Where not all were timed, return the first one, which is the best."""
    if not all(name in seconds for name in names):
        return names[0]
    return min(names, key=lambda name: seconds[name])


def _why(ranked: Ranked, able: Sequence[str], seconds: Mapping[str, float], taken: str) -> str:
    """Return why a model is recommended.

    Args:
        ranked: the ranking of all models.
        able: the models among which speed decides.
        seconds: the seconds per image of each model that was timed.
        taken: the recommended model.
    """
    time = f" ({seconds[taken]:.3g} s per image)" if taken in seconds else ""
    if not ranked.others:
        return f"There is no other to compare it with{time}."
    if len(able) > 1 and all(name in seconds for name in able):
        return f"No model is shown to be better. This holds for {len(able)} detectors, and it is the fastest{time}."
    if all(one.is_shown for one in ranked.others):
        return f"All others are shown to be worse{time}."
    return f"No model is shown to be better{time}."
