"""Prepare: groups are recorded, counted, logged and kept in one split; without groups, file names are searched."""

import itertools
import json
import logging
import shutil
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pytest
import side_by_side
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import Make, content, draw_image, info, run, write_mask

from flawmask import cli
from flawmask.coco import read_split
from flawmask.data import layouts
from flawmask.data.augment import AugmentConfig, augment
from flawmask.data.demo import DemoConfig, generate
from flawmask.data.layouts import LAYOUTS
from flawmask.data.prepare import PrepareConfig, Prepared, prepare
from flawmask.data.split import Member, fold_groups, split_groups
from flawmask.errors import FlawmaskError

BY_TILE = "^(tile[0-9]+)"


def groups_of(prepared: Prepared) -> dict[str, tuple[str, str]]:
    """Return the split and the group of each image by its original file."""
    names = [name for name in ("train", "val", "test") if (prepared.dataset_dir / name).is_dir()]
    return {
        image["original_file"]: (name, image["group"]) for name in names for image in content(prepared, name)["images"]
    }


def draw(folder: Path, place: str, name: str, seed: int) -> None:
    draw_image(folder / place / f"{name}.png", seed)
    if "good" not in place:
        write_mask(folder / place.replace("test", "ground_truth") / f"{name}_mask.png", np.eye(14, 18) > 0)


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    """A category of 6 parts; each has two images with a crack, one good image in test/good and one in train/good."""
    folder = tmp_path / "mvtec" / "tile"
    for part in range(6):
        for view, place in enumerate(("test/crack", "test/crack", "test/good", "train/good")):
            draw(folder, place, f"tile{part:03d}_exp{view}", 10 * part + view)
    return folder


def test_a_record_names_its_group_and_the_counts_include_groups(tiles: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    made = run(tiles, group_by=BY_TILE, train_ratio=0.67, good_images="all")
    found = groups_of(made)
    assert {file: group for file, (_, group) in found.items()} == {file: Path(file).name[:7] for file in found}
    assert (made.train["images"], made.train["groups"]) == (16, 4)
    assert (made.val["images"], made.val["groups"]) == (8, 2)
    assert info(made)["val"]["groups"] == 2
    assert read_split(made.dataset_dir, "val").groups == [group for side, group in found.values() if side == "val"]
    assert "images: train 16 of 4 parts, val 8 of 2 parts" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_table_of_prepare_shows_images_and_parts(
    tiles: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiles.parents[1])
    monkeypatch.setenv("COLUMNS", "200")
    place: dict[str, Any] = {"mvtec_root": tiles.parent, "category": "tile"}
    assert cli._prepare(PrepareConfig(**place, group_by=BY_TILE, train_ratio=0.67)) == 0
    assert "12 of 4 parts" in capsys.readouterr().out


def test_without_groups_no_record_names_one_and_nothing_else_changes(tiny_category: Make) -> None:
    made = run(tiny_category(good=6, crack=4))
    assert not any("group" in image for name in ("train", "val") for image in content(made, name)["images"])
    assert "groups" not in made.train
    assert read_split(made.dataset_dir, "train").groups is None


def test_groups_of_the_layout_are_recorded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYOUTS, "side_by_side", side_by_side)
    for part, name in itertools.product("abcd", (0, 1)):
        draw_image(tmp_path / "mvtec/plate/test" / f"{part}-{name}.png", ord(part) + 200 * name)
    for part in "abc":
        write_mask(tmp_path / "mvtec/plate/test" / f"{part}-1_GT_stain.png", np.eye(14, 18) > 0)
    found = groups_of(run(tmp_path / "mvtec" / "plate", layout="side_by_side"))
    assert {file: group for file, (_, group) in found.items()} == {file: Path(file).name[0] for file in found}


def test_equal_pictures_with_two_part_names_form_one_group_with_both_names(tiles: Path) -> None:
    shutil.copy(tiles / "test/crack/tile000_exp0.png", tiles / "test/good/tile005_exp9.png")
    found = groups_of(run(tiles, group_by=BY_TILE))
    joined = {Path(file).name[:7] for file, (_, group) in found.items() if group == "tile000 = tile005"}
    assert joined == {"tile000", "tile005"}
    assert len({side for side, group in found.values() if group == "tile000 = tile005"}) == 1


