"""Flawmask: from a folder of inspection images to a trained Mask R-CNN, honest figures and outlined defects.

>>> import flawmask
>>> run = flawmask.train(dataset_dir="parts_coco", output_dir="run", epochs=20)    # doctest: +SKIP
>>> flawmask.evaluate(model="run/best.pt", dataset_dir="parts_coco").metrics       # doctest: +SKIP
>>> flawmask.Predictor("run/best.pt")("part.png").is_defect                        # doctest: +SKIP
"""

from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from flawmask.launch import set_environment

if TYPE_CHECKING:
    from flawmask.api import (
        augment,
        compare,
        demo,
        doctor,
        download,
        evaluate,
        export_model,
        import_labels,
        predict,
        predict_records,
        prepare,
        run,
        train,
    )
    from flawmask.errors import FlawmaskError, ImageError
    from flawmask.inference.predictor import Predictor
    from flawmask.prediction import Instance, Prediction, RawDetections, Verdict

set_environment()
__version__ = "0+source"  # a source tree that is not installed
for _name in ("flawmask-runtime", "flawmask"):
    with suppress(PackageNotFoundError):
        __version__ = version(_name)

__all__ = [
    "FlawmaskError",
    "ImageError",
    "Instance",
    "Prediction",
    "Predictor",
    "RawDetections",
    "Verdict",
    "__version__",
    "augment",
    "compare",
    "demo",
    "doctor",
    "download",
    "evaluate",
    "export_model",
    "import_labels",
    "predict",
    "predict_records",
    "prepare",
    "run",
    "train",
]

_HOMES = {
    "FlawmaskError": "errors",
    "ImageError": "errors",
    "Instance": "prediction",
    "Prediction": "prediction",
    "Predictor": "inference.predictor",
    "RawDetections": "prediction",
    "Verdict": "prediction",
}
"""The module of each name. Names that are not listed, the stages, are in `flawmask.api`."""


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: many names need libraries that take long to load."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"flawmask.{_HOMES.get(name, 'api')}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
