"""Training in full view: the epoch, and what is written after it. `step.py` has the step."""

import logging
import math
import signal
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from flawmask.coco import CocoSplit
from flawmask.distributed import Processes, processes
from flawmask.errors import FlawmaskError
from flawmask.evaluation.evaluate import predict_split
from flawmask.evaluation.leak import write_training_images
from flawmask.evaluation.measure import quick_figures
from flawmask.files import only_one, read_json, remove_partial_files, write_json
from flawmask.inference.config import MAX_PROPOSALS, SCORE_FLOOR
from flawmask.model import checkpoint
from flawmask.model.build import build, for_inference, set_score_floor
from flawmask.model.layers import count_parameters
from flawmask.model.targets import Target
from flawmask.progress import track
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
from flawmask.training.config import TrainConfig, seconds_in
from flawmask.training.curves import VALIDATION_FIGURES, draw_curves
from flawmask.training.pictures import draw_labels, draw_predictions, draw_train_batch
from flawmask.training.resume import State, Within
from flawmask.training.setup import Setup, begin_run, check_run_folder, set_up
from flawmask.training.start import ready, start
from flawmask.training.step import Figures, Step, count_outlined, make_step
from flawmask.training.stop import Stop, end
from flawmask.training.trackers import track_run

log = logging.getLogger(__name__)

HISTORY = "history.json"

LARGER_IS_BETTER = set(VALIDATION_FIGURES)

MOST_BAD_STEPS = 10
"""After so many steps in a row whose loss or gradient is not finite, a training gives up."""

TABLE_ROWS = 20
"""After so many epochs the table's head is logged once more."""


@dataclass(frozen=True)
class Trained:
    """What `train` made.

    Attributes:
        run_dir: the folder with `best.pt`, `last.pt`, `history.json`, `config.json`, `curves.png`, `train_batch.jpg`,
            `labels.png`, `state.pt` and, with `--log tensorboard`, `tensorboard/`.
        best_epoch: the epoch that `best.pt` comes from, counted from 1.
        history: the content of `history.json`: a list per figure, an entry per epoch.
    """

    run_dir: Path
    best_epoch: int
    history: dict[str, list[Any]]


@dataclass
class Clock:
    """How far the training is: by its steps, or by the time where it has a budget.

    Attributes:
        steps: how many there are to be; None where the budget decides.
        budget: seconds that it may take; None where the steps decide.
        before: seconds that it took before it was interrupted.
        begun: when it was begun or went on, by `time.perf_counter`.
    """

    steps: int | None
    budget: float | None
    before: float = 0.0
    begun: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """How long the training has taken."""
        return self.before + time.perf_counter() - self.begun

    def progress(self, taken: int, team: Processes) -> float:
        """Return the share of the training that is done, the same in all processes.

        Args:
            taken: steps so far.
            team: all processes, whose clocks differ: the main one's counts.
        """
        if self.budget is None:
            return taken / max(1, self.steps or 1)
        return team.from_main(lambda: self.seconds) / self.budget


