"""Experiment trackers: TensorBoard and MLflow. Both are extras and are imported only when `--log` names them."""

import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from flawmask.draw import Picture
from flawmask.errors import FlawmaskError
from flawmask.training.config import Log

log = logging.getLogger(__name__)

Record = Callable[[Mapping[str, Any], Mapping[str, Picture]], None]
"""A function that takes an epoch's metrics as in `history.json`, and pictures by name, (height, width, 3) uint8 RGB."""

EXPERIMENT = "flawmask"
"""The MLflow experiment that lists the runs."""

ARTIFACTS = ("train_batch.jpg", "labels.png", "curves.png")
"""The pictures of a run folder that are uploaded to MLflow."""


def track_run(to: Log, run_dir: Path, settings: Mapping[str, Any]) -> AbstractContextManager[Record | None]:
    """Return a context that yields a function to record an epoch with, or None without a tracker.

    `tensorboard` writes `run_dir/tensorboard` from the first recorded epoch on. `mlflow` opens a run with the name of
    the folder, at MLFLOW_TRACKING_URI or else in MLflow's default place, `mlflow.db` in the current folder. That run
    ends as FINISHED, or as FAILED if an error ends the context.

    Args:
        to: `none`, `tensorboard` or `mlflow`.
        run_dir: the run folder.
        settings: of the training; they become MLflow's parameters.

    Raises:
        FlawmaskError: MLflow's store cannot be opened. If MLflow fails later, that is only logged.
    """
    if to == "tensorboard":
        return _tensorboard(run_dir)
    if to == "mlflow":
        return _mlflow(run_dir, settings)
    return nullcontext()


def _figures(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics that have a value, without the epoch, which trackers take as the step."""
    return {name: float(value) for name, value in figures.items() if value is not None and name != "epoch"}


@contextmanager
def _tensorboard(run_dir: Path) -> Iterator[Record]:
    from torch.utils.tensorboard import SummaryWriter

    writer: SummaryWriter | None = None

    def record(figures: Mapping[str, Any], pictures: Mapping[str, Picture]) -> None:
        """Write an epoch's metrics and pictures, and flush them."""
        nonlocal writer
        # Not earlier: the writer makes its file immediately, but the run folder exists only after the first epoch.
        writer = writer or SummaryWriter(str(run_dir / "tensorboard"))
        for name, value in _figures(figures).items():
            writer.add_scalar(f"{_group(name)}/{name}", value, figures["epoch"])
        for name, picture in pictures.items():
            writer.add_image(f"predictions/{name}", picture, figures["epoch"], dataformats="HWC")
        writer.flush()

    try:
        yield record
    finally:
        if writer is not None:
            writer.close()


def _group(name: str) -> str:
    """Return the heading under which TensorBoard shows the metric."""
    if "loss" in name:
        return "loss"
    speed = ("learning_rate", "elapsed", "seconds", "images_per_second", "waiting")
    return "training" if name in speed else "validation"


def _run_name(run_dir: Path) -> str:
    """Return the run folder's name. Folds have the same names in every cross-validation, so their parent's is added."""
    return f"{run_dir.parent.name}/{run_dir.name}" if run_dir.name.startswith("fold_") else run_dir.name


@contextmanager
def _mlflow(run_dir: Path, settings: Mapping[str, Any]) -> Iterator[Record]:
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # MLflow reads this when it is imported
    from mlflow import MlflowClient, get_tracking_uri
    from mlflow.entities import Metric, Param
    from mlflow.exceptions import MlflowException

    try:
        client = MlflowClient()
        known = client.get_experiment_by_name(EXPERIMENT)
        experiment = known.experiment_id if known else client.create_experiment(EXPERIMENT)
        run = client.create_run(experiment, run_name=_run_name(run_dir)).info.run_id
        client.log_batch(run, params=[Param(name, str(value)) for name, value in settings.items()])
    except (MlflowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise FlawmaskError(
            f"MLflow's {get_tracking_uri()} cannot be used: {reason}; set MLFLOW_TRACKING_URI to another"
        ) from None

    def send(figures: Mapping[str, Any], pictures: Mapping[str, Picture]) -> None:
        """Send an epoch's metrics and pictures, and the run's current plots."""
        epoch, now = figures["epoch"], round(time.time() * 1000)
        client.log_batch(run, metrics=[Metric(name, value, now, epoch) for name, value in _figures(figures).items()])
        for name, picture in pictures.items():
            # MLflow accepts no other characters in a name.
            client.log_image(run, picture, key=re.sub(r"[^A-Za-z0-9_\-. /]", "_", name), step=epoch)
        for name in ARTIFACTS:
            client.log_artifact(run, str(run_dir / name))

    def attempt(what: str, action: Callable[..., None], *inputs: Any) -> None:
        # A server may be down for an hour; the training must survive that.
        try:
            action(*inputs)
        except (MlflowException, OSError) as error:
            log.warning("MLflow did not take %s: %s", what, str(error).splitlines()[0])

    status = "FAILED"
    try:
        yield lambda figures, pictures: attempt(f"epoch {figures['epoch']}", send, figures, pictures)
        status = "FINISHED"
    finally:
        attempt("the run's end", client.set_terminated, run, status)
