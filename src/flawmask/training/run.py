"""A training as it goes: how far it is, what it came to so far, and the files of its run folder."""

import logging
import math
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from flawmask.errors import FlawmaskError
from flawmask.evaluation.leak import write_training_images
from flawmask.files import read_json, write_json
from flawmask.inference.config import MAX_PROPOSALS, SCORE_FLOOR
from flawmask.inference.torch_backend import TorchBackend
from flawmask.model import checkpoint
from flawmask.model.build import for_inference, set_score_floor
from flawmask.model.weights import not_loaded
from flawmask.training import resume
from flawmask.training.callbacks import Callback
from flawmask.training.clock import Clock
from flawmask.training.config import seconds_in
from flawmask.training.curves import VALIDATION_FIGURES
from flawmask.training.resume import State, EpochProgress
from flawmask.training.setup import Setup, begin_run
from flawmask.training.step import Step
from flawmask.training.stop import Stop, end

log = logging.getLogger(__name__)

HISTORY = "history.json"

LARGER_IS_BETTER = set(VALIDATION_FIGURES)


@dataclass
class Run:
    """A training that is going on: what changes from epoch to epoch.

    Attributes:
        setup: what does not.
        step: the network and its optimiser.
        clock: how far it is.
        stop: whether it was told to stop.
        part_of: the settings of the pipeline that it is a stage of.
        callbacks: what is told of it.
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
    callbacks: Sequence[Callback] = ()
    epoch: int = 0
    within: EpochProgress | None = None
    history: dict[str, list[Any]] = field(default_factory=dict)
    best_epoch: int = 0
    best_value: float = math.inf
    bad_in_a_row: int = 0
    bad: str = ""
    is_begun: bool = False
    saved: float = field(default_factory=time.perf_counter)

    @property
    def evaluated_model(self) -> Any:
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
            self._begin()
            self.is_begun = True
        state = State(
            spec=asdict(setup.spec),
            is_pretrained=setup.is_pretrained,
            epoch=self.epoch,
            within=asdict(self.within) if self.within else None,
            seconds=self.clock.seconds,
            before_steps=self.clock.before_steps,
            history=self.history,
            best_epoch=self.best_epoch,
            best_value=self.best_value,
            bad_in_a_row=self.bad_in_a_row,
            tensors=resume.tensors_of(step),
            at_once=step.micro_batch_size,
            batch_size=setup.batch_size,
            taken=step.taken,
        )
        resume.save(state, setup.run_dir)
        self.saved = time.perf_counter()

    def evaluation_backend(self) -> TorchBackend:
        """Return what predicts with a copy of it."""
        setup = self.setup
        network = for_inference(self.evaluated_model, setup.spec, setup.device, setup.dtype, MAX_PROPOSALS)
        set_score_floor(network, SCORE_FLOOR)
        return TorchBackend(network, setup.spec)

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

    def end(self) -> NoReturn:
        """End the program, which was told to, after its state was saved."""
        log.warning("saved: %s goes on from here", resume_command(self.setup.run_dir, self.part_of))
        end(self.stop.received_signal or signal.SIGTERM)

    def write(self) -> None:
        """Write what the last epoch leaves: checkpoints, what callbacks write, history.

        The state was saved before: of a run that was killed among these, all are written anew. The history comes last.
        """
        setup = self.setup
        facts = {name: self.history[name][-1] for name in ("epoch", "train_loss", "val_loss")}
        for name in ("best.pt", "last.pt") if self.best_epoch == self.epoch else ("last.pt",):
            checkpoint.save(setup.run_dir / name, self.evaluated_model, setup.spec, **facts)
        for one in self.callbacks:
            one.on_write(self)
        write_json(setup.run_dir / HISTORY, self.history)

    def is_written(self) -> bool:
        """Return whether all that the last epoch leaves is there."""
        try:
            written: bool = read_json(self.setup.run_dir / HISTORY) == self.history
        except FlawmaskError:
            return False
        return written

    def _begin(self) -> None:
        """Make the run folder, with what is known before anything is learned."""
        setup = self.setup
        left = not_loaded(self.step.model, setup.initial_weights) if setup.initial_weights.state else []
        begin_run(setup, self.part_of, left)
        write_training_images(setup.training, setup.digests, setup.run_dir)
        for one in self.callbacks:
            one.on_begin(self)


def _compare(value: float | None, best: float, select_by: str) -> tuple[float, bool]:
    """Return the best value so far, smaller being better, and whether it is this one; an undefined one never is,
    unless there is no other."""
    cost = math.inf if value is None else -value if select_by in LARGER_IS_BETTER else value
    is_first = best == math.inf
    return (cost, True) if cost < best or is_first else (best, False)


def resume_command(run_dir: Path, part_of: Mapping[str, Any] | None) -> str:
    """Return what is to be said to go on with a training."""
    return f"flawmask {'train' if part_of is None else 'run'} --resume {run_dir}"
