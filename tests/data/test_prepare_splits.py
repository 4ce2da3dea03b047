"""Prepare: the split into training, validation and test images, and images that must stay together."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prepared import Make, content, draw_image, info, run, sides, write_mask

from flawmask.data.prepare import PrepareConfig, prepare
from flawmask.errors import FlawmaskError


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


def test_the_split_method_is_recorded_and_an_older_data_set_without_it_is_reused(
    tiny_category: Make,
) -> None:
    folder = tiny_category(good=6, crack=4)
    made = run(folder)
    assert info(made)["split_method"] == "shuffle"
    old = info(made)
    del old["split_method"]
    (made.dataset_dir / "dataset_info.json").write_text(json.dumps(old))
    assert run(folder).reused
    shutil.copy(folder / "test/good/000.png", folder / "test/good/006.png")
    assert info(run(folder, overwrite=True))["split_method"] == "integer program"


def test_images_with_identical_bytes_are_in_one_split(tiny_category: Make) -> None:
    folder = tiny_category(good=6, train_good=2)
    shutil.copy(folder / "test/good/000.png", folder / "train/good/000.png")
    shutil.copy(folder / "test/good/000.png", folder / "test/good/005.png")
    seen = set()
    for seed in range(8):
        found = sides(run(folder, seed=seed, good_images="all", train_ratio=0.5, overwrite=True))
        same = {found[f"part/{place}"] for place in ("test/good/000.png", "train/good/000.png", "test/good/005.png")}
        assert len(same) == 1
        seen |= same
    assert seen == {"train", "val"}, "the pair is in the same split for all seeds, so the test would prove nothing"


def test_the_identical_bottles_are_in_one_split(shared_data: Path, tmp_path: Path) -> None:
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
def test_files_with_the_same_part_in_their_names_stay_together(tmp_path: Path, pattern: str, key: int) -> None:
    folder = tmp_path / "mvtec" / "tile"
    for part in range(6):
        for view in range(3):
            name = f"part{part}_view{view}"
            kind = "good" if (part + view) % 2 else "crack"  # each part has views of both types
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


def test_the_test_split_is_set_aside_first(tiny_category: Make) -> None:
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


def test_each_image_is_validated_in_one_fold_and_trained_on_in_all_others(tiny_category: Make) -> None:
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


def test_all_folds_have_the_same_test_split(tiny_category: Make) -> None:
    folder = tiny_category(good=10, crack=10)
    tests = []
    for fold in (1, 2):
        made = run(folder, folds=2, fold=fold, test_ratio=0.2, output_dir=folder.parents[1] / f"fold{fold}")
        tests.append([image["original_file"] for image in content(made, "test")["images"]])
    assert tests[0] == tests[1]
    assert len(tests[0]) == 4


def test_a_type_with_fewer_images_than_folds_gives_a_warning(
    tiny_category: Make, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_category(good=6, crack=6, hole=2)
    run(folder, folds=3, fold=1)
    assert "hole: 2 images (or groups) for 3 folds: some folds evaluate without it" in caplog.text
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
def test_impossible_folds_and_test_ratios_are_refused(tiny_category: Make, settings: dict[str, Any], says: str) -> None:
    folder = tiny_category()
    with pytest.raises(FlawmaskError, match=says):
        run(folder, **settings)
    assert not (folder.parents[1] / "out").exists()


def test_a_category_without_validation_images_is_refused(tiny_category: Make) -> None:
    with pytest.raises(FlawmaskError, match="none is left for validation"):
        run(tiny_category(good=1, crack=1))


@pytest.mark.parametrize("ratio", [0, 1, -1, 1.5, math.nan, math.inf])
def test_a_ratio_outside_0_to_1_is_refused(ratio: float) -> None:
    with pytest.raises(FlawmaskError, match="--train_ratio"):
        PrepareConfig(category="part", train_ratio=ratio)
