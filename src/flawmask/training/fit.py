"""Chooses the micro-batch size for the memory and the image size for the time budget, by trial steps."""

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
from flawmask.launch import PROCESS, control_groups, usable_cores
from flawmask.model.arch import architecture
from flawmask.model.architecture import FixedSquare
from flawmask.model.weights import Pretrained
from flawmask.runtime import memory_of_process
from flawmask.settings import require
from flawmask.training.cache import pixel_cache
from flawmask.training.config import TrainSettings
from flawmask.training.loader import Augmenting, Batch, Order, SplitDataset, default_workers, resized_shapes
from flawmask.training.network import build_for_training, spec_for
from flawmask.training.step import Step, make_step
from flawmask.training.tile_choice import needed_scale
from flawmask.training.tile_data import cached_shapes

log = logging.getLogger(__name__)

MEMORY_SHARE = 0.8
"""The share of the free memory that training may take."""

MIN_SIZE, SIZE_STEP = 128, 32
"""The image sizes that a time budget chooses from, in pixels: the smallest one, and the step between them. A smaller
`--image_size` is kept."""

MAX_ENLARGED = 1.5
"""Images are enlarged by at most this factor, and only where the network would see too few pixels of defects. It is
the factor of the trainings that support it, of one fold of magnetic tiles. In five other folds, neither
masks nor verdicts are shown to be better (docs/results.md)."""

PASSES = {True: 10, False: 30}
MIN_VIEWS = {True: 2000, False: 8000}
"""When a larger image size pays: each photograph must be shown `PASSES` times and all images together `MIN_VIEWS`
times. True is for pretrained weights, False for none. These are estimates. On one fold of magnetic tiles, ten passes
were better than more passes over smaller images (docs/results.md)."""

MIN_PASSES = 3
"""A training that has no time for so many passes over its images, nor for `MIN_VIEWS`, is refused: it would learn next
to nothing."""

TIMED_STEPS = 5
"""The number of steps that are timed."""

TIMED_IMAGES = 12
"""The number of images whose reading is timed."""

MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""For cgroup v2 and v1: the file of the memory limit, the file of the memory in use, and the entry of `memory.stat` for
memory that the system can reclaim."""

OVERHEAD = 0.15
"""The share of a time budget that is set aside for validation and checkpoints."""


@dataclass(frozen=True)
class Trial:
    """A training to try out.

    Attributes:
        config: the settings.
        training: the images.
        initial_weights: the weights that the network starts from.
        device: where the network computes.
        dtype: the precision of its layers.
        augmenting: the augmentation of training images; None without one.
    """

    config: TrainSettings
    training: CocoSplit
    initial_weights: Pretrained
    device: torch.device
    dtype: torch.dtype
    augmenting: Augmenting | None = None

    def step(self, image_size: int, micro_batch_size: int) -> Step:
        """Return a step with a new network. The training's own network stays as it is."""
        start = self.initial_weights.start
        with self.separate_random_state():
            spec = spec_for(self.config, self.training, self.initial_weights, image_size, micro_batch_size)
            model = build_for_training(self.config, spec, self.initial_weights, self.device, self.dtype, start=start)
        return make_step(self.config, model, spec, self.device, self.dtype, start, micro_batch_size=micro_batch_size)

    def separate_random_state(self) -> AbstractContextManager[None]:
        """Return a context after which the random state is as before."""
        return torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else [])

    def batch(self, image_size: int, places: Sequence[int]) -> Batch:
        """Return the images at these places of the split, as a batch."""
        spec = spec_for(self.config, self.training, self.initial_weights, image_size, 1)
        return Batch.of([SplitDataset(self.training, spec)[place] for place in places])

    def largest_images(self, image_size: int, count: int) -> list[int]:
        """Return the places of the `count` images with the most pixels after resizing.

        Of images of equal size, those with the most instances come first. If there are fewer images, they are repeated.
        """
        shapes = resized_shapes(
            self.training, spec_for(self.config, self.training, self.initial_weights, image_size, 1)
        )
        instances = [len(self.training.annotations[image["id"]]) for image in self.training.images]
        order = sorted(range(len(shapes)), key=lambda at: (shapes[at][0] * shapes[at][1], instances[at]), reverse=True)
        return [order[at % len(order)] for at in range(count)]


