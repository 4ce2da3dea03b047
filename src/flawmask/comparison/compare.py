"""`compare`: train and evaluate the models one after the other, each in a process of its own; then compare them."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import flawmask
from flawmask.coco import read_split
from flawmask.coco_files import split_names
from flawmask.comparison import contender, speed
from flawmask.comparison.conclusions import Compared, summarise
from flawmask.comparison.config import CompareConfig
from flawmask.comparison.entry import Entry, SharedData, entry_file, read_entry
from flawmask.comparison.exports import check_exports
from flawmask.comparison.own_process import describe_exit, run_in_own_process
from flawmask.data import dataset_info
from flawmask.files import folder_lock, read_json, write_json
from flawmask.folds import prepared_folds
from flawmask.launch import world_size
from flawmask.progress import has_details, is_shown
from flawmask.runs import COMPARISON, MADE_BY, begin_or_continue, check_folder
from flawmask.runtime import choose_device
from flawmask.settings import Reading, as_json, require
from flawmask.stages import (
    RunConfig,
    augment_dataset,
    check_evaluation,
    check_training,
    evaluated_splits,
    prepare_dataset,
)
from flawmask.training.choose import choose_networks

log = logging.getLogger(__name__)

SAME_ANYWAY = (
    "archs",
    "baselines",
    "output_dir",
    "overwrite",
    "workers",
    "cache_gb",
    "save_every",
    "compile",
    "layout",
    "offline",
    "strict",
)
"""Settings that change no model: a comparison goes on although they have changed. `layout` is among them because the
content of the data sets shows what it led to."""


def compare(config: CompareConfig) -> Compared:
    """Train and evaluate each model, and write the comparison.

    An earlier call with the same settings and images may have finished some of the models. They are kept, unless
    `overwrite` is on.

    Raises:
        FlawmaskError: see `prepare` and `augment`; or an export is damaged or has other classes. An error in a single
            model is written into its entry instead.
        KeyboardInterrupt: Ctrl-C was pressed. The training that was running has been saved.
        SystemExit: the process received SIGTERM. The training has been saved, too.
    """
    require(world_size() == 1, "start compare as a single process: it starts a process for each model itself")
    choose_device(config.device)
    settings = {key: value for key, value in as_json(config).items() if key not in SAME_ANYWAY}
    if config.output_dir is not None:
        check_folder(config.output_dir, COMPARISON, settings, overwrite=config.overwrite)
    shared = _prepare_shared_data(config, config.run_config(config.arch_names[0]))
    check_exports(config, shared)
    if config.archs == "auto":
        training = read_split(shared.training_dirs[0], "train", config)
        has_masks = not training.box_only_defects
        archs = choose_networks(config.run_config("auto"), len(training.images), has_masks=has_masks)
        config = replace(config, archs=",".join(archs))
    origin = {
        "made_by": MADE_BY[COMPARISON],
        "version": flawmask.__version__,
        "settings": settings,
        "source": [_content(folder, config) for folder in shared.prepared_dirs],
    }
    folder = begin_or_continue(COMPARISON, origin, config.output_dir, overwrite=config.overwrite)
    with folder_lock(folder / "comparison"):
        try:
            entries = [_entry(config, shared, folder, name) for name in config.every_name]
            speeds = _speeds(config, shared, folder, entries)
        except (KeyboardInterrupt, SystemExit):
            log.warning("stopped: repeat the same flawmask compare command to continue in %s", folder)
            raise
        return summarise(config, shared, folder, origin, entries, speeds)


def _prepare_shared_data(config: CompareConfig, run: RunConfig) -> SharedData:
    """Prepare and augment once for all models."""
    name = config.category or Path(str(config.dataset_dir)).name
    folders = prepared_folds(run, name) if run.is_cross_validation else [prepare_dataset(run, name)]
    splits = evaluated_splits(run, folders[0])
    for folder in folders:
        check_training(run, folder, "auto")  # if only one network cannot train on the images, its entry says so
        check_evaluation(run, folder, splits)
    training_dirs = [augment_dataset(replace(run, fold=None), folder) for folder in folders]
    reading = Reading(crowds=run.crowds, on_error=run.on_error, good_name=run.good_name)
    pooled = run.is_cross_validation
    return SharedData(tuple(folders), tuple(training_dirs), tuple(splits), pooled=pooled, reading=reading)


def _content(folder: Path, reading: Reading) -> str:
    return dataset_info.content_of({name: read_split(folder, name, reading) for name in split_names(folder)})


def _entry(config: CompareConfig, shared: SharedData, folder: Path, name: str) -> Entry:
    """Return a model's entry: the one that an earlier call wrote, or a new one."""
    finished = read_entry(folder, name)
    if finished is not None and finished.reason is None:
        log.info("%s was finished before", name)
        return finished
    log.info("%s: %s", name, folder / name)
    entry_file(folder, name).unlink(missing_ok=True)
    output = {"is_shown": is_shown(), "has_details": has_details()}
    status = run_in_own_process(contender.main, config, shared, folder, name, **output)
    entry = read_entry(folder, name)
    if entry is None:
        entry = Entry(name, reason=describe_exit(status), failed=True)
        write_json(entry_file(folder, name), asdict(entry))
    if entry.reason is not None:
        log.warning("%s: %s", name, entry.reason)
    return entry


def _speeds(config: CompareConfig, shared: SharedData, folder: Path, entries: Sequence[Entry]) -> dict[str, Any]:
    """Return each model's seconds per image. All are timed together, unless an earlier call timed the same models."""
    finished = [one for one in entries if one.reason is None]
    path = folder / speed.NAME
    speeds = read_json(path) if path.is_file() else {}
    if finished and set(speeds) != {one.name for one in finished}:
        path.unlink(missing_ok=True)
        split = read_split(shared.prepared_dirs[0], shared.splits[-1], config)
        output = {"is_shown": is_shown(), "has_details": has_details()}
        status = run_in_own_process(speed.main, config, folder, finished, split, **output)
        speeds = read_json(path) if path.is_file() else {}
        if not speeds:
            log.warning("the models could not be timed: %s", describe_exit(status))
    return dict(speeds)
