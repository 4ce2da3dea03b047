"""What a training needs to go on from its last saved step: `state.pt` in the run folder, and the one before it."""

import logging
from dataclasses import MISSING, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from flawmask.errors import FlawmaskError
from flawmask.files import read_json
from flawmask.model.spec import ModelSpec
from flawmask.model.weights import DamagedError, load_file, save_file
from flawmask.settings import from_json, require
from flawmask.training.config import KNOWN_WEIGHTS, TrainConfig
from flawmask.training.step import Step

log = logging.getLogger(__name__)

FRESH, NAME, BEFORE = "state.pt.new", "state.pt", "state_before.pt"
"""A state on its way to its name; the last one saved; and the one before, which is used where the last is damaged."""


@dataclass
class EpochProgress:
    """How far into an epoch a training is, and what the epoch has added up.

    Attributes:
        sums: of the losses, in the step's order, over the images learned from.
        batches: how many were taken.
        learned: how many images these are: those of a step that was skipped are not among them.
        skipped: steps whose loss or gradient was not finite.
        seen: images shown.
        waiting: seconds spent waiting for images.
        seconds: seconds of all of it.
    """

    sums: list[float]
    batches: int = 0
    learned: int = 0
    skipped: int = 0
    seen: int = 0
    waiting: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class State:
    """A training between two steps.

    Attributes:
        spec: the network's.
        is_pretrained: whether it started from weights.
        epoch: the last one begun, counted from 1.
        within: how far into it, as the fields of `EpochProgress`; None where it is done and judged.
        seconds: how long the training has taken.
        history: the content of `history.json`.
        best_epoch: the epoch that `best.pt` comes from.
        best_value: what it was chosen by, smaller being better.
        bad_in_a_row: how many of the last steps were skipped.
        tensors: the network, its moving average (or None), the optimiser and the scaler.
        at_once: images that pass through the network together.
        batch_size: images that a step learns from, over all processes, of which there may be others now.
        taken: steps taken.
        before_steps: seconds of the training before its first step; 0 in states of older versions.
    """

    spec: dict[str, Any]
    is_pretrained: bool
    epoch: int
    within: dict[str, Any] | None
    seconds: float
    history: dict[str, list[Any]]
    best_epoch: int
    best_value: float
    bad_in_a_row: int
    tensors: dict[str, Any]
    at_once: int
    batch_size: int
    taken: int
    before_steps: float = 0.0

    @property
    def model_spec(self) -> ModelSpec:
        """The network's spec."""
        return ModelSpec(**self.spec)


def tensors_of(step: Step) -> dict[str, Any]:
    """Return everything of a step that the next one depends on."""
    return {
        "model": step.model.state_dict(),
        "averaged": step.averaged.state_dict() if step.averaged is not None else None,
        "optimizer": step.optimizer.state_dict(),
        "scaler": step.scaler.state_dict(),
    }


def restore(state: State, step: Step) -> None:
    """Put a step back to where it was."""
    found = state.tensors
    step.model.load_state_dict(found["model"])
    if step.averaged is not None:
        step.averaged.load_state_dict(found["averaged"])
    if len(found["optimizer"]["param_groups"]) == 1:
        # Begun by an older version, which let norms and biases decay too: it goes on like that.
        learning = [one for one in step.model.parameters() if one.requires_grad]
        step.optimizer.param_groups = [{**step.optimizer.param_groups[0], "params": learning}]
    step.optimizer.load_state_dict(found["optimizer"])
    step.scaler.load_state_dict(found["scaler"])
    step.taken = state.taken


def save(state: State, run_dir: Path) -> None:
    """Write the state into the run folder, whole or not at all; the last one stays as the one before.

    Only once the new one can be read does the last one step aside: at any moment there is one that is whole.
    """
    save_file(run_dir / FRESH, {one.name: getattr(state, one.name) for one in fields(State)})
    finish_save(run_dir)


def finish_save(run_dir: Path) -> None:
    """Give the files of the last saves their names, also where a process was killed before it had."""
    fresh, path = run_dir / FRESH, run_dir / NAME
    if fresh.is_file():
        if path.is_file():
            path.replace(run_dir / BEFORE)
        fresh.replace(path)


def has_state(run_dir: Path) -> bool:
    """Return whether there is anything to go on from in a run's folder."""
    return any((run_dir / name).is_file() for name in (FRESH, NAME, BEFORE))


def newest(run_dir: Path) -> str | None:
    """Return the name of the last state that can be read; None where the run was not saved yet.

    Raises:
        FlawmaskError: there is none, or none that can be read.
    """
    there = [name for name in (FRESH, NAME, BEFORE) if (run_dir / name).is_file()]
    for name, before in pairwise(there):
        try:
            _read(run_dir / name)
            return name
        except DamagedError as error:
            log.warning("%s: going on from %s, saved before it", error, before)
    if there:
        return there[-1]
    # The first state is saved before anything else is: where there is more, somebody has removed it.
    require(not (run_dir / "last.pt").exists(), f"--resume {run_dir}: there is no {NAME} to go on from")
    return None


def load(run_dir: Path, name: str | None) -> tuple[TrainConfig, State | None]:
    """Return the settings of a run and the state of that name; without one, the run begins once more.

    Raises:
        FlawmaskError: the state cannot be read.
    """
    if name is None:
        log.info("%s was not saved before it ended: it begins once more", run_dir)
        return replace(settings_of(run_dir), overwrite=True), None
    return settings_of(run_dir), _read(run_dir / name)


def _read(path: Path) -> State:
    content = load_file(path)
    names = {one.name for one in fields(State)}
    needed = {one.name for one in fields(State) if one.default is MISSING}
    if not isinstance(content, dict) or not needed <= set(content) <= names:
        raise FlawmaskError(f"{path} was written by another version of Flawmask: start the training anew")
    return State(**content)


def settings_of(run_dir: Path) -> TrainConfig:
    """Return the settings that a run was started with, its folder being where it lies now.

    Raises:
        FlawmaskError: the folder holds no run, or `config.json` says something else.
    """
    found = _config(run_dir).get("settings")
    known = {field.name for field in fields(TrainConfig)}
    if not isinstance(found, dict) or not {"dataset_dir", "weights"} <= set(found) <= known:
        path = run_dir / "config.json"
        raise FlawmaskError(f"{path} was written by another version of Flawmask: start the training anew")
    changed = {"output_dir": run_dir.as_posix(), "resume": None}
    # The weights that it began with are in its state: their file may have gone.
    if found["weights"] not in KNOWN_WEIGHTS and not Path(found["weights"]).is_file() and has_state(run_dir):
        changed["weights"] = "none"
    return from_json(TrainConfig, {**found, **changed})


def part_of(run_dir: Path) -> dict[str, Any] | None:
    """Return the settings of the pipeline that a run is a stage of; None where it is none."""
    found = _config(run_dir).get("part_of")
    return found if isinstance(found, dict) else None


def _config(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "config.json"
    require(path.is_file(), f"--resume {run_dir}: there is no config.json: it is no run")
    content = read_json(path)
    return content if isinstance(content, dict) else {}