def largest_micro_batch(trial: Trial, image_size: int, max_size: int) -> int:
    """Return the largest micro-batch that fits into memory, at most `max_size` images.

    On CUDA, steps with the largest images are tried. On a CPU, the system kills a process that takes too much memory.
    So the memory of one image is measured there, and the free memory is divided by it. Where the memory cannot be read
    (Linux can), the result is `max_size`.
    """
    with trial.separate_random_state():
        step = trial.step(image_size, max_size)
        if trial.device.type == "cuda":
            # Whole steps, because the optimiser and recorded passes need memory too.
            fitting = _fitting(trial, step, image_size, max_size)
            while step.passes is not None and step.passes.ran_out_of_memory and fitting > 1:
                fitting = math.ceil(fitting / 2)
                del step
                _release_memory(trial.device)
                step = trial.step(image_size, fitting)
                fitting = _fitting(trial, step, image_size, fitting)
        else:
            _release_memory(trial.device)
            before = _current_memory()
            image = trial.batch(image_size, trial.largest_images(image_size, 1))
            step.add_gradients(image)
            per_image, free = _peak_memory() - before, free_memory()
            is_known = free and per_image > 0
            fitting = max(1, min(max_size, int(MEMORY_SHARE * free / per_image))) if is_known else max_size
        del step
    _release_memory(trial.device)
    log.info("micro-batch: %d of the %d images of a batch", fitting, max_size)
    return fitting


def _fitting(trial: Trial, step: Step, image_size: int, max_size: int) -> int:
    """Take steps with the largest images until they run as in training. Return the micro-batch size that is left."""
    batch = trial.batch(image_size, trial.largest_images(image_size, max_size))
    for _ in range(_steps_to_settle(step)):
        step(batch, 0.0).tolist()
    return step.micro_batch_size


def _steps_to_settle(step: Step) -> int:
    """Return after how many steps a step runs as in training. A recorded pass is replayed from the third step on."""
    return 3 if step.passes is not None and step.passes.is_recording else 1


def _current_memory() -> int:
    """Return the bytes of memory that this process uses, and reset the peak. 0 where the system does not tell."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return memory_of_process("VmRSS") or 0


def _peak_memory() -> int:
    """Return the most bytes that this process has used since `_current_memory`. 0 where the system does not tell."""
    return memory_of_process("VmHWM") or 0


def free_memory(process: Path = PROCESS) -> int:
    """Return the bytes of free memory within the limits of this process' control groups. 0 where the system does not
    tell.

    Args:
        process: a folder with `cgroup` and `mountinfo` as in proc(5).
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
    for group in control_groups("memory", process):
        for limit_file, used_file, reclaimable in MEMORY_FILES:
            with suppress(OSError, ValueError, KeyError):  # files of the other cgroup version, or no limit ("max")
                limit, used = (int((group / name).read_text()) for name in (limit_file, used_file))
                facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                free = min(free, max(0, limit - used + int(facts[reclaimable])))
    return free


def image_size_for(trial: Trial, seconds: float, batch: int, micro_batch_size: int) -> int:
    """Return the best image size for a training of so many seconds, from measured times of steps and of reading.

    It is the largest size at which the network still sees each photograph often enough (`PASSES`, `MIN_VIEWS`). It
    never exceeds `--image_size`. It exceeds the images' own size only if defects are small, by `MAX_ENLARGED` at most.
    The augmented variants of a photograph count as that photograph. For a network with one fixed size, the result is
    that size.

    Raises:
        FlawmaskError: even at the smallest size, the time is not enough for `MIN_PASSES`.
    """
    images = trial.training.images
    sizes = _image_sizes(trial)
    is_pretrained = bool(trial.initial_weights.state)
    photographs = sum("augmentation" not in image for image in images)
    views = max(PASSES[is_pretrained] * photographs, MIN_VIEWS[is_pretrained])
    # The time of a step per image is a constant plus a term proportional to its pixels. Timing two sizes gives both.
    tried = (sizes[0], min(2 * sizes[0], sizes[-1]))
    times = [_seconds_per_image(trial, size, batch, micro_batch_size) for size in sorted(set(tried))]
    slope = max(0.0, (times[-1] - times[0]) / max(1, tried[1] ** 2 - tried[0] ** 2))
    reading = _seconds_to_read(trial, sizes[-1])  # augmenting takes longest at the largest size
    expected = {size: _with_reading(trial, times[0] + slope * (size**2 - tried[0] ** 2), reading) for size in sizes}
    allowed = (1 - OVERHEAD) * seconds / views
    chosen: int = max((size for size in sizes if expected[size] <= allowed), default=sizes[0])
    shown = (1 - OVERHEAD) * max(0.0, seconds) / expected[chosen]
    needed = min(MIN_PASSES * len(images), MIN_VIEWS[is_pretrained])
    require(
        shown >= needed,
        f"--time_budget: at {chosen} pixels and {expected[chosen]:.2f} s each, there is time to show the "
        f"{len(images)} training images {shown / len(images):.1f} times. That is too few to learn from. Give at least "
        f"{math.ceil(needed * expected[chosen] / (1 - OVERHEAD) / 60)}m, choose a smaller network, or give --epochs",
    )
    log.info(
        "time budget: images at %d pixels, %.3f s each (%.3f s to read); about %d epochs",
        chosen,
        expected[chosen],
        reading,
        shown / len(images),
    )
    return chosen


