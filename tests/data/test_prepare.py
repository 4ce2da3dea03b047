"""Prepare: every mask comes through exactly, every image byte for byte, and bad input leaves nothing behind."""

import json
import logging
import math
import os
import shutil
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from pycocotools.coco import COCO
from scipy import ndimage

from flawmask import masks
from flawmask.coco import annotation
from flawmask.data.prepare import PrepareConfig, Prepared, prepare
from flawmask.errors import FlawmaskError

Make = Callable[..., Path]
Digests = Callable[[Path], dict[str, str]]
Array = npt.NDArray[Any]


def run(category: Path, /, **settings: Any) -> Prepared:
    output = category.parents[1] / "out" / category.name
    given = {"mvtec_root": category.parent, "category": category.name, "output_dir": output, **settings}
    return prepare(PrepareConfig(**given))


def content(prepared: Prepared, split: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((prepared.dataset_dir / split / "annotations.json").read_text())
    return found


def info(prepared: Prepared) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((prepared.dataset_dir / "dataset_info.json").read_text())
    return found


def records(prepared: Prepared, key: str = "images") -> list[dict[str, Any]]:
    return [record for split in ("train", "val") for record in content(prepared, split)[key]]


def joined(prepared: Prepared) -> dict[str, Array]:
    """Return the union of each image's annotations, decoded by pycocotools, by its original file."""
    unions = {}
    for split in ("train", "val"):
        coco = COCO(str(prepared.dataset_dir / split / "annotations.json"))
        for image in coco.dataset["images"]:
            union = np.zeros((image["height"], image["width"]), dtype=bool)
            for record in coco.imgToAnns[image["id"]]:
                mask = coco.annToMask(record).astype(bool)
                assert record["area"] == mask.sum()
                rows, columns = np.nonzero(mask)
                box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
                assert record["bbox"] == box
                union |= mask
            unions[image["original_file"]] = union
    return unions


def truth_of(root: Path, original_file: str) -> Array:
    """Return the ground truth read by OpenCV, for a mask named as MVTec names it; all of a good image."""
    path = root / original_file
    category, kind = path.parents[2], path.parent.name
    if kind == "good":
        image = cv2.imread(str(path))
        assert image is not None
        return np.ones(image.shape[:2], dtype=bool)
    mask = cv2.imread(str(category / "ground_truth" / kind / f"{path.stem}_mask.png"), cv2.IMREAD_GRAYSCALE)
    assert mask is not None
    return np.asarray(mask > 127)


def sides(prepared: Prepared) -> dict[str, str]:
    return {image["original_file"]: split for split in ("train", "val") for image in content(prepared, split)["images"]}


def draw_image(path: Path, seed: int, size: tuple[int, int] = (14, 18)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


# Masks


@pytest.mark.parametrize("place", ["mvtec_ad_sample/bottle", "magnetic_tile"])
def test_every_mask_of_the_real_images_comes_through_exactly(shared_data: Path, tmp_path: Path, place: str) -> None:
    root = (shared_data / place).parent
    name = Path(place).name
    prepared = prepare(PrepareConfig(mvtec_root=root, category=name, output_dir=tmp_path / "out"))
    found = joined(prepared)
    assert len(found) == {"bottle": 17, "magnetic_tile": 473}[name]
    for original_file, union in found.items():
        truth = truth_of(root, original_file)
        assert union.shape == truth.shape
        assert (union & truth).sum() / (union | truth).sum() == 1.0, original_file


@pytest.mark.parametrize("instances", ["component", "image"])
def test_noisy_masks_come_through_exactly(tiny_category: Make, instances: str) -> None:
    folder = tiny_category(crack=6)
    for name, union in joined(run(folder, instances=instances)).items():
        assert np.array_equal(union, truth_of(folder.parent, name))


@pytest.mark.parametrize("instances", ["component", "image"])
def test_an_instance_is_a_connected_region_or_all_of_the_mask(tiny_category: Make, instances: str) -> None:
    folder = tiny_category(crack=4)
    prepared = run(folder, instances=instances)
    counts = Counter(record["image_id"] for record in records(prepared, "annotations"))
    for image in records(prepared):
        truth = truth_of(folder.parent, image["original_file"])
        regions = ndimage.label(truth, structure=np.ones((3, 3)))[1]
        assert counts[image["id"]] == (regions if instances == "component" else 1)


def test_annotations_are_those_of_each_region_laid_out_on_its_own_in_reading_order(tiny_category: Make) -> None:
    folder = tiny_category(good=2, crack=8)
    bowl = np.zeros((14, 18), np.uint8)  # begins behind the dot in it, and has the leftmost of the upper pixels
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


@pytest.mark.parametrize("cores", [1, 7, None])
def test_the_number_of_cores_changes_nothing(
    tiny_category: Make, digests: Digests, monkeypatch: pytest.MonkeyPatch, cores: int | None
) -> None:
    folder = tiny_category(good=9, crack=9)
    expected = digests(run(folder).dataset_dir)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert digests(run(folder, overwrite=True).dataset_dir) == expected


def test_memory_does_not_grow_with_the_number_of_images(tiny_category: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # how many images meet in memory is else a matter of chance
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
    assert peaks[1] - peaks[0] < 2 * 3 * side * side, "twenty images more, and not even two of them in memory"


def write_mask(path: Path, pixels: Array, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


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
def test_a_mask_may_be_of_any_kind_and_name(tiny_category: Make, kind: str, name: str) -> None:
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


def test_records_hold_what_the_design_says(tiny_category: Make) -> None:
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


def test_a_good_image_carries_one_instance_of_all_of_it_or_none(tiny_category: Make) -> None:
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


def test_each_type_can_be_a_class_of_its_own(tiny_category: Make) -> None:
    prepared = run(tiny_category(hole=2, crack=2, scratch=1), classes="type")
    for split in ("train", "val"):  # the same, even where a split has no scratch
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


def test_the_good_images_of_train_take_part_when_asked_for(tiny_category: Make) -> None:
    folder = tiny_category(good=3, train_good=4)
    assert run(folder).train["good"] + run(folder).val["good"] == 3
    prepared = run(folder, good_images="all", overwrite=True)
    assert prepared.train["good"] + prepared.val["good"] == 7
    originals = {image["original_file"] for image in records(prepared)}
    assert {f"part/train/good/{number:03d}.png" for number in range(4)} < originals


# Files


@pytest.mark.parametrize("link", ["copy", "hardlink", "symlink"])
def test_images_arrive_byte_for_byte(tiny_category: Make, link: str) -> None:
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


def test_names_that_would_clash_are_kept_apart(tmp_path: Path) -> None:
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


# The split


def test_the_split_is_stratified_and_seeded(tiny_category: Make) -> None:
    folder = tiny_category(good=10, crack=5, hole=2, scratch=1)
    prepared = run(folder)
    assert prepared.train["by_type"] == {"crack": 4, "good": 8, "hole": 1, "scratch": 1}
    assert prepared.val["by_type"] == {"crack": 1, "good": 2, "hole": 1}
    drawn = [sides(run(folder, seed=seed, overwrite=True)) for seed in (0, 1, 2, 0)]
    assert drawn[0] == drawn[3]
    assert drawn[0] != drawn[1] or drawn[1] != drawn[2]
    half = run(folder, train_ratio=0.5, overwrite=True)
    assert half.train["by_type"] == {"crack": 3, "good": 5, "hole": 1, "scratch": 1}


def test_images_with_identical_bytes_are_on_one_side(tiny_category: Make) -> None:
    folder = tiny_category(good=6, train_good=2)
    shutil.copy(folder / "test/good/000.png", folder / "train/good/000.png")
    shutil.copy(folder / "test/good/000.png", folder / "test/good/005.png")
    seen = set()
    for seed in range(8):
        found = sides(run(folder, seed=seed, good_images="all", train_ratio=0.5, overwrite=True))
        same = {found[f"part/{place}"] for place in ("test/good/000.png", "train/good/000.png", "test/good/005.png")}
        assert len(same) == 1
        seen |= same
    assert seen == {"train", "val"}, "the seeds never moved the pair: the test would pass by luck"


def test_the_identical_bottles_are_on_one_side(shared_data: Path, tmp_path: Path) -> None:
    for seed in range(3):
        found = sides(
            prepare(
                PrepareConfig(
                    mvtec_root=shared_data / "mvtec_ad_sample",
                    category="bottle",
                    output_dir=tmp_path / str(seed),
                    seed=seed,
                    train_ratio=0.5,
                )
            )
        )
        assert found["bottle/test/good/002.png"] == found["bottle/test/good/008.png"]


@pytest.mark.parametrize(("pattern", "key"), [(r"^part\d+", 0), (r"part(\d+)_view\d", 0), (r"view(\d)", 1)])
def test_file_names_in_which_the_pattern_finds_the_same_stay_together(tmp_path: Path, pattern: str, key: int) -> None:
    folder = tmp_path / "mvtec" / "tile"
    for part in range(6):
        for view in range(3):
            name = f"part{part}_view{view}"
            kind = "good" if (part + view) % 2 else "crack"  # a part's views are of both types
            draw_image(folder / f"test/{kind}/{name}.png", 10 * part + view)
            if kind == "crack":
                write_mask(folder / f"ground_truth/crack/{name}.png", np.eye(14, 18) > 0)
    for seed in range(3):
        found = sides(run(folder, group_by=pattern, seed=seed, train_ratio=0.6, overwrite=True))
        groups: dict[str, set[str]] = {}
        for original_file, side in found.items():
            groups.setdefault(Path(original_file).stem.split("_")[key], set()).add(side)
        assert all(len(side) == 1 for side in groups.values())
        assert set().union(*groups.values()) == {"train", "val"}


def test_a_name_without_the_pattern_is_a_group_of_its_own(tiny_category: Make) -> None:
    folder = tiny_category(good=10, crack=4)
    plain = run(folder)
    assert run(folder, group_by="nowhere", overwrite=True).train == plain.train


# What is made, and made again


def test_a_test_split_is_held_back_first(tiny_category: Make) -> None:
    folder = tiny_category(good=10, crack=10)
    made = run(folder, test_ratio=0.3, train_ratio=0.7)
    assert made.test is not None
    splits = ("train", "val", "test")
    found = {name: [image["original_file"] for image in content(made, name)["images"]] for name in splits}
    assert [len(found[name]) for name in splits] == [10, 4, 6]
    assert len(set().union(*found.values())) == 20
    assert (made.train["by_type"], made.test["by_type"]) == ({"crack": 5, "good": 5}, {"crack": 3, "good": 3})
    assert info(made)["test"] == made.test
    without = run(folder, test_ratio=0.0, overwrite=True)
    assert without.test is None
    assert not (without.dataset_dir / "test").exists()


def test_the_folds_hold_every_image_back_once_and_train_on_all_others(tiny_category: Make) -> None:
    folder = tiny_category(good=7, crack=6, hole=3)
    held: list[str] = []
    for fold in (1, 2, 3):
        made = run(folder, folds=3, fold=fold, output_dir=folder.parents[1] / f"fold{fold}")
        train, val = ([image["original_file"] for image in content(made, name)["images"]] for name in ("train", "val"))
        assert len(train) + len(val) == 16
        assert not set(train) & set(val)
        assert {Path(name).parent.name for name in val} == {"good", "crack", "hole"}
        held += val
    assert len(held) == len(set(held)) == 16


def test_folds_leave_the_test_split_alone(tiny_category: Make) -> None:
    folder = tiny_category(good=10, crack=10)
    tests = []
    for fold in (1, 2):
        made = run(folder, folds=2, fold=fold, test_ratio=0.2, output_dir=folder.parents[1] / f"fold{fold}")
        tests.append([image["original_file"] for image in content(made, "test")["images"]])
    assert tests[0] == tests[1]
    assert len(tests[0]) == 4


def test_a_type_with_fewer_images_than_folds_is_pointed_out(
    tiny_category: Make, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_category(good=6, crack=6, hole=2)
    run(folder, folds=3, fold=1)
    assert "hole: 2 images (or groups) for 3 folds: some folds judge without it" in caplog.text
    assert "crack" not in caplog.text


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"folds": 50, "fold": 1}, "--folds 50: there are only 9 images"),
        ({"folds": 3}, "--folds 3 needs --fold"),
        ({"folds": 3, "fold": 4}, "--fold is 4"),
        ({"folds": 3, "fold": 0}, "--fold is 0"),
        ({"fold": 1}, "folds 2 or more"),
        ({"folds": 0}, "--folds is 0"),
        ({"test_ratio": 1.0}, "--test_ratio is 1.0"),
        ({"test_ratio": -0.1}, "--test_ratio is -0.1"),
        ({"test_ratio": math.nan}, "--test_ratio is nan"),
    ],
)
def test_folds_and_test_ratios_that_make_no_sense_are_refused(
    tiny_category: Make, settings: dict[str, Any], says: str
) -> None:
    folder = tiny_category()
    with pytest.raises(FlawmaskError, match=says):
        run(folder, **settings)
    assert not (folder.parents[1] / "out").exists()


def test_dataset_info_says_what_was_made_from_what(tiny_category: Make) -> None:
    prepared = run(tiny_category(), seed=7)
    found = info(prepared)
    assert found["made_by"] == "flawmask prepare"
    assert found["settings"] == {
        "seed": 7,
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


def times(folder: Path) -> dict[str, int]:
    return {path.as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_same_images_and_settings_are_reused_and_nothing_is_touched(
    tiny_category: Make, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_category()
    first = run(folder)
    before = times(first.dataset_dir)
    with caplog.at_level(logging.INFO, "flawmask"):
        second = run(folder)
    assert second.reused
    assert (second.train, second.val, second.left_out) == (first.train, first.val, first.left_out)
    assert times(first.dataset_dir) == before
    assert "reused" in caplog.text


def test_the_same_images_and_settings_give_the_same_bytes(tiny_category: Make, digests: Digests) -> None:
    folder = tiny_category()
    made = [run(folder, output_dir=folder.parents[1] / name).dataset_dir for name in ("a", "b")]
    assert digests(made[0]) == digests(made[1])


def change_image(folder: Path) -> dict[str, Any]:
    draw_image(folder / "test/good/001.png", 99)
    return {}


def change_mask(folder: Path) -> dict[str, Any]:
    write_mask(folder / "ground_truth/crack/001_mask.png", np.eye(14, 18) > 0)
    return {}


def add_image(folder: Path) -> dict[str, Any]:
    draw_image(folder / "test/good/new.png", 99)
    return {}


CHANGES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "an image": change_image,
    "a mask": change_mask,
    "another image": add_image,
    "the seed": lambda folder: {"seed": 0},
    "the ratio": lambda folder: {"train_ratio": 0.5},
    "the classes": lambda folder: {"classes": "type"},
    "good": lambda folder: {"good_as": "empty"},
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_was_made_otherwise_is_refused_without_overwrite_and_replaced_with_it(
    tiny_category: Make, digests: Digests, what: str
) -> None:
    folder = tiny_category()
    made = run(folder).dataset_dir
    before = digests(made)
    settings = CHANGES[what](folder)
    with pytest.raises(FlawmaskError, match="--overwrite") as caught:
        run(folder, **settings)
    assert str(made) in str(caught.value)
    assert digests(made) == before
    assert not run(folder, **settings, overwrite=True).reused
    assert digests(made) != before
    assert run(folder, **settings).reused


def test_overwrite_makes_a_damaged_data_set_anew(tiny_category: Make, digests: Digests) -> None:
    folder = tiny_category()
    made = run(folder).dataset_dir
    before = digests(made)
    next((made / "train/images").iterdir()).unlink()
    assert not run(folder, overwrite=True).reused
    assert digests(made) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["photo.png", "dataset_info.json"])
def test_a_folder_that_holds_something_else_is_never_touched(
    tiny_category: Make, digests: Digests, name: str, overwrite: bool
) -> None:
    folder = tiny_category()
    output = folder.parents[1] / "out" / "part"
    output.mkdir(parents=True)
    (output / name).write_text('{"made_by": "flawmask augment"}')
    before = digests(folder.parents[1])
    with pytest.raises(FlawmaskError, match="holds something else"):
        run(folder, overwrite=overwrite)
    assert digests(folder.parents[1]) == before


@pytest.mark.parametrize("there", [False, True])
def test_when_writing_fails_half_way_nothing_is_left_or_lost(
    tiny_category: Make, digests: Digests, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    folder = tiny_category()
    if there:
        run(folder)
    before = digests(folder.parents[1])
    copies: list[Any] = []
    copyfile = shutil.copyfile

    def fail(source: Path, target: Path) -> Path:
        copies.append(target)
        if len(copies) == 3:
            raise OSError("the disk is full")
        return copyfile(source, target)

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(OSError, match="full"):
        run(folder, seed=1, overwrite=True)
    assert len(copies) >= 3  # other threads may have begun another
    assert digests(folder.parents[1]) == before
    if (folder.parents[1] / "out").is_dir():
        assert [path.name for path in (folder.parents[1] / "out").iterdir()] == (["part"] if there else [])


# Bad input


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def replace_by_link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a truncated image": (lambda folder: cut_in_half(folder / "test/hole/000.png"), "test/hole/000.png"),
    "a truncated good image": (lambda folder: cut_in_half(folder / "test/good/001.png"), "test/good/001.png"),
    "a text file": (lambda folder: (folder / "test/good/001.png").write_text("text"), "test/good/001.png"),
    "a link that leads nowhere": (
        lambda folder: replace_by_link(folder / "test/good/001.png", "gone.png"),
        "test/good/001.png cannot be opened",
    ),
    "a link that loops": (
        lambda folder: replace_by_link(folder / "test/good/001.png", "001.png"),
        "test/good/001.png cannot be opened",
    ),
    "an empty file": (lambda folder: (folder / "test/crack/001.png").write_text(""), "test/crack/001.png"),
    "no mask": (lambda folder: (folder / "ground_truth/crack/001_mask.png").unlink(), "test/crack/001.png has no mask"),
    "an empty mask": (
        lambda folder: write_mask(folder / "ground_truth/crack/001_mask.png", np.zeros((14, 18), np.uint8)),
        "ground_truth/crack/001_mask.png has no defect pixel",
    ),
    "a mask of another size": (
        lambda folder: write_mask(folder / "ground_truth/crack/001_mask.png", np.ones((18, 14), np.uint8)),
        "ground_truth/crack/001_mask.png is 14x18 but its image is 18x14",
    ),
    "a truncated mask": (
        lambda folder: cut_in_half(folder / "ground_truth/hole/001_mask.png"),
        "ground_truth/hole/001_mask.png",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_stops_before_anything_is_written(tiny_category: Make, digests: Digests, what: str) -> None:
    folder = tiny_category()
    damage, message = BAD[what]
    damage(folder)
    before = digests(folder.parents[1])
    with pytest.raises(FlawmaskError) as caught:
        run(folder)
    assert message in str(caught.value)
    assert "--on_error skip" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert digests(folder.parents[1]) == before
    assert not (folder.parents[1] / "out").exists()


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_is_left_out_and_listed_when_asked_for(
    tiny_category: Make, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    folder = tiny_category()
    damage, message = BAD[what]
    damage(folder)
    prepared = run(folder, on_error="skip")
    assert prepared.train["images"] + prepared.val["images"] == 8
    (left_out,) = info(prepared)["left_out"]
    assert prepared.left_out == [left_out]
    assert message in left_out["reason"]
    assert left_out["reason"] in caplog.text
    path = folder.parent / left_out["file"]
    assert path.is_file() or path.is_symlink()
    assert left_out["file"] not in sides(prepared)
    assert run(folder, on_error="skip").left_out == [left_out]  # reused


def test_masks_that_seem_to_be_inverted_are_pointed_out(tiny_category: Make, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny_category()
    run(folder)
    assert "invert" not in caplog.text
    mask = np.full((14, 18), 255, np.uint8)
    mask[3:6, 4:9] = 0
    write_mask(folder / "ground_truth/crack/001_mask.png", mask)
    write_mask(folder / "ground_truth/hole/001_mask.png", np.full((14, 18), 255, np.uint8))
    run(folder, overwrite=True)
    assert f"2 masks are white in all four corners, {folder / 'ground_truth/crack/001_mask.png'} for one" in caplog.text


def test_several_bad_files_are_counted(tiny_category: Make) -> None:
    folder = tiny_category()
    for name in ("crack/000", "crack/002", "good/003"):
        cut_in_half(folder / f"test/{name}.png")
    with pytest.raises(FlawmaskError, match="3 files are bad"):
        run(folder)
    assert len(run(folder, on_error="skip").left_out) == 3


def test_a_type_whose_images_are_all_bad_is_left_out_and_keeps_its_class(tiny_category: Make) -> None:
    folder = tiny_category(crack=3, dent=2, hole=2)
    for path in (folder / "test/dent").iterdir():
        cut_in_half(path)
    prepared = run(folder, on_error="skip", classes="type")
    assert "dent" not in prepared.train["by_type"] | prepared.val["by_type"]
    assert [one["name"] for one in content(prepared, "train")["categories"]] == ["good", "crack", "dent", "hole"]


@pytest.mark.parametrize("pattern", ["test/*/*.png", "test/[ch]*/*.png"])
def test_where_all_defective_images_are_bad_there_is_nothing_to_skip_to(tiny_category: Make, pattern: str) -> None:
    folder = tiny_category()
    for path in folder.glob(pattern):
        cut_in_half(path)
    with pytest.raises(FlawmaskError, match="no defective image is left"):
        run(folder, on_error="skip")
    assert not (folder.parents[1] / "out").exists()


def test_a_category_without_defects_is_refused(tiny_category: Make) -> None:
    folder = tiny_category()
    for kind in ("crack", "hole"):
        shutil.rmtree(folder / "test" / kind)
    with pytest.raises(FlawmaskError, match="holds no defective image"):
        run(folder)
    assert not (folder.parents[1] / "out").exists()


def test_what_is_missing_is_refused_with_nothing_written(tiny_category: Make) -> None:
    folder = tiny_category()
    (folder.parent / "empty/test/crack").mkdir(parents=True)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"category": "none"}, "has no category none: it has empty, part"),
        ({"category": "empty"}, "holds no image"),
        ({"mvtec_root": folder.parent / "none"}, "is no folder"),
    ]
    for settings, message in bad:
        with pytest.raises(FlawmaskError, match=message) as caught:
            run(folder, **settings)
        assert "\n" not in str(caught.value)
    assert not (folder.parents[1] / "out").exists()


def test_where_nothing_could_validate_the_category_is_refused(tiny_category: Make) -> None:
    with pytest.raises(FlawmaskError, match="none is left for validation"):
        run(tiny_category(good=1, crack=1))


@pytest.mark.parametrize("ratio", [0, 1, -1, 1.5, math.nan, math.inf])
def test_a_ratio_outside_0_to_1_is_refused(ratio: float) -> None:
    with pytest.raises(FlawmaskError, match="--train_ratio"):
        PrepareConfig(category="part", train_ratio=ratio)


def test_other_settings_that_make_no_sense_are_refused() -> None:
    bad: list[tuple[dict[str, Any], str]] = [({"group_by": "("}, "--group_by"), ({"seed": -1}, "--seed")]
    for settings, message in bad:
        with pytest.raises(FlawmaskError, match=message) as caught:
            PrepareConfig(category="part", **settings)
        assert "\n" not in str(caught.value)


def test_a_hard_link_to_another_disk_says_what_to_do(tiny_category: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_category()

    def refuse(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(FlawmaskError, match="use --link copy"):
        run(folder, link="hardlink")
    assert list((folder.parents[1] / "out").iterdir()) == []


def test_the_source_is_never_changed(tiny_category: Make, digests: Digests) -> None:
    folder = tiny_category(train_good=2)
    before = digests(folder)
    for link in ("copy", "hardlink", "symlink"):
        run(folder, link=link, good_images="all", overwrite=True)
    assert digests(folder) == before


def test_a_library_call_prints_nothing(tiny_category: Make, capfd: pytest.CaptureFixture[str]) -> None:
    run(tiny_category())
    assert capfd.readouterr() == ("", "")


def test_the_output_goes_where_the_readme_says(tiny_category: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_category()
    monkeypatch.chdir(folder.parents[1])
    made = prepare(PrepareConfig(mvtec_root=Path("mvtec"), category="part"))
    assert made.dataset_dir == Path("datasets/maskrcnn_mvtec_part")
    assert (made.dataset_dir / "dataset_info.json").is_file()
