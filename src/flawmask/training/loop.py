"""Training in full view: the epoch, and what is written after it. `step.py` has the step."""

import logging
import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.models.detection import MaskRCNN

from flawmask.coco import CocoSplit
from flawmask.distributed import Processes, processes
from flawmask.evaluation.evaluate import predict_split
from flawmask.evaluation.leak import write_training_images
from flawmask.evaluation.measure import quick_figures
from flawmask.files import write_json
from flawmask.inference.config import MAX_PROPOSALS
from flawmask.model import checkpoint
from flawmask.model.build import build, count_parameters
from flawmask.model.compute import for_inference
from flawmask.progress import track
from flawmask.runtime import (
    choose_device,
    choose_precision,
    keep_freed_memory,
    refuse_wrong_gradients,
    seed_everything,
)
from flawmask.settings import as_json
from flawmask.training import loader, resume
from flawmask.training.cache import pixel_cache
from flawmask.training.config import TrainConfig, seconds_in
from flawmask.training.curves import VALIDATION_FIGURES, draw_curves
from flawmask.training.losses import losses
from flawmask.training.pictures import draw_labels, draw_predictions, draw_train_batch
from flawmask.training.resume import State
from flawmask.training.setup import Setup, begin_run, check_run_folder, set_up
from flawmask.training.start import ready, start
from flawmask.training.step import LOSSES, Step, check_finite, count_outlined, make_step, shares
from flawmask.training.targets import Target
from flawmask.training.trackers import track_run

log = logging.getLogger(__name__)

Loss = dict[str, float]

LARGER_IS_BETTER = set(VALIDATION_FIGURES)

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


def train(config: TrainConfig) -> Trained:
    """Train a network on the `train` split of a COCO folder and write the run folder.

    The validation split, where there is one, gives `val_loss` and, with `select_by`, chooses the epoch.

    Raises:
        FlawmaskError: the data set or the weights cannot be used, the device is not there, the output folder holds
            something else, another process died, or the loss stopped being finite. Nothing is written, and nothing of
            an older run replaced, before the first epoch has gone well.
    """
    began = time.perf_counter()
    config, state = resume.load(config.resume) if config.resume else (config, None)
    if state is None:
        check_run_folder(config)
    device = choose_device(config.device)
    keep_freed_memory(device)
    refuse_wrong_gradients(device)
    dtype = choose_precision(config.precision, device)
    with processes(device) as team:
        return _train(set_up(config, state, team, device, dtype, began), state, began)


def _train(setup: Setup, state: State | None, began: float) -> Trained:
    """Take all epochs that are left to take."""
    config, team = setup.config, setup.team
    with ExitStack() as stack:
        batches = _loader(setup, setup.training, stack, shuffle=True)
        val_batches = _loader(setup, setup.validation, stack, shuffle=False) if setup.validation else None
        step = _step(setup, config.epochs * len(batches))
        run = _Run(setup, step, **_so_far(state))
        if state is not None:
            resume.restore(state, step)
        budget = seconds_in(config.time_budget) if config.time_budget else None
        clock = Clock(None if budget else config.epochs * len(batches), budget, state.seconds if state else 0.0, began)
        logging_to = config.log if team.is_main else "none"
        record = stack.enter_context(track_run(logging_to, setup.run_dir, as_json(config)))
        while not _is_done(run, clock):
            run.epoch += 1
            figures = _one_epoch(run, batches, val_batches, clock, judge=config.log != "none")
            is_best = run.add(figures)
            if team.is_main:
                _write(run, clock, is_best=is_best)
                if record is not None and setup.validation:
                    record(figures, draw_predictions(run.for_judging(), setup.spec, setup.validation))
                elif record is not None:
                    record(figures, {})
            _log_epoch(figures, None if budget else config.epochs, _remaining(run, clock), is_best)
    log.info("trained %s: best.pt is epoch %d by %s", setup.run_dir, run.best_epoch, config.select_by)
    return Trained(setup.run_dir, run.best_epoch, run.history)


@dataclass
class _Run:
    """What changes from epoch to epoch.

    Attributes:
        setup: what does not.
        step: the network and its optimiser.
        epoch: the last one begun, counted from 1.
        history: the content of `history.json`.
        best_epoch: the epoch that `best.pt` comes from.
        best_value: what it was chosen by, smaller being better.
    """

    setup: Setup
    step: Step
    epoch: int = 0
    history: dict[str, list[Any]] = field(default_factory=dict)
    best_epoch: int = 0
    best_value: float = math.inf

    @property
    def kept(self) -> MaskRCNN:
        """The network that is judged and written: the averaged one where there is one."""
        return self.step.averaged or self.step.model

    def for_judging(self) -> MaskRCNN:
        """Return a copy of it that predicts."""
        return for_inference(self.kept, self.setup.spec, self.setup.device, self.setup.dtype, MAX_PROPOSALS)

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
    names = ("epoch", "history", "best_epoch", "best_value")
    return {name: getattr(state, name) for name in names}


def _is_done(run: _Run, clock: Clock) -> bool:
    """Return whether the training has had its epochs, its time, or enough of not getting better."""
    config = run.setup.config
    if config.patience is not None and run.epoch - run.best_epoch >= config.patience:
        log.info("stopped: %s has not improved for %d epochs", config.select_by, config.patience)
        return True
    if clock.budget is None:
        return run.epoch >= config.epochs
    return run.epoch > 0 and clock.progress(run.step.taken, run.setup.team) >= 1


