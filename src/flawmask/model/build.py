"""The networks, each kind through one interface: a further kind is a module that has these functions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flawmask.model.layers import to_device
from flawmask.model.spec import ModelSpec
from flawmask.model.targets import Target

DRAWS = {nn.init.kaiming_uniform_, nn.init.normal_, nn.init.uniform_}
"""What PyTorch's layers draw their weights with, as far as a `TorchFunctionMode` gets to see it."""


class Detector(Protocol):
    """What training and judging need to know of a kind of network."""

    def build(self, spec: ModelSpec, /) -> nn.Module:
        """Return the network that the spec describes, its weights drawn at random.

        Raises:
            FlawmaskError: the extra that has it is not installed.
        """

    def losses(
        self, model: Any, images: list[Tensor], targets: list[Target], roi_samples: int | None, /
    ) -> dict[str, Tensor]:
        """Return scalar float32 losses of images, (3, H, W) uint8 at the size that it sees, by the names in
        `Architecture.loss_names`: sums over the images, divided by `counts` or, where that is less, by 1."""

    def counts(self, model: Any, targets: list[Target], /) -> dict[str, float]:
        """Return what each of the losses was divided by in the last pass, which was of the images with these targets.
        Where `Architecture.has_known_counts`, it need not have passed."""

    def network_input(self, model: Any, images: list[Tensor], /) -> Tensor:
        """Return a batch of (3, H, W) uint8 images as the network sees it, (B, 3, H, W), 0 to 1, padding included."""

    def train_in(self, model: Any, device: torch.device, dtype: torch.dtype, /) -> None:
        """Let the network's layers train in `dtype`."""

    def infer_in(self, model: Any, device: torch.device, dtype: torch.dtype, /) -> None:
        """Let the layers of a network that only judges any more compute in `dtype`, and faster where they can."""

    def infer(self, model: Any, images: list[Tensor], sizes: Sequence[tuple[int, int]], /) -> list[dict[str, Tensor]]:
        """Return what is found on each of the images, (3, H, W) uint8 at the size that the network sees, whose
        `ModelSpec.padded` is the same, by the heights and widths of the originals: `boxes` (N, 4) float32, x1 y1 x2 y2
        in pixels of the original, `labels` (N,) int64 from 1 on, `scores` (N,) float32, 0 to 1, and, where it has
        masks, `masks` (N, 1, M, M) float32, probabilities inside the box."""

    def stages(self, model: Any, /) -> list[list[nn.Module]]:
        """Return the backbone's stages, the one nearest to the image first."""


def detector_of(spec: ModelSpec) -> Detector:
    """Return the functions for a network's kind.

    Raises:
        FlawmaskError: there is no architecture of that name.
    """
    return spec.architecture.kind()


def build(spec: ModelSpec) -> Any:
    """Return the network that the spec describes, its weights drawn at random.

    Raises:
        FlawmaskError: there is no architecture of that name, or the extra that has it is not installed.
    """
    return detector_of(spec).build(spec)


class _SkipInitialisation(TorchFunctionMode):
    """Leaves weights as the memory happens to be, where they would be drawn at random.

    Other functions that draw end in `normal_` or `uniform_`, which make zeros here: some draw until all lies within
    bounds.
    """

    def __torch_function__(
        self, function: Callable[..., Any], _: Any, inputs: Sequence[Any] = (), named: Mapping[str, Any] | None = None
    ) -> Any:
        named = named or {}
        if function in DRAWS:
            return named["tensor"]
        if function in (Tensor.normal_, Tensor.uniform_):
            return inputs[0].zero_()
        return function(*inputs, **named)


def build_uninitialised(spec: ModelSpec, max_proposals: int | None = None) -> Any:
    """Return the network that the spec describes, for a state dict with all of its tensors to be loaded: what `build`
    would draw, which takes longer than all else, has no value yet.

    Args:
        spec: describes it.
        max_proposals: regions of an image that heads look at, those of the highest scores; None for as many as the spec
            says.

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
    """Return a network that finds the same as `model` in evaluation mode, and faster. It shares nothing with `model`.

    Args:
        model: a network that `build` made, on any device.
        spec: what `build` made it from.
        device: where the new one goes.
        dtype: what its layers compute in: float32, or bfloat16 where the hardware has it.
        max_proposals: regions of an image that heads look at, those of the highest scores; None for as many as the spec
            says.
    """
    fast = build_uninitialised(spec, max_proposals)
    fast.load_state_dict(model.state_dict())
    return optimise_for_inference(fast, spec, device, dtype)


def optimise_for_inference(model: Any, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> Any:
    """Return the network itself, on the device, in evaluation mode and faster; it cannot be trained any more.

    Args:
        model: a network that `build` made.
        spec: what `build` made it from.
        device: where it goes.
        dtype: what its layers compute in: float32, or bfloat16 where the hardware has it.
    """
    model = to_device(model.eval().requires_grad_(False), device)
    detector_of(spec).infer_in(model, device, dtype)
    return model


def set_score_floor(model: Any, floor: float) -> None:
    """Let a network drop detections that score no more than this, 0 to 1."""
    getattr(model, "roi_heads", model).score_thresh = floor


def freeze(model: nn.Module, spec: ModelSpec, trainable_layers: int) -> None:
    """Leave only the last `trainable_layers` stages of the backbone's body trainable.

    Args:
        model: a network that `build` made.
        trainable_layers: 0 to 5, counted from the stage nearest to the heads, as torchvision counts them; 5 leaves all
            trainable, 0 none.
    """
    stages = detector_of(spec).stages(model)
    for stage in stages[: len(stages) - trainable_layers]:
        for module in stage:
            module.requires_grad_(False)
