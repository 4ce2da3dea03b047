"""One training step in full view: losses, gradients, the rate, the weights."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from flawmask.distributed import Processes
from flawmask.model import rcnn_batch
from flawmask.model.architecture import DefaultOptimizer
from flawmask.model.build import Detector, detector_of
from flawmask.model.layers import without_side_effects, upload
from flawmask.model.spec import ModelSpec
from flawmask.runtime import ieee_float32, is_out_of_memory
from flawmask.settings import require
from flawmask.training.config import TrainSettings
from flawmask.training.loader import Batch
from flawmask.training.recording import Passes

log = logging.getLogger(__name__)

MIN_RATE = 0.01
"""The share of the learning rate that the warm-up begins with."""

MAX_WARMUP = 0.1
"""The share of the training that the warm-up takes at most."""

EMA_DECAY = 0.9998
"""Of the averaged weights, once there were many steps."""


@dataclass(frozen=True)
class Schedule:
    """How the learning rate rises and falls.

    It rises linearly (Goyal et al., "Accurate, large minibatch SGD", 2017), and falls along a cosine if nothing else is
    asked for (Loshchilov and Hutter, "SGDR", ICLR 2017).

    Attributes:
        rate: after the warm-up.
        kind: `cosine`, `step` or `constant`.
        warmup_steps: over how many steps it rises from nothing; over a tenth of the training where that is less.
    """

    rate: float
    kind: str
    warmup_steps: int

    def at(self, progress: float, taken: int) -> float:
        """Return the learning rate of a step.

        Args:
            progress: the share of the training that is done, 0 to 1.
            taken: how many steps that were.
        """
        risen = max(taken / self.warmup_steps, progress / MAX_WARMUP) if self.warmup_steps else 1.0
        if risen < 1:
            return self.rate * max(risen, MIN_RATE)
        # Nobody knows how many steps a time budget allows: the share of the warm-up is reckoned by those so far.
        warmup = min(self.warmup_steps * progress / max(1, taken), MAX_WARMUP)
        done = min((progress - warmup) / (1 - warmup), 1.0)
        if self.kind == "cosine":
            return self.rate * 0.5 * (1 + math.cos(math.pi * done))
        if self.kind == "step":
            return self.rate * (1.0 if done < 2 / 3 else 0.1 if done < 8 / 9 else 0.01)
        return self.rate


@dataclass
class Step:
    """Everything that a training step needs and that lives as long as the training.

    Attributes:
        model: in training mode.
        detector: the functions for its kind.
        losses: what its losses are called, in their order everywhere.
        has_known_counts: whether the targets tell what the losses are divided by.
        optimizer: its rate is set at each step.
        schedule: what it is set to.
        scaler: skips a step whose gradient is not finite, without waiting for the device; in float16 it scales too.
        device: where the model is.
        clip_norm: the longest gradient that is followed, as its 2-norm.
        roi_samples: regions per image on which the heads learn; None follows the number of instances.
        micro_batch_size: images that pass through the network together; further ones of a batch add their gradients.
        team: the processes that share each batch.
        passes: how an R-CNN's gradients are added up on a GPU; None: by `detector`.
        averaged: a network that follows the model's weights as their moving average; None for none.
        taken: how many steps there were.
    """

    model: Any
    detector: Detector
    losses: tuple[str, ...]
    has_known_counts: bool
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler
    device: torch.device
    clip_norm: float
    roi_samples: int | None
    micro_batch_size: int
    team: Processes = field(default_factory=Processes)
    passes: Passes | None = None
    averaged: Any = None
    taken: int = 0

    def __call__(self, batch: Batch, progress: float, *, stop: bool = False) -> "PendingFigures":
        """Take one step and return its figures: the losses in their order, the gradient's length, and how many
        processes were told to stop.

        Nobody has looked at them: see `Figures`. A step whose gradient is not finite changes no weight.

        Args:
            batch: this process' share of the images.
            progress: the share of the training that is done, 0 to 1.
            stop: whether this process was told to stop.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.at(progress, self.taken)
        stop_votes = torch.full((1,), float(stop), device=self.device)
        totals = None
        if self.team.count > 1:
            totals = self._in_less_memory(batch, lambda: torch.stack(self._counts(batch)).sum(dim=0))
            self.team.all_reduce_sum([totals, stop_votes])
        figures = self.add_gradients(batch, totals)
        gradients = [one.grad for one in self.model.parameters() if one.grad is not None]
        self.team.all_reduce_sum([figures, *gradients])
        self.scaler.unscale_(self.optimizer)
        length = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.taken += 1
        if self.averaged is not None:
            update_average(self.averaged, self.model, self.taken)
        return PendingFigures.to_host(torch.cat((figures, length.detach()[None], stop_votes)))

    def add_gradients(self, batch: Batch, totals: Tensor | None = None) -> Tensor:
        """Leave in the parameters the gradient of this process' part of a step's loss, and return its losses, (L,).

        A step's loss is the sum over all its images, divided by what all of them count, in whatever parts and processes
        they pass through the network.

        Args:
            batch: this process' share of the images.
            totals: (L,) float32, what each loss is divided by: the counts of all processes' images together; None where
                there is no other process.
        """

        def add() -> Tensor:
            # Recorded passes add to the gradients where these lie.
            self.optimizer.zero_grad(set_to_none=self.passes is None or not self.passes.is_recording)
            return self._add_gradients(batch, totals)

        return self._in_less_memory(batch, add)

    def _in_less_memory(self, batch: Batch, work: Callable[[], Tensor]) -> Tensor:
        """Return what `work` does with a batch. Where memory runs out, that of recorded passes is given back, and then
        half as many images pass through the network at once from now on."""
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                was_recorded = self.passes is not None and self.passes.release()
                if not was_recorded and (self.micro_batch_size == 1 or len(batch) == 1):
                    raise
            # Outside the except clause, which would hold on to what the failed pass has allocated.
            self.optimizer.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if was_recorded:
                log.warning("out of memory: what was recorded is given back, training goes on, more slowly")
                continue
            self.micro_batch_size = math.ceil(min(self.micro_batch_size, len(batch)) / 2)
            log.warning("out of memory: going on with %d images at once, the batch as it is", self.micro_batch_size)

    def _add_gradients(self, batch: Batch, totals: Tensor | None) -> Tensor:
        if totals is None and len(batch) > self.micro_batch_size:
            totals = torch.stack(self._counts(batch)).sum(dim=0)
        figures = torch.zeros(len(self.losses), device=self.device)
        for part in batch.parts(self.micro_batch_size):
            if self.passes is not None:
                figures += self.passes(part, self._weights(part, totals))
                continue
            losses = self.losses_of(self.model, part)
            losses = losses * self._weights(part, totals)
            with ieee_float32():
                torch.autograd.backward(self.scaler.scale(losses.sum()))
            figures += losses.detach()
        return figures

    def _weights(self, part: Batch, totals: Tensor | None) -> Tensor:
        """Return what the losses of the last pass, which was of `part`, count for in the step's: (L,) float32."""
        if totals is None:
            return torch.ones(len(self.losses), device=self.device)
        # A loss is divided by its count where that is 1 at least.
        return self.counts_of(self.model, part).clamp(min=1) / totals.clamp(min=1)

    def _counts(self, batch: Batch) -> list[Tensor]:
        """Return what the losses of each part of a batch are divided by: (L,) float32 each."""
        counts = []
        for part in batch.parts(self.micro_batch_size):
            if not self.has_known_counts:
                with without_side_effects(self.model):
                    self.losses_of(self.model, part)
            counts.append(self.counts_of(self.model, part))
        return counts

    def losses_of(self, model: Any, part: Batch) -> Tensor:
        """Return the losses of images that pass together, in their order: (L,) float32.

        Args:
            model: the one that is trained, or its average.
            part: the images.
        """
        with ieee_float32():
            if self.passes is not None:
                found = self.passes.evaluate_losses(model, part)
            else:
                found = self.detector.losses(model, *part.on(self.device), self.roi_samples)
        return torch.stack([found[name] for name in self.losses])

    def counts_of(self, model: Any, part: Batch) -> Tensor:
        """Return what the losses of the last pass, of `part`, were divided by, if that is 1 at least: (L,) float32."""
        found = self.detector.counts(model, part.targets)
        return upload(torch.tensor([found[name] for name in self.losses]), self.device)


