"""Quantises a network to int8, calibrated on training images."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flawmask import images
from flawmask.coco import CocoSplit
from flawmask.evaluation.evaluate import predict_split
from flawmask.evaluation.measure import gather
from flawmask.evaluation.metrics import METRICS, values
from flawmask.export.config import ExportConfig
from flawmask.export.onnx_file import LAYERS, last_layers
from flawmask.export.openvino_file import exact_operators, import_openvino
from flawmask.inference.exported import INPUT, Manifest
from flawmask.inference.exported_backend import ExportedBackend, run_openvino
from flawmask.inference.threshold import DEFAULT
from flawmask.model.spec import ModelSpec
from flawmask.progress import track
from flawmask.strips import Bands, StripImage, opened
from flawmask.tiles import cut, padded

CALIBRATED_ON = 64
"""The most training images that set the ranges of the layers' values. They are spread evenly over the split."""


def _places(training: CocoSplit) -> list[int]:
    """Return which images of the split calibrate."""
    places: list[int] = np.unique(np.linspace(0, len(training.images) - 1, CALIBRATED_ON).round().astype(int)).tolist()
    return places


def _calibration_image(place: int, training: CocoSplit, spec: ModelSpec) -> npt.NDArray[np.uint8]:
    """Return what the network sees of an image, (1, height, width, 3) uint8: all of it, or one tile anywhere on it."""
    path = training.image_path(training.images[place])
    if spec.tiling is None:
        return images.read_image(path, spec.intensity)[None]
    image = opened(path) or images.read_image(path, spec.intensity)
    windows = spec.tiling.windows(*image.shape[:2])
    window = windows[np.random.default_rng(place).integers(len(windows))]
    pixels = Bands(image, [window]).cut(window) if isinstance(image, StripImage) else cut(image, window)
    return padded(pixels, spec.tiling.size)[None]


def quantise_onnx(path: Path, manifest: Manifest, training: CocoSplit) -> None:
    """Replace an ONNX file by one in int8. The last layers stay in float32.

    Args:
        path: the network in float32.
        manifest: of the export.
        training: the images that calibrate.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        """Hands the images to ONNX Runtime."""

        def __init__(self) -> None:
            places = _places(training)
            seen = (_calibration_image(place, training, manifest.spec) for place in places)
            self.images = iter(track(seen, "calibrating", total=len(places)))

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.images, None)
            return None if image is None else {INPUT: image}

    prepared = path.with_name("prepared.onnx")
    quant_pre_process(path, prepared, skip_symbolic_shape=True)
    nodes = onnx.load(prepared).graph.node
    quantize_static(
        prepared,
        path,
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=list(LAYERS),
        nodes_to_exclude=last_layers(nodes),
        per_channel=True,
        extra_options={"CalibMovingAverage": True},  # one bright pixel then does not set the range of a layer
    )
    prepared.unlink()


def quantise_openvino(
    network: Any, manifest: Manifest, training: CocoSplit, validation: CocoSplit | None, config: ExportConfig
) -> Any:
    """Return a network of OpenVINO in int8. Layers stay in float32 until AP on the validation images is high enough.

    Args:
        network: in float32.
        manifest: of the export.
        training: the images that calibrate.
        validation: the images on which AP is measured; None to go without.
        config: of the export.
    """
    import_openvino()
    import nncf

    nncf.set_log_level(logging.ERROR)
    calibration = nncf.Dataset(  # it reads each image when it needs it
        _places(training), lambda place: _calibration_image(place, training, manifest.spec)
    )
    scope = nncf.IgnoredScope(names=sorted(exact_operators(network)), validate=False)
    if validation is None:
        return nncf.quantize(network, calibration, ignored_scope=scope)

    def precision(compiled: Any, _: Any) -> float:
        """Return mask AP on the validation images, or box AP without masks."""
        predictions, _seconds = predict_split(ExportedBackend(manifest, run_openvino(compiled)), validation)
        ap = METRICS["mask_ap" if manifest.spec.has_masks else "box_ap"]
        return float(np.nan_to_num(values([ap], gather(validation, predictions, DEFAULT, 0))[ap.key][0]))

    return nncf.quantize_with_accuracy_control(
        network,
        calibration,
        nncf.Dataset([0]),  # `precision` reads the images itself
        precision,
        max_drop=config.max_drop,
        drop_type=nncf.DropType.ABSOLUTE,
        ignored_scope=scope,
    )
