"""Summarise a comparison: rankings over the same resampled images, a recommendation, and notes on the protocol."""

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
from flawmask.comparison.entry import Entry, SharedData
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

RESAMPLES_PER_PAIR = 400
"""Bootstrap samples for each pair of models, and at least --resamples in total. So ten samples lie beyond each bound of
an interval, however many pairs share the 5 %."""

GUESSING = {"image_auroc": 0.5, "mask_ap": 0.0}
"""The metrics of a model that guesses."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Compared:
    """The result of a comparison.

    Attributes:
        folder: the folder with `comparison.html`, `.md` and `.json`, and a folder for each model.
        head: the first row of the table: an empty cell, then the models.
        body: the other rows of the table.
        said: sentences: the recommendation, the rankings, and notes on the protocol.
        failed: whether a model failed. A model that was left out did not fail.
    """

    folder: Path
    head: tuple[str, ...]
    body: list[tuple[str, ...]]
    said: list[str]
    failed: bool


def summarise(
    config: CompareConfig,
    shared: SharedData,
    folder: Path,
    origin: Mapping[str, Any],
    entries: Sequence[Entry],
    speeds: Mapping[str, Any],
) -> Compared:
    """Summarise the comparison, and write it as JSON, Markdown and a page."""
    finished = [one for one in entries if one.reason is None]
    metrics = {one.name: read_json(folder / str(one.results) / "metrics.json") for one in finished}
    ranked = _ranked(config, shared, folder, finished, metrics) if finished else []
    medians = {name: measured["1"]["median"] for name, measured in speeds.items() if "1" in measured}
    guessing = {
        key: [name for name, of_model in metrics.items() if _may_guess(of_model, key, level)]
        for key, level in GUESSING.items()
    }
    shown, recommended = sentences(ranked), recommendation(ranked, medians, guessing, BASELINES)
    notes = _notes(config, entries, metrics, ranked, speeds)
    columns = [Column(one, metrics.get(one.name, {}), speeds.get(one.name, {})) for one in entries]
    head, body = ("", *(one.name for one in entries)), rows(columns)
    content = {
        **origin,
        "models": {one.name: asdict(one) for one in entries},
        "seconds_per_image": dict(speeds),
        "ranked": [asdict(one) for one in ranked],
        "shown": shown,
        "recommendation": recommended,
        "mind": notes,
    }
    write_json(folder / COMPARISON, content)
    listed = "\n".join(f"- {line}" for line in (*recommended, *shown, *notes))
    write_bytes(folder / "comparison.md", f"{markdown(head, body)}\n\n{listed}\n".encode())
    write_page(folder, config.category or shared.prepared_dirs[0].name, columns, recommended, shown, notes)
    return Compared(folder, head, body, [*recommended, *shown, *notes], failed=any(one.failed for one in entries))


def _ranked(
    config: CompareConfig, shared: SharedData, folder: Path, entries: Sequence[Entry], metrics: Mapping[str, Any]
) -> list[Ranked]:
    """Return the ranking of the models for each metric. All models are resampled with the same images."""
    drawn: dict[str, dict[str, Floats]] = {key: {} for key in questions()}
    groups = numbered(shared.groups)
    truth = np.zeros(0, dtype=bool)
    for one in entries:
        results = folder / str(one.results)
        if one.name in BASELINES:
            truth, scores = _scores(results)
            drawn["image_auroc"][one.name] = _auroc(truth, scores, _weights(config, truth, groups))
            continue
        split: CocoSplit = shared.evaluated_split(folder / one.name)
        model = read_other(results, split, metrics[one.name]["conf"], config.min_area)
        evidence = gather(split, model.predictions, model.conf, model.min_area)
        truth = evidence.truth
        defined = [METRICS[key] for key in drawn if metrics[one.name].get(key) is not None]
        for key, figures in values(defined, evidence, _weights(config, truth, groups)).items():
            drawn[key][one.name] = figures
    widened_to = partial(widened, truth, groups)  # all models have the same truth
    ranked = [rank_models(key, of_models, widened_to) for key, of_models in drawn.items()]
    return [one for one in ranked if one is not None]


def _weights(config: CompareConfig, truth: npt.NDArray[np.bool_], groups: Groups | None) -> Floats:
    models = len(config.arch_names) + len(config.baseline_names)
    count = max(config.resamples, RESAMPLES_PER_PAIR * math.comb(models, 2))
    return np.vstack((np.ones(len(truth)), resample(truth, count, config.seed, groups)))


def _scores(results: Path) -> tuple[npt.NDArray[np.bool_], Floats]:
    """Return the truth and the score of each image from a baseline's results."""
    table = read_table(results / "predictions.csv")
    return np.array([row["truth"] == "defect" for row in table]), np.array([float(row["score"]) for row in table])


def _auroc(truth: npt.NDArray[np.bool_], scores: Floats, weights: Floats) -> Floats:
    if truth.all() or not truth.any():
        return np.full(len(weights), np.nan)
    return auroc(rank(truth, scores, weights))


def _may_guess(metrics: Mapping[str, Any], key: str, level: float) -> bool:
    """Return whether a metric is no better than guessing: its interval, or its value, reaches down to that level."""
    value = metrics.get(key)
    bounds = interval_of(metrics, key)
    return value is not None and (bounds[0] if bounds else value) <= level


def _notes(
    config: CompareConfig,
    entries: Sequence[Entry],
    metrics: Mapping[str, Any],
    ranked: Sequence[Ranked],
    speeds: Mapping[str, Any],
) -> list[str]:
    """Return notes on the protocol, as sentences."""
    epochs = "1 epoch" if config.epochs == 1 else f"{config.epochs} epochs"
    budget = f"{config.time_budget} of training" if config.time_budget else epochs
    start = {
        "none": "nothing",
        "auto": "the best available weights",
        "coco": "weights of COCO or ImageNet",
        "imagenet": "weights of ImageNet",
    }
    notes = [
        f"Budget: {budget} each, from {start.get(config.weights, f'--weights {config.weights}')}.",
        *(f"{one.name} {one.learned.protocol}." for one in entries if one.learned is not None),
    ]
    untrained = [name for name in config.arch_names if config.weights_of(name) == "none" and config.weights != "none"]
    notes += [f"{name} starts from nothing: with pretrained weights, it may rank otherwise." for name in untrained]
    groups = {one["groups"]: one["total_images"] for one in metrics.values() if "groups" in one}
    notes += [
        f"Evaluated on {images_of_parts(images, parts)}: intervals and differences are computed over parts."
        for parts, images in groups.items()
    ]
    baselines = [one.name for one in entries if one.name in BASELINES and one.reason is None]
    if baselines:
        notes.append(f"{' and '.join(baselines)}: only for comparison, because predict runs only detectors.")
    if any(len(one.level_with_best) > 1 for one in ranked):
        notes.append(
            "Where no difference is shown, there may still be one: these images may be too few to show it. Evaluate "
            "more images before a production line depends on it."
        )
    if config.folds == 1:
        notes.append(
            "Each model was trained once. Another --seed gives other figures; --folds shows how much they vary."
        )
    counts = Counter(note for one in metrics.values() for note in one.get("notes") or [])
    notes += [f"{note} ({count} of {len(metrics)} models)" for note, count in counts.items()]
    notes += [f"{name} could not be timed: {one['reason']}" for name, one in speeds.items() if "reason" in one]
    for one in entries:
        if one.reason:
            notes.append(f"{one.name} {'failed' if one.failed else 'left out'}: {one.reason}")
    return notes
