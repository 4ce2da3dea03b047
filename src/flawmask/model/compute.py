"""How the layers compute: norms folded into convolutions, and lower precision everywhere but in the last layers.

What a network says of an image is float32: its last layers are, and all that is computed of boxes and scores. Autocast
around the whole network would make boxes bfloat16, which cannot tell 286 from 287: a small defect then has a box of no
width, whose regression target is not a number. Scores in bfloat16 move in steps of 0.004, and tie.

Nothing here replaces a module's `forward`: what replaces it would refer to the module, which would then refer to itself
and stay in memory until Python's cyclic collector runs. A module gets another class instead, as
`torch.nn.utils.parametrize` does it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d


@dataclass(frozen=True)
class Layers:
    """The layers that compute in lower precision, as modules that share none. All others compute in float32.

    Attributes:
        inner: those whose results stay as they are; what sees them casts them where it has to.
        outer: those whose results become float32.
    """

    inner: Iterable[nn.Module]
    outer: Iterable[nn.Module]


def train_in(model: nn.Module, layers: Layers, device: torch.device, dtype: torch.dtype) -> None:
    """Let some layers train in `dtype`, by autocast; norms that do not learn are folded into the convolutions before.

    Weights keep their names, types and values; only how a forward pass uses them changes.
    """
    for conv, _, norm, _ in list(_pairs(model)):
        if isinstance(norm, FrozenBatchNorm2d):
            conv.__class__, conv.norm = _FoldedConv2d, (norm,)  # in a tuple: it is no part of the convolution
            norm.__class__ = _FoldedNorm
    compute_in(layers, device, dtype)


def compute_in(layers: Layers, device: torch.device, dtype: torch.dtype) -> None:
    """Let some layers compute in `dtype`, by autocast."""
    if dtype == torch.float32:
        return
    every: list[Any] = [*layers.inner, *layers.outer]
    for module in every:
        module.__class__ = _autocast(type(module))  # type: ignore[arg-type]  # mypy takes a class for one of its objects
        module.autocast_to = (device.type, dtype)
    for module in layers.outer:
        module.register_forward_hook(_give_float32)


def infer_in(model: nn.Module, layers: Layers, dtype: torch.dtype) -> None:
    """Fold the network's norms into its convolutions, and let some layers hold `dtype`.

    It cannot be trained any more.
    """
    for conv, name, norm, parent in list(_pairs(model)):
        weight, shift = _fold(conv, norm)
        conv.weight, conv.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(shift, requires_grad=False)
        setattr(parent, name, nn.Identity())
    if dtype == torch.float32:
        return
    for module in (*layers.inner, *layers.outer):
        module.to(dtype)
        module.register_forward_pre_hook(partial(_take, dtype))
    for module in layers.outer:
        module.register_forward_hook(_give_float32)


def is_slow(body: nn.Module, device: torch.device) -> bool:
    """Return whether a body is slower in bfloat16 than in float32: one of depthwise convolutions is on a CPU, whose
    backward pass takes close to three times as long there."""
    return device.type == "cpu" and any(isinstance(one, nn.Conv2d) and one.groups > 1 for one in body.modules())


class _Autocast(nn.Module):
    """What makes a module compute under autocast. By inheritance: a hook would not leave autocast where an interrupt
    ends the pass."""

    autocast_to: tuple[str, torch.dtype]

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return what the module gives."""
        device, dtype = self.autocast_to
        with torch.autocast(device, dtype=dtype):
            return super().forward(*inputs, **named)


@cache
def _autocast(kind: Any) -> Any:
    """Return the class of modules of this kind that compute under autocast; it has the same name."""
    return type(kind.__name__, (_Autocast, kind), {})


class _FoldedConv2d(nn.Conv2d):
    """A convolution that does what it and the norm behind it did."""

    norm: tuple[FrozenBatchNorm2d]

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = _fold(self, self.norm[0])
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class _FoldedNorm(FrozenBatchNorm2d):  # type: ignore[misc]  # torchvision has no types
    """A norm that the convolution before it has taken over."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def _pairs(model: nn.Module) -> Iterator[tuple[Any, str, Any, nn.Module]]:
    """Yield each convolution without a bias that a norm follows, that norm's name, the norm, and the module around."""
    for module in model.modules():
        for (_, conv), (name, norm) in pairwise(module.named_children()):
            bare = isinstance(conv, nn.Conv2d) and getattr(conv, "bias", None) is None
            if bare and isinstance(norm, nn.BatchNorm2d | FrozenBatchNorm2d):
                yield conv, name, norm, module


def _fold(conv: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Return the weight and bias of one convolution that does what the convolution and the norm do."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    return conv.weight * scale[:, None, None, None], shift


def _take(dtype: torch.dtype, _: nn.Module, inputs: Any) -> Any:
    return cast(inputs, dtype)


def _give_float32(_: nn.Module, __: Any, output: Any) -> Any:
    return cast(output, torch.float32)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Return a tensor of fractions in `dtype`, and so those in a list, a tuple or a dictionary; all else as it is."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: cast(item, dtype) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(cast(item, dtype) for item in value)
    return value
