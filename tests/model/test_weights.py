"""Pretrained weights: fetched from a server of our own, taken from files, matched by name and shape, refused."""

import argparse
import hashlib
import io
import os
import pickle
import re
import socket
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchvision.models import Weights, WeightsEnum, get_model, mobilenet_v3_large, resnet18, resnet50
from torchvision.models.detection import ssd
from torchvision.models.vgg import cfgs, make_layers
from torchvision.ops import FrozenBatchNorm2d

from flawmask.errors import FlawmaskError
from flawmask.model import checkpoint, published, weights, yolo
from flawmask.model.arch import FIXED_SIZES, Arch
from flawmask.model.build import build
from flawmask.model.spec import ModelSpec
from flawmask.model.weights import Pretrained, from_file, load_file, load_matching, pretrained
from flawmask.training.config import TrainSettings
from flawmask.training.start import _norm, start

State = dict[str, Tensor]


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Torchvision's cache, empty; returned is where its files go."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def served(tmp_path: Path, hub: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address under which a server gives its files."""
    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), lambda *rest: _Quiet(*rest, directory=str(folder))) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def entry(url: str) -> Any:
    """A torchvision weights entry like its own ones, at another address."""
    return WeightsEnum("Local", {"V1": Weights(url=url, transforms=nn.Identity, meta={})})["V1"]


def put(folder: Path, state: State, *, wrong_hash: bool = False) -> str:
    """Write the state dict under a name that carries its hash, as torchvision's files do."""
    data = io.BytesIO()
    torch.save(state, data)
    digest = hashlib.sha256(data.getvalue()).hexdigest()[:8]
    name = f"network-{'0' * 8 if wrong_hash else digest}.pth"
    (folder / name).write_bytes(data.getvalue())
    return name


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@cache
def classifier(name: str) -> State:
    """The state dict of an ImageNet classifier, as random as it is born."""
    torch.manual_seed(1)
    state: State = {"resnet18": resnet18, "resnet50": resnet50, "mobilenet": mobilenet_v3_large}[name](
        weights=None
    ).state_dict()
    return state


def detector(classes: int = 2, arch: Arch = "maskrcnn_resnet18_fpn", **spec: Any) -> Any:
    return build(ModelSpec(arch, tuple(f"class_{number}" for number in range(classes)), **spec))


