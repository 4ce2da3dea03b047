"""Predictions for labelling tools: reading them back gives the same masks, within the tolerance."""

import json
from pathlib import Path
from typing import Any, get_args
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import draw_image
from random_network import SPEC, network

from flawmask.coco import Record
from flawmask.coco_files import split_names
from flawmask.data.import_labels import ImportConfig, import_labels
from flawmask.errors import FlawmaskError
from flawmask.files import read_json
from flawmask.inference.config import PredictConfig
from flawmask.inference.preannotations import Tool, simplified, write
from flawmask.inference.predict import predict
from flawmask.masks import Mask, box_of, decode, to_polygons, to_rle
from flawmask.model import checkpoint

HEIGHT, WIDTH = 48, 64
CLASSES = ("good", "dent", "scratch")

ROWS, COLUMNS = np.mgrid[:HEIGHT, :WIDTH]
DISC: Mask = (ROWS - 20) ** 2 + (COLUMNS - 24) ** 2 < 100
RING: Mask = DISC & ((ROWS - 20) ** 2 + (COLUMNS - 24) ** 2 > 16)
PIECES: Mask = (DISC & (COLUMNS < 22)) | (DISC & (COLUMNS > 26))
SCRATCH: Mask = (ROWS == 40) & (COLUMNS > 5) & (COLUMNS < 50)


def instance(mask: Mask, label: str, *, outlined: bool = True) -> Record:
    segmentation = to_rle(mask) if outlined else None
    box = [float(side) for side in box_of(mask)]
    return {"class": label, "score": 0.75, "box": box, "area": int(mask.sum()), "segmentation": segmentation}