def _remaining(run: _Run, clock: Clock) -> float:
    """Return how many seconds the training will still take."""
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
        config, model, setup.device, setup.dtype, steps, setup.is_pretrained, at_once=setup.at_once, team=setup.team
    )
    if config.ema:
        averaged = build(setup.spec)
        averaged.load_state_dict(model.state_dict())
        step.averaged = ready(config, averaged, setup.device, setup.dtype, is_pretrained=setup.is_pretrained)
        step.averaged.requires_grad_(False)
    return step


def _one_epoch(
    run: _Run, batches: DataLoader[Any], val_batches: DataLoader[Any] | None, clock: Clock, *, judge: bool
) -> dict[str, Any]:
    """Train an epoch and return its figures."""
    setup, step = run.setup, run.step
    # Drawn anew for each epoch, and not from what the last one left: so a training that goes on draws the same.
    seeds = np.random.SeedSequence([setup.config.seed, run.epoch, setup.team.rank])
    torch.manual_seed(int(seeds.generate_state(1)[0]))
    order: Any = batches.batch_sampler
    order.epoch = run.epoch
    begun = time.perf_counter()
    of = "" if clock.budget else f"/{setup.config.epochs}"
    losses, waiting, seen = _train_epoch(step, batches, clock, f"epoch {run.epoch}{of}")
    seconds = time.perf_counter() - begun
    _share_statistics(step)
    figures: dict[str, Any] = {"epoch": run.epoch, **losses, "val_loss": None}
    if val_batches is not None:
        figures |= _validation_loss(run.kept, val_batches, step, setup.config.seed)
    if setup.validation is not None and (judge or setup.config.select_by in LARGER_IS_BETTER):
        figures |= _validation_figures(run, setup.validation)
    figures["learning_rate"] = step.optimizer.param_groups[0]["lr"]
    return figures | {"seconds": seconds, "images_per_second": seen / seconds, "waiting": waiting / seconds}


def _train_epoch(step: Step, batches: DataLoader[Any], clock: Clock, label: str) -> tuple[Loss, float, int]:
    """Show every training image once, or as many as a time budget allows.

    Returns:
        The losses, averaged over the images; the seconds spent waiting for images; and how many there were.
    """
    step.model.train()
    sums, waiting, seen = torch.zeros(len(LOSSES), dtype=torch.float64), 0.0, 0
    sizes = [end - start for start, end in _bounds(batches)]
    late: tuple[Tensor, int, list[Target]] | None = None
    asked = time.perf_counter()
    for batch, total in zip(track(loader.read(batches), label, total=len(sizes)), sizes, strict=False):
        waiting += time.perf_counter() - asked
        progress = clock.progress(step.taken, step.team)
        if progress >= 1 and seen:
            break
        figures = step(batch, total, progress)
        # Read a step later, so that a GPU has its next step before it is asked about the last.
        if late is not None:
            sums += _read(*late)
        late = figures, total, batch[1]
        seen += total
        asked = time.perf_counter()
    if late is not None:
        sums += _read(*late)
    values = [value / seen for value in sums.tolist()]
    return {"train_loss": sum(values), **dict(zip(LOSSES, values, strict=True))}, waiting, seen


def _bounds(batches: DataLoader[Any]) -> list[tuple[int, int]]:
    order: Any = batches.batch_sampler
    return list(order.bounds)


def _read(figures: Tensor, total: int, targets: list[Target]) -> Tensor:
    """Return a step's losses, times its images, after checking that they are numbers."""
    values = figures.tolist()
    check_finite(values, targets)
    return torch.tensor(values[:-1], dtype=torch.float64) * total


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
def _validation_loss(model: MaskRCNN, batches: DataLoader[Any], step: Step, seed: int) -> dict[str, float | None]:
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
                found = losses(model, *loader.to_device((images[part], targets[part]), step.device), step.roi_samples)
                weighed = torch.stack([found[name] for name in LOSSES]) * shares(targets[part], len(images), outlined)
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


def _write(run: _Run, clock: Clock, *, is_best: bool) -> None:
    """Write what an epoch leaves: checkpoints, history, curves, and what it takes to go on."""
    setup, step = run.setup, run.step
    if run.epoch == 1:
        begin_run(setup)
        write_training_images(setup.digests, setup.run_dir)
        draw_labels(setup.training, setup.spec, setup.run_dir / "labels.png")
        # The order of an epoch is its seed's: these are the batches that the first one began with.
        items = loader.SplitDataset(setup.training, setup.spec)
        order = loader.Order(items.shapes, setup.batch_size, seed=setup.config.seed)
        shown = loader.read(loader.make_loader(items, order, workers=0, pin=False))
        draw_train_batch(step.model, shown, setup.training, setup.run_dir / "train_batch.jpg")
    facts = {name: run.history[name][-1] for name in ("epoch", "train_loss", "val_loss")}
    for name in ("best.pt", "last.pt") if is_best else ("last.pt",):
        checkpoint.save(setup.run_dir / name, run.kept, setup.spec, **facts)
    write_json(setup.run_dir / "history.json", run.history)
    draw_curves(run.history, run.best_epoch, setup.config.select_by, setup.run_dir / "curves.png")
    state = State(
        spec=asdict(setup.spec),
        is_pretrained=setup.is_pretrained,
        epoch=run.epoch,
        seconds=clock.seconds,
        history=run.history,
        best_epoch=run.best_epoch,
        best_value=run.best_value,
        tensors=resume.tensors_of(step),
        at_once=step.at_once,
        batch_size=setup.batch_size,
        taken=step.taken,
    )
    resume.save(state, setup.run_dir)


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
