"""Checkpoints: saved networks load unchanged, and torchvision's state dicts give torchvision's predictions."""

import io
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_network import SPEC, detect, network, patchwork
from torchvision.models.detection import MaskRCNN, maskrcnn_resnet50_fpn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

import flawmask
from flawmask.errors import FlawmaskError
from flawmask.model import checkpoint
from flawmask.model.layers import to_device
from flawmask.model.spec import ModelSpec
from flawmask.prediction import Prediction
from flawmask.tiles import Tiling

pytestmark = pytest.mark.usefixtures("small_network")


def test_a_loaded_network_gives_the_same_predictions(tmp_path: Path) -> None:
    model = network()
    checkpoint.save(tmp_path / "best.pt", model, SPEC)
    loaded, spec = checkpoint.load(tmp_path / "best.pt")
    assert spec == SPEC
    assert not loaded.training
    before = detect(model, SPEC, patchwork(80, 90))
    assert len(before.instances) > 5
    assert detect(loaded, spec, patchwork(80, 90)) == before


def test_the_spec_in_the_file_decides_the_predictions(tmp_path: Path) -> None:
    for other in (replace(SPEC, max_detections=2), replace(SPEC, image_size=96)):
        checkpoint.save(tmp_path / "other.pt", network(), other)
        model, spec = checkpoint.load(tmp_path / "other.pt")
        assert detect(model, spec, patchwork(80, 90)) != detect(network(), SPEC, patchwork(80, 90))


def test_the_file_holds_plain_values_tensors_and_the_facts_given(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "best.pt", network(), SPEC, epoch=7, train_loss=0.25, val_loss=None)
    content = torch.load(tmp_path / "best.pt", weights_only=True)
    assert (content["epoch"], content["train_loss"], content["val_loss"]) == (7, 0.25, None)
    assert content["flawmask"] == flawmask.__version__
    assert content["spec"]["arch"] == SPEC.arch
    assert tuple(content["spec"]["classes"]) == SPEC.classes
    assert content["spec"]["image_size"] == 64
    assert {tensor.dtype for tensor in content["model_state_dict"].values()} == {torch.float32}


def test_a_failed_save_keeps_the_old_file_and_leaves_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "best.pt"
    checkpoint.save(path, network(), SPEC, epoch=1)
    before = path.read_bytes()

    def full_disk(content: Any, file: io.BufferedWriter) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(path, network(), SPEC, epoch=2)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def _lacking(content: dict[str, Any]) -> None:
    del content["model_state_dict"]["rpn.head.cls_logits.bias"]


def _too_many(content: dict[str, Any]) -> None:
    content["model_state_dict"]["extra.weight"] = torch.ones(1)


def _of_another_shape(content: dict[str, Any]) -> None:
    content["model_state_dict"]["rpn.head.cls_logits.bias"] = torch.ones(9)


def _of_another_version(content: dict[str, Any]) -> None:
    content["spec"]["colour"] = "blue"


def _of_another_arch(content: dict[str, Any]) -> None:
    content["spec"]["arch"] = "maskrcnn_swin_fpn"


def _without_spec(content: dict[str, Any]) -> None:
    del content["spec"]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_lacking, r"does not fit maskrcnn_resnet18_fpn: 1 tensors differ, rpn\.head\.cls_logits\.bias"),
        (_too_many, r"1 tensors differ, extra\.weight"),
        (_of_another_shape, r"1 tensors differ, rpn\.head\.cls_logits\.bias"),
        (_of_another_version, "another version of Flawmask"),
        (_of_another_arch, "no architecture maskrcnn_swin_fpn"),
        (_without_spec, r"best\.pt is no checkpoint"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, damage: Callable[[dict[str, Any]], None], says: str
) -> None:
    path = tmp_path / "best.pt"
    checkpoint.save(path, network(), SPEC)
    content = torch.load(path, weights_only=True)
    damage(content)
    torch.save(content, path)
    with pytest.raises(FlawmaskError, match=says) as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_from_before_joining_joins_nothing(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    checkpoint.save(path, network(), replace(SPEC, join="touching"))
    assert checkpoint.load(path)[1].join == "touching"
    content = torch.load(path, weights_only=True)
    del content["spec"]["join"]
    torch.save(content, path)
    assert checkpoint.load(path)[1].join == "off"
    content["spec"]["join"] = "glue"
    torch.save(content, path)
    with pytest.raises(FlawmaskError, match="does not describe a network"):
        checkpoint.load(path)


def test_a_checkpoint_from_before_tiles_sees_images_whole(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    checkpoint.save(path, network(), replace(SPEC, tile=64, overlap=16))
    assert checkpoint.load(path)[1].tiling == Tiling(64, 16)
    content = torch.load(path, weights_only=True)
    for name in ("tile", "overlap", "tile_shift", "tile_from"):
        del content["spec"][name]
    torch.save(content, path)
    assert checkpoint.load(path)[1].tiling is None


def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "whole.pt", network(), SPEC)
    whole = (tmp_path / "whole.pt").read_bytes()
    for name, content in {"cut": whole[:-5000], "text": b"hello", "empty": b"", "png": b"\x89PNG\r\n\x1a\n"}.items():
        path = tmp_path / f"{name}.pt"
        path.write_bytes(content)
        with pytest.raises(FlawmaskError, match=rf"{name}\.pt") as caught:
            checkpoint.load(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(FlawmaskError, match=r"gone\.pt does not exist"):
        checkpoint.load(tmp_path / "gone.pt")


def torchvision_network(frozen: bool) -> Any:
    """Return torchvision's own network with random weights that predict something."""
    torch.manual_seed(5)
    model: Any
    if frozen:  # as torchvision builds it with COCO weights
        norm = partial(FrozenBatchNorm2d, eps=0.0)
        model = MaskRCNN(resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=norm), 3)
    else:
        model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3)
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight *= 10
        model.roi_heads.box_predictor.bbox_pred.weight *= 20
        model.roi_heads.mask_predictor.mask_fcn_logits.weight *= 30
        model.rpn.head.cls_logits.weight *= 20
        for name, tensor in model.backbone.body.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                tensor.uniform_(*((-0.1, 0.1) if name.endswith("mean") else (0.5, 2.0)))
    return to_device(
        model.eval(), torch.device("cpu")
    )  # the memory layout matters: sums in another order have other last digits