def test_an_image_that_the_pattern_does_not_match_is_its_own_group_and_is_reported(
    tiles: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(4):
        draw(tiles, "test/good", f"plate{number}", 90 + number)
    made = run(tiles, group_by=BY_TILE)
    of_plates = sorted(group for file, (_, group) in groups_of(made).items() if "plate" in file)
    assert of_plates == [f"tile/test/good/plate{number}.png" for number in range(4)]
    said = "--group_by '^(tile[0-9]+)' does not match 4 of 22 file names (plate0.png, plate1.png, plate2.png, ...)"
    assert f"{said}: each of them counts as a separate part" in caplog.text


def test_a_pattern_that_matches_no_name_is_refused_with_an_example(tiles: Path) -> None:
    with pytest.raises(
        FlawmaskError, match=r"--group_by '\^part' matches none of 18 file names, such as tile000_exp0\.png"
    ):
        run(tiles, group_by="^part")
    assert not (tiles.parents[1] / "out").exists()


def test_an_older_data_set_without_groups_is_not_reused_if_groups_are_known(tiles: Path) -> None:
    made = run(tiles, group_by=BY_TILE)
    assert run(tiles, group_by=BY_TILE).reused
    old = info(made)
    for name in ("train", "val"):
        del old[name]["groups"]
    (made.dataset_dir / "dataset_info.json").write_text(json.dumps(old))
    with pytest.raises(FlawmaskError, match="older version, which wrote no groups: make it anew, --overwrite"):
        run(tiles, group_by=BY_TILE)
    again = run(tiles, group_by=BY_TILE, overwrite=True)
    assert again.train["groups"] == made.train["groups"]
    assert run(tiles, group_by=BY_TILE).reused


def test_variants_carry_the_group_of_their_source_and_are_counted_with_it(tiles: Path) -> None:
    made = run(tiles, group_by=BY_TILE)
    folder = augment(AugmentConfig(dataset_dir=made.dataset_dir, augmentation_factor=2)).dataset_dir
    split = read_split(folder, "train")
    groups = {image["id"]: image["group"] for image in split.images}
    assert len(split.images) == 3 * made.train["images"]
    assert all(groups[image["id"]] == groups[image.get("source_id", image["id"])] for image in split.images)
    counts = json.loads((folder / "dataset_info.json").read_text())
    assert counts["train"]["groups"] == made.train["groups"]
    assert counts["val"]["groups"] == made.val["groups"]


# No group in two splits


@st.composite
def images(draw: st.DrawFn) -> list[tuple[str, int, int]]:
    """Return the place, the part and the picture of each image. Parts span types and train/good, and some pictures
    occur twice, as two parts."""
    places = st.sampled_from(["test/crack", "test/hole", "test/good", "train/good"])
    drawn = draw(st.lists(st.tuples(places, st.integers(0, 9), st.integers(0, 99)), min_size=12, max_size=24))
    return [*drawn, ("test/crack", 10, 100), ("test/crack", 11, 101), ("test/good", 12, 102)]


@settings(max_examples=10, deadline=None)
@given(images(), st.sampled_from(["test", "all"]), st.sampled_from([0.0, 0.3]), st.integers(0, 3))
def test_no_group_is_in_two_splits_or_folds(
    drawn: list[tuple[str, int, int]], good_images: str, test_ratio: float, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "mvtec" / "tile"
        for number, (place, part, picture) in enumerate(drawn):
            draw(root, place, f"tile{part:02d}_{number}", picture)
        for folds, fold in [(1, None), (3, 1), (3, 2), (3, 3)]:
            given: dict[str, Any] = {"good_images": good_images, "test_ratio": test_ratio, "seed": seed}
            try:
                made = run(root, group_by=BY_TILE, folds=folds, fold=fold, overwrite=True, **given)
            except FlawmaskError as error:  # if many parts are joined, too few groups remain
                assert "(or group" in str(error)
                continue
            check_sides(made, root, good_images)


def check_sides(made: Prepared, root: Path, good_images: str) -> None:
    """Compare groups with the files: no part and no picture is in two splits, and each group names its parts."""
    found = groups_of(made)
    assert len(found) == sum(good_images == "all" or "train" not in path.parts for path in root.glob("t*/*/*.png"))
    sides: dict[Any, set[str]] = defaultdict(set)
    parts: dict[str, set[str]] = defaultdict(set)
    groups: dict[Any, set[str]] = defaultdict(set)
    for file, (side, group) in found.items():
        part, pixels = Path(file).name[:6], (root.parent / file).read_bytes()
        parts[group].add(part)
        for shown in (part, pixels):
            sides[shown].add(side)
            groups[shown].add(group)
    assert all(len(one) == 1 for one in (*sides.values(), *groups.values()))
    assert all(group.split(" = ") == sorted(of_group) for group, of_group in parts.items())


@pytest.mark.timeout(120)
@pytest.mark.parametrize("good_images", ["test", "all"])
def test_the_tiles_are_split_into_folds_quickly_and_no_tile_is_in_two_splits(
    shared_data: Path, tmp_path: Path, good_images: Literal["test", "all"], capfd: pytest.CaptureFixture[str]
) -> None:
    samples = layouts.select_samples(layouts.samples(shared_data, "magnetic_tile"), good_images)
    parts = [sample.image.name[:7] for sample in samples]
    members = [Member(f"part {part}", sample.defect_type) for part, sample in zip(parts, samples, strict=True)]
    began = time.perf_counter()
    found = fold_groups(members, 5, 42)
    assert time.perf_counter() - began < 10
    assert capfd.readouterr().out == "", "the solver printed something"
    assert sorted(itertools.chain.from_iterable(found)) == sorted({member.group for member in members})
    sizes = [sum(member.group in fold for member in members) for fold in found]
    assert max(sizes) < 1.3 * min(sizes)
    place: dict[str, Any] = {"mvtec_root": shared_data, "category": "magnetic_tile", "link": "symlink"}
    chosen: dict[str, Any] = {"folds": 5, "fold": 2, "good_images": good_images, "group_by": BY_TILE}
    of_images = groups_of(prepare(PrepareConfig(**place, **chosen, output_dir=tmp_path / "fold")))
    assert {file: group for file, (_, group) in of_images.items()} == {
        sample.original_file: part for part, sample in zip(parts, samples, strict=True)
    }
    assert all((side == "val") == (f"part {group}" in found[1]) for side, group in of_images.values())


@pytest.mark.parametrize("seed", [42, 0])
def test_the_solver_that_divides_groups_is_silent(
    shared_data: Path, seed: int, capfd: pytest.CaptureFixture[str]
) -> None:
    samples = layouts.select_samples(layouts.samples(shared_data, "magnetic_tile"), "test")
    split_groups([Member(sample.image.name[:7], sample.defect_type) for sample in samples], 0.8, seed)
    assert capfd.readouterr().out == ""  # with presolve, HiGHS's C++ wrote seven lines for seed 42


# Searching for groups if none are known


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_names_that_contain_parts_give_one_warning_with_the_flag(tiles: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tiles)
    (line,) = warnings(caplog)
    assert line.startswith("tile has file names that suggest 6 parts on 18 of its 18 images: ")
    assert line.endswith("If so, keep each in one split with --group_by '^(tile[0-9]+)'")
    caplog.clear()
    run(tiles, group_by=BY_TILE, overwrite=True)
    assert not warnings(caplog)


def test_only_the_first_fold_gives_this_warning(tiles: Path, caplog: pytest.LogCaptureFixture) -> None:
    for fold in (1, 2):
        run(tiles, folds=2, fold=fold, output_dir=tiles.parents[1] / f"fold{fold}")
    assert len(warnings(caplog)) == 1


def test_pictures_that_look_the_same_give_a_warning_if_names_contain_no_parts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "mvtec" / "part"
    for number in range(6):
        draw(folder, "test/crack" if number % 2 else "test/good", f"{number:03d}", number)
    pixels = cv2.imread(str(folder / "test/good/000.png"))
    assert pixels is not None
    assert cv2.imwrite(str(folder / "test/good/009.png"), np.rint(pixels * 0.95).astype(np.uint8))
    run(folder)
    (line,) = warnings(caplog)
    assert line.startswith("1 images look like others, for example part/test/good/009.png like part/test/good/000.png")
    assert "--group_by" in line


def test_bottles_and_the_demo_give_no_false_warning(
    shared_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place: dict[str, Any] = {"mvtec_root": shared_data / "mvtec_ad_sample", "category": "bottle"}
    prepare(PrepareConfig(**place, output_dir=tmp_path / "bottle"))
    generate(DemoConfig(mvtec_root=tmp_path / "mvtec", defective=15, image_size=128))
    prepare(PrepareConfig(mvtec_root=tmp_path / "mvtec", category="demo", output_dir=tmp_path / "demo"))
    assert not warnings(caplog)