def test_weights_are_fetched_checked_and_kept_in_torchvisions_cache(
    served: tuple[Path, str], hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = served
    name = put(folder, classifier("resnet18"))
    monkeypatch.setitem(published.IMAGENET, "maskrcnn_resnet18_fpn", entry(f"{address}/{name}"))
    given = pretrained("maskrcnn_resnet18_fpn", "imagenet")
    assert (hub / name).read_bytes() == (folder / name).read_bytes()
    assert given.norm == "frozen"
    assert torch.equal(
        given.state["backbone.body.layer1.0.conv1.weight"], classifier("resnet18")["layer1.0.conv1.weight"]
    )
    (folder / name).unlink()
    again = pretrained("maskrcnn_resnet18_fpn", "imagenet")  # from the cache now
    assert again.state.keys() == given.state.keys()


def test_where_there_are_no_coco_weights_imagenets_are_taken_and_it_is_said(
    served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, address = served
    url = f"{address}/{put(folder, classifier('resnet18'))}"
    monkeypatch.setitem(published.IMAGENET, "maskrcnn_resnet18_fpn", entry(url))
    with caplog.at_level("INFO"):
        given = pretrained("maskrcnn_resnet18_fpn", "coco")
    assert given.source == "ImageNet weights"
    assert "no COCO weights for maskrcnn_resnet18_fpn" in caplog.text
    assert f"downloading {url}" in caplog.text


def test_a_file_with_another_hash_than_its_name_says_is_refused_and_not_kept(
    served: tuple[Path, str], hub: Path
) -> None:
    folder, address = served
    name = put(folder, {"layer": torch.ones(2)}, wrong_hash=True)
    with pytest.raises(FlawmaskError, match="hash") as caught:
        weights.download(entry(f"{address}/{name}"))
    assert "--weights none" in str(caught.value)
    assert not list(hub.iterdir())


@pytest.mark.parametrize("choice", ["coco", "imagenet"])
def test_without_a_network_the_error_names_the_file_the_folder_and_the_way_out(
    hub: Path, monkeypatch: pytest.MonkeyPatch, choice: str
) -> None:
    table = published.COCO if choice == "coco" else published.IMAGENET
    name = table["maskrcnn_resnet50_fpn"].url.rsplit("/", 1)[1]
    monkeypatch.setitem(table, "maskrcnn_resnet50_fpn", entry(f"{closed_port()}/{name}"))
    with pytest.raises(FlawmaskError) as caught:
        pretrained("maskrcnn_resnet50_fpn", choice)
    message = str(caught.value)
    assert "\n" not in message
    assert "cannot be fetched" in message
    assert f"put {name} into {hub}" in message
    assert "--weights none" in message


def test_a_server_that_has_not_got_the_file_is_told_from_one_that_is_not_there(served: tuple[Path, str]) -> None:
    with pytest.raises(FlawmaskError, match=r"cannot be fetched .*not found"):
        weights.download(entry(f"{served[1]}/missing-00000000.pth"))


@pytest.mark.parametrize("content", [b"", b"<html>Sign in</html>", b"PK\x03\x04 cut off"])
def test_a_damaged_file_in_the_cache_is_named_with_what_to_do(hub: Path, content: bytes) -> None:
    hub.mkdir(parents=True)
    (hub / "network-00000000.pth").write_bytes(content)
    with pytest.raises(FlawmaskError, match=r"network-00000000\.pth is damaged .*delete it") as caught:
        weights.download(entry(f"{closed_port()}/network-00000000.pth"))
    assert "\n" not in str(caught.value)


def test_a_socket_that_stays_silent_is_given_up_and_the_old_patience_restored() -> None:
    before = socket.getdefaulttimeout()
    with weights._impatient(7):
        assert socket.getdefaulttimeout() == 7
    assert socket.getdefaulttimeout() == before


def test_none_is_nothing_and_wants_norms_that_learn_from_nothing() -> None:
    assert pretrained("maskrcnn_resnet50_fpn", "none") == Pretrained({}, "group", None, "no pretrained weights")


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("maskrcnn_resnet18_fpn", "resnet18"),
        ("maskrcnn_resnet50_fpn", "resnet50"),
        ("maskrcnn_resnet50_fpn_v2", "resnet50"),
        ("maskrcnn_mobilenet_v3_large_fpn", "mobilenet"),
        ("fasterrcnn_resnet50_fpn", "resnet50"),
        ("fasterrcnn_mobilenet_v3_large_fpn", "mobilenet"),
        ("retinanet_resnet50_fpn", "resnet50"),
        ("fcos_resnet50_fpn", "resnet50"),
    ],
)
def test_a_classifiers_backbone_fills_the_whole_body_of_the_detector(tmp_path: Path, arch: Arch, name: str) -> None:
    torch.save(classifier(name), tmp_path / "classifier.pth")
    model = detector(arch=arch, norm="frozen")
    filled, left = load_matching(model, from_file(tmp_path / "classifier.pth", arch))
    body = model.backbone.body.state_dict()
    assert filled == len(body)
    assert not [line for line in left if line.startswith("backbone.body")]
    prefix = "features." if name == "mobilenet" else ""
    assert all(torch.equal(tensor, classifier(name)[prefix + key]) for key, tensor in body.items())


def test_loading_lists_exactly_what_did_not_fit(tmp_path: Path) -> None:
    torch.manual_seed(2)
    source, target = detector(90, norm="frozen"), detector(2, norm="frozen")
    torch.save({"model_state_dict": source.state_dict()}, tmp_path / "coco.pth")
    before = target.roi_heads.box_predictor.cls_score.weight.detach().clone()
    filled, left = load_matching(target, from_file(tmp_path / "coco.pth", "maskrcnn_resnet18_fpn"))
    assert left == [
        "roi_heads.box_predictor.cls_score.weight [3, 1024]: the file has [91, 1024]",
        "roi_heads.box_predictor.cls_score.bias [3]: the file has [91]",
        "roi_heads.box_predictor.bbox_pred.weight [12, 1024]: the file has [364, 1024]",
        "roi_heads.box_predictor.bbox_pred.bias [12]: the file has [364]",
        "roi_heads.mask_predictor.mask_fcn_logits.weight [3, 256, 1, 1]: the file has [91, 256, 1, 1]",
        "roi_heads.mask_predictor.mask_fcn_logits.bias [3]: the file has [91]",
    ]
    assert filled == len(target.state_dict()) - len(left)
    assert torch.equal(target.roi_heads.box_predictor.cls_score.weight, before)
    assert torch.equal(target.rpn.head.cls_logits.weight, source.rpn.head.cls_logits.weight)


