"""`compare`: each model in a process of its own, one after the other; then what all of them come to."""

import csv
import logging
import math
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt

import flawmask
from flawmask.coco import CocoSplit, read_split, split_names
from flawmask.comparison import contender, speed
from flawmask.comparison.config import YARDSTICKS, CompareConfig
from flawmask.comparison.differences import Ranked, questions, rank_models, recommendation, sentences
from flawmask.comparison.entry import Entry, Ground, entry_file, read_entry
from flawmask.comparison.page import write_page
from flawmask.comparison.table import Column, markdown, rows
from flawmask.data import dataset_info
from flawmask.evaluation.against import read_other
from flawmask.evaluation.measure import gather
from flawmask.evaluation.metrics import METRICS, values
from flawmask.evaluation.ranking import auroc, rank
from flawmask.evaluation.uncertainty import resample
from flawmask.files import only_one, read_json, write_bytes, write_json
from flawmask.folds import prepared_folds
from flawmask.launch import launched
from flawmask.progress import has_details, is_shown
from flawmask.report.headline import interval_of
from flawmask.runs import earlier, new_run_dir
from flawmask.runtime import choose_device
from flawmask.settings import as_json, require
from flawmask.stages import RunConfig, augmented, check_judged, judged_splits, prepared
from flawmask.training.stop import SIGNALS

log = logging.getLogger(__name__)

NAME = "comparison.json"

DRAWN_PER_PAIR = 400
"""So many samples are drawn for each pair of models, and never fewer than --resamples: then ten lie beyond each bound
of an interval, however many models share the 5 %."""

SAME_ANYWAY = ("archs", "yardsticks", "overwrite", "workers", "cache_gb", "save_every", "compile", "layout")
"""The settings that change no model: with others of these, a comparison goes on. What a layout makes of a category, the
content of the data sets says."""

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


def compare(config: CompareConfig) -> Compared:
    """Train and judge each model, and write what they come to.

    Models that an earlier call with the same settings on the same images finished are kept, unless `overwrite` is on.

    Raises:
        FlawmaskError: see `prepare` and `augment`. What goes wrong with a single model is its own entry.
        KeyboardInterrupt: Ctrl-C was pressed, the model at work has saved its training.
        SystemExit: the same after SIGTERM.
    """
    require(launched() == 1, "compare starts alone: it gives each model a process of its own")
    choose_device(config.device)
    first = config.run_config(config.arch_names[0])
    ground = _ground(config, first)
    origin = {
        "made_by": "flawmask compare",
        "version": flawmask.__version__,
        "settings": {key: value for key, value in as_json(config).items() if key not in SAME_ANYWAY},
        "source": [_content(folder) for folder in ground.prepared],
    }
    folder = None if config.overwrite else earlier(f"*_comparison/{NAME}", origin)
    if folder is None:
        with new_run_dir("_comparison") as folder:
            write_json(folder / NAME, origin)
    with only_one(folder / "comparison"):
        try:
            entries = [_entry(config, ground, folder, name) for name in (*config.arch_names, *config.yardstick_names)]
            speeds = _speeds(config, ground, folder, entries)
        except (KeyboardInterrupt, SystemExit):
            log.warning("stopped: the same flawmask compare, said again, goes on in %s", folder)
            raise
        return _summed_up(config, ground, folder, origin, entries, speeds)


def _ground(config: CompareConfig, run: RunConfig) -> Ground:
    """Prepare and augment once for all models."""
    category = str(config.category)
    folders = prepared_folds(run, category) if run.crosses else [config.dataset_dir or prepared(run, category)]
    splits = judged_splits(run, folders[0])
    for folder in folders:
        check_judged(run, folder, splits)
    trained = [augmented(replace(run, fold=None), folder) for folder in folders]
    return Ground(tuple(folders), tuple(trained), tuple(splits), pooled=run.crosses)


def _content(folder: Path) -> str:
    return dataset_info.content_of({name: read_split(folder, name) for name in split_names(folder)})


def _entry(config: CompareConfig, ground: Ground, folder: Path, name: str) -> Entry:
    """Return a model's entry, that of an earlier call or a new one."""
    known = read_entry(folder, name)
    if known is not None and known.reason is None:
        log.info("%s was finished before", name)
        return known
    log.info("%s: %s", name, folder / name)
    entry_file(folder, name).unlink(missing_ok=True)
    said = {"is_shown": is_shown(), "has_details": has_details()}
    status = _in_own_process(contender.main, config, ground, folder, name, **said)
    entry = read_entry(folder, name)
    if entry is None:
        entry = Entry(name, reason=_death(status), failed=True)
        write_json(entry_file(folder, name), asdict(entry))
    if entry.reason is not None:
        log.warning("%s: %s", name, entry.reason)
    return entry


