"""Imports torchvision without PyTorch's compiler. Import this module before torchvision.

torchvision 0.26 and later import one function from the compiler. Only RoIAlign calls it, on a GPU in deterministic
mode. The import loads sympy and a thousand other modules, which costs more than a second before the first image.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo.utils"
"""The module from which torchvision imports the function."""


class _StandIn(ModuleType):
    """Offers every function of the compiler's module, and imports that module when one of them is called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*inputs: Any, **named: Any) -> Any:
            return getattr(import_module(COMPILER), name)(*inputs, **named)

        return call


def _import_torchvision() -> None:
    """Import torchvision with a stand-in for the compiler, unless one of the two is imported already."""
    if {"torchvision", COMPILER} & sys.modules.keys():
        return
    sys.modules[COMPILER] = _StandIn(COMPILER)
    try:
        import_module("torchvision")
    finally:
        del sys.modules[COMPILER]


_import_torchvision()
