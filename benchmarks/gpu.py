"""Measures Flawmask on one GPU against torchvision's own loop: `make bench-gpu`, at most 7 minutes.

    python benchmarks/gpu.py                          # all parts
    python benchmarks/gpu.py --part steps losses      # some
    python benchmarks/gpu.py --device cpu --tiny      # tries the script without a GPU; its figures mean nothing

Each row is printed, and with `--output FILE` written to a file, as soon as it is measured. The plain way is `plain.py`
with autocast in float16, as in torchvision's reference scripts with `--amp`. Both use the same images (the demo
category), weights and batches. Compared measurements take turns in one process.
"""

import argparse
import gc
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gpu_inference
import gpu_networks
import numpy as np
import torch
import torchvision
from inference import sparing_network
from measuring import Record, demo_at
from plain import PlainDataset, plain_network, plain_step
from torch.profiler import ProfilerActivity, profile

from flawmask.coco import read_split
from flawmask.model.build import build, freeze
from flawmask.model.spec import ModelSpec, anchors_for, proposals_for
from flawmask.runtime import choose_precision
from flawmask.training.augmentation import Augmentation
from flawmask.training.cache import pixel_cache
from flawmask.training.config import TrainConfig
from flawmask.training.loader import Augmenting, Batch, Order, SplitDataset, make_loader, read, resized_shapes
from flawmask.training.network import prepare_for_training
from flawmask.training.step import Step, make_step

NETWORKS = (("resnet50_fpn", 800, 4), ("resnet50_fpn", 800, 16), ("resnet50_fpn", 512, 2))
"""Architecture, image size and batch size of the timed steps."""

ROUNDS, STEPS = 3, 10
"""The number of rounds, whose median is shown, and the steps of a round."""

COMPARED_STEPS = 200
"""The numbers of steps after which losses are compared."""


@dataclass
class Report:
    """Writes rows as soon as they are measured.

    Attributes:
        output: a file to append the rows to; None for none.
        started: when the script started.
    """

    output: Path | None
    started: float = field(default_factory=time.perf_counter)

    def line(self, text: str) -> None:
        """Write a line."""
        print(text, flush=True)
        if self.output is not None:
            with self.output.open("a") as file:
                file.write(f"{text}\n")

    def table(self, heads: Sequence[str]) -> Callable[[Sequence[object]], None]:
        """Begin a Markdown table and return a function that adds a row."""
        self.line("")
        self.row(heads)
        self.row(["---"] * len(heads))
        return self.row

    def row(self, cells: Sequence[object]) -> None:
        """Write a row of a table."""
        self.line(f"| {' | '.join(str(cell) for cell in cells)} |")


