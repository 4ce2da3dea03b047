"""A training in progress: its state, its metrics so far, and the files of its run folder."""

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
from flawmask.training.resume import EpochProgress, State
from flawmask.training.setup import Setup, begin_run
from flawmask.training.step import Step
from flawmask.training.stop import Stop, end

log = logging.getLogger(__name__)

HISTORY = "history.json"

LARGER_IS_BETTER = set(VALIDATION_FIGURES)


@dataclass
class Run:
    """A training in progress: everything that changes from epoch to epoch.

    Attributes:
        setup: everything that does not change.
        step: the network and its optimiser.
        clock: the progress of the training.
        stop: the signals that end the training.
        part_of: the settings of the pipeline, if the training is a stage of one.
        callbacks: the objects to call at named moments.
        epoch: the current or last epoch, counted from 1.
        within: the progress within this epoch; None when it is done.
        history: the content of `history.json`.
        best_epoch: the epoch that `best.pt` comes from.
        best_value: the value that chose it; smaller is better.
        bad_in_a_row: the number of steps that were skipped in a row, up to the last step.
        skip_reason: why the last skipped step was skipped.
        is_begun: whether the run folder has been made.
        saved: the time of the last save, by `time.perf_counter`.
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
    skip_reason: str = ""
    is_begun: bool = False
    saved: float = field(default_factory=time.perf_counter)

    @property
    def evaluated_model(self) -> Any:
        """The network that is evaluated and saved: the moving average if there is one."""
        return self.step.averaged or self.step.model

    def is_save_due(self) -> bool:
        """Return whether `--save_every` asks for a save now. Only the main process saves."""
        if not self.setup.team.is_main:
            return False
        every = self.setup.config.save_every
        if every.isdecimal():
            return self.step.steps_taken % int(every) == 0
        return time.perf_counter() - self.saved >= seconds_in(every)

    def save(self) -> None:
        """Write the state to resume from. The first save also makes the run folder."""
        setup, step = self.setup, self.step
        if not setup.team.is_main:
            return
        if not self.is_begun:
            self._begin()
            self.is_begun = True
        state = State(
            spec=asdict(setup.spec),
            start=setup.start,
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
            taken=step.steps_taken,
        )
        resume.save(state, setup.run_dir)
        self.saved = time.perf_counter()

    def evaluation_backend(self) -> TorchBackend:
        """Return a backend that predicts with a copy of the evaluated network."""
        setup = self.setup
        network = for_inference(self.evaluated_model, setup.spec, setup.device, setup.dtype, MAX_PROPOSALS)
        set_score_floor(network, SCORE_FLOOR)
        return TorchBackend(network, setup.spec)

    def add(self, figures: Mapping[str, Any]) -> bool:
        """Add the metrics of an epoch to the history, and return whether it is the best so far.

        An epoch that a time budget cut to less than half is never the best: the loss of a few images says too little.
        """
        for name, value in figures.items():
            self.history.setdefault(name, []).append(value)
        select_by = self.setup.config.select_by
        if self.best_epoch and 2 * figures["seconds"] * figures["images_per_second"] < self.setup.images_per_epoch:
            return False
        self.best_value, is_best = _compare(figures[select_by], self.best_value, select_by)
        if is_best:
            self.best_epoch = self.epoch
        return is_best

    def end(self) -> NoReturn:
        """End the program after a signal. Call it after `save`."""
        log.warning("saved: %s continues from here", resume_command(self.setup.run_dir, self.part_of))
        end(self.stop.received_signal or signal.SIGTERM)

    def write(self) -> None:
        """Write the files of the last epoch: checkpoints, then the callbacks' files, then the history.

        The state has been saved before. If the process is killed between these files, a resumed training writes all of
        them again, because the history comes last.
        """
        setup = self.setup
        facts = {name: self.history[name][-1] for name in ("epoch", "train_loss", "val_loss")}
        for name in ("best.pt", "last.pt") if self.best_epoch == self.epoch else ("last.pt",):
            checkpoint.save(setup.run_dir / name, self.evaluated_model, setup.spec, **facts)
        for one in self.callbacks:
            one.on_write(self)
        write_json(setup.run_dir / HISTORY, self.history)

    def is_written(self) -> bool:
        """Return whether all files of the last epoch have been written."""
        try:
            written: bool = read_json(self.setup.run_dir / HISTORY) == self.history
        except FlawmaskError:
            return False
        return written

    def _begin(self) -> None:
        """Make the run folder, and write everything that is known before training."""
        setup = self.setup
        unmatched = not_loaded(self.step.model, setup.initial_weights) if setup.initial_weights.state else []
        begin_run(setup, self.part_of, unmatched)
        write_training_images(setup.training, setup.digests, setup.run_dir)
        for one in self.callbacks:
            one.on_begin(self)


def _compare(value: float | None, best: float, select_by: str) -> tuple[float, bool]:
    """Return the best value so far and whether it is the new one. Smaller is better.

    An undefined value (None) is the best only if there is no other.
    """
    cost = math.inf if value is None else -value if select_by in LARGER_IS_BETTER else value
    is_main_process = best == math.inf
    return (cost, True) if cost < best or is_main_process else (best, False)


def resume_command(run_dir: Path, part_of: Mapping[str, Any] | None) -> str:
    """Return the command that resumes a training."""
    return f"flawmask {'train' if part_of is None else 'run'} --resume {run_dir}"
