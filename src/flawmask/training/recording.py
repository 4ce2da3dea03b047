"""Passes of an R-CNN through a GPU, recorded when they come again and replayed from then on.

A pass is a few thousand small pieces of work, and Python needs longer to ask for one of them than a GPU needs to do it.
A CUDA graph is the list of these pieces, which the GPU goes through by itself. It holds for one shape of the batch
alone, so a shape that comes a second time is recorded; shapes that come once are not worth it. What is recorded is what
`RcnnBatch` does without looking at its results: from pixels to region proposals, and from drawn regions to gradients.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from flawmask.model.rcnn_batch import AnchorSamples, Candidates, Drawn, Instances, RcnnBatch, Regions, Room, upload
from flawmask.runtime import is_out_of_memory
from flawmask.training.loader import Batch

log = logging.getLogger(__name__)

MOST_RECORDED = 32
"""So many shapes of a batch are recorded; further ones are computed as they come."""

FEWEST_SLOTS = 16
"""Numbers of slots are rounded up to powers of two from here on, so that few shapes come."""

Key = tuple[int, int, int, Room]
"""Images of a batch, their padded height and width, and how many slots there are for regions and masks."""


class Passes:
    """Adds up the gradients of one network's passes, recorded or not."""

    def __init__(
        self,
        model: Any,
        losses: tuple[str, ...],
        roi_samples: int | None,
        scaler: torch.amp.GradScaler,
        *,
        is_recording: bool,
    ) -> None:
        """Take the network; nothing is recorded yet.

        Args:
            model: an R-CNN in training mode, on its device.
            losses: what its losses are called, in their order.
            roi_samples: regions per image on which the heads learn; None follows the number of instances.
            scaler: what the loss is multiplied by before its gradient is taken.
            is_recording: whether passes are recorded; only CUDA can.
        """
        self.network = RcnnBatch(model, roi_samples)
        self.losses, self.scaler, self.is_recording = losses, scaler, is_recording
        self._seen: Counter[Key] = Counter()
        self._recorded: dict[Key, _Recorded] = {}
        self._pool: Any = None

    def __call__(self, batch: Batch, weights: Tensor) -> Tensor:
        """Add the gradient of a micro-batch's weighed losses to the parameters' and return these losses.

        Args:
            batch: on the CPU.
            weights: (L,) what each loss is multiplied by, on the device.
        """
        network = self.network
        device = network.device
        instances = Instances.of(batch.targets, device)
        anchors, _ = network.anchors(batch.pixels.shape[1:3])
        samples = AnchorSamples.draw(network.model.rpn, anchors, instances)
        sizes = upload(torch.tensor(batch.sizes), device)
        scaled = self.scaler.scale(weights)
        room = Room.of(network.quotas(instances))
        if self.is_recording:
            room = Room(_rounded(room.regions), _rounded(room.masks))
            given = _Given(batch.pixels, sizes, samples, weights, scaled)
            if (recorded := self._recording(given, instances, room)) is not None:
                return recorded(given, instances)
        proposed = network.propose(upload(batch.pixels, device), sizes)
        regions = network.settled(proposed.regions, proposed.candidates)
        found = network.losses_of(proposed, samples, network.draw(regions, instances, room))
        stacked = torch.stack([found[name] for name in self.losses])
        torch.autograd.backward((stacked * scaled).sum())
        return (stacked * weights).detach()

    @property
    def recorded(self) -> int:
        """How many shapes of a batch are recorded."""
        return len(self._recorded)

    def forget(self) -> bool:
        """Give back the memory of what is recorded, record no more, and return whether anything was."""
        was = bool(self._recorded)
        self._recorded.clear()
        self._pool, self.is_recording = None, False
        return was

    def _recording(self, given: "_Given", instances: Instances, room: Room) -> "_Recorded | None":
        """Return the recorded pass for a batch of this shape; None where it is to be computed as it comes."""
        key = (*given.pixels.shape[:3], room)
        if key in self._recorded or self._seen[key] == 0 or len(self._recorded) == MOST_RECORDED:
            self._seen[key] += 1
            return self._recorded.get(key)
        begun = time.perf_counter()
        try:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            recorded = _Recorded(self.network, self.losses, self._pool, given, instances, room)
        except Exception as error:  # whatever CUDA or its libraries cannot record
            self.forget()
            reason = "memory ran out" if is_out_of_memory(error) else f"{type(error).__name__}: {error}".splitlines()[0]
            log.warning("the GPU's work is not recorded (%s): training goes on, more slowly", reason)
            return None
        self._recorded[key] = recorded
        seconds = time.perf_counter() - begun
        log.info("recorded a step of %d images, %d x %d: %.1f s", *given.pixels.shape[:3], seconds)
        return recorded


