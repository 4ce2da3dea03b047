"""Measures inference, evaluation and reading on a GPU, a row at a time, for `gpu.py` beside this file.

Each function yields rows as soon as they are measured: dictionaries of values by the columns' names.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from inference import plain_prediction, sparing_network
from measuring import Record, demo_at
from plain import autocast, plain_network

from flawmask import images
from flawmask.coco import CocoSplit, read_split
from flawmask.data.demo import DemoConfig, generate
from flawmask.data.prepare import PrepareConfig, prepare
from flawmask.evaluation.config import EvaluateConfig
from flawmask.evaluation.evaluate import evaluate, predict_split, write_evaluation
from flawmask.evaluation.measure import measure
from flawmask.inference.torch_backend import TorchBackend
from flawmask.model import checkpoint
from flawmask.model.spec import ModelSpec
from flawmask.prediction import Prediction
from flawmask.training.augmentation import Augmentation
from flawmask.training.cache import PixelCache
from flawmask.training.loader import Augmenting, Order, SplitDataset, default_workers, make_loader, read

ROUNDS = 3
"""The number of rounds, whose median is shown."""


def images_of(data: Path, count: int) -> CocoSplit:
    """Return a split with `count` images of `train`. If there are fewer, they are repeated."""
    split = read_split(data, "train")
    return replace(split, images=(split.images * -(-count // len(split.images)))[:count])


def inference(
    device: torch.device, folder: Path, size: int, count: int, batch: int = 8, pixels: int = 1024, rounds: int = ROUNDS
) -> Iterator[Record]:
    """Yield the times of an image from file to masks. The first row is torchvision's own forward pass with autocast.

    Args:
        device: the device to measure.
        folder: a folder for images and checkpoint, which may be there already.
        size: the shorter side of resized images.
        count: the images of a round.
        batch: torchvision's batch size; Flawmask uses its default.
        pixels: height and width of the images.
        rounds: the number of turns of each way.
    """
    data = demo_at(folder, pixels, good=12, defective=12, train_good=0)
    model = sparing_network(folder, data, size)
    split = images_of(data, count)
    ways: dict[str, Callable[[CocoSplit], list[Prediction]]] = {
        "torchvision, fp16 autocast": _plain(model, device, batch),
        "Flawmask": _flawmask(model, device),
        "Flawmask, --max_proposals 1000": _flawmask(model, device, max_proposals=1000),
    }
    first: dict[str, float] = {}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, float] = {}
    for at in range(rounds + 1):
        for name, way in ways.items():
            begun = time.perf_counter()
            predictions = way(split)
            seconds = (time.perf_counter() - begun) / count
            found[name] = sum(len(one.instances) for one in predictions) / count
            if at == 0:
                first[name] = seconds
            else:
                taken[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in taken.items()}
    plain = next(iter(medians.values()))
    for name, seconds in medians.items():
        yield {
            "resnet50_fpn": f"{size} px, {device.type}",
            "way": name,
            "ms per image": f"{1000 * seconds:.1f}",
            "images/s": f"{1 / seconds:.1f}",
            "times as fast": f"{plain / seconds:.2f}",
            "first pass, ms per image": f"{1000 * first[name]:.1f}",
            "instances per image": f"{found[name]:.1f}",
        }


def _flawmask(model: Path, device: torch.device, **settings: Any) -> Callable[[CocoSplit], list[Prediction]]:
    backend = TorchBackend.load(model, str(device), **settings)
    return lambda split: predict_split(backend, split)[0]


def _plain(model: Path, device: torch.device, batch: int) -> Callable[[CocoSplit], list[Prediction]]:
    loaded, spec = checkpoint.load(model)
    network = plain_network(spec)
    network.load_state_dict(loaded.state_dict())
    network.to(device).eval()

    @torch.inference_mode()
    def predict(split: CocoSplit) -> list[Prediction]:
        predictions = []
        for start in range(0, len(split.images), batch):
            read = [images.read_image(split.image_path(one)) for one in split.images[start : start + batch]]
            tensors = [(torch.from_numpy(pixels).permute(2, 0, 1).float() / 255).to(device) for pixels in read]
            with autocast(device):
                found = network(tensors)
            predictions += [
                plain_prediction(one, spec, *pixels.shape[:2]) for one, pixels in zip(found, read, strict=True)
            ]
        return predictions

    return predict


def many_sizes(folder: Path, count: int) -> Path:
    """Return a COCO folder whose `val` has about `count` images of the demo category, all of different sizes."""
    target = folder / "data_sizes"
    if not target.is_dir():
        drawn = DemoConfig(
            mvtec_root=folder / "demo_sizes", image_size=256, good=count // 2, defective=count // 2, train_good=0
        )
        generate(drawn)
        random = np.random.default_rng(0)
        category = drawn.mvtec_root / drawn.category
        sizes: dict[str, tuple[int, int]] = {}
        for path in sorted(category.rglob("*.png")):
            of_image = f"{path.parent.name}/{path.stem.removesuffix('_mask')}"
            width, height = sizes.setdefault(of_image, tuple(random.integers(100, 630, 2).tolist()))
            pixels = images.read_pixels(path)
            images.write_png(path, cv2.resize(pixels, (width, height), interpolation=cv2.INTER_NEAREST))  # type: ignore[arg-type]
        prepare(PrepareConfig(mvtec_root=drawn.mvtec_root, category=drawn.category, output_dir=target, train_ratio=0.2))
    return target


def evaluation(device: torch.device, folder: Path, data: Path, model: Path, name: str = "val") -> Iterator[Record]:
    """Yield the time of `evaluate`, as a command and for each of its parts.

    Args:
        device: the device to measure.
        folder: a folder for the results.
        data: a COCO folder with images of many sizes.
        model: a checkpoint.
        name: the split to evaluate.
    """

    def row(what: str, seconds: float, note: str = "") -> Record:
        return {"evaluate": what, "seconds": f"{seconds:.2f}", "note": note}

    command = [sys.executable, "-m", "flawmask", "evaluate", "--model", model, "--dataset_dir", data]
    command += ["--split", name, "--device", device, "--conf", "0.5", "--output_dir", folder / "evaluated"]
    begun = time.perf_counter()
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    yield row("the command", time.perf_counter() - begun, "in a process of its own")
    begun = time.perf_counter()
    backend = TorchBackend.load(model, str(device))
    yield row("start-up", time.perf_counter() - begun, "without the imports")
    split = read_split(data, name)
    for which in ("first", "second"):
        begun = time.perf_counter()
        predictions, seconds = predict_split(backend, split)
        taken = time.perf_counter() - begun
        medians = ", ".join(f"{part} {1000 * one:.1f}" for part, one in seconds.items())
        yield row(f"predictions, {which} pass", taken, f"{len(split.images)} images; medians, ms per image: {medians}")
    begun = time.perf_counter()
    measure(split, predictions, 0.5, 0, resamples=1000, seed=0)
    measuring = time.perf_counter() - begun
    yield row("figures and their intervals", measuring)
    config = EvaluateConfig(
        dataset_dir=data, model=model, split=name, output_dir=folder / "evaluated", device=str(device), conf=0.5
    )
    facts = {"dataset": str(data), "model": str(model), "threshold": {"value": 0.5, "how": "given"}}
    begun = time.perf_counter()
    write_evaluation(folder / "evaluated", split, predictions, 0.5, config, 0, facts, [])
    yield row("pictures and report", time.perf_counter() - begun - measuring)
    begun = time.perf_counter()
    evaluate(config)
    yield row("all of it once more", time.perf_counter() - begun, "in this process, which has met each size")


def reading(
    folder: Path, size: int, count: int, workers: Sequence[int | None], *, pin: bool, batch: int = 8, pixels: int = 1024
) -> Iterator[Record]:
    """Yield the images per second of the training's loader, if nothing else limits it, without and with augmentation.

    Args:
        folder: a folder for the cache and the images, which may be there already.
        size: the shorter side of resized images.
        count: the images of an epoch.
        workers: reading processes; None for the default.
        pin: use page-locked memory, as for CUDA.
        batch: images per step.
        pixels: height and width of the images.
    """
    split = images_of(demo_at(folder, pixels, good=12, defective=12, train_good=0), count)
    spec = ModelSpec("maskrcnn_resnet50_fpn", split.class_names, image_size=size)
    for number, level in product(workers, ("off", "light")):
        shapes = [spec.resized(one["height"], one["width"]) for one in split.images]
        augmenting = Augmenting(Augmentation("light"), 0) if level == "light" else None
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            items = SplitDataset(split, spec, PixelCache(Path(cache) / "pixels", shapes, 10**11), augmenting)
            order = Order(shapes, batch, seed=0, marks_epochs=items.changes)
            loader = make_loader(items, order, workers=number, pin=pin)
            seconds = []
            for _ in range(2):
                begun = time.perf_counter()
                for _ in read(loader):
                    pass
                seconds.append(time.perf_counter() - begun)
            del loader
        yield {
            "size": f"{pixels} px to {size} px",
            "workers": default_workers(on_cuda=pin) if number is None else number,
            "augmentation": level,
            "first epoch, images/s": f"{count / seconds[0]:.0f}",
            "second epoch, from the cache": f"{count / seconds[1]:.0f}",
        }
