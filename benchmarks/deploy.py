"""Times exported models against PyTorch, and prints a section of docs/benchmarks.md.

    python benchmarks/deploy.py --model RUN/best.pt                       # about 15 minutes on two cores
    python benchmarks/deploy.py --model RUN/best.pt --rounds 1 --formats onnx-fp32 openvino-bf16

The images are the validation images of the run's data set (`--dataset_dir` names another one). Every model goes from
the same pixels to masks as RLE, by the same post-processing. Each measurement is a process of its own, and they take
turns. The plain way is torchvision's forward pass in float32, with torchvision's RoIAlign and 1000 region proposals.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inference import evaluated, plain_prediction
from measuring import Record, in_turns, measured_here, table
from plain import plain_network

from flawmask import images
from flawmask.coco import read_split
from flawmask.export.config import ExportConfig
from flawmask.export.export import export
from flawmask.inference.backend import Backend, prepared
from flawmask.inference.exported import file_of
from flawmask.inference.exported_backend import ExportedBackend
from flawmask.inference.torch_backend import TorchBackend
from flawmask.model import checkpoint
from flawmask.prediction import post_process

FORMATS = ("onnx-fp32", "onnx-int8", "openvino-fp32", "openvino-fp16", "openvino-bf16", "openvino-int8")
THREADS, BATCHES = (1, 2), (1, 8)

FIRST = """
import sys
from pathlib import Path
from flawmask.inference.predictor import Predictor
Predictor(sys.argv[1])(sys.argv[2])
"""


def main() -> None:
    """Print the section, or measure once when called by itself with `--measure`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="the checkpoint")
    parser.add_argument("--dataset_dir", type=Path, help="the COCO folder; by default the one of the run")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds; the median is shown")
    parser.add_argument("--images", type=int, default=48, help="the most images to time and to evaluate with")
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--unproven", action="store_true", help="time a network that was not trained")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if measured_here(options, MEASURES):
        return
    data = options.dataset_dir or Path(
        json.loads((options.model.parent / "config.json").read_text())["settings"]["dataset_dir"]
    )
    with tempfile.TemporaryDirectory() as name:
        folders: dict[str, Path] = {}
        refused: dict[str, str] = {}
        for one in options.formats:
            runtime, precision = one.split("-")
            config: Any = {"model": options.model, "dataset_dir": data, "format": runtime, "precision": precision}
            try:
                folders[one] = export(
                    ExportConfig(**config, output_dir=Path(name) / one, unproven=options.unproven)
                ).folder
            except Exception as error:  # a row says so
                refused[one] = " ".join(str(error).split()).replace("|", "/")
        print_section(options, data, folders, refused)


def print_section(options: argparse.Namespace, data: Path, folders: dict[str, Path], refused: dict[str, str]) -> None:
    """Print the tables. An export that was refused has a row with the reason."""
    common = {"data": str(data), "images": options.images, "device": "cpu"}
    rows = []
    for threads in THREADS:
        for batch in BATCHES:
            os.environ["OMP_NUM_THREADS"] = str(threads)
            shared = {**common, "threads": threads, "batch": batch}
            models = {"torchvision, plain, float32": {"what": "plain", "model": str(options.model), **shared}}
            for precision in ("fp32", "bf16"):
                torch_model = {"what": "torch", "model": str(options.model), "precision": precision, **shared}
                models[f"Flawmask, PyTorch, {precision}"] = torch_model
            for name, folder in folders.items():
                models[name] = {"what": "exported", "model": str(folder), **shared}
            found = in_turns(models, options.rounds)
            plain = found["torchvision, plain, float32"]
            for name, one in found.items():
                cells = [f"{1000 * one['seconds']:.1f}", f"{plain['seconds'] / one['seconds']:.2f}"]
                cells += [f"{one['load']:.2f}", f"{one['megabytes'] - one['imports']:.0f}"]
                cells += [f"{100 * one[key]:.2f}" if one[key] is not None else "" for key in ("f1", "segm_ap")]
                rows.append([f"{threads}" if one is plain else "", f"{batch}" if one is plain else "", name, *cells])
    rows += [["", "", name, f"refused: {reason}", "", "", "", "", ""] for name, reason in refused.items()]
    print("## Exported models\n")
    print(f"`{options.model}`, {options.images} images at most; the median of {options.rounds} rounds.\n")
    heads = ["threads", "batch", "", "ms per image", "times as fast", "s to load", "memory, MB", "F1, %", "mask AP, %"]
    print(table(heads, rows))
    print("\nFrom the start of the process to the first result:\n")
    sizes = {name: sum(path.stat().st_size for path in folder.glob("model.*")) for name, folder in folders.items()}
    firsts = [
        [name, f"{sizes[name] / 1e6:.1f}", f"{first_result(folder, data):.2f}"] for name, folder in folders.items()
    ]
    print(table(["", "MB on disk", "s to the first result"], firsts))