@dataclass(frozen=True)
class Bench:
    """The settings that all parts share.

    Attributes:
        device: the device to measure.
        folder: a folder for the data, which all parts share.
        report: writes the rows.
        tiny: whether the script is only tried with tiny networks.
        roi_samples: region proposals per image that train Flawmask's heads; None for its default.
    """

    device: torch.device
    folder: Path
    report: Report
    tiny: bool
    roi_samples: int | None = None

    @property
    def networks(self) -> Sequence[tuple[str, int, int]]:
        """The timed cases: architecture, image size and batch size."""
        return (("resnet18_fpn", 64, 2),) if self.tiny else NETWORKS

    @property
    def steps(self) -> int:
        """The number of steps over which a mean is taken."""
        return 2 if self.tiny else STEPS

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    """Run the chosen parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--tiny", action="store_true", help="try the script with tiny networks")
    parser.add_argument(
        "--roi_samples", type=int, help="sampled regions per image; torchvision has 512. Default: Flawmask's"
    )
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
    with tempfile.TemporaryDirectory() as folder:
        report = Report(options.output)
        if options.output is not None:
            options.output.write_text("# Benchmarks on a GPU\n\n")
        bench = Bench(torch.device(options.device), Path(folder), report, options.tiny, options.roi_samples)
        name = torch.cuda.get_device_name() if options.device.startswith("cuda") else "a CPU"
        report.line(f"Measured on {name}, torch {torch.__version__}, torchvision {torchvision.__version__}.")
        for part in options.part:
            begun = time.perf_counter()
            PARTS[part](bench)
            report.line(f"\n({part}: {time.perf_counter() - begun:.0f} s)")
        report.line(f"(all: {time.perf_counter() - report.started:.0f} s)")


def spec_of(arch: str, size: int, classes: tuple[str, ...], norm: Any = "frozen") -> ModelSpec:
    """Return the network that both loops train."""
    return ModelSpec(f"maskrcnn_{arch}", classes, image_size=size, norm=norm)  # type: ignore[arg-type]


@dataclass
class Pair:
    """The plain step and Flawmask's step on the same batches. Each is a function from a batch's number to a loss.

    Attributes:
        plain: torchvision's.
        fast: Flawmask's.
        step: Flawmask's step.
    """

    plain: Callable[[int], float]
    fast: Callable[[int], Any]
    step: Step


def pair_of(bench: Bench, arch: str, size: int, count: int, *, compile: Any = "auto") -> Pair:
    """Return both steps with a few batches that are read in advance, as a loader would return them."""
    data = demo_at(bench.folder, size, good=8, defective=8, train_good=0)
    split = read_split(data, "train")
    spec = spec_of(arch, size, split.class_names)
    torch.manual_seed(0)
    plain = plain_network(spec)
    model = build(spec)
    model.load_state_dict(plain.state_dict())
    freeze(plain, spec, 3)
    plain.to(bench.device).train()
    parameters = [one for one in plain.parameters() if one.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-5, momentum=0.9, weight_decay=0.0005)
    scaler = torch.amp.GradScaler("cuda") if bench.device.type == "cuda" else None
    config = TrainConfig(
        dataset_dir=data, output_dir=data, roi_samples=bench.roi_samples, lr=1e-5, warmup_steps=0, compile=compile
    )
    dtype = choose_precision("auto", bench.device)
    prepare_for_training(config, model, spec, bench.device, dtype, start="detector")
    step = make_step(config, model, spec, bench.device, dtype, "detector", micro_batch_size=count)
    full, small = PlainDataset(split), SplitDataset(split, spec)
    draw = np.random.default_rng(0)
    places = [draw.integers(0, len(split.images), count).tolist() for _ in range(bench.steps)]
    slow = [[full[at] for at in of_step] for of_step in places]
    fast = [Batch.of([small[at] for at in of_step]) for of_step in places]
    if bench.device.type == "cuda":
        fast = [batch.pin_memory() for batch in fast]
    return Pair(
        lambda at: plain_step(plain, optimizer, slow[at % bench.steps], bench.device, scaler),
        lambda at: step(fast[at % bench.steps], 0.5),
        step,
    )


def seconds_per_step(bench: Bench, once: Callable[[int], Any], steps: int) -> float:
    """Return the mean seconds of some steps, one after the other."""
    bench.wait()
    begun = time.perf_counter()
    for at in range(steps):
        once(at)
    bench.wait()
    return (time.perf_counter() - begun) / steps


def steps_part(bench: Bench) -> None:
    """Print the time and the memory of a training step."""
    bench.report.line(
        f"\n### A training step\n\nImages read before the clock starts; ms per image, medians of {ROUNDS} x "
        f"{bench.steps} steps. Frozen norms, three of the backbone's five stages learning, SGD. Warm-up is all that "
        "comes before the clock starts: first uses, and recording each shape that a batch has. Peak memory in MB."
    )
    heads = [
        "step",
        "torchvision + fp16 autocast",
        "--compile off",
        "recorded",
        "times as fast",
        "shapes",
        "warm-up, s",
    ]
    row = bench.report.table([*heads, "peak, torchvision", "peak, recorded", "ratio"])
    for arch, size, count in bench.networks:
        pair = pair_of(bench, arch, size, count)
        weights = allocated(bench) / 2  # per network, of two
        begun = time.perf_counter()
        # Each shape runs unrecorded, is recorded, and is replayed.
        peak = peak_of(bench, pair.fast, 3 * bench.steps) - weights
        warm_up = time.perf_counter() - begun
        before = allocated(bench)
        plain_peak = peak_of(bench, pair.plain, bench.steps) - before + weights
        off = pair_of(bench, arch, size, count, compile="off")
        ways: dict[str, Callable[[int], Any]] = {"plain": pair.plain, "off": off.fast, "fast": pair.fast}
        seconds_per_step(bench, off.fast, bench.steps)
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, once in ways.items():
                taken[name].append(1000 * seconds_per_step(bench, once, bench.steps) / count)
        ms = {name: statistics.median(values) for name, values in taken.items()}
        shapes = pair.step.passes.recorded if pair.step.passes else 0
        row(
            [
                f"{arch}, {size} px, batch {count}",
                *(f"{one:.2f}" for one in ms.values()),
                f"{ms['plain'] / ms['fast']:.2f}",
                shapes,
                f"{warm_up:.1f}",
                *(f"{one:.0f}" for one in (plain_peak, peak)),
                f"{peak / plain_peak:.2f}",
            ]
        )
        del pair, off, ways, once
        let_go(bench)


def allocated(bench: Bench) -> float:
    """Return the megabytes of GPU memory in use; NaN on other devices."""
    return torch.cuda.memory_allocated() / 2**20 if bench.device.type == "cuda" else float("nan")


def peak_of(bench: Bench, once: Callable[[int], Any], steps: int) -> float:
    """Take some steps and return the peak GPU memory in megabytes; NaN on other devices."""
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds_per_step(bench, once, steps)
    return torch.cuda.max_memory_allocated() / 2**20 if bench.device.type == "cuda" else float("nan")


def let_go(bench: Bench) -> None:
    """Release the memory of unreferenced tensors."""
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


def profile_part(bench: Bench) -> None:
    """Print the GPU work of a recorded step, and which kernels take the time."""
    bench.report.line(
        "\n### Where a step's time goes\n\nPyTorch's profiler over two recorded steps, for each: milliseconds of work "
        "on the GPU, pieces of work, what Python asks for itself, waits."
    )
    heads = [
        "step",
        "wall, ms",
        "GPU busy, ms",
        "kernels",
        "of these asked for by Python",
        "graphs",
        "waits",
        "most time",
    ]
    row = bench.report.table(heads)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if bench.device.type == "cuda" else [])
    for arch, size, count in bench.networks:
        pair = pair_of(bench, arch, size, count)
        seconds_per_step(bench, pair.fast, 3 * bench.steps)
        wall = 1000 * seconds_per_step(bench, pair.fast, bench.steps)
        with profile(activities=activities) as profiled:
            seconds_per_step(bench, pair.fast, 2)
        events = profiled.key_averages()
        on_gpu = [one for one in events if "CUDA" in str(one.device_type)]
        asked = {one.key: one.count / 2 for one in events}
        busy = sum(one.self_device_time_total for one in on_gpu) / 2000
        longest = sorted(on_gpu, key=lambda one: -one.self_device_time_total)[:12]
        shares = ", ".join(f"{one.key[:60]} {one.self_device_time_total / 2000:.2f}" for one in longest)
        waits = sum(asked.get(name, 0) for name in ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy"))
        row(
            [
                f"{arch}, {size} px, batch {count}",
                f"{wall:.1f}",
                f"{busy:.1f}",
                f"{sum(one.count for one in on_gpu) / 2:.0f}",
                f"{sum(count for name, count in asked.items() if 'LaunchKernel' in name):.0f}",
                f"{asked.get('cudaGraphLaunch', 0):.0f}",
                f"{waits:.0f}",
                shares,
            ]
        )
        del pair
        let_go(bench)


def losses_part(bench: Bench) -> None:
    """Print the difference between the losses of the same steps, with torchvision's number of regions in both."""
    size = 64 if bench.tiny else 160
    data = demo_at(bench.folder, size)
    split = read_split(data, "train")
    spec = spec_of("resnet18_fpn", size, split.class_names, "batch")
    spec = replace(spec, anchor_sizes=anchors_for(size), proposals=proposals_for(size))
    config = TrainConfig(dataset_dir=data, output_dir=data, weights="none", roi_samples=512)
    torch.manual_seed(0)
    plain = plain_network(spec).train()
    model = build(spec)
    model.load_state_dict(plain.state_dict())
    plain.to(bench.device)
    dtype = choose_precision("auto", bench.device)
    network = prepare_for_training(config, model, spec, bench.device, dtype, start="nothing")
    fast = make_step(config, network, spec, bench.device, dtype, "nothing", micro_batch_size=4)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.0005, weight_decay=0.01)
    full, small = PlainDataset(split), SplitDataset(split, spec)
    rows: list[tuple[float, float]] = []
    steps = 4 if bench.tiny else COMPARED_STEPS
    for at in range(steps):
        chosen = np.random.default_rng(at).integers(0, len(split.images), 4).tolist()
        torch.manual_seed(at)
        for group in optimizer.param_groups:
            group["lr"] = fast.schedule.at((at + 1) / steps / 2, at)
        images = [full[place][0].to(bench.device) for place in chosen]
        targets = [{name: one.to(bench.device) for name, one in full[place][1].items()} for place in chosen]
        loss = sum(plain(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), config.clip_norm)
        optimizer.step()
        torch.manual_seed(at)
        found = fast(Batch.of([small[place] for place in chosen]), (at + 1) / steps / 2)
        rows.append((float(loss.detach()), sum(found.tolist()[: len(fast.losses)])))
    means = np.array(rows).reshape(4, steps // 4, 2).mean(axis=1)
    bench.report.line(
        f"\n### The same losses\n\n{steps} steps of resnet18_fpn from the same weights on the same batches of 4 (demo "
        f"category, {size} px, AdamW), 512 regions an image in both; plain in float32 (convolutions in TF32), Flawmask "
        f"in {str(dtype).removeprefix('torch.')}, recorded."
    )
    row = bench.report.table(["steps", "mean loss, plain", "mean loss, Flawmask", "difference"])
    spans = [f"{at * steps // 4 + 1} to {(at + 1) * steps // 4}" for at in range(4)]
    for span, (one, other) in zip([*spans, "all"], [*means, means.mean(axis=0)], strict=True):
        row([span, f"{one:.4f}", f"{other:.4f}", f"{100 * (other / one - 1):+.1f} %"])


def rows_of(bench: Bench, title: str, rows: Iterable[Record]) -> None:
    """Print a section, each row as soon as it is measured."""
    bench.report.line(f"\n### {title}")
    add: Callable[[Sequence[object]], None] | None = None
    heads: list[str] = []
    for row in rows:
        if add is None:
            heads = list(row)
            add = bench.report.table(heads)
        add([row.get(head, "") for head in heads])


def inference_part(bench: Bench) -> None:
    """Print the time of an image from file to masks."""
    size, count, pixels = (64, 4, 128) if bench.tiny else (800, 48, 1024)
    title = (
        f"Inference\n\nFrom files of {pixels} x {pixels} pixels to masks as RLE, ResNet-50 at {size} px, medians of "
        f"{gpu_inference.ROUNDS} rounds of {count} images. torchvision: images decoded one after the other, its own "
        "forward pass at batch 8, masks pasted. The network was not trained; its scores are set so that it predicts "
        "something."
    )
    rounds = 1 if bench.tiny else gpu_inference.ROUNDS
    rows_of(
        bench, title, gpu_inference.inference(bench.device, bench.folder, size, count, pixels=pixels, rounds=rounds)
    )


def networks_part(bench: Bench) -> None:
    """Print the results of the checks of every architecture."""
    title = (
        "Every architecture\n\nA random network of each: a step at the default precision; gradients in float32 of four "
        "images at once and one by one; scores of a batch of 8; memory that three networks leave behind; predictions "
        "in float32 on three images against the CPU's."
    )
    of_all = gpu_networks.networks
    rows_of(bench, title, of_all(bench.device, ("ssd300_vgg16",)) if bench.tiny else of_all(bench.device))


def evaluation_part(bench: Bench) -> None:
    """Print the time to evaluate images of many sizes."""
    data = gpu_inference.many_sizes(bench.folder, 12 if bench.tiny else 80)
    model = sparing_network(bench.folder, data, 64 if bench.tiny else 512)
    title = "Evaluation of images of many sizes\n\nSides of 100 to 630 pixels, ResNet-50 at 512 px."
    rows_of(bench, title, gpu_inference.evaluation(bench.device, bench.folder, data, model))


def reading_part(bench: Bench) -> None:
    """Print the speed of reading images, and the share of a training that waits for them."""
    size, count, pixels = (64, 8, 128) if bench.tiny else (800, 640, 1024)
    workers = (0, 1) if bench.tiny else (4, None)
    pin = bench.device.type == "cuda"
    rows = gpu_inference.reading(bench.folder, size, count, workers, pin=pin, pixels=pixels)
    rows_of(bench, f"Reading\n\n{os.cpu_count()} cores; {count} images, the loader alone.", rows)
    row = bench.report.table(["a training of two epochs", "images/s", "waiting for images, %"])
    pair = pair_of(bench, "resnet18_fpn" if bench.tiny else "resnet50_fpn", size, 4)
    data = demo_at(bench.folder, pixels, good=12, defective=12, train_good=0)
    split = gpu_inference.images_of(data, count)
    spec = spec_of("resnet18_fpn" if bench.tiny else "resnet50_fpn", size, split.class_names)
    shapes = resized_shapes(split, spec)
    with pixel_cache(shapes, 4.0) as cache:
        items = SplitDataset(split, spec, cache, Augmenting(Augmentation("light"), 0))  # the default of `train`
        order = Order(shapes, 4, seed=0, marks_epochs=True)
        batches = make_loader(items, order, workers=None, pin=pin)
        for epoch in ("first", "second"):
            begun = asked = time.perf_counter()
            waiting = 0.0
            for batch in read(batches):
                waiting += time.perf_counter() - asked
                pair.step(batch, 0.5)
                asked = time.perf_counter()
            bench.wait()
            seconds = time.perf_counter() - begun
            row([f"{epoch} epoch, batch 4, {size} px", f"{count / seconds:.0f}", f"{100 * waiting / seconds:.1f}"])


PARTS: dict[str, Callable[[Bench], None]] = {
    "steps": steps_part,
    "profile": profile_part,
    "losses": losses_part,
    "inference": inference_part,
    "networks": networks_part,
    "evaluation": evaluation_part,
    "reading": reading_part,
}

if __name__ == "__main__":
    main()
