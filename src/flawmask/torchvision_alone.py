"""Imports torchvision without PyTorch's compiler: whoever wants that imports this module before torchvision.

torchvision 0.26 and later take one function from the compiler, which RoIAlign calls on a GPU where it has to be
deterministic. With it come sympy and a thousand other modules: a second and more before the first image.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo.utils"
"""Where torchvision takes the function from."""


def _of_compiler(name: str) -> Any:
    """Return a function that does what the compiler's of this name does, and imports it when it is called."""

    def call(*inputs: Any, **named: Any) -> Any:
        return getattr(import_module(COMPILER), name)(*inputs, **named)

    return call


def _import_torchvision() -> None:
    """Import torchvision while something stands in for the compiler, if neither is there yet."""
    if {"torchvision", COMPILER} & sys.modules.keys():
        return
    stand_in = ModuleType(COMPILER)
    stand_in.__getattr__ = _of_compiler  # type: ignore[method-assign]
    sys.modules[COMPILER] = stand_in
    try:
        import_module("torchvision")
    finally:
        if sys.modules.get(COMPILER) is stand_in:
            del sys.modules[COMPILER]


_import_torchvision()
