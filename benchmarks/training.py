"""Times training against the plain way, and prints a section of docs/benchmarks.md.

    python benchmarks/training.py                  # all parts; about an hour on two cores
    python benchmarks/training.py --parts speed --rounds 5

`plain.py` beside this file is the plain way. Both use the same images (the demo category, drawn at the given size),
weights, resolution and batch. Each measurement runs in a process of its own, so peak memory, imports included, is
measured separately. Compared measurements take turns, and a ratio is that of the medians. On a machine with a GPU,
everything is measured there too, the plain way with autocast.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import Record, demo_at, devices, in_turns, measured_here, table
from plain import PlainDataset, plain_network, plain_step
from torch.profiler import ProfilerActivity, profile
from torchvision.ops import MultiScaleRoIAlign

from flawmask.coco import CocoSplit, read_split
from flawmask.evaluation.evaluate import predict_split
from flawmask.evaluation.measure import quick_figures
from flawmask.inference.torch_backend import TorchBackend
from flawmask.model.build import build, freeze
from flawmask.model.roi_align import PyramidRoIAlign
from flawmask.model.spec import ModelSpec
from flawmask.runtime import choose_precision, keep_freed_memory
from flawmask.training.config import TrainConfig
from flawmask.training.loader import Batch, SplitDataset
from flawmask.training.loop import train
from flawmask.training.network import prepare_for_training
from flawmask.training.step import make_step

STEPS = 200
"""The numbers of steps after which losses are compared."""

NETWORKS = (("maskrcnn_resnet50_fpn", 512, 2), ("maskrcnn_resnet50_fpn", 800, 4))
"""Architecture, image size and batch size of the timed training."""

VIEWS = 66 * 4 * 50
PUBLISHED = (
    f"The published pipeline's command for `bottle` shows {VIEWS:,} images to the network: 66 training images and "
    "three variants of each, for 50 epochs. With the seconds of 800 px on the CPU, that takes"
)

GROUPS = {
    "convolutions backwards": ("convolution_backward",),
    "convolutions forwards": ("mkldnn_convolution", "_convolution", "cudnn_convolution"),
    "matrix products of the heads": ("mm", "addmm", "bmm"),
    "copies, most between types": ("copy_",),
    "suppression of overlapping proposals": ("nms", "sort", "topk"),
    "RoIAlign": ("roi_align", "_roi_align_backward", "_embedding_bag_forward_only", "_embedding_bag_dense_backward"),
    "the optimiser, and the gradient's norm": ("_fused_sgd_", "_fused_adamw_", "linalg_vector_norm", "_foreach_norm"),
}
"""The purposes of a step's operations, by the operations' names."""


def main() -> None:
    """Print the sections, or measure once when called by itself with `--measure`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds; the median is shown")
    parser.add_argument("--seeds", type=int, default=3, help="trainings per setting in the part `sampling`")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if measured_here(options, MEASURES):
        return
    print("## Training")
    with tempfile.TemporaryDirectory() as folder:
        for part in options.parts:
            PARTS[part](Path(folder), options)


