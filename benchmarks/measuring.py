"""What the benchmarks of training and inference share: what is measured, in turns, each in a process of its own."""

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

own_process()  # what is timed is what the command line does

Record = dict[str, Any]

BY_ROUND = {"seconds", "megabytes", "imports"}
"""What differs from round to round; all else is a result, of which the first is shown."""


def devices() -> list[str]:
    """Return where it is measured."""
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


def in_turns(asked: dict[str, Record], rounds: int) -> dict[str, Record]:
    """Measure each in a process of its own, in turns, and return the medians of what differs by round.

    Args:
        asked: by name, `what` to measure (see `measured_here`) and the arguments of it.
        rounds: how many turns each has.
    """
    found: dict[str, list[Record]] = {name: [] for name in asked}
    for _ in range(rounds):
        for name, what in asked.items():
            command = [sys.executable, sys.argv[0], "--measure", json.dumps(what)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    return {
        name: {key: statistics.median(run[key] for run in runs) if key in BY_ROUND else runs[0][key] for key in runs[0]}
        for name, runs in found.items()
    }


def measured_here(options: argparse.Namespace, measures: dict[str, Callable[..., Record]]) -> bool:
    """Measure once and print what came of it, where this process was started to do that; return whether it was.

    To what the measure returns comes the most memory that there was, in MB, and what of it imports are.
    """
    if not options.measure:
        return False
    asked = json.loads(options.measure)
    imports = peak_megabytes()
    found = measures[asked.pop("what")](**asked)
    on_gpu = asked["device"] == "cuda"
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else peak_megabytes()
    print(json.dumps(found | {"megabytes": peak, "imports": 0.0 if on_gpu else imports}))
    return True


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
