"""What fits into the memory and the time that there are: tried out on a network that is thrown away."""

import ctypes
import gc
import logging
import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
import torch

from flawmask.coco import CocoSplit
from flawmask.launch import PROCESS, control_groups
from flawmask.model.arch import architecture
from flawmask.model.architecture import FixedSquare
from flawmask.model.weights import Pretrained
from flawmask.runtime import memory_of_process
from flawmask.training.config import TrainSettings
from flawmask.training.loader import Batch, Order, SplitDataset, resized_shapes
from flawmask.training.network import build_for_training, spec_for
from flawmask.training.step import Step, make_step

log = logging.getLogger(__name__)

MEMORY_SHARE = 0.8
"""The share of the free memory that training may take."""

SMALLEST, LARGEST_STEP = 128, 32
"""Under a time budget images are no smaller than this, unless they are so as they come or as asked, and their size
grows by that, in pixels."""

PASSES = {True: 20, False: 30}
MIN_VIEWS = {True: 2000, False: 8000}
"""How often a network should see each photograph, and how many images in all, before a larger image size pays: from
pretrained weights (True) and from none. A judgement, not a measurement; docs/results.md has what came of it."""

TIMED_STEPS = 5
"""So many steps tell how long one takes."""

MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Where a control group of cgroup v2 and one of v1 keep their limit and what they use, and what `memory.stat` calls
the part of it that is given back when it is needed."""

OVERHEAD = 0.15
"""The share of a time budget that validation, checkpoints and reading take."""


@dataclass(frozen=True)
class Trial:
    """What is tried out, and where.

    Attributes:
        config: the settings.
        training: the images.
        initial_weights: the weights that the network starts from.
        device: where it computes.
        dtype: what its layers compute in.
    """

    config: TrainSettings
    training: CocoSplit
    initial_weights: Pretrained
    device: torch.device
    dtype: torch.dtype

    def step(self, image_size: int, micro_batch_size: int) -> Step:
        """Return a step of a network of its own. It changes nothing of the training's."""
        is_pretrained = bool(self.initial_weights.state)
        with self.separate_random_state():
            spec = spec_for(self.config, self.training, self.initial_weights, image_size, micro_batch_size)
            model = build_for_training(self.config, spec, self.initial_weights, self.device, self.dtype, is_pretrained=is_pretrained)
        return make_step(self.config, model, spec, self.device, self.dtype, is_pretrained, micro_batch_size=micro_batch_size)

    def separate_random_state(self) -> AbstractContextManager[None]:
        """Return a context that leaves the random state as it was."""
        return torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else [])

    def batch(self, image_size: int, places: Sequence[int]) -> Batch:
        """Return the images at these places."""
        spec = spec_for(self.config, self.training, self.initial_weights, image_size, 1)
        return Batch.of([SplitDataset(self.training, spec)[place] for place in places])

    def largest_images(self, image_size: int, count: int) -> list[int]:
        """Return the places of the images that have the most pixels once they are resized, of equals those with the
        most instances, repeated where there are too few."""
        shapes = resized_shapes(self.training, spec_for(self.config, self.training, self.initial_weights, image_size, 1))
        instances = [len(self.training.annotations[image["id"]]) for image in self.training.images]
        order = sorted(range(len(shapes)), key=lambda at: (shapes[at][0] * shapes[at][1], instances[at]), reverse=True)
        return [order[at % len(order)] for at in range(count)]


def largest_micro_batch(trial: Trial, image_size: int, most: int) -> int:
    """Return how many images pass through the network at once without memory running out: at most `most`.

    On CUDA it is tried with the largest images. On a CPU, where a process that takes too much is killed, what one image
    takes is measured and divided into what is free; where that cannot be read (it can on Linux), it is `most`.
    """
    with trial.separate_random_state():
        step = trial.step(image_size, most)
        if trial.device.type == "cuda":
            # Whole steps: the optimiser has its share of the memory too, and so has what is recorded.
            fits = _fitting(trial, step, image_size, most)
            while step.passes is not None and step.passes.ran_out_of_memory and fits > 1:
                fits = math.ceil(fits / 2)
                del step
                _release_memory(trial.device)
                step = trial.step(image_size, fits)
                fits = _fitting(trial, step, image_size, fits)
        else:
            _release_memory(trial.device)
            before = _peak_memory()
            one = trial.batch(image_size, trial.largest_images(image_size, 1))
            step.add_gradients(one)
            taken, free = _peak_memory(since_start=True) - before, free_memory()
            fits = most if not (free and taken > 0) else max(1, min(most, int(MEMORY_SHARE * free / taken)))
        del step
    _release_memory(trial.device)
    log.info("%d of %d images of a batch pass through the network at once", fits, most)
    return fits


