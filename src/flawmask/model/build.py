"""One interface for all kinds of networks. To add a kind, write a module that has the functions of `Detector`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flawmask.model import compute
from flawmask.model.layers import to_device
from flawmask.model.spec import ModelSpec
from flawmask.model.targets import Target

INITIALISERS = {nn.init.kaiming_uniform_, nn.init.normal_, nn.init.uniform_}
"""The functions that PyTorch's layers initialise their weights with and that a `TorchFunctionMode` can intercept."""


class Detector(Protocol):
    """The functions of a kind of network that training and inference need."""

    def build(self, spec: ModelSpec, /) -> nn.Module:
        """Return the network that the spec describes, with random weights.

        Raises:
            FlawmaskError: the extra that the network needs is not installed.
        """

    def losses(
        self, model: Any, images: list[Tensor], targets: list[Target], roi_samples: int | None, /
    ) -> dict[str, Tensor]:
        """Return the losses, scalar float32, by the names in `Architecture.loss_names`.

        Each loss is a sum over the images, divided by its count (see `counts`). A count below 1 is taken as 1.

        Args:
            images: (3, H, W) uint8, resized for the network.
            targets: one for each image.
            roi_samples: region proposals per image that train the heads of an R-CNN; None for the default.
        """

    def counts(self, model: Any, targets: list[Target], /) -> dict[str, float]:
        """Return the count that each loss was divided by in the last pass, which was of the images of these targets.

        With `Architecture.has_known_counts`, no pass is needed before.
        """

    def network_input(self, model: Any, images: list[Tensor], /) -> Tensor:
        """Return (3, H, W) uint8 images as the batch that the network sees: (B, 3, H, W), 0 to 1, with padding."""

    def train_in(self, model: Any, device: torch.device, dtype: torch.dtype, /) -> None:
        """Prepare the network's layers for training in `dtype`."""

    def infer_in(self, model: Any, device: torch.device, dtype: torch.dtype, /) -> None:
        """Prepare the network's layers for inference in `dtype`, as fast as possible. It cannot be trained any more."""

    def infer(self, model: Any, images: list[Tensor], sizes: Sequence[tuple[int, int]], /) -> list[dict[str, Tensor]]:
        """Return the instances predicted on each image.

        They are `boxes` (N, 4) float32, x1 y1 x2 y2 in pixels of the original; `labels` (N,) int64, from 1; `scores`
        (N,) float32, 0 to 1; and, if the network has masks, `masks` (N, 1, M, M) float32, probabilities inside the box.
        A network that scores pixels also returns `maps` of the D classes of defects in the order of their labels:
        (D, rows, columns) float32, 0 to 1, each of which covers the image.

        Args:
            images: (3, H, W) uint8, resized for the network. `ModelSpec.padded` is the same for all of them.
            sizes: height and width of each original.
        """

    def graph(self, model: Any, spec: ModelSpec, /) -> nn.Module:
        """Return the network as it is exported: from images to instances, in plain layers that every runtime has.

        It takes (B, H, W, 3) uint8 RGB images at their own size. It returns the instances that `infer` finds, those of
        all images together: boxes (K, 4) float32, x1 y1 x2 y2 in pixels of the images; labels (K,) int64, from 1;
        scores (K,) float32; the image of each, (K,) int64; if the network has masks, masks (K, M, M) float32; and, if
        it scores pixels, the maps of each image, (B, D, rows, columns) float32.
        `build.for_export` makes the network ready for it.
        """

    def stages(self, model: Any, /) -> list[list[nn.Module]]:
        """Return the stages of the backbone, the one nearest to the image first."""


def detector_of(spec: ModelSpec) -> Detector:
    """Return the functions for a network's kind.

    Raises:
        FlawmaskError: there is no architecture of that name.
    """
    return spec.architecture.kind()


