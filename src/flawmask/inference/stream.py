"""Predict many images: threads read them ahead, the calling thread runs the network in batches, and threads make the
results."""

import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from flawmask.errors import FlawmaskError
from flawmask.inference.backend import Backend, Image, Resized, infer_tiles, prepared
from flawmask.inference.tiled import TiledDetections, prediction_of
from flawmask.launch import THREAD_NAME, cores_of_each_process, usable_cores
from flawmask.model.spec import ModelSpec
from flawmask.prediction import Prediction, RawDetections
from flawmask.strips import StripImage
from flawmask.tiles import Window

T = TypeVar("T")
R = TypeVar("R")

THREADS = min(4, usable_cores())
"""The number of threads that read, and of threads that make results, beside a network on the same CPU cores. Threads
help because Pillow, OpenCV and NumPy release Python's lock while they work."""

MAX_THREADS = 8
"""The most threads, however many cores there are: each holds an image and, while resizing, a float32 copy of it."""

THREADS_BESIDE_GPU = max(THREADS, min(MAX_THREADS, cores_of_each_process()))
"""The number of threads beside a network on a GPU, which leaves them all CPU cores."""

IMAGES_AHEAD = 2
"""With tiles, so many images are read ahead, and so many results are made at a time. Such images are large."""

SHUTDOWN_TIMEOUT = 5.0
"""Seconds to wait for running threads when the iterator is closed early."""


@dataclass(frozen=True)
class NetworkOutput:
    """The network's output for one image.

    Attributes:
        pixels: the image, (height, width, 3) uint8 RGB; a smaller picture of an image that was read in strips.
        detections: the backend's detections; those of all its tiles.
        read: seconds to read and resize the image.
        network: seconds of its batch, divided by the number of images; the sum over its tiles.
        size: height and width of an image that was read in strips; None if they are those of `pixels`.
    """

    pixels: Image
    detections: RawDetections | TiledDetections
    read: float
    network: float
    size: tuple[int, int] | None = None

    def prediction(self, spec: ModelSpec) -> Prediction:
        """Return the prediction for the image, with its instances joined as the spec says."""
        height, width = self.size or self.pixels.shape[:2]
        return prediction_of(self.detections, spec, height, width)


@dataclass(frozen=True)
class _Read(Generic[T]):
    """An image that was read: the item that it came from; the image, or the error; the image resized for the network;
    the seconds that reading took; and its padded size in a batch."""

    item: T
    image: Image | FlawmaskError
    resized: Resized | None
    seconds: float
    padded: tuple[int, int] | None


def predict_all(
    backend: Backend,
    items: Iterable[T],
    read: Callable[[T], Image | StripImage],
    finish: Callable[[T, NetworkOutput | FlawmaskError], R],
    batch_size: int | None = None,
) -> Generator[R, None, None]:
    """Yield the result of `finish` for each item, in their order.

    While the network runs on a batch, threads read and resize the next images and finish the previous ones. A batch
    holds only consecutive images of the same padded size. So no image is padded because of another one, and results do
    not depend on the batch. About three batches of images are in memory at a time, or three images for each thread if
    that is more. Close the iterator to stop early.

    With a network that sees tiles, a batch holds tiles of one image. About four images are in memory at a time, or as
    many strips of images that are read in strips.

    Args:
        backend: runs the network; only the calling thread uses it.
        items: the sources of the images; only the calling thread iterates over them.
        read: returns the image of an item, (height, width, 3) uint8 RGB, or, only with tiles, a file to read in strips.
            If it raises a FlawmaskError, `finish` gets the error. Any other error ends the iteration.
        finish: returns the result for an item and the network's output or the error. Several threads call it.
        batch_size: the largest batch; by default the backend's own.
    """
    max_batch = batch_size or backend.batch_size
    threads = THREADS if backend.uses_cores else THREADS_BESIDE_GPU
    in_tiles = backend.spec.tile is not None
    ahead, behind = (IMAGES_AHEAD, IMAGES_AHEAD) if in_tiles else (max_batch + threads, max(max_batch, threads))
    with ExitStack() as stack:
        if in_tiles:
            opened = stack.enter_context(closing(map_in_order(partial(_open, read=read), items, ahead, threads)))
            outputs = stack.enter_context(closing(_run_on_tiles(backend, opened, max_batch, threads)))
        else:
            whole = partial(_read, read=read, backend=backend)
            images = stack.enter_context(closing(map_in_order(whole, items, ahead, threads)))
            outputs = stack.enter_context(closing(_run_network(backend, _batches(images, max_batch))))
        yield from stack.enter_context(closing(map_in_order(lambda pair: finish(*pair), outputs, behind, threads)))


