"""Random state dicts in the forms in which they are published, and networks to load them into."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v3_large, resnet18, resnet50
from torchvision.ops import FrozenBatchNorm2d

from flawmask.model.arch import Arch
from flawmask.model.build import build
from flawmask.model.spec import ModelSpec

State = dict[str, Tensor]


@cache
def classifier(name: str) -> State:
    """The state dict of an untrained ImageNet classifier."""
    torch.manual_seed(1)
    state: State = {"resnet18": resnet18, "resnet50": resnet50, "mobilenet": mobilenet_v3_large}[name](
        weights=None
    ).state_dict()
    return state


def detector(classes: int = 2, arch: Arch = "maskrcnn_resnet18_fpn", **spec: Any) -> Any:
    return build(ModelSpec(arch, tuple(f"class_{number}" for number in range(classes)), **spec))


def shaken(state: State) -> State:
    """The same tensors, with norms that change their input, and with variances so small that epsilons matter."""
    new = {name: tensor.clone() for name, tensor in state.items()}
    for name in [name for name in new if name.endswith("running_var")]:
        norm = name.removesuffix("running_var")
        new[name] = torch.empty_like(new[name]).uniform_(1e-4, 1e-3)
        new[f"{norm}running_mean"].normal_(std=0.1)
        new[f"{norm}weight"] = new[name].sqrt()
        new[f"{norm}bias"].normal_(std=0.1)
    return new


def epsilons(model: nn.Module) -> dict[str, float]:
    kinds = (FrozenBatchNorm2d, nn.BatchNorm2d)
    return {name: one.eps for name, one in model.named_modules() if isinstance(one, kinds)}
