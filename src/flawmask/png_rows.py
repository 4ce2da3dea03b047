"""Writes a mask as a PNG file row by row: a large one is never in memory as a whole.

PNG (https://www.w3.org/TR/png-3) compresses rows one after the other. OpenCV and Pillow write only whole images.
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flawmask.masks import row_bands

SIGNATURE = b"\x89PNG\r\n\x1a\n"

GREY_8_BITS = (8, 0, 0, 0, 0)
"""Bits per pixel, the colour type grey, and the standard's only compression and filter, without interlacing."""

ROWS = 256
"""So many rows are in memory at a time."""


def write_mask(path: Path, rle: dict[str, Any]) -> None:
    """Write the mask of a compressed RLE as a grey PNG of 8 bits: 255 in the mask, 0 elsewhere."""
    height, width = rle["size"]
    with path.open("wb") as file:
        file.write(SIGNATURE + _chunk(b"IHDR", struct.pack(">II5B", width, height, *GREY_8_BITS)))
        for data in _compressed(rle):
            file.write(_chunk(b"IDAT", data))
        file.write(_chunk(b"IEND", b""))


def _compressed(rle: dict[str, Any]) -> Iterator[bytes]:
    packer = zlib.compressobj(1)
    for part in row_bands(rle, ROWS):
        # Each row begins with the number of its filter, 0 for none.
        rows = np.zeros((part.shape[0], part.shape[1] + 1), np.uint8)
        rows[:, 1:] = part * np.uint8(255)
        yield packer.compress(rows.tobytes())
    yield packer.flush()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
