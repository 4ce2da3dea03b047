"""Files that hold a network as an object, as ultralytics writes them: its tensors are taken out of it, no code runs.

Unpickling calls the classes that a file names with the arguments that it gives them, and of ultralytics' classes that
alone can run what the arguments say: `ultralytics.nn.tasks` evaluates a network's activation as Python. So nothing that
a file names is imported or called. An inert object takes the place of each, and keeps what the file says of it; which
version of ultralytics wrote it, and whether there is any here, does not matter then.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flawmask.errors import FlawmaskError
from flawmask.settings import require

KNOWN = (
    "ultralytics.",
    "torch.nn.modules.",
    "torchvision.transforms.",
    "numpy.",
    "pathlib.",
    "builtins.getattr",
    "argparse.Namespace",
    "types.SimpleNamespace",
)
"""What the names in ultralytics' and rfdetr's files begin with: layers, and what was noted while they learned."""


class _Inert:
    """Stands where a file has an object of a class, and knows its attributes."""

    attributes: Any = None

    def __init__(self, *_: Any) -> None:
        """Take what the class would have been called with, and leave it."""

    def __setstate__(self, attributes: Any) -> None:
        self.attributes = attributes


def inert_classes(path: Path) -> AbstractContextManager[Any]:
    """Return a context in which `torch.load(path, weights_only=True)` gives inert objects for what ultralytics writes.

    A file that is damaged or none of torch's is not refused here: loading it says what is wrong with it.

    Raises:
        FlawmaskError: the file names something else.
    """
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:  # whatever reading a damaged file comes to
        names = []
    unknown = [name for name in names if not name.startswith(KNOWN)]
    require(
        not unknown,
        f"{path} is not a file of weights: it names {', '.join(unknown[:3])}, which is not known to be a layer of "
        "torch's or ultralytics'; nothing of it was run. Save the network's state_dict() alone",
    )
    context: AbstractContextManager[Any] = torch.serialization.safe_globals([(_Inert, name) for name in names])
    return context


def without_objects(content: Any, path: Path) -> Any:
    """Return what a file holds; of a network that it holds as an object, the state dict, float32, as `model`.

    Raises:
        FlawmaskError: the network is not put together as torch does it.
    """
    held = content if isinstance(content, dict) else {"model": content}
    # The average of the weights, where there is one, is what ultralytics itself goes on with.
    network = next((held[key] for key in ("ema", "model") if isinstance(held.get(key), _Inert)), None)
    if network is None:
        return content
    try:
        return {"model": dict(_tensors(network, ""))}
    except (AttributeError, KeyError, TypeError, RecursionError):
        raise FlawmaskError(f"{path} holds a network that is not put together as torch does it") from None


def _tensors(module: _Inert, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Yield what `module.state_dict()` would hold."""
    parts = module.attributes
    for name, tensor in (parts["_parameters"] | parts["_buffers"]).items():
        if tensor is not None and name not in parts["_non_persistent_buffers_set"]:
            yield prefix + name, tensor.detach().float() if tensor.is_floating_point() else tensor
    for name, child in parts["_modules"].items():
        if child is not None:
            yield from _tensors(child, f"{prefix}{name}.")
