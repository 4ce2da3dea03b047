"""How often a 95 % interval holds the truth, by simulation: `python benchmarks/coverage.py` prints a Markdown table.

A simulated model is evaluated on many small samples of a population whose metrics are known. The scores of good and
defective images have two normal distributions, one shifted. The higher the score of a detection, the more often it is
right. Each sample gets the intervals that `evaluate` would print.

With `--by_group`, a sample consists of parts with 1 to 6 images each. Every interval is computed twice: over parts, and
as if images were independent.
"""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import tyro
from scipy.special import ndtr

from flawmask.evaluation import by_group
from flawmask.evaluation.average_precision import RECALLS, Evaluation, Matches
from flawmask.evaluation.ranking import auroc, average_precision_score, rank
from flawmask.evaluation.uncertainty import (
    Groups,
    Interval,
    auroc_interval,
    f1_interval,
    holds_defect,
    percentiles,
    resample,
    wilson,
)
from flawmask.evaluation.verdicts import rates

SHIFTS = {"fair": 1.5, "good": 3.0}
"""The distance of defective and good images' scores in standard deviations, by a name for such a model."""

SIZES = ((8, 9), (32, 12), (50, 50), (250, 250))
"""Defective and good images of a sample. The first is the smallest that is used for evaluation in practice."""

POPULATION = 100_000

PARTS = (15, 50, 200)
"""The number of parts (groups) of a sample."""

AGREEMENT = {"none": 0.0, "medium": 0.5, "full": 1.0}
"""The correlation of the scores of a part's images, given their truth."""


@dataclass(frozen=True)
class Options:
    """The size of the simulation."""

    samples: int = 200
    """Samples drawn for each row."""
    resamples: int = 300
    """Bootstrap samples for each interval."""
    seed: int = 0
    """Seed of everything drawn."""
    by_group: bool = False
    """Simulate parts with several images."""
    workers: int = 2
    """Processes that simulate parts."""


