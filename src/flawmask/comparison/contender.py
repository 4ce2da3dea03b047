"""Train and evaluate one model of a comparison, in a process of its own, and write its entry."""

import gc
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from flawmask.coco import read_split
from flawmask.comparison import baseline
from flawmask.comparison.config import BASELINES, CompareConfig
from flawmask.comparison.entry import Entry, MissingRequirementError, SharedData, TrainingSummary, entry_file
from flawmask.comparison.exports import evaluate_export
from flawmask.errors import FlawmaskError
from flawmask.files import folder_lock, read_json, remove_partial_files, write_json
from flawmask.folds import fold_by_fold
from flawmask.launch import own_process
from flawmask.model import checkpoint
from flawmask.model.layers import count_parameters
from flawmask.progress import log_to, show_details, show_progress_on
from flawmask.runs import FOLDS
from flawmask.runtime import choose_device, is_out_of_memory, on_device, peak_memory
from flawmask.settings import as_json, stage
from flawmask.stages import RunConfig, evaluate_run
from flawmask.training.config import TrainConfig
from flawmask.training.loop import train
from flawmask.training.resume import has_state

log = logging.getLogger(__name__)


def main(
    config: CompareConfig, shared: SharedData, folder: Path, name: str, *, is_shown: bool, has_details: bool
) -> None:
    """Train and evaluate a model, and write its entry to `<name>.json`: the main function of a process.

    An error is written into the entry, too. After an interruption there is no entry, and the process ends with status
    130 or 143.
    """
    begin(is_shown=is_shown, has_details=has_details)
    entry, status = Entry(name, reason="it ended without a result", failed=True), 0
    try:
        with on_device(choose_device(config.device)):
            entry = _train_and_evaluate(config, shared, folder, name)
    except MissingRequirementError as error:
        entry = Entry(name, reason=str(error))
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else 0
    except Exception as error:
        known = isinstance(error, FlawmaskError | OSError)
        if not known and not is_out_of_memory(error):
            log.exception("%s", name)  # a bug in Flawmask or in a library: the traceback helps to find it
        text = (str(error).splitlines() or [""])[0]
        entry = Entry(name, reason=text if known else f"{type(error).__name__}: {text}", failed=True)
    # The exit must not happen inside an except clause. There the traceback still holds the data loader: multiprocessing
    # would wait for its worker processes, and these would wait for this process.
    gc.collect()
    if status:
        sys.exit(status)
    write_json(entry_file(folder, name), asdict(entry))


def begin(*, is_shown: bool, has_details: bool) -> None:
    """Set up a process of a comparison: its output and its signals.

    The parent process receives signals and forwards them. If the parent is gone, this process stops as after SIGTERM:
    it saves the training first (on Windows, it ends at once).
    """
    own_process()
    if is_shown:
        console = Console(stderr=True)
        log_to(console)
        show_progress_on(console)
        if has_details:
            show_details()
    if hasattr(os, "setsid"):
        os.setsid()  # else Ctrl-C would arrive twice, and the second one ends a training before it is saved
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _train_and_evaluate(config: CompareConfig, shared: SharedData, folder: Path, name: str) -> Entry:
    _wait_until_free(folder / name)
    if name in BASELINES:
        return baseline.train_and_evaluate(config, shared, folder, name)
    if name in config.export_paths:
        return evaluate_export(config, shared, folder, name)
    return _detector(config.run_config(name), shared, folder, name)


def _wait_until_free(run_dir: Path, seconds: int = 120) -> None:
    """Wait until no process of an interrupted comparison saves into the folder. Then remove half-written files."""
    for _ in range(seconds):
        try:
            with folder_lock(run_dir):
                if run_dir.is_dir():
                    remove_partial_files(run_dir)
                return
        except FlawmaskError:
            time.sleep(1)


def _detector(config: RunConfig, shared: SharedData, folder: Path, name: str) -> Entry:
    run_dir = folder / name
    config = replace(config, overwrite=False)
    if shared.pooled:
        if not (run_dir / FOLDS).is_file():
            run_dir.mkdir(exist_ok=True)
            write_json(run_dir / FOLDS, {"made_by": "flawmask compare", "settings": as_json(config), "done": []})
        fold_by_fold(config, list(shared.prepared_dirs), run_dir)
        runs = [run_dir / f"fold_{fold}" for fold in range(1, len(shared.prepared_dirs) + 1)]
    else:
        _train(config, shared.training_dirs[0], run_dir)
        _peak(config, run_dir)
        evaluate_run(config, run_dir, shared.prepared_dirs[0], shared.splits)
        runs = [run_dir]
    histories = [read_json(run / "history.json") for run in runs]
    longest = max(range(len(runs)), key=lambda at: float(histories[at]["elapsed"][-1]))
    best = runs[longest] / "best.pt"
    network, spec = checkpoint.load(best)
    training = read_split(shared.training_dirs[longest], "train", config)
    learned = TrainingSummary(
        seconds=float(histories[longest]["elapsed"][-1]),
        epochs=len(histories[longest]["epoch"]),
        image_size=spec.fixed_size or spec.image_size,
        parameters=count_parameters(network),
        protocol=f"learns from {len(training.images)} images and the {'masks' if spec.has_masks else 'boxes'} of "
        "their defects",
        peak_bytes=_peak(config, run_dir),
    )
    return Entry(
        name,
        results=f"{name}/{shared.results_name}",
        checkpoint=best.relative_to(folder).as_posix(),
        checkpoint_bytes=best.stat().st_size,
        learned=learned,
    )


def _train(config: RunConfig, dataset_dir: Path, run_dir: Path) -> None:
    """Train, or resume an interrupted training. A training that is finished returns at once."""
    if has_state(run_dir):
        train(TrainConfig(resume=run_dir))
    else:
        train(stage(TrainConfig, config, dataset_dir=dataset_dir, output_dir=run_dir, overwrite=True, resume=None))


def _peak(config: RunConfig, run_dir: Path) -> int | None:
    """Return the peak memory of training and evaluation so far, and keep it in a file.

    The file is for a resumed training: its process does not know the peak of the earlier process.
    """
    path = run_dir / "peak_memory.json"
    now = peak_memory(choose_device(config.device))
    before = read_json(path)["bytes"] if path.is_file() else None
    peak = max((one for one in (now, before) if one is not None), default=None)
    write_json(path, {"bytes": peak})
    return peak
