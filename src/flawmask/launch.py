"""What torchrun or `accelerate launch` says of the processes that it started, and what cores each has; light enough for
`--help` to import."""

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


def usable_cores() -> int:
    """Return how many cores the system lets this process use, of those that the machine has."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cores_of_each_process() -> int:
    """Return how many of these are left to each of the processes that were started together on this machine; 1 at
    least. A launcher that does not say how many there are has started one."""
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