def _fitting(trial: Trial, step: Step, image_size: int, most: int) -> int:
    """Take a step of the largest images as often as it takes to be recorded, and return how many pass at once."""
    batch = trial.batch(image_size, trial.largest_images(image_size, most))
    for _ in range(_times(step)):
        step(batch, 0.0).tolist()
    return step.micro_batch_size


def _times(step: Step) -> int:
    """Return how often a step is taken until it is as it will be: what is recorded is replayed from the third time."""
    return 3 if step.passes is not None and step.passes.is_recording else 1


def _peak_memory(*, since_start: bool = False) -> int:
    """Return the bytes of memory that this process has; or the most that it had since this was last called without
    `since_start`. 0 where the system does not say."""
    if not since_start:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    return memory_of_process("VmHWM" if since_start else "VmRSS") or 0


def free_memory(process: Path = PROCESS) -> int:
    """Return how many bytes of memory are free, to this process' control groups; 0 where the system does not say.

    Args:
        process: a folder with `cgroup` and `mountinfo` as in proc(5).
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
    for group in control_groups("memory", process):
        for most, now, cached in MEMORY_FILES:
            with suppress(OSError, ValueError, KeyError):  # of the other version, or no limit ("max")
                limit, used = (int((group / name).read_text()) for name in (most, now))
                facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                free = min(free, max(0, limit - used + int(facts[cached])))
    return free


def image_size_for(trial: Trial, seconds: float, batch: int, micro_batch_size: int) -> int:
    """Return the image size with which a training of so many seconds becomes best, by measured step times.

    It is the largest with which the network still sees each photograph often enough (`PASSES`, `MIN_VIEWS`), and
    no larger than `--image_size` or than the images themselves are. Variants of a photograph count as the photograph.
    Of a network that sees all images at one size, it is that.
    """
    size = architecture(trial.config.arch).size
    if isinstance(size, FixedSquare):
        return size.side
    images = trial.training.images
    sides = [min(image["height"], image["width"]) for image in images]
    native = math.ceil(float(np.median(sides)) / LARGEST_STEP) * LARGEST_STEP
    largest = min(trial.config.image_size, native)
    sizes: list[int] = [*range(SMALLEST, largest, LARGEST_STEP), largest]
    if len(sizes) == 1:
        return largest
    is_pretrained = bool(trial.initial_weights.state)
    photographs = sum("augmentation" not in image for image in images)
    views = max(PASSES[is_pretrained] * photographs, MIN_VIEWS[is_pretrained])
    # The time of a step is a constant and a share of the pixels: two sizes tell both.
    tried = (sizes[0], min(2 * sizes[0], sizes[-1]))
    times = [_seconds_per_image(trial, size, batch, micro_batch_size) for size in tried]
    slope = max(0.0, (times[1] - times[0]) / (tried[1] ** 2 - tried[0] ** 2))
    allowed = (1 - OVERHEAD) * seconds / views
    fitting = [size for size in sizes if times[0] + slope * (size**2 - tried[0] ** 2) <= allowed]
    chosen: int = max(fitting, default=sizes[0])
    expected = times[0] + slope * (chosen**2 - tried[0] ** 2)
    log.info(
        "time budget: images at %d pixels, %.3f s each; about %d epochs",
        chosen,
        expected,
        (1 - OVERHEAD) * seconds / (expected * len(images)),
    )
    return chosen


def _seconds_per_image(trial: Trial, image_size: int, batch: int, micro_batch_size: int) -> float:
    """Return how long a step takes, divided by its images: the mean of some steps of a training, after a first one."""
    spec = spec_for(trial.config, trial.training, trial.initial_weights, image_size, micro_batch_size)
    order = Order(resized_shapes(trial.training, spec), batch, seed=trial.config.seed)
    tried = [batches for batches, _ in zip(cycle(order), range(1 + TIMED_STEPS), strict=False)]
    with trial.separate_random_state():
        step = trial.step(image_size, micro_batch_size)
        step(trial.batch(image_size, tried[0]), 0.0).tolist()
        items = [trial.batch(image_size, places) for places in tried[1:]]
        for _ in range(_times(step)):
            begun = time.perf_counter()
            for one in items:
                step(one, 0.0).tolist()
            seconds = time.perf_counter() - begun
        del step
    _release_memory(trial.device)
    return seconds / sum(len(one) for one in items)


def _release_memory(device: torch.device) -> None:
    """Give back the memory of networks that were tried out.

    To the system too: what a process keeps for later is taken without a trace in its size.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with suppress(AttributeError, OSError, TypeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
