"""Layouts of public data sets, and plain folders: they are recognised and read correctly, and each file is counted."""

import csv
import logging
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import Make, content, draw_image, info, joined, records, run, sides, write_mask

from flawmask.data.doctor import DoctorConfig, examine
from flawmask.data.layouts import LAYOUTS, LayoutSettings, layout_of, problems, samples, tallies
from flawmask.data.layouts.visa import TYPES
from flawmask.data.prepare import PrepareConfig, prepare
from flawmask.errors import FlawmaskError, UnusedError

Mask = npt.NDArray[np.uint8]


def spot(row: int = 2, level: int = 255) -> Mask:
    """Return a mask, 14 high and 18 wide, with a defect of one grey level."""
    mask = np.zeros((14, 18), np.uint8)
    mask[row : row + 3, 4:9] = level
    return mask


BLACK = np.zeros((14, 18), np.uint8)


def files(folder: Path, images: dict[str, int], masks: dict[str, Mask]) -> Path:
    """Write images, each drawn with its own seed, and masks; return the folder."""
    for name, seed in images.items():
        draw_image(folder / name, seed)
    for name, mask in masks.items():
        write_mask(folder / name, mask)
    return folder


def numbered(place: str, count: int, *, first: int = 0, suffix: str = ".png") -> dict[str, int]:
    return {f"{place}/{number:03d}{suffix}": hash_of(place) + number for number in range(first, first + count)}


def hash_of(place: str) -> int:
    return sum(place.encode()) * 100


