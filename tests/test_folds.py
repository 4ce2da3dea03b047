"""Cross-validation: refused settings and the spread of metrics. (The tests of the commands run it as a whole.)"""

from pathlib import Path
from typing import Any

import pytest

from flawmask import folds
from flawmask.errors import FlawmaskError
from flawmask.files import write_json
from flawmask.folds import of_all_folds, spread
from flawmask.stages import RunConfig


def test_the_spread_is_over_the_folds_that_have_a_value() -> None:
    assert spread([0.5, 0.7, None, 0.9]) == {
        "values": [0.5, 0.7, None, 0.9],
        "mean": pytest.approx(0.7),
        "sd": pytest.approx(0.2),
    }
    assert spread([None, 0.4]) == {"values": [None, 0.4], "mean": 0.4, "sd": None}
    assert spread([None]) == {"values": [None], "mean": None, "sd": None}


def test_results_of_all_folds_say_only_what_holds_for_each() -> None:
    """`--tile auto` may choose other tiles in each fold, and metrics of older versions have no such key."""
    first = {"tile": 512, "overlap": 64, "join": "touching"}
    other = {"tile": 640, "overlap": 64}
    assert of_all_folds([first, first], ("join", "tile", "overlap")) == first
    assert of_all_folds([first, other], ("join", "tile", "overlap", "tile_from")) == {"overlap": 64}
    assert of_all_folds([other, first], ("join", "tile", "overlap", "tile_from")) == {"overlap": 64}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"skip_train": True}, "leave out --skip_prepare, --skip_train and --skip_inference"),
        ({"skip_prepare": True}, "leave out --skip_prepare"),
        ({"skip_inference": True}, "leave out --skip_prepare"),
        ({"split": "train"}, "--folds evaluates every image: leave out --split"),
        ({"test_ratio": 0.2}, "--test_ratio"),
        ({"conf": "auto"}, "give --conf a number"),
    ],
)
def test_settings_that_do_not_work_with_folds_are_refused_immediately(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(FlawmaskError, match=says):
        RunConfig(**{"category": "bottle", "folds": 5, **settings})
    RunConfig(category="bottle", folds=5, skip_augment=True)
    RunConfig(category="bottle", folds=5, fold=2, conf="auto")


def test_folds_that_were_split_in_different_ways_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image could be in two folds, or in none."""
    monkeypatch.setattr(folds, "prepare_dataset", lambda config, _: tmp_path / str(config.fold))
    config = RunConfig(category="bottle", folds=2)
    ways: list[tuple[dict[str, str], dict[str, str]]] = [({}, {}), ({"split_method": "shuffle"},) * 2]
    for fold, info in [(fold, info) for way in ways for fold, info in enumerate(way, start=1)]:
        write_json(tmp_path / str(fold) / "dataset_info.json", info)
        if fold == 2:
            assert folds.prepared_folds(config, "bottle") == [tmp_path / "1", tmp_path / "2"]
    write_json(tmp_path / "2" / "dataset_info.json", {})
    with pytest.raises(FlawmaskError, match="divided by different versions of Flawmask"):
        folds.prepared_folds(config, "bottle")