def train(config: TrainConfig, *, part_of: Mapping[str, Any] | None = None) -> Trained:
    """Train a network on the `train` split of a COCO folder and write the run folder.

    The validation split, where there is one, gives `val_loss` and, with `select_by`, chooses the epoch.

    Args:
        config: the settings.
        part_of: the settings of the whole pipeline that this is a stage of, to be kept in the run's `config.json`.

    Raises:
        FlawmaskError: the data set or the weights cannot be used, the device is not there, the output folder holds
            something else, another process died, or the loss stopped being finite. Nothing is written, and nothing of
            an older run replaced, before the training is first saved.
        KeyboardInterrupt: Ctrl-C was pressed; the training can go on from the step that it was in.
        SystemExit: a scheduler sent SIGTERM; the same.
    """
    began = time.perf_counter()
    given, run_dir = config.resume, Path(str(config.resume or config.output_dir))
    if given:
        config, part_of = resume.settings_of(given), part_of or resume.part_of(given)
    else:
        check_run_folder(config)
    device = choose_device(config.device)
    keep_freed_memory(device)
    refuse_wrong_gradients(device)
    dtype = choose_precision(config.precision, device)
    with processes(device) as team, Stop() as stop, ExitStack() as stack:
        if team.is_main:
            stack.enter_context(only_one(run_dir))
            remove_partial_files(run_dir)
            resume.finish_save(run_dir)
        state = None
        if given:
            # Another process may have saved until it gave the lock back; and what one can read, all have to go on from.
            name = team.from_main(lambda: resume.newest(given))
            config, state = resume.load(given, name)
        setup = set_up(config, state, team, device, dtype, began)
        try:
            return _train(setup, state, began, stop, part_of)
        except (RuntimeError, MemoryError) as error:
            reason = _why(error, setup, part_of)
            if reason is None:
                raise
            raise FlawmaskError(reason) from None


def _resume_command(run_dir: Path, part_of: Mapping[str, Any] | None) -> str:
    """Return what is to be said to go on with a training."""
    return f"flawmask {'train' if part_of is None else 'run'} --resume {run_dir}"


def _why(error: BaseException, setup: Setup, part_of: Mapping[str, Any] | None) -> str | None:
    """Return what an error of PyTorch's means where it is one that people can mend; None elsewhere."""
    command = _resume_command(setup.run_dir, part_of)
    later = f"; {command} goes on from the last saved step" if resume.has_state(setup.run_dir) else ""
    if "DataLoader worker" in str(error):
        first = str(error).splitlines()[0]
        return f"a process that reads images died ({first}): where memory ran out, try fewer --workers, or 0{later}"
    if is_out_of_memory(error):
        return (
            f"memory ran out with --batch_size {setup.config.batch_size} and --image_size {setup.spec.image_size}, and "
            f"fewer images at once did not help: lower --image_size{later}"
        )
    return None


def _train(setup: Setup, state: State | None, began: float, stop: Stop, part_of: Mapping[str, Any] | None) -> Trained:
    """Take all epochs that are left to take."""
    config, team = setup.config, setup.team
    with ExitStack() as stack:
        batches = _loader(setup, setup.training, stack, shuffle=True)
        val_batches = _loader(setup, setup.validation, stack, shuffle=False) if setup.validation else None
        step = _step(setup, config.epochs * len(batches))
        budget = seconds_in(config.time_budget) if config.time_budget else None
        clock = Clock(None if budget else config.epochs * len(batches), budget, state.seconds if state else 0.0, began)
        run = _Run(setup, step, clock, stop, part_of, **_so_far(state))
        if state is not None:
            resume.restore(state, step)
            if team.is_main and run.history and run.within is None and not _is_written(run):
                _write(run)
        logging_to = config.log if team.is_main else "none"
        record = stack.enter_context(track_run(logging_to, setup.run_dir, as_json(config)))
        while not _is_done(run):
            try:
                figures = _one_epoch(run, batches, val_batches, judge=config.log != "none")
            except (KeyboardInterrupt, SystemExit):
                if run.within and run.within.batches and not stop.waits:  # between steps, while it was judged
                    run.save()
                raise
            stop.waits = True
            is_best = run.add(figures)
            run.within = None
            run.save()
            if team.is_main:
                _write(run)
                if record is not None and setup.validation:
                    record(figures, draw_predictions(run.for_judging(), setup.spec, setup.validation))
                elif record is not None:
                    record(figures, {})
            _log_epoch(figures, None if budget else config.epochs, _remaining(run), is_best)
            stop.waits = False
            if stop.asked and team.count == 1:  # of several processes, each may have heard of it or not: see the steps
                _end(run)
    log.info("trained %s: best.pt is epoch %d by %s", setup.run_dir, run.best_epoch, config.select_by)
    return Trained(setup.run_dir, run.best_epoch, run.history)


