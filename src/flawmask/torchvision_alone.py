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


class _StandIn(ModuleType):
    """Has each function that the compiler has, but imports that only when one is called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*inputs: Any, **named: Any) -> Any:
            return getattr(import_module(COMPILER), name)(*inputs, **named)

        return call


def _import_torchvision() -> None:
    """Import torchvision while something stands in for the compiler, if neither is there yet."""
    if {"torchvision", COMPILER} & sys.modules.keys():
        return
    sys.modules[COMPILER] = _StandIn(COMPILER)
    try:
        import_module("torchvision")
    finally:
        del sys.modules[COMPILER]


_import_torchvision()
