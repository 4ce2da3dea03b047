"""Layouts: the images and masks that are found, the messages about missing ones, and a layout of a plug-in module."""

from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest
import side_by_side
from prepared import Make, content, draw_image, info, joined, run, sides, write_mask

from flawmask.data.doctor import Count, DoctorConfig, examine
from flawmask.data.layouts import (
    LAYOUTS,
    Problem,
    Sample,
    categories,
    chosen_categories,
    layout_of,
    problems,
    samples,
    select_samples,
)
from flawmask.errors import FlawmaskError
from flawmask.images import to_mask


def scan(root: Path, category: str, good_images: Literal["test", "all"] = "test") -> list[Sample]:
    return select_samples(samples(root, category), good_images)


def masks_of(sample: Sample) -> list[Path]:
    return [mask.path for mask in sample.masks]


# MVTec AD


def error_of(root: Path, category: str) -> str:
    with pytest.raises(FlawmaskError) as caught:
        scan(root, category)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_images_come_sorted_with_their_type_mask_and_path_below_the_root(tiny_category: Make) -> None:
    folder = tiny_category(good=2, train_good=1, hole=1, crack=2)
    found = scan(folder.parent, "part")
    assert [sample.original_file for sample in found] == [
        "part/test/crack/000.png",
        "part/test/crack/001.png",
        "part/test/good/000.png",
        "part/test/good/001.png",
        "part/test/hole/000.png",
    ]
    assert [sample.defect_type for sample in found] == ["crack", "crack", "good", "good", "hole"]
    assert [sample.is_good for sample in found] == [False, False, True, True, False]
    assert [sample.image for sample in found] == [folder.parent / sample.original_file for sample in found]
    (mask,) = found[1].masks
    assert mask.path == folder / "ground_truth/crack/001_mask.png"
    assert (mask.defect_type, mask.rule) == ("crack", to_mask)
    assert found[2].masks == ()
    assert {(sample.origin, sample.group) for sample in found} == {("test", None)}


def test_train_good_is_used_on_request_and_may_be_missing(tiny_category: Make) -> None:
    folder = tiny_category(train_good=2)
    names = [sample.original_file for sample in scan(folder.parent, "part", "all")]
    assert names[-2:] == ["part/train/good/000.png", "part/train/good/001.png"]
    assert len(names) == 11
    assert [sample.origin for sample in samples(folder.parent, "part")] == ["test"] * 9 + ["train"] * 2
    for path in (folder / "train/good").iterdir():
        path.unlink()
    (folder / "train/good").rmdir()
    assert len(scan(folder.parent, "part", "all")) == 9


@pytest.mark.parametrize("name", ["000_mask.png", "000.png", "000_mask.BMP", "000.TIF", "000_mask.jpeg"])
def test_a_mask_is_matched_by_its_stem_with_any_suffix(tiny_category: Make, name: str) -> None:
    folder = tiny_category(crack=1)
    mask = folder / "ground_truth/crack/000_mask.png"
    mask.rename(mask.with_name(name))
    assert masks_of(scan(folder.parent, "part")[0]) == [mask.with_name(name)]


def test_masks_are_matched_by_name_and_never_by_order(tiny_category: Make) -> None:
    folder = tiny_category(crack=3)
    (folder / "ground_truth/crack/000_mask.png").unlink()
    masks = [masks_of(sample) for sample in scan(folder.parent, "part") if not sample.is_good]
    assert masks == [[], [folder / "ground_truth/crack/001_mask.png"], [folder / "ground_truth/crack/002_mask.png"]]


def test_an_image_with_two_masks_of_its_name_has_both_and_is_reported(tiny_category: Make) -> None:
    folder = tiny_category(crack=2)
    truth = folder / "ground_truth/crack"
    (truth / "001.png").write_bytes(b"")  # gives way to 001_mask.png
    for name in ("000_mask.bmp", "000_mask.tif"):
        (truth / name).write_bytes(b"")
    assert [path.name for path in masks_of(scan(folder.parent, "part")[0])] == [
        "000_mask.bmp",
        "000_mask.png",
        "000_mask.tif",
    ]
    orphan, *clashes = problems(folder.parent, "part")
    assert (orphan.kind, orphan.where) == ("orphan masks", "part/ground_truth/crack/001.png")
    message = "and 000_mask.bmp are masks of one image: take one of them out"
    assert clashes == [
        Problem("error", "masks of one image", f"part/ground_truth/crack/000_mask.{suffix}", message)
        for suffix in ("png", "tif")
    ]


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "bmp", "tif", "tiff", "PNG", "Jpg"])
def test_images_with_every_suffix_are_found_and_no_other_files(tiny_category: Make, suffix: str) -> None:
    folder = tiny_category(crack=1)
    (folder / f"test/good/new.{suffix}").write_bytes(b"")
    for stray in ("._000.png", "notes.txt", "Thumbs.db", "b.gif"):
        (folder / "test/good" / stray).write_bytes(b"")
    (folder / "test/good/folder.png").mkdir()
    (folder / "test/stray.png").write_bytes(b"")
    assert len(scan(folder.parent, "part")) == 6


def test_a_type_without_a_mask_folder_has_no_masks(tiny_category: Make) -> None:
    folder = tiny_category(crack=1)
    (folder / "ground_truth/crack").rename(folder / "ground_truth/other")
    assert scan(folder.parent, "part")[0].masks == ()


def test_the_message_about_a_missing_category_lists_the_existing_ones(tiny_category: Make) -> None:
    root = tiny_category(name="bottle").parent
    tiny_category(name="cable")
    (root / "no_category").mkdir()
    assert error_of(root, "botle").endswith("has no category botle: it has bottle, cable")
    assert categories(root) == ["bottle", "cable"]