@dataclass
class _Run:
    """What changes from epoch to epoch.

    Attributes:
        setup: what does not.
        step: the network and its optimiser.
        clock: how far it is.
        stop: whether it was told to stop.
        part_of: the settings of the pipeline that it is a stage of.
        epoch: the last one begun, counted from 1.
        within: how far into that one it is; None where it is done.
        history: the content of `history.json`.
        best_epoch: the epoch that `best.pt` comes from.
        best_value: what it was chosen by, smaller being better.
        bad_in_a_row: how many of the last steps were skipped.
        bad: why the last one was.
        is_begun: whether there is a run folder.
        saved: when it was saved last, by `time.perf_counter`.
    """

    setup: Setup
    step: Step
    clock: Clock
    stop: Stop
    part_of: Mapping[str, Any] | None
    epoch: int = 0
    within: Within | None = None
    history: dict[str, list[Any]] = field(default_factory=dict)
    best_epoch: int = 0
    best_value: float = math.inf
    bad_in_a_row: int = 0
    bad: str = ""
    is_begun: bool = False
    saved: float = field(default_factory=time.perf_counter)

    @property
    def kept(self) -> Any:
        """The network that is judged and written: the averaged one where there is one."""
        return self.step.averaged or self.step.model

    def is_due(self) -> bool:
        """Return whether it is to be saved within the epoch; only one process saves."""
        if not self.setup.team.is_main:
            return False
        every = self.setup.config.save_every
        if every.isdecimal():
            return self.step.taken % int(every) == 0
        return time.perf_counter() - self.saved >= seconds_in(every)

    def save(self) -> None:
        """Write what it takes to go on from here, into a run folder that is made first where there is none."""
        setup, step = self.setup, self.step
        if not setup.team.is_main:
            return
        if not self.is_begun:
            _begin(self)
            self.is_begun = True
        state = State(
            spec=asdict(setup.spec),
            is_pretrained=setup.is_pretrained,
            epoch=self.epoch,
            within=asdict(self.within) if self.within else None,
            seconds=self.clock.seconds,
            history=self.history,
            best_epoch=self.best_epoch,
            best_value=self.best_value,
            bad_in_a_row=self.bad_in_a_row,
            tensors=resume.tensors_of(step),
            at_once=step.at_once,
            batch_size=setup.batch_size,
            taken=step.taken,
        )
        resume.save(state, setup.run_dir)
        self.saved = time.perf_counter()

    def for_judging(self) -> Any:
        """Return a copy of it that predicts."""
        setup = self.setup
        network = for_inference(self.kept, setup.spec, setup.device, setup.dtype, MAX_PROPOSALS)
        set_score_floor(network, SCORE_FLOOR)
        return network

    def add(self, figures: Mapping[str, Any]) -> bool:
        """Add the figures of an epoch to the history and return whether it is the best so far.

        An epoch that a time budget cut to less than half is not: a loss of a few images says too little.
        """
        for name, value in figures.items():
            self.history.setdefault(name, []).append(value)
        select_by = self.setup.config.select_by
        if self.best_epoch and 2 * figures["seconds"] * figures["images_per_second"] < len(self.setup.training.images):
            return False
        self.best_value, is_best = _compare(figures[select_by], self.best_value, select_by)
        if is_best:
            self.best_epoch = self.epoch
        return is_best


def _so_far(state: State | None) -> dict[str, Any]:
    if state is None:
        return {}
    names = ("epoch", "history", "best_epoch", "best_value", "bad_in_a_row")
    within = Within(**state.within) if state.within else None
    return {name: getattr(state, name) for name in names} | {"within": within, "is_begun": True}


def _is_done(run: _Run) -> bool:
    """Return whether the training has had its epochs, its time, or enough of not getting better."""
    config, clock = run.setup.config, run.clock
    if run.within is not None:
        return False
    if config.patience is not None and run.epoch - run.best_epoch >= config.patience:
        log.info("stopped: %s has not improved for %d epochs", config.select_by, config.patience)
        return True
    if clock.budget is None:
        return run.epoch >= config.epochs
    return run.epoch > 0 and clock.progress(run.step.taken, run.setup.team) >= 1