def _image_sizes(trial: Trial) -> list[int]:
    """Return the image sizes to choose from, ascending."""
    size = architecture(trial.config.arch).size
    if isinstance(size, FixedSquare):
        return [size.side]
    sides = [min(image["height"], image["width"]) for image in trial.training.images]
    scale = min(MAX_ENLARGED, max(1.0, needed_scale(trial.training)))
    native = math.ceil(scale * float(np.median(sides)) / SIZE_STEP) * SIZE_STEP
    largest = min(trial.config.image_size, native)
    return [*range(MIN_SIZE, largest, SIZE_STEP), largest]


def _seconds_to_read(trial: Trial, image_size: int) -> float:
    """Return the mean time in which one process reads, resizes and augments an image, after the first pass. It is 0 for
    images that are cached and not augmented."""
    if trial.augmenting is None and trial.config.cache_gb:
        return 0.0
    spec = spec_for(trial.config, trial.training, trial.initial_weights, image_size, 1)
    with pixel_cache(cached_shapes(trial.training, spec, trial.augmenting), trial.config.cache_gb) as cache:
        items = SplitDataset(trial.training, spec, cache, trial.augmenting)
        places = np.linspace(0, len(items) - 1, min(TIMED_IMAGES, len(items))).astype(int).tolist()
        seconds = 0.0
        for _ in range(2):  # the second time, what the cache holds is not decoded
            begun = time.perf_counter()
            for place in places:
                _ = items[len(items) + place if trial.augmenting else place]
            seconds = time.perf_counter() - begun
    return seconds / len(places)


def _with_reading(trial: Trial, step: float, reading: float) -> float:
    """Return the seconds that an image takes, from the time of its share of a step and the time to read it.

    Processes that read work beside a GPU, but share a CPU with the network.
    """
    on_cuda = trial.device.type == "cuda"
    workers = default_workers(on_cuda=on_cuda) if trial.config.workers is None else trial.config.workers
    if not workers:
        return step + reading
    return max(step, reading / workers) if on_cuda else step + reading / usable_cores()


def _seconds_per_image(trial: Trial, image_size: int, batch: int, micro_batch_size: int) -> float:
    """Return the mean time of a step divided by its images. The first steps, which warm up, are not counted."""
    spec = spec_for(trial.config, trial.training, trial.initial_weights, image_size, micro_batch_size)
    order = Order(resized_shapes(trial.training, spec), batch, seed=trial.config.seed)
    tried = [batches for batches, _ in zip(cycle(order), range(1 + TIMED_STEPS), strict=False)]
    with trial.separate_random_state():
        step = trial.step(image_size, micro_batch_size)
        step(trial.batch(image_size, tried[0]), 0.0).tolist()
        items = [trial.batch(image_size, places) for places in tried[1:]]
        for _ in range(_steps_to_settle(step)):
            begun = time.perf_counter()
            for one in items:
                step(one, 0.0).tolist()
            seconds = time.perf_counter() - begun
        del step
    _release_memory(trial.device)
    return seconds / sum(len(one) for one in items)


def _release_memory(device: torch.device) -> None:
    """Release the memory of trial networks, and return it to the system.

    Memory that a process keeps for reuse would not show as growth of the process, and so would not be measured.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with suppress(AttributeError, OSError, TypeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
