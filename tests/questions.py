"""Counts, on the CPU, the operations that would make Python wait for a GPU."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flawmask.model.roi_align import PyramidRoIAlign, _scale

ASKING = {
    "nonzero",
    "nonzero_numpy",
    "argwhere",
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "masked_select",
    "masked_scatter",
    "bincount",
    "unique_dim",
    "unique_consecutive",
    "unique_dim_consecutive",
    "_unique",
    "_unique2",
    "nms",
}
"""Operations that return a value to Python, or whose result's size depends on values."""


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, asked: Counter[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.asked = asked

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ASKING or (name == "repeat_interleave" and len(args) < 2) or _is_by_mask(name, args):
            self.asked[name] += 1
        return func(*args, **(kwargs or {}))


def _is_by_mask(name: str, args: Any) -> bool:
    """Return whether an operation is indexing by a mask."""
    if not name.startswith(("index", "_index", "_unsafe_index")):
        return False
    return any(isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) for one in tree_leaves(args[1:2]))


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the waiting operations by name inside this context, in forward and backward passes."""
    asked: Counter[str] = Counter()
    with _Counting(asked):
        yield asked


@contextmanager
def pooled_as_on_a_gpu() -> Iterator[None]:
    """Make RoIAlign compute as on a GPU."""

    def pool(
        self: PyramidRoIAlign,
        levels: list[Tensor],
        rois: Tensor,
        image_of: Tensor,
        image_shapes: list[tuple[int, int]],
    ) -> Tensor:
        scales = [_scale(level, image_shapes) for level in levels]
        return self._pool_each(levels, rois, image_of, scales, self.level_of(rois, scales))

    with mock.patch.object(PyramidRoIAlign, "pool", pool):
        yield
