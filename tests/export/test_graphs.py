"""Exported graphs return what PyTorch returns, for one network of each kind."""

import dataclasses
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_network import KINDS, KINDS_AND_MORE, patchwork, random_network, spec_of

from flawmask.files import sha256, write_json
from flawmask.images import resize
from flawmask.inference.backend import Resized, prepared
from flawmask.inference.exported import (
    BOXES,
    FILES,
    IMAGE,
    LABELS,
    MANIFEST,
    MAPS,
    MASKS,
    SCORES,
    Format,
    Manifest,
    outputs_of,
)
from flawmask.inference.exported_backend import ExportedBackend
from flawmask.inference.torch_backend import TorchBackend
from flawmask.model.build import build_uninitialised, for_export, for_inference, set_score_floor
from flawmask.model.graph import batch_of
from flawmask.model.spec import ModelSpec
from flawmask.prediction import RawDetections

FLOOR = 0.05
SIZES = [(70, 90), (70, 90), (98, 50), (1, 64), (150, 100)]


def written(folder: Path, network: Any, spec: ModelSpec, runtime: Format) -> Path:
    """Write a network as export does, without a proof, and return its file."""
    from flawmask.export import onnx_file, openvino_file

    manifest = Manifest(runtime, "fp32", spec, None, None, "0", FLOOR, spec.proposals, is_proven=False)
    path = folder / "model.onnx"
    onnx_file.write_onnx(for_export(network, spec, FLOOR), path, spec)
    if runtime == "openvino":
        openvino_file.write(openvino_file.convert(path), folder / "model.xml", manifest)
        path.unlink()
    else:
        onnx_file.put_manifest(path, manifest)
    files = {name: sha256((folder / name).read_bytes()) for name in FILES[runtime]}
    write_json(folder / MANIFEST, {"manifest": json.loads(json.dumps(dataclasses.asdict(manifest))), "files": files})
    return folder / FILES[runtime][0]


@lru_cache(maxsize=1)  # all of them would take gigabytes
def networks(arch: Any) -> tuple[ModelSpec, Any, TorchBackend]:
    """Return a spec, its random network, and PyTorch's backend for it."""
    spec = spec_of(arch)
    network = random_network(spec)
    fast = for_inference(network, spec, torch.device("cpu"), torch.float32)
    set_score_floor(fast, FLOOR)
    return spec, network, TorchBackend(fast, spec)


def copy_of(network: Any, spec: ModelSpec) -> Any:
    copy = build_uninitialised(spec)
    copy.load_state_dict(network.state_dict())
    return copy


def tolerance_of(arch: str) -> float:
    """Return how much scores may differ. The random RF-DETR takes other queries if a pixel differs by a grey level."""
    return 0.03 if arch.startswith("rfdetr") else 5e-3


def agree(one: RawDetections, other: RawDetections, tolerance: float) -> None:
    """Check that two backends return the same instances, in any order.

    Boxes of random networks have nearly equal scores. Some of these are ordered, and suppressed, in another way.
    """
    assert len(one.scores) == len(other.scores)
    differences = np.abs(np.sort(one.scores) - np.sort(other.scores))
    assert (differences <= tolerance).sum() >= 0.8 * len(differences)
    assert differences.max(initial=0) <= 0.05
    assert (one.masks is None) == (other.masks is None)
    assert (one.maps is None) == (other.maps is None)
    if one.maps is not None and other.maps is not None:
        np.testing.assert_allclose(one.maps, other.maps, atol=tolerance)
    same = 0
    for place, (box, label, score) in enumerate(zip(one.boxes, one.labels, one.scores, strict=True)):
        is_near = (other.labels == label) & (np.abs(other.scores - score) <= 2 * tolerance)
        is_near &= (np.abs(other.boxes - box) <= 0.5).all(1)
        if one.masks is not None and other.masks is not None:
            is_near &= np.abs(other.masks - one.masks[place]).max((1, 2)) <= 0.1
        same += bool(is_near.any())
    assert same >= 0.7 * len(one.scores)


