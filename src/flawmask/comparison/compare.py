"""`compare`: each model in a process of its own, one after the other; then what all of them come to."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import flawmask
from flawmask.coco import read_split
from flawmask.coco_files import split_names
from flawmask.comparison import contender, speed
from flawmask.comparison.conclusions import Compared, summed_up
from flawmask.comparison.config import CompareConfig
from flawmask.comparison.entry import Entry, Ground, entry_file, read_entry
from flawmask.comparison.own_process import death, in_own_process
from flawmask.data import dataset_info
from flawmask.files import only_one, read_json, write_json
from flawmask.folds import prepared_folds
from flawmask.launch import world_size
from flawmask.progress import has_details, is_shown
from flawmask.runs import COMPARISON, earlier, new_run_dir
from flawmask.runtime import choose_device
from flawmask.settings import Reading, as_json, require
from flawmask.stages import RunConfig, augmented, check_judged, check_trained, judged_splits, prepared
from flawmask.training.choose import choose_networks

log = logging.getLogger(__name__)

SAME_ANYWAY = (
    "archs",
    "yardsticks",
    "overwrite",
    "workers",
    "cache_gb",
    "save_every",
    "compile",
    "layout",
    "offline",
    "strict",
)
"""The settings that change no model: with others of these, a comparison goes on. What a layout makes of a category, the
content of the data sets says."""


def compare(config: CompareConfig) -> Compared:
    """Train and judge each model, and write what they come to.

    Models that an earlier call with the same settings on the same images finished are kept, unless `overwrite` is on.

    Raises:
        FlawmaskError: see `prepare` and `augment`. What goes wrong with a single model is its own entry.
        KeyboardInterrupt: Ctrl-C was pressed, the model at work has saved its training.
        SystemExit: the same after SIGTERM.
    """
    require(world_size() == 1, "compare starts alone: it gives each model a process of its own")
    choose_device(config.device)
    ground = _ground(config, config.run_config(config.arch_names[0]))
    if config.archs == "auto":
        training = read_split(ground.trained[0], "train", config)
        has_masks = not training.boxes_alone
        archs = choose_networks(config.run_config("auto"), len(training.images), has_masks=has_masks)
        config = replace(config, archs=",".join(archs))
    origin = {
        "made_by": "flawmask compare",
        "version": flawmask.__version__,
        "settings": {key: value for key, value in as_json(config).items() if key not in SAME_ANYWAY},
        "source": [_content(folder, config) for folder in ground.prepared],
    }
    folder = None if config.overwrite else earlier(f"*_comparison/{COMPARISON}", origin)
    if folder is None:
        with new_run_dir("_comparison") as folder:
            write_json(folder / COMPARISON, origin)
    with only_one(folder / "comparison"):
        try:
            entries = [_entry(config, ground, folder, name) for name in (*config.arch_names, *config.yardstick_names)]
            speeds = _speeds(config, ground, folder, entries)
        except (KeyboardInterrupt, SystemExit):
            log.warning("stopped: the same flawmask compare, said again, goes on in %s", folder)
            raise
        return summed_up(config, ground, folder, origin, entries, speeds)


def _ground(config: CompareConfig, run: RunConfig) -> Ground:
    """Prepare and augment once for all models."""
    name = config.category or Path(str(config.dataset_dir)).name
    folders = prepared_folds(run, name) if run.crosses else [prepared(run, name)]
    splits = judged_splits(run, folders[0])
    for folder in folders:
        check_trained(run, folder, "auto")  # what a single network cannot learn from, its own entry says
        check_judged(run, folder, splits)
    trained = [augmented(replace(run, fold=None), folder) for folder in folders]
    reading = Reading(crowds=run.crowds, on_error=run.on_error, good_name=run.good_name)
    return Ground(tuple(folders), tuple(trained), tuple(splits), pooled=run.crosses, reading=reading)


def _content(folder: Path, reading: Reading) -> str:
    return dataset_info.content_of({name: read_split(folder, name, reading) for name in split_names(folder)})


def _entry(config: CompareConfig, ground: Ground, folder: Path, name: str) -> Entry:
    """Return a model's entry, that of an earlier call or a new one."""
    known = read_entry(folder, name)
    if known is not None and known.reason is None:
        log.info("%s was finished before", name)
        return known
    log.info("%s: %s", name, folder / name)
    entry_file(folder, name).unlink(missing_ok=True)
    said = {"is_shown": is_shown(), "has_details": has_details()}
    status = in_own_process(contender.main, config, ground, folder, name, **said)
    entry = read_entry(folder, name)
    if entry is None:
        entry = Entry(name, reason=death(status), failed=True)
        write_json(entry_file(folder, name), asdict(entry))
    if entry.reason is not None:
        log.warning("%s: %s", name, entry.reason)
    return entry


def _speeds(config: CompareConfig, ground: Ground, folder: Path, entries: Sequence[Entry]) -> dict[str, Any]:
    """Return each model's seconds per image, measured together, or as they were when nothing has changed since."""
    wanted = [one for one in entries if one.reason is None]
    path = folder / speed.NAME
    known = read_json(path) if path.is_file() else {}
    if wanted and set(known) != {one.name for one in wanted}:
        path.unlink(missing_ok=True)
        split = read_split(ground.prepared[0], ground.splits[-1], config)
        said = {"is_shown": is_shown(), "has_details": has_details()}
        status = in_own_process(speed.main, config, folder, wanted, split, **said)
        known = read_json(path) if path.is_file() else {}
        if not known:
            log.warning("the models could not be timed: %s", death(status))
    return dict(known)
