"""Scanning a category: which images and masks are found, and what is said where something is missing."""

from collections.abc import Callable
from pathlib import Path

import pytest

from flawmask.data.mvtec import categories, chosen_categories, scan
from flawmask.errors import FlawmaskError

Make = Callable[..., Path]


def said(root: Path, category: str) -> str:
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
    assert found[1].mask == folder / "ground_truth/crack/001_mask.png"
    assert found[2].mask is None


def test_train_good_takes_part_when_asked_for_and_need_not_be_there(tiny_category: Make) -> None:
    folder = tiny_category(train_good=2)
    names = [sample.original_file for sample in scan(folder.parent, "part", "all")]
    assert names[-2:] == ["part/train/good/000.png", "part/train/good/001.png"]
    assert len(names) == 11
    for path in (folder / "train/good").iterdir():
        path.unlink()
    (folder / "train/good").rmdir()
    assert len(scan(folder.parent, "part", "all")) == 9


@pytest.mark.parametrize("name", ["000_mask.png", "000.png", "000_mask.BMP", "000.TIF", "000_mask.jpeg"])
def test_a_mask_is_known_by_the_stem_whatever_its_suffix(tiny_category: Make, name: str) -> None:
    folder = tiny_category(crack=1)
    mask = folder / "ground_truth/crack/000_mask.png"
    mask.rename(mask.with_name(name))
    assert scan(folder.parent, "part")[0].mask == mask.with_name(name)


def test_masks_are_matched_by_name_and_never_by_order(tiny_category: Make) -> None:
    folder = tiny_category(crack=3)
    (folder / "ground_truth/crack/000_mask.png").unlink()
    masks = [sample.mask and sample.mask.name for sample in scan(folder.parent, "part") if not sample.is_good]
    assert masks == [None, "001_mask.png", "002_mask.png"]


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "bmp", "tif", "tiff", "PNG", "Jpg"])
def test_every_kind_of_image_is_found_and_nothing_else(tiny_category: Make, suffix: str) -> None:
    folder = tiny_category(crack=1)
    (folder / f"test/good/new.{suffix}").write_bytes(b"")
    for stray in ("._000.png", "notes.txt", "Thumbs.db", "b.gif"):
        (folder / "test/good" / stray).write_bytes(b"")
    (folder / "test/good/folder.png").mkdir()
    (folder / "test/stray.png").write_bytes(b"")
    assert len(scan(folder.parent, "part")) == 6


def test_a_type_without_a_folder_of_masks_has_none(tiny_category: Make) -> None:
    folder = tiny_category(crack=1)
    (folder / "ground_truth/crack").rename(folder / "ground_truth/other")
    assert scan(folder.parent, "part")[0].mask is None


def test_a_missing_category_is_said_with_those_that_are_there(tiny_category: Make) -> None:
    root = tiny_category(name="bottle").parent
    tiny_category(name="cable")
    (root / "no_category").mkdir()
    assert said(root, "botle").endswith("has no category botle: it has bottle, cable")
    assert categories(root) == ["bottle", "cable"]


def test_a_missing_root_is_said_with_what_is_near(tiny_category: Make, tmp_path: Path) -> None:
    root = tiny_category().parent
    message = said(root.with_name("mvtek") / "deeper", "part")
    assert str(root.with_name("mvtek")) in message
    assert f"{tmp_path} holds mvtec" in message
    assert "--mvtec_root" in message


def test_a_root_without_a_category_is_said_with_what_it_holds(tiny_category: Make) -> None:
    folder = tiny_category()
    assert said(folder, "part").endswith("it holds ground_truth, test, train")  # the category was named as the root
    empty = folder / "test"
    for number in range(20):
        (empty / f"extra{number:02d}").mkdir()
    assert said(empty, "part").endswith("and 11 more")
    (folder.parent / "nothing").mkdir()
    assert said(folder.parent / "nothing", "part").endswith("it holds nothing")


def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert str(tmp_path / "file") in said(tmp_path / "file", "part")


def test_a_category_without_an_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "part/test/crack").mkdir(parents=True)
    assert said(tmp_path, "part").startswith(f"{tmp_path / 'part' / 'test'} holds no image")


def test_several_categories_or_all_can_be_named(tiny_category: Make) -> None:
    for name in ("cable", "bottle", "wood"):
        root = tiny_category(name=name).parent
    assert chosen_categories(root, "all") == ["bottle", "cable", "wood"]
    assert chosen_categories(root, "wood, bottle,wood") == ["wood", "bottle"]
    for text in ("wood,leather", "", " , "):
        with pytest.raises(FlawmaskError, match="bottle, cable, wood"):
            chosen_categories(root, text)
