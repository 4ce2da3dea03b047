"""The settings of `train` check themselves."""

import math
from pathlib import Path
from typing import Any

import pytest
from random_network import ARCHITECTURES
from stained_plates import settings

from flawmask.errors import FlawmaskError
from flawmask.training.config import seconds_in


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"lr": 0.0},
        {"lr": math.nan},
        {"lr": math.inf},
        {"image_size": 63},
        {"clip_norm": 0.0},
        {"workers": -1},
        {"warmup_steps": -1},
        {"trainable_layers": 6},
        {"anchor_sizes": (0, 1, 2, 3, 4)},
        {"seed": -1},
        {"max_detections": 0},
        {"roi_samples": 0},
        {"patience": 0},
        {"effective_batch_size": 0},
        {"cache_gb": -1.0},
        {"cache_gb": math.nan},
        {"time_budget": "soon"},
        {"save_every": "0"},
        {"save_every": "often"},
        {"save_every": "-3"},
    ],
)
def test_settings_out_of_range_are_refused_by_name(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(FlawmaskError, match=f"--{next(iter(wrong))}"):
        settings(tmp_path, **wrong)


BOXES_ALONE = {
    *("fasterrcnn_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_fpn", "retinanet_resnet50_fpn", "fcos_resnet50_fpn"),
    *(f"fasterrcnn_efficientnet_lite{size}_fpn" for size in range(3)),
    *("ssd300_vgg16", "ssdlite320_mobilenet_v3_large", "yolo11n", "yolo11s"),
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_mask_ap_can_choose_the_epoch_only_if_the_network_has_masks(tmp_path: Path, arch: str) -> None:
    if arch not in BOXES_ALONE:
        assert settings(tmp_path, arch=arch, select_by="segm_ap").select_by == "segm_ap"
        return
    with pytest.raises(
        FlawmaskError, match=f"--select_by segm_ap needs a network that predicts masks, and {arch} does not"
    ):
        settings(tmp_path, arch=arch, select_by="segm_ap")


def test_a_training_without_a_run_to_resume_or_a_data_set_is_refused(tmp_path: Path) -> None:
    for missing in ("dataset_dir", "output_dir"):
        with pytest.raises(FlawmaskError, match="give --dataset_dir and --output_dir, or the run to --resume"):
            settings(tmp_path, **{missing: None})


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("45m", 2700), ("1h30m", 5400), ("90s", 90), ("2700", 2700), (" 2h ", 7200), ("1h1m1s", 3661), ("0h5m", 300)],
)
def test_a_time_is_read_as_people_write_it(text: str, seconds: int) -> None:
    assert seconds_in(text) == seconds


@pytest.mark.parametrize("text", ["", "0m", "abc", "-5m", "5 minutes", "1.5h", "m", "30m1h", "0"])
def test_a_text_that_is_no_time_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(FlawmaskError, match=r"--time_budget is .*: give a time such as 45m, 1h30m or 90s"):
        seconds_in(text)
    with pytest.raises(FlawmaskError, match="--time_budget is"):
        settings(tmp_path, time_budget=text)