def map_in_order(
    function: Callable[[T], R], items: Iterable[T], max_pending: int, threads: int = THREADS
) -> Generator[R, None, None]:
    """Yield `function(item)` for each item, in order. Threads compute it while the caller does other things.

    Args:
        function: called by several threads. Its errors are raised here, when it is the item's turn.
        items: iterated in the calling thread, at most `max_pending` items ahead.
        max_pending: the most items that are started and not yet yielded.
        threads: the number of threads. Each uses one core: PyTorch starts no further threads inside them.
    """
    pending: deque[Future[R]] = deque()
    with one_core_each() as alone:
        pool = ThreadPoolExecutor(threads, thread_name_prefix=THREAD_NAME, initializer=alone)
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) == max_pending:
                    yield pending[0].result()
                    pending.popleft()
            while pending:
                yield pending[0].result()
                pending.popleft()
        finally:
            # Wait for running calls, but not forever: reading a file on a dead mount never ends.
            running = [future for future in pending if not future.cancel()]
            pool.shutdown(wait=not wait(running, SHUTDOWN_TIMEOUT).not_done)


@contextmanager
def one_core_each() -> Iterator[Callable[[], None]]:
    """Yield a function that a thread calls when it starts. It limits PyTorch to that one thread.

    Without it, PyTorch would start as many threads inside each thread as there are cores, and OpenMP's threads use
    their cores even while they wait. Where PyTorch is not loaded, the function does nothing.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        yield _nothing
        return
    before = torch.get_num_threads()
    try:
        yield partial(torch.set_num_threads, 1)
    finally:
        # The limit holds for one thread, but threads that start later take the limit that was set last.
        torch.set_num_threads(before)


def _nothing() -> None:
    """Do nothing."""


def _read(item: T, read: Callable[[T], Image | StripImage], backend: Backend) -> _Read[T]:
    start = time.perf_counter()
    image: Image | FlawmaskError
    small = None
    try:
        whole = read(item)
        assert not isinstance(whole, StripImage)  # such an image is never in memory as a whole
        image, small = whole, prepared(whole, backend)
    except FlawmaskError as error:
        image = error
    padded = None if isinstance(image, FlawmaskError) else backend.spec.padded(*image.shape[:2])
    return _Read(item, image, small, time.perf_counter() - start, padded)


def _batches(images: Iterable[_Read[T]], max_batch: int) -> Generator[list[_Read[T]], None, None]:
    """Yield batches of consecutive images of one padded size. An image that could not be read fits into any batch."""
    batch: list[_Read[T]] = []
    for one in images:
        if len({each.padded for each in (*batch, one)} - {None}) > 1:
            yield batch
            batch = []
        batch.append(one)
        if len(batch) == max_batch:
            yield batch
            batch = []
    if batch:
        yield batch


def _run_network(
    backend: Backend, batches: Iterable[list[_Read[T]]]
) -> Generator[tuple[T, NetworkOutput | FlawmaskError], None, None]:
    for batch in batches:
        images = [one.resized for one in batch if one.resized is not None]
        start = time.perf_counter()
        detections = iter(backend.infer(images) if images else [])
        seconds = (time.perf_counter() - start) / max(len(images), 1)
        for one in batch:
            if isinstance(one.image, FlawmaskError):
                yield one.item, one.image
            else:
                yield one.item, NetworkOutput(one.image, next(detections), one.seconds, seconds)


def _open(item: T, read: Callable[[T], Image | StripImage]) -> tuple[T, Image | StripImage | FlawmaskError, float]:
    """Return the item, its image or the error, and the seconds that reading took."""
    start = time.perf_counter()
    image: Image | StripImage | FlawmaskError
    try:
        image = read(item)
    except FlawmaskError as error:
        image = error
    return item, image, time.perf_counter() - start


def _run_on_tiles(
    backend: Backend,
    images: Iterable[tuple[T, Image | StripImage | FlawmaskError, float]],
    max_batch: int,
    threads: int,
) -> Generator[tuple[T, NetworkOutput | FlawmaskError], None, None]:
    def read_ahead(read: Callable[[Window], Resized], windows: Iterable[Window]) -> Generator[Resized, None, None]:
        return map_in_order(read, windows, max_batch + threads, threads)

    for item, image, seconds in images:
        result: NetworkOutput | FlawmaskError
        if isinstance(image, FlawmaskError):
            result = image
        else:
            try:
                seen = infer_tiles(backend, image, max_batch, read_ahead)
                size = seen.size if isinstance(image, StripImage) else None
                result = NetworkOutput(seen.picture, seen.detections, seconds + seen.read, seen.network, size)
            except FlawmaskError as error:  # a damaged file shows only when its last strip is read
                result = error
        yield item, result
