"""Times training and inference against the plain way, and prints sections of docs/benchmarks.md.

    python benchmarks/speed.py                    # all parts; about half an hour on two cores
    python benchmarks/speed.py --parts train infer --rounds 5

`plain.py` beside this file is the plain way. Both have the same images (the demo category, drawn at the size asked
for), weights, resolution and batch. Each measurement is a process of its own, so that its peak memory, imports
included, is its own; what is compared takes turns, and a ratio is that of the medians. Where a GPU is present, all is
measured there too, the plain way with autocast.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peak import peak_megabytes
from plain import PlainDataset, autocast, plain_network, plain_step

from flawmask.coco import CocoSplit, read_split
from flawmask.data.demo import DemoConfig, generate
from flawmask.data.prepare import PrepareConfig, prepare
from flawmask.evaluation.evaluate import predict_split
from flawmask.evaluation.measure import quick_figures
from flawmask.inference.predictor import Instance, Prediction, Predictor
from flawmask.masks import to_rle
from flawmask.model import checkpoint
from flawmask.model.build import ModelSpec, build, freeze
from flawmask.runtime import choose_precision
from flawmask.training.config import TrainConfig
from flawmask.training.loader import SplitDataset
from flawmask.training.loop import train
from flawmask.training.start import ready
from flawmask.training.step import make_step

Record = dict[str, Any]

STEPS = 200
"""Over so many steps the losses are compared."""

NETWORKS = (("maskrcnn_resnet50_fpn", 512, 2), ("maskrcnn_resnet50_fpn", 800, 4))
"""Architecture, image size and batch of the training that is timed."""


def main() -> None:
    """Print the sections, or measure once when called by itself with `--measure`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3, help="the median of so many is shown")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind in the part `sampling`")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        asked = json.loads(options.measure)
        print(json.dumps(MEASURES[asked.pop("what")](**asked)))
        return
    with tempfile.TemporaryDirectory() as folder:
        for part in options.parts:
            PARTS[part](Path(folder), options)


def devices() -> list[str]:
    """Return where it is measured."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def demo_at(folder: Path, size: int, **changes: Any) -> Path:
    """Return a COCO folder of the demo category, drawn at a size."""
    target = folder / f"data_{size}"
    if not target.is_dir():
        drawn = DemoConfig(mvtec_root=folder / f"demo_{size}", image_size=size, **changes)
        generate(drawn)
        prepare(PrepareConfig(mvtec_root=drawn.mvtec_root, category=drawn.category, output_dir=target))
    return target


def in_turns(asked: dict[str, Record], rounds: int) -> dict[str, Record]:
    """Measure each in a process of its own, in turns, and return the medians of what differs by round."""
    found: dict[str, list[Record]] = {name: [] for name in asked}
    for _ in range(rounds):
        for name, what in asked.items():
            command = [sys.executable, __file__, "--measure", json.dumps(what)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    return {
        name: {key: statistics.median(run[key] for run in runs) if key != "loss" else runs[0][key] for key in runs[0]}
        for name, runs in found.items()
    }


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def peak_memory(device: str) -> float:
    """Return the most megabytes that this process had, on the device that it computed on."""
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else peak_megabytes()


# Training


def train_part(folder: Path, options: argparse.Namespace) -> None:
    """Print how long a training step takes."""
    print(f"## Training\n\nFrozen norms, three of the backbone's five stages learning, SGD; {options.rounds} rounds.\n")
    rows = []
    for device in devices():
        for arch, size, batch in NETWORKS:
            data = demo_at(folder, size, good=4, defective=4, train_good=0)
            common = {"arch": arch, "size": size, "batch": batch, "data": str(data), "device": device}
            asked = {
                "plain": {"what": "train-plain", **common},
                "flawmask": {"what": "train-flawmask", **common, "roi_samples": None},
                "unchanged": {"what": "train-flawmask", **common, "roi_samples": 512},
            }
            found = in_turns(asked, options.rounds)
            rows += train_rows(f"{arch.removeprefix('maskrcnn_')}, {size} px, batch {batch}, {device}", found)
    heads = ["", "", "seconds per image", "times as fast", "peak memory, MB", "share of memory", "first loss"]
    print(table(heads, rows) + "\n")


def train_rows(title: str, found: dict[str, Record]) -> list[list[str]]:
    """Return the lines of one network."""
    names = {
        "plain": "torchvision, plain",
        "flawmask": "Flawmask",
        "unchanged": "Flawmask with 512 regions an image, as torchvision",
    }
    plain = found["plain"]
    return [
        [
            title if what == "plain" else "",
            names[what],
            f"{one['seconds']:.2f}",
            f"{plain['seconds'] / one['seconds']:.2f}",
            f"{one['megabytes']:.0f}",
            f"{one['megabytes'] / plain['megabytes']:.2f}",
            f"{one['loss']:.3f}",
        ]
        for what, one in found.items()
    ]


def spec_of(arch: str, size: int, split: CocoSplit, norm: Any = "frozen") -> ModelSpec:
    """Return the network that both train."""
    return ModelSpec(arch, split.class_names, image_size=size, norm=norm)  # type: ignore[arg-type]


def measure_plain_training(arch: str, size: int, batch: int, data: str, device: str, steps: int = 3) -> Record:
    """Return the seconds per image of the plain step, its peak memory and its first loss."""
    split, where = read_split(Path(data), "train"), torch.device(device)
    torch.manual_seed(0)
    model = plain_network(spec_of(arch, size, split))
    freeze(model, 3)
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


def measure_training(
    arch: str, size: int, batch: int, data: str, device: str, roi_samples: int | None, steps: int = 3
) -> Record:
    """Return the same of Flawmask's step."""
    split, where = read_split(Path(data), "train"), torch.device(device)
    config = TrainConfig(
        dataset_dir=Path(data), output_dir=Path(data), roi_samples=roi_samples, lr=1e-5, warmup_steps=0, weights="none"
    )
    spec = spec_of(arch, size, split)
    dtype = choose_precision("auto", where)
    torch.manual_seed(0)
    model = ready(config, build(spec), where, dtype, is_pretrained=True)
    step = make_step(config, model, where, dtype, 1, True, at_once=batch)
    items = SplitDataset(split, spec)

    def once(at: int) -> float:
        read = [items[place] for place in places(at, batch, split)]
        return sum(step(([image for image, _ in read], [target for _, target in read]), batch, 0.5).tolist()[:-1])

    return timed(once, batch, device, steps)


