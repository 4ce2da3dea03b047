"""What TensorBoard or MLflow is told while a network learns. Both are extras, imported only where asked for."""

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
"""Takes the figures of an epoch as `history.json` has them, and pictures, (height, width, 3) uint8 RGB, by name."""

EXPERIMENT = "flawmask"
"""Under what MLflow lists the runs."""

ARTIFACTS = ("train_batch.jpg", "labels.png", "curves.png")
"""The pictures of a run folder that MLflow gets."""


def track_run(to: Log, run_dir: Path, settings: Mapping[str, Any]) -> AbstractContextManager[Record | None]:
    """Return a context that gives what takes an epoch's figures, or None where there is nothing to tell them to.

    Args:
        to: `none`; `tensorboard`, which writes `run_dir/tensorboard`, though not before the first epoch is told;
            or `mlflow`, which opens a run named as the folder at MLFLOW_TRACKING_URI or else where MLflow itself
            puts it, `mlflow.db` here. Its status is FINISHED at the context's end, and FAILED where an error ended it.
        run_dir: the run folder.
        settings: of the training, for MLflow's parameters.

    Raises:
        FlawmaskError: MLflow's store cannot be used. Once it is open, what it does not take is logged and training
            goes on.
    """
    if to == "tensorboard":
        return _tensorboard(run_dir)
    if to == "mlflow":
        return _mlflow(run_dir, settings)
    return nullcontext()


def _figures(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures that are there, but for the epoch, which is the step."""
    return {name: float(value) for name, value in figures.items() if value is not None and name != "epoch"}


@contextmanager
def _tensorboard(run_dir: Path) -> Iterator[Record]:
    from torch.utils.tensorboard import SummaryWriter

    writer: SummaryWriter | None = None

    def record(figures: Mapping[str, Any], pictures: Mapping[str, Picture]) -> None:
        """Write an epoch's figures and pictures, and let them be seen at once."""
        nonlocal writer
        # Not earlier: a writer makes its file at once, and the run folder is only there after the first epoch.
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
    """Return the heading under which TensorBoard shows the figure."""
    if "loss" in name:
        return "loss"
    speed = ("learning_rate", "elapsed", "seconds", "images_per_second", "waiting")
    return "training" if name in speed else "validation"


def _run_name(run_dir: Path) -> str:
    """Return the run folder's name; that of a fold, which is the same in every cross-validation, with its parent's."""
    return f"{run_dir.parent.name}/{run_dir.name}" if run_dir.name.startswith("fold_") else run_dir.name


@contextmanager
def _mlflow(run_dir: Path, settings: Mapping[str, Any]) -> Iterator[Record]:
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # MLflow looks when it is imported
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

    def tell(figures: Mapping[str, Any], pictures: Mapping[str, Picture]) -> None:
        """Send an epoch's figures, its pictures and the run's plots as they are now."""
        epoch, now = figures["epoch"], round(time.time() * 1000)
        client.log_batch(run, metrics=[Metric(name, value, now, epoch) for name, value in _figures(figures).items()])
        for name, picture in pictures.items():
            # MLflow takes no other letters in a name.
            client.log_image(run, picture, key=re.sub(r"[^A-Za-z0-9_\-. /]", "_", name), step=epoch)
        for name in ARTIFACTS:
            client.log_artifact(run, str(run_dir / name))

    def attempt(what: str, action: Callable[..., None], *given: Any) -> None:
        # A server may go away for an hour; the network that is learning must not go with it.
        try:
            action(*given)
        except (MlflowException, OSError) as error:
            log.warning("MLflow did not take %s: %s", what, str(error).splitlines()[0])

    status = "FAILED"
    try:
        yield lambda figures, pictures: attempt(f"epoch {figures['epoch']}", tell, figures, pictures)
        status = "FINISHED"
    finally:
        attempt("the run's end", client.set_terminated, run, status)
