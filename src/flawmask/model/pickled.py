"""Reads the tensors of files that hold a whole network as a pickled object, as ultralytics writes them. No code runs.

Unpickling calls the classes that a file names, with the arguments in the file. With ultralytics' classes, that alone
can run code from the file: `ultralytics.nn.tasks` evaluates a network's activation as Python. So nothing that a file
names is imported or called here. Each object is replaced by an inert one that only keeps its attributes. Ultralytics
need not be installed, and the version that wrote the file does not matter.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flawmask.errors import FlawmaskError
from flawmask.settings import require

ALLOWED = (
    "ultralytics.",
    "torch.nn.modules.",
    "torchvision.transforms.",
    "numpy.",
    "pathlib.",
    "builtins.getattr",
    "argparse.Namespace",
    "types.SimpleNamespace",
)
"""The beginnings of the names in ultralytics' and rfdetr's files: classes of layers and of training records."""


class _Inert:
    """Replaces an object of any class and keeps its attributes."""

    attributes: Any = None

    def __init__(self, *_: Any) -> None:
        """Ignore the arguments of the replaced class."""

    def __setstate__(self, attributes: Any) -> None:
        self.attributes = attributes


def inert_classes(path: Path) -> AbstractContextManager[Any]:
    """Return a context in which `torch.load(path, weights_only=True)` replaces the objects that a file names.

    A damaged file, or one that torch did not write, passes here: loading it gives the better error message.

    Raises:
        FlawmaskError: the file names a class that is not allowed.
    """
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:  # a damaged file may raise anything
        names = []
    unknown = [name for name in names if not name.startswith(ALLOWED)]
    require(
        not unknown,
        f"{path} is not a file of weights: it names {', '.join(unknown[:3])}, which is not known to be a layer of "
        "torch's or ultralytics'; nothing of it was run. Save the network's state_dict() alone",
    )
    context: AbstractContextManager[Any] = torch.serialization.safe_globals([(_Inert, name) for name in names])
    return context


def without_objects(content: Any, path: Path) -> Any:
    """Return a file's content. If it holds a network as an object, return that network's float32 state dict as `model`.

    Raises:
        FlawmaskError: the network does not have the structure of a torch module.
    """
    entries = content if isinstance(content, dict) else {"model": content}
    # Ultralytics itself uses the moving average of the weights (EMA) if there is one.
    network = next((entries[key] for key in ("ema", "model") if isinstance(entries.get(key), _Inert)), None)
    if network is None:
        return content
    try:
        return {"model": dict(_tensors(network, ""))}
    except (AttributeError, KeyError, TypeError, RecursionError):
        raise FlawmaskError(f"{path} holds a network that is no torch module: save its state_dict() alone") from None


def _tensors(module: _Inert, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and tensors that `module.state_dict()` would hold."""
    parts = module.attributes
    for name, tensor in (parts["_parameters"] | parts["_buffers"]).items():
        if tensor is not None and name not in parts["_non_persistent_buffers_set"]:
            yield prefix + name, tensor.detach().float() if tensor.is_floating_point() else tensor
    for name, child in parts["_modules"].items():
        if child is not None:
            yield from _tensors(child, f"{prefix}{name}.")
