"""How often a 95 % interval holds the truth, by simulation: `python benchmarks/coverage.py` prints a Markdown table.

A model is judged on many small samples of a population whose figures are known: defective images score higher than
good ones by a normal distribution's shift; detections of defects are right more often the higher they score. Each
sample gets the intervals that `evaluate` would print.
"""

from dataclasses import dataclass

import numpy as np
import tyro

from flawmask.evaluation.average_precision import Evaluation, Matches
from flawmask.evaluation.ranking import auroc, average_precision_score, rank
from flawmask.evaluation.uncertainty import Interval, auroc_interval, f1_interval, percentiles, resample, wilson
from flawmask.evaluation.verdicts import rates

SHIFTS = {"fair": 1.5, "good": 3.0}
"""How far defective images score above good ones, in standard deviations, by what one would call the model."""

SIZES = ((8, 9), (32, 12), (50, 50), (250, 250))
"""Defective and good images of a sample; the first is the smallest that people judge by."""

POPULATION = 100_000


@dataclass(frozen=True)
class Options:
    """How long to simulate."""

    samples: int = 200
    """Samples drawn for each row."""
    resamples: int = 300
    """Bootstrap samples for each interval."""
    seed: int = 0
    """Seed of everything drawn."""


def draw(rng: np.random.Generator, positives: int, negatives: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """Return truth and scores of a sample."""
    truth = np.arange(positives + negatives) < positives
    return truth, 1 / (1 + np.exp(-(rng.normal(0, 1, len(truth)) + shift * truth - shift / 2)))


def draw_matches(rng: np.random.Generator, truth: np.ndarray, shift: float) -> Matches:
    """Return detections as COCO's evaluator matches them: one or two defects an image, some of them found."""
    truths = np.where(truth, rng.integers(1, 3, len(truth)), 0)
    image, score, right = [], [], []
    for place, count in enumerate(truths):
        ease = rng.normal(0, 0.7)  # the defects of one image are alike hard
        for _ in range(count):
            found = rng.random() < 1 / (1 + np.exp(-(shift + ease)))
            overlap = 0.45 + 0.5 * rng.random()
            image.append(place)
            score.append(rng.normal(shift + ease if found else 0, 1))
            right.append(found * (overlap >= np.linspace(0.5, 0.95, 10)))
        for _ in range(rng.poisson(0.5)):
            image.append(place)
            score.append(rng.normal(0, 1))
            right.append(np.zeros(10, dtype=bool))
    order = np.argsort(-np.array(score), kind="stable")
    tp = np.array(right, dtype=bool).reshape(-1, 10).T[:, order]
    return Matches(np.array(image, dtype=np.int64)[order], tp, ~tp, truths.astype(float))


def mask_ap(matches: Matches, weights: np.ndarray) -> np.ndarray:
    """Return the average precision of weighted images, (B,)."""
    nothing = np.zeros((0,))
    return Evaluation(nothing, nothing, (matches,)).resampled(weights)["ap"]


def verdicts(truth: np.ndarray, scores: np.ndarray) -> tuple[int, int, int, int]:
    """Return tp, fp, fn, tn at a threshold of 0.5."""
    called = scores >= 0.5
    return tuple(int(n.sum()) for n in (truth & called, ~truth & called, truth & ~called, ~truth & ~called))  # type: ignore[return-value]


def intervals(
    truth: np.ndarray, scores: np.ndarray, matches: Matches, weights: np.ndarray
) -> dict[str, Interval | None]:
    """Return each figure's interval."""
    tp, fp, fn, tn = verdicts(truth, scores)
    ranking = rank(truth, scores, weights)
    called = scores >= 0.5
    f1 = 2 * (weights @ (truth & called)) / (weights @ (truth.astype(float) + called))
    return {
        "recall (Wilson)": wilson(tp, tp + fn),
        "accuracy (Wilson)": wilson(tp + tn, len(truth)),
        "F1 (Wilson, as used)": f1_interval(tp, fp, fn),
        "F1 (bootstrap)": percentiles(f1),
        "image AUROC (Newcombe, as used)": auroc_interval(float(auroc(rank(truth, scores))[0]), tp + fn, fp + tn),
        "image AUROC (bootstrap)": percentiles(auroc(ranking)),
        "image AP (bootstrap)": percentiles(average_precision_score(ranking)),
        "mask AP (bootstrap)": percentiles(mask_ap(matches, weights)),
    }


def truths(rng: np.random.Generator, positives: int, negatives: int, shift: float) -> dict[str, float]:
    """Return the population's figures, at the sample's share of defective images."""
    share = positives / (positives + negatives)
    truth, scores = draw(rng, int(POPULATION * share), int(POPULATION * (1 - share)), shift)
    found = rates(*verdicts(truth, scores))
    ranking = rank(truth, scores)
    some = np.arange(20_000) < 20_000 * share
    figures = {
        "recall": found["recall"],
        "accuracy": found["accuracy"],
        "F1": found["f1_score"],
        "image AUROC": float(auroc(ranking)[0]),
        "image AP": float(average_precision_score(ranking)[0]),
        "mask AP": float(mask_ap(draw_matches(rng, some, shift), np.ones((1, len(some))))[0]),
    }
    return {name: float(value or 0.0) for name, value in figures.items()}


def main(options: Options) -> None:
    """Print the share of samples whose interval holds the population's figure."""
    columns: dict[str, dict[str, float]] = {}
    for model, shift in SHIFTS.items():
        for positives, negatives in SIZES:
            rng = np.random.default_rng([options.seed, positives, negatives])
            known = truths(rng, positives, negatives, shift)
            hits: dict[str, int] = {}
            for sample in range(options.samples):
                truth, scores = draw(rng, positives, negatives, shift)
                weights = resample(truth, options.resamples, sample)
                for name, bounds in intervals(truth, scores, draw_matches(rng, truth, shift), weights).items():
                    value = known[name.split(" (", maxsplit=1)[0]]
                    hits[name] = hits.get(name, 0) + (bounds is not None and bounds[0] <= value <= bounds[1])
            columns[f"{model}, {positives + negatives} images"] = {
                name: count / options.samples for name, count in hits.items()
            }
    print("| figure |", " | ".join(columns), "|")
    print("| --- |", " | ".join("---:" for _ in columns), "|")
    for name in next(iter(columns.values())):
        print(f"| {name} |", " | ".join(f"{100 * column[name]:.1f} %" for column in columns.values()), "|")


if __name__ == "__main__":
    main(tyro.cli(Options))
