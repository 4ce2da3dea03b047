"""Whether a model was trained on the images that it is evaluated on: by their content, not by their names."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from random_network import patchwork

from flawmask.coco import CocoSplit
from flawmask.errors import FlawmaskError
from flawmask.evaluation.evaluate import notes
from flawmask.evaluation.leak import NAME, Leak, content_digests, seen_in_training, write_training_images
from flawmask.files import write_json
from flawmask.images import write_png


def make(folder: Path, seeds: dict[str, int]) -> CocoSplit:
    images: list[dict[str, Any]] = []
    for number, (name, seed) in enumerate(seeds.items(), start=1):
        write_png(folder / "images" / name, patchwork(40, 30, seed))
        images.append({"id": number, "file_name": name, "width": 30, "height": 40})
    return CocoSplit(folder, tuple(images), {image["id"]: () for image in images}, ({"id": 1, "name": "good"},))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A run that was trained on the pictures 1, 2 and 3."""
    split = make(tmp_path / "train", {"a.png": 1, "b.png": 2, "c.png": 3})
    write_training_images(split, content_digests(split), tmp_path)
    return tmp_path / "best.pt"


def seen(split: CocoSplit, model: Path, *, allow: bool = False) -> Leak | None:
    return seen_in_training(split, content_digests(split), model, allow=allow)


def test_other_pictures_under_the_same_names_are_no_leak(model: Path, tmp_path: Path) -> None:
    assert seen(make(tmp_path / "val", {"a.png": 4, "b.png": 5}), model) == Leak([], [])


def test_the_same_picture_in_another_file_is_a_leak(model: Path, tmp_path: Path) -> None:
    split = make(tmp_path / "val", {"x.png": 2, "y.png": 9})
    Image.fromarray(patchwork(40, 30, 2)).save(tmp_path / "val" / "images" / "x.png", compress_level=1, dpi=(72, 72))
    with pytest.raises(FlawmaskError, match=r"1 of 2 images were used for training \(x\.png was b\.png\)"):
        seen(split, model)
    assert seen(split, model, allow=True) == Leak(["x.png"], [])


def test_a_picture_of_another_shape_with_the_same_bytes_is_no_leak(model: Path, tmp_path: Path) -> None:
    split = make(tmp_path / "val", {"x.png": 1})
    write_png(tmp_path / "val" / "images" / "x.png", patchwork(40, 30, 1).reshape(30, 40, 3))
    assert seen(split, model) == Leak([], [])


def test_the_training_images_of_a_model_without_a_list_are_unknown(tmp_path: Path) -> None:
    assert seen(make(tmp_path / "val", {"a.png": 1}), tmp_path / "best.pt") is None


@pytest.mark.parametrize(
    "content", ["[]", '{"sha256_of_pixels": 3}', "{}", '{"sha256_of_pixels": {}, "groups": {"names": 3}}']
)
def test_a_damaged_list_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / NAME).write_text(content)
    with pytest.raises(FlawmaskError, match="is damaged"):
        seen(make(tmp_path / "val", {"a.png": 1}), tmp_path / "best.pt")


def test_the_list_has_the_digests_by_file_name(model: Path) -> None:
    listed = json.loads(model.with_name(NAME).read_text())["sha256_of_pixels"]
    assert sorted(listed) == ["a.png", "b.png", "c.png"]
    assert len(set(listed.values())) == 3
    assert np.all([len(digest) == 64 for digest in listed.values()])


# Parts


CATEGORY = {"source": {"category": "tile"}, "settings": {"group_by": "^(tile[0-9]+)"}}


def of_parts(folder: Path, seeds: dict[str, int], info: Any = None, named: bool = True) -> CocoSplit:
    """Return a split whose images are named for their parts, `tile01_a.png`; its records name these if `named`."""
    split = make(folder, seeds)
    if info is not None:
        write_json(folder.parent / "dataset_info.json", {"made_by": "flawmask prepare", **info})
    images = [{**image, "original_file": f"tile/test/good/{image['file_name']}"} for image in split.images]
    if named:
        images = [{**image, "group": image["file_name"].split("_")[0]} for image in images]
    return replace(split, images=tuple(images))


