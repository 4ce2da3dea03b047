"""The training loop: from settings to a run folder. `epoch.py` trains one epoch, `run.py` keeps the state and files."""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from flawmask.coco import CocoSplit
from flawmask.distributed import processes
from flawmask.errors import FlawmaskError
from flawmask.files import folder_lock, remove_partial_files
from flawmask.model.build import build
from flawmask.model.layers import count_parameters
from flawmask.model.weights import loaded, not_loaded
from flawmask.runtime import (
    choose_device,
    choose_precision,
    is_out_of_memory,
    keep_freed_memory,
    refuse_wrong_gradients,
    seed_everything,
)
from flawmask.settings import as_json
from flawmask.training import loader, resume
from flawmask.training.cache import pixel_cache
from flawmask.training.callbacks import Callback, Pictures, Tracking
from flawmask.training.clock import Clock
from flawmask.training.config import TrainConfig, seconds_in
from flawmask.training.curves import VALIDATION_FIGURES
from flawmask.training.epoch import one_epoch
from flawmask.training.loader import Transform
from flawmask.training.network import build_for_training, prepare_for_training
from flawmask.training.resume import EpochProgress, State
from flawmask.training.run import Run, resume_command
from flawmask.training.setup import Setup, check_run_folder, set_up
from flawmask.training.step import Step, make_step
from flawmask.training.stop import Stop
from flawmask.training.tile_data import cached_shapes, dataset_of, log_cost
from flawmask.training.trackers import track_run

log = logging.getLogger(__name__)

TABLE_ROWS = 20
"""The table's header is logged again after so many epochs."""


@dataclass(frozen=True)
class Trained:
    """The result of `train`.

    Attributes:
        run_dir: the folder with `best.pt`, `last.pt`, `history.json`, `config.json`, `curves.png`, `train_batch.jpg`,
            `labels.png`, `state.pt` and, with `--log tensorboard`, `tensorboard/`.
        best_epoch: the epoch that `best.pt` comes from, counted from 1.
        history: the content of `history.json`: a list per metric, an entry per epoch.
    """

    run_dir: Path
    best_epoch: int
    history: dict[str, list[Any]]


def train(
    config: TrainConfig,
    *,
    part_of: Mapping[str, Any] | None = None,
    transform: Transform | None = None,
    callbacks: Sequence[Callback] = (),
) -> Trained:
    """Train a network on the `train` split of a COCO folder and write the run folder.

    If there is a validation split, `val_loss` is computed on it, and `select_by` can choose the epoch by its metrics.

    Args:
        config: the settings.
        part_of: the settings of the pipeline, if this training is a stage of one; kept in the run's `config.json`.
        transform: an augmentation of the training images, see `loader.Transform`, in place of `train_augment`. To
            resume the training, pass it again.
        callbacks: objects whose methods are called at named moments of the training.

    Raises:
        FlawmaskError: the data set or the weights cannot be used, there is no such device, the output folder holds
            something else, another process died, or the loss is not finite any more. Until the training is first
            saved, nothing is written and no older run is replaced.
        KeyboardInterrupt: Ctrl-C was pressed. The current step was saved, and the training can be resumed.
        SystemExit: a scheduler sent SIGTERM. The current step was saved, and the training can be resumed.
    """
    began = time.perf_counter()
    resumed, run_dir = config.resume, Path(str(config.resume or config.output_dir))
    if resumed:
        config, part_of = resume.settings_of(resumed), part_of or resume.part_of(resumed)
    else:
        check_run_folder(config)
    device = choose_device(config.device)
    keep_freed_memory(device)
    refuse_wrong_gradients(device)
    dtype = choose_precision(config.precision, device)
    with processes(device) as team, Stop() as stop, ExitStack() as stack:
        if team.is_main:
            stack.enter_context(folder_lock(run_dir))
            remove_partial_files(run_dir)
            resume.finish_save(run_dir)
        state = None
        if resumed:
            # Read only now that the lock is held: until then another process may have saved. The main process chooses
            # the state for all processes.
            name = team.from_main(lambda: resume.newest(resumed))
            config, state = resume.load(resumed, name)
        setup = set_up(config, state, team, device, dtype, began, transform)
        try:
            return _train(setup, state, began, stop, part_of, callbacks)
        except (RuntimeError, MemoryError) as error:
            reason = _explain(error, setup, part_of)
            if reason is None:
                raise
            raise FlawmaskError(reason) from None


