"""Flawmask: from a folder of inspection images to a trained Mask R-CNN, honest numbers and outlined defects."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from flawmask.launch import set_environment

if TYPE_CHECKING:
    from flawmask.inference.predictor import Predictor

set_environment()
try:
    __version__ = version("flawmask")
except PackageNotFoundError:  # a source tree that nobody installed
    __version__ = "0+source"
__all__ = ["Predictor", "__version__"]


def __getattr__(name: str) -> Any:
    """Import `Predictor` when it is asked for: it brings torch, which most commands' `--help` can do without."""
    if name == "Predictor":
        from flawmask.inference.predictor import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