def draw(rng: np.random.Generator, positives: int, negatives: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """Return truth and scores of a sample."""
    truth = np.arange(positives + negatives) < positives
    return truth, 1 / (1 + np.exp(-(rng.normal(0, 1, len(truth)) + shift * truth - shift / 2)))


def draw_matches(rng: np.random.Generator, truth: np.ndarray, shift: float) -> Matches:
    """Return detections as COCO's evaluator matches them: one or two defects an image, some of them found."""
    truths = np.where(truth, rng.integers(1, 3, len(truth)), 0)
    image, score, right = [], [], []
    for place, count in enumerate(truths):
        ease = rng.normal(0, 0.7)  # the defects of one image are similarly hard
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
    tp = np.array(right, dtype=bool).reshape(-1, 10).T
    return in_order(np.array(image, dtype=np.int64), np.array(score, dtype=np.float64), tp, truths)


def in_order(image: np.ndarray, scores: np.ndarray, tp: np.ndarray, truths: np.ndarray) -> Matches:
    """Return detections, the highest score first; an image's id is its place."""
    order = np.argsort(-scores, kind="stable")
    image, tp = image[order], tp[:, order]
    return Matches(image, image, scores[order], tp, ~tp, truths.astype(float))


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
    """Return the interval of each metric."""
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
    """Return the population's metrics, at the sample's share of defective images."""
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


def mask_ap_at_once(matches: Matches, weights: np.ndarray) -> np.ndarray:
    """Return the result of `mask_ap`, but for all rows of weights together, which is faster."""
    counts = weights[:, matches.image]
    above, truths = np.cumsum(counts, axis=1) + np.spacing(1), weights @ matches.truths
    areas = []
    for tp in matches.tp:
        found = np.cumsum(counts * tp, axis=1)
        falling = np.maximum.accumulate((found / above)[:, ::-1], axis=1)[:, ::-1]
        recall = found / truths[:, None]
        last = np.floor(100 * recall + 1e-9).astype(int)
        read = last + (RECALLS[last] <= recall)  # the number of the 101 recalls that are reached
        areas.append((falling * np.diff(read, axis=1, prepend=0)).sum(axis=1) / 101)
    return np.asarray(np.mean(areas, axis=0))


def mixed(rng: np.random.Generator, groups: Groups, agree: float, *shape: int) -> np.ndarray:
    """Return standard normal numbers for each image, (N, ...). Within a group, their correlation is `agree`."""
    shared = rng.normal(size=(int(groups.max()) + 1, *shape))[groups]
    return np.asarray(np.sqrt(agree) * shared + np.sqrt(1 - agree) * rng.normal(size=shared.shape))


def draw_groups(
    rng: np.random.Generator, count: int, agree: float, shift: float
) -> tuple[np.ndarray, np.ndarray, Groups]:
    """Return truth, scores and groups of a sample: parts with 1 to 6 images, a third of them all good, a third all
    defective, and a third some of each."""
    groups = np.repeat(np.arange(count), rng.integers(1, 7, count))
    kind = groups % 3
    truth = np.where(kind == 2, rng.random(len(groups)) < 0.5, kind == 1)
    return truth, 1 / (1 + np.exp(-(mixed(rng, groups, agree) + shift * truth - shift / 2))), groups


def draw_grouped_matches(
    rng: np.random.Generator, truth: np.ndarray, groups: Groups, agree: float, shift: float
) -> Matches:
    """Return detections as `draw_matches` does, those of a part alike: where `agree` is 1, all of its images are equal
    but for what is defective."""
    truths = np.where(truth, 1 + (mixed(rng, groups, agree) > 0), 0)
    ease = 0.7 * mixed(rng, groups, agree)[:, None]
    found = ndtr(mixed(rng, groups, agree, 2)) < 1 / (1 + np.exp(-(shift + ease)))
    overlap = 0.45 + 0.5 * ndtr(mixed(rng, groups, agree, 2))
    score = np.where(found, shift + ease, 0) + mixed(rng, groups, agree, 2)
    right = found[..., None] & (overlap[..., None] >= np.linspace(0.5, 0.95, 10))
    chances = np.exp(-0.5) * np.cumsum([1, 0.5, 0.125])  # Poisson's of mean 0.5: at most 0, 1, 2 wrong detections
    wrong = ndtr(mixed(rng, groups, agree))[:, None] > chances
    wrong_score = mixed(rng, groups, agree, 3)
    true_image, true_place = np.nonzero(np.arange(2) < truths[:, None])
    wrong_image, wrong_place = np.nonzero(wrong)
    image = np.concatenate((true_image, wrong_image))
    scores = np.concatenate((score[true_image, true_place], wrong_score[wrong_image, wrong_place]))
    tp = np.concatenate((right[true_image, true_place], np.zeros((len(wrong_image), 10), dtype=bool)))
    return in_order(image, scores, tp.T, truths)


def grouped_intervals(
    truth: np.ndarray, scores: np.ndarray, groups: Groups, matches: Matches, resamples: int, seed: int
) -> dict[str, tuple[Interval | None, Interval | None]]:
    """Return the interval of each metric over groups and over images."""
    called = scores >= 0.5
    tp, fp, fn, tn = (truth & called, ~truth & called, truth & ~called, ~truth & ~called)

    def proportion(part: np.ndarray, whole: np.ndarray) -> tuple[Interval | None, Interval | None]:
        numerators, denominators = np.bincount(groups, part).astype(float), np.bincount(groups, whole).astype(float)
        of_groups = by_group.wilson(numerators, denominators, holds_defect(truth, groups))
        return of_groups, wilson(int(part.sum()), int(whole.sum()))

    area = float(auroc(rank(truth, scores))[0])
    of_groups, of_images = resample(truth, resamples, seed, groups), resample(truth, resamples, seed)
    once, firsts = np.ones((1, len(truth))), np.unique(groups, return_index=True)[1]

    def bootstrap(figure: Callable[[np.ndarray], np.ndarray]) -> tuple[Interval | None, Interval | None]:
        drawn = figure(np.vstack((once, of_groups)))
        interval = by_group.bootstrap_interval(drawn, of_groups[:, firsts], truth, groups)
        return interval, percentiles(figure(of_images))

    return {
        "recall": proportion(tp, truth),
        "precision": proportion(tp, called),
        "accuracy": proportion(tp | tn, np.ones(len(truth), dtype=bool)),
        "F1": (
            by_group.f1_interval(
                np.bincount(groups, tp).astype(float),
                np.bincount(groups, fp).astype(float),
                np.bincount(groups, fn).astype(float),
                holds_defect(truth, groups),
            ),
            f1_interval(int(tp.sum()), int(fp.sum()), int(fn.sum())),
        ),
        "image AUROC": (
            by_group.auroc_interval(truth, scores, groups),
            auroc_interval(area, int(truth.sum()), int((~truth).sum())),
        ),
        "image AP": bootstrap(lambda weights: average_precision_score(rank(truth, scores, weights))),
        "mask AP": bootstrap(partial(mask_ap_at_once, matches)),
    }


def grouped_cell(options: Options, model: str, parts: int, agreement: str) -> dict[str, tuple[float, float]]:
    """Return for each metric the share of samples whose interval holds the truth, over groups and over images."""
    shift, agree = SHIFTS[model], AGREEMENT[agreement]
    known = grouped_truths(np.random.default_rng([options.seed, list(SHIFTS).index(model)]), shift)
    rng = np.random.default_rng([options.seed, list(SHIFTS).index(model), parts, list(AGREEMENT).index(agreement)])
    hits = {name: np.zeros(2) for name in known}
    samples = 0
    while samples < options.samples:
        truth, scores, groups = draw_groups(rng, parts, agree, shift)
        matches = draw_grouped_matches(rng, truth, groups, agree, shift)
        if truth.all() or not truth.any():
            continue
        for name, both in grouped_intervals(truth, scores, groups, matches, options.resamples, samples).items():
            hits[name] += [bounds is not None and bounds[0] <= known[name] <= bounds[1] for bounds in both]
        samples += 1
    return {name: tuple(count / samples) for name, count in hits.items()}


def grouped_truths(rng: np.random.Generator, shift: float) -> dict[str, float]:
    """Return the population's metrics, from as many single images as it has."""
    truth, scores, groups = draw_groups(rng, POPULATION, 0.0, shift)
    truth, scores, groups = truth[:POPULATION], scores[:POPULATION], np.arange(POPULATION)
    found, ranking = rates(*verdicts(truth, scores)), rank(truth, scores)
    figures = {
        "recall": found["recall"],
        "precision": found["precision"],
        "accuracy": found["accuracy"],
        "F1": found["f1_score"],
        "image AUROC": float(auroc(ranking)[0]),
        "image AP": float(average_precision_score(ranking)[0]),
        "mask AP": float(mask_ap(draw_grouped_matches(rng, truth, groups, 0.0, shift), np.ones((1, POPULATION)))[0]),
    }
    return {name: float(value or 0.0) for name, value in figures.items()}


def print_grouped(options: Options) -> None:
    """Print for each model the share of samples whose interval holds the truth, over parts and over images."""
    columns = [(parts, agreement) for parts in PARTS for agreement in AGREEMENT]
    with ProcessPoolExecutor(options.workers) as pool:
        jobs = {
            (model, *column): pool.submit(grouped_cell, options, model, *column)
            for model in SHIFTS
            for column in reversed(columns)
        }
        for model in SHIFTS:
            print(f"\n| {model} |", " | ".join(f"{parts} parts, {agreement}" for parts, agreement in columns), "|")
            print("| --- |", " | ".join("---:" for _ in columns), "|")
            cells = [jobs[model, *column].result() for column in columns]
            for name in cells[0]:
                shares = (" / ".join(f"{100 * share:.1f}" for share in cell[name]) for cell in cells)
                print(f"| {name} |", " | ".join(shares), "|", flush=True)


def main(options: Options) -> None:
    """Print the share of samples whose interval holds the population's metric."""
    if options.by_group:
        print_grouped(options)
        return
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
