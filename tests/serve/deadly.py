"""A file that ends the process that decodes it, as one does that makes a library crash."""

import os

import numpy as np
import numpy.typing as npt

from flawmask.images import Levels
from flawmask.serve import decoders

FILE = b"deadly"


def decode(data: bytes, name: str, levels: Levels) -> npt.NDArray[np.uint8] | decoders._Failure:
    """Decode a file, in a decoding process. The tests put it in the place of the real one, which it calls."""
    if data == FILE:
        os._exit(1)
    return _REAL(data, name, levels)


_REAL = decoders._decode