def places(at: int, batch: int, split: CocoSplit) -> list[int]:
    """Return which images a step has: the same for both."""
    return np.random.default_rng(at).integers(0, len(split.images), batch).tolist()


def timed(once: Callable[[int], float], batch: int, device: str, steps: int) -> Record:
    """Return the median seconds per image of some steps after the first, peak memory, and the first loss."""
    first = once(0)
    seconds = []
    for at in range(1, steps + 1):
        begun = time.perf_counter()
        once(at)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - begun) / batch)
    return {"seconds": statistics.median(seconds), "megabytes": peak_memory(device), "loss": first}


# The same losses


def loss_part(folder: Path, _: argparse.Namespace) -> None:
    """Print how far the losses of the same steps are apart, sampling as in torchvision."""
    data = demo_at(folder, 160)
    split = read_split(data, "train")
    cpu = torch.device("cpu")
    spec = spec_of("maskrcnn_resnet18_fpn", 160, split, "batch")
    spec = replace(spec, anchor_sizes=(6, 13, 26, 51, 102), proposals=200)
    config = TrainConfig(dataset_dir=data, output_dir=data, weights="none", roi_samples=512)
    torch.manual_seed(0)
    plain = plain_network(spec).train()
    model = build(spec)
    model.load_state_dict(plain.state_dict())
    dtype = choose_precision("auto", cpu)
    fast = make_step(config, ready(config, model, cpu, dtype, is_pretrained=False), cpu, dtype, 1, False, at_once=4)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.0005, weight_decay=0.01)
    full, small = PlainDataset(split), SplitDataset(split, spec)
    rows: list[tuple[float, float]] = []
    for at in range(STEPS):
        chosen = places(at, 4, split)
        torch.manual_seed(at)
        for group in optimizer.param_groups:
            group["lr"] = fast.schedule.at((at + 1) / STEPS / 2)
        images = [full[place][0] for place in chosen]
        targets = [full[place][1] for place in chosen]
        loss = sum(plain(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), config.clip_norm)
        optimizer.step()
        torch.manual_seed(at)
        read = [small[place] for place in chosen]
        found = fast(([image for image, _ in read], [target for _, target in read]), 4, (at + 1) / STEPS / 2)
        rows.append((float(loss.detach()), sum(found.tolist()[:-1])))
    means = np.array(rows).reshape(4, STEPS // 4, 2).mean(axis=1)
    precision = str(dtype).removeprefix("torch.")
    print(
        f"### The same losses\n\n{STEPS} steps of resnet18_fpn from the same weights on the same batches of 4 (demo "
        f"category, 160 px, AdamW), 512 regions an image in both; plain in float32, Flawmask in {precision}.\n"
    )
    lines = [
        [
            f"{at * STEPS // 4 + 1} to {(at + 1) * STEPS // 4}",
            f"{one:.4f}",
            f"{other:.4f}",
            f"{100 * (other / one - 1):+.1f} %",
        ]
        for at, (one, other) in enumerate(means)
    ]
    whole = means.mean(axis=0)
    lines.append(["all", f"{whole[0]:.4f}", f"{whole[1]:.4f}", f"{100 * (whole[1] / whole[0] - 1):+.1f} %"])
    print(table(["steps", "mean loss, plain", "mean loss, Flawmask", "difference"], lines) + "\n")


def sampling_part(folder: Path, options: argparse.Namespace) -> None:
    """Print what the number of regions does to the demo category's figures."""
    data = demo_at(folder, 256)
    settings: Record = {
        "dataset_dir": data,
        "arch": "maskrcnn_resnet18_fpn",
        "weights": "none",
        "image_size": 160,
        "epochs": 6,
        "proposals": 200,
        "device": "cpu",
        "overwrite": True,
    }
    rows = []
    split = read_split(data, "val")
    for name, samples in (("512 an image, as torchvision", 512), ("as many as the image has use for", None)):
        figures, seconds, waiting = [], [], []
        for seed in range(options.seeds):
            begun = time.perf_counter()
            done = train(TrainConfig(**settings, output_dir=folder / "run", roi_samples=samples, seed=seed))
            seconds.append(time.perf_counter() - begun)
            waiting += done.history["waiting"]
            predictor = Predictor(done.run_dir / "best.pt", "cpu")
            figures.append(quick_figures(split, predict_split(predictor.network, predictor.spec, split)[0]))
        shown = [[100 * one[key] for one in figures] for key in ("f1", "segm_ap")]
        cells = [f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})" for values in shown]
        rows.append([name, *cells, f"{statistics.median(seconds):.0f}", f"{100 * statistics.median(waiting):.1f}"])
    print(
        f"### Fewer regions\n\nThe demo category, resnet18_fpn from nothing, 160 px, 6 epochs, {options.seeds} seeds "
        f"each: mean, lowest and highest on {len(split.images)} validation images.\n"
    )
    costs = ["seconds of training", "of these waiting for images, %"]
    print(table(["regions the heads learn on", "F1, %", "mask AP, %", *costs], rows) + "\n")