def _remaining(run: _Run) -> float:
    """Return how many seconds the training will still take."""
    clock = run.clock
    if clock.budget is not None:
        return max(0.0, clock.budget - clock.seconds)
    return clock.seconds / run.epoch * (run.setup.config.epochs - run.epoch)


def _loader(setup: Setup, split: CocoSplit, stack: ExitStack, *, shuffle: bool) -> DataLoader[Any]:
    """Return a loader of this process' share of a split; what it keeps on disk goes with the stack."""
    config, team = setup.config, setup.team
    shapes = loader.resized_shapes(split, setup.spec)
    # One limit for both splits and all processes.
    both = len(setup.training.images) + (len(setup.validation.images) if setup.validation else 0)
    cache = stack.enter_context(pixel_cache(shapes, config.cache_gb * len(shapes) / both / team.count))
    items = loader.SplitDataset(split, setup.spec, cache)
    seed = config.seed if shuffle else None
    order = loader.Order(shapes, setup.batch_size, seed=seed, rank=team.rank, processes=team.count)
    return loader.make_loader(items, order, workers=config.workers, pin=setup.device.type == "cuda")


def _step(setup: Setup, steps: int) -> Step:
    """Return the step with the network as it starts."""
    config = setup.config
    seed_everything(config.seed)
    model = start(config, setup.spec, setup.given, setup.device, setup.dtype, is_pretrained=setup.is_pretrained)
    log.info("%s learns %.1f million numbers on %s", config.arch, count_parameters(model) / 1e6, setup.device)
    step = make_step(
        config,
        model,
        setup.spec,
        setup.device,
        setup.dtype,
        steps,
        setup.is_pretrained,
        at_once=setup.at_once,
        team=setup.team,
    )
    if config.ema:
        averaged = build(setup.spec)
        averaged.load_state_dict(model.state_dict())
        step.averaged = ready(
            config, averaged, setup.spec, setup.device, setup.dtype, is_pretrained=setup.is_pretrained
        )
        step.averaged.requires_grad_(False)
    return step


def _one_epoch(
    run: _Run, batches: DataLoader[Any], val_batches: DataLoader[Any] | None, *, judge: bool
) -> dict[str, Any]:
    """Train an epoch, or what is left of it, and return its figures."""
    setup, step = run.setup, run.step
    if run.within is None:
        run.epoch, run.within = run.epoch + 1, Within(sums=[0.0] * len(step.losses))
    within = _train_epoch(run, batches)
    _share_statistics(step)
    if not within.learned:
        raise FlawmaskError(f"all steps of epoch {run.epoch} were skipped, the last since {run.bad}: lower --lr")
    values = [value / within.learned for value in within.sums]
    figures: dict[str, Any] = {
        "epoch": run.epoch,
        "train_loss": sum(values),
        **dict(zip(step.losses, values, strict=True)),
    }
    figures["val_loss"] = None
    if val_batches is not None:
        figures |= _validation_loss(run.kept, val_batches, step, setup.config.seed)
    if setup.validation is not None and (judge or setup.config.select_by in LARGER_IS_BETTER):
        figures |= _validation_figures(run, setup.validation)
    figures["learning_rate"] = step.optimizer.param_groups[0]["lr"]
    figures |= {
        "elapsed": run.clock.seconds,
        "seconds": within.seconds,
        "images_per_second": within.seen / within.seconds,
    }
    return figures | {"waiting": within.waiting / within.seconds, "skipped_steps": within.skipped}


