"""The peak memory of this process."""

import resource
import sys
from pathlib import Path


def peak_megabytes() -> float:
    """Return the peak memory in MB, imports included."""
    status = Path("/proc/self/status")
    if status.is_file():  # on Linux, getrusage would include the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
