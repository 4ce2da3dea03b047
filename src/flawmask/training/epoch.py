"""One epoch of a training, and its evaluation on the validation split. The step itself is in `step.py`."""

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
from flawmask.training.step import PASSES_RELEASED, PendingFigures, Step, StepFigures

log = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 10
"""A training gives up after so many steps in a row whose loss or gradient is not finite."""


def one_epoch(
    run: Run, batches: DataLoader[Any], val_batches: DataLoader[Any] | None, *, evaluate: bool
) -> dict[str, Any]:
    """Train one epoch, or the rest of an interrupted one. Return its metrics: an entry of `history.json`.

    Args:
        run: the training; its `epoch` and `within` are updated.
        batches: of the training split.
        val_batches: of the validation split; None without one.
        evaluate: compute mask AP and F1 even if `select_by` does not need them.

    Raises:
        FlawmaskError: every step was skipped, or too many in a row were.
        SystemExit, KeyboardInterrupt: a signal came; the training was saved first.
    """
    setup, step = run.setup, run.step
    if run.within is None:
        run.epoch, run.within = run.epoch + 1, EpochProgress(sums=[0.0] * len(step.losses))
    within = train_epoch(run, batches)
    _average_norm_statistics(step)
    if not within.learned:
        raise FlawmaskError(
            f"all steps of epoch {run.epoch} were skipped, the last one because {run.skip_reason}: lower --lr"
        )
    values = [value / within.learned for value in within.sums]
    figures: dict[str, Any] = {
        "epoch": run.epoch,
        "train_loss": sum(values),
        **dict(zip(step.losses, values, strict=True)),
    }
    figures["val_loss"] = None
    if val_batches is not None:
        figures |= _with_memory(
            step, partial(validation_loss, run.evaluated_model, val_batches, step, setup.config.seed)
        )
    if setup.validation is not None and (evaluate or setup.config.select_by in LARGER_IS_BETTER):
        figures |= _with_memory(step, partial(_validation_metrics, run, setup.validation))
    figures["learning_rate"] = step.optimizer.param_groups[0]["lr"]
    figures |= {
        "elapsed": run.clock.seconds,
        "seconds": within.seconds,
        "images_per_second": within.seen / within.seconds,
    }
    return figures | {"waiting": within.waiting / within.seconds, "skipped_steps": within.skipped}


def _with_memory(step: Step, measure: Callable[[], dict[str, float | None]]) -> dict[str, float | None]:
    """Return the result of `measure`. If memory runs out, release the memory of recorded passes and try once more.

    With several processes there is no second try: the other processes may already wait for this one.
    """
    try:
        return measure()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or step.team.count > 1 or step.passes is None or not step.passes.release():
            raise
    torch.cuda.empty_cache()  # outside the except clause, which would keep the failed pass's tensors alive
    log.warning("%s", PASSES_RELEASED)
    return measure()


def train_epoch(run: Run, batches: DataLoader[Any]) -> EpochProgress:
    """Train on all images that the epoch has not shown yet, or on as many as the time budget allows.

    Returns:
        The progress of the epoch, with its sums.
    """
    step, clock, stop, within = run.step, run.clock, run.stop, run.within
    assert within is not None
    step.model.train()
    order: Any = batches.batch_sampler
    order.epoch, order.done = run.epoch, within.batches
    sizes = [end - start for start, end in order.bounds[order.done :]]
    label = f"epoch {run.epoch}" + ("" if clock.budget else f"/{run.setup.config.epochs}")
    pending_figures: tuple[PendingFigures, int, list[Target]] | None = None
    stop_votes_seen = 0
    stop.deferring = True
    wait_began = time.perf_counter()
    for batch, total in zip(track(loader.read(batches), label, total=len(sizes)), sizes, strict=False):
        step_began = time.perf_counter()
        within.waiting += step_began - wait_began
        within.seconds += step_began - wait_began
        progress = clock.progress(step.steps_taken, step.team)
        if progress >= 1 and within.seen:
            break
        _seed_step(run)
        figures = step(batch, progress, stop=bool(stop.received_signal))
        # A step's figures are read one step later. So a GPU has its next work before the host waits for its results.
        stop_votes, stop_votes_seen = max(stop_votes_seen, _add(run, pending_figures)), 0
        pending_figures = figures, total, batch.targets
        within.batches, within.seen = within.batches + 1, within.seen + total
        wait_began = time.perf_counter()
        within.seconds += wait_began - step_began
        # All processes know the votes of the previous step, so all of them stop after the same step.
        must_stop = bool(stop.received_signal) if step.team.count == 1 else stop_votes > 0
        if must_stop or run.is_save_due():
            stop_votes_seen, pending_figures = _add(run, pending_figures), None
            run.save()
            wait_began = time.perf_counter()
        if must_stop:
            run.end()
    stop_votes = max(stop_votes_seen, _add(run, pending_figures))
    if stop.received_signal if step.team.count == 1 else stop_votes:
        run.save()
        run.end()
    stop.deferring = False
    return within


def _seed_step(run: Run) -> None:
    """Seed the next step by its number alone, so that a resumed training draws the same random numbers."""
    assert run.within is not None
    entropy = [run.setup.config.seed, run.epoch, run.within.batches]
    torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))


def _add(run: Run, pending_figures: tuple[PendingFigures, int, list[Target]] | None) -> int:
    """Add a step's losses to the epoch's, and return its stop votes.

    Raises:
        FlawmaskError: too many steps in a row had a loss or a gradient that is not finite.
    """
    within = run.within
    assert within is not None
    if pending_figures is None:
        return 0
    figures, total, targets = pending_figures
    of_step = StepFigures.read(figures)
    if not of_step.not_finite:
        within.sums = [before + loss * total for before, loss in zip(within.sums, of_step.losses, strict=True)]
        within.learned, run.bad_in_a_row = within.learned + total, 0
        return of_step.stop_votes
    names = {image["id"]: run.setup.training.image_path(image) for image in run.setup.training.images}
    run.skip_reason = f"{of_step.not_finite} on " + ", ".join(names[int(one["image_id"])].as_posix() for one in targets)
    within.skipped, run.bad_in_a_row = within.skipped + 1, run.bad_in_a_row + 1
    log.warning("a step was skipped: %s", run.skip_reason)
    if run.bad_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise FlawmaskError(
            f"{run.bad_in_a_row} steps in a row were skipped, the last one because {run.skip_reason}: look at these "
            "images, or lower --lr; earlier saves are kept"
        )
    return of_step.stop_votes


def _average_norm_statistics(step: Step) -> None:
    """Average the BatchNorm statistics over the processes, because each process sees other images."""
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
    """Return the loss on the validation split. It samples the same random regions each time and leaves training as it
    was.

    The loss is None if it is not finite: training goes on, and JSON cannot hold it.

    torchvision computes losses in training mode only. So the model is in training mode, and only its BatchNorm layers
    are in evaluation mode: they neither use nor update batch statistics.
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


def _validation_metrics(run: Run, split: CocoSplit) -> dict[str, float | None]:
    """Return mask AP and F1 at a score threshold of 0.5 on the validation split."""
    team = run.setup.team
    shard = replace(split, images=tuple(team.shard(split.images)))
    predictions = predict_split(run.evaluation_backend(), shard)[0] if shard.images else []
    return quick_figures(split, team.gather(predictions))
