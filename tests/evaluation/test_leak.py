"""Whether a model has seen the images it is judged on: by what they show, not by their names."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from random_network import patchwork

from flawmask.coco import CocoSplit
from flawmask.errors import FlawmaskError
from flawmask.evaluation.leak import NAME, content_digests, seen_in_training, write_training_images
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
    write_training_images(content_digests(make(tmp_path / "train", {"a.png": 1, "b.png": 2, "c.png": 3})), tmp_path)
    return tmp_path / "best.pt"


def seen(split: CocoSplit, model: Path, *, allow: bool = False) -> list[str] | None:
    return seen_in_training(split, content_digests(split), model, allow=allow)


def test_other_pictures_under_the_same_names_are_no_leak(model: Path, tmp_path: Path) -> None:
    assert seen(make(tmp_path / "val", {"a.png": 4, "b.png": 5}), model) == []


def test_the_same_picture_in_another_file_is_a_leak(model: Path, tmp_path: Path) -> None:
    split = make(tmp_path / "val", {"x.png": 2, "y.png": 9})
    Image.fromarray(patchwork(40, 30, 2)).save(tmp_path / "val" / "images" / "x.png", compress_level=1, dpi=(72, 72))
    with pytest.raises(FlawmaskError, match=r"1 of 2 images were trained on \(x\.png was b\.png\).*--allow_leak"):
        seen(split, model)
    assert seen(split, model, allow=True) == ["x.png"]


def test_a_picture_of_another_shape_with_the_same_bytes_is_no_leak(model: Path, tmp_path: Path) -> None:
    split = make(tmp_path / "val", {"x.png": 1})
    write_png(tmp_path / "val" / "images" / "x.png", patchwork(40, 30, 1).reshape(30, 40, 3))
    assert seen(split, model) == []


def test_a_model_from_elsewhere_is_not_known(tmp_path: Path) -> None:
    assert seen(make(tmp_path / "val", {"a.png": 1}), tmp_path / "best.pt") is None


@pytest.mark.parametrize("content", ["[]", '{"sha256_of_pixels": 3}', "{}"])
def test_a_damaged_list_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / NAME).write_text(content)
    with pytest.raises(FlawmaskError, match="is damaged"):
        seen(make(tmp_path / "val", {"a.png": 1}), tmp_path / "best.pt")


def test_the_list_is_written_by_name(model: Path) -> None:
    listed = json.loads(model.with_name(NAME).read_text())["sha256_of_pixels"]
    assert sorted(listed) == ["a.png", "b.png", "c.png"]
    assert len(set(listed.values())) == 3
    assert np.all([len(digest) == 64 for digest in listed.values()])
