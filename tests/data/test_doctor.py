"""The doctor: every planted fault is reported, a clean folder has no problem, and nothing makes the doctor fail."""

import json
import logging
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from rich.console import Console

from flawmask import cli
from flawmask.coco import annotation, write_split
from flawmask.data.doctor import Count, DoctorConfig, Report, Size, examine
from flawmask.data.doctor_tables import tables
from flawmask.data.layouts import Problem
from flawmask.draw import Picture
from flawmask.errors import FlawmaskError
from flawmask.files import read_json, write_json
from flawmask.images import read_image, write_png
from flawmask.masks import Mask

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
CATEGORIES = [{"id": 1, "name": "good"}, {"id": 2, "name": "defect"}]
SIDE = 48


def picture(seed: int) -> Picture:
    """Return soft grey clouds that use the whole range. Like a photo and unlike noise, they survive a JPEG."""
    clouds = cv2.GaussianBlur(np.random.default_rng(seed).random((SIDE, SIDE)), (0, 0), 1.5)
    grey = cv2.normalize(clouds, clouds, 0, 255, cv2.NORM_MINMAX)
    return np.repeat(grey[:, :, None], 3, axis=2).astype(np.uint8)


def blob(side: int = SIDE) -> Mask:
    mask = np.zeros((side, side), dtype=bool)
    mask[10:20, 12:25] = True
    return mask


def check(folder: Path, **settings: Any) -> Report:
    is_coco = (folder / "train" / "annotations.json").exists()
    where: dict[str, Any] = (
        {"dataset_dir": folder} if is_coco else {"mvtec_root": folder.parent, "category": folder.name}
    )
    return examine(DoctorConfig(**{"sheet_images": 0, **where, **settings}))


def problems_of(report: Report) -> list[tuple[str, str, str]]:
    return [(problem.severity, problem.kind, problem.where) for problem in report.problems]