def table(path: Path, rows: list[list[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def kinds(folder: Path, **how: Any) -> dict[str, str]:
    found = samples(folder.parent, folder.name, LayoutSettings(**how))
    return {Path(sample.original_file).relative_to(folder.name).as_posix(): sample.defect_type for sample in found}


# Subfolders of a type


def nested(tmp_path: Path) -> Path:
    images = {**numbered("test/good", 4), **numbered("test/good/cam2", 4)}
    masks: dict[str, Mask] = {}
    for kind in ("hole", "scratch"):
        images |= {**numbered(f"test/{kind}", 3), **numbered(f"test/{kind}/cam2", 3)}
        masks |= {f"ground_truth/{kind}/{number:03d}_mask.png": spot(number) for number in range(3)}
        masks |= {f"ground_truth/{kind}/cam2/{number:03d}_mask.png": spot(number + 5) for number in range(3)}
    return files(tmp_path / "data" / "part", images, masks)


def test_images_in_subfolders_of_a_type_are_found_with_their_masks(tmp_path: Path) -> None:
    prepared = run(nested(tmp_path), good_as="empty")
    assert layout_of(tmp_path / "data") == "mvtec"
    union = joined(prepared)
    assert len(union) == 20
    assert (union["part/test/hole/cam2/001.png"] == (spot(6) > 0)).all()
    assert (union["part/test/hole/001.png"] == (spot(1) > 0)).all()
    assert info(prepared)["tally"]["images"] == {"found": 20, "used": 20, "not_used": {}}
    assert info(prepared)["tally"]["annotations"] == {"found": 12, "used": 12, "not_used": {}}


@pytest.mark.parametrize("flat", ["images", "masks"])
def test_a_mask_in_another_folder_belongs_to_the_only_image_with_its_name(tmp_path: Path, flat: str) -> None:
    image, mask = ("", "cam2/") if flat == "images" else ("cam2/", "")
    folder = files(
        tmp_path / "part",
        {f"test/hole/{image}000.png": 1, f"test/hole/{image}001.png": 2, "test/hole/cam9/001.png": 3},
        {f"ground_truth/hole/{mask}{number:03d}_mask.png": spot(number) for number in range(2)},
    )
    found = {
        Path(sample.original_file).name: sample
        for sample in samples(tmp_path, "part")
        if "cam9" not in sample.original_file
    }
    assert [mask.path.name for mask in found["000.png"].masks] == ["000_mask.png"]
    assert found["001.png"].masks == (), "two images have that name"
    assert [(one.kind, one.where) for one in problems(tmp_path, "part")] == [
        ("orphan masks", f"part/ground_truth/hole/{mask}001_mask.png")
    ]
    assert folder.is_dir()


def test_defects_among_the_training_images_have_masks_of_their_own(tmp_path: Path) -> None:
    files(
        tmp_path / "part",
        {**numbered("test/bad", 2), **numbered("train/bad", 2), **numbered("train/good", 1)},
        {
            f"ground_truth/{part}/bad/{number:03d}.png": spot(number)
            for part in ("train", "test")
            for number in range(2)
        },
    )
    found = samples(tmp_path, "part")
    assert [(sample.origin, sample.defect_type) for sample in found] == [("test", "bad")] * 2 + [
        ("train", "bad")
    ] * 2 + [("train", "good")]
    for sample in found[:4]:
        (mask,) = sample.masks
        assert mask.path == tmp_path / f"part/ground_truth/{sample.origin}/bad/{sample.image.name}"
    assert problems(tmp_path, "part") == []


def test_hidden_folders_thumbnails_and_folders_of_archivers_and_drives_are_ignored(tmp_path: Path) -> None:
    folder = nested(tmp_path)
    clean = kinds(folder)
    for junk in (
        "test/.hidden/000.png",
        "test/@eaDir/000.png/SYNOPHOTO_THUMB_M.jpg",
        "test/hole/@eaDir/000.png",
        "test/good/.thumbnails/000.png",
        "test/good/Thumbnails/000.png",
        "test/good/000_thumb.png",
        "test/hole/cam2/thumb_003.jpg",
        "test/__MACOSX/000.png",
        "test/hole/._000.png",
        "ground_truth/.hole/000_mask.png",
    ):
        draw_image(folder / "test/good/new.png", 5)
        (folder / junk).parent.mkdir(parents=True, exist_ok=True)
        (folder / "test/good/new.png").rename(folder / junk)
    draw_image(folder / "test/hole/cam2/003.png", 77)  # thumb_003.jpg is its thumbnail
    write_mask(folder / "ground_truth/hole/cam2/003_mask.png", spot())
    shutil.copytree(folder, folder.parent / "__MACOSX" / "part")
    shutil.copytree(folder, folder.parent / ".part")
    assert kinds(folder) == clean | {"test/hole/cam2/003.png": "hole"}
    images, labels = tallies(folder.parent, "part", samples(folder.parent, "part"), {})
    assert images.all_used
    assert labels.all_used
    assert LAYOUTS["mvtec"].categories(folder.parent) == ["part"]


# Public data sets


def loco(tmp_path: Path) -> Path:
    images = {**numbered("test/good", 4), **numbered("train/good", 3), **numbered("validation/good", 2)}
    masks: dict[str, Mask] = {}
    for kind in ("logical_anomalies", "structural_anomalies"):
        images |= numbered(f"test/{kind}", 3)
        for number in range(3):
            masks[f"ground_truth/{kind}/{number:03d}/000.png"] = spot(number, level=254)
            masks[f"ground_truth/{kind}/{number:03d}/001.png"] = spot(
                number + 6, level=96
            )  # no white: its area saturates
    return files(tmp_path / "data" / "box", images, masks)


def test_in_loco_each_image_has_a_folder_of_masks(tmp_path: Path) -> None:
    folder = loco(tmp_path)
    (folder / "defects_config.json").write_text("[]")
    assert layout_of(folder.parent) == "loco"
    prepared = run(folder, good_as="empty")
    union = joined(prepared)
    assert len(union) == 10
    for kind in ("logical_anomalies", "structural_anomalies"):
        for number in range(3):
            expected = (spot(number) | spot(number + 6)) > 0
            assert (union[f"box/test/{kind}/{number:03d}.png"] == expected).all()
    assert info(prepared)["tally"]["annotations"] == {"found": 12, "used": 12, "not_used": {}}
    assert info(prepared)["settings"]["layout"] == "loco"
    every = run(folder, good_images="all", overwrite=True)
    assert len(sides(every)) == 15
    assert {sample.origin for sample in samples(folder.parent, "box")} == {"test", "train", "val"}


def test_a_loco_image_without_its_folder_of_masks_is_reported(tmp_path: Path) -> None:
    folder = loco(tmp_path)
    shutil.rmtree(folder / "ground_truth/logical_anomalies/001")
    with pytest.raises(FlawmaskError, match=r"001\.png has no mask: draw ground_truth/logical_anomalies/001/000\.png"):
        run(folder)


def visa(tmp_path: Path, category: str = "pcb1") -> Path:
    """Write a category with defects of three grey levels, two of them on one image; return its folder."""
    folder = files(
        tmp_path / "data" / category,
        {**numbered("Data/Images/Normal", 6, suffix=".JPG"), **numbered("Data/Images/Anomaly", 6, suffix=".JPG")},
        {
            f"Data/Masks/Anomaly/{number:03d}.png": mask
            for number, mask in enumerate(
                [spot(1, 1), spot(2, 1), spot(3, 3), spot(4, 3), spot(5, 1) | spot(9, 3), spot(7, 2)]
            )
        },
    )
    rows = [["object", "split", "label", "image", "mask"]]
    for kind, label in (("Normal", "normal"), ("Anomaly", "anomaly")):
        for number in range(6):
            image = f"{category}/Data/Images/{kind}/{number:03d}.JPG"
            mask = f"{category}/Data/Masks/Anomaly/{number:03d}.png" if kind == "Anomaly" else ""
            rows.append([category, "train" if number < 4 else "test", label, image, mask])
    table(folder.parent / "split_csv/2cls_highshot.csv", rows)
    table(folder.parent / "split_csv/1cls.csv", rows[:1])
    return folder


def test_visas_mask_levels_name_the_defects(tmp_path: Path) -> None:
    folder = visa(tmp_path)
    (folder / "image_anno.csv").write_text("image,label,mask\n")
    assert layout_of(folder.parent) == "visa"
    prepared = run(folder, classes="type", good_as="empty", good_images="all")
    names = {one["id"]: one["name"] for one in content(prepared, "train")["categories"]}
    assert sorted(names.values()) == ["Bent", "Melt", "Scratch", "good"]
    by_image: dict[int, list[str]] = {}
    for one in records(prepared, "annotations"):
        by_image.setdefault(one["image_id"], []).append(names[one["category_id"]])
    of = {image["original_file"]: sorted(by_image.get(image["id"], [])) for image in records(prepared)}
    assert of["pcb1/Data/Images/Anomaly/004.JPG"] == ["Bent", "Scratch"]
    assert of["pcb1/Data/Images/Anomaly/005.JPG"] == ["Melt"]
    assert of["pcb1/Data/Images/Normal/005.JPG"] == []
    assert info(prepared)["tally"]["images"]["used"] == 12
    assert info(prepared)["tally"]["annotations"] == {"found": 6, "used": 6, "not_used": {}}
    assert problems(folder.parent, "pcb1") == []


def test_the_table_of_visas_defect_names_is_complete() -> None:
    assert {name: len(types) for name, types in TYPES.items()} == {
        "candle": 8,
        "capsules": 5,
        "cashew": 9,
        "chewinggum": 6,
        "fryum": 8,
        "macaroni1": 7,
        "macaroni2": 7,
        "pcb1": 4,
        "pcb2": 4,
        "pcb3": 4,
        "pcb4": 7,
        "pipe_fryum": 9,
    }


def test_the_csv_file_names_the_defects_of_other_categories_in_visas_layout(tmp_path: Path) -> None:
    folder = visa(tmp_path, "gear")
    labels = ["dent", "dent", "rust", "rust", "dent,rust", "odd"]
    rows = [["image", "label", "mask"]]
    rows += [
        [f"gear/Data/Images/Anomaly/{number:03d}.JPG", label, f"gear/Data/Masks/Anomaly/{number:03d}.png"]
        for number, label in enumerate(labels[:5])
    ]
    table(folder / "image_anno.csv", rows)
    found = samples(folder.parent, "gear")
    assert [sample.defect_type for sample in found[:6]] == ["dent", "dent", "rust", "rust", "dent", "anomaly_2"]
    assert [mask.defect_type for mask in found[4].masks] == ["dent", "rust"]


def test_visas_csv_file_gives_the_split_and_images_missing_in_it_are_reported(tmp_path: Path) -> None:
    folder = visa(tmp_path)
    prepared = run(folder, keep_split=True)
    by_split = {
        name: {image["original_file"] for image in content(prepared, name)["images"]}
        for name in ("train", "val", "test")
    }
    assert by_split["test"] == {
        f"pcb1/Data/Images/{kind}/{number:03d}.JPG" for kind in ("Normal", "Anomaly") for number in (4, 5)
    }
    assert len(by_split["train"]) + len(by_split["val"]) == 8
    draw_image(folder / "Data/Images/Normal/900.JPG", 900)
    (folder / "Data/Images/Normal/000.JPG").unlink()
    assert [(one.kind, one.where) for one in problems(folder.parent, "pcb1")] == [
        ("no image", "pcb1/Data/Images/Normal/000.JPG"),
        ("not divided", "pcb1/Data/Images/Normal/900.JPG"),
    ]


def test_mvtec_ad_2_has_several_light_conditions_of_a_part_and_private_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lights = ("regular", "overexposed", "shift_1")
    images = {
        f"test_public/{kind}/{number:03d}_{light}.png": hash_of(kind + light) + number
        for kind in ("good", "bad")
        for number in range(4)
        for light in lights
    }
    images |= {f"{part}/000_regular.png": hash_of(part) for part in ("train/good", "validation/good", "test_private")}
    masks = {
        f"test_public/ground_truth/bad/{number:03d}_{light}_mask.png": spot(number)
        for number in range(4)
        for light in lights
    }
    folder = files(tmp_path / "data" / "can", images, masks)
    assert layout_of(folder.parent) == "mvtec_ad_2"
    with caplog.at_level(logging.INFO):
        prepared = run(folder, classes="type")
    assert f"{folder.parent} has the layout mvtec_ad_2" in caplog.text
    assert "27 images: 24 used, 3 not used: 2 --good_images test, 1 in test_private" in caplog.text
    assert len(sides(prepared)) == 24
    for kind in ("good", "bad"):
        for number in range(4):
            names = [f"can/test_public/{kind}/{number:03d}_{light}.png" for light in lights]
            assert len({sides(prepared)[name] for name in names}) == 1
    assert info(prepared)["tally"]["images"]["not_used"]["in test_private"] == ["can/test_private/000_regular.png"]
    with pytest.raises(UnusedError, match="test_private"):
        run(folder, strict=True, overwrite=True)
    shutil.rmtree(folder / "test_private")
    assert run(folder, strict=True, overwrite=True).train["images"] > 0, (
        "images that a setting leaves out are not an error"
    )


def test_btad_calls_good_images_ok(tmp_path: Path) -> None:
    images = {
        **numbered("test/ok", 4, suffix=".bmp"),
        **numbered("test/ko", 4, suffix=".bmp"),
        **numbered("train/ok", 2, suffix=".bmp"),
    }
    masks = {f"ground_truth/ko/{number:03d}.png": spot(number) for number in range(4)}
    folder = files(tmp_path / "data" / "01", images, masks | {"ground_truth/ok/000.png": BLACK})
    assert layout_of(folder.parent) == "btad"
    assert set(kinds(folder).values()) == {"good", "ko"}
    prepared = run(folder, good_images="all", good_as="empty", strict=True)
    assert info(prepared)["tally"]["images"] == {"found": 10, "used": 10, "not_used": {}}
    assert info(prepared)["tally"]["annotations"] == {"found": 5, "used": 5, "not_used": {}}
    assert (joined(prepared)["01/test/ko/002.bmp"] == (spot(2) > 0)).all()
    assert problems(folder.parent, "01") == []


def ksdd2(tmp_path: Path) -> Path:
    images: dict[str, int] = {}
    masks: dict[str, Mask] = {}
    for part, first in (("train", 10000), ("test", 20000)):
        for number in range(first, first + 8):
            images[f"{part}/{number}.png"] = number
            masks[f"{part}/{number}_GT.png"] = spot(number % 8, 90) if number % 2 else BLACK
    return files(tmp_path / "data" / "KolektorSDD2", images, masks)


def test_in_kolektorsdd2_an_image_with_a_black_mask_is_good(tmp_path: Path) -> None:
    folder = ksdd2(tmp_path)
    assert layout_of(folder.parent) == "ksdd2"
    found = kinds(folder)
    assert len(found) == 16
    assert found == {name: "defect" if int(Path(name).stem) % 2 else "good" for name in found}
    prepared = run(folder, good_images="all", good_as="empty", strict=True)
    assert info(prepared)["tally"]["images"]["used"] == 16
    assert info(prepared)["tally"]["annotations"]["used"] == 16
    assert (joined(prepared)["KolektorSDD2/train/10003.png"] == (spot(3) > 0)).all()
    (folder / "test/20003_GT.png").unlink()
    with pytest.raises(FlawmaskError, match=r"20003\.png has no mask: draw test/20003_GT\.png, or paint .* black"):
        run(folder, overwrite=True)


# Plain folders


def plain(tmp_path: Path, suffix: str = "_mask") -> Path:
    images = {f"images/{number}.png": number for number in range(8)}
    masks = {f"masks/{number}{suffix}.png": spot(number) for number in range(4)}
    return files(tmp_path / "data" / "part", images, masks | {f"masks/4{suffix}.png": BLACK})


@pytest.mark.parametrize("suffix", ["", "_mask", "-gt"])
def test_images_and_masks_in_plain_folders_are_matched_by_name_with_any_suffix(
    tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = plain(tmp_path, suffix)
    assert layout_of(folder.parent) == "folders"
    assert kinds(folder) == {f"images/{number}.png": "defect" if number < 4 else "good" for number in range(8)}
    assert kinds(folder, mask_suffix=suffix) == kinds(folder)
    (warned,) = problems(folder.parent, "part")
    assert (warned.kind, warned.where) == ("no mask", "part/images/5.png")
    assert "3 images (of 8) without a mask, which count as good" in warned.message
    prepared = run(folder, good_as="empty")
    assert "part/images/5.png is the first of 3 images (of 8) without a mask" in caplog.text
    assert (joined(prepared)["part/images/2.png"] == (spot(2) > 0)).all()
    assert info(prepared)["tally"]["annotations"] == {"found": 5, "used": 5, "not_used": {}}


def test_files_beside_plain_folders_are_counted(tmp_path: Path) -> None:
    folder = files(plain(tmp_path), {"test/dent/0.png": 50, "9.png": 51}, {"ground_truth/dent/0_mask.png": spot()})
    tally = info(run(folder))["tally"]
    assert tally["images"]["not_used"] == {"in test/dent": ["part/test/dent/0.png"], "in .": ["part/9.png"]}
    assert tally["annotations"]["not_used"] == {"no image": ["part/ground_truth/dent/0_mask.png"]}


def test_a_category_of_another_layout_is_refused_with_a_hint_to_name_it(tmp_path: Path) -> None:
    folder = files(tmp_path / "data" / "other", {"test/dent/0.png": 1}, {"ground_truth/dent/0_mask.png": spot()})
    plain(tmp_path)
    with pytest.raises(FlawmaskError, match=r"has no category other: it has part; .* --layout"):
        samples(folder.parent, "other")


def test_plain_folders_may_have_any_name_and_lie_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = plain(tmp_path)
    (folder / "images").rename(folder / "photos")
    (folder / "masks").rename(folder / "labels")
    assert len(kinds(folder, images="photos", masks="labels")) == 8
    monkeypatch.chdir(tmp_path)
    given = {"images": "data/part/photos", "masks": str(folder / "labels"), "mvtec_root": Path("nowhere")}
    prepared = prepare(PrepareConfig(category="mine", output_dir=tmp_path / "out", **given))  # type: ignore[arg-type]
    assert set(sides(prepared)) == {f"data/part/photos/{number}.png" for number in range(8)}
    report = examine(DoctorConfig(category="mine", sheet_images=0, **given))  # type: ignore[arg-type]
    assert sum(count.images for count in report.counts) == 8
    with pytest.raises(FlawmaskError, match=r"data/part/nothing is not a folder.*--masks"):
        prepare(PrepareConfig(category="mine", **given | {"masks": "data/part/nothing"}))  # type: ignore[arg-type]


def test_the_suffix_distinguishes_images_and_masks_in_one_folder(tmp_path: Path) -> None:
    folder = plain(tmp_path)
    for path in (folder / "masks").iterdir():
        path.rename(folder / "images" / path.name)
    with pytest.raises(FlawmaskError, match="with --mask_suffix"):
        kinds(folder, images="images", masks="images")
    found = kinds(folder, images="images", masks="images", mask_suffix="_mask")
    assert sorted(found.values()) == ["defect"] * 4 + ["good"] * 4


def test_subfolders_of_the_images_give_the_split_and_the_type(tmp_path: Path) -> None:
    folder = files(
        tmp_path / "data" / "part",
        {
            f"images/{name}.png": seed
            for seed, name in enumerate(("train/dent/1", "train/dent/2", "val/good/3", "test/rust/4", "5"))
        },
        {f"masks/{name}.png": spot(row) for row, name in enumerate(("train/dent/1", "train/dent/2", "test/rust/4"))},
    )
    found = {sample.image.stem: (sample.origin, sample.defect_type) for sample in samples(folder.parent, "part")}
    assert found == {
        "1": ("train", "dent"),
        "2": ("train", "dent"),
        "3": ("val", "good"),
        "4": ("test", "rust"),
        "5": ("test", "good"),
    }
    (folder / "masks/train/dent/2.png").unlink()
    with pytest.raises(FlawmaskError, match=r"dent/2\.png has no mask: draw masks/train/dent/2\.png"):
        run(folder)


def test_masks_whose_names_do_not_follow_from_the_images_are_refused(tmp_path: Path) -> None:
    folder = plain(tmp_path)
    for number, path in enumerate(sorted((folder / "masks").iterdir())):
        path.rename(path.with_name(f"m{number}.png"))
    with pytest.raises(FlawmaskError, match=r"names of the masks do not match .* --mask_suffix"):
        kinds(folder)


def test_the_settings_of_plain_folders_are_refused_with_other_layouts() -> None:
    with pytest.raises(FlawmaskError, match="--mask_suffix is for --layout folders, and --layout is mvtec"):
        LayoutSettings(layout="mvtec", mask_suffix="_x")


# Other names for good


@pytest.mark.parametrize("name", ["OK", "Good", "normal", "gut", "合格", "i.O.", "good_parts", "defect-free", "1_ok"])
def test_a_type_whose_name_may_mean_good_must_be_confirmed(tiny_category: Make, name: str) -> None:
    folder = tiny_category(good=3, crack=3)
    (folder / "test/good").rename(folder / "test" / name)
    with pytest.raises(
        FlawmaskError, match=rf"name that looks like that of good images: give --good_name {name} .* --good_name good"
    ):
        run(folder)
    report = examine(DoctorConfig(mvtec_root=folder.parent, category="part", sheet_images=0))
    assert ("error", "good by another name", f"part/test/{name}") in [
        (one.severity, one.kind, one.where) for one in report.problems
    ]
    prepared = run(folder, good_name=name)
    assert sorted(image["defect_type"] for image in records(prepared)) == ["crack"] * 3 + ["good"] * 3


def test_good_name_applies_to_training_images_too(tiny_category: Make) -> None:
    folder = tiny_category(good=2, train_good=2, crack=2)
    for part in ("test", "train"):
        (folder / part / "good").rename(folder / part / "OK")
    assert sorted(kinds(folder, good_name="gut,OK").values()) == ["crack"] * 2 + ["good"] * 4


def test_a_defect_type_may_have_a_name_that_sounds_good_if_the_user_confirms_it(tiny_category: Make) -> None:
    folder = tiny_category(good=2, normal=2, crack=2)
    prepared = run(folder, good_name="good")
    assert sorted(image["defect_type"] for image in records(prepared)) == ["crack"] * 2 + ["good"] * 2 + ["normal"] * 2


@pytest.mark.parametrize("name", ["not_ok", "ng", "ko", "n.i.O.", "goodness", "broken", "defekt"])
def test_other_types_need_no_confirmation(tiny_category: Make, name: str) -> None:
    folder = tiny_category(good=2, **{name: 2})
    assert problems(folder.parent, "part") == []


# The data set's own split


def test_with_keep_split_the_test_images_are_those_of_the_data_set(tmp_path: Path) -> None:
    folder = ksdd2(tmp_path)
    prepared = run(folder, keep_split=True, train_ratio=0.75)
    of = {
        name: [image["original_file"] for image in content(prepared, name)["images"]]
        for name in ("train", "val", "test")
    }
    assert sorted(of["test"]) == [f"KolektorSDD2/test/{number}.png" for number in range(20000, 20008)]
    assert {Path(name).parent.name for name in of["train"] + of["val"]} == {"train"}
    assert (len(of["train"]), len(of["val"])) == (6, 2)
    assert info(prepared)["split_method"] == "layout"
    assert info(prepared)["tally"]["images"]["used"] == 16


def test_with_keep_split_the_validation_images_are_those_of_the_data_set(tmp_path: Path) -> None:
    images = {
        f"images/{part}/{kind}/{number}.png": hash_of(part + kind) + number
        for part in ("train", "val", "test")
        for kind in ("good", "dent")
        for number in range(2)
    }
    masks = {name.replace("images", "masks"): spot() for name in images if "dent" in name}
    folder = files(tmp_path / "data" / "part", images, masks)
    prepared = run(folder, keep_split=True)
    for name in ("train", "val", "test"):
        assert {Path(image["original_file"]).parents[1].name for image in content(prepared, name)["images"]} == {name}


def test_keep_split_without_defects_for_training_is_refused(tiny_category: Make) -> None:
    folder = tiny_category(good=2, train_good=4, crack=3)
    with pytest.raises(FlawmaskError, match="no defective image to train on: leave out --keep_split"):
        run(folder, keep_split=True)
    assert not (folder.parents[1] / "out").exists()


def test_keep_split_with_a_picture_in_two_splits_is_refused(tmp_path: Path) -> None:
    folder = ksdd2(tmp_path)
    shutil.copy(folder / "train/10000.png", folder / "test/20000.png")
    with pytest.raises(FlawmaskError, match=r"10000\.png is for train and shows .*20000\.png, which is for test"):
        run(folder, keep_split=True)


def test_keep_split_cannot_be_combined_with_another_split() -> None:
    for other in ({"test_ratio": 0.2}, {"folds": 3}):
        with pytest.raises(FlawmaskError, match=f"leave out --{next(iter(other))}"):
            PrepareConfig(category="part", keep_split=True, **other)


# Every file is counted


STRAYS = {
    "test/crack/photo.cr2": ("images", "suffix .cr2"),
    "test/good/a.webp": ("images", "suffix .webp"),
    "test/stray.png": ("images", "in test"),
    "stray.png": ("images", "in ."),
    "other/deep/er/x.png": ("images", "in other/deep"),
    "test/crack/000.json": ("annotations", "suffix .json"),
    "ground_truth/crack/900_mask.png": ("annotations", "no image"),
    "ground_truth/dent/000_mask.png": ("annotations", "no image"),
    "ground_truth/crack/000_mask.psd": ("annotations", "suffix .psd"),
}
UNCOUNTED = ("readme.txt", "test/Thumbs.db", "test/.x.png", "test/crack/@eaDir/x.png")


@given(
    strays=st.sets(st.sampled_from(sorted(STRAYS))),
    uncounted=st.sets(st.sampled_from(UNCOUNTED)),
    broken=st.booleans(),
    good_images=st.sampled_from(["test", "all"]),
)
@settings(max_examples=12, deadline=None)
def test_every_file_that_was_found_is_used_or_listed_with_the_reason(
    tmp_path_factory: pytest.TempPathFactory,
    strays: set[str],
    uncounted: set[str],
    broken: bool,
    good_images: Literal["test", "all"],
) -> None:
    folder = files(
        tmp_path_factory.mktemp("counted") / "data" / "part",
        {**numbered("test/crack", 3), **numbered("test/good", 3), **numbered("train/good", 2)},
        {f"ground_truth/crack/{number:03d}_mask.png": spot(number) for number in range(3)},
    )
    expected: dict[str, dict[str, int]] = {"images": {}, "annotations": {}}
    for name in strays | uncounted:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    for name in strays:
        what, reason = STRAYS[name]
        expected[what][reason] = expected[what].get(reason, 0) + 1
    if good_images == "test":
        expected["images"]["--good_images test"] = 2
    if broken:
        (folder / "test/crack/001.png").write_bytes(b"no image")
        expected["images"]["bad image or mask"] = expected["annotations"]["bad image or mask"] = 1
    prepared = run(folder, good_images=good_images, on_error="skip", overwrite=True)
    for what, found in (("images", 8), ("annotations", 3)):
        tally = info(prepared)["tally"][what]
        assert {reason: len(names) for reason, names in tally["not_used"].items()} == expected[what]
        assert tally["found"] == tally["used"] + sum(expected[what].values())
        in_place = sum(STRAYS[name][0] == what for name in strays)
        assert tally["found"] == found + in_place
    report = examine(DoctorConfig(mvtec_root=folder.parent, category="part", sheet_images=0, good_images=good_images))
    assert {tally.what: tally.to_dict() for tally in report.tallies} == info(prepared)["tally"]
    told = {problem.where for problem in report.problems}
    assert {f"part/{name}" for name in strays} <= told | {"part/ground_truth/dent/000_mask.png"}


def test_strict_stops_before_anything_is_written(tiny_category: Make) -> None:
    folder = tiny_category()
    (folder / "test/crack/photo.cr2").write_bytes(b"")
    with pytest.raises(
        UnusedError, match=r"10 images: 9 used, 1 not used: suffix \.cr2 \(part/test/crack/photo\.cr2\)"
    ):
        run(folder, strict=True)
    assert not (folder.parents[1] / "out").exists()