def _death(status: int) -> str:
    if status == -getattr(signal, "SIGKILL", 0) != 0:
        return "its process was killed: memory ran out, perhaps"
    return f"its process ended with status {status}"


def _in_own_process(work: Callable[..., None], *given: Any, **named: Any) -> int:
    """Call the function in a new process and return the status that it ends with.

    Raises:
        KeyboardInterrupt: it was interrupted, or this one was.
        SystemExit: it was told to stop.
    """
    process = multiprocessing.get_context("spawn").Process(target=work, args=given, kwargs=named)
    asked: list[int] = []

    def hand_on(number: int, _: FrameType | None) -> None:
        asked.append(number)
        if process.pid is not None and os.name != "nt":  # there, Ctrl-C reaches both
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)

    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, hand_on) for number in SIGNALS} if is_main else {}
    try:
        process.start()
        process.join()  # told to stop, it saves first
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    status = process.exitcode or 0
    if signal.SIGINT in asked or status in (128 + signal.SIGINT, -signal.SIGINT):
        raise KeyboardInterrupt
    if asked or status in (128 + signal.SIGTERM, -signal.SIGTERM):
        raise SystemExit(128 + signal.SIGTERM)
    return status


def _speeds(config: CompareConfig, ground: Ground, folder: Path, entries: Sequence[Entry]) -> dict[str, Any]:
    """Return each model's seconds per image, measured together, or as they were when nothing has changed since."""
    wanted = [one for one in entries if one.reason is None]
    path = folder / speed.NAME
    known = read_json(path) if path.is_file() else {}
    if wanted and set(known) != {one.name for one in wanted}:
        path.unlink(missing_ok=True)
        split = read_split(ground.prepared[0], ground.splits[-1])
        said = {"is_shown": is_shown(), "has_details": has_details()}
        status = _in_own_process(speed.main, config, folder, wanted, split, **said)
        known = read_json(path) if path.is_file() else {}
        if not known:
            log.warning("the models could not be timed: %s", _death(status))
    return dict(known)


def _summed_up(
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
    shown, taken = sentences(ranked), recommendation(ranked, medians, guessing, YARDSTICKS)
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
    write_json(folder / NAME, content)
    listed = "\n".join(f"- {line}" for line in (*taken, *shown, *mind))
    write_bytes(folder / "comparison.md", f"{markdown(head, body)}\n\n{listed}\n".encode())
    write_page(folder, config.category or ground.prepared[0].name, columns, taken, shown, mind)
    return Compared(folder, head, body, [*taken, *shown, *mind], failed=any(one.failed for one in entries))


def _ranked(
    config: CompareConfig, ground: Ground, folder: Path, entries: Sequence[Entry], metrics: Mapping[str, Any]
) -> list[Ranked]:
    """Return how the models rank in each figure, by the same resampled images for all."""
    drawn: dict[str, dict[str, Floats]] = {key: {} for key in questions()}
    for one in entries:
        results = folder / str(one.results)
        if one.name in YARDSTICKS:
            truth, scores = _scores(results)
            drawn["image_auroc"][one.name] = _auroc(truth, scores, _weights(config, truth))
            continue
        split: CocoSplit = ground.judged(folder / one.name)
        found = read_other(results, split, metrics[one.name]["conf"], config.min_area)
        evidence = gather(split, found.predictions, found.conf, found.min_area)
        asked = [METRICS[key] for key in drawn if metrics[one.name].get(key) is not None]
        for key, figures in values(asked, evidence, _weights(config, evidence.truth)).items():
            drawn[key][one.name] = figures
    ranked = [rank_models(key, of_models) for key, of_models in drawn.items()]
    return [one for one in ranked if one is not None]


def _weights(config: CompareConfig, truth: npt.NDArray[np.bool_]) -> Floats:
    models = len(config.arch_names) + len(config.yardstick_names)
    count = max(config.resamples, DRAWN_PER_PAIR * math.comb(models, 2))
    return np.vstack((np.ones(len(truth)), resample(truth, count, config.seed)))


def _scores(results: Path) -> tuple[npt.NDArray[np.bool_], Floats]:
    """Return truth and score of each image in a yardstick's results."""
    with (results / "predictions.csv").open(newline="", encoding="utf-8") as lines:
        table = list(csv.DictReader(lines))
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
    start = {"none": "nothing", "coco": "weights of COCO or ImageNet", "imagenet": "weights of ImageNet"}
    said = [
        f"Budget: {budget} each, from {start.get(config.weights, f'--weights {config.weights}')}.",
        *(f"{one.name} {one.learned.protocol}." for one in entries if one.learned is not None),
    ]
    yardsticks = [one.name for one in entries if one.name in YARDSTICKS and one.reason is None]
    if yardsticks:
        said.append(f"{' and '.join(yardsticks)}: to be held against, not to be used; predict takes detectors alone.")
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
