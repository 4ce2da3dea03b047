"""Writes a network as ONNX, and converts that to OpenVINO's format."""

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.onnx import register_custom_op_symbolic, symbolic_helper

from flawmask.errors import FlawmaskError
from flawmask.inference.exported import (
    BOXES,
    FILES,
    IMAGE,
    INPUT,
    KEY,
    LABELS,
    MASKS,
    SCORES,
    Manifest,
    without_telemetry,
)

OPSET = 17
"""The version of ONNX's operators. RoiAlign is as torchvision's from 16 on, and OpenVINO knows 17 in full."""


@symbolic_helper.parse_args("v", "v", "f", "f")  # type: ignore[untyped-decorator]
def _suppress(graph: Any, boxes: Any, scores: Any, iou: float, floor: float) -> Any:
    """Return ONNX's operator for `graph.suppress`."""
    limits = (torch.tensor([2**31 - 1]), torch.tensor([iou]), torch.tensor([floor]))
    return graph.op("NonMaxSuppression", boxes, scores, *(graph.op("Constant", value_t=one) for one in limits))


def write_onnx(network: nn.Module, path: Path, *, has_masks: bool) -> None:
    """Write the graph of a network, see `build.for_export`, as ONNX. Batch and size of its images are free.

    The exporter is the one that records a run. PyTorch's newer one proves for each operator that it fits all sizes of
    images: for a ResNet-18 this took 50 s where recording takes 4 s, and for an EfficientNet-Lite it did not end.
    """
    register_custom_op_symbolic("flawmask::suppress", _suppress, OPSET)
    outputs = (BOXES, LABELS, SCORES, IMAGE, *((MASKS,) if has_masks else ()))
    free = {INPUT: {0: "batch", 1: "height", 2: "width"}, **{name: {0: "instances"} for name in outputs}}
    example = torch.randint(0, 256, (2, 70, 90, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of constants that are the same for all images, and of the newer exporter
        torch.onnx.export(
            network,
            (example,),
            path,
            dynamo=False,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=list(outputs),
            dynamic_axes=free,
        )


def put_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest into the network's file in the folder, and for OpenVINO also make that file.

    Before, the folder holds `model.onnx`, or for OpenVINO in int8 the quantised network.
    """
    if manifest.format == "onnx":
        import onnx

        network = onnx.load(folder / FILES["onnx"][0])
        onnx.helper.set_model_props(network, {KEY: manifest.to_json()})
        onnx.save(network, folder / FILES["onnx"][0])
        return
    openvino = import_openvino()
    path = folder / FILES["openvino"][0]
    network = openvino.Core().read_model(path)
    network.set_rt_info(manifest.to_json(), KEY)
    again = path.with_name("again.xml")  # the weights are still mapped from the first file
    openvino.save_model(network, again, compress_to_fp16=manifest.precision == "fp16")
    del network
    for suffix in (".xml", ".bin"):
        again.with_suffix(suffix).replace(path.with_suffix(suffix))


def convert_to_openvino(onnx_file: Path, folder: Path) -> None:
    """Write the network of an ONNX file into the folder in OpenVINO's format, in float32."""
    openvino = import_openvino()
    openvino.save_model(openvino.convert_model(onnx_file), folder / FILES["openvino"][0], compress_to_fp16=False)


def import_openvino() -> Any:
    """Return the module openvino, with its usage reports switched off.

    Raises:
        FlawmaskError: it is not installed.
    """
    without_telemetry()
    try:
        import openvino
    except ImportError:
        raise FlawmaskError('OpenVINO is not installed: pip install "flawmask[export]"') from None
    logging.getLogger("nncf").setLevel(logging.ERROR)
    return openvino