def test_the_names_that_torchvision_has_given_up_are_understood(tmp_path: Path) -> None:
    torch.manual_seed(3)
    source = detector(norm="frozen")
    old = {}
    for name, tensor in source.state_dict().items():
        kind = name.rsplit(".", 1)[1]
        if name.startswith("backbone.fpn."):
            old[name.replace(f".0.{kind}", f".{kind}")] = tensor
        elif name.startswith("rpn.head.conv."):
            old[f"rpn.head.conv.{kind}"] = tensor
        elif name.startswith("roi_heads.mask_head."):
            old[f"roi_heads.mask_head.mask_fcn{int(name.split('.')[2]) + 1}.{kind}"] = tensor
        else:
            old[name] = tensor
    assert len(old.keys() - source.state_dict().keys()) == 16 + 2 + 8
    detector(norm="frozen").load_state_dict(dict(old))  # torchvision takes them for its own
    torch.save(old, tmp_path / "old.pth")
    target = detector(norm="frozen")
    filled, left = load_matching(target, from_file(tmp_path / "old.pth", "maskrcnn_resnet18_fpn"))
    assert (filled, left) == (len(old), [])
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in target.state_dict().items())


@pytest.mark.parametrize("wrap", ["plain", "model_state_dict", "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_state_dict_is_found_alone_or_under_its_usual_names(tmp_path: Path, wrap: str, prefix: str) -> None:
    state = {"rpn.head.bbox_pred.bias": torch.ones(3), "backbone.body.bn1.running_mean": torch.zeros(2)}
    stored = {prefix + name: tensor for name, tensor in state.items()}
    torch.save(stored if wrap == "plain" else {"epoch": 3, wrap: stored}, tmp_path / "file.pth")
    given = from_file(tmp_path / "file.pth", "maskrcnn_resnet18_fpn")
    assert given.state.keys() == state.keys()
    assert given.norm == "frozen"


def test_a_file_without_batch_statistics_wants_group_norm_and_a_checkpoint_its_own_epsilon(tmp_path: Path) -> None:
    torch.save({"rpn.weight": torch.ones(1)}, tmp_path / "group.pth")
    assert from_file(tmp_path / "group.pth", "maskrcnn_resnet18_fpn").norm == "group"
    torch.save({"spec": {"norm_eps": 0.0}, "model_state_dict": {"rpn.weight": torch.ones(1)}}, tmp_path / "spec.pth")
    assert from_file(tmp_path / "spec.pth", "maskrcnn_resnet18_fpn").norm_eps == 0.0
    torch.save({"spec": "mine", "model_state_dict": {"rpn.weight": torch.ones(1)}}, tmp_path / "other.pth")
    assert from_file(tmp_path / "other.pth", "maskrcnn_resnet18_fpn").norm_eps is None


def test_weights_of_which_nothing_fits_are_refused() -> None:
    given = Pretrained({"head.weight": torch.ones(1)}, "group", None, "weights of x.pth")
    with pytest.raises(FlawmaskError, match=r"x\.pth: not one tensor fits"):
        load_matching(nn.Linear(2, 2), given)


class _Code:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("by", ["torch", "pickle"])
def test_a_file_that_carries_code_is_refused_and_the_code_does_not_run(tmp_path: Path, by: str) -> None:
    content = {"model_state_dict": {"rpn.weight": torch.ones(1)}, "hook": _Code(tmp_path / "ran")}
    if by == "torch":
        torch.save(content, tmp_path / "evil.pth")
    else:
        (tmp_path / "evil.pth").write_bytes(pickle.dumps(_Code(tmp_path / "ran")))
    with pytest.raises(FlawmaskError, match=r"evil\.pth is not a file of weights") as caught:
        from_file(tmp_path / "evil.pth", "maskrcnn_resnet18_fpn")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def _write_bad_file(kind: str, path: Path) -> None:
    good = io.BytesIO()
    torch.save({"rpn.weight": torch.ones(1000)}, good)
    if kind == "text":
        path.write_text("not weights")
    elif kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "other zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("letter.txt", "dear reader")
    elif kind == "truncated":
        path.write_bytes(good.getvalue()[: len(good.getvalue()) // 2])
    elif kind == "image":
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))


@pytest.mark.parametrize("kind", ["text", "empty", "folder", "other zip", "truncated", "image", "missing"])
def test_a_file_that_holds_no_weights_is_refused_in_one_line_that_names_it(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "weights.pth"
    _write_bad_file(kind, path)
    for read in (lambda: load_file(path), lambda: pretrained("maskrcnn_resnet18_fpn", str(path))):
        with pytest.raises(FlawmaskError, match=r"weights\.pth") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_a_misspelt_choice_of_weights_is_told_what_there_is() -> None:
    with pytest.raises(FlawmaskError, match=r"--weights coca: no such file; give coco, imagenet, none or"):
        pretrained("maskrcnn_resnet50_fpn", "coca")


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1, 2], {"model_state_dict": {"a": 1}}, torch.ones(3)])
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(FlawmaskError, match=r"other\.pth holds no state dict"):
        from_file(tmp_path / "other.pth", "maskrcnn_resnet18_fpn")


