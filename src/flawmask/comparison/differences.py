"""What a comparison shows, and what not: differences on the same images, and a recommendation in plain words."""

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
    """How far one model is from the best one in a figure.

    Attributes:
        name: the model.
        value: by how much the best one's figure is better than its own, 0 or more.
        interval: of that, over resampled images; None where too few of these have the figure.
    """

    name: str
    value: float
    interval: Interval | None

    @property
    def is_shown(self) -> bool:
        """Whether the images show that it is worse than the best."""
        return self.interval is not None and self.interval[0] > 0


@dataclass(frozen=True)
class Ranked:
    """The models that have a figure.

    Attributes:
        figure: its key.
        best: the model with the best value, the highest or the lowest as the figure has it.
        value: that value.
        others: all others, the best of them first.
    """

    figure: str
    best: str
    value: float
    others: tuple[Difference, ...]

    @property
    def level_with_best(self) -> tuple[str, ...]:
        """The best and all of which it was tested and not shown that they are worse."""
        tested = (one for one in self.others if one.interval is not None)
        return (self.best, *(one.name for one in tested if not one.is_shown))


def questions() -> dict[str, str]:
    """Return the figures by which models are ranked, and what each stands for."""
    return {one.key: one.question for one in METRICS.values() if one.question}


def rank_models(
    figure: str, drawn: Mapping[str, Floats], widened: Callable[[float], float | None] = lambda level: level
) -> Ranked | None:
    """Return how the models rank in a figure; None where none has it.

    Args:
        figure: its key.
        drawn: (1 + B,) for each model: the figure itself, then that of each of B resampled sets of images, the same for
            all models; NaN where it is undefined.
        widened: which share of the drawn values makes an interval of a level, see `uncertainty.widened`.
    """
    known = {name: values for name, values in drawn.items() if not np.isnan(values[0])}
    if not known:
        return None
    sign = -1 if METRICS[figure].lower_is_better else 1
    best = max(known, key=lambda name: sign * float(known[name][0]))
    # Bonferroni: which one is the best is seen from the same images, so each pair has to stand for all of them.
    level = widened(1 - (1 - LEVEL) / max(1, math.comb(len(known), 2)))
    others = []
    for name, values in known.items():
        if name != best:
            difference = sign * (known[best] - values)
            others.append(Difference(name, float(difference[0]), percentiles(difference[1:], level)))
    others.sort(key=lambda one: one.value)
    return Ranked(figure, best, float(known[best][0]), tuple(others))


def sentences(ranked: Sequence[Ranked]) -> list[str]:
    """Return what each ranking shows, a sentence or two for each."""
    return [_sentence(one) for one in ranked]


def _sentence(ranked: Ranked) -> str:
    about = f"{METRICS[ranked.figure].question}: "
    if not ranked.others:
        return about + f"{ranked.best} alone has this figure, {ranked.value:.1%}."
    higher, less = ("lower", "more") if METRICS[ranked.figure].lower_is_better else ("higher", "less")
    about += f"no figure is {higher} than that of {ranked.best}, {ranked.value:.1%}."
    tested = [one for one in ranked.others if one.interval is not None]
    for said, names in {
        "No difference shown from": [_with_interval(one, less) for one in tested if not one.is_shown],
        "Shown to be worse:": [_with_interval(one, less) for one in tested if one.is_shown],
        "Not tested, for too few of the resampled images have the figure:": [
            one.name for one in ranked.others if one.interval is None
        ],
    }.items():
        if names:
            about += f" {said} {_listed(names)}."
    return about


def _with_interval(one: Difference, less: str) -> str:
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
    """Return which detector to take, as sentences: of those that nothing shows to be worse than the best, the fastest.

    Args:
        ranked: the rankings, by `rank_models`.
        seconds: median seconds per image of each model, one image at a time; those not timed are missing.
        guessing: by figure, the models whose interval of it reaches down to what guessing has.
        baselines: the models that are there to be held against, and not to be taken.
    """
    by_figure = {one.figure: one for one in ranked}
    verdicts = by_figure.get("image_auroc")
    if verdicts is None:
        return ["Nothing can be recommended: no model has an image AUROC, which takes good and defective images."]
    lucky = guessing.get("image_auroc", ())
    if verdicts.best in lucky:
        return ["Take none of them: not even the best is shown to tell good from defective better than guessing does."]
    able = [name for name in verdicts.level_with_best if name not in (*lucky, *baselines)]
    equal = [name for name in verdicts.level_with_best if name in baselines and name not in lucky]
    taken = _fastest(able, seconds) if able else None
    if taken is None:
        said = [
            "To tell good from defective: no detector yet. Of none is it shown that it does better than guessing and "
            f"no worse than {verdicts.best}, a baseline."
        ]
    else:
        said = [f"To tell good from defective: {taken}. {_why(verdicts, able, seconds, taken)}"]
        said += [f"{name}, a baseline, is not shown to be worse at that." for name in equal]
    outlines = by_figure.get("mask_ap")
    if outlines is not None:
        said += _for_outlines(outlines, verdicts, able, taken, seconds, guessing)
    return said


def _for_outlines(
    outlines: Ranked,
    verdicts: Ranked,
    able: Sequence[str],
    taken: str | None,
    seconds: Mapping[str, float],
    guessing: Mapping[str, Sequence[str]],
) -> list[str]:
    """Return which to take for outlines, where that is another one; of equals one that tells good from defective."""
    level = [name for name in outlines.level_with_best if name not in guessing.get("mask_ap", ())]
    if outlines.best in guessing.get("mask_ap", ()):
        return ["Where outlines count: none. Not even the best is shown to outline any defect."]
    both = [name for name in level if name in able] or level
    chosen = _fastest(both, seconds)
    if chosen == taken:
        return []
    but = ""
    if chosen in guessing.get("image_auroc", ()):
        but = " It is not shown to tell good from defective better than guessing does."
    elif chosen not in verdicts.level_with_best:
        but = " It is not level with the best at telling good from defective."
    return [f"Where outlines count: {chosen}. {_why(outlines, both, seconds, chosen)}{but}"]


def _fastest(names: Sequence[str], seconds: Mapping[str, float]) -> str:
    """Return the fastest; the first, which is the best, where not all were timed."""
    if not all(name in seconds for name in names):
        return names[0]
    return min(names, key=lambda name: seconds[name])


def _why(ranked: Ranked, able: Sequence[str], seconds: Mapping[str, float], taken: str) -> str:
    """Return why a model is taken.

    Args:
        ranked: how all rank.
        able: those among which speed decides.
        seconds: of each that was timed.
        taken: the one.
    """
    time = f" ({seconds[taken]:.3g} s an image)" if taken in seconds else ""
    if not ranked.others:
        return f"There is no other to compare it with{time}."
    if len(able) > 1 and all(name in seconds for name in able):
        return f"None is shown to be better, and of the {len(able)} of which that can be said it is the fastest{time}."
    if all(one.is_shown for one in ranked.others):
        return f"All others are shown to be worse{time}."
    return f"None is shown to be better{time}."