@pytest.fixture
def category(tmp_path: Path) -> Path:
    """A clean category: 3 good and 2 x 2 defective images in test, 2 good ones in train."""
    root = tmp_path / "part"
    names = [f"test/{kind}/{number}" for kind in ("crack", "hole") for number in range(2)]
    names += [f"test/good/{number}" for number in range(3)] + [f"train/good/{number}" for number in range(2)]
    for seed, name in enumerate(names):
        write_png(root / f"{name}.png", picture(seed))
        if "good" not in name:
            write_png(root / f"{name.replace('test', 'ground_truth')}_mask.png", blob().astype(np.uint8) * 255)
    return root


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A clean COCO folder: in each split a good image and two defective ones."""
    for split, seed in [("train", 0), ("val", 10)]:
        images, annotations = [], []
        for number in range(1, 4):
            kind = "good" if number == 1 else "crack"
            write_png(tmp_path / "set" / split / "images" / f"{number}.png", picture(seed + number))
            size = {"width": SIDE, "height": SIDE}
            images.append({"id": number, "file_name": f"{number}.png", **size, "defect_type": kind})
            mask = np.ones((SIDE, SIDE), dtype=bool) if kind == "good" else blob()
            annotations.append(annotation(mask, id=number, image_id=number, category_id=1 if kind == "good" else 2))
        write_split(tmp_path / "set" / split, images, annotations, CATEGORIES)
    return tmp_path / "set"


def edit(dataset: Path, change: Callable[[dict[str, Any]], object], split: str = "train") -> None:
    path = dataset / split / "annotations.json"
    content = read_json(path)
    change(content)
    write_json(path, content)


# A category


def test_a_clean_category_has_no_problem_and_is_counted(category: Path) -> None:
    report = check(category)
    assert report.problems == ()
    assert report.name == "part"
    assert report.counts == (
        Count("test", "crack", 2, 2, 2),
        Count("test", "good", 3, 0, 0),
        Count("test", "hole", 2, 2, 2),
        Count("train", "good", 2, 0, 0),
    )
    assert report.sizes == (Size(SIDE, SIDE, 9),)
    assert report.contact_sheet is None
    assert sum(count.images for count in check(category, good_images="test").counts) == 7


def test_instances_are_connected_regions(category: Path) -> None:
    mask = blob()
    mask[40:44, 40:44] = True
    write_png(category / "ground_truth/crack/0_mask.png", mask.astype(np.uint8) * 255)
    assert check(category).counts[0] == Count("test", "crack", 2, 2, 3)


def test_a_missing_mask_is_reported(category: Path) -> None:
    (category / "ground_truth/crack/1_mask.png").unlink()
    report = check(category)
    assert problems_of(report) == [("error", "mask missing", "part/test/crack/1.png")]
    assert "ground_truth/crack/1_mask.png" in report.problems[0].message


MASKS: dict[str, tuple[Any, tuple[str, str]]] = {
    "empty": (np.zeros((SIDE, SIDE), np.uint8), ("error", "mask empty")),
    "of another size": (np.full((30, 40), 255, np.uint8), ("error", "mask size")),
    "of three values": (blob().astype(np.uint8) * 255 - blob().T.astype(np.uint8) * 55, ("warning", "mask not binary")),
    "inverted": (np.where(blob(), 0, 255).astype(np.uint8), ("warning", "mask inverted")),
    "all white": (np.full((SIDE, SIDE), 255, np.uint8), ("warning", "mask inverted")),
    "without black": (np.where(blob(), 255, 9).astype(np.uint8), ("warning", "mask not binary")),
}


@pytest.mark.parametrize("what", MASKS)
def test_a_bad_mask_is_reported(category: Path, what: str) -> None:
    pixels, problem = MASKS[what]
    write_png(category / "ground_truth/hole/0_mask.png", pixels)
    assert problems_of(check(category)) == [(*problem, "part/ground_truth/hole/0_mask.png")]


@pytest.mark.parametrize("values", [(0, 1), (0, 200), (0, 65535)])
def test_a_mask_with_0_and_one_other_value_is_binary(category: Path, values: tuple[int, int]) -> None:
    pixels = np.where(blob(), *values[::-1])
    deep = max(values) > 255
    path = category / "ground_truth/hole/0_mask.png"
    write_png(path, pixels.astype(np.uint16) if deep else pixels.astype(np.uint8))
    assert check(category).problems == ()


@pytest.mark.parametrize("name", ["test/crack/0.png", "test/good/1.png", "ground_truth/crack/0_mask.png"])
def test_a_truncated_file_is_reported_and_the_rest_still_checked(category: Path, name: str) -> None:
    data = (category / name).read_bytes()
    (category / name).write_bytes(data[: len(data) // 2])
    report = check(category, sheet_images=9, contact_sheet=category.parent / "sheet.png")
    assert problems_of(report) == [("error", "unreadable image", f"part/{name}")]
    assert str(category) not in report.problems[0].message
    assert sum(count.images for count in report.counts) == 9


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission_is_reported(category: Path) -> None:
    (category / "test/good/1.png").chmod(0)
    assert problems_of(check(category)) == [("error", "unreadable image", "part/test/good/1.png")]


def test_masks_without_an_image_are_reported(category: Path) -> None:
    write_png(category / "ground_truth/crack/7_mask.png", blob().astype(np.uint8) * 255)
    write_png(category / "ground_truth/dent/0_mask.png", blob().astype(np.uint8) * 255)
    assert problems_of(check(category)) == [
        ("warning", "orphan masks", "part/ground_truth/crack/7_mask.png"),
        ("warning", "orphan masks", "part/ground_truth/dent"),
    ]


def test_several_masks_of_one_image_are_reported_and_the_rest_still_checked(category: Path) -> None:
    write_png(category / "ground_truth/crack/0_mask.tif", np.zeros((SIDE, SIDE), np.uint8))
    report = check(category)
    assert problems_of(report) == [
        ("error", "mask empty", "part/ground_truth/crack/0_mask.tif"),
        ("error", "masks of one image", "part/ground_truth/crack/0_mask.tif"),
    ]
    assert report.problems[1].message == "and 0_mask.png are masks of one image: take one of them out"
    assert sum(count.images for count in report.counts) == 9


def test_a_defect_type_without_an_image_is_reported(category: Path) -> None:
    (category / "test" / "dent").mkdir()
    assert problems_of(check(category)) == [("warning", "empty category", "part/test/dent")]


def test_any_number_of_files_with_the_same_bytes_is_one_problem(category: Path) -> None:
    data = (category / "test/good/0.png").read_bytes()
    for name in ("test/good/1.png", "train/good/0.png"):
        (category / name).write_bytes(data)
    report = check(category)
    assert problems_of(report) == [("warning", "identical images", "part/test/good/0.png")]
    assert "part/test/good/1.png" in report.problems[0].message
    assert "part/train/good/0.png" in report.problems[0].message


def brighter(image: Picture) -> Picture:
    return np.asarray(np.clip(np.rint(image * 1.01), 0, 255), dtype=np.uint8)


def as_jpeg(image: Picture) -> Picture:
    coded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
    return np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR), dtype=np.uint8)


@pytest.mark.parametrize("change", [brighter, as_jpeg])
def test_the_same_picture_in_other_bytes_is_reported(category: Path, change: Callable[[Picture], Picture]) -> None:
    write_png(category / "test/good/0.png", picture(77))
    write_png(category / "train/good/1.png", change(picture(77)))
    report = check(category)
    assert problems_of(report) == [("warning", "near-identical images", "part/train/good/1.png")]
    assert "part/test/good/0.png" in report.problems[0].message


def test_blank_images_do_not_count_as_copies_of_one_picture(category: Path) -> None:
    for number, grey in enumerate((90, 200)):
        write_png(category / f"test/good/{number}.png", np.full((SIDE, SIDE, 3), grey, np.uint8))
    assert check(category).problems == ()


def test_many_copies_of_one_picture_give_a_problem_each_and_not_one_for_each_pair(category: Path) -> None:
    for number in range(20):
        pixels = picture(77)
        pixels[0, 0] = number
        write_png(category / f"test/good/{number}.png", pixels)
    problems = check(category).problems
    assert len(problems) == 19
    assert all("part/test/good/0.png" in problem.message for problem in problems)


def test_copies_are_found_across_blocks(category: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = picture(0)
    pixels[0, 0] = 0
    write_png(category / "train/good/1.png", pixels)
    monkeypatch.setattr("flawmask.data.duplicates.BLOCK", 2)
    assert problems_of(check(category)) == [("warning", "near-identical images", "part/train/good/1.png")]


# A COCO folder


def test_a_clean_coco_folder_has_no_problem_and_is_counted(dataset: Path) -> None:
    report = check(dataset)
    assert report.problems == ()
    assert report.name == "set"
    assert report.counts == tuple(
        Count(split, *rest) for split in ("train", "val") for rest in (("crack", 2, 2, 2), ("good", 1, 0, 0))
    )


def test_the_same_file_in_two_splits_is_an_error_and_in_one_split_a_warning(dataset: Path) -> None:
    data = (dataset / "train/images/1.png").read_bytes()
    (dataset / "val/images/1.png").write_bytes(data)
    (dataset / "val/images/3.png").write_bytes((dataset / "val/images/2.png").read_bytes())
    assert problems_of(check(dataset)) == [
        ("error", "leak", "train/images/1.png"),
        ("warning", "identical images", "val/images/2.png"),
    ]


def test_identical_variants_are_not_a_second_problem_but_still_a_leak(dataset: Path) -> None:
    data = (dataset / "train/images/2.png").read_bytes()
    (dataset / "train/images/3.png").write_bytes(data)
    edit(dataset, lambda content: [image.update(augmentation="blur") for image in content["images"]])
    assert check(dataset).problems == ()
    (dataset / "val/images/2.png").write_bytes(data)
    assert problems_of(check(dataset)) == [("error", "leak", "train/images/2.png")]


def test_the_same_picture_in_two_splits_is_a_near_leak(dataset: Path) -> None:
    write_png(dataset / "val/images/1.png", as_jpeg(picture(1)))
    report = check(dataset)
    assert problems_of(report) == [("warning", "near-leak", "val/images/1.png")]
    assert "train/images/1.png" in report.problems[0].message


def test_a_variant_may_look_like_its_source_but_not_like_a_validation_image(dataset: Path) -> None:
    write_png(dataset / "train/images/2.png", brighter(picture(1)))
    assert problems_of(check(dataset)) == [("warning", "near-identical images", "train/images/2.png")]
    edit(dataset, lambda content: content["images"][1].update(augmentation="bright", source_id=1))
    assert check(dataset).problems == ()
    write_png(dataset / "val/images/1.png", as_jpeg(picture(1)))
    assert problems_of(check(dataset)) == [("warning", "near-leak", "val/images/1.png")]


RECORDS: dict[str, tuple[dict[str, Any], tuple[str, str]]] = {
    "box outside": ({"bbox": [40, 10, 13, 10]}, ("error", "box")),
    "box beside its mask": ({"bbox": [2, 10, 13, 10]}, ("warning", "box and mask")),
    "wrong area": ({"area": 99}, ("warning", "area")),
    "no area": ({"area": None}, ("warning", "area")),
    "no pixel": ({"segmentation": [[90, 90, 95, 90, 95, 95]]}, ("error", "mask empty")),
}


@pytest.mark.parametrize("what", RECORDS)
def test_a_bad_annotation_is_reported(dataset: Path, what: str) -> None:
    change, problem = RECORDS[what]
    edit(dataset, lambda content: content["annotations"][1].update(change))
    report = check(dataset)
    assert problems_of(report) == [(*problem, "train/images/2.png")]
    assert "annotation 2" in report.problems[0].message


def test_every_unusable_annotation_is_reported(dataset: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["annotations"][0].update(segmentation="here")
        content["annotations"][1].update(bbox=[12, 10, 4])

    edit(dataset, change)
    report = check(dataset)
    assert problems_of(report) == [("error", "unusable record", "train")] * 2
    assert [problem.message for problem in report.problems] == [
        "annotation 1 has no usable segmentation: neither polygons nor RLE, but 'here'",
        "annotation 2 has the box [12, 10, 4], not [x, y, width, height]",
    ]


def test_an_export_without_areas_and_with_images_beside_its_file_has_no_fault(dataset: Path) -> None:
    edit(dataset, lambda content: [record.pop("area") for record in content["annotations"]])
    for path in (dataset / "train/images").iterdir():
        path.rename(dataset / "train" / path.name)
    assert check(dataset).problems == ()


def test_boxes_and_areas_that_other_tools_measure_on_polygons_are_not_a_fault(dataset: Path) -> None:
    edit(dataset, lambda content: content["annotations"][1].update(bbox=[12.4, 9.6, 12.2, 10.3], area=127.5))
    assert check(dataset).problems == ()


def test_an_image_whose_size_differs_from_its_record_is_reported(dataset: Path) -> None:
    edit(dataset, lambda content: content["images"][1].update(width=96))
    assert problems_of(check(dataset)) == [("error", "image size", "train/images/2.png")]


def test_a_category_without_annotations_is_reported(dataset: Path) -> None:
    edit(dataset, lambda content: content["categories"].append({"id": 3, "name": "dent"}), split="val")
    report = check(dataset)
    assert problems_of(report) == [("warning", "empty category", "val")]
    assert "dent" in report.problems[0].message


def test_images_without_annotations_are_counted_unless_they_are_good(dataset: Path) -> None:
    edit(dataset, lambda content: content.update(annotations=content["annotations"][1:2]))
    report = check(dataset)
    assert problems_of(report) == [("warning", "no annotation", "train")]
    assert "1 of 3 images" in report.problems[0].message


def test_an_image_that_is_not_listed_is_reported(dataset: Path) -> None:
    write_png(dataset / "val/images/sub/extra.png", picture(99))
    report = check(dataset)
    assert problems_of(report) == [("warning", "unlisted image", "val/images/sub/extra.png")]
    assert report.tallies[0].not_used == {"not listed": ["sub/extra.png"]}


def test_an_image_in_a_shared_folder_is_reported_only_if_no_split_lists_it(dataset: Path) -> None:
    (dataset / "annotations").mkdir()
    (dataset / "images").mkdir()
    for name in ("train", "val"):
        for image in (dataset / name / "images").iterdir():
            image.rename(dataset / "images" / f"{name}_{image.name}")
        content = json.loads((dataset / name / "annotations.json").read_text())
        for image in content["images"]:
            image["file_name"] = f"{name}_{image['file_name']}"
        (dataset / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
        shutil.rmtree(dataset / name)
    assert problems_of(check(dataset, dataset_dir=dataset, mvtec_root=Path(), category=None)) == []
    write_png(dataset / "images/extra.png", picture(99))
    report = check(dataset, dataset_dir=dataset, mvtec_root=Path(), category=None)
    assert problems_of(report) == [("warning", "unlisted image", "images/extra.png")]
    assert report.tallies[0].not_used == {"not listed": ["images/extra.png"]}


def test_a_coco_file_of_another_tool_is_counted_by_class_name(dataset: Path) -> None:
    edit(dataset, lambda content: [image.pop("defect_type") for image in content["images"]])
    assert check(dataset).counts[:2] == (Count("train", "defect", 2, 2, 2), Count("train", "good", 1, 0, 0))


def test_a_split_that_cannot_be_used_is_an_error_and_the_other_is_checked(dataset: Path) -> None:
    (dataset / "val/annotations.json").write_text("{")
    report = check(dataset)
    assert problems_of(report) == [("error", "unusable split", "val")]
    assert {count.split for count in report.counts} == {"train"}


def test_a_truncated_image_of_a_coco_folder_is_reported(dataset: Path) -> None:
    data = (dataset / "train/images/2.png").read_bytes()
    (dataset / "train/images/2.png").write_bytes(data[:200])
    assert problems_of(check(dataset)) == [("error", "unreadable image", "train/images/2.png")]


# Photographs of one part


def test_names_that_contain_parts_are_reported_with_the_flag_that_keeps_them_together(category: Path) -> None:
    for part in range(12):
        for view in "ab":
            write_png(category / f"test/good/part{part:02d}_{view}.png", picture(100 + 2 * part + (view == "b")))
    for path in sorted(category.glob("t*/*/?.png")) + sorted(category.glob("ground_truth/*/*")):
        path.unlink()
    for folder in ("test/crack", "test/hole", "ground_truth/crack", "ground_truth/hole"):
        (category / folder).rmdir()
    (problem,) = check(category).problems
    assert (problem.severity, problem.kind, problem.where) == ("warning", "several images of a part", "part")
    assert problem.message.startswith("has file names that suggest 12 parts on 24 of its 24 images")
    assert problem.message.endswith("if so, keep each in one split with --group_by '^(part[0-9]+)'")


def test_the_report_on_a_coco_folder_says_how_many_parts_are_in_several_splits(tmp_path: Path) -> None:
    for split, seed, parts in [("train", 0, "1123"), ("val", 10, "2344")]:
        images: list[dict[str, Any]] = []
        for number, part in enumerate(parts, start=1):
            write_png(tmp_path / "set" / split / "images" / f"{number}.png", picture(seed + number))
            size = {"width": SIDE, "height": SIDE}
            name = f"part/test/good/p{part}_{seed + number}.png"
            images.append({"id": number, "file_name": f"{number}.png", **size, "original_file": name})
        annotations = [
            annotation(blob(), id=image["id"], image_id=image["id"], category_id=image["id"] % 2 + 1)
            for image in images
        ]
        write_split(tmp_path / "set" / split, images, annotations, CATEGORIES)
    (problem,) = check(tmp_path / "set").problems
    assert (problem.severity, problem.kind, problem.where) == ("warning", "several images of a part", "set")
    assert "has file names that suggest 4 parts on 8 of its 8 images" in problem.message
    assert "if so, 2 of them are in several splits" in problem.message
    assert "--group_by '^(p[0-9]+)'" in problem.message


def test_a_part_in_two_splits_of_a_coco_folder_is_an_error_if_records_name_it(dataset: Path) -> None:
    for split, parts in {"train": ["p1", "p2", "p3"], "val": ["p4", "p2", "p2"]}.items():
        path = dataset / split / "annotations.json"
        content = read_json(path)
        for image, part in zip(content["images"], parts, strict=True):
            image["group"] = part
        write_json(path, content)
    (problem,) = check(dataset).problems
    assert (problem.severity, problem.kind, problem.where) == ("error", "leak", "train/images/2.png")
    assert problem.message.startswith("shows the part p2, and so does val/images/2.png")


# Settings and output


def test_a_missing_folder_is_reported_in_one_line(tmp_path: Path) -> None:
    for settings in ({"dataset_dir": tmp_path / "none"}, {"mvtec_root": tmp_path, "category": "none"}):
        with pytest.raises(FlawmaskError) as error:
            examine(DoctorConfig(**settings))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("settings", [{}, {"category": "a", "dataset_dir": Path("b")}])
def test_exactly_one_thing_is_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(FlawmaskError, match="either --category or --dataset_dir"):
        DoctorConfig(**settings)


def test_the_contact_sheet_takes_its_images_evenly_from_all_types(
    category: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3, 40):
        write_png(category / f"test/good/{number}.png", picture(100 + number))
    monkeypatch.chdir(category.parent)
    captions: list[str] = []

    def sheet(images: list[Picture], columns: int, cell: object, texts: list[str]) -> Picture:
        captions.extend(texts)
        return picture(0)

    monkeypatch.setattr("flawmask.draw.contact_sheet", sheet)
    for _ in range(2):
        assert check(category, sheet_images=10).contact_sheet == Path("doctor_part.png")
    kinds = [caption.split("  ")[0] for caption in captions]
    assert kinds[:10] == ["good"] * 6 + ["crack"] * 2 + ["hole"] * 2
    assert captions[:10] == captions[10:]
    assert captions[1].split("  ")[1] != "1.png", "the first files were chosen instead of evenly spaced ones"


def test_the_contact_sheet_outlines_the_defects(category: Path, dataset: Path, tmp_path: Path) -> None:
    for folder in (category, dataset):  # each has four defects
        path = tmp_path / "new" / f"{folder.name}.png"
        assert check(folder, contact_sheet=path, sheet_images=48).contact_sheet == path
        line = (read_image(path) == (0, 158, 115)).all(axis=2)
        closed = cv2.dilate(line.astype(np.uint8), np.ones((5, 5), np.uint8))
        assert cv2.connectedComponents(closed)[0] - 1 == 4


def test_no_sheet_is_written_if_none_is_wanted_or_no_image_can_be_read(category: Path, tmp_path: Path) -> None:
    path = tmp_path / "sheet.png"
    assert check(category, contact_sheet=path, sheet_images=0).contact_sheet is None
    for image in category.glob("t*/*/*.png"):
        image.write_bytes(b"")
    report = check(category, contact_sheet=path, sheet_images=9)
    assert report.contact_sheet is None
    assert not path.exists()
    assert len(report.problems) == 9


def test_the_tables_show_counts_sizes_and_the_first_examples_of_each_kind() -> None:
    problems = [Problem("error", "mask empty", f"[red]{number}.png", "has no defect pixel") for number in range(8)]
    sizes = tuple(Size(100 + number, 200, 1) for number in range(9))
    report = Report("part", (Count("test", "crack", 8, 8, 9),), sizes, tuple(problems), None)
    console = Console(width=120, record=True, file=Path(os.devnull).open("w"))  # noqa: SIM115 - closed below
    for table in tables(report):
        console.print(table)
    console.file.close()
    text = console.export_text()
    assert text.count("has no defect pixel") == 5
    assert "[red]4.png" in text
    assert "and 3 more" in text
    assert "105 to 108" in text
    assert len(tables(Report("part", report.counts, report.sizes, (), None))) == 2


def test_a_library_call_prints_nothing(category: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("flawmask").setLevel(logging.DEBUG)
    (category / "test/good/0.png").write_bytes(b"no image")
    check(category)
    assert capfd.readouterr() == ("", "")


# Real images


def real(category: Path) -> Report:
    if not category.is_dir():
        pytest.skip(f"{category} is not here: the real samples are not part of the repository")
    return check(category)


def test_the_two_identical_bottles_are_found_and_no_different_ones() -> None:
    report = real(SHARED / "mvtec_ad_sample" / "bottle")
    assert problems_of(report) == [("warning", "identical images", "bottle/test/good/002.png")]
    assert "bottle/test/good/008.png" in report.problems[0].message
    assert report.sizes == (Size(900, 900, 17),)
    assert sum(count.images for count in report.counts) == 17


def test_the_only_problem_of_the_magnetic_tiles_is_several_photographs_of_a_tile() -> None:
    report = real(SHARED / "magnetic_tile")
    counts = Counter(problem.kind for problem in report.problems)
    assert set(counts) == {"near-identical images", "several images of a part"}
    assert 0 < counts["near-identical images"] < 15
    (parts,) = (problem for problem in report.problems if problem.kind == "several images of a part")
    assert parts.where == "magnetic_tile"
    assert parts.message.endswith("keep each in one split with --group_by '^(tile[0-9]+)'")
    images = [path for path in (SHARED / "magnetic_tile").glob("t*/*/*") if path.is_file()]
    assert sum(count.images for count in report.counts) == len(images) > 900


# Counts


def tally_lines(report: Report) -> list[str]:
    return [tally.line() for tally in report.tallies]


def test_everything_in_a_clean_data_set_is_usable(category: Path, dataset: Path) -> None:
    assert tally_lines(check(category)) == ["9 images: all used", "4 annotations: all used"]
    assert tally_lines(check(dataset)) == ["6 images: all used", "6 annotations: all used"]


def test_unusable_files_of_a_category_are_counted(category: Path) -> None:
    (category / "ground_truth/crack/0_mask.png").unlink()
    (category / "test/hole/1.png").write_bytes(b"?")
    assert tally_lines(check(category)) == [
        "9 images: 7 used, 2 not used: bad image or mask",
        "3 annotations: 2 used, 1 not used: bad image or mask",
    ]


def test_unusable_records_of_a_coco_folder_are_counted_in_all_splits(dataset: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["annotations"][0].update(segmentation=[[1, 1, 4, 4]])
        content["annotations"][1].update(iscrowd=1)

    edit(dataset, change)
    (dataset / "val/images/1.png").write_bytes(b"?")
    report = check(dataset)
    assert tally_lines(report) == [
        "6 images: 4 used, 2 not used: 1 bad record, 1 unreadable image",
        "6 annotations: 3 used, 3 not used: 1 bad record, 1 crowd, 1 image not used",
    ]
    assert ("warning", "crowd", "train") in problems_of(report)
    assert next(count for count in report.counts if count.type == "crack") == Count("train", "crack", 2, 2, 1)


def test_only_crowds_are_an_error_unless_they_are_used_as_instances(dataset: Path) -> None:
    edit(dataset, lambda content: [record.update(iscrowd=1) for record in content["annotations"][1:]])
    report = check(dataset)
    assert problems_of(report) == [("error", "crowd", "train")]
    assert "2 of 2 defects as crowds" in report.problems[0].message
    taken = check(dataset, crowds="instances")
    assert taken.problems == ()
    assert tally_lines(taken)[1] == "6 annotations: all used"


def test_annotations_with_only_a_box_are_a_warning_and_their_areas_are_not_checked(dataset: Path) -> None:
    edit(dataset, lambda content: content["annotations"][1].update(segmentation=[], area=3))
    report = check(dataset)
    assert problems_of(report) == [("warning", "box alone", "train")]
    assert tally_lines(report)[1] == "6 annotations: all used"


TAKEN = "--strict --crowds instances"


@pytest.mark.parametrize(("flags", "status"), [("", 0), ("--strict", 3), (TAKEN, 0)])
def test_with_strict_unusable_images_or_records_end_the_command_with_status_3(
    dataset: Path, flags: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(dataset, lambda content: content["annotations"][1].update(iscrowd=1))
    command = f"flawmask doctor --dataset_dir {dataset} --sheet_images 0 {flags}"
    monkeypatch.setattr("sys.argv", command.split())
    said: list[str] = []
    monkeypatch.setattr(cli, "log_to", lambda _: None)
    monkeypatch.setattr(logging.getLogger("flawmask.tally"), "warning", lambda *line: said.append(line[0] % line[1:]))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == status
    shown = capsys.readouterr()
    assert "set: images" in shown.out
    assert ("6 annotations: 5 used, 1 not used: crowd (2 of 2.png)" in shown.err + "".join(said)) == (flags != TAKEN)


def test_a_category_whose_name_may_mean_good_is_reported(dataset: Path) -> None:
    edit(dataset, lambda content: content["categories"][1].update(name="OK"))
    assert ("error", "good by another name", "train") in problems_of(check(dataset))
    report = check(dataset, good_name="OK")
    assert "good by another name" not in [problem.kind for problem in report.problems]
    assert sum(one.defective for one in report.counts if one.split == "train") == 0


def status(*arguments: str) -> int:
    logger = logging.getLogger("flawmask")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(logger, "handlers", [*logger.handlers])  # remove the command line's handlers afterwards
        patch.setattr(logger, "level", logger.level)
        patch.setattr(sys, "argv", ["flawmask", "doctor", *arguments, "--sheet_images", "0"])
        cli.main()
    return int(stopped.value.code or 0)


def test_the_command_ends_with_status_1_if_it_found_an_error(
    category: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--mvtec_root", str(category.parent), "--category", "part")
    assert status(*where) == 0
    (category / "test/good/photo.cr2").write_bytes(b"")
    assert status(*where) == 0, "a warning is not an error"
    assert "10 images: 9 used, 1 not used: suffix .cr2" in capsys.readouterr().err
    assert status(*where, "--strict") == 3
    (category / "ground_truth/crack/1_mask.png").unlink()
    assert status(*where) == 1


def test_the_report_is_printed_as_json(category: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (category / "ground_truth/crack/1_mask.png").unlink()
    capsys.readouterr()
    assert status("--mvtec_root", str(category.parent), "--category", "part", "--json") == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["name"] == "part"
    assert printed["layout"] == "mvtec"
    assert printed["counts"][0] == {"split": "test", "type": "crack", "images": 2, "defective": 2, "instances": 1}
    assert printed["sizes"] == [{"width": SIDE, "height": SIDE, "images": 9}]
    (problem,) = printed["problems"]
    assert (problem["severity"], problem["kind"], problem["where"]) == (
        "error",
        "mask missing",
        "part/test/crack/1.png",
    )
    assert printed["images"] == {"found": 9, "used": 8, "not_used": {"bad image or mask": ["part/test/crack/1.png"]}}
    assert printed["annotations"] == {"found": 3, "used": 3, "not_used": {}}
    assert printed["contact_sheet"] is None


def test_the_report_on_a_coco_folder_is_printed_as_json(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert status("--dataset_dir", str(dataset), "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["name"], printed["layout"], printed["problems"]) == ("set", None, [])
