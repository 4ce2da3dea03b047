"""Prepare: every mask is preserved exactly, every image byte for byte, and the records are right."""

import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from prepared import Array, Digests, Make, content, draw_image, info, joined, records, run, sides, truth_of, write_mask
from scipy import ndimage

from flawmask import masks
from flawmask.coco import annotation
from flawmask.data.prepare import PrepareConfig, prepare

# Masks


@pytest.mark.parametrize("place", ["mvtec_ad_sample/bottle", "magnetic_tile"])
def test_every_mask_of_the_real_images_is_preserved_exactly(shared_data: Path, tmp_path: Path, place: str) -> None:
    root = (shared_data / place).parent
    name = Path(place).name
    prepared = prepare(PrepareConfig(mvtec_root=root, category=name, output_dir=tmp_path / "out"))
    found = joined(prepared)
    # The good images are those in `test`, unless there are too few.
    images = [path for path in (root / name).glob("t*/*/*") if name == "bottle" or path.parts[-3] == "test"]
    assert len(found) == len(images) > 16
    for original_file, union in found.items():
        truth = truth_of(root, original_file)
        assert union.shape == truth.shape
        assert (union & truth).sum() / (union | truth).sum() == 1.0, original_file


@pytest.mark.parametrize("instances", ["component", "image"])
def test_noisy_masks_are_preserved_exactly(tiny_category: Make, instances: str) -> None:
    folder = tiny_category(crack=6)
    for name, union in joined(run(folder, instances=instances)).items():
        assert np.array_equal(union, truth_of(folder.parent, name))


@pytest.mark.parametrize("instances", ["component", "image"])
def test_an_instance_is_a_connected_region_or_the_whole_mask(tiny_category: Make, instances: str) -> None:
    folder = tiny_category(crack=4)
    prepared = run(folder, instances=instances)
    counts = Counter(record["image_id"] for record in records(prepared, "annotations"))
    for image in records(prepared):
        truth = truth_of(folder.parent, image["original_file"])
        regions = ndimage.label(truth, structure=np.ones((3, 3)))[1]
        assert counts[image["id"]] == (regions if instances == "component" else 1)


def test_annotations_equal_those_of_separate_masks_of_each_region_in_reading_order(tiny_category: Make) -> None:
    folder = tiny_category(good=2, crack=8)
    bowl = np.zeros((14, 18), np.uint8)  # a region around a dot; its first pixel comes after the dot
    bowl[[4, 5, 6, 6, 6, 6, 5, 4], [3, 3, 4, 5, 6, 7, 8, 9]] = 255
    bowl[4, 3] = 0
    bowl[4, 5] = 255
    write_mask(folder / "ground_truth/crack/000_mask.png", bowl)
    prepared = run(folder)
    by_image: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in records(prepared)}
    for record in records(prepared, "annotations"):
        by_image[record["image_id"]].append({**record, "id": 0, "image_id": 0})
    for image in records(prepared):
        regions = masks.components(truth_of(folder.parent, image["original_file"]))
        kind = 1 if image["defect_type"] == "good" else 2
        expected = [annotation(region, id=0, image_id=0, category_id=kind) for region in regions]
        assert by_image[image["id"]] == expected


