"""Several processes that work on one thing: started by torchrun or `accelerate launch`, on one machine or many.

Each process holds the whole network and takes a share of the images. The few times that they speak to each other are
the functions here; a process alone may call them too, and they do nothing.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from flawmask.errors import FlawmaskError
from flawmask.launch import world_size
from flawmask.runtime import is_out_of_memory, on_device

log = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE = timedelta(minutes=10)
"""How long a process waits for one that says nothing. One that dies is noticed at once: its connections close."""


@dataclass(frozen=True)
class Processes:
    """Those that work together, and which of them this is.

    Attributes:
        rank: this one's number, from 0.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> list[T]:
        """Return this process' share of the items: every one is in exactly one share."""
        return list(items[self.rank :: self.count])

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, in one exchange; all must be of one type and device."""
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with _peers_alive():
            dist.all_reduce(flat)
        for tensor, total in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def gather(self, items: list[T]) -> list[T]:
        """Return all processes' items in the order that `share` took them from, on every process."""
        if self.count == 1:
            return items
        parts: list[Any] = [None] * self.count
        with _peers_alive():
            dist.all_gather_object(parts, items)
        total = sum(len(part) for part in parts)
        return [parts[at % self.count][at // self.count] for at in range(total)]

    def from_main(self, make: Callable[[], T]) -> T:
        """Return on every process what the main one makes; the others do not make it, and wait."""
        if self.count == 1:
            return make()
        box: list[Any] = [make() if self.is_main else None]
        with _peers_alive():
            dist.broadcast_object_list(box, src=0)
        made: T = box[0]
        return made


@contextmanager
def processes(device: torch.device) -> Iterator[Processes]:
    """Give the processes that a launcher started together, or this one alone where there was none; with the device as
    CUDA's current one.

    Args:
        device: where the network runs: NCCL speaks between GPUs, gloo between all else.

    Raises:
        FlawmaskError: the others cannot be reached, or one of them died.
    """
    with on_device(device):
        if world_size() == 1:
            yield Processes()
            return
        with _started_together(device) as team:
            yield team


@contextmanager
def _started_together(device: torch.device) -> Iterator[Processes]:
    with _peers_alive():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    logger = logging.getLogger("flawmask")
    level = logger.level
    if dist.get_rank() > 0:  # one speaks for all
        logger.setLevel(logging.WARNING)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        logger.setLevel(level)
        dist.destroy_process_group()


@contextmanager
def _peers_alive() -> Iterator[None]:
    """Say in one line that another process has gone. What gloo, NCCL or the store said of it, whole, is a debug line.

    Raises:
        FlawmaskError: it has.
        RuntimeError: memory ran out.
    """
    try:
        yield
    except RuntimeError as error:  # what gloo, NCCL and the store raise alike
        if is_out_of_memory(error):
            raise
        log.debug("%s: %s", type(error).__name__, error)
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
        raise FlawmaskError(
            f"another process of this run has died or is out of reach ({reason}): "
            "start all of them again; a training goes on with --resume"
        ) from None
