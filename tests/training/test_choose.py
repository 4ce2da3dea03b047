"""`--arch auto`: device, available weights, number of images and time decide the network."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flawmask import runtime
from flawmask.comparison.config import CompareConfig
from flawmask.errors import FlawmaskError, OutOfReachError
from flawmask.model import weights
from flawmask.model.arch import ARCHITECTURES, architecture
from flawmask.model.weights import Pretrained
from flawmask.pipeline import DemoCommand, _demo_settings
from flawmask.stages import RunConfig
from flawmask.training import choose
from flawmask.training.choose import FROM_SCRATCH, LARGE, SMALL, choose_network, choose_networks
from flawmask.training.config import TrainConfig

Place = Callable[..., None]

ARCHITECTURES_WITH_BOXES = tuple(name for name in ARCHITECTURES if not architecture(name).has_masks)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Place:
    """Return a function that says what a machine is like: its device, and whose weights lie there or can be fetched."""

    def make(device: str, there: tuple[str, ...] = (), fetched: tuple[str, ...] = ()) -> None:
        def pretrained(arch: str, choice: str, *, offline: bool = False) -> Pretrained:
            if arch in there or (arch in fetched and not offline):
                return Pretrained({}, "frozen", None, f"weights of {arch}")
            raise OutOfReachError(f"no weights for {arch}")

        monkeypatch.setattr(weights, "pretrained", pretrained)
        monkeypatch.setattr(runtime, "choose_device", lambda _: torch.device(device))

    return make


def settings(**changes: Any) -> RunConfig:
    return RunConfig(category="part", **changes)


@pytest.mark.parametrize(
    ("device", "there", "fetched", "changes", "images", "expected"),
    [
        ("cuda", (LARGE, SMALL), (), {}, 100, LARGE),
        ("cuda", (SMALL,), (LARGE,), {}, 100, LARGE),
        ("cuda", (SMALL,), (LARGE,), {"offline": True}, 100, SMALL),
        ("cuda", (SMALL,), (), {}, 100, SMALL),
        ("cuda", (LARGE, SMALL), (), {"time_budget": "5m"}, 500, LARGE),
        ("cuda", (LARGE, SMALL), (), {"time_budget": "1m"}, 5000, SMALL),
        ("cpu", (LARGE, SMALL), (), {}, 100, SMALL),
        ("cpu", (SMALL,), (LARGE,), {}, 100, SMALL),
        ("cpu", (LARGE,), (), {}, 100, LARGE),
        ("cpu", (), (LARGE,), {}, 100, LARGE),
        ("cpu", (LARGE, SMALL), (), {"time_budget": "20m"}, 200, SMALL),
        ("cpu", (LARGE, SMALL), (), {"time_budget": "10h"}, 100, LARGE),
        ("cpu", (SMALL,), (LARGE,), {"time_budget": "10h"}, 100, SMALL),  # does not download LARGE's weights
        ("cpu", (), (), {"weights": "none"}, 100, FROM_SCRATCH),
        ("cuda", (), (), {"weights": "none"}, 100, LARGE),
    ],
)
def test_device_weights_images_and_time_decide_the_network(
    place: Place,
    caplog: pytest.LogCaptureFixture,
    device: str,
    there: tuple[str, ...],
    fetched: tuple[str, ...],
    changes: dict[str, Any],
    images: int,
    expected: str,
) -> None:
    place(device, there, fetched)
    with caplog.at_level("INFO"):
        found = choose_network(settings(**changes), images)
    assert found == settings(**changes, arch=expected)
    (line,) = caplog.messages
    assert line.startswith(f"network: {expected} from ") and ("GPU" if device == "cuda" else "a CPU") in line


def test_a_named_network_is_kept(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    place("cuda")
    config = settings(arch="yolo11n")
    assert choose_network(config, 100) is config
    assert not caplog.messages


def test_without_weights_for_either_network_the_error_is_about_coco_weights(place: Place) -> None:
    for device in ("cpu", "cuda"):
        place(device)
        with pytest.raises(FlawmaskError, match=f"no weights for {LARGE}"):
            choose_network(settings(), 100)


def test_a_weights_file_needs_a_named_network(tmp_path: Path) -> None:
    (tmp_path / "mine.pth").write_bytes(b"")
    with pytest.raises(FlawmaskError, match=r"mine\.pth is a file: name its network with --arch"):
        settings(weights=str(tmp_path / "mine.pth"))


def test_compare_adds_other_networks_that_have_weights(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    config = CompareConfig(category="part")
    assert config.archs == "auto"
    place("cpu", (SMALL, "yolo11n-seg"))
    with caplog.at_level("INFO"):
        assert choose_networks(config.run_config("auto"), 100) == [SMALL, "yolo11n-seg"]
    assert "ssd300_vgg16 is left out: no weights for ssd300_vgg16" in caplog.messages


def test_the_demo_downloads_nothing_and_starts_from_random_weights_without_a_file(place: Place) -> None:
    place("cpu", (SMALL,), (LARGE,))
    found = _demo_settings(DemoCommand(), 180)
    assert (found.arch, found.weights, found.offline, found.augmentation_factor) == (SMALL, "auto", True, 0)
    place("cpu", fetched=(LARGE, SMALL))
    bare = _demo_settings(DemoCommand(), 180)
    assert (bare.arch, bare.weights, bare.augmentation_factor, bare.image_size) == (FROM_SCRATCH, "none", 1, 160)
    place("cuda", (LARGE, SMALL))
    assert _demo_settings(DemoCommand(), 180).arch == LARGE
    assert _demo_settings(DemoCommand(arch="yolo11n"), 180).arch == "yolo11n"


def test_auto_is_the_default_of_the_pipeline_only() -> None:
    assert (settings().arch, settings().weights) == ("auto", "auto")
    train = TrainConfig(dataset_dir=Path("a"), output_dir=Path("b"))
    assert (train.arch, train.weights) == (LARGE, "auto")
    with pytest.raises(ValueError, match="no network has been chosen"):
        _ = settings().network
    assert {LARGE, SMALL, FROM_SCRATCH, *choose.ALSO_COMPARED} <= ARCHITECTURES.keys()
    assert architecture(SMALL).has_masks


@pytest.mark.parametrize(
    ("device", "weights", "expected"),
    [
        ("cuda", "auto", "fasterrcnn_resnet50_fpn"),
        ("cpu", "auto", "fasterrcnn_efficientnet_lite0_fpn"),
        ("cpu", "none", "fasterrcnn_mobilenet_v3_large_fpn"),
    ],
)
def test_for_a_data_set_of_boxes_a_network_for_boxes_is_chosen(
    place: Place, device: str, weights: str, expected: str
) -> None:
    place(device, there=ARCHITECTURES_WITH_BOXES, fetched=("ssd300_vgg16", "yolo11n-seg"))
    assert choose_network(settings(weights=weights), 100, has_masks=False).arch == expected
    if weights == "auto":
        assert choose_networks(settings(), 100, has_masks=False) == [expected, "ssd300_vgg16"]
