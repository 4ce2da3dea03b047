"""The parts of a running server, and the way of an image through them: decoded, resized, computed, answered."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from flawmask.images import encode_png
from flawmask.inference.backend import Image
from flawmask.inference.stream import THREADS, THREADS_BESIDE_GPU, one_core_each
from flawmask.inference.tiled import prediction_of
from flawmask.prediction import Prediction
from flawmask.serve import answers
from flawmask.serve.config import ServeConfig
from flawmask.serve.decoders import Decoders
from flawmask.serve.metrics import Metrics
from flawmask.serve.models import Loaded, Models, unsound
from flawmask.serve.queue import Batcher, Network, Places
from flawmask.serve.refused import Refused
from flawmask.serve.uploads import Upload

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class Server:
    """The parts of a running server.

    Attributes:
        config: its settings.
        metrics: what it counts.
        network: the thread that computes.
        places: the places for accepted images.
        models: the models by name.
        decoders: the processes that decode uploads.
        batcher: the queue before the network.
        tasks: what runs until the server ends: the batcher, and the watch on the models' files.
        threads: they resize images and make answers.
        ahead: how many images may be decoded and not yet answered. All others wait as they were sent.
        is_ready: whether the models are loaded and it is not being shut down.
    """

    config: ServeConfig
    metrics: Metrics = field(default_factory=Metrics)
    is_ready: bool = False

    def __post_init__(self) -> None:
        """Make the parts. Nothing runs yet."""
        self.network = Network()
        self.places = Places(self.config.max_queue, self.metrics)
        self.models = Models(self.config, self.network.run, self.metrics)
        self.decoders = Decoders(self.config.decoders, self.config.max_megapixels * 10**6)
        self.batcher = Batcher(self.network, self.config.wait_seconds, self.places, self.metrics)
        self.tasks: list[asyncio.Task[None]] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Load the models and start everything. At the end, stop it.

        Raises:
            FlawmaskError: a model cannot be used.
        """
        try:
            await asyncio.gather(self.decoders.start(), self.models.load_all())
            loaded = [one for name in self.models.names if (one := self.models.get(name)) is not None]
            count = THREADS if any(one.backend.uses_cores for one in loaded) else THREADS_BESIDE_GPU
            self.ahead = asyncio.Semaphore(2 * max(one.batch_size for one in loaded) + self.config.decoders + 1)
            with one_core_each() as alone, ThreadPoolExecutor(count, initializer=alone) as self.threads:
                self.tasks = [asyncio.create_task(self.batcher.run()), asyncio.create_task(self.models.watch())]
                self.is_ready = True
                yield
        finally:
            self.is_ready = False
            for task in self.tasks:
                task.cancel()
            self.decoders.stop()
            self.network.stop()

    @property
    def is_alive(self) -> bool:
        """Whether images can be computed: no part has ended or hangs."""
        return not self.network.hangs and not any(task.done() for task in self.tasks)

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Return the result of a function that a thread calls."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, function)

    async def predict(
        self, model: Loaded, upload: Upload, deadline: float, finish: Callable[[Image, Prediction], T]
    ) -> tuple[T, dict[str, float]]:
        """Return what `finish` makes of an image and its prediction, and the milliseconds of each stage.

        Raises:
            Refused: there is no verdict.
        """
        async with self.ahead:
            begun = time.monotonic()
            pixels = await self.decoders.decode(upload.data, upload.name, model.spec.intensity)
            small = await self.in_thread(lambda: model.prepare(pixels))
            decoded = time.monotonic()
            try:
                output = await self.batcher.infer(model, small, deadline)
            except Refused:
                raise
            except Exception as error:
                raise Refused(500, "network", f"the network failed: {type(error).__name__}") from error
            if problem := unsound(output.detections):
                raise Refused(500, "unsound", f"the network's numbers mean nothing: {problem}")
            computed = time.monotonic()

            def made() -> T:
                """Return the answer for one image; pasting its masks takes time, so a thread does it."""
                prediction = prediction_of(output.detections, model.spec, *pixels.shape[:2])
                limits = model.predictor
                return finish(
                    pixels,
                    replace(prediction, conf=limits.conf, min_area=limits.min_area, calibration=limits.calibration),
                )

            result = await self.in_thread(made)
        stages = {
            "decode": decoded - begun,
            "queue": output.queued,
            "network": output.network,
            "finish": time.monotonic() - computed,
        }
        for stage, seconds in stages.items():
            self.metrics.stages.labels(stage).observe(seconds)
        return result, {stage: round(1000 * seconds, 2) for stage, seconds in stages.items()}

    async def seen(self, model: Loaded, upload: Upload) -> bytes:
        """Return an image as a model sees it, as PNG.

        Raises:
            Refused: it is no image, cannot be read, or has too many pixels.
        """
        async with self.ahead:
            pixels = await self.decoders.decode(upload.data, upload.name, model.spec.intensity)
            return await self.in_thread(lambda: encode_png(pixels))

    async def answer(
        self,
        model: Loaded,
        upload: Upload,
        deadline: float,
        finish: Callable[[str, Prediction], dict[str, Any]],
    ) -> tuple[dict[str, Any], int]:
        """Return the answer for one image, and its status: 200 with a verdict."""
        try:
            answer, timings = await self.predict(model, upload, deadline, lambda _, found: finish(upload.name, found))
        except Exception as error:
            refused = error if isinstance(error, Refused) else _failure(error)
            self.count_refusal(refused, model)
            return answers.no_verdict(upload.name, refused.reason), refused.status
        self.count(model, answer["verdict"], answer["score"])
        return answer | {"timings_ms": timings}, 200

    def count(self, model: Loaded, verdict: str, score: float) -> None:
        """Count a verdict."""
        self.metrics.verdicts.labels(model.name, verdict).inc()
        self.metrics.scores.labels(model.name).observe(score)

    def count_refusal(self, refused: Refused, model: Loaded | None = None) -> None:
        """Count a refusal, and an image without a verdict."""
        self.metrics.refused.labels(refused.kind).inc()
        if model is not None:
            self.metrics.verdicts.labels(model.name, "none").inc()


def _failure(error: Exception) -> Refused:
    log.error("an image has no verdict", exc_info=error)
    return Refused(500, "server", f"the server failed: {type(error).__name__}")