@dataclass(frozen=True)
class PendingFigures:
    """Figures that are on their way from the device to the host.

    Attributes:
        values: where they will be, in page-locked memory if the device is a GPU.
        arrived: when they are there; None: they are.
    """

    values: Tensor
    arrived: torch.cuda.Event | None = None

    @classmethod
    def to_host(cls, figures: Tensor) -> "PendingFigures":
        """Send them. What is asked of the device later does not keep them waiting."""
        if figures.device.type != "cuda":
            return cls(figures.cpu())
        values = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
        values.copy_(figures, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record(torch.cuda.current_stream(figures.device))
        return cls(values, arrived)

    def tolist(self) -> list[float]:
        """Wait for them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        values: list[float] = self.values.tolist()
        return values


@dataclass(frozen=True)
class Figures:
    """A step's figures, read from the device.

    Attributes:
        losses: in their order.
        length: the gradient's, before it was clipped.
        stop_votes: how many processes were told to stop.
    """

    losses: list[float]
    length: float
    stop_votes: int

    @classmethod
    def read(cls, figures: PendingFigures) -> "Figures":
        """Wait for what `Step` returned."""
        *losses, length, stop_votes = figures.tolist()
        return cls(losses, length, int(stop_votes))

    @property
    def not_finite(self) -> str:
        """What of them is no number, in a word and its value; nothing where the step was taken."""
        named = (("loss", sum(self.losses)), ("gradient", self.length))
        return next((f"the {what} is {value}" for what, value in named if not math.isfinite(value)), "")


@torch.no_grad()
def update_average(averaged: nn.Module, model: nn.Module, steps: int) -> None:
    """Move the averaged weights towards the model's: by much in the first steps, by 0.0002 in the end.

    Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992, with a decay that grows as in
    TensorFlow's `ExponentialMovingAverage(num_updates=...)`.
    """
    decay = min(EMA_DECAY, (1 + steps) / (10 + steps))
    kept, given = averaged.state_dict(), model.state_dict()
    moving = [name for name, tensor in kept.items() if tensor.is_floating_point()]
    move = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    move([kept[name] for name in moving], [given[name] for name in moving], 0)
    for name in kept.keys() - set(moving):
        kept[name].copy_(given[name])


def make_step(
    config: TrainSettings,
    model: Any,
    spec: ModelSpec,
    device: torch.device,
    dtype: torch.dtype,
    is_pretrained: bool,
    *,
    micro_batch_size: int,
    team: Processes | None = None,
) -> Step:
    """Return the step with the optimiser that is asked for, or that suits the architecture and how it starts."""
    groups = parameter_groups(model)
    optimizer: torch.optim.Optimizer
    suitable = spec.architecture.from_pretrained if is_pretrained else spec.architecture.from_scratch
    chosen = suitable if config.optimizer == "auto" else DefaultOptimizer(config.optimizer)
    rate = config.lr / chosen.divisor
    if chosen.name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9, weight_decay=0.0005, fused=True)
    else:
        log.info("AdamW at a learning rate of %g", rate)
        optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.01, fused=True)
    # Growing scales are for float16; elsewhere a scaler of 1 is there to leave out a step that is not finite.
    scaling = {} if dtype == torch.float16 else {"init_scale": 1.0, "growth_interval": 2**31 - 1}
    scaler = torch.amp.GradScaler(device.type, **scaling)  # type: ignore[arg-type]
    schedule = Schedule(rate, config.scheduler, config.warmup_steps)
    detector = detector_of(spec)
    losses = spec.architecture.loss_names
    passes = None
    if can_record(spec, model, device):
        recording = {"is_recording": config.compile != "off", "is_required": config.compile == "on"}
        passes = Passes(model, losses, config.roi_samples, scaler, **recording)
    require(
        config.compile != "on" or passes is not None,
        f"--compile on: {spec.arch} on {device.type} cannot be recorded, only R-CNNs on CUDA can whose heads have no "
        "BatchNorm: leave it at auto",
    )
    return Step(
        model,
        detector,
        losses,
        spec.architecture.has_known_counts,
        optimizer,
        schedule,
        scaler,
        device,
        config.clip_norm,
        config.roi_samples,
        micro_batch_size,
        team or Processes(),
        passes,
    )


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return the parameters that learn for an optimiser: those that decay as it says, and norms and biases, which do
    not. These have one dimension at most.
    """
    learning = [one for one in model.parameters() if one.requires_grad]
    return [
        {"params": [one for one in learning if one.ndim > 1]},
        {"params": [one for one in learning if one.ndim <= 1], "weight_decay": 0.0},
    ]


def can_record(spec: ModelSpec, model: Any, device: torch.device) -> bool:
    """Return whether the passes of a network can be recorded on the device."""
    return device.type == "cuda" and spec.architecture.is_recordable and rcnn_batch.is_supported(model)