# What others have published, in files that are like theirs but for the numbers.


def shaken(state: State) -> State:
    """The same tensors, the norms' being anything but neutral, and their variances so small that epsilons show."""
    new = {name: tensor.clone() for name, tensor in state.items()}
    for name in [name for name in new if name.endswith("running_var")]:
        norm = name.removesuffix("running_var")
        new[name] = torch.empty_like(new[name]).uniform_(1e-4, 1e-3)
        new[f"{norm}running_mean"].normal_(std=0.1)
        new[f"{norm}weight"] = new[name].sqrt()
        new[f"{norm}bias"].normal_(std=0.1)
    return new


def as_published(state: State) -> State:
    """The tensors under the names that torchvision's old files have."""
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


def in_hub(hub: Path, weights_entry: Any, state: State) -> None:
    hub.mkdir(parents=True)
    torch.save(state, hub / weights_entry.url.rsplit("/", 1)[1])


@pytest.fixture
def quick_vgg(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the seconds in which VGG's classifier is drawn, of which SSD uses nothing."""

    def features(**_: Any) -> Any:
        return SimpleNamespace(features=make_layers(cfgs["D"], batch_norm=False))

    monkeypatch.setattr(ssd, "vgg16", features)


def epsilons(model: nn.Module) -> dict[str, float]:
    kinds = (FrozenBatchNorm2d, nn.BatchNorm2d)
    return {name: one.eps for name, one in model.named_modules() if isinstance(one, kinds)}


def outputs(model: Any, image: Tensor) -> list[Tensor]:
    """All that a detector's layers give for an image, its preprocessing included."""
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
        ("ssd300_vgg16", SSD_HEADS, None),
        ("ssdlite320_mobilenet_v3_large", SSDLITE_HEADS, 0.001),
    ],
)
def test_cocos_weights_fill_all_but_the_class_heads_and_give_what_torchvisions_network_gives(
    hub: Path, arch: Arch, class_heads: set[str], eps: float | None
) -> None:
    torch.manual_seed(4)
    weights_entry = published.COCO[arch]
    state = shaken(get_model(arch, weights=None, weights_backbone=None, num_classes=91).state_dict())
    in_hub(hub, weights_entry, as_published(state))
    given = pretrained(arch, "coco")
    assert (given.norm, given.source) == ("frozen", "COCO weights")

    few = detector(2, arch, norm=given.norm, norm_eps=given.norm_eps)
    drawn = {name: few.state_dict()[name].clone() for name in class_heads}
    filled, left = load_matching(few, given)
    loaded = few.state_dict()
    assert {line.split(" ")[0] for line in left} == class_heads
    assert filled == len(loaded) - len(class_heads)
    for name, tensor in loaded.items():
        assert torch.equal(tensor, drawn[name] if name in class_heads else state[name]), name

    sizes: Any = {} if arch in FIXED_SIZES else {"min_size": 96, "max_size": 160}
    theirs = get_model(arch, weights=weights_entry, **sizes)
    ours = detector(90, arch, norm=given.norm, norm_eps=given.norm_eps, image_size=FIXED_SIZES.get(arch, 96))
    assert load_matching(ours, given)[1] == []
    assert epsilons(ours) == epsilons(theirs)
    assert set(epsilons(ours).values()) == (set() if eps is None else {eps})
    with torch.inference_mode():
        image = torch.rand(3, 90, 120)
        pairs = list(zip(outputs(ours, image), outputs(theirs, image), strict=True))
    assert len(pairs) > 4
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.usefixtures("quick_vgg")
def test_vggs_features_go_into_ssd_up_to_the_last_convolution(hub: Path) -> None:
    torch.manual_seed(5)
    features = make_layers(cfgs["D"], batch_norm=False)
    state = {f"features.{name}": tensor for name, tensor in features.state_dict().items()}
    nothing = {"classifier.0.weight": torch.full((2, 2), torch.nan)}  # as in the published file
    in_hub(hub, published.IMAGENET["ssd300_vgg16"], state | nothing)
    model = detector(arch="ssd300_vgg16")
    filled, left = load_matching(model, pretrained("ssd300_vgg16", "imagenet"))
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