@pytest.fixture
def model_of_tiles(tmp_path: Path) -> Path:
    """A run that was trained on tiles 01 and 02, and on a picture that exists both as 03 and as 04."""
    split = of_parts(tmp_path / "a" / "train", {"tile01_a.png": 1, "tile02_a.png": 2, "tile03_a.png": 3}, CATEGORY)
    split.images[2]["group"] = "tile03 = tile04"
    write_training_images(split, content_digests(split), tmp_path)
    return tmp_path / "best.pt"


def test_another_photograph_of_a_part_that_was_trained_on_is_a_leak(model_of_tiles: Path, tmp_path: Path) -> None:
    split = of_parts(tmp_path / "a" / "val", {"tile02_b.png": 4, "tile05_b.png": 5, "tile04_b.png": 6})
    message = r"show parts that were used for training \(tile02_b\.png shows tile02\): evaluate .* --allow_leak"
    with pytest.raises(FlawmaskError, match=message):
        seen(split, model_of_tiles)
    assert seen(split, model_of_tiles, allow=True) == Leak([], ["tile02_b.png", "tile04_b.png"])
    assert notes(split, model_of_tiles, Leak(["x.png"], ["tile02_b.png"])) == [
        "1 of these 3 images were used for training: the figures are too good.",
        "1 of these 3 images show parts that were used for training: the figures are too good.",
    ]


def test_an_image_that_was_trained_on_itself_is_not_counted_twice(model_of_tiles: Path, tmp_path: Path) -> None:
    split = of_parts(tmp_path / "a" / "val", {"tile02_b.png": 2, "tile01_b.png": 7})
    assert seen(split, model_of_tiles, allow=True) == Leak(["tile02_b.png"], ["tile01_b.png"])


def test_a_part_of_the_same_name_in_another_category_is_another_part(model_of_tiles: Path, tmp_path: Path) -> None:
    other = CATEGORY | {"source": {"category": "plate"}}
    assert seen(of_parts(tmp_path / "b" / "val", {"tile02_b.png": 4}, other), model_of_tiles) == Leak([], [])
    assert seen(of_parts(tmp_path / "c" / "val", {"tile02_b.png": 4}), model_of_tiles) == Leak([], [])


@pytest.mark.parametrize("group_by", ["tile0?([0-9]+)", "(_[a-z])", None])
def test_a_part_is_recognised_in_a_data_set_of_the_category_that_was_divided_differently_or_not(
    model_of_tiles: Path, tmp_path: Path, group_by: str | None
) -> None:
    other = CATEGORY | {"settings": {"group_by": group_by}}
    split = of_parts(tmp_path / "b" / "val", {"tile02_b.png": 4, "tile06_a.png": 5}, other, named=False)
    if group_by is not None:
        split.images[1]["group"] = "tile02"  # a name that means something else there
    assert seen(split, model_of_tiles, allow=True) == Leak([], ["tile02_b.png"])


def test_augmented_training_images_belong_to_the_category_of_their_originals(tmp_path: Path) -> None:
    variants = {"made_by": "flawmask augment", "source": {"dataset": "a"}, "settings": {}, "source_info": CATEGORY}
    split = of_parts(tmp_path / "a_augmented" / "train", {"tile01_a.png": 1}, variants)
    write_training_images(split, content_digests(split), tmp_path)
    evaluated = of_parts(tmp_path / "a" / "val", {"tile01_b.png": 2}, CATEGORY)
    assert seen(evaluated, tmp_path / "best.pt", allow=True) == Leak([], ["tile01_b.png"])


@pytest.mark.parametrize("info", [None, {"source": 3}, {"source": {"category": 4}, "settings": []}])
def test_groups_that_a_person_wrote_into_the_records_are_used_as_they_are(tmp_path: Path, info: Any) -> None:
    split = of_parts(tmp_path / "a" / "train", {"tile01_a.png": 1}, info)
    write_training_images(split, content_digests(split), tmp_path)
    evaluated = of_parts(tmp_path / "b" / "val", {"tile01_b.png": 2, "tile02_b.png": 3}, info)
    assert seen(evaluated, tmp_path / "best.pt", allow=True) == Leak([], ["tile01_b.png"])


def test_an_older_runs_list_without_groups_is_used_for_images_only(model: Path, tmp_path: Path) -> None:
    assert "groups" not in json.loads(model.with_name(NAME).read_text())
    assert seen(of_parts(tmp_path / "val", {"tile01_a.png": 7}, CATEGORY), model) == Leak([], [])
