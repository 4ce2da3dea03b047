"""Each kind of network goes through a whole training: it is saved, resumed after an interruption, and predicts."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from stained_plates import make_dataset, part, same_weights, settings
from torch import Tensor
from toy_network import TOY

from flawmask.comparison.config import CompareConfig
from flawmask.errors import FlawmaskError
from flawmask.inference.predictor import Predictor
from flawmask.model import checkpoint, yolo
from flawmask.model.arch import ARCHITECTURES, Arch
from flawmask.model.weights import pretrained
from flawmask.training.config import TrainConfig, TrainSettings
from flawmask.training.loop import train

KINDS: tuple[Arch, ...] = (
    "fasterrcnn_mobilenet_v3_large_fpn",
    "ssdlite320_mobilenet_v3_large",
    "yolo11n",
    "yolo11n-seg",
)
"""The smallest network of each kind. Mask R-CNN has its own tests, and SSDlite represents the one-stage detectors."""


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Two training images and one validation image."""
    return make_dataset(tmp_path / "data", training=2, validation=1)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add a network of a user's own kind, which is one module."""
    monkeypatch.setitem(ARCHITECTURES, TOY.name, TOY)


@pytest.mark.usefixtures("drawn", "toy")
@pytest.mark.parametrize("arch", [*KINDS, TOY.name])
def test_a_training_writes_the_kinds_own_losses_and_its_model_predicts(dataset: Path, arch: Arch) -> None:
    done = train(settings(dataset, arch=arch, select_by="f1"))
    _, spec = checkpoint.load(done.run_dir / "best.pt")
    assert spec.arch == arch
    names = spec.architecture.loss_names
    assert all(math.isfinite(done.history[name][0]) for name in names)
    assert done.history["train_loss"][0] == pytest.approx(sum(done.history[name][0] for name in names), rel=1e-5)
    assert done.history["val_loss"][0] > 0
    assert (done.history["segm_ap"][0] is None) == (not spec.has_masks)
    for picture in ("train_batch.jpg", "labels.png", "curves.png"):
        assert (done.run_dir / picture).stat().st_size > 1000
    prediction = Predictor(done.run_dir / "last.pt", "cpu", score_floor=0.0)(part(7)[0])
    assert prediction.has_masks == spec.has_masks


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("asked", [{"weights": "imagenet"}, {"compile": "on"}, {"select_by": "segm_ap"}])
def test_settings_that_a_users_network_does_not_support_are_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(FlawmaskError, match="toy"):
        TrainSettings(**{"arch": TOY.name, **asked})


@pytest.mark.usefixtures("toy")
def test_a_users_network_can_be_compared_without_published_weights() -> None:
    assert CompareConfig(category="bottle", archs="toy,yolo11n", weights="none").arch_names == ("toy", "yolo11n")
    with pytest.raises(FlawmaskError, match="there are no ImageNet weights for toy; give none or a file's path"):
        pretrained(TOY.name, "coco")


class PowerCutError(Exception):
    """Simulates a power cut."""


def test_an_interrupted_training_of_yolo_ends_with_the_same_weights(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(dataset, arch="yolo11n-seg", epochs=2, batch_size=1, save_every="1", ema=True)
    whole = train(config)
    kept = whole.run_dir.rename(dataset.parent / "whole")
    losses, steps = yolo.losses, 0

    def cut(*inputs: Any) -> dict[str, Tensor]:
        nonlocal steps
        steps += torch.is_grad_enabled()  # without the steps of the validation
        if steps == 4:  # the second step of the second epoch
            raise PowerCutError
        return losses(*inputs)

    with monkeypatch.context() as context:
        context.setattr(yolo, "losses", cut)
        with pytest.raises(PowerCutError):
            train(config)
    done = train(TrainConfig(resume=dataset.parent / "run"))
    assert same_weights(done.run_dir / "last.pt", kept / "last.pt")
    for name in ("train_loss", "val_loss"):
        assert done.history[name] == pytest.approx(whole.history[name])
