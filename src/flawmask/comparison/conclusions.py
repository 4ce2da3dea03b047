"""What the models of a comparison come to: rankings over the same resampled images, a recommendation, what to mind."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flawmask.coco import CocoSplit
from flawmask.comparison.config import BASELINES, CompareConfig
from flawmask.comparison.differences import Ranked, questions, rank_models, recommendation, sentences
from flawmask.comparison.entry import Entry, Ground
from flawmask.comparison.page import write_page
from flawmask.comparison.table import Column, markdown, rows
from flawmask.csv_tables import read_table
from flawmask.evaluation.against import read_other
from flawmask.evaluation.by_group import numbered
from flawmask.evaluation.measure import gather
from flawmask.evaluation.metrics import METRICS, values
from flawmask.evaluation.ranking import auroc, rank
from flawmask.evaluation.uncertainty import Groups, resample, widened
from flawmask.files import read_json, write_bytes, write_json
from flawmask.report.headline import images_of_parts, interval_of
from flawmask.runs import COMPARISON

DRAWN_PER_PAIR = 400
"""So many samples are drawn for each pair of models, and never fewer than --resamples: then ten lie beyond each bound
of an interval, however many models share the 5 %."""

GUESSING = {"image_auroc": 0.5, "mask_ap": 0.0}
"""The figures of a model that guesses."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Compared:
    """What a comparison came to.

    Attributes:
        folder: where everything is: `comparison.html`, `.md` and `.json`, and a folder for each model.
        head: the table's first row: a word, then the models.
        body: its other rows.
        said: what shows, what to take, and what to mind, as sentences.
        failed: whether a model has no results for another reason than that it was left out.
    """

    folder: Path
    head: tuple[str, ...]
    body: list[tuple[str, ...]]
    said: list[str]
    failed: bool


def summed_up(
    config: CompareConfig,
    ground: Ground,
    folder: Path,
    origin: Mapping[str, Any],
    entries: Sequence[Entry],
    speeds: Mapping[str, Any],
) -> Compared:
    """Work out what the models come to, and write it as JSON, Markdown and a page."""
    done = [one for one in entries if one.reason is None]
    metrics = {one.name: read_json(folder / str(one.results) / "metrics.json") for one in done}
    ranked = _ranked(config, ground, folder, done, metrics) if done else []
    medians = {name: measured["1"]["median"] for name, measured in speeds.items() if "1" in measured}
    guessing = {
        key: [name for name, of_model in metrics.items() if _may_guess(of_model, key, level)]
        for key, level in GUESSING.items()
    }
    shown, taken = sentences(ranked), recommendation(ranked, medians, guessing, BASELINES)
    mind = _to_mind(config, entries, metrics, ranked, speeds)
    columns = [Column(one, metrics.get(one.name, {}), speeds.get(one.name, {})) for one in entries]
    head, body = ("", *(one.name for one in entries)), rows(columns)
    content = {
        **origin,
        "models": {one.name: asdict(one) for one in entries},
        "seconds_per_image": dict(speeds),
        "ranked": [asdict(one) for one in ranked],
        "shown": shown,
        "recommendation": taken,
        "mind": mind,
    }
    write_json(folder / COMPARISON, content)
    listed = "\n".join(f"- {line}" for line in (*taken, *shown, *mind))
    write_bytes(folder / "comparison.md", f"{markdown(head, body)}\n\n{listed}\n".encode())
    write_page(folder, config.category or ground.prepared[0].name, columns, taken, shown, mind)
    return Compared(folder, head, body, [*taken, *shown, *mind], failed=any(one.failed for one in entries))