@pytest.mark.parametrize("arch", KINDS_AND_MORE)
def test_the_graph_returns_what_the_network_returns_for_every_size(arch: Any) -> None:
    spec, network, backend = networks(arch)
    graph = for_export(copy_of(network, spec), spec, FLOOR)
    for size in dict.fromkeys(SIZES):
        pixels = patchwork(*size, seed=size[0])
        with torch.inference_mode():
            outputs = [one.numpy() for one in graph(torch.from_numpy(pixels[None]))]
        found = dict(zip(outputs_of(spec), outputs, strict=True))
        assert not found[IMAGE].any()
        maps = found[MAPS][0] if spec.semantic_head else None
        raw = RawDetections(found[BOXES], found[LABELS], found[SCORES], found.get(MASKS), maps)
        (expected,) = backend.infer([prepared(pixels, backend)])
        agree(expected, raw, tolerance_of(arch))


@pytest.mark.parametrize("arch", KINDS_AND_MORE)
def test_onnx_runtime_returns_what_pytorch_returns_also_in_batches(arch: Any, tmp_path: Path) -> None:
    returns_what_pytorch_returns(arch, "onnx", tmp_path)


@pytest.mark.services
@pytest.mark.parametrize("arch", KINDS)
def test_openvino_returns_what_pytorch_returns_also_in_batches(arch: Any, tmp_path: Path) -> None:
    returns_what_pytorch_returns(arch, "openvino", tmp_path)


def returns_what_pytorch_returns(arch: Any, runtime: Format, tmp_path: Path) -> None:
    spec, network, backend = networks(arch)
    export = ExportedBackend.load(written(tmp_path, copy_of(network, spec), spec, runtime), threads=1)
    batch = [patchwork(*size, seed=number) for number, size in enumerate(SIZES)]
    found = export.infer([prepared(pixels, export) for pixels in batch])
    for pixels, one in zip(batch, found, strict=True):
        (expected,) = backend.infer([prepared(pixels, backend)])
        agree(expected, one, tolerance_of(arch))
        (alone,) = export.infer([Resized(pixels, *pixels.shape[:2])])
        agree(alone, one, 5e-4)


def test_an_image_without_detections_gives_empty_arrays(tmp_path: Path) -> None:
    spec, network, _ = networks("maskrcnn_resnet18_fpn")
    silent = copy_of(network, spec)
    silent.roi_heads.box_predictor.cls_score.bias = torch.nn.Parameter(torch.tensor([90.0, 0, 0, 0]))
    export = ExportedBackend.load(written(tmp_path, silent, spec, "onnx"), threads=1)
    for raw in export.infer([prepared(patchwork(70, 90, seed), export) for seed in range(3)]):
        assert raw.boxes.shape == (0, 4)
        assert raw.masks is not None
        assert raw.masks.shape == (0, 28, 28)


@pytest.mark.parametrize("size", [(70, 90), (700, 700), (480, 641), (98, 200), (3, 40), (1, 300), (1024, 1024)])
def test_the_graph_resizes_like_training_up_to_one_grey_level_in_4_of_10_000_values(size: tuple[int, int]) -> None:
    spec = spec_of(
        "maskrcnn_resnet18_fpn",
    )
    pixels = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    rows, columns = spec.resized(*size)
    batch = batch_of(torch.from_numpy(pixels[None]), spec)
    assert batch.pixels.shape[2:] == spec.padded(*size)
    seen = (batch.pixels[0, :, :rows, :columns] * 255).round().permute(1, 2, 0).numpy().astype(int)
    difference = np.abs(seen - resize(pixels, (rows, columns)).astype(int))
    assert difference.max() <= 1
    assert difference.mean() <= 4e-4
    assert batch.size.tolist() == [columns, rows] * 2
    assert not batch.inside[..., rows:, :].any()
    assert batch.inside[..., :rows, :columns].all()