def test_the_message_about_a_missing_root_lists_the_nearest_existing_folder(
    tiny_category: Make, tmp_path: Path
) -> None:
    root = tiny_category().parent
    message = error_of(root.with_name("mvtek") / "deeper", "part")
    assert str(root.with_name("mvtek")) in message
    assert f"{tmp_path} holds mvtec" in message
    assert "--mvtec_root" in message


def test_the_message_about_a_root_without_a_category_lists_its_content(tiny_category: Make) -> None:
    folder = tiny_category()
    assert error_of(folder, "part").endswith("it holds ground_truth, test, train")  # the root is a category here
    empty = folder / "test"
    for number in range(20):
        (empty / f"extra{number:02d}").mkdir()
    assert error_of(empty, "part").endswith("and 11 more")
    (folder.parent / "nothing").mkdir()
    assert error_of(folder.parent / "nothing", "part").endswith("it holds nothing")


def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert str(tmp_path / "file") in error_of(tmp_path / "file", "part")


def test_a_category_without_an_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "part/test/crack").mkdir(parents=True)
    assert error_of(tmp_path, "part").startswith(f"{tmp_path / 'part' / 'test'} holds no image")


def test_several_categories_or_all_can_be_named(tiny_category: Make) -> None:
    for name in ("cable", "bottle", "wood"):
        root = tiny_category(name=name).parent
    assert chosen_categories(root, "all") == ["bottle", "cable", "wood"]
    assert chosen_categories(root, "wood, bottle,wood") == ["wood", "bottle"]
    for text in ("wood,leather", "", " , "):
        with pytest.raises(FlawmaskError, match="bottle, cable, wood"):
            chosen_categories(root, text)


# A layout that the test adds to the list of layouts


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A category of 6 parts with two images each, one of them with two defects; and one good and one defective training
    image."""
    monkeypatch.setitem(LAYOUTS, "side_by_side", side_by_side)
    folder = tmp_path / "data" / "parts"
    for seed, name in enumerate(("train/9-good", "train/8-flawed", *(f"test/{part}-good" for part in range(6)))):
        draw_image(folder / f"{name}.png", seed)
    write_mask(folder / "train/8-flawed_GT_dent.png", marked(2, 3))
    for part in range(6):
        draw_image(folder / f"test/{part}-flawed.png", 20 + part)
        write_mask(folder / f"test/{part}-flawed_GT_crack.png", marked(0, part))
        write_mask(folder / f"test/{part}-flawed_GT_dent.png", marked(9, part))
    return folder


def marked(row: int, column: int) -> npt.NDArray[np.uint8]:
    """Return a mask whose defect is too dark for the rule `white`."""
    mask = np.zeros((14, 18), np.uint8)
    mask[row : row + 3, column : column + 4] = 100
    return mask


def test_a_new_layout_is_recognised_and_prepared(parts: Path) -> None:
    assert layout_of(parts.parent) == "side_by_side"
    prepared = run(parts, classes="type", good_as="empty")
    assert info(prepared)["settings"]["layout"] == "side_by_side"
    names = {one["id"]: one["name"] for one in content(prepared, "train")["categories"]}
    assert list(names.values()) == ["good", "crack", "dent"]
    side_of = sides(prepared)
    assert len(side_of) == 13  # without the good training image
    assert "parts/train/8-flawed.png" in side_of
    for part in range(6):
        assert side_of[f"parts/test/{part}-good.png"] == side_of[f"parts/test/{part}-flawed.png"]
    unions = joined(prepared)
    for part in range(6):
        assert (unions[f"parts/test/{part}-flawed.png"] == ((marked(0, part) | marked(9, part)) > 0)).all()
    for split in ("train", "val"):
        of_split = content(prepared, split)
        originals = {image["id"]: image["original_file"] for image in of_split["images"]}
        for one in of_split["annotations"]:
            top = {"crack": 0, "dent": 2 if "train/" in originals[one["image_id"]] else 9}[names[one["category_id"]]]
            assert one["bbox"][1] == top
    assert run(parts, classes="type", good_as="empty", layout="side_by_side").reused
    assert len(sides(run(parts, good_images="all", overwrite=True))) == 14


def test_the_message_about_a_mask_without_a_defect_uses_the_layouts_words(parts: Path) -> None:
    write_mask(parts / "test/3-flawed_GT_dent.png", np.zeros((14, 18), np.uint8))
    with pytest.raises(FlawmaskError, match=r"3-flawed_GT_dent\.png has no defect pixel: .* move the image to test"):
        run(parts)


def test_the_doctor_checks_a_new_layout(parts: Path) -> None:
    (parts / "test/3-flawed.png").unlink()
    report = examine(DoctorConfig(mvtec_root=parts.parent, category="parts", sheet_images=0))
    assert report.counts == (
        Count("test", "crack", 5, 5, 10),
        Count("test", "good", 6, 0, 0),
        Count("train", "dent", 1, 1, 1),
        Count("train", "good", 1, 0, 0),
    )
    assert [(one.kind, one.where) for one in report.problems] == [
        ("no image", "parts/test/3-flawed_GT_crack.png"),
        ("no image", "parts/test/3-flawed_GT_dent.png"),
    ]


def test_a_layout_in_the_settings_is_used_even_if_another_is_recognised(parts: Path) -> None:
    with pytest.raises(FlawmaskError, match=r"holds no image .* in a folder per type"):
        run(parts, layout="mvtec")


def test_if_no_layout_is_recognised_the_message_describes_mvtecs(parts: Path) -> None:
    (parts.parent / "other").mkdir()
    assert layout_of(parts.parent / "other") == "mvtec"
    with pytest.raises(FlawmaskError, match="holds no category, which is a folder with test/ and ground_truth/"):
        categories(parts.parent / "other")
