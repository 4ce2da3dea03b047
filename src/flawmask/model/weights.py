"""Pretrained weights: COCO's, ImageNet's, or a file. Loaded by name and shape; what did not fit is listed."""

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from torch import Tensor, nn
from torchvision.models import MobileNet_V3_Large_Weights, ResNet18_Weights, ResNet50_Weights, WeightsEnum
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_V2_Weights, MaskRCNN_ResNet50_FPN_Weights

from flawmask.errors import FlawmaskError
from flawmask.model.build import Norm
from flawmask.progress import is_shown

log = logging.getLogger(__name__)

StateDict = dict[str, Tensor]

COCO: dict[str, WeightsEnum] = {
    "maskrcnn_resnet50_fpn": MaskRCNN_ResNet50_FPN_Weights.COCO_V1,
    "maskrcnn_resnet50_fpn_v2": MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1,
}
IMAGENET: dict[str, WeightsEnum] = {
    "maskrcnn_resnet50_fpn": ResNet50_Weights.IMAGENET1K_V1,
    "maskrcnn_resnet50_fpn_v2": ResNet50_Weights.IMAGENET1K_V1,
    "maskrcnn_resnet18_fpn": ResNet18_Weights.IMAGENET1K_V1,
    "maskrcnn_mobilenet_v3_large_fpn": MobileNet_V3_Large_Weights.IMAGENET1K_V1,
}

BODY = "backbone.body."


@dataclass(frozen=True)
class Pretrained:
    """What a network starts from.

    Attributes:
        state: tensors by name, as the detector names them; empty to start from nothing.
        norm: the kind of norm that these weights want.
        norm_eps: its epsilon; None for the architecture's own.
        source: what it is, for people.
    """

    state: StateDict
    norm: Norm
    norm_eps: float | None
    source: str


def pretrained(arch: str, weights: str) -> Pretrained:
    """Return the weights that `--weights` names.

    Args:
        arch: the architecture's name.
        weights: `coco`, `imagenet`, `none` or the path of a file. Where there are no COCO weights for the
            architecture, `coco` means ImageNet's for its backbone, and a log line says so.

    Raises:
        FlawmaskError: the network is out of reach, or the file is none that holds weights.
    """
    if weights == "none":
        return Pretrained({}, "group", None, "no pretrained weights")
    if weights == "coco" and arch in COCO:
        # torchvision sets this epsilon to 0 for these very weights, which were trained so.
        eps = 0.0 if arch == "maskrcnn_resnet50_fpn" else None
        return Pretrained(download(COCO[arch]), "frozen", eps, "COCO weights")
    if weights == "coco":
        log.info("there are no COCO weights for %s: its backbone starts from ImageNet's", arch)
    if weights in ("coco", "imagenet"):
        return Pretrained(_in_backbone(download(IMAGENET[arch])), "frozen", None, "ImageNet weights")
    return from_file(Path(weights))


def download(weights: Any) -> StateDict:
    """Return a torchvision weights entry's state dict, from torchvision's cache or the network.

    torchvision checks the file against the hash in its name and loads it with `weights_only=True`.

    Raises:
        FlawmaskError: it can be had from neither.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    name = Path(urlparse(weights.url).path).name
    if not (folder / name).is_file():
        log.info("downloading %s into %s", weights.url, folder)
    try:
        with _impatient():
            state: StateDict = weights.get_state_dict(
                progress=is_shown(), check_hash=True, map_location="cpu", weights_only=True
            )
    except (URLError, OSError, RuntimeError, EOFError, KeyError) as error:
        raise FlawmaskError(
            f"{weights.url} cannot be fetched ({getattr(error, 'reason', error)}): put {name} into {folder} by hand, "
            "or train from nothing with --weights none"
        ) from None
    return state


@contextmanager
def _impatient(seconds: float = 30.0) -> Iterator[None]:
    """Give up on a connection that says nothing: torchvision itself would wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def from_file(path: Path) -> Pretrained:
    """Return the weights in a file: a state dict, alone or under a usual name, of a detector or of its backbone.

    Raises:
        FlawmaskError: the file is not there or holds no state dict.
    """
    content = load_file(path)
    state = find_state_dict(content, path)
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if not any(name.startswith(("backbone.", "rpn.", "roi_heads.")) for name in state):
        state = _in_backbone(state)
    norm: Norm = "frozen" if any(name.endswith("running_mean") for name in state) else "group"
    spec = content.get("spec", {}) if isinstance(content, dict) else {}
    return Pretrained(state, norm, spec.get("norm_eps"), f"weights of {path}")


def load_file(path: Path) -> Any:
    """Return what `torch.load` reads from the file on the CPU, tensors and plain values only.

    Raises:
        FlawmaskError: the file is missing, damaged, not made by torch, or carries code.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FlawmaskError(f"{path} does not exist") from None
    except Exception as error:  # text gives KeyError, an empty file EOFError, a pickle UnpicklingError, and so on
        reason = (str(error).splitlines() or [""])[0][:160] or type(error).__name__
        raise FlawmaskError(
            f"{path} is not a file of weights, or is damaged ({type(error).__name__}: {reason})"
        ) from None


def find_state_dict(content: Any, path: Path) -> StateDict:
    """Return the state dict in what a file holds, whether it stands alone or under a usual name.

    Raises:
        FlawmaskError: there is none.
    """
    for key in ("model_state_dict", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise FlawmaskError(f"{path} holds no state dict: it must map names to tensors, alone or as model_state_dict")
    return content


def _in_backbone(state: StateDict) -> StateDict:
    """Return a classifier's state dict under the names that its layers have inside the detector."""
    return {BODY + name.removeprefix("features."): tensor for name, tensor in state.items()}


def load_matching(model: nn.Module, given: Pretrained) -> tuple[int, list[str]]:
    """Load every tensor that fits by name and shape.

    Returns:
        How many tensors of the network were filled, and a line for each that was not: what the network has and
        the file lacks, or has in another shape.

    Raises:
        FlawmaskError: not one tensor fits.
    """
    own = model.state_dict()
    fitting = {name: tensor for name, tensor in given.state.items() if name in own and own[name].shape == tensor.shape}
    if not fitting:
        raise FlawmaskError(f"{given.source}: not one tensor fits {type(model).__name__}; is it another architecture?")
    model.load_state_dict(fitting, strict=False)
    left = [
        f"{name} {list(own[name].shape)}: the file has {list(given.state[name].shape)}"
        if name in given.state
        else f"{name} {list(own[name].shape)}: not in the file"
        for name in own
        if name not in fitting and not name.endswith("num_batches_tracked")
    ]
    return len(fitting), left