def speed_part(folder: Path, options: argparse.Namespace) -> None:
    """Print the time of a training step, and how it is divided."""
    rows, profiles = [], []
    whole: dict[str, float] = {}
    for device in devices():
        for arch, size, batch in NETWORKS:
            data = demo_at(folder, size, good=4, defective=4, train_good=0)
            common = {"arch": arch, "size": size, "batch": batch, "data": str(data), "device": device}
            measurements: dict[str, Record] = {
                "torchvision, plain": {"what": "plain", **common},
                "Flawmask": {"what": "flawmask", **common, "roi_samples": None},
                "Flawmask, 512 region proposals an image, as torchvision": {
                    "what": "flawmask",
                    **common,
                    "roi_samples": 512,
                },
            }
            title = f"{arch.removeprefix('maskrcnn_')}, {size} px, batch {batch}, {device}"
            found = in_turns(measurements, options.rounds)
            rows += speed_rows(title, found)
            if size == 800 and device == "cpu":
                names = {"with plain torchvision": "torchvision, plain", "with Flawmask": "Flawmask"}
                whole = {name: VIEWS * found[key]["seconds"] / 3600 for name, key in names.items()}
            profiled = {"what": "profile", **common}
            profiles.append((title, in_turns({"one": profiled}, 1)["one"]["shares"]))
    print(
        "\n### Speed and memory\n\nNorms are frozen, three of the backbone's five stages are trained, and the "
        f"optimiser is SGD. The table shows the median of {options.rounds} rounds. `imports` is the memory before the "
        "network is built. Both programs also need some 500 MB for a ResNet-50's weights, gradients and momentum.\n"
    )
    heads = ["", "", "s per image", "times as fast", "peak, MB", "imports, MB", "share of peak", "without imports"]
    print(table([*heads, "first loss"], rows))
    print(f"\n{PUBLISHED} {' and '.join(f'{hours:.1f} hours {name}' for name, hours in whole.items())}.")
    print(
        "\nFrozen norms do not depend on the batch. So on a CPU, Flawmask computes a batch image by image, which is as "
        "fast and takes less memory. Flawmask's losses are means over images of each image's mean. torchvision's "
        "losses are means over all region proposals of the batch. That is why the first losses differ at a batch of 4."
    )
    print(
        "\n### Where a step's time goes\n\nPyTorch's profiler measured the third step of Flawmask. The table has "
        "shares of its time in per cent.\n"
    )
    purposes = list(profiles[0][1])
    shown = [[name, *(f"{100 * shares[name]:.1f}" for _, shares in profiles)] for name in purposes]
    print(table(["", *(title for title, _ in profiles)], shown))


def speed_rows(title: str, found: dict[str, Record]) -> list[list[str]]:
    """Return the rows of one network. The first row is the plain way."""
    plain = next(iter(found.values()))
    return [
        [
            title if one is plain else "",
            name,
            f"{one['seconds']:.2f}",
            f"{plain['seconds'] / one['seconds']:.2f}",
            f"{one['megabytes']:.0f}",
            f"{one['imports']:.0f}",
            f"{one['megabytes'] / plain['megabytes']:.2f}",
            f"{(one['megabytes'] - one['imports']) / (plain['megabytes'] - plain['imports']):.2f}",
            f"{one['loss']:.3f}",
        ]
        for name, one in found.items()
    ]


def spec_of(arch: str, size: int, split: CocoSplit, norm: Any = "frozen") -> ModelSpec:
    """Return the network that both loops train."""
    return ModelSpec(arch, split.class_names, image_size=size, norm=norm)  # type: ignore[arg-type]


def measure_plain(arch: str, size: int, batch: int, data: str, device: str, steps: int = 3) -> Record:
    """Return the seconds per image of the plain step and its first loss."""
    split, where = read_split(Path(data), "train"), torch.device(device)
    torch.manual_seed(0)
    spec = spec_of(arch, size, split)
    model = plain_network(spec)
    freeze(model, spec, 3)
    model.to(where).train()
    parameters = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-5, momentum=0.9, weight_decay=0.0005)
    scaler = torch.amp.GradScaler("cuda") if device == "cuda" else None
    items = PlainDataset(split)
    return timed(
        lambda at: plain_step(model, optimizer, [items[place] for place in places(at, batch, split)], where, scaler),
        batch,
        device,
        steps,
    )


def flawmask_step(
    arch: str, size: int, batch: int, data: str, device: str, roi_samples: int | None
) -> Callable[[int], float]:
    """Return a function that takes a step on the batch of a given number and returns the loss."""
    split, where = read_split(Path(data), "train"), torch.device(device)
    config = TrainConfig(
        dataset_dir=Path(data), output_dir=Path(data), roi_samples=roi_samples, lr=1e-5, warmup_steps=0, weights="none"
    )
    spec = spec_of(arch, size, split)
    dtype = choose_precision("auto", where)
    keep_freed_memory(where)
    torch.manual_seed(0)
    model = prepare_for_training(config, build(spec), spec, where, dtype, start="detector")
    # As in `train`: with frozen norms, a CPU goes image by image.
    step = make_step(config, model, spec, where, dtype, "detector", micro_batch_size=1 if device == "cpu" else batch)
    items = SplitDataset(split, spec)

    def once(at: int) -> float:
        found = step(Batch.of([items[place] for place in places(at, batch, split)]), 0.5)
        return sum(found.tolist()[: len(step.losses)])

    return once


