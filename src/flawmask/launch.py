"""What torchrun or `accelerate launch` says of the processes that it started; light enough for `--help` to import."""

import os


def launched() -> int:
    """Return how many processes a launcher started together; 1 where there was none."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Return whether this is the first of them: the one that writes, prints and shows progress."""
    return int(os.environ.get("RANK", "0")) == 0


def local_rank() -> int:
    """Return which of its machine's processes this is: the number of the GPU that is its own."""
    return int(os.environ.get("LOCAL_RANK", "0"))
