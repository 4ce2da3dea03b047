"""Records an R-CNN's training passes as CUDA graphs and replays them.

A pass launches a few thousand small GPU kernels. Python takes longer to launch one than the GPU takes to run it. A CUDA
graph is a recorded list of kernels that the GPU runs by itself. It is valid for one batch shape only. So a shape is
recorded when it comes for the second time; recording shapes that come once would not pay.

A pass is recorded as two graphs, the two halves of `RcnnBatch`: from pixels to region proposals, and from these to
gradients. Between them, the host has to check that suppression has finished.
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
"""The most batch shapes that are recorded. Further shapes are computed without a recording."""

Key = tuple[Any, ...]
"""The sizes of all inputs of a pass."""


class Passes:
    """Runs the training passes of one network, recorded or not, and accumulates their gradients.

    Attributes:
        network: computes the losses.
        losses: their names, in order.
        scaler: scales the loss before the backward pass.
        is_recording: whether passes are recorded.
        ran_out_of_memory: whether recording has stopped because memory ran out.
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
            losses: the names of its losses, in order.
            roi_samples: region proposals per image that train the heads; None derives them from the number of
                instances.
            scaler: scales the loss before the backward pass.
            is_recording: whether to record passes; needs CUDA.
            is_required: raise an error if a pass cannot be recorded.
        """
        self.network = RcnnBatch(model, roi_samples)
        self.losses, self.scaler = losses, scaler
        self.is_recording, self._is_required = is_recording, is_required
        self.ran_out_of_memory = False
        self._times_seen: Counter[Key] = Counter()
        self._recorded: dict[Key, _Recorded] = {}
        self._pool: Any = None
        self._stream: Any = None
        self._average: RcnnBatch | None = None

    def __call__(self, batch: Batch, weights: Tensor) -> Tensor:
        """Add the gradient of a micro-batch's weighted losses to the parameters, and return these losses.

        Args:
            batch: on the CPU.
            weights: (L,) float32, the weight of each loss, on the device.
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
        """Return a micro-batch's losses by name, without gradients.

        Args:
            model: the network or its moving average; no third model may be passed.
            batch: on the CPU.
        """
        if model is self.network.model:
            return self.network.losses(batch.images, batch.targets)
        self._average = self._average or RcnnBatch(model, self.network.roi_samples)
        return self._average.losses(batch.images, batch.targets)

    def backward(self, inputs: PassInputs, proposed: Proposals, regions: Regions, scaled: Tensor) -> Tensor:
        """Add the gradient of a pass's losses to the parameters, and return the losses, (L,), in order.

        Args:
            inputs: the inputs of the pass.
            proposed: the result of its first half.
            regions: the region proposals after complete suppression.
            scaled: (L,) float32, the factor of each loss in the backward pass.
        """
        by_name = self.network.losses_of(inputs, proposed, regions)
        losses = torch.stack([by_name[name] for name in self.losses])
        torch.autograd.backward((losses * scaled).sum())
        return losses.detach()

    @property
    def recorded(self) -> int:
        """The number of recorded batch shapes."""
        return len(self._recorded)

    def release(self) -> bool:
        """Release the memory of all recordings, and return whether there were any. If so, stop recording."""
        had_recordings = bool(self._recorded)
        self._recorded.clear()
        self._pool = None
        if had_recordings:
            self.is_recording, self.ran_out_of_memory = False, True
        return had_recordings

    def _recording_of(self, inputs: PassInputs, scaled: Tensor) -> "_Recorded | None":
        """Return the recorded pass for a batch of this shape; None if the pass is to run without a recording."""
        quotas, window = inputs.quotas, inputs.instances.window
        key = (*(one.shape for one in _tensors(inputs)), quotas.regions, quotas.masks, *window)
        self._times_seen[key] += 1
        if key in self._recorded or self._times_seen[key] == 1 or len(self._recorded) == MAX_RECORDED:
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
                raise FlawmaskError(f"--compile on: a step could not be recorded ({reason}): use auto") from None
            log.warning("CUDA graphs cannot be recorded (%s): training continues, more slowly", reason)
            return None
        self._recorded[key] = recorded
        count, height, width, _ = inputs.pixels.shape
        # The first shows the user what recording costs. Dozens may follow.
        level = logging.INFO if len(self._recorded) == 1 else logging.DEBUG
        seconds = time.perf_counter() - begun
        log.log(level, "recorded CUDA graphs for %d images of %d x %d: %.1f s", count, height, width, seconds)
        return recorded


class _Recorded:
    """A recorded pass for one batch shape. Its tensors have fixed addresses; a replay copies new inputs into them."""

    def __init__(self, passes: Passes, pool: Any, stream: Any, inputs: PassInputs, scaled: Tensor) -> None:
        """Record the pass. Recording computes nothing and leaves existing gradients unchanged."""
        self.network = passes.network
        for parameter in self.network.model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.inputs: PassInputs = _copied(inputs, self.network.device)
        self.scaled = scaled.clone()
        # Other threads may use CUDA meanwhile, such as the one that copies images into page-locked memory.
        mode = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
        self.first, self.second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.first, **mode):
            proposed = self.network.propose(self.inputs)
        self.candidates, self.regions = proposed.candidates, proposed.regions
        with torch.cuda.graph(self.second, **mode):
            self.losses = passes.backward(self.inputs, proposed, self.regions, self.scaled)

    def __call__(self, inputs: PassInputs, scaled: Tensor) -> Tensor:
        """Replay the pass for a batch of this shape: accumulate its gradients and return its losses, (L,)."""
        _copy(inputs, self.inputs)
        self.scaled.copy_(scaled)
        self.first.replay()
        regions = self.network.settled(self.regions, self.candidates)
        if regions is not self.regions:
            _copy(regions, self.regions)
        self.second.replay()
        return self.losses


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a dataclass, including those of nested dataclasses."""
    for each in fields(value):
        item = getattr(value, each.name)
        if isinstance(item, Tensor):
            yield item
        elif is_dataclass(item):
            yield from _tensors(item)


def _copied(value: Any, device: torch.device) -> Any:
    """Return a copy of the dataclass with copies of its tensors on the device."""
    changed: dict[str, Any] = {}
    for each in fields(value):
        item = getattr(value, each.name)
        if isinstance(item, Tensor):
            changed[each.name] = item.to(device, copy=True)
        elif is_dataclass(item):
            changed[each.name] = _copied(item, device)
    return replace(value, **changed)


def _copy(source: Any, destination: Any) -> None:
    """Copy the tensors of one dataclass into those of another. Copies from page-locked memory are asynchronous."""
    for new, old in zip(_tensors(source), _tensors(destination), strict=True):
        old.copy_(new, non_blocking=new.is_pinned())