def _explain(error: BaseException, setup: Setup, part_of: Mapping[str, Any] | None) -> str | None:
    """Return a message for an error of PyTorch's that the user can do something about; None for all others."""
    command = resume_command(setup.run_dir, part_of)
    how_to_resume = f"; {command} continues from the last saved step" if resume.has_state(setup.run_dir) else ""
    if "DataLoader worker" in str(error):
        first = str(error).splitlines()[0]
        return (
            f"a process that reads images died ({first}): if memory ran out, try fewer --workers, or 0{how_to_resume}"
        )
    if is_out_of_memory(error):
        return (
            f"memory ran out with --batch_size {setup.config.batch_size} and --image_size {setup.spec.image_size}, and "
            f"a smaller micro-batch did not help: lower --image_size{how_to_resume}"
        )
    return None


def _train(
    setup: Setup,
    state: State | None,
    began: float,
    stop: Stop,
    part_of: Mapping[str, Any] | None,
    callbacks: Sequence[Callback],
) -> Trained:
    """Train all remaining epochs."""
    config, team = setup.config, setup.team
    with ExitStack() as stack:
        if setup.spec.tiling is not None:
            log_cost(setup.training, setup.spec.tiling)
        batches = _loader(setup, setup.training, stack, shuffle=True)
        val_batches = _loader(setup, setup.validation, stack, shuffle=False) if setup.validation else None
        step = _step(setup)
        budget = seconds_in(config.time_budget) if config.time_budget else None
        before = (state.seconds, state.before_steps) if state else (0.0, 0.0)
        clock = Clock(None if budget else config.epochs * len(batches), budget, *before, began)
        logging_to = config.log if team.is_main else "none"
        record = stack.enter_context(track_run(logging_to, setup.run_dir, as_json(config)))
        called = [Pictures(), *([Tracking(record)] if record else []), *callbacks] if team.is_main else []
        run = Run(setup, step, clock, stop, part_of, called, **_saved_progress(state))
        if state is not None:
            resume.restore(state, step)
            if team.is_main and run.history and run.within is None and not run.is_written():
                run.write()
        while not _is_done(run):
            try:
                figures = one_epoch(run, batches, val_batches, evaluate=config.log != "none")
            except (KeyboardInterrupt, SystemExit):
                if run.within and run.within.batches and not stop.deferring:  # during the evaluation after the steps
                    run.save()
                raise
            stop.deferring = True
            is_best = run.add(figures)
            run.within = None
            run.save()
            if team.is_main:
                run.write()
                for one in run.callbacks:
                    one.on_epoch_end(run, figures)
            _log_epoch(figures, None if budget else config.epochs, _remaining(run), is_best)
            stop.deferring = False
            # With several processes, only some may have received the signal. They stop together in `train_epoch`.
            if stop.received_signal and team.count == 1:
                run.end()
        for one in run.callbacks:
            one.on_end(run)
    log.info("trained %s: best.pt is epoch %d by %s", setup.run_dir, run.best_epoch, config.select_by)
    return Trained(setup.run_dir, run.best_epoch, run.history)


def _saved_progress(state: State | None) -> dict[str, Any]:
    """Return the fields of `Run` that a saved state decides."""
    if state is None:
        return {}
    names = ("epoch", "history", "best_epoch", "best_value", "bad_in_a_row")
    within = EpochProgress(**state.within) if state.within else None
    return {name: getattr(state, name) for name in names} | {"within": within, "is_begun": True}


