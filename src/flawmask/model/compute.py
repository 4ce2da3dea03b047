"""How layers compute: norms are folded into convolutions, and all but the last layers may use lower precision.

The last layers, and everything that is computed from boxes and scores, stay float32. Autocast around the whole network
would make boxes bfloat16, which cannot tell 286 from 287. A small defect could then have a box without width, and its
regression target would be NaN. Scores in bfloat16 have steps of 0.004, so many would be equal.

No module's `forward` is replaced here. A replacement would refer to its module, so the module would refer to itself and
stay in memory until Python's cyclic garbage collector runs. Instead a module gets another class, as in
`torch.nn.utils.parametrize`.
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
    """The modules that compute in lower precision. No two of them share a layer. All other layers use float32.

    Attributes:
        inner: modules whose outputs stay in lower precision; the next layer casts them if it has to.
        outer: modules whose outputs are cast to float32.
    """

    inner: Iterable[nn.Module]
    outer: Iterable[nn.Module]


def train_in(model: nn.Module, layers: Layers, device: torch.device, dtype: torch.dtype) -> None:
    """Let some layers train in `dtype` by autocast, and fold frozen norms into the convolutions before them.

    Weights keep their names, types and values. Only the forward pass uses them in another way.
    """
    for conv, _, norm, _ in list(_pairs(model)):
        if isinstance(norm, FrozenBatchNorm2d):
            conv.__class__, conv.norm = _FoldedConv2d, (norm,)  # a tuple, so that it is not registered as a submodule
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
    """Fold the network's norms into its convolutions, and convert the weights of some layers to `dtype`.

    The network cannot be trained any more.
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
    """Return whether a backbone body is slower in bfloat16 than in float32.

    That is so for depthwise convolutions on a CPU: their backward pass takes almost three times as long.
    """
    return device.type == "cpu" and any(isinstance(one, nn.Conv2d) and one.groups > 1 for one in body.modules())


class _Autocast(nn.Module):
    """A base class that makes a module compute under autocast.

    Hooks would not do: if an interrupt ended the pass, the second hook would not run, and autocast would stay on.
    """

    autocast_to: tuple[str, torch.dtype]

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return the module's output."""
        device, dtype = self.autocast_to
        with torch.autocast(device, dtype=dtype):
            return super().forward(*inputs, **named)


@cache
def _autocast(kind: Any) -> Any:
    """Return a subclass of this module class that computes under autocast. It has the same name."""
    return type(kind.__name__, (_Autocast, kind), {})


class _FoldedConv2d(nn.Conv2d):
    """A convolution that includes the norm after it."""

    norm: tuple[FrozenBatchNorm2d]

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = _fold(self, self.norm[0])
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class _FoldedNorm(FrozenBatchNorm2d):  # type: ignore[misc]  # torchvision has no types
    """A norm that does nothing, because it is folded into the convolution before it."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def _pairs(model: nn.Module) -> Iterator[tuple[Any, str, Any, nn.Module]]:
    """Yield each convolution without bias that a norm follows: convolution, name of the norm, norm, parent module."""
    for module in model.modules():
        for (_, conv), (name, norm) in pairwise(module.named_children()):
            bare = isinstance(conv, nn.Conv2d) and getattr(conv, "bias", None) is None
            if bare and isinstance(norm, nn.BatchNorm2d | FrozenBatchNorm2d):
                yield conv, name, norm, module


def _fold(conv: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Return the weight and bias of one convolution that is equal to the convolution followed by the norm."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    return conv.weight * scale[:, None, None, None], shift


def _take(dtype: torch.dtype, _: nn.Module, inputs: Any) -> Any:
    return cast(inputs, dtype)


def _give_float32(_: nn.Module, __: Any, output: Any) -> Any:
    return cast(output, torch.float32)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Return floating-point tensors in `dtype`, also those in lists, tuples and dictionaries. All else is unchanged."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: cast(item, dtype) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(cast(item, dtype) for item in value)
    return value