@pytest.mark.parametrize("cores", [1, 7])
def test_the_number_of_cores_changes_nothing(
    tiny_category: Make, digests: Digests, monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    folder = tiny_category(good=9, crack=9)
    expected = digests(run(folder).dataset_dir)
    monkeypatch.setattr("flawmask.data.prepare.usable_cores", lambda: cores)
    assert digests(run(folder, overwrite=True).dataset_dir) == expected


def test_memory_does_not_grow_with_the_number_of_images(tiny_category: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    # With several threads, the number of images in memory would depend on chance.
    monkeypatch.setattr("flawmask.data.prepare.usable_cores", lambda: 1)
    side = 300
    peaks = []
    for name, count in (("few", 4), ("many", 24)):
        folder = tiny_category(name=name, good=count, crack=2)
        for seed, path in enumerate(folder.glob("test/good/*.png")):
            draw_image(path, seed, (side, side))
        tracemalloc.start()
        try:
            run(folder)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] - peaks[0] < 2 * 3 * side * side, "with twenty more images, memory grew by the size of two"


KINDS: dict[str, Callable[[Array], Array]] = {
    "0 and 255": lambda mask: mask * np.uint8(255),
    "0 and 1": lambda mask: mask.astype(np.uint8),
    "127 and 128": lambda mask: mask + np.uint8(127),
    "16 bits": lambda mask: mask * np.uint16(65535),
    "16 bits, 32767 and 32768": lambda mask: (mask + np.uint16(32767)).astype(np.uint16),
    "RGB": lambda mask: np.dstack([mask * np.uint8(255)] * 3),
    "red": lambda mask: np.dstack((mask * np.uint8(255), np.zeros((14, 18, 2), np.uint8))),
    "RGBA": lambda mask: np.dstack([mask * np.uint8(255)] * 3 + [np.full((14, 18), 255, np.uint8)]),
    "1 bit": lambda mask: mask,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["000_mask.png", "000.png", "000_mask.TIF", "000.TIFF"])
def test_a_mask_may_have_any_format_and_name(tiny_category: Make, kind: str, name: str) -> None:
    folder = tiny_category(crack=2)
    truth = truth_of(folder.parent, "part/test/crack/000.png")
    (folder / "ground_truth/crack/000_mask.png").unlink()
    write_mask(folder / "ground_truth/crack" / name, KINDS[kind](truth))
    assert np.array_equal(joined(run(folder))["part/test/crack/000.png"], truth)


def test_exif_is_applied_to_image_and_mask(tiny_category: Make) -> None:
    folder = tiny_category(crack=2)
    exif = Image.Exif()
    exif[0x0112] = 6
    truth = truth_of(folder.parent, "part/test/crack/000.png")
    for path in (folder / "test/crack/000.png", folder / "test/crack/001.png", folder / "test/good/000.png"):
        picture = Image.open(path)
        picture.load()
        path.unlink()
        picture.save(path.with_suffix(".jpg") if "001" in path.name else path, exif=exif)
    write_mask(folder / "ground_truth/crack/000_mask.png", np.rot90(truth, -1) * np.uint8(255))  # drawn upright
    lying = truth_of(folder.parent, "part/test/crack/001.png")
    write_mask(folder / "ground_truth/crack/001_mask.png", lying * np.uint8(255), exif=exif)  # turned as its image is
    prepared = run(folder)
    found = joined(prepared)
    assert np.array_equal(found["part/test/crack/000.png"], np.rot90(truth, -1))
    assert np.array_equal(found["part/test/crack/001.jpg"], np.rot90(lying, -1))
    assert found["part/test/good/000.png"].all()
    turned = [image for image in records(prepared) if (image["width"], image["height"]) == (14, 18)]
    assert len(turned) == 3


# Records


def test_records_have_the_documented_fields(tiny_category: Make) -> None:
    prepared = run(tiny_category(good=3, crack=2, hole=2))
    images, annotations = records(prepared), records(prepared, "annotations")
    assert sorted(image["id"] for image in images) == list(range(1, 8))
    assert len({record["id"] for record in annotations}) == len(annotations)
    for image in images:
        assert list(image) == ["id", "file_name", "width", "height", "original_file", "defect_type"]
        assert (image["width"], image["height"]) == (18, 14)
        assert image["original_file"].split("/")[:3] == ["part", "test", image["defect_type"]]
    for record in annotations:
        assert record["iscrowd"] == 0
        assert record["category_id"] in (1, 2)
    for split in ("train", "val"):
        found = content(prepared, split)
        assert found["categories"] == [{"id": 1, "name": "good"}, {"id": 2, "name": "defect"}]
        listed = {image["file_name"] for image in found["images"]}
        assert listed == {path.name for path in (prepared.dataset_dir / split / "images").iterdir()}
        assert {record["image_id"] for record in found["annotations"]} == {image["id"] for image in found["images"]}


def test_a_good_image_has_one_instance_that_covers_it_or_none(tiny_category: Make) -> None:
    folder = tiny_category()
    for good_as in ("instance", "empty"):
        prepared = run(folder, good_as=good_as, overwrite=True)
        good = {image["id"] for image in records(prepared) if image["defect_type"] == "good"}
        marks = [record for record in records(prepared, "annotations") if record["image_id"] in good]
        assert len(good) == 4
        assert [record["category_id"] for record in marks] == [1] * len(marks)
        assert len(marks) == (4 if good_as == "instance" else 0)
        assert all(record["segmentation"] == [[0, 0, 18, 0, 18, 14, 0, 14]] for record in marks)
        assert content(prepared, "val")["categories"][0] == {"id": 1, "name": "good"}


def test_each_type_can_be_a_separate_class(tiny_category: Make) -> None:
    prepared = run(tiny_category(hole=2, crack=2, scratch=1), classes="type")
    for split in ("train", "val"):  # the same in both splits, even if one has no scratch
        categories = content(prepared, split)["categories"]
        assert [(one["id"], one["name"]) for one in categories] == [
            (1, "good"),
            (2, "crack"),
            (3, "hole"),
            (4, "scratch"),
        ]
    names = {1: "good", 2: "crack", 3: "hole", 4: "scratch"}
    types = {image["id"]: image["defect_type"] for image in records(prepared)}
    for record in records(prepared, "annotations"):
        assert names[record["category_id"]] == types[record["image_id"]]


def test_good_training_images_are_used_on_request(tiny_category: Make) -> None:
    folder = tiny_category(good=3, train_good=4)
    assert run(folder).train["good"] + run(folder).val["good"] == 3
    prepared = run(folder, good_images="all", overwrite=True)
    assert prepared.train["good"] + prepared.val["good"] == 7
    originals = {image["original_file"] for image in records(prepared)}
    assert {f"part/train/good/{number:03d}.png" for number in range(4)} < originals


# Files


@pytest.mark.parametrize("link", ["copy", "hardlink", "symlink"])
def test_images_are_copied_or_linked_byte_for_byte(tiny_category: Make, link: str) -> None:
    folder = tiny_category()
    Image.open(folder / "test/good/000.png").save(folder / "test/good/photo.JPG")
    prepared = run(folder, link=link)
    found = sides(prepared)
    assert len(found) == 10
    for image in records(prepared):
        source = folder.parent / image["original_file"]
        path = prepared.dataset_dir / found[image["original_file"]] / "images" / image["file_name"]
        assert path.read_bytes() == source.read_bytes()
        assert path.suffix == source.suffix
        assert path.is_symlink() == (link == "symlink")
        assert path.samefile(source) == (link != "copy")


def test_images_with_the_same_name_get_different_names(tmp_path: Path) -> None:
    folder = tmp_path / "mvtec" / "part"
    names = ["a/b_c", "a_b/c", "good/x", "a/b_c-2", "a/B_C"]
    for seed, name in enumerate(names):
        draw_image(folder / f"test/{name}.png", seed)
        write_mask(folder / f"ground_truth/{name}_mask.png", np.eye(14, 18, seed) > 0)
    draw_image(folder / "train/good/x.png", 9)
    prepared = run(folder, good_images="all")
    assert len(records(prepared)) == 6
    assert len({image["file_name"].lower() for image in records(prepared)}) == 6
    found = sides(prepared)
    for image in records(prepared):
        path = prepared.dataset_dir / found[image["original_file"]] / "images" / image["file_name"]
        assert path.read_bytes() == (folder.parent / image["original_file"]).read_bytes()
    truths = joined(prepared)
    for seed, name in enumerate(names):
        if "good" not in name:
            assert np.array_equal(truths[f"part/test/{name}.png"], np.eye(14, 18, seed) > 0)


def test_dataset_info_says_what_was_made_from_what(tiny_category: Make) -> None:
    prepared = run(tiny_category(), seed=7)
    found = info(prepared)
    assert found["made_by"] == "flawmask prepare"
    assert found["settings"] == {
        "seed": 7,
        "layout": "mvtec",
        "images": None,
        "masks": None,
        "mask_suffix": None,
        "good_name": None,
        "keep_split": False,
        "intensity": "auto",
        "mask_values": "auto",
        "mask_classes": None,
        "exif_masks": None,
        "train_ratio": 0.8,
        "test_ratio": 0.0,
        "folds": 1,
        "fold": None,
        "good_images": "test",
        "good_as": "instance",
        "instances": "component",
        "classes": "defect",
        "group_by": None,
        "link": "copy",
        "on_error": "stop",
    }
    assert found["source"]["category"] == "part"
    assert found["left_out"] == []
    assert (
        found["train"]
        == prepared.train
        == {
            "images": 6,
            "good": 3,
            "defective": 3,
            "by_type": {"crack": 2, "good": 3, "hole": 1},
        }
    )
    assert found["val"]["images"] == 3
    assert not prepared.reused
