"""The COCO folder: pycocotools reads what is written, and a folder with inconsistent records is refused."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO

from flawmask.coco import annotation, crop_annotation, instance_masks, read_split, write_split
from flawmask.coco_files import split_names
from flawmask.errors import FlawmaskError, RecordsError
from flawmask.masks import Crop, Mask, box_of, crop_mask, encode

MASK = np.zeros((6, 8), dtype=bool)
MASK[1:4, 2:7] = True
CATEGORIES = [{"id": 1, "name": "good"}, {"id": 2, "name": "defect"}]


def image(number: int, **change: Any) -> dict[str, Any]:
    return {"id": number, "file_name": f"{number}.png", "width": 8, "height": 6} | change


def mark(number: int, image_id: int, category_id: int = 2) -> dict[str, Any]:
    return annotation(MASK, id=number, image_id=image_id, category_id=category_id)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A COCO folder whose training split has a good image, a defective one and one without annotations."""
    folder = tmp_path / "set"
    (folder / "train/images").mkdir(parents=True)
    for number in (1, 2, 3):
        (folder / f"train/images/{number}.png").write_bytes(b"")
    marks = [mark(1, 1, 1), mark(2, 2), mark(3, 2)]
    write_split(folder / "train", [image(1), image(2), image(3)], marks, CATEGORIES)
    return folder


