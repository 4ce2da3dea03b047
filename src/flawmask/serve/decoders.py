"""Processes that decode uploaded images. A file that crashes a decoder takes no network with it."""

import asyncio
import logging
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flawmask import images
from flawmask.errors import FlawmaskError, TooManyPixelsError
from flawmask.images import Levels
from flawmask.launch import own_process
from flawmask.serve.refused import Refused

log = logging.getLogger(__name__)

TRIES = 2
"""How often an image is decoded if the process dies: the fault may be that of another image."""


@dataclass(frozen=True)
class _Failure:
    """Why an image was not decoded. An exception of another process would lose its attributes."""

    status: int
    kind: str
    reason: str


def _start(max_pixels: int) -> None:
    """Prepare a decoding process. It ends with the server, even if that is killed, and never before it."""
    own_process()
    os.environ[images.LIMIT_VARIABLE] = str(max_pixels)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group, and accepted images are answered
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _ready() -> None:
    """Do nothing: when it returns, a process has started."""


def _decode(data: bytes, name: str, levels: Levels) -> npt.NDArray[np.uint8] | _Failure:
    try:
        path = Path(name)  # a name for messages, which nobody opens
        return images.as_seen(images.decode(data, path), levels, path)
    except TooManyPixelsError:
        return _Failure(413, "pixels", f"{name} has more than {images.max_pixels() // 10**6} million pixels")
    except FlawmaskError as error:
        return _Failure(415, "no_image", str(error))
    except MemoryError:
        return _Failure(413, "memory", f"{name} does not fit into memory")


class Decoders:
    """A pool of decoding processes. If one dies, the pool is replaced."""

    def __init__(self, processes: int, max_pixels: int) -> None:
        """Take the number of processes and the number of pixels that an image may have. `start` starts them."""
        self._processes, self._max_pixels = processes, max_pixels
        self._pool: ProcessPoolExecutor | None = None

    async def start(self) -> None:
        """Start the processes, and wait until they are ready."""
        pool = self._renew(None)
        await asyncio.gather(*(asyncio.wrap_future(pool.submit(_ready)) for _ in range(self._processes)))

    async def decode(self, data: bytes, name: str, levels: Levels) -> npt.NDArray[np.uint8]:
        """Return an image as the network sees it, (height, width, 3) uint8 RGB.

        Args:
            data: the content of the file.
            name: what the client calls it, for messages. It is never opened.
            levels: the values that become black and white in images of more than 8 bits.

        Raises:
            Refused: it is no image, cannot be read, or has too many pixels.
        """
        for _ in range(TRIES):
            pool = self._pool
            assert pool is not None
            try:
                decoded = await asyncio.wrap_future(pool.submit(_decode, data, name, levels))
            except BrokenProcessPool:
                self._renew(pool)
                continue
            if isinstance(decoded, _Failure):
                raise Refused(decoded.status, decoded.kind, decoded.reason)
            return decoded
        raise Refused(415, "no_image", f"{name} cannot be read: the decoder ended while it read the file")

    def _renew(self, broken: ProcessPoolExecutor | None) -> ProcessPoolExecutor:
        """Replace a pool, unless another image has done so already, and return the new one."""
        if self._pool is None or self._pool is broken:
            if broken is not None:
                log.error("a decoding process ended while it read an image: starting it again")
                broken.shutdown(wait=False)
            # Not forked: a fork would copy the locks of PyTorch's threads.
            self._pool = ProcessPoolExecutor(
                self._processes, multiprocessing.get_context("spawn"), _start, (self._max_pixels,)
            )
        return self._pool

    def stop(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
