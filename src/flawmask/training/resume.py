"""What a training needs to go on after its last whole epoch: `state.pt` in the run folder."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from flawmask.errors import FlawmaskError
from flawmask.files import read_json, whole_file
from flawmask.model.build import ModelSpec
from flawmask.model.weights import load_file
from flawmask.settings import require
from flawmask.training.config import KNOWN_WEIGHTS, TrainConfig
from flawmask.training.step import Step

NAME = "state.pt"


@dataclass(frozen=True)
class State:
    """A training after a whole epoch.

    Attributes:
        spec: the network's.
        is_pretrained: whether it started from weights.
        epoch: the last whole one, counted from 1.
        seconds: how long the training has taken.
        history: the content of `history.json`.
        best_epoch: the epoch that `best.pt` comes from.
        best_value: what it was chosen by, smaller being better.
        tensors: the network, its moving average (or None), the optimiser and the scaler.
        at_once: images that pass through the network together.
        batch_size: images that a step learns from, over all processes, of which there may be others now.
        taken: steps taken.
    """

    spec: dict[str, Any]
    is_pretrained: bool
    epoch: int
    seconds: float
    history: dict[str, list[Any]]
    best_epoch: int
    best_value: float
    tensors: dict[str, Any]
    at_once: int
    batch_size: int
    taken: int

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
    step.optimizer.load_state_dict(found["optimizer"])
    step.scaler.load_state_dict(found["scaler"])
    step.taken = state.taken


def save(state: State, run_dir: Path) -> None:
    """Write the state into the run folder, whole or not at all."""
    with whole_file(run_dir / NAME) as temporary:
        torch.save({field.name: getattr(state, field.name) for field in fields(State)}, temporary)


def load(run_dir: Path) -> tuple[TrainConfig, State]:
    """Return the settings and the state of a run.

    Raises:
        FlawmaskError: the folder holds no run, or one that cannot go on.
    """
    require(
        (run_dir / NAME).is_file(), f"--resume {run_dir}: there is no {NAME}: it is no run, or did not get far enough"
    )
    content = load_file(run_dir / NAME)
    names = {field.name for field in fields(State)}
    if not isinstance(content, dict) or set(content) != names:
        raise FlawmaskError(f"{run_dir / NAME} was written by another version of Flawmask: start the training anew")
    return settings_of(run_dir), State(**content)


def settings_of(run_dir: Path) -> TrainConfig:
    """Return the settings that a run was started with, its folder being where it lies now.

    Raises:
        FlawmaskError: `config.json` is missing or says something else.
    """
    path = run_dir / "config.json"
    content = read_json(path)
    found = content.get("settings") if isinstance(content, dict) else None
    known = {field.name for field in fields(TrainConfig)}
    if not isinstance(found, dict) or not {"dataset_dir", "weights"} <= set(found) <= known:
        raise FlawmaskError(f"{path} was written by another version of Flawmask: start the training anew")
    sizes, weights = found.get("anchor_sizes"), found["weights"]
    changed = {
        "dataset_dir": Path(found["dataset_dir"]),
        "output_dir": run_dir,
        "resume": None,
        "anchor_sizes": tuple(sizes) if sizes else None,
        # What it began with is in its state by now; the file may have gone.
        "weights": weights if weights in KNOWN_WEIGHTS or Path(weights).is_file() else "none",
    }
    return TrainConfig(**{**found, **changed})
