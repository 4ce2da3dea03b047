"""Decode and encode the strokes of Label Studio's brush: the RLE of an RGBA picture whose alpha channel is the mask.

The format is that of thi.ng/rle-pack (https://github.com/thi-ng/umbrella/tree/develop/packages/rle-pack), a stream of
bits, highest bit first. The header holds the number of values (32 bits), the bits per value minus 1 (5 bits), and four
length sizes in bits minus 1 (4 bits each). Chunks follow. Each has a flag for a run (1 bit), the index of its length
size (2 bits), its length minus 1, and then the single value of the run, or as many values as its length says.
"""

from collections.abc import Sequence

import numpy as np

from flawmask.masks import Mask

CHANNELS = 4
SIZES = (3, 4, 8, 16)
"""The sizes of a length in bits; the same as those of rle-pack."""


def decode(values: Sequence[int], height: int, width: int) -> Mask:
    """Return the (height, width) mask of a brush's RLE.

    Args:
        values: the bytes, each 0 to 255.
        height: the height of the image in pixels.
        width: the width of the image in pixels.

    Raises:
        ValueError: this is not such an RLE, or it has another size.
    """
    bits = np.unpackbits(np.array(values, dtype=np.uint8))
    text = "".join(map(str, bits.tolist()))
    position = 0

    def number(size: int) -> int:
        nonlocal position
        position += size
        if position > len(text):
            raise ValueError("a brush's RLE that ends too early")
        return int(text[position - size : position], 2)

    count, size = number(32), number(5) + 1
    sizes = [number(4) + 1 for _ in SIZES]
    if count != height * width * CHANNELS:
        raise ValueError(f"a brush's RLE of {count // CHANNELS} pixels on an image of {width}x{height}")
    flat = np.zeros(count, dtype=bool)
    done = 0
    while done < count:
        is_run = number(1)
        length = number(sizes[number(2)]) + 1
        if is_run:
            flat[done : done + length] = number(size) > 0
        else:
            number(size * length)
            is_set = np.asarray(bits[position - size * length : position].reshape(length, size).any(axis=1))
            flat[done : done + length] = is_set[: count - done]
        done += length
    return flat.reshape(height, width, CHANNELS)[:, :, CHANNELS - 1]


def encode(mask: Mask) -> list[int]:
    """Return a (height, width) mask as a brush's RLE with runs only: bytes, each 0 to 255."""
    flat = np.repeat(mask.ravel(), CHANNELS)
    longest = 1 << SIZES[-1]
    ends = np.flatnonzero(np.diff(flat, append=not flat[-1])) + 1
    chunks = [f"{len(flat):032b}{7:05b}", *(f"{size - 1:04b}" for size in SIZES)]
    start = 0
    for end in ends.tolist():
        for first in range(start, end, longest):
            length = min(longest, end - first)
            chunks.append(f"1{len(SIZES) - 1:02b}{length - 1:016b}{255 * int(flat[first]):08b}")
        start = end
    bits = np.frombuffer("".join(chunks).encode(), dtype=np.uint8) - ord("0")
    packed: list[int] = np.packbits(bits).tolist()
    return packed