def build(spec: ModelSpec) -> Any:
    """Return the network that the spec describes, with random weights.

    Raises:
        FlawmaskError: there is no architecture of that name, or the extra that it needs is not installed.
    """
    return detector_of(spec).build(spec)


class _SkipInitialisation(TorchFunctionMode):
    """Skips the random initialisation of weights: they keep whatever the memory holds.

    Other random functions end in `normal_` or `uniform_`. These write zeros here, because some callers draw again until
    all values are within bounds.
    """

    def __torch_function__(
        self, function: Callable[..., Any], _: Any, inputs: Sequence[Any] = (), named: Mapping[str, Any] | None = None
    ) -> Any:
        named = named or {}
        if function in INITIALISERS:
            return named["tensor"]
        if function in (Tensor.normal_, Tensor.uniform_):
            return inputs[0].zero_()
        return function(*inputs, **named)


def build_uninitialised(spec: ModelSpec, max_proposals: int | None = None) -> Any:
    """Return the network that the spec describes, with uninitialised weights. A full state dict must be loaded next.

    Random initialisation takes most of the time of `build`, and is skipped here.

    Args:
        spec: describes the network.
        max_proposals: region proposals kept per image, highest objectness first, if the spec has more; None keeps the
            spec's number.

    Raises:
        FlawmaskError: see `build`.
    """
    if max_proposals is not None:
        spec = replace(spec, proposals=min(spec.proposals, max_proposals))
    with _SkipInitialisation():
        return build(spec)


def for_inference(
    model: nn.Module, spec: ModelSpec, device: torch.device, dtype: torch.dtype, max_proposals: int | None = None
) -> Any:
    """Return a faster copy of `model` for inference. It predicts the same, and shares no memory with `model`.

    Args:
        model: a network that `build` made, on any device.
        spec: the spec that `build` made it from.
        device: the device of the copy.
        dtype: the precision of its layers: float32, or bfloat16 if the hardware has it.
        max_proposals: region proposals kept per image, highest objectness first, if the spec has more; None keeps the
            spec's number.
    """
    fast = build_uninitialised(spec, max_proposals)
    fast.load_state_dict(model.state_dict())
    return optimise_for_inference(fast, spec, device, dtype)


def optimise_for_inference(model: Any, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> Any:
    """Change the network itself for fast inference on the device, and return it. It cannot be trained any more.

    Args:
        model: a network that `build` made.
        spec: the spec that `build` made it from.
        device: the device to move it to.
        dtype: the precision of its layers: float32, or bfloat16 if the hardware has it.
    """
    model = to_device(model.eval().requires_grad_(False), device)
    detector_of(spec).infer_in(model, device, dtype)
    return model


def for_export(model: Any, spec: ModelSpec, score_floor: float) -> nn.Module:
    """Return the graph of a network, see `Detector.graph`, with norms folded into convolutions.

    The network itself is changed, and cannot be trained any more.

    Args:
        model: a network that `build` made, on the CPU.
        spec: the spec that `build` made it from.
        score_floor: predictions with a score up to this are dropped, 0 to 1.
    """
    model.eval().requires_grad_(False)
    compute.infer_in(model, compute.Layers([], []), torch.float32)
    set_score_floor(model, score_floor)
    return detector_of(spec).graph(model, spec).eval()


def set_score_floor(model: Any, floor: float) -> None:
    """Let a network drop predictions whose score is at most `floor`, 0 to 1."""
    getattr(model, "roi_heads", model).score_thresh = floor


def freeze(model: nn.Module, spec: ModelSpec, trainable_layers: int) -> None:
    """Freeze all stages of the backbone's body but the last `trainable_layers`.

    Args:
        model: a network that `build` made.
        spec: the spec that `build` made it from.
        trainable_layers: 0 to 5, counted from the stage nearest to the heads, as torchvision counts them. 5 freezes no
            stage, 0 all.
    """
    stages = detector_of(spec).stages(model)
    for stage in stages[: len(stages) - trainable_layers]:
        for module in stage:
            module.requires_grad_(False)