def record(name: str, *instances: Record) -> Record:
    return {"file": name, "width": WIDTH, "height": HEIGHT, "score": 0.75, "instances": list(instances)}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with the images a to d."""
    for seed, name in enumerate("abcd"):
        draw_image(tmp_path / "images" / f"{name}.png", seed, (HEIGHT, WIDTH))
    return tmp_path / "images"


def read_back(images: Path, found: list[Record], tool: Tool, tolerance: float, **given: Any) -> dict[str, list[Any]]:
    """The class and mask of each imported annotation, by the name of its image."""
    path = write(images.parent, tool, [*found, {"file": "e.png", "error": "cannot be read"}], CLASSES, tolerance)
    if tool == "labelstudio":  # where somebody has accepted what was predicted
        path.write_text(path.read_text().replace('"predictions"', '"annotations"'))
    out = images.parent / "out"
    import_labels(ImportConfig(source=path, image_dir=images, output_dir=out, **given))
    masks: dict[str, list[Any]] = {}
    for split in split_names(out):
        content = read_json(out / split / "annotations.json")
        names = {one["id"]: one["name"] for one in content["categories"]}
        files = {one["id"]: one["file_name"] for one in content["images"]}
        for one in content["annotations"]:
            outline = decode(one["segmentation"], HEIGHT, WIDTH) if one["segmentation"] else one["bbox"]
            masks.setdefault(files[one["image_id"]], []).append((names[one["category_id"]], outline))
    return masks


@pytest.mark.parametrize("tool", get_args(Tool))
def test_without_tolerance_masks_are_read_back_exactly(images: Path, tool: Tool) -> None:
    found = [
        record("in/a.png", instance(DISC, "dent"), instance(SCRATCH, "scratch")),
        record("in/b.png", instance(RING, "dent")),
        record("in/c.png", instance(SCRATCH, "scratch")),
        record("in/d.png"),
    ]
    masks = read_back(images, found, tool, 0.0, unlabelled="good")
    expected = {
        "a.png": [("dent", DISC), ("scratch", SCRATCH)],
        "b.png": [("dent", RING)],
        "c.png": [("scratch", SCRATCH)],
    }
    assert masks.keys() == expected.keys()
    for name, wanted in expected.items():
        assert [label for label, _ in masks[name]] == [label for label, _ in wanted]
        assert all(np.array_equal(mask, other) for (_, mask), (_, other) in zip(masks[name], wanted, strict=True))


@pytest.mark.parametrize("tool", get_args(Tool))
def test_pieces_of_one_defect_are_all_there(images: Path, tool: Tool) -> None:
    found = [record(f"{name}.png", instance(PIECES, "dent")) for name in "abcd"]
    masks = read_back(images, found, tool, 0.0)
    assert all(np.array_equal(np.any([mask for _, mask in of], axis=0), PIECES) for of in masks.values())
    if tool == "cvat":
        root = ElementTree.parse(images.parent / "preannotations.xml").getroot()
        assert {one.get("group_id") for one in root.iter("polygon")} == {"1"}


@pytest.mark.parametrize("tool", ["cvat", "labelstudio"])
def test_boxes_stay_boxes(images: Path, tool: Tool) -> None:
    found = [record(f"{name}.png", instance(DISC, "dent", outlined=False)) for name in "abcd"]
    for of_image in read_back(images, found, tool, 1.0).values():
        ((label, box),) = of_image
        assert label == "dent"
        assert box == pytest.approx([float(side) for side in box_of(DISC)], abs=0.01)


def test_files_have_the_formats_that_the_tools_document(tmp_path: Path) -> None:
    found = [record("line 3/a.png", instance(DISC, "dent"))]
    root = ElementTree.parse(write(tmp_path, "cvat", found, CLASSES, 1.0)).getroot()
    assert (root.tag, root.findtext("version")) == ("annotations", "1.1")
    (image,) = root.iterfind("image")
    assert image.attrib == {"id": "0", "name": "a.png", "width": "64", "height": "48"}
    assert {"label", "source", "occluded", "points", "z_order"} == image[0].attrib.keys()
    ((task),) = json.loads(write(tmp_path, "labelstudio", found, CLASSES, 1.0).read_text())
    assert task["data"] == {"image": "/data/local-files/?d=line%203/a.png"}
    ((result),) = task["predictions"][0]["result"]
    assert (result["type"], result["from_name"], result["to_name"]) == ("polygonlabels", "polygon", "image")
    assert (result["original_width"], result["original_height"]) == (64, 48)
    assert result["value"]["polygonlabels"] == ["dent"]
    assert np.max(result["value"]["points"]) <= 100
    content = json.loads(write(tmp_path, "coco", found, CLASSES, 1.0).read_text())
    assert content["categories"] == [{"id": 1, "name": "dent"}, {"id": 2, "name": "scratch"}]
    assert content["images"] == [{"id": 1, "file_name": "a.png", "width": 64, "height": 48}]
    assert content["annotations"][0]["score"] == 0.75
    boxes = [record("a.png", instance(DISC, "dent", outlined=False))]
    (box,) = json.loads(write(tmp_path, "coco", boxes, CLASSES, 1.0).read_text())["annotations"]
    assert (box["bbox"], box["segmentation"]) == ([float(side) for side in box_of(DISC)], [])


def test_predict_writes_them_and_a_later_run_replaces_them(images: Path, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "best.pt", network(), SPEC)
    out = tmp_path / "found"

    def found(tool: Tool) -> set[str]:
        place: dict[str, Any] = {"model": tmp_path / "best.pt", "input": (str(images / "a.png"),), "output_dir": out}
        predict(PredictConfig(**place, conf=0.1, device="cpu", preannotations=tool))
        return {path.name for path in out.iterdir()} - {"predictions.json", "predictions.csv", "overlays"}

    assert found("coco") == {"preannotations.json"}
    written = read_json(out / "preannotations.json")
    records = read_json(out / "predictions.json")["images"]
    assert [image["file_name"] for image in written["images"]] == ["a.png"]
    assert len(written["annotations"]) == sum(len(one["instances"]) for one in records) > 0
    assert found("cvat") == {"preannotations.xml"}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 5))
def test_no_corner_is_farther_from_the_polygon_than_the_tolerance(seed: int, tolerance: float) -> None:
    noise = np.random.default_rng(seed).random((24, 24), dtype=np.float32)
    mask = np.asarray(cv2.GaussianBlur(noise, (0, 0), 3) > 0.52)
    mask[12, 12] = True
    polygons, exact = simplified(mask, tolerance), to_polygons(mask)
    assert (polygons is None) == (exact is None)
    for simple, ring in zip(polygons or (), exact or (), strict=True):
        assert 6 <= len(simple) <= len(ring)
        outline = np.array(simple, dtype=np.float32).reshape(-1, 1, 2)
        for x, y in zip(ring[::2], ring[1::2], strict=True):
            assert abs(cv2.pointPolygonTest(outline, (float(x), float(y)), measureDist=True)) <= tolerance + 1e-3


def test_a_tolerance_makes_polygons_shorter(tmp_path: Path) -> None:
    exact, simple = simplified(DISC, 0.0), simplified(DISC, 1.0)
    assert exact and simple
    assert len(simple[0]) < len(exact[0]) / 2
    with pytest.raises(FlawmaskError, match="--polygon_tolerance is -1"):
        PredictConfig(model=tmp_path, input=("a",), polygon_tolerance=-1)
