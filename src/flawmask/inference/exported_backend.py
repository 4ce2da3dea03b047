"""The backends that run exported networks: with ONNX Runtime, or with OpenVINO. They need no PyTorch."""

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flawmask.errors import FlawmaskError
from flawmask.inference.backend import Resized
from flawmask.inference.exported import (
    BOXES,
    IMAGE,
    INPUT,
    KEY,
    LABELS,
    MAPS,
    MASKS,
    OUTPUTS,
    SCORES,
    Format,
    Manifest,
    check_inside,
    read_manifest,
    without_telemetry,
)
from flawmask.launch import usable_cores
from flawmask.prediction import RawDetections

Outputs = dict[str, npt.NDArray[Any]]
Run = Callable[[npt.NDArray[np.uint8]], Outputs]
"""Takes (B, H, W, 3) uint8 images, and returns the network's outputs by name (`build.Detector.graph`)."""


class ExportedBackend:
    """An exported network and its runtime. See `Backend` for its attributes and for `infer`.

    Attributes:
        manifest: what is known of the model.
    """

    batch_size = 1
    uses_cores = True
    resizes = True

    def __init__(self, manifest: Manifest, run: Run) -> None:
        self.manifest, self.spec, self._run = manifest, manifest.spec, run

    @classmethod
    def load(cls, model: Path, threads: int | None = None) -> "ExportedBackend":
        """Return the backend of an exported model.

        Args:
            model: the network's file, see `exported.file_of`.
            threads: the number of threads; by default the usable cores.

        Raises:
            FlawmaskError: the export is damaged, was changed, or is of another version; or its runtime is missing.
        """
        manifest = read_manifest(model)
        inside, run = RUNTIMES[manifest.format](model, manifest, threads or usable_cores())
        check_inside(inside, manifest, model)
        return cls(manifest, run)

    def infer(self, batch: Sequence[Resized], /) -> list[RawDetections]:
        """Return the detections of each image. Neighbours of one size pass through the network together."""
        detections: list[RawDetections] = []
        for _, same in groupby(batch, key=lambda image: image.pixels.shape):
            same_size = list(same)
            outputs = self._run(np.stack([image.pixels for image in same_size]))
            detections += [_of_image(outputs, number, image) for number, image in enumerate(same_size)]
        return detections


def _of_image(outputs: Outputs, number: int, image: Resized) -> RawDetections:
    """Return the detections of one image of a batch. The network's boxes are in pixels of what it was given."""
    (places,) = np.nonzero(outputs[IMAGE] == number)
    rows, columns = image.pixels.shape[:2]
    ratio = np.array([image.width / columns, image.height / rows] * 2, dtype=np.float32)
    masks = outputs[MASKS][places] if MASKS in outputs else None
    maps = outputs[MAPS][number] if MAPS in outputs else None
    return RawDetections(outputs[BOXES][places] * ratio, outputs[LABELS][places], outputs[SCORES][places], masks, maps)


def _onnx(model: Path, _: Manifest, threads: int) -> tuple[str | None, Run]:
    """Open a network with ONNX Runtime."""
    try:
        import onnxruntime
    except ImportError:
        raise FlawmaskError(f"{model} needs ONNX Runtime: pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # it warns of shapes that it cannot infer
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors share no class
        raise FlawmaskError(f"{model} cannot be opened by ONNX Runtime: {_first_line(error)}") from None
    names = [output.name for output in session.get_outputs()]

    def run(images: npt.NDArray[np.uint8]) -> Outputs:
        return dict(zip(names, session.run(None, {INPUT: images}), strict=True))

    return session.get_modelmeta().custom_metadata_map.get(KEY), run


def _openvino(model: Path, manifest: Manifest, threads: int) -> tuple[str | None, Run]:
    """Open a network with OpenVINO. Its CPU plugin would choose bfloat16 by itself, so each precision is asked for."""
    without_telemetry()
    try:
        import openvino
    except ImportError:
        raise FlawmaskError(f"{model} needs OpenVINO: pip install openvino") from None
    hint = "bf16" if manifest.precision == "bf16" else "f32"
    try:
        network = openvino.Core().read_model(model)
        settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        compiled = openvino.Core().compile_model(network, "CPU", settings)
    except RuntimeError as error:
        raise FlawmaskError(f"{model} cannot be opened by OpenVINO: {_first_line(error)}") from None
    return network.get_rt_info(KEY).astype(str) if network.has_rt_info(KEY) else None, run_openvino(compiled)


def run_openvino(compiled: Any) -> Run:
    """Return the function that runs a network that OpenVINO has compiled."""
    places = {name: at for at, one in enumerate(compiled.outputs) for name in one.names if name in OUTPUTS}
    request = compiled.create_infer_request()

    def run(images: npt.NDArray[np.uint8]) -> Outputs:
        results = request.infer({INPUT: images})
        return {name: results[at].copy() for name, at in places.items()}  # the next call overwrites them

    return run


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


RUNTIMES: dict[Format, Callable[[Path, Manifest, int], tuple[str | None, Run]]] = {"onnx": _onnx, "openvino": _openvino}
"""For each format, a function that opens a network with a number of threads. It returns the manifest in the network's
file, and what runs the network. To add a runtime, write such a function."""
