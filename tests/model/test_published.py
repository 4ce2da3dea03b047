"""Published weights, tested with files of the same structure and other numbers."""

import argparse
import hashlib
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models import get_model, mobilenet_v3_large
from torchvision.models.detection import ssd
from torchvision.models.vgg import cfgs, make_layers
from weight_files import State, detector, epsilons, shaken

from flawmask.errors import FlawmaskError
from flawmask.model.arch import ARCHITECTURES, Arch, architecture
from flawmask.model.architecture import FixedSquare
from flawmask.model.build import build
from flawmask.model.published import OtherFile
from flawmask.model.spec import ModelSpec
from flawmask.model.weights import Pretrained, load_matching, pretrained
from flawmask.training.config import TrainSettings
from flawmask.training.network import _norm, build_for_training


def as_published(state: State) -> State:
    """Return the tensors with the names in torchvision's old files."""
    for now, before in (
        (r"(backbone\.fpn\.\w+_blocks\.\d)\.0\.(\w+)", r"\1.\2"),
        (r"rpn\.head\.conv\.0\.0\.(\w+)", r"rpn.head.conv.\1"),
        (r"(head\.\w+_head\.conv)\.0\.0\.(\w+)", r"\1.0.\2"),
        (r"(head\.\w+_head\.conv)\.1\.0\.(\w+)", r"\1.2.\2"),
        (r"(head\.\w+_head\.conv)\.2\.0\.(\w+)", r"\1.4.\2"),
        (r"(head\.\w+_head\.conv)\.3\.0\.(\w+)", r"\1.6.\2"),
    ):
        state = {re.sub(f"^{now}$", before, name): tensor for name, tensor in state.items()}
    return state


def in_hub(hub: Path, published: Any, state: State) -> None:
    hub.mkdir(parents=True)
    torch.save(state, hub / published.url.rsplit("/", 1)[1])


