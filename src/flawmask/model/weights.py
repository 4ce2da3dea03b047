"""Pretrained weights: COCO's, ImageNet's, or a file. Loaded by name and shape; what did not fit is listed."""

import logging
import re
import socket
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from torch import Tensor, nn
from torchvision.models import MobileNet_V3_Large_Weights, ResNet18_Weights, ResNet50_Weights, WeightsEnum
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_V2_Weights, MaskRCNN_ResNet50_FPN_Weights

from flawmask.errors import FlawmaskError
from flawmask.files import whole_file
from flawmask.model.build import Norm
from flawmask.progress import is_shown
from flawmask.settings import require

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

OLD_NAMES = (
    (re.compile(r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d)\.(weight|bias)"), r"\1.0.\2"),
    (re.compile(r"rpn\.head\.conv\.(weight|bias)"), r"rpn.head.conv.0.0.\1"),
    *(
        (
            re.compile(rf"roi_heads\.mask_head\.mask_fcn{number}\.(weight|bias)"),
            rf"roi_heads.mask_head.{number - 1}.0.\1",
        )
        for number in range(1, 5)
    ),
)
"""What layers were called before torchvision 0.13, whose COCO file still says so, and what they are called now."""


class DamagedError(FlawmaskError):
    """A file that does not hold what it once did, or never did."""


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
        FlawmaskError: the network is out of reach, or the file is not there or none that holds weights.
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
    require(Path(weights).exists(), f"--weights {weights}: no such file; give coco, imagenet, none or a file's path")
    return from_file(Path(weights))


def download(weights: Any) -> StateDict:
    """Return a torchvision weights entry's state dict, from torchvision's cache or the network.

    torchvision checks the file against the hash in its name and loads it with `weights_only=True`.

    Raises:
        FlawmaskError: it can be had from neither, or the file in the cache is damaged.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    name = Path(urlparse(weights.url).path).name
    is_there = (folder / name).is_file()
    if not is_there:
        log.info("downloading %s into %s", weights.url, folder)
    try:
        with _impatient():
            state: StateDict = weights.get_state_dict(
                progress=is_shown(), check_hash=True, map_location="cpu", weights_only=True
            )
    except (URLError, HTTPException, OSError, RuntimeError, EOFError, KeyError, UnpicklingError) as error:
        reason = _first_line(getattr(error, "reason", error))
        if is_there:  # torchvision looks at the hash of what it downloads, not of what lies there
            raise FlawmaskError(f"{folder / name} is damaged ({reason}): delete it, and it is fetched again") from None
        raise FlawmaskError(
            f"{weights.url} cannot be fetched ({reason}): put {name} into {folder} by hand, "
            "or train from nothing with --weights none"
        ) from None
    return _with_new_names(state)


def _first_line(error: object) -> str:
    """Return the beginning of an error's message, which may run over many lines."""
    return (str(error).splitlines() or [""])[0][:160] or type(error).__name__


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
    if not any(name.startswith(("backbone.", "rpn.", "roi_heads.")) for name in state):
        state = _in_backbone(state)
    norm: Norm = "frozen" if any(name.endswith("running_mean") for name in state) else "group"
    spec = content.get("spec")
    eps = spec.get("norm_eps") if isinstance(spec, dict) else None
    return Pretrained(state, norm, eps, f"weights of {path}")


def load_file(path: Path) -> Any:
    """Return what `torch.load` reads from the file on the CPU, tensors and plain values only.

    Raises:
        FlawmaskError: the file is missing, damaged, not made by torch, or carries code.
    """
    try:
        check_sums(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FlawmaskError(f"{path} does not exist") from None
    except PermissionError as error:
        raise FlawmaskError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # KeyError for text, EOFError for nothing, MemoryError for a wrong length, ...
        raise DamagedError(
            f"{path} is not a file of weights, or is damaged ({type(error).__name__}: {_first_line(error)})"
        ) from None


def save_file(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values with `torch.save`, whole or not at all.

    Raises:
        FlawmaskError: the disk is full, or what is there afterwards is not what was written.
    """
    with whole_file(path) as temporary:
        try:
            with temporary.open("wb") as file:  # of a path, torch would write the name into the file
                torch.save(content, file)
            check_sums(temporary)
        except (RuntimeError, zipfile.BadZipFile) as error:  # torch's own for whatever the system says
            raise FlawmaskError(f"{path} cannot be written, perhaps the disk is full: {_first_line(error)}") from None


def check_sums(path: Path) -> None:
    """Raise `BadZipFile` where a byte of what torch.save wrote has changed: it keeps a CRC-32 of each tensor, and does
    not look at it when it loads. Files of other kinds have none."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")


def find_state_dict(content: Any, path: Path) -> StateDict:
    """Return the state dict in what a file holds, whether it stands alone or under a usual name.

    Its names are today's: without the `module.` of a network trained on several GPUs, and without those that
    torchvision has given up.

    Raises:
        FlawmaskError: there is none.
    """
    for key in ("model_state_dict", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise FlawmaskError(f"{path} holds no state dict: it must map names to tensors, alone or as model_state_dict")
    return _with_new_names({str(name).removeprefix("module."): tensor for name, tensor in content.items()})


def _with_new_names(state: StateDict) -> StateDict:
    """Return the state dict with its layers called as torchvision calls them today.

    torchvision translates old names itself, but only while it loads, when what fits has been chosen already.
    """
    renamed = {}
    for name, tensor in state.items():
        new = next((rule.sub(to, name) for rule, to in OLD_NAMES if rule.fullmatch(name)), name)
        renamed[new] = tensor
    return renamed


def _in_backbone(state: StateDict) -> StateDict:
    """Return a classifier's state dict under the names that its layers have inside the detector."""
    return {
        BODY + name.removeprefix("features."): tensor
        for name, tensor in state.items()
        if not name.startswith(("fc.", "classifier."))  # what names ImageNet's classes has no place in a detector
    }


def load_matching(model: nn.Module, given: Pretrained) -> tuple[int, list[str]]:
    """Load every tensor that fits by name and shape.

    Returns:
        How many tensors of the network were filled, and a line for each that does not fit: what the network has and
        the file lacks or has in another shape, and what the file has and the network lacks.

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
    left += [
        f"{name}: in the file alone"
        for name in given.state
        if name not in own and not name.endswith("num_batches_tracked")
    ]
    return len(fitting), left
