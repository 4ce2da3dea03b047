"""Checkpoints: a network's spec and weights in one file that carries no code."""

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
        model: the network, on any device; float32 is what is written.
        spec: what `build` made it from.
        facts: what else to keep, plain values only: the epoch, the loss.

    Raises:
        FlawmaskError: the disk is full.
    """
    state = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in model.state_dict().items()}
    content = {"flawmask": flawmask.__version__, "spec": asdict(spec), "model_state_dict": state, **facts}
    save_file(path, content)


def load(path: Path, max_proposals: int | None = None) -> tuple[Any, ModelSpec]:
    """Return the network in a checkpoint, in evaluation mode on the CPU, and its spec.

    Besides Flawmask's own, it takes `{"model_state_dict": state dict of torchvision's maskrcnn_resnet50_fpn, ...}`
    and gives it torchvision's own sizes and limits.

    Args:
        path: the file.
        max_proposals: regions of an image that the network's heads look at, if the spec says more.

    Raises:
        FlawmaskError: the file is missing, damaged, carries code, or holds something else.
    """
    content = load_file(path)
    state = find_state_dict(content, path)
    spec = _read_spec(content, path) if {"flawmask", "spec"} <= set(content) else _torchvision_spec(state, path)
    model = build_uninitialised(spec, max_proposals)
    own = model.state_dict()
    wrong = [name for name in own if name not in state or state[name].shape != own[name].shape]
    wrong += [name for name in state if name not in own]
    if wrong:
        raise FlawmaskError(f"{path} does not fit {spec.arch}: {len(wrong)} tensors differ, {wrong[0]} among them")
    model.load_state_dict({name: state[name].detach().to(own[name].dtype) for name in own}, assign=True)
    return model.eval(), spec


def _read_spec(content: dict[str, Any], path: Path) -> ModelSpec:
    found: Any = content["spec"]
    known = {field.name for field in fields(ModelSpec)}
    if not isinstance(found, dict) or not {"arch", "classes"} <= set(found) <= known:
        raise FlawmaskError(f"{path} was written by another version of Flawmask ({content.get('flawmask')})")
    return ModelSpec(**found)


def _torchvision_spec(state: StateDict, path: Path) -> ModelSpec:
    """Return the spec of a plain state dict of torchvision's maskrcnn_resnet50_fpn.

    Built with COCO's weights, that network has frozen norms with an epsilon of 0 and no `num_batches_tracked`; built
    without, BatchNorm with its usual epsilon. (Built with ImageNet's backbone alone, its norms are frozen at the usual
    epsilon, 0.00001, which a state dict does not tell: results may then differ in the last digits.)
    """
    if HEAD not in state or "backbone.body.layer4.2.conv3.weight" not in state:
        raise FlawmaskError(
            f"{path} is no checkpoint: neither Flawmask's nor one of torchvision's maskrcnn_resnet50_fpn"
        )
    others = state[HEAD].shape[0] - 2
    classes = (GOOD, "defect") if others == 1 else (GOOD, *(f"defect_{number}" for number in range(1, others + 1)))
    learns = any(name.endswith("num_batches_tracked") for name in state)
    return ModelSpec(
        arch="maskrcnn_resnet50_fpn",
        classes=classes if others else ("defect",),
        norm="batch" if learns else "frozen",
        norm_eps=None if learns else 0.0,
    )
