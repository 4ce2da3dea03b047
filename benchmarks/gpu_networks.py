"""Checks every architecture on a GPU for `gpu.py` beside this file, one row each.

An architecture must train, predict with scores of fine resolution, agree with the CPU, and release its memory.
"""

import copy
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import Record

from flawmask.errors import FlawmaskError
from flawmask.model.arch import Arch
from flawmask.model.build import detector_of, for_inference, set_score_floor
from flawmask.model.layers import to_device
from flawmask.model.spec import ModelSpec
from flawmask.runtime import choose_precision
from flawmask.training.config import TrainConfig
from flawmask.training.step import Step, StepFigures, make_step

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from random_network import ARCHITECTURES, infer, patchwork, random_network, spec_of, tensors_of
from splitting import batch_for

TOLERANCE = 1e-4
"""By how much a device's predictions may differ from the CPU's: scores and mask probabilities by so much, boxes by so
much of the image's longer side."""

VALIDATIONS = 3
"""The number of networks that are made for predictions, one after the other, before memory is measured."""


def networks(device: torch.device, archs: Sequence[Arch] = ARCHITECTURES) -> Iterator[Record]:
    """Yield the results of a random network of each architecture."""
    for arch in archs:
        spec = spec_of(arch)
        try:
            model = random_network(spec)
        except FlawmaskError as error:
            yield {"architecture": arch, "a step": f"not measured: {str(error).split(':')[0]}"}
            continue
        yield {
            "architecture": arch,
            "a step": "finite" if _learns(model, spec, device) else "NOT finite",
            "gradient of 4 and of 1 + 1 + 1 + 1": f"{_apart(model, spec, device):.1e}",
            "distinct scores of 8 images": _distinct(model, spec, device),
            "kept after 3 validations, MB": f"{_kept(model, spec, device) / 1e6:.1f}",
            **_against_the_cpu(model, spec, device),
        }


def _step(
    model: torch.nn.Module, spec: ModelSpec, device: torch.device, dtype: torch.dtype, micro_batch_size: int
) -> Step:
    """Return a step of a copy of the network."""
    training = to_device(copy.deepcopy(model), device).train()
    detector_of(spec).train_in(training, device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(dataset_dir=Path(folder), output_dir=Path(folder) / "run", arch=spec.arch, compile="off")
    return make_step(config, training, spec, device, dtype, "detector", micro_batch_size=micro_batch_size)


def _learns(model: torch.nn.Module, spec: ModelSpec, device: torch.device) -> bool:
    """Return whether a step at the default precision has finite losses and a finite gradient."""
    step = _step(model, spec, device, choose_precision("auto", device), 4)
    return not StepFigures.read(step(batch_for(spec), 0.5)).not_finite


def _apart(model: torch.nn.Module, spec: ModelSpec, device: torch.device) -> float:
    """Return how far the gradients of a batch are apart that passes at once and image by image, in float32: the length
    of the difference as a share of the gradient's."""
    gradients = []
    for micro_batch_size in (4, 1):
        step = _step(model, spec, device, torch.float32, micro_batch_size)
        torch.manual_seed(3)
        step.add_gradients(batch_for(spec))
        of_all = [one.grad.flatten() for one in step.model.parameters() if one.grad is not None]
        gradients.append(torch.cat(of_all).double())
    return float((gradients[0] - gradients[1]).norm() / gradients[0].norm())


def _inferred(network: Any, spec: ModelSpec, batch: Sequence[Any]) -> list[dict[str, torch.Tensor]]:
    return [tensors_of(one) for one in infer(network, spec, batch)]


def _predicting(model: torch.nn.Module, spec: ModelSpec, device: torch.device) -> list[dict[str, torch.Tensor]]:
    """Return the predictions of a network at the default precision for a batch of eight images."""
    network = for_inference(model, spec, device, choose_precision("auto", device))
    set_score_floor(network, 0.001)
    return _inferred(network, spec, [patchwork(170, 201, seed) for seed in range(8)])


def _distinct(model: torch.nn.Module, spec: ModelSpec, device: torch.device) -> str:
    """Return the number of different scores and of all scores, without those close to 0 or 1."""
    scores = torch.cat([one["scores"] for one in _predicting(model, spec, device)])
    between = scores[(scores > 1e-6) & (scores < 1 - 1e-6)].tolist()
    return f"{len(set(between))} of {len(between)}"


def _kept(model: torch.nn.Module, spec: ModelSpec, device: torch.device) -> float:
    """Return the bytes of GPU memory that remain in use after networks have predicted in turn. NaN on a CPU."""
    if device.type != "cuda":
        return math.nan
    _predicting(model, spec, device)  # the first network also allocates the libraries' own memory
    before = torch.cuda.memory_allocated(device)
    for _ in range(VALIDATIONS):
        _predicting(model, spec, device)
    return torch.cuda.memory_allocated(device) - before


def _against_the_cpu(model: torch.nn.Module, spec: ModelSpec, device: torch.device) -> Record:
    """Return the difference between predictions in float32 and the CPU's.

    Beside it stands how far the CPU's are from themselves when it convolves without oneDNN: sums in another order,
    whose rounding a network of random weights, magnified so that it is sure of something, may magnify in turn.
    """
    here, there = (for_inference(model, spec, where, torch.float32) for where in (torch.device("cpu"), device))
    for network in (here, there):
        set_score_floor(network, 0.05)
    batches = [[patchwork(75, 91, seed)] for seed in range(3)]
    expected, found = ([_inferred(network, spec, one)[0] for one in batches] for network in (here, there))
    with torch.backends.mkldnn.flags(enabled=False):
        otherwise = [_inferred(here, spec, one)[0] for one in batches]
    largest, rounding = (differences(expected, others, 91) for others in (found, otherwise))
    return {
        "instances": sum(len(one["labels"]) for one in expected),
        **{
            f"largest difference of {name}": "n/a" if name not in largest else f"{largest[name]:.1e}"
            for name in ("scores", "boxes", "masks")
        },
        "within 1e-4": "yes" if max(largest.values()) <= TOLERANCE else "no",
        "of the CPU without oneDNN": ", ".join(f"{value:.1e}" for value in rounding.values()),
    }


def differences(
    expected: Sequence[dict[str, torch.Tensor]], found: Sequence[dict[str, torch.Tensor]], longest: int
) -> dict[str, float]:
    """Return the largest differences of `scores`, `boxes` (as a share of the image's longer side) and, where there are
    any, `masks`: each detection is held against the nearest of its class. Infinite where one has none.

    Args:
        expected: the results of `infer` for each image.
        found: those to compare with them.
        longest: the longer side of the images in pixels.
    """
    worst: dict[str, float] = {name: 0.0 for name in ("scores", "boxes", "masks") if name in expected[0]}
    for ours, theirs in zip(expected, found, strict=True):
        left = list(range(len(theirs["labels"])))
        for at, label in enumerate(ours["labels"].tolist()):
            same = [one for one in left if int(theirs["labels"][one]) == label]
            if not same:
                return dict.fromkeys(worst, float("inf"))
            apart = [float((theirs["boxes"][one] - ours["boxes"][at]).abs().max()) for one in same]
            one = same[int(np.argmin(apart))]
            left.remove(one)
            for name, before in worst.items():
                difference = float((theirs[name][one] - ours[name][at]).abs().max())
                worst[name] = max(before, difference / longest if name == "boxes" else difference)
        if left:
            return dict.fromkeys(worst, float("inf"))
    return worst
