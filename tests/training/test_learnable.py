"""Splits that a training refuses before it writes anything, and its messages about unused labels."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stained_plates import make_dataset, settings

from flawmask.coco import read_split
from flawmask.errors import FlawmaskError, UnusedError
from flawmask.model.arch import Arch
from flawmask.model.targets import make_target
from flawmask.settings import Reading
from flawmask.stages import RunConfig, check_training
from flawmask.training.learnable import check_learnable
from flawmask.training.loop import train

MASKS: Arch = "maskrcnn_resnet18_fpn"
BOXES: Arch = "fasterrcnn_mobilenet_v3_large_fpn"

Change = Callable[[list[dict[str, Any]]], Any]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Four training images and two validation images, with a defect on each."""
    return make_dataset(tmp_path / "data")


def edit(dataset: Path, change: Change, split: str = "train") -> Path:
    path = dataset / split / "annotations.json"
    content = json.loads(path.read_text())
    change(content["annotations"])
    path.write_text(json.dumps(content))
    return dataset


def all_crowds(records: list[dict[str, Any]]) -> None:
    for record in records:
        record["iscrowd"] = 1


def all_boxes(records: list[dict[str, Any]]) -> None:
    for record in records:
        del record["segmentation"]


def test_a_file_with_only_crowds_is_refused_with_advice(dataset: Path) -> None:
    edit(dataset, all_crowds)
    with pytest.raises(FlawmaskError, match=r"all 4 are crowds .* --crowds instances, or export polygons"):
        train(settings(dataset))
    assert not (dataset.parent / "run").exists()
    with pytest.raises(FlawmaskError, match="crowds"):
        check_training(RunConfig(dataset_dir=dataset), dataset, "auto")
    check_training(RunConfig(dataset_dir=dataset, crowds="instances", strict=True), dataset, "auto")


def test_a_defect_category_with_a_good_name_is_refused_with_advice(dataset: Path) -> None:
    path = dataset / "train" / "annotations.json"
    content = json.loads(path.read_text())
    for category in content["categories"]:
        category["name"] = {"defect": "OK"}.get(category["name"], category["name"])
    path.write_text(json.dumps(content))
    with pytest.raises(
        FlawmaskError, match=r"the category OK counts as a defect.* --good_name OK if it is good, or --good_name good"
    ):
        train(settings(dataset))
    assert not (dataset.parent / "run").exists()
    check_learnable(read_split(dataset, "train"), MASKS, "good")
    good = read_split(dataset, "train", Reading(good_name="OK"))
    assert good.class_names == ("good",)
    assert not any(good.is_defective(image) for image in good.images)
    with pytest.raises(FlawmaskError, match="no defect"):
        check_learnable(good, MASKS, "OK")


def test_boxes_without_masks_are_refused_by_mask_networks_and_accepted_by_others(dataset: Path) -> None:
    training = read_split(edit(dataset, all_boxes), "train")
    with pytest.raises(FlawmaskError, match=r"4 defects have a box but no mask .*: draw masks, or train a netw"):
        check_learnable(training, MASKS)
    check_learnable(training, BOXES)
    check_learnable(training, "auto")


def test_a_box_without_mask_is_learned_unchanged(dataset: Path) -> None:
    edit(dataset, lambda records: records[0].update(segmentation=[], bbox=[10.5, 4.25, 20, 8.5]))
    split = read_split(dataset, "train")
    target = make_target(split.annotations[1], split.labels, 1, (72, 72), (144, 144), "1.png")
    assert torch.equal(target["boxes"], torch.tensor([[21.0, 8.5, 61.0, 25.5]]))


def test_a_split_without_a_defect_is_refused(dataset: Path) -> None:
    with pytest.raises(FlawmaskError, match="has no defect annotated: there is nothing to learn"):
        check_learnable(read_split(edit(dataset, list.clear), "train"), MASKS)


def test_unused_annotations_are_logged_and_written_or_refused_with_strict(
    dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit(dataset, lambda records: records[0].update(iscrowd=1))
    edit(dataset, lambda records: records[0].update(segmentation=[[-9, 1, -5, 1, -5, 5]]), "val")
    with pytest.raises(UnusedError, match="4 annotations: 3 used, 1 not used: crowd"):
        train(settings(dataset, strict=True))
    assert not (dataset.parent / "run").exists()
    with caplog.at_level(logging.WARNING):
        done = train(settings(dataset))
    said = [text for text in caplog.messages if "not used" in text]
    assert said == [
        f"{dataset}/train: 4 annotations: 3 used, 1 not used: crowd (1 of 1.png)",
        f"{dataset}/val: 2 annotations: 1 used, 1 not used: outside the image (1 of 1.png)",
    ]
    tally = json.loads((done.run_dir / "config.json").read_text())["tally"]
    assert tally["train"]["annotations"] == {"found": 4, "used": 3, "not_used": {"crowd": ["1 of 1.png"]}}
    assert tally["val"]["annotations"]["not_used"] == {"outside the image": ["1 of 1.png"]}
    assert tally["train"]["images"] == {"found": 4, "used": 4, "not_used": {}}


def test_a_bad_record_can_be_left_out(dataset: Path) -> None:
    edit(dataset, lambda records: records[0].update(segmentation=[[1, 1, 9, 9]]))
    with pytest.raises(FlawmaskError, match="a polygon with 2 points"):
        train(settings(dataset))
    done = train(settings(dataset, on_error="skip"))
    tally = json.loads((done.run_dir / "config.json").read_text())["tally"]["train"]
    assert tally["images"] == {"found": 4, "used": 3, "not_used": {"bad record": ["1.png"]}}
    assert len(json.loads((done.run_dir / "training_images.json").read_text())["sha256_of_pixels"]) == 3
