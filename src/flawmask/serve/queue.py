"""The queue before the network: a bounded number of images, batches of what arrives together, and deadlines.

Everything here runs in the event loop. Only the network itself runs in a thread, and there is one: a backend may be
called by one thread at a time.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TypeVar

from flawmask.inference.backend import Resized
from flawmask.inference.tiled import TiledDetections
from flawmask.launch import THREAD_NAME
from flawmask.prediction import RawDetections
from flawmask.serve.metrics import Metrics
from flawmask.serve.models import Loaded
from flawmask.serve.refused import Refused

log = logging.getLogger(__name__)

T = TypeVar("T")

RELENT = 0.9
"""What the expected time of a batch is multiplied by when an image is left out because of it. Otherwise one slow batch
could keep all later images out."""

STUCK = 120.0
"""Seconds after which a batch that is not done counts as hanging."""


class Network:
    """The one thread that computes. Models take turns in it.

    Attributes:
        turn: whoever has it may use the thread.
    """

    def __init__(self) -> None:
        """Start no thread yet: the first call does."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"{THREAD_NAME}-network")
        self._busy_since: float | None = None
        self.turn = asyncio.Lock()

    async def run(self, function: Callable[[], T]) -> T:
        """Return the result of a function that the thread calls when it is free."""
        async with self.turn:
            return await self.compute(function)

    async def compute(self, function: Callable[[], T]) -> T:
        """Return the result of a function that the thread calls. The caller has the `turn`."""

        def timed() -> T:
            self._busy_since = time.monotonic()
            try:
                return function()
            finally:
                self._busy_since = None

        return await asyncio.get_running_loop().run_in_executor(self._thread, timed)

    @property
    def hangs(self) -> bool:
        """Whether the thread has computed one thing for longer than `STUCK`."""
        since = self._busy_since
        return since is not None and time.monotonic() - since > STUCK

    def stop(self) -> None:
        """End the thread. If it hangs, the process ends without it."""
        self._thread.shutdown(wait=not self.hangs, cancel_futures=True)


class Places:
    """The places for images that are accepted and not yet answered."""

    def __init__(self, limit: int, metrics: Metrics) -> None:
        """Take the number of places."""
        self.limit, self.taken, self._metrics = limit, 0, metrics
        self.expected_seconds = 0.0
        """How long an image takes the network, as far as is known. It gives the `Retry-After`."""

    @contextmanager
    def taking(self) -> Iterator[Callable[[int], None]]:
        """Take a place, and yield a function that takes as many more. All are free again when the context ends.

        Raises:
            Refused: 503, there are not so many places.
        """
        mine = 0

        def take(count: int) -> None:
            """Take places for more images of this request, or raise `Refused` if there are not enough."""
            nonlocal mine
            if self.taken + count > self.limit:
                wait = max(1, math.ceil(self.taken * self.expected_seconds))
                reason = f"{self.taken} images are waiting, and {self.limit} may: send the image again later"
                raise Refused(503, "queue_full", reason, {"Retry-After": str(wait)})
            mine += count
            self.taken += count
            self._metrics.queue.set(self.taken)

        try:
            take(1)
            yield take
        finally:
            self.taken -= mine
            self._metrics.queue.set(self.taken)


@dataclass(frozen=True)
class Output:
    """The network's output for an image, and its seconds in the queue and in the network."""

    detections: RawDetections | TiledDetections
    queued: float
    network: float


@dataclass(eq=False)
class _Job:
    """An image that waits for the network."""

    model: Loaded
    image: Resized
    deadline: float
    result: asyncio.Future[Output]
    arrived: float = field(default_factory=time.monotonic)

    @property
    def kind(self) -> tuple[int, tuple[int, int]]:
        """What all images of a batch have in common: the model and the padded size."""
        return id(self.model), self.model.spec.padded(self.image.height, self.image.width)


class Batcher:
    """Makes batches of images that arrive together, the oldest first."""

    def __init__(self, network: Network, max_wait: float, places: Places, metrics: Metrics) -> None:
        """Take the network's thread and the seconds that an image waits for others."""
        self._network, self._max_wait, self._places, self._metrics = network, max_wait, places, metrics
        self._waiting: list[_Job] = []
        self._arrival = asyncio.Event()

    async def infer(self, model: Loaded, image: Resized, deadline: float) -> Output:
        """Return the network's output for an image.

        Args:
            model: the model.
            image: the image at the network's size.
            deadline: when the answer would be too late, in the seconds of `time.monotonic`.

        Raises:
            Refused: 504, the answer would be too late, and was not computed.
            Exception: whatever the backend raised.
        """
        job = _Job(model, image, deadline, asyncio.get_running_loop().create_future())
        self._waiting.append(job)
        self._arrival.set()
        return await job.result

    async def run(self) -> None:
        """Compute batches until cancelled."""
        while True:
            await self._gather()
            async with self._network.turn:  # only now is the batch chosen: clients may have left meanwhile
                await self._compute([job for job in self._take() if self._is_in_time(job)])

    async def _gather(self) -> None:
        """Wait until the oldest image has a full batch, or has waited long enough for one."""
        while not (batch := self._batch()):
            await self._next_arrival(None)
        first = batch[0]
        while len(self._batch()) < first.model.batch_size:
            patience = first.arrived + self._max_wait - time.monotonic()
            if patience <= 0:
                return
            await self._next_arrival(patience)

    async def _next_arrival(self, seconds: float | None) -> None:
        self._arrival.clear()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._arrival.wait(), seconds)

    def _batch(self) -> list[_Job]:
        """Return the oldest image and those that can share its batch; none if none waits."""
        self._waiting = [job for job in self._waiting if not job.result.done()]  # their clients left
        first = next(iter(self._waiting), None)
        if first is None:
            return []
        return [job for job in self._waiting if job.kind == first.kind][: first.model.batch_size]

    def _take(self) -> list[_Job]:
        batch = self._batch()
        self._waiting = [job for job in self._waiting if job not in batch]
        return batch

    def _is_in_time(self, job: _Job) -> bool:
        model = job.model
        if time.monotonic() + model.expected_seconds <= job.deadline:
            return True
        model.expected_seconds *= RELENT
        job.result.set_exception(Refused(504, "too_late", "the answer would be too late: it was not computed"))
        return False

    async def _compute(self, batch: list[_Job]) -> None:
        if not batch:
            return
        model = batch[0].model
        begun = time.monotonic()
        try:
            outputs = await self._network.compute(lambda: model.infer([job.image for job in batch]))
        except Exception as error:
            if len(batch) > 1:  # one image may have spoilt it for all
                for job in batch:
                    await self._compute([job])
            elif not batch[0].result.done():
                log.exception("the network failed")
                batch[0].result.set_exception(error)
            return
        seconds = time.monotonic() - begun
        model.expected_seconds, self._places.expected_seconds = seconds, seconds / len(batch)
        self._metrics.batches.observe(len(batch))
        for job, detections in zip(batch, outputs, strict=True):
            if not job.result.done():
                job.result.set_result(Output(detections, begun - job.arrived, seconds))
