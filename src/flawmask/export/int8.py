"""Quantises a network to int8, calibrated on training images."""

from collections.abc import Iterator
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
from flawmask.export.network_file import import_openvino
from flawmask.inference.exported import FILES, INPUT, Manifest
from flawmask.inference.exported_backend import ExportedBackend
from flawmask.inference.threshold import DEFAULT
from flawmask.progress import track

CALIBRATED_ON = 64
"""The most training images that set the ranges of the layers' values. They are spread evenly over the split."""

LAYERS = ("Conv", "Gemm", "MatMul")
"""The operators of ONNX that are quantised."""

ENDS = ("TopK", "NonMaxSuppression", "NonZero", "RoiAlign")
"""The operators of ONNX at which a part of a network ends. The last layers before these stay in float32."""


def quantise(
    folder: Path, manifest: Manifest, training: CocoSplit, validation: CocoSplit | None, config: ExportConfig
) -> None:
    """Replace `model.onnx` in the folder by a network in int8, or for OpenVINO write one beside it.

    Args:
        folder: holds the network in float32 as ONNX.
        manifest: of the export.
        training: the images that calibrate.
        validation: the images on which OpenVINO's accuracy control measures; None to go without.
        config: of the export.
    """
    path = folder / FILES["onnx"][0]
    if manifest.format == "onnx":
        _quantise_onnx(path, manifest, training)
    else:
        _quantise_openvino(path, folder, manifest, training, validation, config)


def _calibration_images(training: CocoSplit, manifest: Manifest) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield (1, height, width, 3) uint8 images."""
    places = np.unique(np.linspace(0, len(training.images) - 1, CALIBRATED_ON).round().astype(int))
    for place in track(places.tolist(), "calibrating", total=len(places)):
        yield images.read_image(training.image_path(training.images[place]), manifest.spec.intensity)[None]


def _quantise_onnx(path: Path, manifest: Manifest, training: CocoSplit) -> None:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        """Hands the images to ONNX Runtime."""

        def __init__(self) -> None:
            self.images = _calibration_images(training, manifest)

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
    )
    prepared.unlink()


def last_layers(nodes: Any) -> list[str]:
    """Return the names of the layers whose outputs are scores, boxes or masks: no other layer follows before the end.

    Args:
        nodes: of an ONNX graph, in order.
    """
    readers: dict[str, list[Any]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    followed: dict[int, bool] = {}  # for each node, whether a layer follows it
    for node in reversed(nodes):
        after = [reader for name in node.output for reader in readers.get(name, [])]
        followed[id(node)] = any(
            reader.op_type in LAYERS or (reader.op_type not in ENDS and followed[id(reader)]) for reader in after
        )
    return [node.name for node in nodes if node.op_type in LAYERS and not followed[id(node)]]


def _quantise_openvino(
    onnx_file: Path,
    folder: Path,
    manifest: Manifest,
    training: CocoSplit,
    validation: CocoSplit | None,
    config: ExportConfig,
) -> None:
    openvino = import_openvino()
    import nncf
    import onnx

    network = openvino.convert_model(onnx_file)
    calibration = nncf.Dataset(list(_calibration_images(training, manifest)))
    there = {node.get_friendly_name() for node in network.get_ops()}
    last = [name for name in last_layers(onnx.load(onnx_file).graph.node) if name in there]
    options: dict[str, Any] = {"ignored_scope": nncf.IgnoredScope(names=last, types=list(NOT_LAYERS), validate=False)}
    if validation is None:
        quantised = nncf.quantize(network, calibration, **options)
    else:

        def precision(compiled: Any, _: Any) -> float:
            """Return mask AP on the validation images, or box AP without masks."""
            outputs = [output.any_name for output in compiled.outputs]

            def run(batch: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[Any]]:
                results = compiled({INPUT: batch})
                return {name: results[number] for number, name in enumerate(outputs)}

            predictions, _seconds = predict_split(ExportedBackend(manifest, run), validation)
            ap = METRICS["mask_ap" if manifest.spec.has_masks else "box_ap"]
            return float(np.nan_to_num(values([ap], gather(validation, predictions, DEFAULT, 0))[ap.key][0]))

        quantised = nncf.quantize_with_accuracy_control(
            network,
            calibration,
            nncf.Dataset([0]),  # `precision` reads the images itself
            precision,
            max_drop=config.max_drop,
            drop_type=nncf.DropType.ABSOLUTE,
            **options,
        )
    openvino.save_model(quantised, folder / FILES["openvino"][0], compress_to_fp16=False)


NOT_LAYERS = ("Add", "Subtract", "Multiply", "Divide", "Interpolate", "ROIAlign", "Minimum", "Maximum", "Exp", "Sqrt")
"""The operators of OpenVINO that resize images and compute boxes and scores: they stay in float32."""
