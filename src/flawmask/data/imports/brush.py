"""The strokes of Label Studio's brush: RLE of an RGBA picture, whose alpha channel is the mask.

The format is that of thi.ng/rle-pack (https://github.com/thi-ng/umbrella/tree/develop/packages/rle-pack): a stream of
bits, the highest first. It begins with the number of values (32 bits), the bits of a value less 1 (5), and four sizes
in bits less 1 (4 each). Chunks follow: whether it is a run (1), which of the sizes its length has (2), the length less
1, and the one value of the run or as many values as the length says.
"""

from collections.abc import Sequence

import numpy as np

from flawmask.masks import Mask

CHANNELS = 4
SIZES = (3, 4, 8, 16)
"""Bits of a length, as rle-pack itself has them."""


def decode(values: Sequence[int], height: int, width: int) -> Mask:
    """Return the (height, width) mask of a brush's RLE.

    Args:
        values: the bytes, each 0 to 255.
        height: the image's, in pixels.
        width: the image's, in pixels.

    Raises:
        ValueError: it is no such RLE, or of an image of another size.
    """
    bits = np.unpackbits(np.array(values, dtype=np.uint8))
    text = "".join(map(str, bits.tolist()))
    at = 0

    def number(size: int) -> int:
        nonlocal at
        at += size
        if at > len(text):
            raise ValueError("a brush's RLE that ends too early")
        return int(text[at - size : at], 2)

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
            found = np.asarray(bits[at - size * length : at].reshape(length, size).any(axis=1))
            flat[done : done + length] = found[: count - done]
        done += length
    return flat.reshape(height, width, CHANNELS)[:, :, CHANNELS - 1]


def encode(mask: Mask) -> list[int]:
    """Return a (height, width) mask as a brush's RLE, in runs alone: bytes, each 0 to 255."""
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
