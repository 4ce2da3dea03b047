"""What torchrun or `accelerate launch` says of the processes that it started, and what the system lets each use; light
enough for `--help` to import."""

import math
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

PROCESS = Path("/proc/self")
"""Where Linux says which control groups this process is in, and where they are mounted."""

THREAD_NAME = "flawmask-image"
"""What the names of threads begin with that read images and finish them."""

WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "20000"}
"""How the threads of OpenMP, with which PyTorch computes on a CPU, wait for each other: asleep, after a short look (the
number is libgomp's own). Left to themselves they spin for long, which keeps a thread that one of them waits for off the
core where other processes compute, too. Asleep at once, a training step alone took 13 % longer, and with this 2 %."""


KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "40000"}
"""How many kernels oneDNN keeps that it has compiled for PyTorch's convolutions on a CPU, one for each layer and shape.
Where images have many sizes, none of its own 1,024 is left when a size comes round again (docs/benchmarks.md)."""

_OWN: list[bool] = []


def set_environment() -> None:
    """Set what PyTorch, OpenCV and NumPy read from the environment when they are loaded, here and in processes started
    from here: how OpenMP's threads wait, how many kernels are kept and, where a control group allows fewer cores than
    these libraries see, how many threads they have. What is set already stays as it is; once torch is loaded, nothing
    is set."""
    if "torch" in sys.modules:
        return
    # Either of them says how threads wait: whoever has set one means that.
    wanted = KERNELS | ({} if WAITING.keys() & os.environ.keys() else WAITING)
    cores = usable_cores()
    if cores < visible_cores():
        wanted |= dict.fromkeys(("OMP_NUM_THREADS", "OPENCV_FOR_THREADS_NUM"), str(cores))
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def own_process() -> None:
    """Say that this process is Flawmask's own: the command line's, or one that it started. What holds for a whole
    process, such as how memory is kept and what Pillow warns of, is set in these alone, and not in a program that
    imports Flawmask."""
    _OWN.append(True)


def is_own_process() -> bool:
    """Return whether this process is Flawmask's own."""
    return bool(_OWN)


def world_size() -> int:
    """Return how many processes a launcher started together; 1 where there was none."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Return whether this is the first of them: the one that writes, prints and shows progress."""
    return int(os.environ.get("RANK", "0")) == 0


def local_rank() -> int:
    """Return which of its machine's processes this is: the number of the GPU that is its own."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def usable_cores(process: Path = PROCESS) -> int:
    """Return how many cores this process may use: those that it may run on, or, where less, as many as the tightest
    quota of its control groups, rounded up; 1 at least.

    Args:
        process: a folder with `cgroup` and `mountinfo` as in proc(5).
    """
    quotas = [_quota(group) for group in control_groups("cpu", process)]
    return max(1, math.ceil(min([visible_cores(), *quotas])))


def visible_cores() -> int:
    """Return how many cores the system lets this process run on, of those that the machine has."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quota(group: Path) -> float:
    """Return how many cores a control group may use, as time on cores by time; infinity where it has no limit."""
    with suppress(OSError, ValueError):  # the second version
        quota, period = (group / "cpu.max").read_text().split()
        return int(quota) / int(period)
    with suppress(OSError, ValueError):  # the first, where -1 is no limit
        quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    return math.inf


def control_groups(controller: str, process: Path = PROCESS) -> Iterator[Path]:
    """Yield the folders of the control groups whose limits bind this process, of cgroup v1 and v2 (cgroups(7)): its own
    and all around it, as far up as they are mounted. There are none but on Linux.

    Args:
        controller: what they limit, as cgroup v1 calls it: `cpu`, `memory`.
        process: a folder with `cgroup` and `mountinfo` as in proc(5).
    """
    try:
        # The names of other mounts may be of any encoding.
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
                # In a container, the path may be the host's, of which nothing but its end is mounted, or lead out of
                # what is mounted.
                is_inside = own.is_relative_to(root) and ".." not in own.parts
                below = own.relative_to(root) if is_inside else PurePosixPath()
                yield from (Path(mounted, part) for part in (below, *below.parents))


def cores_of_each_process() -> int:
    """Return how many of these are left to each of the processes that were started together on this machine; 1 at
    least. A launcher that does not say how many there are has started one."""
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