def measure_flawmask(
    arch: str, size: int, batch: int, data: str, device: str, roi_samples: int | None, steps: int = 3
) -> Record:
    """Return the seconds per image of Flawmask's step and its first loss."""
    return timed(flawmask_step(arch, size, batch, data, device, roi_samples), batch, device, steps)


def measure_shares(arch: str, size: int, batch: int, data: str, device: str) -> Record:
    """Return the share of a step's time for each of `GROUPS`."""
    once = flawmask_step(arch, size, batch, data, device, None)
    for at in range(2):
        once(at)
    on_gpu = device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        once(2)
    seconds = {
        event.key.split("::")[-1]: event.self_device_time_total if on_gpu else event.self_cpu_time_total
        for event in profiled.key_averages()
    }
    whole = sum(seconds.values())
    shares = {group: sum(seconds.get(name, 0) for name in names) / whole for group, names in GROUPS.items()}
    return {"shares": shares | {"all else": 1 - sum(shares.values())}}


def places(at: int, batch: int, split: CocoSplit) -> list[int]:
    """Return the images of a step, the same for both ways."""
    return [int(place) for place in np.random.default_rng(at).integers(0, len(split.images), batch)]


def timed(once: Callable[[int], float], batch: int, device: str, steps: int) -> Record:
    """Return the median seconds per image of some steps after the first, and the first loss."""
    first = once(0)
    seconds = []
    for at in range(1, steps + 1):
        begun = time.perf_counter()
        once(at)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - begun) / batch)
    return {"seconds": statistics.median(seconds), "loss": first}


def pooling_part(_: Path, options: argparse.Namespace) -> None:
    """Print the time of RoIAlign alone."""
    rows = []
    for device in devices():
        measurements = {
            "torchvision": {"what": "pooling", "kind": "plain", "device": device},
            "Flawmask": {"what": "pooling", "kind": "flawmask", "device": device},
        }
        found = in_turns(measurements, options.rounds)
        rows += [
            [f"{name}, {device}", f"{1000 * one['forward']:.0f}", f"{1000 * one['backward']:.0f}"]
            for name, one in found.items()
        ]
    print(
        "\n### RoIAlign alone\n\n512 region proposals of 7x7 bins, from features of 256 channels, at 512 px, in "
        "float32.\n"
    )
    print(table(["", "forwards, ms", "backwards, ms"], rows))


def measure_pooling(kind: str, device: str) -> Record:
    """Return the median seconds for 512 regions, forward and backward."""
    where = torch.device(device)
    names = ["0", "1", "2", "3"]
    pool: Any = (MultiScaleRoIAlign if kind == "plain" else PyramidRoIAlign)(names, 7, 2)
    torch.manual_seed(0)
    features = {
        name: torch.rand(1, 256, side, side, device=where).to(memory_format=torch.channels_last).requires_grad_()
        for name, side in zip(names, (128, 64, 32, 16), strict=True)
    }
    corners = torch.rand(512, 2, device=where) * 400
    boxes = [torch.cat((corners, corners + 10 + 100 * torch.rand(512, 2, device=where)), dim=1)]
    forward, backward = [], []
    for _ in range(7):
        begun = time.perf_counter()
        pooled = pool(features, boxes, [(512, 512)])
        if device == "cuda":
            torch.cuda.synchronize()
        between = time.perf_counter()
        pooled.sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        forward.append(between - begun)
        backward.append(time.perf_counter() - between)
    return {"forward": statistics.median(forward[2:]), "backward": statistics.median(backward[2:])}


