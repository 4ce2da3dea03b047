"""Pretrained weights are downloaded from a local server, read from files, matched by name and shape, or refused."""

import hashlib
import io
import pickle
import socket
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from weight_files import State, classifier, detector

from flawmask.errors import FlawmaskError
from flawmask.model import weights
from flawmask.model.arch import ARCHITECTURES, Arch, architecture
from flawmask.model.build import build
from flawmask.model.published import TorchvisionFile
from flawmask.model.spec import ModelSpec
from flawmask.model.weights import Pretrained, from_file, load_file, load_matching, loaded, pretrained


def publish(monkeypatch: pytest.MonkeyPatch, arch: Arch, choice: str, url: str) -> None:
    """Change the address of an architecture's weights."""
    changed: dict[str, Any] = {choice: TorchvisionFile(url)}
    monkeypatch.setitem(ARCHITECTURES, arch, replace(architecture(arch), **changed))


def put(folder: Path, state: State, *, wrong_hash: bool = False) -> str:
    """Write the state dict to a file whose name contains its hash, like torchvision's."""
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


def test_weights_are_downloaded_checked_and_cached(
    served: tuple[Path, str], hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = served
    name = put(folder, classifier("resnet18"))
    publish(monkeypatch, "maskrcnn_resnet18_fpn", "imagenet", f"{address}/{name}")
    initial_weights = pretrained("maskrcnn_resnet18_fpn", "imagenet")
    assert (hub / name).read_bytes() == (folder / name).read_bytes()
    assert initial_weights.norm == "frozen"
    assert torch.equal(
        initial_weights.state["backbone.body.layer1.0.conv1.weight"], classifier("resnet18")["layer1.0.conv1.weight"]
    )
    (folder / name).unlink()
    again = pretrained("maskrcnn_resnet18_fpn", "imagenet")  # from the cache now
    assert again.state.keys() == initial_weights.state.keys()


def test_without_coco_weights_imagenet_weights_are_used_and_this_is_logged(
    served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, address = served
    url = f"{address}/{put(folder, classifier('resnet18'))}"
    publish(monkeypatch, "maskrcnn_resnet18_fpn", "imagenet", url)
    with caplog.at_level("INFO"):
        initial_weights = pretrained("maskrcnn_resnet18_fpn", "coco")
    assert (initial_weights.source, initial_weights.start) == ("ImageNet weights", "backbone")
    assert pretrained("maskrcnn_resnet18_fpn", "none").start == "nothing"
    assert "no COCO weights for maskrcnn_resnet18_fpn" in caplog.text
    assert f"downloading {url}" in caplog.text


def test_auto_means_coco_weights_if_available_and_otherwise_imagenets(
    served: tuple[Path, str], hub: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, address = served
    arch: Arch = "maskrcnn_resnet50_fpn"
    of_coco = put(folder, build(ModelSpec(arch, ("a",))).state_dict())
    of_imagenet = put(folder, classifier("resnet50"))
    publish(monkeypatch, arch, "coco", f"{address}/{of_coco}")
    publish(monkeypatch, arch, "imagenet", f"{address}/{of_imagenet}")
    with pytest.raises(FlawmaskError, match=rf"{of_coco} cannot be fetched \(--offline\): put .* by hand, .*lite"):
        pretrained(arch, "auto", offline=True)
    assert not hub.exists() or not list(hub.iterdir())
    with caplog.at_level("INFO"):
        assert pretrained(arch, "auto").source == "COCO weights"
    assert f"downloading {address}/{of_coco}" in caplog.text
    (folder / of_coco).unlink()
    assert pretrained(arch, "auto", offline=True).source == "COCO weights"  # from the cache
    (hub / of_coco).unlink()
    assert pretrained(arch, "auto").source == "ImageNet weights"


def test_a_download_whose_hash_differs_from_its_name_is_refused_and_deleted(
    served: tuple[Path, str], hub: Path
) -> None:
    folder, address = served
    name = put(folder, {"layer": torch.ones(2)}, wrong_hash=True)
    with pytest.raises(FlawmaskError, match="hash") as caught:
        weights.download(f"{address}/{name}")
    assert "--weights none" in str(caught.value)
    assert not list(hub.iterdir())


@pytest.mark.parametrize("choice", ["coco", "imagenet"])
def test_without_internet_the_error_names_the_file_the_folder_and_what_to_do(
    hub: Path, monkeypatch: pytest.MonkeyPatch, choice: str
) -> None:
    name = getattr(architecture("maskrcnn_resnet50_fpn"), choice).url.rsplit("/", 1)[1]
    publish(monkeypatch, "maskrcnn_resnet50_fpn", choice, f"{closed_port()}/{name}")
    with pytest.raises(FlawmaskError) as caught:
        pretrained("maskrcnn_resnet50_fpn", choice)
    message = str(caught.value)
    assert "\n" not in message
    assert "cannot be fetched" in message
    assert f"put {name} into {hub}" in message
    assert "--weights none" in message


def test_a_missing_file_is_distinguished_from_a_missing_server(served: tuple[Path, str]) -> None:
    with pytest.raises(FlawmaskError, match=r"cannot be fetched .*not found"):
        weights.download(f"{served[1]}/missing-00000000.pth")


@pytest.mark.parametrize("content", [b"", b"<html>Sign in</html>", b"PK\x03\x04 cut off"])
def test_a_damaged_file_in_the_cache_is_named_with_what_to_do(hub: Path, content: bytes) -> None:
    hub.mkdir(parents=True)
    (hub / "network-00000000.pth").write_bytes(content)
    with pytest.raises(FlawmaskError, match=r"network-00000000\.pth is damaged .*delete it") as caught:
        weights.download(f"{closed_port()}/network-00000000.pth")
    assert "\n" not in str(caught.value)


def test_a_silent_socket_times_out_and_the_old_timeout_is_restored() -> None:
    before = socket.getdefaulttimeout()
    with weights._connection_timeout(7):
        assert socket.getdefaulttimeout() == 7
    assert socket.getdefaulttimeout() == before


def test_none_means_no_weights_and_group_norm() -> None:
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


def test_loaded_tensors_are_summarised_in_a_line_by_parts() -> None:
    model = detector(norm="frozen")
    body = {f"backbone.body.{name}": tensor for name, tensor in model.backbone.body.state_dict().items()}
    classes = {"fc.weight": torch.ones(1), "fc.bias": torch.ones(1)}
    initial_weights = Pretrained(body | classes, "frozen", None, "ImageNet weights")
    drawn = len(model.state_dict()) - len(body)
    assert loaded(model, initial_weights) == (
        f"ImageNet weights: {len(body)} tensors loaded (backbone.body); {drawn} drawn at random (backbone.fpn, rpn, "
        "roi_heads); 2 of the weights not used (fc)"
    )
    whole = Pretrained(model.state_dict(), "frozen", None, "own.pt")
    assert loaded(model, whole) == (
        f"own.pt: {len(body) + drawn} tensors loaded (backbone.body, backbone.fpn, rpn, roi_heads)"
    )


def test_loading_lists_exactly_the_tensors_that_do_not_match(tmp_path: Path) -> None:
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


def test_torchvisions_old_names_are_understood(tmp_path: Path) -> None:
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
    detector(norm="frozen").load_state_dict(dict(old))  # torchvision accepts the old names too
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
    initial_weights = from_file(tmp_path / "file.pth", "maskrcnn_resnet18_fpn")
    assert initial_weights.state.keys() == state.keys()
    assert initial_weights.norm == "frozen"


def test_a_file_without_batch_statistics_needs_group_norm_and_a_checkpoint_keeps_its_epsilon(tmp_path: Path) -> None:
    torch.save({"rpn.weight": torch.ones(1)}, tmp_path / "group.pth")
    assert from_file(tmp_path / "group.pth", "maskrcnn_resnet18_fpn").norm == "group"
    torch.save({"spec": {"norm_eps": 0.0}, "model_state_dict": {"rpn.weight": torch.ones(1)}}, tmp_path / "spec.pth")
    assert from_file(tmp_path / "spec.pth", "maskrcnn_resnet18_fpn").norm_eps == 0.0
    torch.save({"spec": "mine", "model_state_dict": {"rpn.weight": torch.ones(1)}}, tmp_path / "other.pth")
    assert from_file(tmp_path / "other.pth", "maskrcnn_resnet18_fpn").norm_eps is None


def test_weights_without_a_matching_tensor_are_refused() -> None:
    initial_weights = Pretrained({"head.weight": torch.ones(1)}, "group", None, "weights of x.pth")
    with pytest.raises(FlawmaskError, match=r"x\.pth: no tensor fits"):
        load_matching(nn.Linear(2, 2), initial_weights)


class _Code:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("by", ["torch", "pickle"])
def test_a_file_with_code_is_refused_and_the_code_does_not_run(tmp_path: Path, by: str) -> None:
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


def test_a_misspelt_choice_of_weights_is_refused_with_the_choices() -> None:
    with pytest.raises(FlawmaskError, match=r"--weights coca: no such file; give auto, coco, imagenet, none or"):
        pretrained("maskrcnn_resnet50_fpn", "coca")


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1, 2], {"model_state_dict": {"a": 1}}, torch.ones(3)])
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(FlawmaskError, match=r"other\.pth holds no state dict"):
        from_file(tmp_path / "other.pth", "maskrcnn_resnet18_fpn")
