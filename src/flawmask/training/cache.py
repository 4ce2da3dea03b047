"""A cache of decoded and resized images: one file that all reading processes map into memory."""

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flawmask.errors import FlawmaskError
from flawmask.files import folder_lock, this_user

log = logging.getLogger(__name__)

GIGABYTE = 10**9
MAX_SHARE_OF_DISK = 0.5
"""The largest share of the free disk space that a cache may take."""


class PixelCache:
    """A file with a slot for each (height, width, 3) uint8 image. Images beyond its size limit have no slot.

    The operating system keeps as much of the file in memory as there is room for. Several processes may read and fill
    slots at the same time: a slot's flag is set only after its pixels are written, and every process writes the same
    pixels.
    """

    def __init__(self, path: Path, shapes: Sequence[tuple[int, int]], limit: int) -> None:
        """Make an empty file of the right size.

        Args:
            path: the file to make.
            shapes: height and width of each resized image.
            limit: the largest size of the file in bytes; images beyond it are not cached.
        """
        self.path = path
        self.shapes = list(shapes)
        ends = np.cumsum([height * width * 3 for height, width in shapes], dtype=np.int64)
        self.kept = int(np.searchsorted(ends, max(0, limit - len(shapes)), side="right"))
        self._starts: list[int] = [0, *ends.tolist()]
        self._bytes: npt.NDArray[np.uint8] | None = None
        with path.open("wb") as file:
            size = self._starts[self.kept] + self.kept
            if size and hasattr(os, "posix_fallocate"):
                # Reserve the space now. A write into a hole of a sparse file would kill the process on a full disk.
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the memory map out: each process maps the file itself."""
        return self.__dict__ | {"_bytes": None}

    def get(self, place: int) -> npt.NDArray[np.uint8] | None:
        """Return the (height, width, 3) image at a place, not to be written to. None where it is not cached yet."""
        if place >= self.kept or not self._mapped()[self._flag(place)]:
            return None
        return self._slot(place)

    def put(self, place: int, pixels: npt.NDArray[np.uint8]) -> None:
        """Write an image into its slot, if it has one.

        Raises:
            ValueError: the image has another shape than its slot.
        """
        if place < self.kept:
            self._slot(place)[...] = pixels
            self._mapped()[self._flag(place)] = 1

    def _flag(self, place: int) -> int:
        return self._starts[self.kept] + place

    def _slot(self, place: int) -> npt.NDArray[np.uint8]:
        return self._mapped()[self._starts[place] : self._starts[place + 1]].reshape(*self.shapes[place], 3)

    def _mapped(self) -> npt.NDArray[np.uint8]:
        if self._bytes is None:
            self._bytes = np.memmap(self.path, dtype=np.uint8, mode="r+")
        return self._bytes


@contextmanager
def pixel_cache(shapes: Sequence[tuple[int, int]], gigabytes: float) -> Iterator[PixelCache]:
    """Yield a cache in the system's folder for temporary files, and delete it at the end.

    Args:
        shapes: height and width of each resized image.
        gigabytes: the largest size of the cache. It never takes more than half of the free disk space.
    """
    with _temporary_folder() as folder:
        free = shutil.disk_usage(folder).free
        limit = int(min(gigabytes * GIGABYTE, MAX_SHARE_OF_DISK * free))
        path = folder / "pixels"
        try:
            cache = PixelCache(path, shapes, limit)
        except OSError as error:
            log.info("decoded images are not cached: %s cannot be made (%s)", path, error.strerror)
            path.unlink(missing_ok=True)
            cache = PixelCache(path, shapes, 0)
        if cache.kept < len(shapes) and gigabytes:
            log.info("%d of %d decoded images are cached; --cache_gb has no room for more", cache.kept, len(shapes))
        yield cache


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """Yield a new folder, and delete it at the end. First delete the folders of earlier processes that were killed."""
    root, prefix = Path(tempfile.gettempdir()), f"flawmask_pixels_{this_user()}_"
    for leftover in root.glob(f"{prefix}*"):
        # An error means that its process is still running, or that somebody else has just deleted it.
        with suppress(FlawmaskError, OSError), folder_lock(leftover):
            shutil.rmtree(leftover)
    folder = root / f"{prefix}{secrets.token_hex(8)}"
    with folder_lock(folder):
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
