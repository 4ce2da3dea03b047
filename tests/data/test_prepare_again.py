"""Prepare: an existing folder is reused, refused or replaced as a whole, and bad input leaves nothing behind."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prepared import Digests, Make, content, draw_image, info, run, sides, write_mask

from flawmask.data.prepare import PrepareConfig, prepare
from flawmask.errors import FlawmaskError, UnusedError
from flawmask.files import write_json

# Existing data sets


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


def test_a_data_set_from_before_layouts_existed_is_reused(tiny_category: Make) -> None:
    folder = tiny_category()
    made = run(folder)
    content = info(made)
    assert content["settings"].pop("layout") == "mvtec"
    write_json(made.dataset_dir / "dataset_info.json", content)
    before = times(made.dataset_dir)
    assert run(folder).reused
    assert run(folder, layout="mvtec").reused
    assert times(made.dataset_dir) == before
    write_json(made.dataset_dir / "dataset_info.json", content | {"settings": content["settings"] | {"layout": "visa"}})
    with pytest.raises(FlawmaskError, match="made from other images or settings"):
        run(folder)


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
def test_a_data_set_with_another_origin_is_refused_without_overwrite_and_replaced_with_it(
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


def test_overwrite_replaces_a_damaged_data_set(tiny_category: Make, digests: Digests) -> None:
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
    assert len(copies) >= 3  # other threads may have started more copies
    assert digests(folder.parents[1]) == before
    if (folder.parents[1] / "out").is_dir():
        assert [path.name for path in (folder.parents[1] / "out").iterdir()] == (["part"] if there else [])


# Bad input


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def replace_by_link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_two_masks_of_one_image_stop_before_anything_is_written(tiny_category: Make, on_error: str) -> None:
    folder = tiny_category()
    mask = folder / "ground_truth/crack/001_mask.png"
    write_mask(mask.with_suffix(".tif"), np.ones((14, 18), np.uint8))
    with pytest.raises(FlawmaskError) as caught:
        run(folder, on_error=on_error)
    also = "and 001_mask.png are masks of one image: take one of them out"
    assert str(caught.value) == f"{mask.with_suffix('.tif')} {also}"
    assert not (folder.parents[1] / "out").exists()


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
def test_a_bad_file_is_left_out_and_listed_on_request(
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
    images, masks = prepared.tallies
    assert images.line() == "9 images: 8 used, 1 not used: bad image or mask"
    assert images.line() in caplog.text
    assert masks.found == len(list(folder.glob("ground_truth/*/*")))
    assert info(prepared)["tally"] == {"images": images.to_dict(), "annotations": masks.to_dict()}


def test_with_strict_nothing_is_written_if_a_file_is_left_out(tiny_category: Make) -> None:
    folder = tiny_category()
    cut_in_half(folder / "test/hole/000.png")
    says = "9 images: 8 used, 1 not used: bad image or mask .*; .*5 annotations: 4 used, 1 not used: bad image or mask"
    with pytest.raises(UnusedError, match=says):
        run(folder, on_error="skip", strict=True)
    assert not (folder.parents[1] / "out").exists()


def test_masks_that_seem_to_be_inverted_give_a_warning(tiny_category: Make, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny_category()
    run(folder)
    assert "invert" not in caplog.text
    mask = np.full((14, 18), 255, np.uint8)
    mask[3:6, 4:9] = 0
    write_mask(folder / "ground_truth/crack/001_mask.png", mask)
    write_mask(folder / "ground_truth/hole/001_mask.png", np.full((14, 18), 255, np.uint8))
    run(folder, overwrite=True)
    first = folder / "ground_truth/crack/001_mask.png"
    assert f"2 masks are white in all four corners, for example {first}" in caplog.text


def test_several_bad_files_are_counted(tiny_category: Make) -> None:
    folder = tiny_category()
    for name in ("crack/000", "crack/002", "good/003"):
        cut_in_half(folder / f"test/{name}.png")
    with pytest.raises(FlawmaskError, match="3 files are bad"):
        run(folder)
    assert len(run(folder, on_error="skip").left_out) == 3


def test_a_type_with_only_bad_images_is_left_out_and_keeps_its_class(tiny_category: Make) -> None:
    folder = tiny_category(crack=3, dent=2, hole=2)
    for path in (folder / "test/dent").iterdir():
        cut_in_half(path)
    prepared = run(folder, on_error="skip", classes="type")
    assert "dent" not in prepared.train["by_type"] | prepared.val["by_type"]
    assert [one["name"] for one in content(prepared, "train")["categories"]] == ["good", "crack", "dent", "hole"]


@pytest.mark.parametrize("pattern", ["test/*/*.png", "test/[ch]*/*.png"])
def test_only_bad_defective_images_are_an_error_even_with_skip(tiny_category: Make, pattern: str) -> None:
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


def test_missing_input_is_refused_and_nothing_is_written(tiny_category: Make) -> None:
    folder = tiny_category()
    (folder.parent / "empty/test/crack").mkdir(parents=True)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"category": "none"}, "has no category none: it has empty, part"),
        ({"category": "empty"}, "holds no image"),
        ({"mvtec_root": folder.parent / "none"}, "is not a folder"),
    ]
    for settings, message in bad:
        with pytest.raises(FlawmaskError, match=message) as caught:
            run(folder, **settings)
        assert "\n" not in str(caught.value)
    assert not (folder.parents[1] / "out").exists()


def test_other_impossible_settings_are_refused() -> None:
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
