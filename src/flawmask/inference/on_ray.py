"""`predict --ray`: the parts of an archive are predicted by the workers of a Ray cluster (https://docs.ray.io).

Ray Data gives each worker a part: its number, and where its images begin in the list. The worker reads the images with
threads of its own, as one process does, and writes the part under the part's name. So if a worker dies and Ray gives
its part to another, the part is still there once. Images do not pass through Ray's object store.
"""

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flawmask.errors import FlawmaskError
from flawmask.inference.archive import Parts, prepare_rows, write_parts
from flawmask.inference.config import PredictConfig
from flawmask.progress import track

OBJECT_STORE = 100 * 2**20
"""Bytes of a local Ray's object store. Only numbers of parts pass through it."""


class Worker:
    """Predicts parts. Each has a network of its own, on a GPU of its own or on a core.

    Attributes:
        config: the settings of the stage.
        parts: the parts of the archive.
    """

    def __init__(self, config: PredictConfig, parts: Parts, folder: Path) -> None:
        """Load the network. `folder` is the one in which `predict` was started: paths are relative to it."""
        os.chdir(folder)
        self.config, self.parts = config, parts
        self._work = prepare_rows(config)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Predict some parts, from columns `part` and `start`, and return these columns."""
        starts = zip(batch["part"].tolist(), batch["start"].tolist(), strict=True)
        for _ in write_parts(self._work, self.parts, starts, self.config.inference_batch_size):
            pass
        return batch


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Connect with a Ray cluster while the block runs.

    Args:
        address: of the cluster; `local` starts one on this machine, which ends with the block.

    Raises:
        FlawmaskError: Ray is not installed, or the cluster cannot be reached.
    """
    try:
        import ray
    except ImportError:
        raise FlawmaskError("--ray needs Ray: pip install 'flawmask[ray]'") from None
    local: dict[str, Any] = {"include_dashboard": False, "object_store_memory": OBJECT_STORE}
    host, _, port = address.rpartition("/")[2].partition(":")
    try:
        if port:  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(logging_level=logging.WARNING, **({"address": address} if address != "local" else local))
    except (OSError, RuntimeError, ValueError) as error:
        raise FlawmaskError(
            f"--ray {address}: no cluster answers ({error}): give the address that `ray start --head` printed, or local"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def predict_on_ray(config: PredictConfig, parts: Parts, starts: Sequence[tuple[int, int]]) -> None:
    """Predict parts on the connected cluster: one worker for each of its GPUs or, without any, for each core.

    All machines need the same paths: of the images, of the checkpoint and of the folder for the results.

    Args:
        config: the settings of the stage.
        parts: the parts of the archive.
        starts: the number and the start of each part to predict.
    """
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    resources: Any = ray.cluster_resources  # it has no types
    there = resources()
    unit = "GPU" if there.get("GPU") else "CPU"
    workers = min(int(there[unit]), len(starts))
    items = [{"part": number, "start": start} for number, start in starts]
    predicted = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        Worker,
        fn_constructor_args=(config, parts, Path.cwd()),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
        num_cpus=1 if unit == "CPU" else None,
        num_gpus=1 if unit == "GPU" else None,
    )
    for _ in track(predicted.iter_rows(), "parts", total=len(items)):
        pass
