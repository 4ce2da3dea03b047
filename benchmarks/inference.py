"""Times inference against the plain way, and prints a section of docs/benchmarks.md.

    python benchmarks/inference.py                  # about 20 minutes on two cores
    python benchmarks/inference.py --rounds 5

The plain way is torchvision's own forward pass in float32 (with autocast on a GPU), one image after the other. Both use
the same images, weights and resolution, and go from files to masks as RLE. Compared measurements take turns, each in a
process of its own. On a machine with a GPU, everything is measured there too.
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
from plain import PlainDataset, autocast, plain_network

from flawmask.coco import CocoSplit, read_split
from flawmask.evaluation.evaluate import predict_split
from flawmask.evaluation.measure import decide_verdicts, quick_figures
from flawmask.evaluation.ranking import auroc, rank
from flawmask.inference.config import MAX_PROPOSALS
from flawmask.inference.torch_backend import TorchBackend
from flawmask.masks import to_rle
from flawmask.model import checkpoint
from flawmask.model.spec import ModelSpec
from flawmask.prediction import Instance, Prediction
from flawmask.training.config import TrainConfig
from flawmask.training.loop import train

LIMITS: dict[str, Record] = {
    "as they are": {},
    "--max_proposals 1000": {"max_proposals": 1000},
    "--max_proposals 100": {"max_proposals": 100},
    "--max_proposals 50": {"max_proposals": 50},
    "--max_proposals 20": {"max_proposals": 20},
    "--score_floor 0.1": {"score_floor": 0.1},
    "--score_floor 0.3": {"score_floor": 0.3},
    "--inference_batch_size 4": {"batch_size": 4},
}
"""The settings of inference that are limits, and the values that are tried."""


def main() -> None:
    """Print the section, or measure once when called by itself with `--measure`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds; the median is shown")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--parts", nargs="+", default=["speed", "limits"], choices=["speed", "limits"])
    options = parser.parse_args()
    if measured_here(options, MEASURES):
        return
    print("## Inference")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = demo_at(folder, 256)
        small = trained(folder, data)
        if "speed" in options.parts:
            print_speed(folder, small, data, options.rounds)
        if "limits" in options.parts:
            print_limits(folder, small, data, options.rounds)


def trained(folder: Path, data: Path) -> Path:
    """Return the checkpoint of a network that was trained on the demo category for a few minutes."""
    settings: Record = {
        "arch": "maskrcnn_resnet18_fpn",
        "weights": "none",
        "image_size": 160,
        "epochs": 12,
        "train_augment": "off",
    }
    train(TrainConfig(dataset_dir=data, output_dir=folder / "small", **settings))
    return folder / "small" / "best.pt"


def print_speed(folder: Path, small: Path, data: Path, rounds: int) -> None:
    """Print the time per image, and that the metrics are the same."""
    large = demo_at(folder, 1024, good=12, defective=12, train_good=0)
    rows = []
    for device in devices():
        for title, model, images in (
            ("resnet18_fpn, 160 px, trained", small, data),
            ("resnet50_fpn, 512 px", sparing_network(folder, large, 512), large),
            ("resnet50_fpn, 800 px", sparing_network(folder, large, 800), large),
        ):
            common = {"model": str(model), "data": str(images), "device": device}
            ours: Record = {"what": "flawmask", **common}
            measurements: dict[str, Record] = {"torchvision, plain": {"what": "plain", **common}}
            if model is small:  # the small model has 200
                measurements["Flawmask, --precision fp32"] = {**ours, "precision": "fp32"}
            else:
                measurements["Flawmask, --max_proposals 1000 --precision fp32"] = {
                    **ours,
                    "max_proposals": 1000,
                    "precision": "fp32",
                }
                measurements["Flawmask, --max_proposals 1000"] = {**ours, "max_proposals": 1000}
            measurements["Flawmask"] = ours
            found = in_turns(measurements, rounds)
            plain = found["torchvision, plain"]
            for name, one in found.items():
                cells = [f"{one['seconds']:.3f}", f"{plain['seconds'] / one['seconds']:.2f}", f"{one['megabytes']:.0f}"]
                cells += [f"{one['imports']:.0f}", f"{one['instances']:.1f}"]
                figures = percent(one) if model is small else ["", ""]
                rows.append([f"{title}, {device}" if one is plain else "", name, *cells, *figures])
    print(
        f"\n### Speed\n\nThe time is from the file to masks, one image at a time on a CPU; the median of {rounds} "
        "rounds. With the ResNet-18, both programs keep 200 region proposals of an image, which is Flawmask's default "
        "for it. With the ResNet-50, torchvision keeps 1000, and Flawmask keeps 300 unless a row says otherwise. The "
        "ResNet-50 was not trained. Its weights were changed so that a hundredth of its region proposals on one image "
        "have high scores, and it predicts something. The predictions themselves have no meaning.\n"
    )
    heads = ["", "", "s per image", "times as fast", "peak, MB", "imports, MB", "instances per image"]
    print(table([*heads, "F1, %", "mask AP, %"], rows))


