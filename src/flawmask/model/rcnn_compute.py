"""How the layers compute: norms folded into convolutions, and bfloat16 everywhere but for boxes and scores."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FasterRCNN
from torchvision.ops import FrozenBatchNorm2d

from flawmask.model.layers import autocast, autocast_to_float32, cast


def train_in(model: FasterRCNN, device: torch.device, dtype: torch.dtype) -> None:
    """Let the network's layers train in `dtype`, and fold norms that do not learn into the convolutions before them.

    What is computed of boxes and scores stays float32. Autocast around the whole network would make boxes bfloat16
    too, which cannot tell 286 from 287: a small defect then has a box of no width, whose regression target is not a
    number. Scores in bfloat16 would move in steps of 0.004, and tie.

    Weights keep their names, types and values; only how a forward pass uses them changes.
    """
    for module in list(model.modules()):
        for conv, norm in _pairs(module):
            if isinstance(norm, FrozenBatchNorm2d):
                conv.forward = partial(_folded, conv, norm)
                norm.forward = _as_it_is
    network: Any = model
    heads = network.roi_heads
    masks = [heads.mask_head, heads.mask_predictor] if heads.has_mask() else []
    for module in (network.backbone, heads.box_head, *masks[:1]):
        module.forward = partial(autocast, module.forward, device, dtype)
    for module in (network.rpn.head, *masks[1:]):
        module.forward = partial(autocast_to_float32, module.forward, device, dtype)
    heads.box_predictor.forward = partial(_of_float32, heads.box_predictor.forward)


def infer_in(model: FasterRCNN, _: torch.device, dtype: torch.dtype) -> None:
    """Fold the network's norms into its convolutions, and let its layers hold `dtype`; boxes and scores stay float32.

    It cannot be trained any more.
    """
    for module in list(model.modules()):
        for conv, norm in _pairs(module):
            weight, shift = _fold(conv, norm)
            conv.weight, conv.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(shift, requires_grad=False)
            norm.forward = _as_it_is
    network: Any = model
    heads = network.roi_heads
    masks = [heads.mask_head, heads.mask_predictor] if heads.has_mask() else []
    for module in (network.backbone, network.rpn.head, heads.box_head, *masks):
        module.to(dtype)
        module.register_forward_pre_hook(partial(_cast_inputs, dtype))
    for module in (network.rpn.head, *masks[1:]):
        module.register_forward_hook(_cast_output)
    heads.box_predictor.register_forward_pre_hook(partial(_cast_inputs, torch.float32))


def _pairs(module: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Yield each convolution without a bias directly under `module` that a norm follows, and that norm."""
    children = list(module.children())
    for conv, norm in pairwise(children):
        bare = isinstance(conv, nn.Conv2d) and getattr(conv, "bias", None) is None
        if bare and isinstance(norm, nn.BatchNorm2d | FrozenBatchNorm2d):
            yield conv, norm


def _fold(conv: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Return the weight and bias of one convolution that does what the convolution and the norm do."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    return conv.weight * scale[:, None, None, None], shift


def _folded(conv: Any, norm: Any, x: Tensor) -> Tensor:
    weight, bias = _fold(conv, norm)
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _of_float32(forward: Callable[..., Any], *inputs: Any) -> Any:
    return forward(*cast(inputs, torch.float32))


def _cast_inputs(dtype: torch.dtype, _: nn.Module, inputs: Any) -> Any:
    return cast(inputs, dtype)


def _cast_output(_: nn.Module, __: Any, output: Any) -> Any:
    return cast(output, torch.float32)
