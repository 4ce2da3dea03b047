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
"""How often an image is decoded if the process dies: it may have been killed before it had the image."""


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
    """Decoding processes. Each has one image at a time, so a file that ends one takes no other image with it."""

    def __init__(self, processes: int, max_pixels: int) -> None:
        """Take the number of processes and the number of pixels that an image may have. `start` starts them."""
        self._processes, self._max_pixels = processes, max_pixels
        self._pools: set[ProcessPoolExecutor] = set()
        self._free: asyncio.Queue[ProcessPoolExecutor] = asyncio.Queue()

    async def start(self) -> None:
        """Start the processes, and wait until they are ready."""
        pools = [self._new_process() for _ in range(self._processes)]
        await asyncio.gather(*(asyncio.wrap_future(pool.submit(_ready)) for pool in pools))
        for pool in pools:
            self._free.put_nowait(pool)

    async def decode(self, data: bytes, name: str, levels: Levels) -> npt.NDArray[np.uint8]:
        """Return an image as the network sees it, (height, width, 3) uint8 RGB.

        Args:
            data: the content of the file.
            name: what the client calls it, for messages. It is never opened.
            levels: the values that become black and white in images of more than 8 bits.

        Raises:
            Refused: it is no image, cannot be read, or has too many pixels.
        """
        pool = await self._free.get()
        # Shielded: if the client leaves, the process is busy nevertheless, and is free only when it has finished.
        decoded = await asyncio.shield(asyncio.ensure_future(self._decode_in(pool, data, name, levels)))
        if isinstance(decoded, _Failure):
            raise Refused(decoded.status, decoded.kind, decoded.reason)
        return decoded

    async def _decode_in(
        self, pool: ProcessPoolExecutor, data: bytes, name: str, levels: Levels
    ) -> npt.NDArray[np.uint8] | _Failure:
        """Return what a process makes of an image, or a new one if it ends. Then it is free."""
        try:
            for _ in range(TRIES):
                try:
                    return await asyncio.wrap_future(pool.submit(_decode, data, name, levels))
                except BrokenProcessPool:
                    log.error("a decoding process ended: starting another")
                    pool.shutdown(wait=False)
                    self._pools.discard(pool)
                    pool = self._new_process()
            return _Failure(415, "no_image", f"{name} cannot be read: the decoder ended while it read the file")
        finally:
            self._free.put_nowait(pool)

    def _new_process(self) -> ProcessPoolExecutor:
        """Return a pool of one process. A pool of several ends all of them if one dies."""
        # Not forked: a fork would copy the locks of PyTorch's threads.
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _start, (self._max_pixels,))
        self._pools.add(pool)
        return pool

    def stop(self) -> None:
        """End the processes."""
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)
