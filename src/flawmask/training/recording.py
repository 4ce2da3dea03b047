"""Passes of an R-CNN through a GPU, recorded when they come again and replayed from then on.

A pass is a few thousand small pieces of work, and Python needs longer to ask for one of them than a GPU needs to do it.
A CUDA graph is the list of these pieces, which the GPU goes through by itself. It holds for one shape of the batch
alone, so a shape that comes a second time is recorded; shapes that come once are not worth it. A pass is recorded in
the two halves of `RcnnBatch`, from pixels to region proposals and from these to gradients: in between, somebody has to
look whether suppression is finished.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flawmask.errors import FlawmaskError
from flawmask.model.layers import upload
from flawmask.model.rcnn_batch import PassInputs, Proposals, RcnnBatch, Regions
from flawmask.runtime import ieee_float32, is_out_of_memory
from flawmask.training.loader import Batch

log = logging.getLogger(__name__)

MAX_RECORDED = 32
"""So many shapes of a batch are recorded; further ones are computed as they come."""

Key = tuple[Any, ...]
"""The sizes of all that a pass begins with."""


class Passes:
    """Adds up the gradients of one network's passes, recorded or not.

    Attributes:
        network: computes the losses.
        losses: what they are called, in their order.
        scaler: what the loss is multiplied by before its gradient is taken.
        is_recording: whether passes are recorded.
        ran_out_of_memory: whether they no longer are since memory ran out.
    """

    def __init__(
        self,
        model: Any,
        losses: tuple[str, ...],
        roi_samples: int | None,
        scaler: torch.amp.GradScaler,
        *,
        is_recording: bool,
        is_required: bool = False,
    ) -> None:
        """Take the network; nothing is recorded yet.

        Args:
            model: an R-CNN in training mode, on its device.
            losses: what its losses are called, in their order.
            roi_samples: regions per image on which the heads learn; None follows the number of instances.
            scaler: what the loss is multiplied by before its gradient is taken.
            is_recording: whether passes are recorded; only CUDA can.
            is_required: whether it is an error if they cannot be.
        """
        self.network = RcnnBatch(model, roi_samples)
        self.losses, self.scaler = losses, scaler
        self.is_recording, self._is_required = is_recording, is_required
        self.ran_out_of_memory = False
        self._seen: Counter[Key] = Counter()
        self._recorded: dict[Key, _Recorded] = {}
        self._pool: Any = None
        self._stream: Any = None
        self._average: RcnnBatch | None = None

    def __call__(self, batch: Batch, weights: Tensor) -> Tensor:
        """Add the gradient of a micro-batch's weighed losses to the parameters' and return these losses.

        Args:
            batch: on the CPU.
            weights: (L,) float32, what each loss is multiplied by, on the device.
        """
        with ieee_float32():
            return self._losses_of(batch, self.scaler.scale(weights)) * weights

    def _losses_of(self, batch: Batch, scaled: Tensor) -> Tensor:
        network = self.network
        inputs = network.inputs(batch.pixels, batch.sizes, batch.targets, is_rounded=self.is_recording)
        recorded = self._recording_of(inputs, scaled) if self.is_recording else None
        if recorded is not None:
            return recorded(inputs, scaled)
        inputs = replace(inputs, pixels=upload(inputs.pixels, network.device))
        proposed = network.propose(inputs)
        return self.backward(inputs, proposed, network.settled(proposed.regions, proposed.candidates), scaled)

    def evaluate_losses(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        """Return a micro-batch's losses by name; nothing is learned from them.

        Args:
            model: the network, or its moving average: no more than these two are ever looked at.
            batch: on the CPU.
        """
        if model is self.network.model:
            return self.network.losses(batch.images, batch.targets)
        self._average = self._average or RcnnBatch(model, self.network.roi_samples)
        return self._average.losses(batch.images, batch.targets)

    def backward(self, inputs: PassInputs, proposed: Proposals, regions: Regions, scaled: Tensor) -> Tensor:
        """Add the gradient of a pass's losses to the parameters' and return the losses, (L,), in their order.

        Args:
            inputs: what the pass began with.
            proposed: its first half.
            regions: the region proposals, settled.
            scaled: (L,) float32, what each loss is multiplied by before its gradient is taken.
        """
        found = self.network.losses_of(inputs, proposed, regions)
        losses = torch.stack([found[name] for name in self.losses])
        torch.autograd.backward((losses * scaled).sum())
        return losses.detach()

    @property
    def recorded(self) -> int:
        """How many shapes of a batch are recorded."""
        return len(self._recorded)

    def release(self) -> bool:
        """Give back the memory of what is recorded, if anything is; record no more then, and return whether it was."""
        was = bool(self._recorded)
        self._recorded.clear()
        self._pool, self.is_recording, self.ran_out_of_memory = None, self.is_recording and not was, self.ran_out_of_memory or was
        return was

    def _recording_of(self, inputs: PassInputs, scaled: Tensor) -> "_Recorded | None":
        """Return the recorded pass for a batch of this shape; None where it is to be computed as it comes."""
        quotas, window = inputs.quotas, inputs.instances.window
        key = (*(one.shape for one in _tensors(inputs)), quotas.regions, quotas.masks, *window)
        self._seen[key] += 1
        if key in self._recorded or self._seen[key] == 1 or len(self._recorded) == MAX_RECORDED:
            return self._recorded.get(key)
        begun = time.perf_counter()
        try:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            self._stream = self._stream or torch.cuda.Stream(self.network.device)  # type: ignore[no-untyped-call]
            recorded = _Recorded(self, self._pool, self._stream, inputs, scaled)
        except Exception as error:  # whatever CUDA or its libraries cannot record
            self.release()
            self.is_recording, self.ran_out_of_memory = False, is_out_of_memory(error)
            reason = "memory ran out" if is_out_of_memory(error) else f"{type(error).__name__}: {error}".splitlines()[0]
            if self._is_required:
                raise FlawmaskError(f"--compile on: a step could not be recorded ({reason}): try auto") from None
            log.warning("the GPU's work is not recorded (%s): training goes on, more slowly", reason)
            return None
        self._recorded[key] = recorded
        count, height, width, _ = inputs.pixels.shape
        # The first tells what it costs; dozens may follow.
        level = logging.INFO if len(self._recorded) == 1 else logging.DEBUG
        seconds = time.perf_counter() - begun
        log.log(level, "recorded the GPU's work on %d images of %d x %d: %.1f s", count, height, width, seconds)
        return recorded


class _Recorded:
    """A pass through a batch of one shape. Its tensors stay where they are: what goes in is copied into them."""

    def __init__(self, passes: Passes, pool: Any, stream: Any, inputs: PassInputs, scaled: Tensor) -> None:
        """Record the pass. Nothing is computed by that, and the gradients that there are stay as they are."""
        self.network = passes.network
        for parameter in self.network.model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.inputs: PassInputs = _copied(inputs, self.network.device)
        self.scaled = scaled.clone()
        # Other threads go on meanwhile, such as the one that puts images into page-locked memory.
        mode = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
        self.first, self.second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.first, **mode):
            proposed = self.network.propose(self.inputs)
        self.candidates, self.regions = proposed.candidates, proposed.regions
        with torch.cuda.graph(self.second, **mode):
            self.losses = passes.backward(self.inputs, proposed, self.regions, self.scaled)

    def __call__(self, inputs: PassInputs, scaled: Tensor) -> Tensor:
        """Add up the gradients of a batch of this shape and return its losses, (L,)."""
        _copy(inputs, self.inputs)
        self.scaled.copy_(scaled)
        self.first.replay()
        regions = self.network.settled(self.regions, self.candidates)
        if regions is not self.regions:
            _copy(regions, self.regions)
        self.second.replay()
        return self.losses


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
    changed: dict[str, Any] = {}
    for each in fields(value):
        found = getattr(value, each.name)
        if isinstance(found, Tensor):
            changed[each.name] = found.to(device, copy=True)
        elif is_dataclass(found):
            changed[each.name] = _copied(found, device)
    return replace(value, **changed)


def _copy(inputs: Any, kept: Any) -> None:
    """Copy the tensors of one dataclass into those of another; what is in page-locked memory makes nobody wait."""
    for new, old in zip(_tensors(inputs), _tensors(kept), strict=True):
        old.copy_(new, non_blocking=new.is_pinned())