def _train_epoch(run: _Run, batches: DataLoader[Any]) -> Within:
    """Show every training image once, or as many as a time budget allows, behind those that were shown already.

    Returns:
        What the epoch added up.
    """
    step, clock, stop, within = run.step, run.clock, run.stop, run.within
    assert within is not None
    step.model.train()
    order: Any = batches.batch_sampler
    order.epoch, order.done = run.epoch, within.batches
    sizes = [end - start for start, end in order.bounds[order.done :]]
    label = f"epoch {run.epoch}" + ("" if clock.budget else f"/{run.setup.config.epochs}")
    late: tuple[Tensor, int, list[Target]] | None = None
    heard = 0
    stop.waits = True
    asked = time.perf_counter()
    for batch, total in zip(track(loader.read(batches), label, total=len(sizes)), sizes, strict=False):
        begun = time.perf_counter()
        within.waiting += begun - asked
        within.seconds += begun - asked
        progress = clock.progress(step.taken, step.team)
        if progress >= 1 and within.seen:
            break
        _seed_step(run)
        figures = step(batch, total, progress, stop=bool(stop.asked))
        # Read a step later, so that a GPU has its next step before it is asked about the last.
        told, heard = max(heard, _add(run, late)), 0
        late = figures, total, batch[1]
        within.batches, within.seen = within.batches + 1, within.seen + total
        asked = time.perf_counter()
        within.seconds += asked - begun
        # Several processes act upon what the step before has told all of them, and so at the same step.
        is_told = bool(stop.asked) if step.team.count == 1 else told > 0
        if is_told or run.is_due():
            heard, late = _add(run, late), None
            run.save()
            asked = time.perf_counter()
        if is_told:
            _end(run)
    told = max(heard, _add(run, late))
    if stop.asked if step.team.count == 1 else told:
        run.save()
        _end(run)
    stop.waits = False
    return within


def _seed_step(run: _Run) -> None:
    """Let the next step draw what its number, and nothing else, says: so a training that goes on draws the same."""
    assert run.within is not None
    places = [run.setup.config.seed, run.epoch, run.setup.team.rank, run.within.batches]
    torch.manual_seed(int(np.random.SeedSequence(places).generate_state(1)[0]))


def _add(run: _Run, late: tuple[Tensor, int, list[Target]] | None) -> int:
    """Add a step's losses to the epoch's, and return how many processes had been told to stop when it began.

    Raises:
        FlawmaskError: too many steps in a row had a loss or a gradient that is not finite.
    """
    within = run.within
    assert within is not None
    if late is None:
        return 0
    figures, total, targets = late
    found = Figures.read(figures)
    if not found.not_finite:
        within.sums = [before + loss * total for before, loss in zip(within.sums, found.losses, strict=True)]
        within.learned, run.bad_in_a_row = within.learned + total, 0
        return found.told
    names = {image["id"]: run.setup.training.image_path(image) for image in run.setup.training.images}
    run.bad = f"{found.not_finite} on " + ", ".join(names[int(one["image_id"])].as_posix() for one in targets)
    within.skipped, run.bad_in_a_row = within.skipped + 1, run.bad_in_a_row + 1
    log.warning("a step was skipped: %s", run.bad)
    if run.bad_in_a_row >= MOST_BAD_STEPS:
        raise FlawmaskError(
            f"{run.bad_in_a_row} steps in a row were skipped, the last since {run.bad}: look at these images, or lower "
            "--lr; what was saved before is kept"
        )
    return found.told


def _end(run: _Run) -> NoReturn:
    """End the program, which was told to, after its state was saved."""
    log.warning("saved: %s goes on from here", _resume_command(run.setup.run_dir, run.part_of))
    end(run.stop.asked or signal.SIGTERM)


def _share_statistics(step: Step) -> None:
    """Average what each process' norms have seen: every process saw its own images."""
    if step.team.count == 1:
        return
    networks = [step.model] if step.averaged is None else [step.model, step.averaged]
    norms = [one for network in networks for one in network.modules() if isinstance(one, torch.nn.BatchNorm2d)]
    buffers = [one for norm in norms for one in norm.buffers() if one.is_floating_point()]
    step.team.add_up(buffers)
    for one in buffers:
        one.div_(step.team.count)