def first_result(folder: Path, data: Path) -> float:
    """Return the seconds from the start of a process to its first prediction; the second of two starts counts."""
    split = read_split(data, "val")
    command = [sys.executable, "-c", FIRST, str(folder), str(split.image_path(split.images[0]))]
    for _ in range(2):
        begun = time.perf_counter()
        subprocess.run(command, check=True)
    return time.perf_counter() - begun


@torch.inference_mode()
def measure_plain(model: str, data: str, device: str, images: int, threads: int, batch: int) -> Record:
    """Return the milliseconds of torchvision's own forward pass, and its figures."""
    torch.set_num_threads(threads)
    begun = time.perf_counter()
    loaded, spec = checkpoint.load(Path(model))
    network = plain_network(spec)
    network.load_state_dict(loaded.state_dict())
    network.to(device).eval()
    load = time.perf_counter() - begun

    def predict(several: list[Any]) -> list[Any]:
        tensors = [torch.from_numpy(one).permute(2, 0, 1) / 255 for one in several]
        found = network(tensors)
        return [plain_prediction(one, spec, *pixels.shape[:2]) for one, pixels in zip(found, several, strict=True)]

    return {"load": load} | timed(predict, data, images, batch)


def measure_torch(model: str, data: str, device: str, images: int, threads: int, batch: int, precision: Any) -> Record:
    """Return the milliseconds of Flawmask's PyTorch backend, and its figures."""
    torch.set_num_threads(threads)
    begun = time.perf_counter()
    backend = TorchBackend.load(Path(model), device, precision=precision)
    return {"load": time.perf_counter() - begun} | timed(with_backend(backend), data, images, batch)


def measure_exported(model: str, data: str, device: str, images: int, threads: int, batch: int) -> Record:
    """Return the milliseconds of an exported model, and its figures."""
    assert device == "cpu"
    begun = time.perf_counter()
    backend = ExportedBackend.load(file_of(Path(model)), threads)
    return {"load": time.perf_counter() - begun} | timed(with_backend(backend), data, images, batch)


def with_backend(backend: Backend) -> Callable[[list[Any]], list[Any]]:
    """Return the function that predicts a batch of images."""
    spec = backend.spec

    def predict(several: list[Any]) -> list[Any]:
        found = backend.infer([prepared(one, backend) for one in several])
        pairs = zip(found, several, strict=True)
        return [post_process(one, spec.classes, *pixels.shape[:2], join=spec.join) for one, pixels in pairs]

    return predict


def timed(predict: Callable[[list[Any]], list[Any]], data: str, count: int, batch: int) -> Record:
    """Return the median seconds per image over batches of one size, and the figures."""
    split = read_split(Path(data), "val")
    split = replace(split, images=split.images[:count])
    pixels = [images.read_image(split.image_path(one)) for one in split.images]
    parts = [pixels[start : start + batch] for start in range(0, len(pixels) - batch + 1, batch)]
    predict(parts[0])
    seconds = []
    for part in parts:
        begun = time.perf_counter()
        predict(part)
        seconds.append((time.perf_counter() - begun) / len(part))
    return evaluated(split, [predict([one])[0] for one in pixels], float(np.median(seconds)))


MEASURES: dict[str, Callable[..., Record]] = {
    "plain": measure_plain,
    "torch": measure_torch,
    "exported": measure_exported,
}

if __name__ == "__main__":
    main()
