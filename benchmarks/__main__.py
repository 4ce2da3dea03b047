"""Runs all benchmarks and writes docs/benchmarks.md: `python benchmarks`, or `make bench`.

The file names what is left out: anomalib, if no Python that has it is given, and a GPU, if there is none.
"""

import argparse
import os
import platform
import subprocess
import sys
import textwrap
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs" / "benchmarks.md"

SCRIPTS: dict[str, list[str]] = {
    "training.py": [],
    "lite.py": [],
    "inference.py": [],
    "postprocess.py": [],
    "preparing.py": [],
    "busy.py": [],
    "serve.py": [],
    "metrics.py": ["--images", "100", "--size", "1024"],
}
"""The scripts. Each prints a section of the file."""

WIDTH = 120

GPU_HEADING = "## On a GPU"
"""The heading of the section that is written by hand. It is kept."""


def main() -> None:
    """Run the benchmarks and write the file, whole or not at all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anomalib", help="a Python that can import anomalib, to measure it too")
    parser.add_argument("--rounds", type=int, help="turns of each measurement; each script has its own default")
    options = parser.parse_args()
    parts = []
    rounds = ["--rounds", str(options.rounds)] if options.rounds else []
    for name, images in SCRIPTS.items():
        given = [*images, *rounds]
        extra = ["--anomalib", options.anomalib] if options.anomalib and name == "metrics.py" else []
        shown = " ".join(["python", f"benchmarks/{name}", *given])
        print(f"{shown} ...", file=sys.stderr)
        done = subprocess.run(
            [sys.executable, str(HERE / name), *given, *extra], check=True, stdout=subprocess.PIPE, text=True
        )
        title, _, text = done.stdout.strip().partition("\n")
        print(done.stdout, file=sys.stderr)
        parts.append(f"{title}\n\n```\n{shown}\n```\n{wrapped(text)}\n")
    _, heading, by_hand = DOCS.read_text().partition(GPU_HEADING)
    DOCS.write_text(f"# Benchmarks\n\n{wrapped(machine())}\n\n" + "\n".join(parts) + f"\n{heading}{by_hand}")


def wrapped(text: str) -> str:
    """Return Markdown whose paragraphs are as wide as in the other pages; tables and headings stay as they are."""
    return "\n".join(
        line if line.startswith(("|", "#")) else textwrap.fill(line, WIDTH, break_on_hyphens=False)
        for line in text.split("\n")
    )


def machine() -> str:
    """Return a paragraph about the machine and the versions."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU, so nothing here was measured on a GPU"
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "torchvision", "numpy", "opencv-python-headless")
    )
    return (
        f"Measured on {date.today():%Y-%m-%d} by `python benchmarks`: {os.cpu_count()} cores of {processor()}, "
        f"{platform.system()}, Python {platform.python_version()}, {packages}; {gpu}. The compared programs take "
        "turns. Each runs in its own process. The tables show medians, ratios of medians, and peak memory including "
        "imports."
    )


def processor() -> str:
    """Return the CPU's name and its bfloat16 instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {key.strip(): value.strip() for key, value in facts.items()}
    flags = named.get("flags", "").split()
    known = {"avx512_bf16": "AVX-512 BF16", "amx_bf16": "AMX BF16"}
    found = [text for flag, text in known.items() if flag in flags] or ["no bfloat16"]
    return f"{named.get('model name', platform.machine())} ({', '.join(found)})"


if __name__ == "__main__":
    main()