@pytest.fixture
def quick_vgg(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the initialisation of VGG's classifier, which takes seconds and is not used by SSD."""

    def features(**_: Any) -> Any:
        return SimpleNamespace(features=make_layers(cfgs["D"], batch_norm=False))

    monkeypatch.setattr(ssd, "vgg16", features)


def outputs(model: Any, image: Tensor) -> list[Tensor]:
    """Return all outputs of a detector's layers for an image, after torchvision's preprocessing."""
    vars(model.transform).pop("resize", None)  # undo: our networks get resized images
    images, _ = model.eval().transform([image])
    features = list(model.backbone(images.tensors).values())
    if not hasattr(model, "roi_heads"):
        return [images.tensors, *features, *model.head(features).values()]
    regions = torch.linspace(0, 1, 2 * 256 * 49).view(2, 256, 7, 7)
    scores, boxes = model.rpn.head(features)
    heads = model.roi_heads
    return [images.tensors, *features, *scores, *boxes, *heads.box_predictor(heads.box_head(regions))]


BOX_HEADS = {
    f"roi_heads.box_predictor.{layer}.{kind}" for layer in ("cls_score", "bbox_pred") for kind in ("weight", "bias")
}


LOGITS = {f"head.classification_head.cls_logits.{kind}" for kind in ("weight", "bias")}


SSD_HEADS = {
    f"head.classification_head.module_list.{level}.{kind}" for level in range(6) for kind in ("weight", "bias")
}


SSDLITE_HEADS = {name.replace(".weight", ".1.weight").replace(".bias", ".1.bias") for name in SSD_HEADS}


@pytest.mark.usefixtures("quick_vgg")
@pytest.mark.parametrize(
    ("arch", "class_heads", "eps"),
    [
        ("fasterrcnn_resnet50_fpn", BOX_HEADS, 0.0),
        ("fasterrcnn_mobilenet_v3_large_fpn", BOX_HEADS, 1e-5),
        ("retinanet_resnet50_fpn", LOGITS, 0.0),
        ("fcos_resnet50_fpn", LOGITS, 1e-5),
        pytest.param("ssd300_vgg16", SSD_HEADS, None, marks=pytest.mark.services),
        ("ssdlite320_mobilenet_v3_large", SSDLITE_HEADS, 0.001),
    ],
)
def test_coco_weights_fill_all_but_the_class_heads_and_give_torchvisions_outputs(
    hub: Path, arch: Arch, class_heads: set[str], eps: float | None
) -> None:
    torch.manual_seed(4)
    record = architecture(arch)
    state = shaken(get_model(arch, weights=None, weights_backbone=None, num_classes=91).state_dict())
    in_hub(hub, record.coco, as_published(state))
    initial_weights = pretrained(arch, "coco")
    assert (initial_weights.norm, initial_weights.source) == ("frozen", "COCO weights")

    few = detector(2, arch, norm=initial_weights.norm, norm_eps=initial_weights.norm_eps)
    drawn = {name: few.state_dict()[name].clone() for name in class_heads}
    filled, left = load_matching(few, initial_weights)
    loaded = few.state_dict()
    assert {line.split(" ")[0] for line in left} == class_heads
    assert filled == len(loaded) - len(class_heads)
    for name, tensor in loaded.items():
        assert torch.equal(tensor, drawn[name] if name in class_heads else state[name]), name

    sizes: Any = {} if isinstance(record.size, FixedSquare) else {"min_size": 96, "max_size": 160}
    theirs = get_model(arch, weights="COCO_V1", **sizes)
    ours = detector(
        90, arch, norm=initial_weights.norm, norm_eps=initial_weights.norm_eps, image_size=record.image_size(96)
    )
    assert load_matching(ours, initial_weights)[1] == []
    assert initial_weights.start == "detector"
    assert epsilons(ours) == epsilons(theirs)
    assert set(epsilons(ours).values()) == (set() if eps is None else {eps})
    with torch.inference_mode():
        image = torch.rand(3, 90, 120)
        pairs = list(zip(outputs(ours, image), outputs(theirs, image), strict=True))
    assert len(pairs) > 4
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.usefixtures("quick_vgg")
def test_vgg_features_fill_ssd_up_to_the_last_convolution(hub: Path) -> None:
    torch.manual_seed(5)
    features = make_layers(cfgs["D"], batch_norm=False)
    state = {f"features.{name}": tensor for name, tensor in features.state_dict().items()}
    nothing = {"classifier.0.weight": torch.full((2, 2), torch.nan)}  # as in the published file
    in_hub(hub, architecture("ssd300_vgg16").imagenet, state | nothing)
    model = detector(arch="ssd300_vgg16")
    initial_weights = pretrained("ssd300_vgg16", "imagenet")
    assert initial_weights.start == "backbone"
    filled, left = load_matching(model, initial_weights)
    assert filled == len(state) == 26
    drawn = ("backbone.scale_weight ", "backbone.extra.0.7.", *(f"backbone.extra.{at}." for at in range(1, 5)), "head.")
    assert len(left) == len(model.state_dict()) - filled
    assert all(line.startswith(drawn) for line in left)
    theirs = ssd.SSDFeatureExtractorVGG(features, highres=False)
    with torch.inference_mode():
        image = 100 * torch.randn(1, 3, 96, 96)
        found, expected = model.backbone.features(image), theirs.features(image)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(model.backbone.extra[0][:7](found), theirs.extra[0][:7](expected))


def test_ssdlite_takes_the_mobilenet_layers_that_fit_and_the_others_still_get_a_signal(hub: Path) -> None:
    torch.manual_seed(6)
    arch: Arch = "ssdlite320_mobilenet_v3_large"
    classifier_ = mobilenet_v3_large(weights=None)
    classifier_.load_state_dict(shaken(classifier_.state_dict()))
    in_hub(hub, architecture(arch).imagenet, classifier_.state_dict())
    initial_weights = pretrained(arch, "imagenet")
    assert (initial_weights.norm, initial_weights.start) == ("frozen", "backbone")
    spec = ModelSpec(arch, ("a", "b"), image_size=320, norm=initial_weights.norm, norm_eps=initial_weights.norm_eps)
    model = build(spec)
    filled, left = load_matching(model, initial_weights)
    own = {
        name
        for name in model.state_dict()
        if name.startswith(("backbone.features.0.", "backbone.features.1.0.1", "backbone.features.1.0.2"))
    }
    assert filled == len(own)
    assert not own & {line.split(" ")[0].rstrip(":") for line in left}

    model = build_for_training(
        TrainSettings(arch=arch), spec, initial_weights, torch.device("cpu"), torch.float32, start=initial_weights.start
    )
    assert all(torch.equal(model.state_dict()[name], initial_weights.state[name]) for name in own)
    body = classifier_.features.eval()
    with torch.inference_mode():
        image = torch.randn(1, 3, 320, 320)
        levels = list(model.backbone(image).values())
        torch.testing.assert_close(levels[0], body[13].block[0](body[:13](image)), rtol=1e-3, atol=1e-3)
    assert all(0.01 < float(level.std() / levels[0].std()) < 10 for level in levels)


def test_ssdlite_from_scratch_gets_a_norm_that_works_for_one_image() -> None:
    nothing = Pretrained({}, "group", None, "")
    assert _norm(TrainSettings(arch="ssdlite320_mobilenet_v3_large"), nothing, micro_batch_size=4) == "group"
    assert _norm(TrainSettings(arch="ssd300_vgg16"), nothing, micro_batch_size=4) == "batch"


def test_an_rfdetr_file_is_checked_and_loads_with_its_training_settings(
    served: tuple[Path, str], hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = served
    tensor = torch.rand(3, 3)
    torch.save({"model": {"backbone.0.level": tensor}, "args": argparse.Namespace(lr=1e-4)}, folder / "nano.pth")
    md5 = hashlib.md5((folder / "nano.pth").read_bytes()).hexdigest()
    record = replace(architecture("rfdetr_seg_nano"), coco=OtherFile(f"{address}/nano.pth", md5))
    monkeypatch.setitem(ARCHITECTURES, record.name, record)
    initial_weights = pretrained("rfdetr_seg_nano", "coco")
    assert list(initial_weights.state) == ["backbone.0.level"]
    assert torch.equal(initial_weights.state["backbone.0.level"], tensor)
    changed = replace(record, coco=OtherFile(f"{address}/nano.pth", md5[::-1]))
    monkeypatch.setitem(ARCHITECTURES, record.name, changed)
    with pytest.raises(FlawmaskError, match=r"nano\.pth is not the file that was published.*delete it"):
        pretrained("rfdetr_seg_nano", "coco")
