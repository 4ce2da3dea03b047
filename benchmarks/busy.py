"""Times training and inference on a busy machine, and start-up, and prints a section of docs/benchmarks.md.

    python benchmarks/busy.py                  # about 20 minutes on two cores of an otherwise idle machine
    python benchmarks/busy.py --parts start

There is one busy process per core. Compared measurements take turns, each in a process of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from inference import sparing_network
from measuring import Record, demo_at, measured_here, table
from training import flawmask_step, timed

from flawmask.launch import WAITING, usable_cores

IMAGES, SIZE, TRAINED_SIZE, BATCH = 20, 256, 160, 4
"""The number of images for `predict`, their size, and the batch of a training step."""

LEFT_ALONE = {"GOMP_SPINCOUNT": "300000"}
"""libgomp's default number of spins before an OpenMP thread sleeps."""

WAYS = {"Flawmask": WAITING, "threads that spin": WAITING | LEFT_ALONE}
"""The environment variables of each case."""

THREADS = """
import os, sys
from pathlib import Path
from flawmask import launch
launch.usable_cores.__defaults__ = (Path(sys.argv[1]),)
launch.set_environment()
import cv2, torch
from flawmask.inference.stream import THREADS
print(torch.get_num_threads(), cv2.getNumThreads(), THREADS)
"""
"""Prints the numbers of PyTorch's, OpenCV's and reading threads, with the control groups that a folder describes."""


def main() -> None:
    """Print the section, or measure once when called by itself with `--measure`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds; the median is shown")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    options = parser.parse_args()
    if measured_here(options, {"step": measure_step}):
        return
    print("## A busy machine, and a container")
    with tempfile.TemporaryDirectory() as name:
        for part in options.parts:
            PARTS[part](Path(name), options.rounds)


def print_busy(folder: Path, rounds: int) -> None:
    """Print the time of a step and of `predict`: alone, and beside one busy process per core."""
    data = demo_at(folder, SIZE)
    step = {"what": "step", "data": str(data), "device": "cpu"}
    tried: dict[str, Callable[[Record], float]] = {
        f"a training step, ResNet-18, {TRAINED_SIZE} px, batch {BATCH}": lambda way: step_seconds(step, way),
        f"`predict` of {IMAGES} images, ResNet-50, {SIZE} px, start-up included": lambda way: command_seconds(
            predict_command(folder, data, IMAGES), way
        ),
    }
    rows = []
    for title, seconds in tried.items():
        alone: dict[str, list[float]] = {name: [] for name in WAYS}
        busy: dict[str, list[float]] = {name: [] for name in WAYS}
        for _ in range(rounds):
            for name, way in WAYS.items():
                alone[name].append(seconds(way))
            with busy_processes(usable_cores()):
                for name, way in WAYS.items():
                    busy[name].append(seconds(way))
        for name in WAYS:
            paired = zip(alone[name], alone["threads that spin"], strict=True)
            medians = statistics.median(alone[name]), statistics.median(busy[name])
            rows.append(
                [
                    title if name == "Flawmask" else "",
                    name,
                    f"{medians[0]:.2f}",
                    f"{statistics.median(one / other for one, other in paired):.3f}",
                    f"{medians[1]:.2f}",
                    f"{medians[1] / medians[0]:.2f}",
                ]
            )
    print(
        f"\n### Beside busy processes\n\nEach program ran alone, and then beside {usable_cores()} busy processes, "
        "one for each core. `threads that spin` is OpenMP's default, which earlier versions of Flawmask did not "
        f"change. The ratio compares the runs alone: it is the median of {rounds} pairs. The seconds are medians.\n"
    )
    print(table(["", "", "s alone", "ratio to spinning", "s beside", "times as long as alone"], rows))


def print_start(folder: Path, rounds: int) -> None:
    """Print the start-up time of commands, with a warm file cache."""
    commands = {
        "`flawmask --help`": [sys.executable, "-m", "flawmask", "--help"],
        "`flawmask predict` of one image, ResNet-50": predict_command(folder, demo_at(folder, SIZE), 1),
    }
    rows = []
    for name, command in commands.items():
        command_seconds(command, WAITING)
        seconds = [command_seconds(command, WAITING) for _ in range(rounds)]
        rows.append([name, f"{statistics.median(seconds):.2f}", f"{max(seconds):.2f}"])
    print(f"\n### Start-up\n\nFrom the start of the command to its end: median and slowest of {rounds}.\n")
    print(table(["", "s", "slowest, s"], rows))


def print_threads(folder: Path, _: int) -> None:
    """Print the numbers of threads under a quota."""
    groups = folder / "groups"
    groups.mkdir()
    (folder / "self").mkdir()
    (folder / "self" / "cgroup").write_text("0::/\n")
    (folder / "self" / "mountinfo").write_text(f"1 2 0:3 / {groups} rw - cgroup2 cgroup2 rw\n")
    pinned = f"import os; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}})" + THREADS
    rows = [["all cores", *threads(THREADS, folder / "nothing")], ["one core by affinity", *threads(pinned, folder)]]
    (groups / "cpu.max").write_text("100000 100000\n")
    rows.append(["a quota of one core, in a simulated control group", *threads(THREADS, folder / "self")])
    print(
        "\n### Threads\n\nThe table has the number of threads of PyTorch and OpenCV and the number of reading threads, "
        f"on {usable_cores()} cores.\n"
    )
    print(table(["", "PyTorch", "OpenCV", "reading"], rows))


def threads(code: str, process: Path) -> list[str]:
    """Return the output of `THREADS`, with the control groups that the folder describes."""
    command = [sys.executable, "-c", code, str(process)]
    done = subprocess.run(command, env=environment({}), check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.split()


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keep `count` processes busy inside this context."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def environment(way: Record) -> Record:
    """Return this process' environment with only the given variables of OpenMP."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))} | way


def step_seconds(step: Record, way: Record) -> float:
    """Return the seconds of a training step in a process of its own."""
    command = [sys.executable, sys.argv[0], "--measure", json.dumps(step)]
    done = subprocess.run(command, env=environment(way), check=True, stdout=subprocess.PIPE, text=True)
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def measure_step(data: str, device: str) -> Record:
    """Return the median seconds of some steps."""
    once = flawmask_step("maskrcnn_resnet18_fpn", TRAINED_SIZE, BATCH, data, device, None)
    found = timed(once, BATCH, device, steps=5)
    return {"seconds": BATCH * found["seconds"]}


def command_seconds(command: list[str], way: Record) -> float:
    """Return how long a command takes, from its start to its end."""
    begun = time.perf_counter()
    subprocess.run(command, env=environment(way), check=True, capture_output=True)
    return time.perf_counter() - begun


def predict_command(folder: Path, data: Path, count: int) -> list[str]:
    """Return the command that predicts images of the validation split."""
    model = sparing_network(folder, data, SIZE)
    paths = sorted((data / "val" / "images").iterdir())[:count]
    return [
        *(sys.executable, "-m", "flawmask", "predict", "--model", str(model)),
        *("--output", str(folder / f"predicted_{count}"), "--input", *map(str, paths)),
    ]


PARTS: dict[str, Callable[[Path, int], None]] = {"busy": print_busy, "start": print_start, "threads": print_threads}

if __name__ == "__main__":
    main()
