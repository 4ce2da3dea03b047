"""Shared by the benchmarks of training and inference: runs measurements in turns, each in a process of its own."""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peak import peak_megabytes

from flawmask.launch import own_process

own_process()  # so that the settings of the command line are timed

Record = dict[str, Any]

BY_ROUND = {"seconds", "megabytes", "imports"}
"""The values that differ from round to round. All others are results; the first round's are shown."""


def devices() -> list[str]:
    """Return the devices to measure."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def demo_at(folder: Path, size: int, **changes: Any) -> Path:
    """Return a COCO folder of the demo category, drawn at a size."""
    from flawmask.data.demo import DemoConfig, generate
    from flawmask.data.prepare import PrepareConfig, prepare

    target = folder / f"data_{size}"
    if not target.is_dir():
        drawn = DemoConfig(mvtec_root=folder / f"demo_{size}", image_size=size, **changes)
        generate(drawn)
        prepare(PrepareConfig(mvtec_root=drawn.mvtec_root, category=drawn.category, output_dir=target))
    return target


def in_turns(measurements: dict[str, Record], rounds: int) -> dict[str, Record]:
    """Run measurements in turns, each in a process of its own. Return the medians of the values that differ by round.

    Args:
        measurements: for each name `what` to measure (see `measured_here`), and its arguments.
        rounds: the number of turns of each measurement.
    """
    found: dict[str, list[Record]] = {name: [] for name in measurements}
    for _ in range(rounds):
        for name, what in measurements.items():
            command = [sys.executable, sys.argv[0], "--measure", json.dumps(what)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    return {
        name: {key: statistics.median(run[key] for run in runs) if key in BY_ROUND else runs[0][key] for key in runs[0]}
        for name, runs in found.items()
    }


def measured_here(options: argparse.Namespace, measures: dict[str, Callable[..., Record]]) -> bool:
    """Measure once and print the result, if this process was started with `--measure`. Return whether it was.

    The peak memory in MB, and the part of it that imports take, are added to the result.
    """
    if not options.measure:
        return False
    measurement = json.loads(options.measure)
    imports = peak_megabytes()
    found = measures[measurement.pop("what")](**measurement)
    on_gpu = measurement["device"] == "cuda"
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else peak_megabytes()
    print(json.dumps(found | {"megabytes": peak, "imports": 0.0 if on_gpu else imports}))
    return True


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
