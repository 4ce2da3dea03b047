"""Layers and tensor operations that several kinds of networks share."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d

from flawmask.model.architecture import STRIDE
from flawmask.model.spec import Norm

CELLS = 28
"""Rows and columns of a predicted mask, whose cells are probabilities inside its box."""

IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's colours. Networks with ImageNet weights normalise by them."""


class Float32Anchors(AnchorGenerator):  # type: ignore[misc]  # torchvision has no types
    """Anchors in float32, whatever the dtype of the features: bfloat16 cannot tell 286 from 287."""

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Return the anchors of each image, (N, 4) float32, x1 y1 x2 y2 in pixels of the padded image."""
        # torchvision uses only the shape, dtype and device of the features.
        float32 = [features.new_empty((), dtype=torch.float32).expand(features.shape) for features in feature_maps]
        anchors: list[Tensor] = super().forward(image_list, float32)
        return anchors


def replace_norms(module: nn.Module, norm: Norm, eps: float | None) -> None:
    """Replace every BatchNorm2d under `module`.

    In a small batch, BatchNorm's statistics are noisy. So pretrained statistics are best frozen. GroupNorm does not
    depend on the batch (Wu and He, "Group normalization", ECCV 2018).

    Args:
        module: the module whose children are replaced in place.
        norm: `batch` changes nothing; `frozen` means fixed statistics; `group` means 32 groups, or fewer if the number
            of channels is not divisible by 32.
        eps: the epsilon of frozen norms; None keeps that of the replaced norm.
    """
    if norm == "batch":
        return
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            channels = child.num_features
            fresh = (
                FrozenBatchNorm2d(channels, eps=child.eps if eps is None else eps)
                if norm == "frozen"
                else nn.GroupNorm(math.gcd(32, channels), channels)
            )
            setattr(module, name, fresh)
        else:
            replace_norms(child, norm, eps)


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters of the network."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def to_device(model: Any, device: torch.device) -> Any:
    """Move the network to the device in channels-last layout, which is faster on CPU and CUDA, and return it."""
    return model.to(device, memory_format=torch.channels_last)


@contextmanager
def without_side_effects(model: nn.Module) -> Iterator[None]:
    """Inside this context, a forward pass computes no gradients and does not update BatchNorm's statistics."""
    norms = [one for one in model.modules() if isinstance(one, nn.BatchNorm2d) and one.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        with torch.no_grad():
            yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def skip_resize(model: Any) -> None:
    """Stop a torchvision network from resizing its images. Flawmask has resized them already (`ModelSpec.resized`)."""
    model.transform.resize = _unchanged


def _unchanged(image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
    return image, target


def to_original(
    predicted: list[dict[str, Tensor]], shapes: Sequence[tuple[int, int]], sizes: Sequence[tuple[int, int]]
) -> list[dict[str, Tensor]]:
    """Return the predictions of a batch with their boxes in pixels of the original images.

    Args:
        predicted: for each image `boxes` (N, 4) float32, x1 y1 x2 y2 in pixels of the resized image, and any other
            tensors.
        shapes: height and width of each resized image.
        sizes: height and width of each original.
    """
    ratios = to_pixels(shapes, sizes).to(predicted[0]["boxes"].device)
    return [{**one, "boxes": one["boxes"] * ratio} for one, ratio in zip(predicted, ratios, strict=True)]


def to_pixels(shapes: Sequence[tuple[int, int]], sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Return the factors from a box x1 y1 x2 y2 of the resized image to one of the original: (B, 4) float32.

    They are computed in float32, as torchvision does: the last bit can decide which pixel a box's edge falls on.
    """
    pairs = zip(shapes, sizes, strict=True)
    return torch.tensor([[size[1] / shape[1], size[0] / shape[0]] * 2 for shape, size in pairs], dtype=torch.float32)


def batched(model: Any, images: list[Tensor]) -> ImageList:
    """Return resized (3, H, W) uint8 images, on the network's device, as one normalised and padded batch.

    Its `tensors` are (B, 3, H, W) float32, channels-last; its `image_sizes` the heights and widths without padding.
    """
    normalised = [model.transform.normalize(image.float() / 255) for image in images]
    sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in images]
    tensors = model.transform.batch_images(normalised, size_divisible=model.transform.size_divisible)
    return ImageList(tensors.contiguous(memory_format=torch.channels_last), sizes)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on the device. For CUDA, the copy is asynchronous, from page-locked memory."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


def padded_shape(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the padded height and width of a batch of images of these sizes: multiples of `STRIDE`."""
    height, width = (-(-max((size[at] for size in sizes), default=0) // STRIDE) * STRIDE for at in (0, 1))
    return height, width


def stacked(images: Sequence[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
    """Return (3, H, W) uint8 images on the CPU as one batch, and their heights and widths.

    Returns:
        pixels: (B, H, W, 3) uint8. Each image lies in the upper left corner of its slice, with zeros as padding.
        sizes: height and width of each image.
    """
    sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in images]
    pixels = torch.zeros(len(images), *padded_shape(sizes), 3, dtype=torch.uint8)
    for one, image, (rows, columns) in zip(pixels, images, sizes, strict=True):
        one[:rows, :columns] = image.permute(1, 2, 0)
    return pixels, sizes


def unnormalised(model: Any, images: list[Tensor]) -> Tensor:
    """Return the batch that a torchvision network sees, (B, 3, H, W) float32, with its normalisation undone: colours
    are 0 to 1.

    Padding is 0 after normalisation. So it has the mean colour of the images that the backbone was pretrained on.
    """
    mean, deviation = (
        torch.tensor(values)[:, None, None] for values in (model.transform.image_mean, model.transform.image_std)
    )
    normalised: Tensor = batched(model, images).tensors
    return normalised * deviation + mean
