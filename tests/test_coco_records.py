"""COCO files of other tools: which records are used, which are not and why; and every record is counted."""

import json
import logging
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flawmask.coco import CocoSplit, annotation, instance_masks, read_split, write_split
from flawmask.errors import FlawmaskError, RecordsError, UnusedError
from flawmask.images import write_png
from flawmask.masks import Mask, to_rle
from flawmask.settings import Reading

HEIGHT, WIDTH = 30, 40
MASK = np.zeros((HEIGHT, WIDTH), dtype=bool)
MASK[5:15, 10:22] = True
BOX = [10, 5, 12, 10]
RING = [10, 5, 22, 5, 22, 15, 10, 15]
CATEGORIES = [{"id": 1, "name": "hole"}, {"id": 2, "name": "scratch"}]
SKIP = Reading(on_error="skip")

Content = dict[str, Any]
Change = Callable[[Content], Any]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A split with three images: two holes on the first, a scratch on the second, nothing on the third."""
    return make(tmp_path / "set")


def make(folder: Path) -> Path:
    images = [{"id": n, "file_name": f"{n}.png", "width": WIDTH, "height": HEIGHT} for n in (1, 2, 3)]
    for image in images:
        write_png(folder / "train" / "images" / str(image["file_name"]), np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8))
    marks = [annotation(MASK, id=n, image_id=i, category_id=c) for n, i, c in ((1, 1, 1), (2, 1, 1), (3, 2, 2))]
    write_split(folder / "train", images, marks, CATEGORIES)
    return folder


def edit(dataset: Path, change: Change) -> Path:
    path = dataset / "train" / "annotations.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return dataset


def mark(content: Content, number: int) -> dict[str, Any]:
    found: dict[str, Any] = content["annotations"][number - 1]
    return found


def ids(split: CocoSplit) -> dict[int, list[int]]:
    return {number: [one["id"] for one in of_image] for number, of_image in split.annotations.items()}


def not_used(split: CocoSplit) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    images, annotations = split.tallies
    assert (images.used, images.found - images.used) == (len(split.images), sum(map(len, images.not_used.values())))
    return images.not_used, annotations.not_used


def lines(split: CocoSplit) -> list[str]:
    return [tally.line() for tally in split.tallies]


def test_everything_in_a_clean_file_is_used(dataset: Path) -> None:
    split = read_split(dataset, "train")
    assert lines(split) == ["3 images: all used", "3 annotations: all used"]
    split.warn(strict=True)


# Crowds.


@pytest.mark.parametrize("value", [1, "1", True, 1.0])
def test_a_crowd_is_not_an_instance_unless_the_setting_says_so(dataset: Path, value: Any) -> None:
    edit(dataset, lambda content: mark(content, 2).update(iscrowd=value, segmentation=to_rle(MASK)))
    split = read_split(dataset, "train")
    assert lines(split)[1] == "3 annotations: 2 used, 1 not used: crowd"
    assert not_used(split)[1] == {"crowd": ["2 of 1.png"]}
    assert [one["iscrowd"] for one in split.annotations[1]] == [0, 1]
    assert [one["id"] for one in split.crowds] == [2]
    as_instances = read_split(dataset, "train", Reading(crowds="instances"))
    assert lines(as_instances)[1] == "3 annotations: all used"
    assert [one["iscrowd"] for one in as_instances.annotations[1]] == [0, 0]


@pytest.mark.parametrize("value", [0, "0", False, None])
def test_all_ways_to_write_iscrowd_0_are_understood(dataset: Path, value: Any) -> None:
    edit(dataset, lambda content: mark(content, 2).update(iscrowd=value))
    split = read_split(dataset, "train")
    assert lines(split)[1] == "3 annotations: all used"
    assert not split.crowds


# Annotations without a pixel.


EMPTY: dict[str, tuple[dict[str, Any], str]] = {
    "a line back and forth": ({"segmentation": [[5, 5, 9, 5, 5, 5]]}, "no pixel"),
    "less than a pixel": ({"segmentation": [[5.1, 5.1, 5.3, 5.1, 5.3, 5.3]]}, "no pixel"),
    "an RLE without a pixel": ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}}, "no pixel"),
    "left of the image": ({"segmentation": [[-9, 5, -3, 5, -3, 9]]}, "outside the image"),
    "below the image": ({"segmentation": [[5, 40, 9, 40, 9, 50]]}, "outside the image"),
    "a box without width": ({"segmentation": [], "bbox": [5, 5, 0, 9]}, "no area"),
    "a box without height": ({"segmentation": [], "bbox": [5, 5, 9, 0]}, "no area"),
    "a box right of the image": ({"segmentation": [], "bbox": [WIDTH, 5, 9, 9]}, "outside the image"),
    "a box above the image": ({"segmentation": [], "bbox": [5, -20, 9, 9]}, "outside the image"),
}


@pytest.mark.parametrize("what", EMPTY)
def test_an_annotation_without_a_pixel_is_not_a_defect_and_is_reported(dataset: Path, what: str) -> None:
    change, reason = EMPTY[what]
    edit(dataset, lambda content: mark(content, 3).update(change))
    split = read_split(dataset, "train")
    assert not_used(split) == ({}, {reason: ["3 of 2.png"]})
    assert not split.is_defective(split.images[1])
    assert ids(split) == {1: [1, 2], 2: [], 3: []}


@pytest.mark.parametrize("box", [None, [], [10, 5, 0, 0]])
def test_a_box_without_an_area_is_replaced_by_the_box_of_the_mask(dataset: Path, box: Any) -> None:
    edit(dataset, lambda content: mark(content, 3).update(bbox=box))
    assert read_split(dataset, "train").annotations[2][0]["bbox"] == BOX


# Segmentations.


@pytest.mark.parametrize(
    "segmentation",
    [RING, [list(pair) for pair in list(pairwise(RING))[::2]], [[list(pair) for pair in list(pairwise(RING))[::2]]]],
    ids=["flat", "points", "lists of points"],
)
def test_a_polygon_is_read_with_any_nesting(dataset: Path, segmentation: Any) -> None:
    edit(dataset, lambda content: mark(content, 1).update(segmentation=segmentation))
    split = read_split(dataset, "train")
    assert split.annotations[1][0]["segmentation"] == [RING]
    assert np.array_equal(next(instance_masks(split.annotations[1][:1], HEIGHT, WIDTH, "")), MASK)


@pytest.mark.parametrize("outline", [None, [], [[]], {}, "", "no key"], ids=str)
def test_an_annotation_with_only_a_box_gets_a_mask_of_the_pixels_that_it_touches(dataset: Path, outline: Any) -> None:
    def change(content: Content) -> None:
        mark(content, 3).update(segmentation=outline, bbox=[10.5, 5.25, 11, 9.5])
        if outline == "no key":
            del mark(content, 3)["segmentation"]

    split = read_split(edit(dataset, change), "train")
    (record,) = split.annotations[2]
    assert record["bbox"] == [10.5, 5.25, 11, 9.5]
    assert np.array_equal(next(instance_masks([record], HEIGHT, WIDTH, "")), MASK)
    assert split.box_only_defects == [record]
    with pytest.raises(FlawmaskError, match=r"1 defects have a box but no mask \(annotation 3, for example\), and so"):
        split.require_masks("so", "do that")


def test_an_annotation_with_only_a_box_is_clipped_to_its_image(dataset: Path) -> None:
    edit(dataset, lambda content: mark(content, 3).update(segmentation=[], bbox=[-4, 20, 14.5, 30]))
    (record,) = read_split(dataset, "train").annotations[2]
    assert record["bbox"] == [0, 20, 10.5, 10]


def test_an_annotation_with_only_a_box_is_written_without_a_segmentation(dataset: Path, tmp_path: Path) -> None:
    split = read_split(edit(dataset, lambda content: mark(content, 3).update(segmentation=[])), "train")
    marks = [one for of_image in split.annotations.values() for one in of_image]
    write_split(tmp_path / "again", split.images, marks, split.categories)
    written = json.loads((tmp_path / "again" / "annotations.json").read_text())["annotations"]
    assert [one["segmentation"] for one in written] == [[RING], [RING], []]


# Ids and names.


IDS: dict[str, Callable[[int], Any]] = {
    "text": str,
    "floats": float,
    "text of floats": lambda number: f"{number}.0",
    "words": lambda number: f"img-{number}",
    "text on one side": lambda number: number,
}


@pytest.mark.parametrize("what", IDS)
def test_ids_may_be_text_or_floats(dataset: Path, what: str) -> None:
    expected = read_split(dataset, "train")

    def change(content: Content) -> None:
        turned = IDS[what]
        for image in content["images"]:
            image["id"] = turned(image["id"])
        for category in content["categories"]:
            category["id"] = turned(category["id"])
        for record in content["annotations"]:
            record["id"] = turned(record["id"])
            other = str if what == "text on one side" else turned
            record.update({key: other(record[key]) for key in ("image_id", "category_id")})

    split = read_split(edit(dataset, change), "train")
    assert split == expected
    assert all(type(image["id"]) is int for image in split.images)


def test_text_ids_are_replaced_by_unused_numbers(dataset: Path) -> None:
    def change(content: Content) -> None:
        content["images"][0]["id"] = mark(content, 1)["image_id"] = mark(content, 2)["image_id"] = "part"

    split = read_split(edit(dataset, change), "train")
    assert [image["id"] for image in split.images] == [4, 2, 3]
    assert ids(split) == {4: [1, 2], 2: [3], 3: []}


def test_sizes_may_be_floats_without_a_fraction(dataset: Path) -> None:
    edit(dataset, lambda content: content["images"][0].update(width=float(WIDTH), height=float(HEIGHT)))
    image = read_split(dataset, "train").images[0]
    assert (type(image["width"]), image["width"], image["height"]) == (int, WIDTH, HEIGHT)


@pytest.mark.parametrize("place", [0, 2])
def test_of_two_categories_with_the_same_name_the_used_one_is_kept(dataset: Path, place: int) -> None:
    edit(dataset, lambda content: content["categories"].insert(place, {"id": 9 * place, "name": "hole"}))
    assert {category["id"] for category in read_split(dataset, "train").categories} == {1, 2}


def test_of_two_unused_categories_with_the_same_name_one_is_kept(dataset: Path) -> None:
    edit(dataset, lambda content: content["categories"].extend({"id": n, "name": "dent"} for n in (8, 9)))
    assert read_split(dataset, "train").class_names == ("hole", "scratch", "dent")


def test_two_used_categories_with_the_same_name_are_refused_with_advice(dataset: Path) -> None:
    edit(dataset, lambda content: content["categories"][1].update(name="hole"))
    with pytest.raises(RecordsError, match="both have annotations; rename one"):
        read_split(dataset, "train")


# Images that are listed twice.


@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("name", ["1.png", "./1.png"])
def test_of_an_image_that_is_listed_twice_the_record_with_annotations_is_kept(
    dataset: Path, place: int, name: str
) -> None:
    bare = {"id": 7, "file_name": name, "width": WIDTH, "height": HEIGHT}
    edit(dataset, lambda content: content["images"].insert(place, bare))
    split = read_split(dataset, "train")
    assert not_used(split) == ({"listed twice": [name]}, {})
    assert ids(split) == {1: [1, 2], 2: [3], 3: []}


def test_duplicate_records_count_once(dataset: Path) -> None:
    def change(content: Content) -> None:
        content["images"].append(content["images"][0])
        content["annotations"].append(mark(content, 3))
        content["categories"].append(content["categories"][0])

    split = read_split(edit(dataset, change), "train")
    assert not_used(split) == ({"listed twice": ["1.png"]}, {"listed twice": ["annotations[3]"]})
    assert ids(split) == {1: [1, 2], 2: [3], 3: []}


def test_an_image_that_is_listed_twice_with_the_same_annotations_is_used_once(dataset: Path) -> None:
    def change(content: Content) -> None:
        content["images"].append({**content["images"][1], "id": 7})
        content["annotations"].append({**mark(content, 3), "id": 9, "image_id": 7})

    split = read_split(edit(dataset, change), "train")
    assert not_used(split) == ({"listed twice": ["2.png"]}, {"image not used": ["9 of 2.png"]})


def test_an_image_that_is_listed_twice_with_different_annotations_is_refused_or_left_out(dataset: Path) -> None:
    def change(content: Content) -> None:
        content["images"].append({**content["images"][1], "id": 7})
        content["annotations"].append({**mark(content, 3), "id": 9, "image_id": 7, "category_id": 1})

    edit(dataset, change)
    with pytest.raises(
        RecordsError, match=r"images 2 and 7 are both 2\.png and have different annotations: give all of them"
    ):
        read_split(dataset, "train")
    split = read_split(dataset, "train", SKIP)
    assert [image["file_name"] for image in split.images] == ["1.png", "3.png"]
    assert not_used(split)[0] == {"listed twice": ["2.png", "2.png"]}


# Leaving out unusable records.


SKIPPED: dict[str, tuple[Change, tuple[str, ...], dict[str, list[str]], dict[str, list[str]]]] = {
    "a mask that is none": (
        lambda content: mark(content, 2).update(segmentation=[[1, 1, 9, 9]]),
        ("2.png", "3.png"),
        {"bad record": ["1.png"]},
        {"bad record": ["2 of 1.png"], "image not used": ["1 of 1.png"]},
    ),
    "a category that is not listed": (
        lambda content: mark(content, 3).update(category_id=9),
        ("1.png", "3.png"),
        {"bad record": ["2.png"]},
        {"bad record": ["3 of 2.png"]},
    ),
    "an annotation of no image": (
        lambda content: mark(content, 3).update(image_id=9),
        ("1.png", "2.png", "3.png"),
        {},
        {"bad record": ["3"]},
    ),
    "an annotation without an image": (
        lambda content: mark(content, 3).pop("image_id"),
        ("1.png", "2.png", "3.png"),
        {},
        {"bad record": ["annotations[2]"]},
    ),
    "an annotation without a category": (
        lambda content: mark(content, 3).pop("category_id"),
        ("1.png", "3.png"),
        {"bad record": ["2.png"]},
        {"bad record": ["annotations[2]"]},
    ),
    "an annotation of an image that is listed twice": (
        lambda content: [
            mark(content, 3).update(category_id=9),
            content["images"].append({**content["images"][1], "id": 9}),
        ],
        ("1.png", "3.png"),
        {"bad record": ["2.png", "2.png"]},
        {"bad record": ["3 of 2.png"]},
    ),
    "an image without a size": (
        lambda content: content["images"][1].pop("width"),
        ("1.png", "3.png"),
        {"bad record": ["2.png"]},
        {"bad record": ["3"]},
    ),
    "an image of no size": (
        lambda content: content["images"][1].update(width=0),
        ("1.png", "3.png"),
        {"bad record": ["2.png"]},
        {"image not used": ["3 of 2.png"]},
    ),
    "a file that is not there": (
        lambda content: content["images"][1].update(file_name="x.png"),
        ("1.png", "3.png"),
        {"file missing": ["x.png"], "not listed": ["2.png"]},
        {"image not used": ["3 of x.png"]},
    ),
    "a file of another size": (
        lambda content: content["images"][1].update(width=WIDTH + 1),
        ("1.png", "3.png"),
        {"bad image": ["2.png"]},
        {"image not used": ["3 of 2.png"]},
    ),
}


@pytest.mark.parametrize("what", SKIPPED)
def test_a_bad_record_can_be_left_out_with_its_image(
    dataset: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    change, kept, images, annotations = SKIPPED[what]
    split = read_split(edit(dataset, change), "train", SKIP)
    assert tuple(image["file_name"] for image in split.images) == kept
    assert not_used(split) == (images, annotations)
    assert set(split.annotations) == {image["id"] for image in split.images}
    with caplog.at_level(logging.WARNING):
        split.warn(strict=False)
    assert sum("left out: " in text for text in caplog.messages) == len(split.problems) >= 1
    with pytest.raises(UnusedError, match="not used: "):
        split.warn(strict=True)


def test_a_damaged_image_can_be_left_out(dataset: Path) -> None:
    path = dataset / "train" / "images" / "1.png"
    path.write_bytes(path.read_bytes()[:60])
    assert len(read_split(dataset, "train").images) == 3, "the file is read only when it is needed"
    split = read_split(dataset, "train", SKIP)
    assert not_used(split) == ({"bad image": ["1.png"]}, {"image not used": ["1 of 1.png", "2 of 1.png"]})


def test_a_file_with_no_usable_image_is_refused(dataset: Path) -> None:
    edit(dataset, lambda content: [image.pop("width") for image in content["images"]])
    with pytest.raises(FlawmaskError, match=r"lists no image that can be used: images\[0\] has no width"):
        read_split(dataset, "train", SKIP)
    edit(dataset, lambda content: [image.update(width=0) for image in content["images"]])
    with pytest.raises(FlawmaskError, match="lists no image that can be used: image 1 has the size 0"):
        read_split(dataset, "train", SKIP)


# Every record is counted.


PECULIAR: list[dict[str, Any]] = [
    {},
    {"iscrowd": 1},
    {"iscrowd": "1", "segmentation": RING},
    {"iscrowd": "many"},
    {"segmentation": [[1, 1, 9, 9]]},
    {"segmentation": [[5, 5, 9, 5, 5, 5]]},
    {"segmentation": [[-9, 5, -3, 5, -3, 9]]},
    {"segmentation": []},
    {"segmentation": None, "bbox": [5, 5, 0, 0]},
    {"segmentation": None, "bbox": None},
    {"category_id": "2"},
    {"category_id": 9},
    {"image_id": 2.0},
    {"image_id": "nowhere"},
    {"id": 1},
    {"id": None},
]
LISTED: list[dict[str, Any]] = [{}, {"width": 0}, {"width": float(WIDTH)}, {"file_name": "1.png"}, {"id": "1"}]


@pytest.fixture(scope="module")
def peculiar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("peculiar") / "set")


@settings(max_examples=150, deadline=None)
@given(
    marks=st.lists(st.tuples(st.integers(1, 3), st.sampled_from(PECULIAR)), max_size=8),
    images=st.lists(st.sampled_from(LISTED), min_size=1, max_size=4),
    crowds=st.sampled_from(("ignore", "instances")),
)
def test_every_record_is_used_or_listed_as_unused(
    peculiar: Path, marks: list[tuple[int, dict[str, Any]]], images: list[dict[str, Any]], crowds: Any
) -> None:
    records = [
        {"id": number, "file_name": f"{number % 3 + 1}.png", "width": WIDTH, "height": HEIGHT, **change}
        for number, change in enumerate(images, start=1)
    ]
    plain = annotation(MASK, id=0, image_id=0, category_id=1)
    annotations = [
        {**plain, "id": number, "image_id": image, **change} for number, (image, change) in enumerate(marks, start=1)
    ]
    content = {"images": records, "annotations": annotations, "categories": CATEGORIES}
    (peculiar / "train" / "annotations.json").write_text(json.dumps(content))
    try:
        split = read_split(peculiar, "train", Reading(on_error="skip", crowds=crowds))
    except FlawmaskError as error:
        assert "lists no image that can be used" in str(error)
        return
    image_tally, of_annotations = split.tallies
    others = {f"{n}.png" for n in (1, 2, 3)} - {Path(one["file_name"]).name for one in records}
    assert set(image_tally.not_used.get("not listed", [])) == others
    assert image_tally.found == len(records) + len(others)
    assert of_annotations.found == len(annotations)
    assert image_tally.used == len(split.images)
    kept = [one for of_image in split.annotations.values() for one in of_image]
    assert of_annotations.used == sum(not one.get("iscrowd") for one in kept)
    assert all(mask.any() for mask in decoded_masks(kept))


def test_images_that_no_record_names_are_counted(dataset: Path) -> None:
    write_png(dataset / "train" / "more" / "deep.png", np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8))
    (dataset / "train" / "images" / "photo.cr2").write_bytes(b"II*\0")
    (dataset / "train" / "images" / "notes.txt").write_text("none")
    (dataset / "train" / "labels.cache").write_bytes(b"\0")
    first = dataset / "train" / "images" / "1.png"
    os.link(first, first.with_suffix(".PNG"))  # as on a file system that ignores case
    (dataset / "train" / "images" / "._1.png").write_bytes(b"")
    split = read_split(dataset, "train")
    assert split.tallies[0].not_used == {"not listed": ["photo.cr2", "../more/deep.png"]}
    assert split.tallies[0].used == 3


def decoded_masks(records: list[dict[str, Any]]) -> list[Mask]:
    return list(instance_masks(records, HEIGHT, WIDTH, ""))
