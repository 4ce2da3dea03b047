"""Checkpoints: a network's spec and weights in one file that contains no code."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import nn

import flawmask
from flawmask.errors import FlawmaskError
from flawmask.good_names import GOOD
from flawmask.model.build import build_uninitialised
from flawmask.model.spec import ModelSpec
from flawmask.model.weights import StateDict, find_state_dict, load_file, save_file

HEAD = "roi_heads.box_predictor.cls_score.weight"


def save(path: Path, model: nn.Module, spec: ModelSpec, **facts: float | int | str | None) -> None:
    """Write the network to `path`, whole or not at all.

    Args:
        path: the file, `.pt`.
        model: the network in float32, on any device.
        spec: the spec that `build` made it from.
        facts: further plain values to store, such as the epoch and the loss.

    Raises:
        FlawmaskError: the disk is full.
    """
    state = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in model.state_dict().items()}
    content = {"flawmask": flawmask.__version__, "spec": asdict(spec), "model_state_dict": state, **facts}
    save_file(path, content)


def load(path: Path, max_proposals: int | None = None) -> tuple[Any, ModelSpec]:
    """Return the network in a checkpoint, in evaluation mode on the CPU, and its spec.

    The file may also be `{"model_state_dict": state dict of torchvision's maskrcnn_resnet50_fpn, ...}`. Such a network
    gets torchvision's default sizes and limits.

    Args:
        path: the file.
        max_proposals: region proposals kept per image, highest objectness first, if the spec has more.

    Raises:
        FlawmaskError: the file is missing or damaged, contains code, or holds something else.
    """
    content = load_file(path)
    state = find_state_dict(content, path)
    spec = _read_spec(content, path) if {"flawmask", "spec"} <= set(content) else _torchvision_spec(state, path)
    model = build_uninitialised(spec, max_proposals)
    expected = model.state_dict()
    wrong = [name for name in expected if name not in state or state[name].shape != expected[name].shape]
    wrong += [name for name in state if name not in expected]
    if wrong:
        raise FlawmaskError(f"{path} does not fit {spec.arch}: {len(wrong)} tensors differ, {wrong[0]} among them")
    broken = [name for name in expected if state[name].is_floating_point() and not state[name].isfinite().all()]
    if broken:
        raise FlawmaskError(f"{path} holds weights that are not numbers, {broken[0]} among them: train again")
    model.load_state_dict({name: state[name].detach().to(expected[name].dtype) for name in expected}, assign=True)
    return model.eval(), spec


def _read_spec(content: dict[str, Any], path: Path) -> ModelSpec:
    spec: Any = content["spec"]
    known = {field.name for field in fields(ModelSpec)}
    if not isinstance(spec, dict) or not {"arch", "classes"} <= set(spec) <= known:
        raise FlawmaskError(
            f"{path} was written by another version of Flawmask ({content.get('flawmask')}): use that version"
        )
    return ModelSpec(**spec)


def _torchvision_spec(state: StateDict, path: Path) -> ModelSpec:
    """Return the spec of a plain state dict of torchvision's maskrcnn_resnet50_fpn.

    torchvision builds this network with frozen norms of epsilon 0 if it starts from COCO weights, and with BatchNorm of
    the usual epsilon if not. Frozen norms have no `num_batches_tracked`, so the state dict tells the two apart. A third
    case cannot be told: with ImageNet weights alone, norms are frozen with the usual epsilon of 0.00001. Results may
    then differ in the last digits.
    """
    if HEAD not in state or "backbone.body.layer4.2.conv3.weight" not in state:
        raise FlawmaskError(
            f"{path} is no checkpoint: neither Flawmask's nor one of torchvision's maskrcnn_resnet50_fpn"
        )
    defects = state[HEAD].shape[0] - 2  # without background and GOOD
    classes = (GOOD, "defect") if defects == 1 else (GOOD, *(f"defect_{number}" for number in range(1, defects + 1)))
    has_batch_norm = any(name.endswith("num_batches_tracked") for name in state)
    return ModelSpec(
        arch="maskrcnn_resnet50_fpn",
        classes=classes if defects else ("defect",),
        norm="batch" if has_batch_norm else "frozen",
        norm_eps=None if has_batch_norm else 0.0,
    )