def test_ssdlite_takes_of_mobilenet_what_its_narrow_tail_lets_it_and_the_rest_still_sees_the_image(hub: Path) -> None:
    torch.manual_seed(6)
    arch: Arch = "ssdlite320_mobilenet_v3_large"
    classifier_ = mobilenet_v3_large(weights=None)
    classifier_.load_state_dict(shaken(classifier_.state_dict()))
    in_hub(hub, published.IMAGENET[arch], classifier_.state_dict())
    given = pretrained(arch, "imagenet")
    assert given.norm == "frozen"
    spec = ModelSpec(arch, ("a", "b"), image_size=320, norm=given.norm, norm_eps=given.norm_eps)
    model = build(spec)
    filled, left = load_matching(model, given)
    own = {
        name
        for name in model.state_dict()
        if name.startswith(("backbone.features.0.", "backbone.features.1.0.1", "backbone.features.1.0.2"))
    }
    assert filled == len(own)
    assert not own & {line.split(" ")[0].rstrip(":") for line in left}

    model = start(TrainSettings(arch=arch), spec, given, torch.device("cpu"), torch.float32, is_pretrained=True)
    assert all(torch.equal(model.state_dict()[name], given.state[name]) for name in own)
    body = classifier_.features.eval()
    with torch.inference_mode():
        image = torch.randn(1, 3, 320, 320)
        levels = list(model.backbone(image).values())
        torch.testing.assert_close(levels[0], body[13].block[0](body[:13](image)), rtol=1e-3, atol=1e-3)
    assert all(0.01 < float(level.std() / levels[0].std()) < 10 for level in levels)


def test_ssdlite_learns_from_nothing_with_a_norm_that_one_image_is_enough_for() -> None:
    nothing = Pretrained({}, "group", None, "")
    assert _norm(TrainSettings(arch="ssdlite320_mobilenet_v3_large"), nothing, at_once=4) == "group"
    assert _norm(TrainSettings(arch="ssd300_vgg16"), nothing, at_once=4) == "batch"


# YOLO's files, which hold an object.


@cache
def ultralytics_network(arch: Arch) -> Any:
    """A network as ultralytics writes it: in half precision, of COCO's classes."""
    torch.manual_seed(7)
    tasks = yolo._tasks()
    kind = tasks.SegmentationModel if arch.endswith("-seg") else tasks.DetectionModel
    model = kind(f"{arch}.yaml", ch=3, nc=80, verbose=False)
    state = model.state_dict()
    model.load_state_dict({**shaken(state), **{name: state[name] for name in state if ".dfl." in name}})
    model.args, model.criterion, model.task = {"imgsz": 640, "box": 7.5}, None, "segment"
    return model.half().eval()


