"""Data-parallel processes, started by torchrun or `accelerate launch` on one machine or on several.

Each process holds the whole network and takes a shard of the images. All communication between them is in this module.
A single process may call the same functions; then they exchange nothing, and PyTorch is not needed.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from flawmask.errors import FlawmaskError
from flawmask.launch import world_size

if TYPE_CHECKING:
    import torch
    from torch import Tensor

log = logging.getLogger(__name__)

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)
"""How long a process waits for another that does not answer. A process that dies is noticed at once, because its
connections close."""


@dataclass(frozen=True)
class Processes:
    """The processes that train together, as one of them sees them.

    Attributes:
        rank: the number of this process, from 0.
        count: the number of processes.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the main process, the one that writes files."""
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> list[T]:
        """Return this process' shard of the items. Every item is in exactly one shard."""
        return list(items[self.rank :: self.count])

    def all_reduce_sum(self, tensors: "Sequence[Tensor]") -> None:
        """Replace each tensor by its sum over the processes, in one all-reduce.

        Args:
            tensors: all of one dtype and on one device.
        """
        if self.count == 1 or not tensors:
            return
        import torch
        from torch import distributed as dist

        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with _peers_alive():
            dist.all_reduce(flat)
        for tensor, total in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def gather(self, items: list[T]) -> list[T]:
        """Return the items of all processes, on every process, in the order that they had before `shard`."""
        if self.count == 1:
            return items
        from torch import distributed as dist

        shards: list[Any] = [None] * self.count
        with _peers_alive():
            dist.all_gather_object(shards, items)
        total = sum(len(shard) for shard in shards)
        return [shards[at % self.count][at // self.count] for at in range(total)]

    def from_main(self, make: Callable[[], T]) -> T:
        """Call `make` in the main process alone, and return its result on every process. The others wait for it."""
        if self.count == 1:
            return make()
        from torch import distributed as dist

        objects: list[Any] = [make() if self.is_main else None]
        with _peers_alive():
            dist.broadcast_object_list(objects, src=0)
        result: T = objects[0]
        return result


@contextmanager
def processes(device: "torch.device") -> Iterator[Processes]:
    """Connect the processes that a launcher started together, and make the device CUDA's current one.

    Without a launcher, the result is this process alone.

    Args:
        device: where the network runs. GPUs communicate through NCCL, other devices through gloo.

    Raises:
        FlawmaskError: another process cannot be reached, or has died.
    """
    from flawmask.runtime import on_device

    with on_device(device):
        if world_size() == 1:
            yield Processes()
            return
        with _started_together(device) as team:
            yield team


@contextmanager
def _started_together(device: "torch.device") -> Iterator[Processes]:
    from torch import distributed as dist

    with _peers_alive():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    logger = logging.getLogger("flawmask")
    level = logger.level
    if dist.get_rank() > 0:  # the main process logs for all
        logger.setLevel(logging.WARNING)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        logger.setLevel(level)
        dist.destroy_process_group()


@contextmanager
def _peers_alive() -> Iterator[None]:
    """Turn the error of a lost connection into one line. The full text from gloo, NCCL or the store is logged as debug.

    Raises:
        FlawmaskError: another process has died or cannot be reached.
        RuntimeError: memory ran out.
    """
    try:
        yield
    except RuntimeError as error:  # gloo, NCCL and the store all raise it
        from flawmask.runtime import is_out_of_memory

        if is_out_of_memory(error):
            raise
        log.debug("%s: %s", type(error).__name__, error)
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
        raise FlawmaskError(
            f"another process of this run has died or is out of reach ({reason}): "
            "start all of them again; --resume continues a training"
        ) from None
