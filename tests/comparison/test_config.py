"""Which settings `compare` accepts and which it refuses, before anything is trained."""

from pathlib import Path
from typing import Any, get_args

import pytest

from flawmask.comparison.config import CompareConfig
from flawmask.errors import FlawmaskError
from flawmask.model.arch import Arch


def test_an_unknown_model_is_refused_with_a_list_of_the_known_ones() -> None:
    with pytest.raises(FlawmaskError, match="--archs yolo99: there are maskrcnn_resnet50_fpn") as refused:
        CompareConfig(category="bottle", archs="ssd300_vgg16,yolo99")
    assert all(name in str(refused.value) for name in get_args(Arch))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"archs": " , "}, "there are maskrcnn"),
        ({"baselines": "padim"}, "--baselines padim: there are efficientnet_lite0_classifier, patchcore and none"),
        ({"category": "a,b"}, "one category at a time"),
        ({"category": "all"}, "one category at a time"),
        ({"category": None}, "either a --category"),
        ({"dataset_dir": Path("data")}, "either a --category"),
        ({"folds": 3, "fold": 1}, "--fold is for a single training"),
        ({"folds": 3, "conf": "auto"}, "give --conf a number"),
        ({"weights": "none,coco"}, "give one for all, and name=FILE"),
        ({"weights": "none,ssd300_vgg16=nowhere.pth"}, "nowhere.pth: no such file"),
        ({"weights": "none,fcos_resnet50_fpn=none"}, "fcos_resnet50_fpn is not compared"),
        ({"select_by": "segm_ap"}, "ssd300_vgg16 does not"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(FlawmaskError, match=says):
        CompareConfig(**{"category": "bottle", "archs": "ssd300_vgg16", **settings})


def test_a_model_has_its_own_weights_or_else_those_for_all_models(tmp_path: Path) -> None:
    file = tmp_path / "own.pth"
    file.touch()
    config = CompareConfig(
        category="bottle", archs="ssd300_vgg16,fcos_resnet50_fpn", weights=f"none,ssd300_vgg16={file},patchcore={file}"
    )
    assert config.weights_of("fcos_resnet50_fpn") == "none"
    assert config.weights_of("ssd300_vgg16") == config.weights_of("patchcore") == str(file)
    assert CompareConfig(category="bottle").weights_of("patchcore") == "auto"
    run = config.run_config("ssd300_vgg16")
    assert (run.arch, run.weights, run.category) == ("ssd300_vgg16", str(file), "bottle")


def test_a_file_of_weights_needs_named_networks(tmp_path: Path) -> None:
    file = tmp_path / "own.pth"
    file.touch()
    with pytest.raises(FlawmaskError, match=r"own\.pth is a file: give --archs the networks that it is for"):
        CompareConfig(category="bottle", weights=str(file))
    assert CompareConfig(category="bottle", weights=f"auto,patchcore={file}").weights_of("patchcore") == str(file)


def test_the_path_of_a_weights_file_may_contain_a_comma_or_an_equals_sign(tmp_path: Path) -> None:
    file = tmp_path / "lr=0.01,b.pth"
    file.touch()
    assert CompareConfig(category="bottle", archs="ssd300_vgg16", weights=str(file)).weights_of("patchcore") == str(
        file
    )
    other = tmp_path / "lr=0.01.pth"
    other.touch()
    config = CompareConfig(category="bottle", archs="ssd300_vgg16", weights=f"ssd300_vgg16={other}, none")
    assert (config.weights_of("ssd300_vgg16"), config.weights_of("patchcore")) == (str(other), "none")


def test_a_duplicate_name_counts_once_and_none_means_no_baseline() -> None:
    config = CompareConfig(category="bottle", archs="ssd300_vgg16, ssd300_vgg16", baselines="none")
    assert config.arch_names == ("ssd300_vgg16",)
    assert config.baseline_names == ()
