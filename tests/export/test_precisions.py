"""Exports in lower precision: what stays in float32, and that they run."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import pytest
from data_to_export import data_set
from random_network import SPEC, patchwork, random_network

from flawmask.export import parity
from flawmask.export.config import ExportConfig
from flawmask.export.export import export
from flawmask.export.onnx_file import last_layers
from flawmask.inference.exported import file_of, read_manifest
from flawmask.inference.predictor import Predictor
from flawmask.model import checkpoint

pytestmark = [pytest.mark.services, pytest.mark.usefixtures("small_network")]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ExportConfig:
    folder = tmp_path_factory.mktemp("run")
    spec = replace(SPEC, norm="frozen")
    checkpoint.save(folder / "best.pt", random_network(spec), spec)
    return ExportConfig(model=folder / "best.pt", dataset_dir=data_set(folder / "data"), unproven=True, resamples=0)


def test_int8_for_onnx_quantises_all_layers_but_the_last(config: ExportConfig) -> None:
    plain = export(replace(config, output_dir=config.model.parent / "plain")).folder
    small = export(replace(config, precision="int8")).folder
    assert (small / "model.onnx").stat().st_size < 0.5 * (plain / "model.onnx").stat().st_size
    last = {name.split("/")[-2] for name in last_layers(onnx.load(plain / "model.onnx").graph.node)}
    assert {"cls_score", "bbox_pred", "mask_fcn_logits"} <= last
    nodes = onnx.load(small / "model.onnx").graph.node
    quantised = {name for node in nodes if node.op_type == "DequantizeLinear" for name in node.output}
    for node in nodes:
        if node.op_type == "Conv":
            assert all(name in quantised for name in node.input[:2]) == (node.name.split("/")[-2] not in last)
    assert len(Predictor(small)(patchwork(60, 80))) > 0


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_openvino_in_each_precision_predicts_nearly_the_same(config: ExportConfig, precision: Any) -> None:
    plain = export(replace(config, format="openvino", output_dir=config.model.parent / "plain")).folder
    other = export(replace(config, format="openvino", precision=precision)).folder
    assert read_manifest(file_of(other)).precision == precision
    sizes = [(folder / "model.bin").stat().st_size for folder in (plain, other)]
    assert (sizes[1] < 0.6 * sizes[0]) == (precision != "bf16")
    assert ('name="precise"' in (other / "model.xml").read_text()) == (precision == "bf16")
    exact, near = (Predictor(folder)(patchwork(60, 80)) for folder in (plain, other))
    assert abs(len(exact) - len(near)) <= 5
    np.testing.assert_allclose(exact.scores[:3], near.scores[:3], atol=0.2)


def test_accuracy_control_measures_on_val(config: ExportConfig) -> None:
    generous = parity.Tolerance(verdict=1.0, ap=None, iou=0.0)
    with patch.dict(parity.TOLERANCES, {"int8": generous}):
        proven = replace(config, format="openvino", precision="int8", unproven=False, max_drop=1.0)
        content = export(proven).parity
    assert content is not None
    assert content["failures"] == []
    assert content["precision"] == "int8"


def test_int8_without_training_images_is_refused(config: ExportConfig, tmp_path: Path) -> None:
    from flawmask.errors import FlawmaskError

    with pytest.raises(FlawmaskError, match="is not there"):
        export(replace(config, precision="int8", dataset_dir=tmp_path / "gone", output_dir=tmp_path / "out"))
    assert not list(tmp_path.iterdir())