@torch.no_grad()
def _validation_loss(model: Any, batches: DataLoader[Any], step: Step, seed: int) -> dict[str, float | None]:
    """Return the loss on the validation split, on the same random regions each time and without a trace on training.

    None where it is not finite: training goes on, and JSON has no word for it.

    torchvision gives losses in training mode only; the norms alone are put into evaluation mode, so that they neither
    look at the batch nor learn from it.
    """
    total, seen = torch.zeros((), device=step.device), torch.zeros((), device=step.device)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    with torch.random.fork_rng(devices=[step.device] if step.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for images, targets in loader.read(batches):
            outlined = count_outlined(targets, step.device)
            for start in range(0, len(images), step.at_once):
                part = slice(start, start + step.at_once)
                weighed = step.weighed(model, (images[part], targets[part]), len(images), outlined)
                total += weighed.sum() * len(images)
            seen += len(images)
    step.team.add_up([total, seen])
    return {"val_loss": float(total / seen) if math.isfinite(total) else None}


def _validation_figures(run: _Run, split: CocoSplit) -> dict[str, float | None]:
    """Return mask AP and F1 at a confidence of 0.5 on the validation split."""
    team = run.setup.team
    mine = replace(split, images=tuple(team.share(split.images)))
    predictions = predict_split(run.for_judging(), run.setup.spec, mine)[0] if mine.images else []
    return quick_figures(split, team.gather(predictions))


def _begin(run: _Run) -> None:
    """Make the run folder, with what is known before anything is learned."""
    setup = run.setup
    begin_run(setup, run.part_of)
    write_training_images(setup.digests, setup.run_dir)
    draw_labels(setup.training, setup.spec, setup.run_dir / "labels.png")
    # The order of an epoch is its seed's: these are the batches that the first one began with.
    items = loader.SplitDataset(setup.training, setup.spec)
    order = loader.Order(items.shapes, setup.batch_size, seed=setup.config.seed)
    shown = loader.read(loader.make_loader(items, order, workers=0, pin=False))
    draw_train_batch(run.step.model, run.step.detector, shown, setup.training, setup.run_dir / "train_batch.jpg")


def _write(run: _Run) -> None:
    """Write what the last epoch leaves: checkpoints, curves, history.

    The state was saved before: of a run that was killed among these, all are written anew. The history comes last.
    """
    setup = run.setup
    facts = {name: run.history[name][-1] for name in ("epoch", "train_loss", "val_loss")}
    for name in ("best.pt", "last.pt") if run.best_epoch == run.epoch else ("last.pt",):
        checkpoint.save(setup.run_dir / name, run.kept, setup.spec, **facts)
    draw_curves(run.history, run.best_epoch, setup.config.select_by, setup.run_dir / "curves.png")
    write_json(setup.run_dir / HISTORY, run.history)


def _is_written(run: _Run) -> bool:
    """Return whether all that the last epoch leaves is there."""
    try:
        written: bool = read_json(run.setup.run_dir / HISTORY) == run.history
    except FlawmaskError:
        return False
    return written


def _compare(value: float | None, best: float, select_by: str) -> tuple[float, bool]:
    """Return the best value so far, smaller being better, and whether it is this one; an undefined one never is,
    unless there is no other."""
    cost = math.inf if value is None else -value if select_by in LARGER_IS_BETTER else value
    is_first = best == math.inf
    return (cost, True) if cost < best or is_first else (best, False)


def _log_epoch(figures: dict[str, Any], epochs: int | None, remaining: float, is_best: bool) -> None:
    """Log a row of a table that reads the same in a terminal, above the progress bar, and in a file.

    Args:
        figures: of the epoch.
        epochs: how many there are to be; None where nobody knows.
        remaining: seconds that the training will still take.
        is_best: whether it is the best so far.
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
