"""Flawmask's all-reduce of gradients against DistributedDataParallel (DDP): a section of docs/scale.md.

    python benchmarks/ddp.py

Two processes on one machine, connected by gloo, take steps in turns: one of Flawmask, and the same step with the
network wrapped in DDP. Both have the same weights, images, draws and divisors. DDP needs `find_unused_parameters`,
because images without a defect do not use the mask branch. DDP returns means over the processes, so the losses are
multiplied by the number of processes.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from measuring import demo_at, table
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from flawmask.coco import read_split
from flawmask.distributed import processes
from flawmask.model.arch import Arch
from flawmask.model.build import build
from flawmask.model.spec import ModelSpec, anchors_for
from flawmask.training.config import TrainConfig
from flawmask.training.loader import Batch, SplitDataset
from flawmask.training.network import prepare_for_training
from flawmask.training.step import PendingFigures, Step, make_step

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The network, and the number of steps."""

    arch: Arch = "maskrcnn_resnet50_fpn"
    """The network."""
    image_size: int = 256
    """The shorter side of the images."""
    batch_size: int = 4
    """Images per process and step."""
    steps: int = 10
    """Measured steps of each kind."""
    processes: int = 2
    """The number of processes."""
    child: Path | None = None
    """The data set for a process that the benchmark starts."""


class Losses(nn.Module):
    """The losses of a step as a module, which DDP can wrap."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.model, self._step = step.model, [step]  # in a list, so that the step's modules are not registered

    def forward(self, part: Batch) -> torch.Tensor:
        """Return the losses in order."""
        return self._step[0].losses_of(self.model, part)


def ddp_step(step: Step, wrapped: DistributedDataParallel, batch: Batch) -> PendingFigures:
    """Take the step that `Step` takes, but let DDP add up the gradients while the backward pass runs."""
    stop_votes = torch.zeros(1)
    totals = torch.stack(step._counts(batch)).sum(dim=0)
    step.team.all_reduce_sum([totals, stop_votes])
    step.optimizer.zero_grad()
    figures = torch.zeros(len(step.losses))
    parts = list(batch.parts(step.micro_batch_size))
    for part in parts:
        with nullcontext() if part is parts[-1] else wrapped.no_sync():
            losses = wrapped(part) * step._weights(part, totals)
            step.scaler.scale(losses.sum() * step.team.count).backward()
        figures += losses.detach()
    step.team.all_reduce_sum([figures])
    step.scaler.unscale_(step.optimizer)
    length = nn.utils.clip_grad_norm_(step.model.parameters(), step.clip_norm)
    step.scaler.step(step.optimizer)
    step.scaler.update()
    return PendingFigures.to_host(torch.cat((figures, length.detach()[None], stop_votes)))


def measure(config: Config, data: Path) -> dict[str, Any] | None:
    """Return the seconds of each step of both kinds, in the main process."""
    with processes(CPU) as team:
        split = read_split(data, "train")
        anchors = anchors_for(config.image_size)
        spec = ModelSpec(
            config.arch, split.class_names, image_size=config.image_size, norm="frozen", anchor_sizes=anchors
        )
        settings = TrainConfig(dataset_dir=data, output_dir=data, lr=1e-5, warmup_steps=0, weights="none")

        def made() -> Step:
            torch.manual_seed(0)
            model = prepare_for_training(settings, build(spec), spec, CPU, torch.float32, start="detector")
            return make_step(settings, model, spec, CPU, torch.float32, "detector", micro_batch_size=1, team=team)

        ours, theirs = made(), made()
        wrapped = DistributedDataParallel(Losses(theirs), find_unused_parameters=True)
        items = SplitDataset(split, spec)
        seconds: dict[str, list[float]] = {"all-reduce after the backward pass": [], "DDP": []}
        lengths: list[list[float]] = []
        for at in range(config.steps + 2):
            first = (at * team.count + team.rank) * config.batch_size
            batch = Batch.of([items[(first + place) % len(items)] for place in range(config.batch_size)])
            ways = {
                "all-reduce after the backward pass": lambda batch=batch: ours(batch, 0.5),
                "DDP": lambda batch=batch: ddp_step(theirs, wrapped, batch),
            }
            found = {}
            for name in list(ways)[:: 1 if at % 2 else -1]:  # each is first in every second round
                distributed.barrier()
                torch.manual_seed(at)  # images draw the same region proposals
                began = time.perf_counter()
                found[name] = ways[name]().tolist()[-2]
                distributed.barrier()
                if at >= 2:
                    seconds[name].append(time.perf_counter() - began)
            lengths.append([found[name] for name in ways])
        megabytes = sum(one.numel() for one in ours.model.parameters() if one.requires_grad) * 4 / 1e6
        return {"seconds": seconds, "lengths": lengths, "megabytes": megabytes} if team.is_main else None


def main(config: Config) -> None:
    """Draw images, start the processes, and print the section."""
    if config.child is not None:
        found = measure(config, config.child)
        if found:
            print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as place:
        data = demo_at(Path(place), config.image_size, good=4, defective=8, train_good=0)
        options = [f"--{name}={getattr(config, name)}" for name in ("arch", "image_size", "batch_size", "steps")]
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(config.processes), __file__]
        command = [sys.executable, *launcher, *options, "--child", str(data)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
    found = json.loads(done.stdout.splitlines()[-1])
    lines = []
    for name, seconds in found["seconds"].items():
        low, middle, high = statistics.quantiles(seconds, n=4)
        lines.append([name, f"{middle:.3f}", f"{low:.3f} to {high:.3f}"])
    (one, other), *_ = found["lengths"]
    print(f"\n## {config.arch}, {config.processes} processes, {found['megabytes']:.0f} MB of gradients\n")
    print(table(["", "seconds per step, median", "quartiles"], lines))
    print(f"\nLength of the first step's gradient: {one:.6g} and {other:.6g}.")


if __name__ == "__main__":
    main(tyro.cli(Config))