def _ranked(
    config: CompareConfig, ground: Ground, folder: Path, entries: Sequence[Entry], metrics: Mapping[str, Any]
) -> list[Ranked]:
    """Return how the models rank in each figure, by the same resampled images for all."""
    drawn: dict[str, dict[str, Floats]] = {key: {} for key in questions()}
    groups = numbered(ground.groups)
    truth = np.zeros(0, dtype=bool)
    for one in entries:
        results = folder / str(one.results)
        if one.name in BASELINES:
            truth, scores = _scores(results)
            drawn["image_auroc"][one.name] = _auroc(truth, scores, _weights(config, truth, groups))
            continue
        split: CocoSplit = ground.judged(folder / one.name)
        found = read_other(results, split, metrics[one.name]["conf"], config.min_area)
        evidence = gather(split, found.predictions, found.conf, found.min_area)
        truth = evidence.truth
        asked = [METRICS[key] for key in drawn if metrics[one.name].get(key) is not None]
        for key, figures in values(asked, evidence, _weights(config, truth, groups)).items():
            drawn[key][one.name] = figures
    widened_to = partial(widened, truth, groups)  # the truth is the same of all
    ranked = [rank_models(key, of_models, widened_to) for key, of_models in drawn.items()]
    return [one for one in ranked if one is not None]


def _weights(config: CompareConfig, truth: npt.NDArray[np.bool_], groups: Groups | None) -> Floats:
    models = len(config.arch_names) + len(config.baseline_names)
    count = max(config.resamples, DRAWN_PER_PAIR * math.comb(models, 2))
    return np.vstack((np.ones(len(truth)), resample(truth, count, config.seed, groups)))


def _scores(results: Path) -> tuple[npt.NDArray[np.bool_], Floats]:
    """Return truth and score of each image in a baseline's results."""
    table = read_table(results / "predictions.csv")
    return np.array([row["truth"] == "defect" for row in table]), np.array([float(row["score"]) for row in table])


def _auroc(truth: npt.NDArray[np.bool_], scores: Floats, weights: Floats) -> Floats:
    if truth.all() or not truth.any():
        return np.full(len(weights), np.nan)
    return auroc(rank(truth, scores, weights))


def _may_guess(metrics: Mapping[str, Any], key: str, level: float) -> bool:
    """Return whether the figure, or its interval, reaches down to what guessing has."""
    value = metrics.get(key)
    bounds = interval_of(metrics, key)
    return value is not None and (bounds[0] if bounds else value) <= level


def _to_mind(
    config: CompareConfig,
    entries: Sequence[Entry],
    metrics: Mapping[str, Any],
    ranked: Sequence[Ranked],
    speeds: Mapping[str, Any],
) -> list[str]:
    """Return what a reader has to know of the protocol, as sentences."""
    epochs = "1 epoch" if config.epochs == 1 else f"{config.epochs} epochs"
    budget = f"{config.time_budget} of training" if config.time_budget else epochs
    start = {
        "none": "nothing",
        "auto": "the best weights at hand",
        "coco": "weights of COCO or ImageNet",
        "imagenet": "weights of ImageNet",
    }
    said = [
        f"Budget: {budget} each, from {start.get(config.weights, f'--weights {config.weights}')}.",
        *(f"{one.name} {one.learned.protocol}." for one in entries if one.learned is not None),
    ]
    groups = {one["groups"]: one["total_images"] for one in metrics.values() if "groups" in one}
    said += [
        f"Judged on {images_of_parts(images, parts)}: intervals and differences are over parts."
        for parts, images in groups.items()
    ]
    baselines = [one.name for one in entries if one.name in BASELINES and one.reason is None]
    if baselines:
        said.append(f"{' and '.join(baselines)}: to be held against, not to be used; predict takes detectors alone.")
    if any(len(one.level_with_best) > 1 for one in ranked):
        said.append(
            "Where no difference is shown, there may be one that these images are too few to show: judge more before a "
            "line depends on it."
        )
    if config.folds == 1:
        said.append("One training each: with another --seed the figures differ. --folds says by how much.")
    notes = Counter(note for one in metrics.values() for note in one.get("notes") or [])
    said += [f"{note} ({count} of {len(metrics)} models)" for note, count in notes.items()]
    said += [f"{name} could not be timed: {one['reason']}" for name, one in speeds.items() if "reason" in one]
    said += [f"{one.name} {'failed' if one.failed else 'takes no part'}: {one.reason}" for one in entries if one.reason]
    return said
