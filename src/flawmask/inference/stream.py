"""Many images in a row: read ahead by threads, judged in batches by the calling thread, finished by threads again."""

import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from flawmask.errors import FlawmaskError
from flawmask.inference.backend import Backend, Image, Resized, resized
from flawmask.launch import THREAD_NAME, cores_of_each_process, usable_cores
from flawmask.model.spec import ModelSpec
from flawmask.prediction import Prediction, RawDetections, post_process

T = TypeVar("T")
R = TypeVar("R")

THREADS = min(4, usable_cores())
"""How many read, and how many finish, beside a network that computes on the same cores: Pillow, OpenCV and NumPy let go
of Python's lock while they work."""

MOST_THREADS = 8
"""However many cores there are: each thread holds an image, and a float32 copy of it while it is resized."""

THREADS_ALONE = max(THREADS, min(MOST_THREADS, cores_of_each_process()))
"""The same beside a network that leaves them all the cores."""

PATIENCE = 5.0
"""Seconds that are waited for threads that read or finish an image when the others are no longer wanted."""


@dataclass(frozen=True)
class Seen:
    """What the network saw on one image.

    Attributes:
        pixels: (height, width, 3) uint8 RGB.
        found: what the backend gave for it.
        read: seconds from file to pixels, and these resized.
        network: seconds of its batch, shared out equally.
    """

    pixels: Image
    found: RawDetections
    read: float
    network: float

    def prediction(self, spec: ModelSpec) -> Prediction:
        """Return what was found as instances, joined as the spec says."""
        return post_process(self.found, spec.classes, *self.pixels.shape[:2], join=spec.join)


@dataclass(frozen=True)
class _Read(Generic[T]):
    """An image as it is and as the network sees it, or why it cannot be judged; what it was read from, the seconds that
    it took, and the size that the image has in a batch."""

    item: T
    image: Image | FlawmaskError
    resized: Resized | None
    seconds: float
    padded: tuple[int, int] | None


def judge_all(
    backend: Backend,
    items: Iterable[T],
    read: Callable[[T], Image],
    finish: Callable[[T, Seen | FlawmaskError], R],
    batch_size: int | None = None,
) -> Generator[R, None, None]:
    """Yield what `finish` makes of each item, in their order.

    While the network judges a batch, threads read and resize the images of the next and finish those of the one before.
    Only images that follow each other and that have one size once they are padded share a batch: so none is padded for
    another, and results are those of one by one. About three batches of images are held at any time, or three images
    for each thread where that is more. Close the iterator to stop early.

    Args:
        backend: what runs the network; only the calling thread uses it.
        items: what the images come from; read in the calling thread.
        read: an item to (height, width, 3) uint8 RGB. A FlawmaskError is handed to `finish`; any other stops it all.
        finish: item and what was seen, or why nothing was, to the result. Called by several threads at once.
        batch_size: the most images of a batch; by default as many as the backend says.
    """
    most = batch_size or backend.batch_size
    threads = THREADS if backend.uses_cores else THREADS_ALONE
    with (
        closing(in_order(lambda item: _read(item, read, backend.spec), items, most + threads, threads)) as images,
        closing(_judged(backend, _batches(images, most))) as judged,
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

    Else each would have as many threads of its own as there are cores, and OpenMP's spin while they wait. Where PyTorch
    is not loaded, no thread calls it.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        yield _nothing
        return
    before = torch.get_num_threads()
    try:
        yield partial(torch.set_num_threads, 1)
    finally:
        # The number is each thread's own, but what was set last is also that of threads that come later.
        torch.set_num_threads(before)


def _nothing() -> None:
    """Do nothing."""


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
    backend: Backend, batches: Iterable[list[_Read[T]]]
) -> Generator[tuple[T, Seen | FlawmaskError], None, None]:
    for batch in batches:
        there = [one.resized for one in batch if one.resized is not None]
        start = time.perf_counter()
        found = iter(backend.infer(there) if there else [])
        seconds = (time.perf_counter() - start) / max(len(there), 1)
        for one in batch:
            if isinstance(one.image, FlawmaskError):
                yield one.item, one.image
            else:
                yield one.item, Seen(one.image, next(found), one.seconds, seconds)