def _rounded(count: int) -> int:
    """Return the next power of two, or `FEWEST_SLOTS`."""
    return int(max(FEWEST_SLOTS, 1 << (count - 1).bit_length()))


@dataclass(frozen=True)
class _Given:
    """What a pass begins with: pixels on the CPU, all else on the device."""

    pixels: Tensor
    sizes: Tensor
    samples: AnchorSamples
    weights: Tensor
    scaled: Tensor


class _Recorded:
    """A pass through a batch of one shape. Its tensors stay where they are: what goes in is copied into them."""

    def __init__(
        self,
        network: RcnnBatch,
        losses: tuple[str, ...],
        pool: Any,
        given: _Given,
        instances: Instances,
        room: Room,
    ) -> None:
        """Record the pass; the gradients that there are stay as they are."""
        self.network, self.room = network, room
        for parameter in network.model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.given: _Given = _copied(given, network.device)
        # Other threads go on meanwhile, such as the one that puts images into page-locked memory.
        mode = {"pool": pool, "capture_error_mode": "thread_local"}
        self.first, self.second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.first, **mode):
            proposed = network.propose(self.given.pixels, self.given.sizes)
        self.candidates: Candidates = proposed.candidates
        self.regions: Regions = proposed.regions
        self.first.replay()
        self.drawn: Drawn = _copied(self._draw(instances), network.device)
        with torch.cuda.graph(self.second, **mode):
            found = network.losses_of(proposed, self.given.samples, self.drawn)
            stacked = torch.stack([found[name] for name in losses])
            torch.autograd.backward((stacked * self.given.scaled).sum())
            self.figures = (stacked * self.given.weights).detach()

    def __call__(self, given: _Given, instances: Instances) -> Tensor:
        """Do what `Passes` does, of this shape."""
        _copy(given, self.given)
        self.first.replay()
        _copy(self._draw(instances), self.drawn)
        self.second.replay()
        figures: Tensor = self.figures.clone()
        return figures

    def _draw(self, instances: Instances) -> Drawn:
        return self.network.draw(self.network.settled(self.regions, self.candidates), instances, self.room)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a dataclass, and of those in it."""
    for each in fields(value):
        found = getattr(value, each.name)
        if isinstance(found, Tensor):
            yield found
        elif is_dataclass(found):
            yield from _tensors(found)


def _copied(value: Any, device: torch.device) -> Any:
    """Return a dataclass with copies of its tensors on the device."""
    changed = {}
    for each in fields(value):
        found = getattr(value, each.name)
        if isinstance(found, Tensor):
            changed[each.name] = found.to(device, copy=True)
        elif is_dataclass(found):
            changed[each.name] = _copied(found, device)
    return type(value)(**{each.name: getattr(value, each.name) for each in fields(value)} | changed)


def _copy(given: Any, kept: Any) -> None:
    """Copy the tensors of one dataclass into those of another, without waiting for the device."""
    for new, old in zip(_tensors(given), _tensors(kept), strict=True):
        old.copy_(new, non_blocking=True)