# Inference


def infer_part(folder: Path, options: argparse.Namespace) -> None:
    """Print how long an image takes, and that the figures are the same."""
    data = demo_at(folder, 256)
    small = folder / "small" / "best.pt"
    train(
        TrainConfig(
            dataset_dir=data,
            output_dir=small.parent,
            arch="maskrcnn_resnet18_fpn",
            weights="none",
            image_size=160,
            epochs=6,
            proposals=200,
        )
    )
    print(f"## Inference\n\nFile to masks, one image at a time; {options.rounds} rounds.\n")
    large = demo_at(folder, 1024, good=4, defective=4, train_good=0)
    rows = []
    for device in devices():
        for title, model, images in (
            ("resnet18_fpn, 160 px, trained", small, data),
            ("resnet50_fpn, 512 px", quiet_network(folder, large, 512), large),
            ("resnet50_fpn, 800 px", quiet_network(folder, large, 800), large),
        ):
            common = {"model": str(model), "data": str(images), "device": device}
            asked = {
                "torchvision, plain": {"what": "infer-plain", **common},
                "Flawmask, --precision fp32": {"what": "infer-flawmask", **common, "precision": "fp32"},
                "Flawmask": {"what": "infer-flawmask", **common, "precision": "auto"},
                "Flawmask, --max_proposals 300": {
                    "what": "infer-flawmask", **common, "precision": "auto", "max_proposals": 300,
                },
            }  # fmt: skip
            found = in_turns(asked, options.rounds)
            plain = found["torchvision, plain"]
            for name, one in found.items():
                shown = [f"{100 * one[key]:.2f}" if one[key] is not None else "" for key in ("f1", "segm_ap")]
                cost = [f"{one['seconds']:.3f}", f"{plain['seconds'] / one['seconds']:.2f}", f"{one['megabytes']:.0f}"]
                first = f"{title}, {device}" if one is plain else ""
                rows.append([first, name, *cost, f"{one['instances']:.1f}", *(shown if model is small else ["", ""])])
    heads = [
        "",
        "",
        "seconds per image",
        "times as fast",
        "peak memory, MB",
        "instances per image",
        "F1, %",
        "mask AP, %",
    ]
    print(table(heads, rows) + "\n")