def ultralytics_file(path: Path, arch: Arch = "yolo11n", **content: Any) -> Any:
    """Write what ultralytics writes, with anything else, and return the network that is in it."""
    from ultralytics.utils import IterableSimpleNamespace

    model = ultralytics_network(arch)
    path.parent.mkdir(parents=True, exist_ok=True)
    notes = {
        "train_args": IterableSimpleNamespace(save_dir=Path("runs")),
        "train_metrics": {"fitness": np.float64(0.5)},
    }
    torch.save({"epoch": -1, "forward": model.model[-1].forward, "model": model, "ema": None, **notes, **content}, path)
    return model


@pytest.mark.parametrize("arch", ["yolo11n", "yolo11n-seg", "yolo11s", "yolo11s-seg"])
def test_yolos_file_gives_a_state_dict_with_which_the_network_gives_what_ultralytics_gives(
    hub: Path, arch: Arch
) -> None:
    theirs = ultralytics_file(hub / f"{arch}.pt", arch)
    given = pretrained(arch, "coco")
    assert (given.norm, given.norm_eps, given.source) == ("frozen", None, "COCO weights")
    assert list(given.state) == list(theirs.state_dict())
    assert {tensor.dtype for tensor in given.state.values()} == {torch.float32, torch.int64}

    few = detector(3, arch)
    filled, left = load_matching(few, given)
    # Ultralytics makes the branch of the classes as wide as their number asks for, in the smaller network.
    drawn = re.compile(
        r"model\.23\.cv3\.\d\.(2|0\.1|1\.[01])\." if arch.startswith("yolo11n") else r"model\.23\.cv3\.\d\.2\."
    )
    own = few.state_dict()
    assert {line.split(" ")[0] for line in left} == {name for name in own if drawn.match(name)}
    assert filled == len(own) - len(left)

    ours = detector(80, arch).eval()
    assert load_matching(ours, given)[1] == []
    assert set(epsilons(ours).values()) == {0.001}
    expected = detector(80, arch, norm="batch").eval()
    expected.load_state_dict(theirs.state_dict())
    with torch.inference_mode():
        image = torch.rand(1, 3, 64, 96)
        pairs = zip(tree_leaves(ours(image)), tree_leaves(expected(image)), strict=True)
        for one, other in pairs:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_yolos_file_is_fetched_from_ultralytics_address_and_kept_in_torchs_cache(
    served: tuple[Path, str], hub: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    known = {arch: file.url for arch, file in published.ELSEWHERE.items() if arch.startswith("yolo")}
    assert set(known) == {arch for arch in get_args(Arch) if arch.startswith("yolo")}
    assert all(url.startswith("https://github.com/ultralytics/assets/releases/download/") for url in known.values())
    folder, address = served
    ultralytics_file(folder / "yolo11n.pt")
    for arch in known:
        monkeypatch.setitem(published.ELSEWHERE, arch, published.Elsewhere(f"{address}/{arch}.pt"))
    with caplog.at_level("INFO"):
        pretrained("yolo11n", "coco")
    assert f"downloading {address}/yolo11n.pt" in caplog.text
    assert (hub / "yolo11n.pt").read_bytes() == (folder / "yolo11n.pt").read_bytes()
    (folder / "yolo11n.pt").unlink()
    pretrained("yolo11n", "coco")  # from the cache now
    with pytest.raises(FlawmaskError, match=r"yolo11s\.pt cannot be fetched .*put yolo11s\.pt into .*--weights none"):
        pretrained("yolo11s", "coco")
    assert [path.name for path in hub.iterdir()] == ["yolo11n.pt"]


def test_rfdetrs_file_is_checked_and_loads_with_the_settings_that_it_was_trained_with(
    served: tuple[Path, str], hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = served
    tensor = torch.rand(3, 3)
    torch.save({"model": {"backbone.0.level": tensor}, "args": argparse.Namespace(lr=1e-4)}, folder / "nano.pth")
    md5 = hashlib.md5((folder / "nano.pth").read_bytes()).hexdigest()
    file = published.Elsewhere(f"{address}/nano.pth", md5)
    monkeypatch.setitem(published.ELSEWHERE, "rfdetr_seg_nano", file)
    given = pretrained("rfdetr_seg_nano", "coco")
    assert list(given.state) == ["backbone.0.level"]
    assert torch.equal(given.state["backbone.0.level"], tensor)
    monkeypatch.setitem(published.ELSEWHERE, "rfdetr_seg_nano", replace(file, md5=md5[::-1]))
    with pytest.raises(FlawmaskError, match=r"nano\.pth is not the file that was published.*delete it"):
        pretrained("rfdetr_seg_nano", "coco")


def test_there_are_no_imagenet_weights_for_yolo() -> None:
    with pytest.raises(FlawmaskError, match="no ImageNet weights for yolo11n-seg; give coco, none or"):
        pretrained("yolo11n-seg", "imagenet")


def test_a_users_file_may_be_ultralytics_a_state_dict_or_flawmasks_own(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    expected = {name: tensor.float() for name, tensor in ultralytics_file(path).state_dict().items()}

    def check(source: str) -> None:
        given = pretrained("yolo11n", str(path))
        assert given.norm == "frozen", source
        assert all(torch.equal(given.state[name].float(), tensor) for name, tensor in expected.items()), source

    check("ultralytics', stripped")
    ultralytics_file(path, model=None, ema=ultralytics_network("yolo11n"), epoch=3)
    check("ultralytics', in training")
    torch.save(ultralytics_network("yolo11n"), path)
    check("the object alone")
    torch.save(ultralytics_network("yolo11n").state_dict(), path)
    check("a state dict")
    model = detector(80, "yolo11n", norm="batch")
    model.load_state_dict(expected)
    checkpoint.save(path, model, model.flawmask)
    check("a checkpoint")


class _System:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


class _Constructs:
    """A network that ultralytics would build from a description whose activation it evaluates."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        layers: list[Any] = [[-1, 1, "Conv", [8, 3, 2]]]
        description = {"nc": 1, "activation": f"open({str(self.path)!r}, 'w')", "backbone": layers, "head": []}
        return yolo._tasks().DetectionModel, (description,)


@pytest.mark.parametrize(("code", "says"), [(_System, r"names \w+\.system"), (_Constructs, "not put together")])
def test_code_in_a_yolo_file_does_not_run(hub: Path, tmp_path: Path, code: Any, says: str) -> None:
    ultralytics_file(hub / "yolo11n.pt", ema=code(tmp_path / "ran"))
    with pytest.raises(FlawmaskError, match=says) as caught:
        pretrained("yolo11n", "coco")
    assert str(hub / "yolo11n.pt") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_class_that_is_not_known_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = ModuleType("models.yolo")
    old.Model = type("Model", (), {"__module__": "models.yolo"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "models", ModuleType("models"))
    monkeypatch.setitem(sys.modules, "models.yolo", old)
    torch.save({"model": old.Model()}, tmp_path / "yolov5.pt")
    with pytest.raises(
        FlawmaskError, match=r"yolov5\.pt is not a file of weights: it names models\.yolo\.Model,.*state_dict"
    ):
        pretrained("yolo11n", str(tmp_path / "yolov5.pt"))


@pytest.mark.parametrize("damage", ["cut", "bit", "page", "empty"])
def test_a_damaged_yolo_file_in_the_cache_is_named_with_what_to_do(hub: Path, damage: str) -> None:
    path = hub / "yolo11n.pt"
    ultralytics_file(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {"cut": bytes(content[:-1000]), "bit": bytes(content), "page": b"<html>Sign in</html>", "empty": b""}
    path.write_bytes(damaged[damage])
    with pytest.raises(
        FlawmaskError, match=r"yolo11n\.pt is not a file of weights, or is damaged .*: delete it"
    ) as caught:
        pretrained("yolo11n", "coco")
    assert "\n" not in str(caught.value)


def test_a_network_of_another_kind_of_object_fits_nothing(tmp_path: Path) -> None:
    ultralytics_file(tmp_path / "yolo11n.pt")
    with pytest.raises(FlawmaskError, match=r"yolo11n\.pt: not one tensor fits MaskRCNN; is it another architecture"):
        load_matching(detector(), pretrained("maskrcnn_resnet18_fpn", str(tmp_path / "yolo11n.pt")))