def with_torchvisions_pools(model: Any) -> Any:
    """Use torchvision's own RoIAlign. Ours sums in another order, and these weights magnify the difference."""
    for name in ("box_roi_pool", "mask_roi_pool"):
        pool = getattr(model.roi_heads, name)
        plain = MultiScaleRoIAlign(pool.featmap_names, pool.output_size, pool.sampling_ratio)
        setattr(model.roi_heads, name, plain)
    return model


def assert_same(prediction: Prediction, found: dict[str, Any]) -> None:
    order = torch.argsort(found["scores"], descending=True, stable=True)
    ours = prediction.instances
    assert len(ours) == len(order) > 2
    names = {1: "good", 2: "defect"}
    assert [one.label for one in ours] == [names[int(label)] for label in found["labels"][order]]
    assert torch.allclose(torch.tensor([one.score for one in ours]), found["scores"][order], rtol=0, atol=1e-5)
    assert torch.allclose(torch.tensor([one.box for one in ours]), found["boxes"][order], rtol=0, atol=1e-5)
    for one, at in zip(ours, order, strict=True):
        probabilities = found["masks"][at, 0].numpy()
        different = one.mask != (probabilities > 0.5)
        assert (np.abs(probabilities[different] - 0.5) < 1e-5).all()
        assert one.area == one.mask.sum()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("frozen", "size"), [(False, (800, 1050)), pytest.param(True, (900, 800), marks=pytest.mark.services)]
)
def test_a_state_dict_of_torchvision_gives_torchvisions_predictions(
    tmp_path: Path, frozen: bool, size: tuple[int, int]
) -> None:
    theirs = torchvision_network(frozen)
    state = theirs.state_dict()
    assert frozen == (not any(name.endswith("num_batches_tracked") for name in state))
    torch.save({"model_state_dict": state, "epoch": 3, "loss": 0.5}, tmp_path / "model.pt")
    model, spec = checkpoint.load(tmp_path / "model.pt")
    model = to_device(with_torchvisions_pools(model), torch.device("cpu"))
    assert spec.classes == ("good", "defect")
    assert spec.image_size == 800
    # Use the network's own size. Otherwise the two round resized pixels differently, and these weights magnify that.
    height, width = size
    cell = 50
    pixels = np.random.default_rng(int(frozen)).integers(0, 256, (height // cell, width // cell, 3), dtype=np.uint8)
    pixels = pixels.repeat(cell, axis=0).repeat(cell, axis=1)
    assert spec.resized(*pixels.shape[:2]) == pixels.shape[:2]
    with torch.inference_mode():
        (found,) = theirs([torch.from_numpy(pixels).permute(2, 0, 1) / 255])
    prediction = detect(model, spec, pixels)
    assert_same(prediction, found)
    scores = found["scores"][found["labels"] == 2].tolist()
    verdicts = set()
    for conf in (0.05, 0.3, 0.5, 0.9, max(scores) - 1e-4, min(1.0, max(scores) + 1e-4)):
        assert prediction.verdict(conf).is_defect == any(score >= conf for score in scores)
        verdicts.add(prediction.verdict(conf).is_defect)
    assert verdicts == {True, False}


def test_a_bare_state_dict_of_torchvision_is_accepted_with_torchvisions_old_sizes(tmp_path: Path) -> None:
    torch.save(torchvision_network(frozen=False).state_dict(), tmp_path / "plain.pt")
    model, spec = checkpoint.load(tmp_path / "plain.pt")
    assert spec == ModelSpec("maskrcnn_resnet50_fpn", ("good", "defect"), norm="batch")
    assert model.roi_heads.detections_per_img == 100
    assert model.transform.min_size == (800,)