def quiet_network(folder: Path, data: Path, size: int) -> Path:
    """Return a checkpoint of a network that was not trained and finds next to nothing: what is timed with it is the
    network up to the box head."""
    path = folder / f"quiet_{size}.pt"
    if not path.is_file():
        torch.manual_seed(0)
        spec = spec_of("maskrcnn_resnet50_fpn", size, read_split(data, "val"))
        model = plain_network(spec)
        with torch.no_grad():
            model.roi_heads.box_predictor.cls_score.weight.mul_(0.02)
            model.roi_heads.box_predictor.cls_score.bias.copy_(torch.tensor([3.05, 0.0, 0.0]))
        checkpoint.save(path, model, spec)
    return path


@torch.inference_mode()
def measure_plain_inference(model: str, data: str, device: str) -> Record:
    """Return the seconds per image of torchvision's own forward pass, peak memory and figures."""
    where = torch.device(device)
    loaded, spec = checkpoint.load(Path(model))
    network = plain_network(spec)
    network.load_state_dict(loaded.state_dict())
    network.to(where).eval()
    split = read_split(Path(data), "val")
    items = PlainDataset(split)
    predictions, seconds = [], []
    for place in range(len(items)):
        begun = time.perf_counter()
        image, _ = items[place]
        with autocast(where):
            (found,) = network([image.to(where)])
        found = {name: tensor.float().cpu() for name, tensor in found.items()}
        instances = []
        for label, score, box, mask in zip(
            *(found[key] for key in ("labels", "scores", "boxes", "masks")), strict=True
        ):
            pixels = (mask[0] > 0.5).numpy()
            corners = tuple(box.tolist())
            instances.append(
                Instance(spec.classes[int(label) - 1], float(score), corners, to_rle(pixels), int(pixels.sum()))
            )
        predictions.append(Prediction(*image.shape[1:], tuple(instances)))
        seconds.append(time.perf_counter() - begun)
    return judged(split, predictions, seconds[1:], device)


def measure_inference(model: str, data: str, device: str, precision: Any, max_proposals: int | None = None) -> Record:
    """Return the same of Flawmask's `predict_split`."""
    predictor = Predictor(Path(model), device, precision=precision, max_proposals=max_proposals)
    split = read_split(Path(data), "val")
    warm = replace(split, images=split.images[:1])
    predict_split(predictor.network, predictor.spec, warm)
    begun = time.perf_counter()
    predictions, _ = predict_split(predictor.network, predictor.spec, split)
    seconds = (time.perf_counter() - begun) / len(split.images)
    return judged(split, predictions, [seconds], device)


def judged(split: CocoSplit, predictions: list[Prediction], seconds: list[float], device: str) -> Record:
    """Return what a measurement of inference says."""
    found = sum(len(one.instances) for one in predictions) / len(predictions)
    cost = {"seconds": statistics.mean(seconds), "megabytes": peak_memory(device), "instances": found}
    return cost | quick_figures(split, predictions)


MEASURES: dict[str, Callable[..., Record]] = {
    "train-plain": measure_plain_training,
    "train-flawmask": measure_training,
    "infer-plain": measure_plain_inference,
    "infer-flawmask": measure_inference,
}

PARTS: dict[str, Callable[[Path, argparse.Namespace], None]] = {
    "train": train_part,
    "losses": loss_part,
    "sampling": sampling_part,
    "infer": infer_part,
}

if __name__ == "__main__":
    main()
