"""Data sets that a run refuses before training: they cannot be evaluated, or the metrics would be too good."""

from pathlib import Path

import pytest
from stained_plates import make_dataset

from flawmask.errors import FlawmaskError
from flawmask.files import read_json, write_json
from flawmask.stages import RunConfig, check_evaluation


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A data set with parts 0 to 3 in train, 4 and 5 in val, and 0 and 4 again in test."""
    folder = make_dataset(tmp_path / "data", training=4, validation=2)
    make_dataset(tmp_path / "more", training=2)
    (tmp_path / "more" / "train").rename(folder / "test")
    for split, parts in {"train": (0, 1, 2, 3), "val": (4, 5), "test": (0, 4)}.items():
        content = read_json(folder / split / "annotations.json")
        for image, part in zip(content["images"], parts, strict=True):
            image["group"] = f"part{part}"
        write_json(folder / split / "annotations.json", content)
    return folder


def test_a_part_of_the_training_split_is_not_evaluated_unless_that_is_allowed(dataset: Path) -> None:
    config = RunConfig(dataset_dir=dataset)
    check_evaluation(config, dataset, ["val"])
    with pytest.raises(
        FlawmaskError, match=r"test: 1 of 2 images show parts that another split uses \(for example part"
    ):
        check_evaluation(config, dataset, ["val", "test"])
    check_evaluation(RunConfig(dataset_dir=dataset, allow_leak=True), dataset, ["val", "test"])
    check_evaluation(RunConfig(dataset_dir=dataset, skip_train=True), dataset, ["val", "test"])


def test_a_part_that_chooses_the_epoch_is_not_evaluated_on_the_test_split(dataset: Path) -> None:
    config = RunConfig(dataset_dir=dataset, select_by="f1")
    with pytest.raises(
        FlawmaskError, match=r"test: 2 of 2 images show parts that another split uses \(for example part"
    ):
        check_evaluation(config, dataset, ["val", "test"])