def edit(dataset: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = dataset / "train/annotations.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def error_of(dataset: Path, split: str = "train") -> str:
    with pytest.raises(FlawmaskError) as caught:
        read_split(dataset, split)
    assert "\n" not in str(caught.value)
    assert str(dataset) in str(caught.value)
    return str(caught.value)


def test_an_annotation_describes_its_mask() -> None:
    found = annotation(MASK, id=7, image_id=3, category_id=2)
    assert found == {
        "id": 7,
        "image_id": 3,
        "category_id": 2,
        "bbox": [2, 1, 5, 3],
        "area": 15,
        "iscrowd": 0,
        "segmentation": [[2, 1, 7, 1, 7, 4, 2, 4]],
    }


@settings(max_examples=300, deadline=None)
@given(
    arrays.arrays(np.bool_, arrays.array_shapes(min_dims=2, max_dims=2, max_side=9)).filter(np.any),
    st.tuples(*[st.integers(0, 3)] * 4),
)
def test_a_cropped_mask_is_written_like_the_whole_mask(part: Mask, around: tuple[int, int, int, int]) -> None:
    left, right, above, below = around
    mask = np.pad(part, ((above, below), (left, right)))
    expected = {"bbox": list(box_of(mask)), "area": mask.sum(), "segmentation": encode(mask)}
    tight = crop_mask(mask)
    assert tight.mask.shape == box_of(mask)[:1:-1]
    for crop in (Crop(part, left, above), Crop(mask, 0, 0), tight):
        found = crop_annotation(crop, *mask.shape, id=1, image_id=2, category_id=3)
        assert found == {"id": 1, "image_id": 2, "category_id": 3, "iscrowd": 0, **expected}


def test_equal_coordinates_share_one_object() -> None:
    mask = np.pad(np.tri(9, dtype=bool), 1000)
    first, second = (annotation(mask, id=1, image_id=1, category_id=2)["segmentation"][0] for _ in range(2))
    assert first == second
    assert len(first) > 30
    assert all(one is other for one, other in zip(first, second, strict=True))


def test_each_record_is_on_a_separate_line(dataset: Path) -> None:
    lines = (dataset / "train/annotations.json").read_text().splitlines()
    records = [json.loads(line.removesuffix(",")) for line in lines if line.startswith('{"id"')]
    split = read_split(dataset, "train")
    marks = [record for of_image in split.annotations.values() for record in of_image]
    assert records == [*split.images, *marks, *split.categories]


def test_pycocotools_reads_what_is_written(dataset: Path) -> None:
    coco = COCO(str(dataset / "train/annotations.json"))
    assert coco.getImgIds() == [1, 2, 3]
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == ["good", "defect"]
    assert all(np.array_equal(coco.annToMask(record), MASK) for record in coco.loadAnns(coco.getAnnIds()))


def test_what_is_written_is_read_back(dataset: Path) -> None:
    split = read_split(dataset, "train")
    assert [record["id"] for record in split.images] == [1, 2, 3]
    assert {number: [one["id"] for one in records] for number, records in split.annotations.items()} == {
        1: [1],
        2: [2, 3],
        3: [],
    }
    assert split.class_names == ("good", "defect")
    assert split.defect_ids == {2}
    assert [split.is_defective(record) for record in split.images] == [False, True, False]
    assert [len(split.defects(record)) for record in split.images] == [0, 2, 0]
    assert split.image_path(split.images[1]) == dataset / "train/images/2.png"


def test_an_image_without_a_group_is_its_own_group_if_other_images_name_theirs(dataset: Path) -> None:
    assert read_split(dataset, "train").groups is None

    def change(content: dict[str, Any]) -> None:
        content["images"][0]["group"] = "tile07"
        content["images"][2]["group"] = "tile07"

    edit(dataset, change)
    first, second, third = read_split(dataset, "train").groups or []
    assert first == third == "tile07" != second


def test_labels_count_from_1_in_the_order_of_any_category_ids(dataset: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["categories"] = [{"id": 90, "name": "dent"}, {"id": 0, "name": "good"}, {"id": 7, "name": "crack"}]
        for record, number in zip(content["annotations"], (0, 7, 90), strict=True):
            record["category_id"] = number

    edit(dataset, change)
    split = read_split(dataset, "train")
    assert split.class_names == ("good", "crack", "dent")
    assert split.labels == {0: 1, 7: 2, 90: 3}
    assert split.defect_ids == {7, 90}


def test_images_may_lie_in_subfolders(dataset: Path) -> None:
    (dataset / "train/images/a").mkdir()
    (dataset / "train/images/2.png").rename(dataset / "train/images/a/2.png")
    edit(dataset, lambda content: content["images"][1].update(file_name="a/2.png"))
    assert read_split(dataset, "train").image_path({"file_name": "a/2.png"}) == dataset / "train/images/a/2.png"


def test_a_folder_with_the_name_of_an_image_is_not_an_image(dataset: Path) -> None:
    (dataset / "train/images/2.png").unlink()
    (dataset / "train/images/2.png").mkdir()
    assert "lists images that are not in" in error_of(dataset)


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_an_image_may_be_a_link_but_not_a_broken_one(dataset: Path) -> None:
    image = dataset / "train/images/2.png"
    image.rename(dataset / "elsewhere.png")
    image.symlink_to(dataset / "elsewhere.png")
    assert len(read_split(dataset, "train").images) == 3
    (dataset / "elsewhere.png").unlink()
    assert "lists images that are not in" in error_of(dataset)


def test_a_split_without_an_image_folder_is_reported(dataset: Path) -> None:
    shutil.rmtree(dataset / "train/images")
    assert "(1.png, 2.png, 3.png)" in error_of(dataset)


BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "unknown category": (
        lambda content: content["annotations"][1].update(category_id=3),
        "annotation 2 has category 3, which is not listed (1 good, 2 defect)",
    ),
    "category of a strange type": (
        lambda content: content["annotations"][1].update(category_id=[2]),
        "annotation 2 has category [2], which is not listed",
    ),
    "unknown image": (lambda content: content["annotations"][1].update(image_id=9), "belongs to image 9"),
    "image of a strange type": (lambda content: content["annotations"][1].update(image_id={}), "belongs to image {}"),
    "file not there": (
        lambda content: content["images"][1].update(file_name="x.png"),
        "lists images that are not in",
    ),
    "many files not there": (
        lambda content: content["images"].extend(image(number) for number in range(10, 15)),
        "10.png, 11.png, 12.png and 2 more",
    ),
    "file name is a folder": (lambda content: content["images"][1].update(file_name=""), "lists images that are not"),
    "file above": (lambda content: content["images"][1].update(file_name="../../a.png"), "which is outside"),
    "absolute file": (lambda content: content["images"][1].update(file_name="/etc/hostname"), "which is outside"),
    "duplicate image id": (lambda content: content["images"][1].update(id=1), "images[1] has the id 1"),
    "duplicate annotation id": (lambda content: content["annotations"][2].update(id=1), "annotations[2] has the id 1"),
    "duplicate category id": (lambda content: content["categories"][1].update(id=1), "categories[1] has the id 1"),
    "id beyond 64 bits": (lambda content: content["images"][1].update(id=10**30), "images[1] has the id 1000"),
    "category without a name": (
        lambda content: content["categories"][1].update(name=5),
        "category 2 has the name 5, which is a duplicate or not a name",
    ),
    "categories of one name": (
        lambda content: content["categories"][1].update(name="good"),
        "category 2 has the name 'good', which is a duplicate or not a name",
    ),
    "box beyond all bounds": (
        lambda content: content["annotations"][1].update(bbox=[10**400, 1, 1, 1]),
        "annotation 2 has the box [1000",
    ),
    "id of words that nobody refers to": (
        lambda content: content["images"][1].update(id="one"),
        "annotation 2 belongs to image 2, which is not listed",
    ),
    "id nothing": (lambda content: content["images"][1].update(id=None), "images[1] has the id None"),
    "id true": (lambda content: content["images"][1].update(id=True), "images[1] has the id True"),
    "crowd in words": (
        lambda content: content["annotations"][1].update(iscrowd="many"),
        "annotation 2 has iscrowd 'many', which is neither 0 nor 1",
    ),
    "id a list": (lambda content: content["images"][1].update(id=[1]), "images[1] has the id [1]"),
    "no list of images": (lambda content: content.pop("images"), "no list `images`"),
    "annotations no list": (lambda content: content.update(annotations={}), "no list `annotations`"),
    "no categories": (lambda content: content.pop("categories"), "no list `categories`"),
    "image without a size": (lambda content: content["images"][1].pop("width"), "images[1] has no width"),
    "image of no size": (lambda content: content["images"][1].update(height=0), "image 2 has the size 8 x 0"),
    "size in words": (lambda content: content["images"][1].update(width="8"), "image 2 has the size '8' x 6"),
    "image of a size nobody has": (
        lambda content: content["images"][1].update(width=10**6, height=10**6),
        "image 2 has the size 1000000 x 1000000: more than 178 million pixels",
    ),
    "box in words": (
        lambda content: content["annotations"][1].update(bbox=["a", 1, 2, 3]),
        "annotation 2 has the box ['a', 1, 2, 3]",
    ),
    "neither box nor outline": (
        lambda content: content["annotations"][1].update(segmentation=[], bbox=None),
        "annotation 2 has neither a mask nor a box",
    ),
    "polygon of two points": (
        lambda content: content["annotations"][1].update(segmentation=[[1, 1, 4, 4]]),
        "annotation 2 has no usable segmentation: a polygon with 2 points",
    ),
    "polygon of an odd number": (
        lambda content: content["annotations"][1].update(segmentation=[[1, 1, 4, 4, 2, 3, 1]]),
        "a polygon that is not a list of x and y",
    ),
    "polygon of words": (
        lambda content: content["annotations"][1].update(segmentation=[[1, 1, 4, "4", 2, 3]]),
        "a polygon with coordinates that are not numbers",
    ),
    "polygon without end": (
        lambda content: content["annotations"][1].update(segmentation=[[1, 1, 4, float("inf"), 2, 3]]),
        "a polygon with coordinates that are not numbers",
    ),
    "polygon far away": (
        lambda content: content["annotations"][1].update(segmentation=[[1, 1, 4, 1e12, 2, 3]]),
        "a polygon that reaches far out of the image",
    ),
    "RLE of another size": (
        lambda content: content["annotations"][1].update(segmentation={"size": [5, 5], "counts": [25]}),
        "an RLE of the size [5, 5] on an image of [6, 8]",
    ),
    "RLE that is too long": (
        lambda content: content["annotations"][1].update(segmentation={"size": [6, 8], "counts": [10, 90]}),
        "an RLE whose runs do not add up to its size",
    ),
    "RLE that runs backwards": (
        lambda content: content["annotations"][1].update(segmentation={"size": [6, 8], "counts": [60, -12]}),
        "an RLE whose runs do not add up to its size",
    ),
    "RLE of noise": (
        lambda content: content["annotations"][1].update(segmentation={"size": [6, 8], "counts": "~~~ö"}),
        "an RLE with invalid counts",
    ),
    "annotation without a mask": (
        lambda content: [content["annotations"][1].pop(key) for key in ("segmentation", "bbox")],
        "annotations[1] has no segmentation",
    ),
    "record no object": (lambda content: content["images"].insert(1, "x"), "images[1] has no id, file_name"),
    "no image": (lambda content: content.update(images=[], annotations=[]), "lists no image"),
    "no category": (lambda content: content.update(categories=[], annotations=[]), "lists no category"),
}


@pytest.mark.parametrize("what", BAD)
def test_inconsistent_records_are_reported_in_one_line_that_names_the_file(dataset: Path, what: str) -> None:
    change, message = BAD[what]
    edit(dataset, change)
    assert message in error_of(dataset)


def test_every_unusable_record_is_listed(dataset: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["annotations"][0].update(segmentation=[[1, 1, 4, 4]])
        content["annotations"][1].update(category_id=9)

    edit(dataset, change)
    with pytest.raises(RecordsError) as caught:
        read_split(dataset, "train")
    first = "annotation 1 has no usable segmentation: a polygon with 2 points"
    assert (
        str(caught.value)
        == f"{dataset}/train/annotations.json: {first}; it is the first of 2 records that cannot be used"
    )
    second = "annotation 2 has category 9, which is not listed (1 good, 2 defect): add it to `categories`"
    assert caught.value.problems == (first, second)


OUTSIDE = [[-3, 1, 4, 1, 4, 3, -3, 3]]
"""A polygon that lies partly outside the image, to its left."""


def test_exports_of_other_tools_are_read_without_changes(dataset: Path) -> None:
    expected = read_split(dataset, "train")

    def change(content: dict[str, Any]) -> None:
        # Like Roboflow: an unused category, ids from 0, no area, no iscrowd, fractional coordinates.
        content["categories"] = [
            {"id": 0, "name": "parts", "supercategory": "none"},
            {"id": 7, "name": "good"},
            {"id": 9, "name": "dent", "keypoints": []},
        ]
        for record in content["annotations"]:
            record["category_id"] = {1: 7, 2: 9}[record["category_id"]]
            for name in ("area", "iscrowd", "bbox"):
                del record[name]
        content["annotations"][0]["segmentation"] = OUTSIDE
        content["annotations"][1]["segmentation"] = {"size": [6, 8], "counts": counts_of(MASK)}
        content["licenses"] = []

    edit(dataset, change)
    folder = dataset / "train"
    for name, beside in (("_annotations.coco.json", True), ("annotations/instances_default.json", False)):
        (folder / name).parent.mkdir(exist_ok=True)
        next(folder.rglob("*.json")).rename(folder / name)
        if beside:
            for path in (folder / "images").iterdir():
                path.rename(folder / path.name)
            (folder / "images").rmdir()
        split = read_split(dataset, "train")
        assert split.class_names == ("parts", "good", "dent")
        assert [split.image_path(one).read_bytes() for one in split.images] == [
            (folder / one["file_name"]).read_bytes() for one in expected.images
        ]
        first, second = (record for records in split.annotations.values() for record in records[:1])
        assert first["bbox"] == [0, 1, 4, 2]
        assert second["bbox"] == [2, 1, 5, 3]
        assert np.array_equal(next(instance_masks([second], 6, 8, "")), MASK)
    (folder / "more.json").write_text("{}")
    assert "there are several others: annotations/instances_default.json, more.json" in error_of(dataset)


def test_roboflows_name_for_val_is_understood(dataset: Path) -> None:
    assert split_names(dataset) == ["train"]
    shutil.copytree(dataset / "train", dataset / "valid")
    (dataset / "valid" / "annotations.json").rename(dataset / "valid" / "_annotations.coco.json")
    (dataset / "left" / "images").mkdir(parents=True)
    (dataset / "left" / "facts.json").write_text("{}")
    (dataset / "valid" / "._annotations.coco.json").write_bytes(b"what macOS leaves beside a file")
    assert split_names(dataset) == ["train", "val"]
    split = read_split(dataset, "val")
    assert (split.folder, split.name) == (dataset / "valid", "val")
    shutil.copytree(dataset / "train", dataset / "val")
    assert "holds val and valid, which are the same split" in error_of(dataset, "val")
    assert split_names(dataset / "nowhere") == []


def counts_of(mask: Mask) -> list[int]:
    """Return the run lengths of a mask, column by column, starting with zeros."""
    flat = np.concatenate(([0], mask.T.ravel().astype(int), [1 - int(mask[-1, -1])]))
    ends = np.flatnonzero(np.diff(flat))
    return [int(length) for length in np.diff(ends, prepend=0)]


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot be read as JSON"), ("", "cannot be read as JSON"), ("[1]", "not list"), ("null", "not NoneType")],
)
def test_a_file_that_is_not_coco_is_refused(dataset: Path, content: str, message: str) -> None:
    (dataset / "train/annotations.json").write_text(content)
    assert message in error_of(dataset)


def test_the_message_about_a_missing_split_lists_what_exists(dataset: Path) -> None:
    assert error_of(dataset, "val").endswith("has no split val: it holds train")
    assert "no such folder" in error_of(dataset / "none")
    (dataset / "val").mkdir()
    assert "annotations.json does not exist" in error_of(dataset, "val")


def test_instances_are_decoded_and_an_invalid_segmentation_is_reported() -> None:
    assert [np.array_equal(mask, MASK) for mask in instance_masks([mark(1, 1), mark(2, 1)], 6, 8, "a.png")] == [
        True
    ] * 2
    for bad in ("words", {"size": [5, 5], "counts": [25]}, {}, [[1]], None):
        with pytest.raises(FlawmaskError, match=r"^a\.png: annotation 9 has no usable segmentation") as caught:
            list(instance_masks([{"id": 9, "segmentation": bad}], 6, 8, "a.png"))
        assert "\n" not in str(caught.value)
