"""Converts an ONNX file to OpenVINO's format."""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from flawmask.errors import FlawmaskError
from flawmask.inference.exported import KEY, Manifest, without_telemetry

LAYERS = frozenset({"Convolution", "GroupConvolution", "ConvolutionBackpropData", "MatMul"})
"""The operators of OpenVINO that are layers with weights."""

ENDS = frozenset({"TopK", "NonMaxSuppression", "NonZero", "ROIAlign"})
"""The operators of OpenVINO at which a part of a network ends."""

WITHOUT_VALUES = frozenset({"Constant", "Parameter", "Result"})


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
    return openvino


def convert(onnx_file: Path) -> Any:
    """Return the network of an ONNX file."""
    return import_openvino().convert_model(onnx_file)


def write(network: Any, path: Path, manifest: Manifest) -> None:
    """Write a network with its manifest as `model.xml` and `model.bin`.

    In bf16, the operators that `exact_operators` returns are marked: they compute in float32.
    """
    network.set_rt_info(manifest.to_json(), KEY)
    import_openvino().save_model(network, path, compress_to_fp16=manifest.precision == "fp16")
    if manifest.precision == "bf16":
        _mark(path, exact_operators(network))


def _mark(path: Path, names: set[str]) -> None:
    """Mark operators in a file, by the attribute that OpenVINO reads. Its Python interface cannot set it."""
    tree = ElementTree.parse(path)
    for layer in tree.iterfind("layers/layer"):
        if layer.get("name") in names:
            info = layer.find("rt_info")
            if info is None:
                info = ElementTree.Element("rt_info")
                layer.insert(0 if layer.find("data") is None else 1, info)
            ElementTree.SubElement(info, "attribute", name="precise", version="0")
    tree.write(path, encoding="utf-8", xml_declaration=True)


def exact_operators(network: Any) -> set[str]:
    """Return the names of the operators that compute in float32 in every precision.

    They are what comes before the first layers, which resizes images; the last layers, whose outputs are scores, boxes
    and masks; and what is computed from those up to the next layer. bfloat16 cannot tell 286 from 287 pixels.
    """
    operators = network.get_ordered_ops()
    inputs = {_name(one): [_name(port.get_source_output().get_node()) for port in one.inputs()] for one in operators}
    after: set[str] = set()
    for one in operators:
        if one.get_type_name() in LAYERS or any(name in after for name in inputs[_name(one)]):
            after.add(_name(one))
    last = _last_layers(operators)
    exact = set(last)
    for one in operators:
        if one.get_type_name() in LAYERS | WITHOUT_VALUES | {"ROIAlign"}:
            continue
        if _name(one) not in after or any(name in exact for name in inputs[_name(one)]):
            exact.add(_name(one))
    return exact


def _last_layers(operators: Any) -> set[str]:
    """Return the names of the layers that no other layer follows before an end, see `onnx_file.last_layers`."""
    followed: dict[str, bool] = {}
    for one in reversed(operators):
        readers = [target.get_node() for port in one.outputs() for target in port.get_target_inputs()]
        followed[_name(one)] = any(
            reader.get_type_name() in LAYERS or (reader.get_type_name() not in ENDS and followed[_name(reader)])
            for reader in readers
        )
    return {_name(one) for one in operators if one.get_type_name() in LAYERS and not followed[_name(one)]}


def _name(operator: Any) -> str:
    return str(operator.get_friendly_name())
