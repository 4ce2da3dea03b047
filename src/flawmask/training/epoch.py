"""An epoch of a training, and what is measured after it. `step.py` has the step."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from flawmask.coco import CocoSplit
from flawmask.errors import FlawmaskError
from flawmask.evaluation.evaluate import predict_split
from flawmask.evaluation.measure import quick_figures
from flawmask.model.targets import Target
from flawmask.progress import track
from flawmask.runtime import is_out_of_memory
from flawmask.training import loader
from flawmask.training.resume import EpochProgress
from flawmask.training.run import LARGER_IS_BETTER, Run
from flawmask.training.step import Figures, PendingFigures, Step

log = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 10
"""After so many steps in a row whose loss or gradient is not finite, a training gives up."""


def one_epoch(
    run: Run, batches: DataLoader[Any], val_batches: DataLoader[Any] | None, *, judge: bool
) -> dict[str, Any]:
    """Train an epoch, or what is left of it, and return its figures, those of an entry of `history.json`.

    Args:
        run: the training; its `epoch` and `within` go on.
        batches: of the training split.
        val_batches: of the validation split, where there is one.
        judge: whether mask AP and F1 are worked out though `select_by` does not ask for them.

    Raises:
        FlawmaskError: no step had a finite loss, or too many in a row had none.
        SystemExit, KeyboardInterrupt: it was told to stop, and was saved.
    """
    setup, step = run.setup, run.step
    if run.within is None:
        run.epoch, run.within = run.epoch + 1, EpochProgress(sums=[0.0] * len(step.losses))
    within = train_epoch(run, batches)
    _average_norm_statistics(step)
    if not within.learned:
        raise FlawmaskError(f"all steps of epoch {run.epoch} were skipped, the last since {run.skip_reason}: lower --lr")
    values = [value / within.learned for value in within.sums]
    figures: dict[str, Any] = {
        "epoch": run.epoch,
        "train_loss": sum(values),
        **dict(zip(step.losses, values, strict=True)),
    }
    figures["val_loss"] = None
    if val_batches is not None:
        figures |= _with_memory(step, partial(validation_loss, run.evaluated_model, val_batches, step, setup.config.seed))
    if setup.validation is not None and (judge or setup.config.select_by in LARGER_IS_BETTER):
        figures |= _with_memory(step, partial(_validation_figures, run, setup.validation))
    figures["learning_rate"] = step.optimizer.param_groups[0]["lr"]
    figures |= {
        "elapsed": run.clock.seconds,
        "seconds": within.seconds,
        "images_per_second": within.seen / within.seconds,
    }
    return figures | {"waiting": within.waiting / within.seconds, "skipped_steps": within.skipped}


def _with_memory(step: Step, measure: Callable[[], dict[str, float | None]]) -> dict[str, float | None]:
    """Return what is measured. Where memory runs out, that of recorded passes is given back, and it is tried again; but
    not by one of several processes, whose others may be waiting for it already."""
    try:
        return measure()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or step.team.count > 1 or step.passes is None or not step.passes.release():
            raise
    torch.cuda.empty_cache()  # outside the except clause, which would hold on to what had been allocated
    log.warning("out of memory: what was recorded is given back, training goes on, more slowly")
    return measure()


def train_epoch(run: Run, batches: DataLoader[Any]) -> EpochProgress:
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
    late: tuple[PendingFigures, int, list[Target]] | None = None
    heard = 0
    stop.deferring = True
    asked = time.perf_counter()
    for batch, total in zip(track(loader.read(batches), label, total=len(sizes)), sizes, strict=False):
        begun = time.perf_counter()
        within.waiting += begun - asked
        within.seconds += begun - asked
        progress = clock.progress(step.taken, step.team)
        if progress >= 1 and within.seen:
            break
        _seed_step(run)
        figures = step(batch, progress, stop=bool(stop.received_signal))
        # Read a step later, so that a GPU has its next step before it is asked about the last.
        told, heard = max(heard, _add(run, late)), 0
        late = figures, total, batch.targets
        within.batches, within.seen = within.batches + 1, within.seen + total
        asked = time.perf_counter()
        within.seconds += asked - begun
        # Several processes act upon what the step before has told all of them, and so at the same step.
        is_told = bool(stop.received_signal) if step.team.count == 1 else told > 0
        if is_told or run.is_due():
            heard, late = _add(run, late), None
            run.save()
            asked = time.perf_counter()
        if is_told:
            run.end()
    told = max(heard, _add(run, late))
    if stop.received_signal if step.team.count == 1 else told:
        run.save()
        run.end()
    stop.deferring = False
    return within


def _seed_step(run: Run) -> None:
    """Let the next step draw what its number, and nothing else, says: so a training that goes on draws the same."""
    assert run.within is not None
    places = [run.setup.config.seed, run.epoch, run.within.batches]
    torch.manual_seed(int(np.random.SeedSequence(places).generate_state(1)[0]))


def _add(run: Run, late: tuple[PendingFigures, int, list[Target]] | None) -> int:
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
        return found.stop_votes
    names = {image["id"]: run.setup.training.image_path(image) for image in run.setup.training.images}
    run.skip_reason = f"{found.not_finite} on " + ", ".join(names[int(one["image_id"])].as_posix() for one in targets)
    within.skipped, run.bad_in_a_row = within.skipped + 1, run.bad_in_a_row + 1
    log.warning("a step was skipped: %s", run.skip_reason)
    if run.bad_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise FlawmaskError(
            f"{run.bad_in_a_row} steps in a row were skipped, the last since {run.skip_reason}: look at these images, or lower "
            "--lr; what was saved before is kept"
        )
    return found.stop_votes


def _average_norm_statistics(step: Step) -> None:
    """Average what each process' norms have seen: every process saw its own images."""
    if step.team.count == 1:
        return
    networks = [step.model] if step.averaged is None else [step.model, step.averaged]
    norms = [one for network in networks for one in network.modules() if isinstance(one, torch.nn.BatchNorm2d)]
    buffers = [one for norm in norms for one in norm.buffers() if one.is_floating_point()]
    step.team.all_reduce_sum(buffers)
    for one in buffers:
        one.div_(step.team.count)


@torch.no_grad()
def validation_loss(model: Any, batches: DataLoader[Any], step: Step, seed: int) -> dict[str, float | None]:
    """Return the loss on the validation split, on the same random regions each time and without a trace on training.

    None where it is not finite: training goes on, and JSON has no word for it.

    torchvision gives losses in training mode only; the norms alone are put into evaluation mode, so that they neither
    look at the batch nor learn from it.
    """
    sums, counts = (torch.zeros(len(step.losses), device=step.device) for _ in range(2))
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    with torch.random.fork_rng(devices=[step.device] if step.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for batch in loader.read(batches):
            for part in batch.parts(step.micro_batch_size):
                losses, count = step.losses_of(model, part), step.counts_of(model, part)
                sums += losses * count.clamp(min=1)
                counts += count
    step.team.all_reduce_sum([sums, counts])
    total = (sums / counts.clamp(min=1)).sum()
    return {"val_loss": float(total) if math.isfinite(total) else None}


def _validation_figures(run: Run, split: CocoSplit) -> dict[str, float | None]:
    """Return mask AP and F1 at a confidence of 0.5 on the validation split."""
    team = run.setup.team
    mine = replace(split, images=tuple(team.shard(split.images)))
    predictions = predict_split(run.evaluation_backend(), mine)[0] if mine.images else []
    return quick_figures(split, team.gather(predictions))
