"""What a process knows of its launcher (torchrun or `accelerate launch`), and how many cores the system lets it use.

This module imports nothing heavy, because `--help` imports it.
"""

import math
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

PROCESS = Path("/proc/self")
"""The folder in which Linux lists the control groups of this process and their mounts."""

THREAD_NAME = "flawmask-image"
"""Threads that read or post-process images have names that begin with this."""

WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "20000"}
"""How the threads of OpenMP wait for each other: they spin briefly, then sleep. PyTorch computes with them on a CPU.

By default they spin for long. Where other processes compute on the same cores, a spinning thread then keeps the very
thread that it waits for off the core. Threads that sleep at once made a training step 13 % longer on an idle machine;
with these values it is 2 %. The number is libgomp's own unit."""


KERNEL_CACHE = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "40000"}
"""How many compiled kernels oneDNN keeps for convolutions on a CPU: it compiles one for each layer and shape. Its
default is 1,024. Where images have many sizes, a kernel is then gone before its size returns (docs/benchmarks.md)."""

_OWN: list[bool] = []


def set_environment() -> None:
    """Set the environment variables that PyTorch, OpenCV and NumPy read when they are loaded.

    They say how OpenMP's threads wait and how many kernels oneDNN keeps. Where a control group allows fewer cores than
    these libraries see, they also limit the threads. Processes started from here inherit them. A variable that is set
    already keeps its value. Once torch is loaded, nothing is set.
    """
    if "torch" in sys.modules:
        return
    # Each of the two says how threads wait: if the user has set one, that is the wish.
    variables = KERNEL_CACHE | ({} if WAITING.keys() & os.environ.keys() else WAITING)
    cores = usable_cores()
    if cores < visible_cores():
        variables |= dict.fromkeys(("OMP_NUM_THREADS", "OPENCV_FOR_THREADS_NUM"), str(cores))
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def own_process() -> None:
    """Mark this process as Flawmask's own: it runs the command line, or was started by it.

    Settings of a whole process, such as glibc's memory and Pillow's warnings, are changed in such processes only. A
    program that imports Flawmask is left as it is.
    """
    _OWN.append(True)


def is_own_process() -> bool:
    """Return whether this process is Flawmask's own."""
    return bool(_OWN)


def world_size() -> int:
    """Return how many processes a launcher started together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Return whether this is the main process: the one that writes, prints and shows progress."""
    return int(os.environ.get("RANK", "0")) == 0


def local_rank() -> int:
    """Return the number of this process among those on its machine. Its GPU has the same number."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def usable_cores(process: Path = PROCESS) -> int:
    """Return how many cores this process may use, at least 1.

    That is the smaller of two numbers: the cores that it may run on, and the tightest quota of its control groups,
    rounded up.

    Args:
        process: a folder with `cgroup` and `mountinfo` as in proc(5).
    """
    quotas = [_quota(group) for group in control_groups("cpu", process)]
    return max(1, math.ceil(min([visible_cores(), *quotas])))


def visible_cores() -> int:
    """Return how many of the machine's cores the system lets this process run on."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quota(group: Path) -> float:
    """Return how many cores a control group may use: core time per period. Infinity without a limit."""
    with suppress(OSError, ValueError):  # cgroup v2
        quota, period = (group / "cpu.max").read_text().split()
        return int(quota) / int(period)
    with suppress(OSError, ValueError):  # cgroup v1, where -1 means no limit
        quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    return math.inf


def control_groups(controller: str, process: Path = PROCESS) -> Iterator[Path]:
    """Yield the folders of the control groups whose limits apply to this process: its own and all parents that are
    mounted. Both cgroup v1 and v2 are read (cgroups(7)). Outside Linux there are none.

    Args:
        controller: the limited resource, as cgroup v1 calls it: `cpu`, `memory`.
        process: a folder with `cgroup` and `mountinfo` as in proc(5).
    """
    try:
        # The names of other mounts may have any encoding.
        groups, mounts = (
            [line.split(between, 2) for line in (process / name).read_text(errors="surrogateescape").splitlines()]
            for name, between in (("cgroup", ":"), ("mountinfo", " - "))
        )
    except OSError:
        return
    for _, controllers, path in groups:
        for place, (kind, *_, options) in ((before.split(), after.split()) for before, after in mounts):
            is_second = kind == "cgroup2" and not controllers
            is_first = kind == "cgroup" and controller in controllers.split(",") and controller in options.split(",")
            if is_first or is_second:
                root, mounted = place[3:5]
                own = PurePosixPath(path)
                # In a container, the path may be the host's, of which only the end is mounted. Or it may lead out of
                # the mount.
                is_inside = own.is_relative_to(root) and ".." not in own.parts
                below = own.relative_to(root) if is_inside else PurePosixPath()
                yield from (Path(mounted, part) for part in (below, *below.parents))


def cores_of_each_process() -> int:
    """Return the usable cores divided by the processes that a launcher started on this machine, at least 1.

    Where the launcher does not say how many processes there are, it has started one.
    """
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
