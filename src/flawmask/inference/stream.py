"""Many images in a row: read ahead by threads, judged in batches by the calling thread, finished by threads again."""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from flawmask.errors import FlawmaskError
from flawmask.inference.predictor import infer_resized, resized
from flawmask.launch import THREAD_NAME, cores_of_each_process, usable_cores
from flawmask.model.spec import ModelSpec
from flawmask.runtime import is_out_of_memory

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

Image = npt.NDArray[np.uint8]

THREADS = min(4, usable_cores())
"""How many read, and how many finish, beside a network that computes on the same cores: Pillow, OpenCV and NumPy let go
of Python's lock while they work."""

MOST_THREADS = 8
"""However many cores there are: each thread holds an image, and a float32 copy of it while it is resized."""

THREADS_ON_CUDA = max(THREADS, min(MOST_THREADS, cores_of_each_process()))
"""The same beside a network that leaves them all the cores."""

BATCH_ON_CUDA = 8
"""How many images are judged at once there by default; a CPU gains nothing by more than one."""


PATIENCE = 5.0
"""Seconds that are waited for threads that read or finish an image when the others are no longer wanted."""


@dataclass(frozen=True)
class Seen:
    """What the network saw on one image.

    Attributes:
        pixels: (height, width, 3) uint8 RGB.
        found: what `infer` returned for it.
        read: seconds from file to pixels, and these resized.
        network: seconds of its batch, shared out equally.
    """

    pixels: Image
    found: dict[str, Tensor]
    read: float
    network: float


@dataclass(frozen=True)
class _Read(Generic[T]):
    """An image as it is and as the network sees it, or why it cannot be judged; what it was read from, the seconds that
    it took, and the size that the image has in a batch."""

    item: T
    image: Image | FlawmaskError
    resized: Image | None
    seconds: float

    padded: tuple[int, int] | None


def judge_all(
    network: nn.Module,
    spec: ModelSpec,
    items: Iterable[T],
    read: Callable[[T], Image],
    finish: Callable[[T, Seen | FlawmaskError], R],
    batch_size: int | None = None,
) -> Generator[R, None, None]:
    """Yield what `finish` makes of each item, in their order.

    While the network judges a batch, threads read and resize the images of the next and finish those of the one before.
    Only images that follow each other and that have one size once they are padded share a batch: so none is padded for
    another, and results are those of one by one. Where memory does not hold a batch, half as many pass through the
    network at once from then on. About three batches of images are held at any time, or three images
    for each thread where that is more. Close the iterator to stop early.

    Args:
        network: in evaluation mode; only the calling thread uses it.
        spec: what it was built from.
        items: what the images come from; read in the calling thread.
        read: an item to (height, width, 3) uint8 RGB. A FlawmaskError is handed to `finish`; any other stops it all.
        finish: item and what was seen, or why nothing was, to the result. Called by several threads at once.
        batch_size: the most images of a batch; by default 8 on CUDA and 1 elsewhere.
    """
    on_cuda = next(network.parameters()).device.type == "cuda"
    most = batch_size or (BATCH_ON_CUDA if on_cuda else 1)
    threads = THREADS_ON_CUDA if on_cuda else THREADS
    with (
        closing(in_order(lambda item: _read(item, read, spec), items, most + threads, threads)) as images,
        closing(_judged(network, spec, _batches(images, most), most)) as judged,
        closing(in_order(lambda pair: finish(*pair), judged, max(most, threads), threads)) as finished,
    ):
        yield from finished


def in_order(
    function: Callable[[T], R], items: Iterable[T], most: int, threads: int = THREADS
) -> Generator[R, None, None]:
    """Yield `function(item)` for each item, in order, worked out by threads while the caller does other things.

    Args:
        function: called by several threads at once; what it raises is raised here, in its turn.
        items: gone through in the calling thread, no further ahead than `most`.
        most: how many items may be begun and not yet handed on.
        threads: how many work at once, each on one core: PyTorch starts no further threads inside of them.
    """
    pending: deque[Future[R]] = deque()
    with _one_core_each() as alone:
        pool = ThreadPoolExecutor(threads, thread_name_prefix=THREAD_NAME, initializer=alone)
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) == most:
                    yield pending[0].result()
                    pending.popleft()
            while pending:
                yield pending[0].result()
                pending.popleft()
        finally:
            # What has begun is waited for, but not for ever: a file on a dead mount is never read.
            begun = [future for future in pending if not future.cancel()]
            pool.shutdown(wait=not wait(begun, PATIENCE).not_done)


@contextmanager
def _one_core_each() -> Iterator[Callable[[], None]]:
    """Yield what a thread calls at its start so that PyTorch, called in it, computes in this one thread.

    Else each would have as many threads of its own as there are cores, and OpenMP's spin while they wait.
    """
    before = torch.get_num_threads()
    try:
        yield partial(torch.set_num_threads, 1)
    finally:
        # The number is each thread's own, but what was set last is also that of threads that come later.
        torch.set_num_threads(before)


def _read(item: T, read: Callable[[T], Image], spec: ModelSpec) -> _Read[T]:
    start = time.perf_counter()
    image: Image | FlawmaskError
    small = None
    try:
        image = read(item)
        small = resized(image, spec)
    except FlawmaskError as error:
        image = error
    padded = None if isinstance(image, FlawmaskError) else spec.padded(*image.shape[:2])
    return _Read(item, image, small, time.perf_counter() - start, padded)


def _batches(images: Iterable[_Read[T]], most: int) -> Generator[list[_Read[T]], None, None]:
    """Yield neighbours of one padded size together, at most so many; what could not be read fits anywhere."""
    batch: list[_Read[T]] = []
    for one in images:
        if len({each.padded for each in (*batch, one)} - {None}) > 1:
            yield batch
            batch = []
        batch.append(one)
        if len(batch) == most:
            yield batch
            batch = []
    if batch:
        yield batch


def _judged(
    network: nn.Module, spec: ModelSpec, batches: Iterable[list[_Read[T]]], at_once: int
) -> Generator[tuple[T, Seen | FlawmaskError], None, None]:
    for batch in batches:
        small = [one.resized for one in batch if one.resized is not None]
        sizes = [one.image.shape[:2] for one in batch if not isinstance(one.image, FlawmaskError)]
        start = time.perf_counter()
        inferred, at_once = _inferred(network, spec, small, sizes, at_once)
        found = iter(inferred)
        seconds = (time.perf_counter() - start) / max(len(small), 1)
        for one in batch:
            if isinstance(one.image, FlawmaskError):
                yield one.item, one.image
            else:
                yield one.item, Seen(one.image, next(found), one.seconds, seconds)


def _inferred(
    network: nn.Module, spec: ModelSpec, batch: list[Image], sizes: list[tuple[int, int]], at_once: int
) -> tuple[list[dict[str, Tensor]], int]:
    """Return what `infer_resized` finds on each image, and how many of them memory holds at once: at most `at_once`."""
    found: list[dict[str, Tensor]] = []
    before = at_once
    while len(found) < len(batch):
        part = slice(len(found), len(found) + at_once)
        try:
            found += infer_resized(network, spec, batch[part], sizes[part])
            continue
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or len(batch[part]) == 1:
                raise
        torch.cuda.empty_cache()  # outside the except clause, which would hold on to what had been allocated
        at_once = math.ceil(len(batch[part]) / 2)
    if at_once < before:
        log.warning("out of memory: going on with %d images at once", at_once)
    return found, at_once
