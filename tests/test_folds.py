"""Cross-validation from the outside is tested with the commands; here: what it refuses, and its arithmetic."""

from typing import Any

import pytest

from flawmask.errors import FlawmaskError
from flawmask.folds import spread
from flawmask.pipeline import RunConfig


def test_the_spread_is_that_of_the_folds_that_have_a_value() -> None:
    assert spread([0.5, 0.7, None, 0.9]) == {
        "values": [0.5, 0.7, None, 0.9],
        "mean": pytest.approx(0.7),
        "sd": pytest.approx(0.2),
    }
    assert spread([None, 0.4]) == {"values": [None, 0.4], "mean": 0.4, "sd": None}
    assert spread([None]) == {"values": [None], "mean": None, "sd": None}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"skip_train": True}, "leave out --skip_prepare, --skip_train and --skip_inference"),
        ({"skip_prepare": True}, "leave out --skip_prepare"),
        ({"skip_inference": True}, "leave out --skip_prepare"),
        ({"split": "train"}, "--folds judges every image: no --split"),
        ({"test_ratio": 0.2}, "no --test_ratio"),
        ({"conf": "auto"}, "give --conf a number"),
        ({"category": None, "dataset_dir": "somewhere"}, "cannot start from a --dataset_dir"),
    ],
)
def test_what_does_not_go_with_folds_is_refused_at_once(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(FlawmaskError, match=says):
        RunConfig(**{"category": "bottle", "folds": 5, **settings})
    RunConfig(category="bottle", folds=5, skip_augment=True)
    RunConfig(category="bottle", folds=5, fold=2, conf="auto")