def print_limits(folder: Path, small: Path, data: Path, rounds: int) -> None:
    """Print how the limits change the metrics, and the time that they save."""
    model, spec = checkpoint.load(small)
    checkpoint.save(folder / "large.pt", model, replace(spec, proposals=1000))
    common = {"what": "flawmask", "model": str(folder / "large.pt"), "data": str(data), "device": "cpu"}
    found = in_turns({name: {**common, **limit} for name, limit in LIMITS.items()}, rounds)
    rows = [
        [name, f"{one['seconds']:.3f}", f"{one['instances']:.1f}", *percent(one), f"{100 * one['auroc']:.2f}"]
        for name, one in found.items()
    ]
    print(
        "\n### Limits\n\nThe table shows the trained ResNet-18 on its 44 validation images. Its checkpoint says "
        "1000 region proposals, as torchvision's default. F1 is at a threshold of 0.5; one image more or less changes "
        "it by 1.7 points. AUROC is that of the images' scores.\n"
    )
    print(table(["", "s per image", "instances per image", "F1, %", "mask AP, %", "AUROC, %"], rows))


def percent(found: Record) -> list[str]:
    """Return F1 and mask AP in per cent."""
    return [f"{100 * found[key]:.2f}" for key in ("f1", "segm_ap")]


@torch.inference_mode()
def sparing_network(folder: Path, data: Path, size: int) -> Path:
    """Return a checkpoint of an untrained network that predicts a few instances on an image, like a trained one."""
    path = folder / f"sparing_{size}.pt"
    if not path.is_file():
        torch.manual_seed(0)
        split = read_split(data, "val")
        spec = ModelSpec("maskrcnn_resnet50_fpn", split.class_names, image_size=size)
        model = plain_network(spec).eval()
        predictor = model.roi_heads.box_predictor
        seen: list[torch.Tensor] = []
        handle = predictor.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(1)))
        model([PlainDataset(split)[0][0]])
        handle.remove()
        weight, bias = predictor.cls_score.weight, predictor.cls_score.bias
        weight[:2] = 0  # background and good do not depend on the region, and good scores low
        weight[2:] *= 10 / (seen[0] @ weight[2:].T).std()  # few scores are between 0.05 and 0.95
        surest = float((seen[0] @ weight[2:].T).quantile(0.99))
        bias.copy_(torch.tensor([0.0, -20.0, -surest]))
        checkpoint.save(path, model, spec)
    return path


@torch.inference_mode()
def measure_plain(model: str, data: str, device: str) -> Record:
    """Return the seconds per image of torchvision's own forward pass, and its metrics."""
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
        predictions.append(plain_prediction(found, spec, *image.shape[1:]))
        seconds.append(time.perf_counter() - begun)
    return evaluated(split, predictions, statistics.mean(seconds[1:]))


def plain_prediction(found: dict[str, torch.Tensor], spec: ModelSpec, height: int, width: int) -> Prediction:
    """Return the predictions of torchvision's forward pass for an image, with masks as RLE."""
    found = {name: tensor.float().cpu() for name, tensor in found.items()}
    instances = []
    for label, score, box, mask in zip(*(found[key] for key in ("labels", "scores", "boxes", "masks")), strict=True):
        pixels = (mask[0] > 0.5).numpy()
        corners: Any = tuple(box.tolist())
        instances.append(
            Instance(spec.classes[int(label) - 1], float(score), corners, to_rle(pixels), int(pixels.sum()))
        )
    return Prediction(height, width, tuple(instances))


def measure_flawmask(
    model: str,
    data: str,
    device: str,
    precision: Any = "auto",
    max_proposals: int = MAX_PROPOSALS,
    score_floor: float = 0.05,
    batch_size: int | None = None,
) -> Record:
    """Return the seconds per image of Flawmask's `predict_split`, and its metrics."""
    backend = TorchBackend.load(
        Path(model), device, precision=precision, max_proposals=max_proposals, score_floor=score_floor
    )
    split = read_split(Path(data), "val")
    predict_split(backend, replace(split, images=split.images[:1]))
    begun = time.perf_counter()
    predictions, _ = predict_split(backend, split, batch_size)
    return evaluated(split, predictions, (time.perf_counter() - begun) / len(split.images))


def evaluated(split: CocoSplit, predictions: list[Prediction], seconds: float) -> Record:
    """Return the result of a measurement of inference."""
    found = sum(len(one.instances) for one in predictions) / len(predictions)
    images = decide_verdicts(split, predictions, 0.5, 0)
    truth, scores = np.array([one.truth for one in images]), np.array([one.score for one in images])
    figures = quick_figures(split, predictions) | {"auroc": float(auroc(rank(truth, scores))[0])}
    return {"seconds": seconds, "instances": found, **figures}


MEASURES: dict[str, Callable[..., Record]] = {"plain": measure_plain, "flawmask": measure_flawmask}

if __name__ == "__main__":
    main()
