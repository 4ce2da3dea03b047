"""Saves and loads the state of a training, to resume it: `state.pt` in the run folder, and the state before that."""

import logging
from dataclasses import MISSING, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from flawmask.errors import FlawmaskError
from flawmask.files import read_json
from flawmask.model.architecture import Start
from flawmask.model.spec import ModelSpec
from flawmask.model.weights import DamagedError, load_file, save_file
from flawmask.settings import from_json, require
from flawmask.training.config import KNOWN_WEIGHTS, TrainConfig
from flawmask.training.step import Step

log = logging.getLogger(__name__)

FRESH, NAME, BEFORE = "state.pt.new", "state.pt", "state_before.pt"
"""Three files: a new state before it is renamed, the last saved state, and the state before that. The latter is used if
the last one is damaged."""


@dataclass
class EpochProgress:
    """The progress within an epoch, and its sums so far. The names of the fields are keys of `state.pt`.

    Attributes:
        sums: of each loss, in the step's order, over the images learned from.
        batches: the number of batches so far.
        learned: the number of images learned from; those of skipped steps do not count.
        skipped: the number of steps that were skipped because their loss or gradient was not finite.
        seen: the number of images shown, those of skipped steps included.
        waiting: seconds spent waiting for images.
        seconds: seconds of the epoch, waiting included.
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
    """The state of a training between two steps. The names of the fields are the keys of `state.pt`.

    Attributes:
        spec: of the network.
        start: what the training began with, see `architecture.Start`.
        epoch: the current or last epoch, counted from 1.
        within: the progress within this epoch, as the fields of `EpochProgress`; None after its evaluation.
        seconds: the time that the training has taken.
        history: the content of `history.json`.
        best_epoch: the epoch that `best.pt` comes from.
        best_value: the value that chose it; smaller is better.
        bad_in_a_row: the number of steps that were skipped in a row, up to the last step.
        tensors: the network, its moving average (or None), the optimiser and the scaler.
        at_once: the micro-batch size.
        batch_size: images per step, over all processes. A resumed training keeps it with another number of processes.
        taken: the number of steps so far.
        before_steps: the seconds before the first step; 0 in states of older versions.
    """

    spec: dict[str, Any]
    start: Start
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
    """Restore the network, the optimiser and the scaler of a step from the state."""
    tensors = state.tensors
    step.model.load_state_dict(tensors["model"])
    if step.averaged is not None:
        step.averaged.load_state_dict(tensors["averaged"])
    step.optimizer.load_state_dict(tensors["optimizer"])
    step.scaler.load_state_dict(tensors["scaler"])
    step.steps_taken = state.taken


def save(state: State, run_dir: Path) -> None:
    """Write the state into the run folder, whole or not at all. The previous state is kept as a second file.

    The previous state is renamed only after the new one has been written. So there is a complete state at any moment.
    """
    save_file(run_dir / FRESH, {one.name: getattr(state, one.name) for one in fields(State)})
    finish_save(run_dir)


def finish_save(run_dir: Path) -> None:
    """Rename the files of the last save. This also completes a save during which the process was killed."""
    fresh, path = run_dir / FRESH, run_dir / NAME
    if fresh.is_file():
        if path.is_file():
            path.replace(run_dir / BEFORE)
        fresh.replace(path)


def has_state(run_dir: Path) -> bool:
    """Return whether a run folder holds a state to resume from."""
    return any((run_dir / name).is_file() for name in (FRESH, NAME, BEFORE))


def newest(run_dir: Path) -> str | None:
    """Return the file name of the newest readable state. None if the run ended before it was first saved.

    Raises:
        FlawmaskError: the state has been removed.
    """
    existing = [name for name in (FRESH, NAME, BEFORE) if (run_dir / name).is_file()]
    for name, before in pairwise(existing):
        try:
            _read(run_dir / name)
            return name
        except DamagedError as error:
            log.warning("%s: continuing from %s, which was saved before it", error, before)
    if existing:
        return existing[-1]
    # The state is the first file of a run. If there are other files, somebody has removed the state.
    require(not (run_dir / "last.pt").exists(), f"--resume {run_dir}: there is no {NAME} to resume from")
    return None


def load(run_dir: Path, name: str | None) -> tuple[TrainConfig, State | None]:
    """Return the settings of a run, and its state from the named file. Without a name, the run starts again.

    Raises:
        FlawmaskError: the state cannot be read.
    """
    if name is None:
        log.info("%s ended before its first save: it starts again", run_dir)
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
    """Return the settings that a run was started with. Its output folder is where the run is now.

    Raises:
        FlawmaskError: the folder holds no run, or `config.json` does not fit this version.
    """
    settings = _config(run_dir).get("settings")
    known = {field.name for field in fields(TrainConfig)}
    if not isinstance(settings, dict) or not {"dataset_dir", "weights"} <= set(settings) <= known:
        path = run_dir / "config.json"
        raise FlawmaskError(f"{path} was written by another version of Flawmask: start the training anew")
    changed = {"output_dir": run_dir.as_posix(), "resume": None}
    # The file of the initial weights may be gone. It is not needed, because the state holds the weights.
    if settings["weights"] not in KNOWN_WEIGHTS and not Path(settings["weights"]).is_file() and has_state(run_dir):
        changed["weights"] = "none"
    return from_json(TrainConfig, {**settings, **changed})


def part_of(run_dir: Path) -> dict[str, Any] | None:
    """Return the settings of the pipeline that a run belongs to; None for a run of `train` alone."""
    settings = _config(run_dir).get("part_of")
    return settings if isinstance(settings, dict) else None


def _config(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "config.json"
    require(path.is_file(), f"--resume {run_dir}: it is not a run folder, because it has no config.json")
    content = read_json(path)
    return content if isinstance(content, dict) else {}