def losses_part(folder: Path, _: argparse.Namespace) -> None:
    """Print the difference between the losses of the same steps, with torchvision's sampling."""
    data = demo_at(folder, 160)
    split = read_split(data, "train")
    cpu = torch.device("cpu")
    keep_freed_memory(cpu)
    spec = spec_of("maskrcnn_resnet18_fpn", 160, split, "batch")
    spec = replace(spec, anchor_sizes=(6, 13, 26, 51, 102), proposals=200)
    config = TrainConfig(dataset_dir=data, output_dir=data, weights="none", roi_samples=512)
    torch.manual_seed(0)
    plain = plain_network(spec).train()
    model = build(spec)
    model.load_state_dict(plain.state_dict())
    dtype = choose_precision("auto", cpu)
    network = prepare_for_training(config, model, spec, cpu, dtype, start="nothing")
    fast = make_step(config, network, spec, cpu, dtype, "nothing", micro_batch_size=4)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.0005, weight_decay=0.01)
    full, small = PlainDataset(split), SplitDataset(split, spec)
    rows: list[tuple[float, float]] = []
    for at in range(STEPS):
        chosen = places(at, 4, split)
        torch.manual_seed(at)
        for group in optimizer.param_groups:
            group["lr"] = fast.schedule.at((at + 1) / STEPS / 2, at)
        images = [full[place][0] for place in chosen]
        targets = [full[place][1] for place in chosen]
        loss = sum(plain(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), config.clip_norm)
        optimizer.step()
        torch.manual_seed(at)
        found = fast(Batch.of([small[place] for place in chosen]), (at + 1) / STEPS / 2)
        rows.append((float(loss.detach()), sum(found.tolist()[: len(fast.losses)])))
    means = np.array(rows).reshape(4, STEPS // 4, 2).mean(axis=1)
    precision = str(dtype).removeprefix("torch.")
    print(
        f"\n### The same losses\n\nBoth train resnet18_fpn for {STEPS} steps, from the same weights, on the same "
        "batches of 4 (demo category, 160 px, AdamW), with 512 region proposals an image. Plain torchvision computes "
        f"in float32, Flawmask in {precision}.\n"
    )
    spans = [f"{at * STEPS // 4 + 1} to {(at + 1) * STEPS // 4}" for at in range(4)]
    lines = [
        [span, f"{one:.4f}", f"{other:.4f}", f"{100 * (other / one - 1):+.1f} %"]
        for span, (one, other) in zip([*spans, "all"], [*means, means.mean(axis=0)], strict=True)
    ]
    print(table(["steps", "mean loss, plain", "mean loss, Flawmask", "difference"], lines))


def sampling_part(folder: Path, options: argparse.Namespace) -> None:
    """Print how the number of sampled regions and masks changes the metrics of the demo category."""
    data = demo_at(folder, 256)
    settings: Record = {
        "dataset_dir": data,
        "arch": "maskrcnn_resnet18_fpn",
        "weights": "none",
        "image_size": 160,
        "epochs": 6,
        "train_augment": "off",
        "device": "cpu",
        "overwrite": True,
    }
    rows = []
    split = read_split(data, "val")
    for name, samples in (("512 an image, as torchvision", 512), ("as many as the image's instances need", None)):
        figures: list[dict[str, Any]] = []
        seconds: list[float] = []
        waiting: list[float] = []
        for seed in range(options.seeds):
            begun = time.perf_counter()
            done = train(TrainConfig(**settings, output_dir=folder / "run", roi_samples=samples, seed=seed))
            seconds.append(time.perf_counter() - begun)
            waiting += done.history["waiting"]
            backend = TorchBackend.load(done.run_dir / "best.pt", "cpu")
            figures.append(quick_figures(split, predict_split(backend, split)[0]))
        shown = [[100 * one[key] for one in figures] for key in ("f1", "segm_ap")]
        cells = [f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})" for values in shown]
        rows.append([name, *cells, f"{statistics.median(seconds):.0f}", f"{100 * statistics.median(waiting):.1f}"])
    print(
        "\n### Fewer region proposals and masks\n\nThe demo category, resnet18_fpn without pretrained weights, 160 px, "
        f"6 epochs, {options.seeds} seeds each: mean, lowest and highest on {len(split.images)} validation images.\n"
    )
    costs = ["seconds of training", "of these waiting for images, %"]
    print(table(["region proposals that the heads are trained on", "F1, %", "mask AP, %", *costs], rows))


MEASURES: dict[str, Callable[..., Record]] = {
    "plain": measure_plain,
    "flawmask": measure_flawmask,
    "profile": measure_shares,
    "pooling": measure_pooling,
}

PARTS: dict[str, Callable[[Path, argparse.Namespace], None]] = {
    "speed": speed_part,
    "pooling": pooling_part,
    "losses": losses_part,
    "sampling": sampling_part,
}

if __name__ == "__main__":
    main()
