"""One training step: the learning rate, the losses, the gradients and the update of the weights."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from flawmask.distributed import Processes
from flawmask.model import rcnn_batch
from flawmask.model.architecture import Start
from flawmask.model.build import Detector, detector_of
from flawmask.model.layers import upload, without_side_effects
from flawmask.model.spec import ModelSpec
from flawmask.runtime import ieee_float32, is_out_of_memory
from flawmask.settings import require
from flawmask.training.config import TrainSettings
from flawmask.training.loader import Batch
from flawmask.training.recording import Passes

log = logging.getLogger(__name__)

WARMUP_START = 0.01
"""The warm-up begins with this share of the learning rate."""

MAX_WARMUP = 0.1
"""The warm-up takes at most this share of the training."""

EMA_DECAY = 0.9998
"""The decay of the moving average of the weights after many steps."""

PASSES_RELEASED = "out of memory: recorded CUDA graphs are released; training continues, more slowly"


@dataclass(frozen=True)
class Schedule:
    """The learning rate schedule: a linear warm-up (Goyal et al., "Accurate, large minibatch SGD", 2017), then a decay.

    The default decay is a cosine (Loshchilov and Hutter, "SGDR", ICLR 2017).

    Attributes:
        rate: the learning rate after the warm-up.
        kind: of the decay: `cosine`, `step` or `constant`.
        warmup_steps: the length of the warm-up in steps; it takes at most `MAX_WARMUP` of the training.
    """

    rate: float
    kind: str
    warmup_steps: int

    def at(self, progress: float, steps_taken: int) -> float:
        """Return the learning rate of a step.

        Args:
            progress: the share of the training that is done, 0 to 1.
            steps_taken: the number of steps so far.
        """
        risen = max(steps_taken / self.warmup_steps, progress / MAX_WARMUP) if self.warmup_steps else 1.0
        if risen < 1:
            return self.rate * max(risen, WARMUP_START)
        # With a time budget, the number of all steps is unknown. The share of the warm-up is estimated from the steps
        # so far.
        warmup = min(self.warmup_steps * progress / max(1, steps_taken), MAX_WARMUP)
        done = min((progress - warmup) / (1 - warmup), 1.0)
        if self.kind == "cosine":
            return self.rate * 0.5 * (1 + math.cos(math.pi * done))
        if self.kind == "step":
            return self.rate * (1.0 if done < 2 / 3 else 0.1 if done < 8 / 9 else 0.01)
        return self.rate


@dataclass
class Step:
    """Everything that a training step needs and that lasts as long as the training.

    Attributes:
        model: in training mode.
        detector: the functions for its kind of network.
        losses: the names of its losses; the order is the same everywhere.
        has_known_counts: whether the divisors of the losses follow from the targets alone.
        optimizer: its learning rate is set at each step.
        schedule: of the learning rate.
        scaler: skips a step whose gradient is not finite, without waiting for the device. In float16 it also scales
            the loss.
        device: of the model.
        clip_norm: the largest 2-norm of the gradient; longer gradients are scaled down to it.
        roi_samples: region proposals per image that train the heads; None derives them from the number of instances.
        micro_batch_size: images per forward pass. The gradients of a batch's micro-batches are accumulated.
        team: the processes that share each batch.
        passes: runs an R-CNN's passes on a GPU; None to use `detector`.
        averaged: a network with the moving average of the model's weights; None without one.
        steps_taken: the number of steps so far.
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
    steps_taken: int = 0

    def __call__(self, batch: Batch, progress: float, *, stop: bool = False) -> "PendingFigures":
        """Take one step and return its figures: the losses in order, the gradient's length, and the stop votes.

        The figures may still be on their way from the device; `StepFigures.read` waits for them. A step whose gradient
        is not finite changes no weight.

        Args:
            batch: this process' shard of the images.
            progress: the share of the training that is done, 0 to 1.
            stop: whether this process has received a signal to stop. All processes get the number of such votes.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.at(progress, self.steps_taken) * group["share"]
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
        self.steps_taken += 1
        if self.averaged is not None:
            update_average(self.averaged, self.model, self.steps_taken)
        return PendingFigures.to_host(torch.cat((figures, length.detach()[None], stop_votes)))

    def add_gradients(self, batch: Batch, totals: Tensor | None = None) -> Tensor:
        """Compute the gradient of this process' part of a step's loss, into the parameters. Return its losses, (L,).

        The loss of a step is a sum over all its images, divided by the count of all of them. So it does not depend on
        how the images are divided into micro-batches and processes.

        Args:
            batch: this process' shard of the images.
            totals: (L,) float32, the divisor of each loss: the counts over the images of all processes. None for a
                single process.
        """

        def add() -> Tensor:
            # Recorded passes write to fixed addresses, so their gradient tensors must stay.
            self.optimizer.zero_grad(set_to_none=self.passes is None or not self.passes.is_recording)
            return self._add_gradients(batch, totals)

        return self._in_less_memory(batch, add)

    def _in_less_memory(self, batch: Batch, work: Callable[[], Tensor]) -> Tensor:
        """Return the result of `work` on a batch. If memory runs out, try again with less.

        First the memory of recorded passes is released. After that, the micro-batch size is halved for good.
        """
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                was_recorded = self.passes is not None and self.passes.release()
                if not was_recorded and (self.micro_batch_size == 1 or len(batch) == 1):
                    raise
            # Outside the except clause, which would keep the failed pass's tensors alive.
            self.optimizer.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if was_recorded:
                log.warning("%s", PASSES_RELEASED)
                continue
            self.micro_batch_size = math.ceil(min(self.micro_batch_size, len(batch)) / 2)
            log.warning(
                "out of memory: continuing with micro-batches of %d images; the batch size does not change",
                self.micro_batch_size,
            )

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
        """Return the weight of a micro-batch's losses in the step's losses: (L,) float32. The last pass must have been
        that of `part`."""
        if totals is None:
            return torch.ones(len(self.losses), device=self.device)
        # A loss with a count of 0 is divided by 1.
        return self.counts_of(self.model, part).clamp(min=1) / totals.clamp(min=1)

    def _counts(self, batch: Batch) -> list[Tensor]:
        """Return the divisors of the losses of each micro-batch: (L,) float32 each."""
        counts = []
        for part in batch.parts(self.micro_batch_size):
            if not self.has_known_counts:
                with without_side_effects(self.model):
                    self.losses_of(self.model, part)
            counts.append(self.counts_of(self.model, part))
        return counts

    def losses_of(self, model: Any, part: Batch) -> Tensor:
        """Return the losses of a micro-batch in order: (L,) float32.

        Args:
            model: the trained network or its moving average.
            part: the images.
        """
        with ieee_float32():
            if self.passes is not None:
                by_name = self.passes.evaluate_losses(model, part)
            else:
                by_name = self.detector.losses(model, *part.on(self.device), self.roi_samples)
        return torch.stack([by_name[name] for name in self.losses])

    def counts_of(self, model: Any, part: Batch) -> Tensor:
        """Return the counts that the losses of the last pass were divided by: (L,) float32. That pass must have been
        of `part`. A count may be 0; the divisor was 1 then."""
        by_name = self.detector.counts(model, part.targets)
        return upload(torch.tensor([by_name[name] for name in self.losses]), self.device)


@dataclass(frozen=True)
class PendingFigures:
    """Figures of a step that are being copied from the device to the host.

    Attributes:
        values: the tensor that receives them, in page-locked memory if the device is a GPU.
        arrived: the event that marks the end of the copy; None if it has ended.
    """

    values: Tensor
    arrived: torch.cuda.Event | None = None

    @classmethod
    def to_host(cls, figures: Tensor) -> "PendingFigures":
        """Start the copy. It does not wait for work that is queued on the device later."""
        if figures.device.type != "cuda":
            return cls(figures.cpu())
        values = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
        values.copy_(figures, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record(torch.cuda.current_stream(figures.device))
        return cls(values, arrived)

    def tolist(self) -> list[float]:
        """Wait for the copy and return the figures."""
        if self.arrived is not None:
            self.arrived.synchronize()
        values: list[float] = self.values.tolist()
        return values


@dataclass(frozen=True)
class StepFigures:
    """The figures of a step, on the host.

    Attributes:
        losses: in the step's order.
        length: of the gradient, before clipping.
        stop_votes: the number of processes that had received a signal to stop.
    """

    losses: list[float]
    length: float
    stop_votes: int

    @classmethod
    def read(cls, figures: PendingFigures) -> "StepFigures":
        """Wait for the figures that `Step` returned."""
        *losses, length, stop_votes = figures.tolist()
        return cls(losses, length, int(stop_votes))

    @property
    def not_finite(self) -> str:
        """The first figure that is not finite, as "the loss is nan"; empty if the step was taken."""
        named = (("loss", sum(self.losses)), ("gradient", self.length))
        return next((f"the {what} is {value}" for what, value in named if not math.isfinite(value)), "")


@torch.no_grad()
def update_average(averaged: nn.Module, model: nn.Module, steps: int) -> None:
    """Move the averaged weights towards the model's: by a large share in the first steps, by 0.0002 after many.

    Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992. The decay grows as in
    TensorFlow's `ExponentialMovingAverage(num_updates=...)`.
    """
    decay = min(EMA_DECAY, (1 + steps) / (10 + steps))
    average, current = averaged.state_dict(), model.state_dict()
    floating = [name for name, tensor in average.items() if tensor.is_floating_point()]
    move = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    move([average[name] for name in floating], [current[name] for name in floating], 0)
    for name in average.keys() - set(floating):
        average[name].copy_(current[name])


def make_step(
    config: TrainSettings,
    model: Any,
    spec: ModelSpec,
    device: torch.device,
    dtype: torch.dtype,
    start: Start,
    *,
    micro_batch_size: int,
    team: Processes | None = None,
) -> Step:
    """Return the step. What the settings leave open is decided by the architecture's recipe for this start."""
    recipe = spec.architecture.recipe(start)
    share = recipe.backbone_lr if config.backbone_lr is None else config.backbone_lr
    backbone = [layer for stage in detector_of(spec).stages(model) for layer in stage]
    groups = parameter_groups(model, backbone, share)
    optimizer: torch.optim.Optimizer
    is_open = config.optimizer == "auto"
    rate = config.lr / recipe.divisor if is_open else config.lr
    if (recipe.optimizer if is_open else config.optimizer) == "sgd":
        optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9, weight_decay=0.0005, fused=True)
    else:
        log.info("AdamW at a learning rate of %g%s", rate, f", {rate * share:g} for the backbone" if share != 1 else "")
        optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.01, fused=True)
    # Only float16 needs a growing scale. Elsewhere the scale stays 1, and the scaler only skips steps that are not
    # finite.
    scaling = {} if dtype == torch.float16 else {"init_scale": 1.0, "growth_interval": 2**31 - 1}
    scaler = torch.amp.GradScaler(device.type, **scaling)  # type: ignore[arg-type]
    schedule = Schedule(rate, config.scheduler, config.warmup_steps)
    detector = detector_of(spec)
    losses = spec.loss_names
    passes = None
    if can_record(spec, model, device):
        recording = {"is_recording": config.compile != "off", "is_required": config.compile == "on"}
        passes = Passes(model, losses, config.roi_samples, scaler, **recording)
    require(
        config.compile != "on" or passes is not None,
        f"--compile on: {spec.arch} on {device.type} cannot be recorded. Only R-CNNs on CUDA can, and only if their "
        "heads have no BatchNorm: leave it at auto",
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


def parameter_groups(
    model: nn.Module, backbone: Sequence[nn.Module] = (), backbone_lr: float = 1.0
) -> list[dict[str, Any]]:
    """Return the trainable parameters in groups for an optimiser. `share` is a group's share of the learning rate.

    Norms and biases, which have at most one dimension, get no weight decay.

    Args:
        model: the network.
        backbone: the modules that learn at a rate of their own.
        backbone_lr: the share of the backbone; the other layers have 1.
    """
    inside = {parameter for module in backbone for parameter in module.parameters()}
    groups: list[dict[str, Any]] = [
        {"params": [], "share": share, **decay} for share in (1.0, backbone_lr) for decay in ({}, {"weight_decay": 0.0})
    ]
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[2 * (parameter in inside) + (parameter.ndim <= 1)]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def can_record(spec: ModelSpec, model: Any, device: torch.device) -> bool:
    """Return whether the passes of a network can be recorded on the device."""
    return device.type == "cuda" and spec.architecture.is_recordable and rcnn_batch.is_supported(model)
