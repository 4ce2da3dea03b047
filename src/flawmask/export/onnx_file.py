"""Writes a network as ONNX, and finds its last layers there."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.onnx import register_custom_op_symbolic, symbolic_helper  # type: ignore[attr-defined]

from flawmask.inference.exported import INPUT, KEY, MAPS, Manifest, outputs_of
from flawmask.model.spec import ModelSpec

OPSET = 17
"""The version of ONNX's operators. RoiAlign is as torchvision's from 16 on, and OpenVINO knows 17 in full."""


@symbolic_helper.parse_args("v", "v", "f", "f")
def _suppress(graph: Any, boxes: Any, scores: Any, iou: float, floor: float) -> Any:
    """Return ONNX's operator for `graph.suppress`."""
    limits = (torch.tensor([2**31 - 1]), torch.tensor([iou]), torch.tensor([floor]))
    return graph.op("NonMaxSuppression", boxes, scores, *(graph.op("Constant", value_t=one) for one in limits))


def write_onnx(network: nn.Module, path: Path, spec: ModelSpec) -> None:
    """Write the graph of a network, see `build.for_export`, as ONNX. Batch and size of its images are free.

    The exporter is the one that records a run. PyTorch's newer one proves for each operator that it fits all sizes of
    images: for a ResNet-18 this took 50 s where recording takes 4 s, and for an EfficientNet-Lite it did not end.
    """
    register_custom_op_symbolic("flawmask::suppress", _suppress, OPSET)
    outputs = outputs_of(spec)
    free = {INPUT: {0: "batch", 1: "height", 2: "width"}, **{name: {0: "instances"} for name in outputs}}
    free[MAPS] = {0: "batch", 2: "rows", 3: "columns"}
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
            dynamic_axes={name: axes for name, axes in free.items() if name in (INPUT, *outputs)},
        )


def put_manifest(path: Path, manifest: Manifest) -> None:
    """Write the manifest into an ONNX file."""
    import onnx

    network = onnx.load(path)
    onnx.helper.set_model_props(network, {KEY: manifest.to_json()})
    onnx.save(network, path)


LAYERS = ("Conv", "Gemm", "MatMul")
"""The operators of ONNX that are layers with weights."""

ENDS = ("TopK", "NonMaxSuppression", "NonZero", "RoiAlign")
"""The operators of ONNX at which a part of a network ends."""


def last_layers(nodes: Any) -> list[str]:
    """Return the names of the layers whose outputs are scores, boxes or masks: no other layer follows before the end.

    Args:
        nodes: of an ONNX graph, in order.
    """
    readers: dict[str, list[Any]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    followed: dict[str, bool] = {}  # for each node, by its first output, whether a layer follows it
    for node in reversed(nodes):
        followed[node.output[0]] = any(
            reader.op_type in LAYERS or (reader.op_type not in ENDS and followed[reader.output[0]])
            for name in node.output
            for reader in readers.get(name, [])
        )
    return [node.name for node in nodes if node.op_type in LAYERS and not followed[node.output[0]]]
