"""Images decoded and resized once, kept in a file that all reading processes map into memory."""

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
LARGEST_SHARE_OF_DISK = 0.5
"""How much of what is free on the disk a cache may take."""


class PixelCache:
    """One slot of bytes for each (height, width, 3) uint8 image, in a file; what does not fit has none.

    The operating system keeps as much of the file in memory as there is room for. Processes may read and fill slots at
    the same time: a slot's flag is set after its pixels are there, and all who fill it write the same.
    """

    def __init__(self, path: Path, shapes: Sequence[tuple[int, int]], limit: int) -> None:
        """Lay out the file; nothing is written but its size.

        Args:
            path: the file, which is made.
            shapes: height and width of each image as it is to be kept.
            limit: the most bytes that the file may have; images beyond it are not kept.
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
                # A hole in the file would end the process when a full disk cannot fill it.
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the mapping behind: each process makes its own of the same file."""
        return self.__dict__ | {"_bytes": None}

    def get(self, place: int) -> npt.NDArray[np.uint8] | None:
        """Return the (height, width, 3) image at a place, to be read only; None where it is not there yet."""
        if place >= self.kept or not self._mapped()[self._flag(place)]:
            return None
        return self._slot(place)

    def put(self, place: int, pixels: npt.NDArray[np.uint8]) -> None:
        """Keep an image, if it has a slot.

        Raises:
            ValueError: it is of another shape than was said.
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
    """Give a cache in the system's folder for temporary files, and delete it at the end.

    Args:
        shapes: height and width of each image as it is to be kept.
        gigabytes: the most that it may take; half of what is free on the disk is the most in any case.
    """
    with _temporary_folder() as folder:
        free = shutil.disk_usage(folder).free
        limit = int(min(gigabytes * GIGABYTE, LARGEST_SHARE_OF_DISK * free))
        path = folder / "pixels"
        try:
            cache = PixelCache(path, shapes, limit)
        except OSError as error:
            log.info("no images are kept decoded: %s cannot be made (%s)", path, error.strerror)
            path.unlink(missing_ok=True)
            cache = PixelCache(path, shapes, 0)
        if cache.kept < len(shapes) and gigabytes:
            log.info("%d of %d images are kept decoded; --cache_gb has room for no more", cache.kept, len(shapes))
        yield cache


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """Give a new folder, and delete it at the end, with those that processes which were killed have left."""
    root, prefix = Path(tempfile.gettempdir()), f"flawmask_pixels_{this_user()}_"
    for left in root.glob(f"{prefix}*"):
        with suppress(FlawmaskError, OSError), folder_lock(left):  # of a process that lives, or gone just now
            shutil.rmtree(left)
    folder = root / f"{prefix}{secrets.token_hex(8)}"
    with folder_lock(folder):
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
