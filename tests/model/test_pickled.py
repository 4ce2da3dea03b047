"""Pickled networks of ultralytics are read without the package and without running their code."""

import os
import re
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves
from weight_files import detector, epsilons, shaken

from flawmask.errors import FlawmaskError
from flawmask.model import checkpoint, yolo, yolo_archs
from flawmask.model.arch import ARCHITECTURES, Arch
from flawmask.model.published import OtherFile
from flawmask.model.weights import load_matching, pretrained


@cache
def ultralytics_network(arch: Arch) -> Any:
    """Return a network as ultralytics saves it: in half precision, with COCO's classes."""
    torch.manual_seed(7)
    tasks = yolo._tasks()
    kind = tasks.SegmentationModel if arch.endswith("-seg") else tasks.DetectionModel
    model = kind(f"{arch}.yaml", ch=3, nc=80, verbose=False)
    state = model.state_dict()
    model.load_state_dict({**shaken(state), **{name: state[name] for name in state if ".dfl." in name}})
    model.args, model.criterion, model.task = {"imgsz": 640, "box": 7.5}, None, "segment"
    return model.half().eval()


def ultralytics_file(path: Path, arch: Arch = "yolo11n", **content: Any) -> Any:
    """Write a file like ultralytics', with further entries, and return its network."""
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
def test_a_yolo_file_gives_a_state_dict_with_ultralytics_outputs(hub: Path, arch: Arch) -> None:
    theirs = ultralytics_file(hub / f"{arch}.pt", arch)
    initial_weights = pretrained(arch, "coco")
    assert (initial_weights.norm, initial_weights.norm_eps, initial_weights.source) == ("frozen", None, "COCO weights")
    assert list(initial_weights.state) == list(theirs.state_dict())
    assert {tensor.dtype for tensor in initial_weights.state.values()} == {torch.float32, torch.int64}

    few = detector(3, arch)
    filled, left = load_matching(few, initial_weights)
    # In the smaller network, ultralytics chooses the width of the class branch by the number of classes.
    drawn = re.compile(
        r"model\.23\.cv3\.\d\.(2|0\.1|1\.[01])\." if arch.startswith("yolo11n") else r"model\.23\.cv3\.\d\.2\."
    )
    own = few.state_dict()
    assert {line.split(" ")[0] for line in left} == {name for name in own if drawn.match(name)}
    assert filled == len(own) - len(left)

    ours = detector(80, arch).eval()
    assert load_matching(ours, initial_weights)[1] == []
    assert set(epsilons(ours).values()) == {0.001}
    expected = detector(80, arch, norm="batch").eval()
    expected.load_state_dict(theirs.state_dict())
    with torch.inference_mode():
        image = torch.rand(1, 3, 64, 96)
        pairs = zip(tree_leaves(ours(image)), tree_leaves(expected(image)), strict=True)
        for one, other in pairs:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_a_yolo_file_is_downloaded_from_ultralytics_into_torchs_cache(
    served: tuple[Path, str], hub: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = "https://github.com/ultralytics/assets/releases/download/"
    assert all(record.coco and record.coco.url.startswith(theirs) for record in yolo_archs.RECORDS)
    folder, address = served
    ultralytics_file(folder / "yolo11n.pt")
    for record in yolo_archs.RECORDS:
        ours = replace(record, coco=OtherFile(f"{address}/{record.name}.pt"))
        monkeypatch.setitem(ARCHITECTURES, record.name, ours)
    with caplog.at_level("INFO"):
        pretrained("yolo11n", "coco")
    assert f"downloading {address}/yolo11n.pt" in caplog.text
    assert (hub / "yolo11n.pt").read_bytes() == (folder / "yolo11n.pt").read_bytes()
    (folder / "yolo11n.pt").unlink()
    pretrained("yolo11n", "coco")  # from the cache now
    with pytest.raises(FlawmaskError, match=r"yolo11s\.pt cannot be fetched .*put yolo11s\.pt into .*--weights none"):
        pretrained("yolo11s", "coco")
    assert [path.name for path in hub.iterdir()] == ["yolo11n.pt"]


def test_there_are_no_imagenet_weights_for_yolo() -> None:
    with pytest.raises(FlawmaskError, match="no ImageNet weights for yolo11n-seg; give coco, none or"):
        pretrained("yolo11n-seg", "imagenet")


def test_a_users_file_may_be_ultralytics_a_state_dict_or_flawmasks_own(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    expected = {name: tensor.float() for name, tensor in ultralytics_file(path).state_dict().items()}

    def check(source: str) -> None:
        initial_weights = pretrained("yolo11n", str(path))
        assert initial_weights.norm == "frozen", source
        assert all(torch.equal(initial_weights.state[name].float(), tensor) for name, tensor in expected.items()), (
            source
        )

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
    """A network whose description has an activation that ultralytics would evaluate as Python."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        layers: list[Any] = [[-1, 1, "Conv", [8, 3, 2]]]
        description = {"nc": 1, "activation": f"open({str(self.path)!r}, 'w')", "backbone": layers, "head": []}
        return yolo._tasks().DetectionModel, (description,)


@pytest.mark.parametrize(("code", "says"), [(_System, r"names \w+\.system"), (_Constructs, "no torch module")])
def test_code_in_a_yolo_file_does_not_run(hub: Path, tmp_path: Path, code: Any, says: str) -> None:
    ultralytics_file(hub / "yolo11n.pt", ema=code(tmp_path / "ran"))
    with pytest.raises(FlawmaskError, match=says) as caught:
        pretrained("yolo11n", "coco")
    assert str(hub / "yolo11n.pt") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_an_unknown_class_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_network_of_another_kind_matches_no_tensor(tmp_path: Path) -> None:
    ultralytics_file(tmp_path / "yolo11n.pt")
    with pytest.raises(FlawmaskError, match=r"yolo11n\.pt: no tensor fits MaskRCNN: give weights"):
        load_matching(detector(), pretrained("maskrcnn_resnet18_fpn", str(tmp_path / "yolo11n.pt")))