def _is_done(run: Run) -> bool:
    """Return whether the training has reached its epochs or its time, or has not improved for `--patience` epochs."""
    config, clock = run.setup.config, run.clock
    if run.within is not None:
        return False
    if config.patience is not None and run.epoch - run.best_epoch >= config.patience:
        log.info("stopped: %s has not improved for %d epochs", config.select_by, config.patience)
        return True
    if clock.budget is None:
        return run.epoch >= config.epochs
    return run.epoch > 0 and clock.progress(run.step.steps_taken, run.setup.team) >= 1


def _remaining(run: Run) -> float:
    """Return an estimate of the seconds that the training will still take."""
    clock = run.clock
    if clock.budget is not None:
        return max(0.0, clock.budget - clock.seconds)
    return clock.seconds / run.epoch * (run.setup.config.epochs - run.epoch)


def _loader(setup: Setup, split: CocoSplit, stack: ExitStack, *, shuffle: bool) -> DataLoader[Any]:
    """Return a loader of this process' shard of a split. Closing the stack deletes its cache on disk."""
    config, team = setup.config, setup.team
    augmenting = setup.augmenting if shuffle else None
    shapes = cached_shapes(split, setup.spec, augmenting)
    # --cache_gb is shared by both splits and all processes.
    total = len(setup.training.images) + (len(setup.validation.images) if setup.validation else 0)
    cache = stack.enter_context(pixel_cache(shapes, config.cache_gb * len(shapes) / total / team.count))
    items = dataset_of(split, setup.spec, config.seed, cache, augmenting)
    order = loader.Order(
        items.shapes,
        setup.batch_size,
        seed=config.seed if shuffle else None,
        rank=team.rank,
        processes=team.count,
        marks_epochs=shuffle and items.changes,
        lies_on_its_side=items.lies_on_its_side,
    )
    return loader.make_loader(items, order, workers=config.workers, pin=setup.device.type == "cuda")


def _step(setup: Setup) -> Step:
    """Return the step with a new network that has its initial weights."""
    config = setup.config
    seed_everything(config.seed)
    model = build_for_training(config, setup.spec, setup.initial_weights, setup.device, setup.dtype, start=setup.start)
    if setup.initial_weights.state:
        log.info("%s", loaded(model, setup.initial_weights))
        for line in not_loaded(model, setup.initial_weights):
            log.debug("  not loaded: %s", line)
    log.info("%s trains %.1f million parameters on %s", config.arch, count_parameters(model) / 1e6, setup.device)
    step = make_step(
        config,
        model,
        setup.spec,
        setup.device,
        setup.dtype,
        setup.start,
        micro_batch_size=setup.micro_batch_size,
        team=setup.team,
    )
    if config.ema:
        averaged = build(setup.spec)
        averaged.load_state_dict(model.state_dict())
        step.averaged = prepare_for_training(config, averaged, setup.spec, setup.device, setup.dtype, start=setup.start)
        step.averaged.requires_grad_(False)
    return step


def _log_epoch(figures: dict[str, Any], epochs: int | None, remaining: float, is_best: bool) -> None:
    """Log an epoch as a row of a table. The table reads the same above a terminal's progress bar and in a file.

    Args:
        figures: the metrics of the epoch.
        epochs: the number of all epochs; None where a time budget decides it.
        remaining: the estimated seconds that are left.
        is_best: whether this is the best epoch so far.
    """
    epoch = figures["epoch"]
    losses = {name: figures[name] for name in ("train_loss", "val_loss", *VALIDATION_FIGURES) if name in figures}
    cells = {
        "epoch": f"{epoch:{len(str(epochs))}}/{epochs}" if epochs else str(epoch),
        **{name: "n/a" if value is None else f"{value:.4f}" for name, value in losses.items()},
        "lr": f"{figures['learning_rate']:.2e}",
        "images/s": f"{figures['images_per_second']:.1f}",
        "remaining": str(timedelta(seconds=round(remaining))),
    }
    widths = [max(8, len(name), len(text)) for name, text in cells.items()]
    if epoch % TABLE_ROWS == 1:
        log.info("  ".join(name.rjust(width) for name, width in zip(cells, widths, strict=True)))
    row = "  ".join(text.rjust(width) for text, width in zip(cells.values(), widths, strict=True))
    log.info("%s%s", row, "  best so far" if is_best else "")
