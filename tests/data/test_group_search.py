"""Parts in file names are found if the names have such a form, and not otherwise."""

import random
from pathlib import Path

import pytest

from flawmask.data.group_search import find_groups


def pattern_of(names: list[str]) -> str | None:
    found = find_groups(names)
    return found.pattern if found else None


def test_names_that_begin_with_a_part_give_groups_and_the_flag_that_keeps_them_together() -> None:
    found = find_groups([f"part{part:04d}_{view}.png" for part in range(20) for view in "abc"])
    assert found is not None
    assert found.flag == "--group_by '^(part[0-9]+)'"
    assert str(found) == (
        "has file names that suggest 20 parts on 60 of its 60 images: part0000_a.png and part0000_b.png would show the "
        "same part"
    )
    assert len(set(found.parts)) == 20


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        ([f"{part:03d}-{view}.png" for part in range(9) for view in range(4)], "^([0-9]+)"),
        ([f"part{part}{view}.png" for part in range(9) for view in "ab"], "^(part[0-9]+)"),
        ([f"lot{lot}-part{part}_{view}.png" for lot in (1, 2) for part in range(9) for view in "ab"],
         "^(lot[0-9]+-part[0-9]+)"),
        ([f"{kind}_part{part}_{view}.png" for kind in ("ok", "bad") for part in range(9) for view in "ab"],
         "(part[0-9]+)"),
        ([f"p.{part} (x)_{view}.png" for part in range(9) for view in "ab"], r"^(p\.[0-9]+)"),
        ([f"kos{part:02d}_Part{view}.jpg" for part in range(50) for view in range(8)], "^(kos[0-9]+)"),
        ([f"part{part}_{view}.png" for part in range(20) for view in "ab"] + ["old.png", "older.png"], "^(part[0-9]+)"),
    ],
)  # fmt: skip
def test_several_forms_of_names(names: list[str], pattern: str) -> None:
    assert pattern_of(names) == pattern
    random.Random(0).shuffle(names)
    assert pattern_of(names) == pattern


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["part1_a.png"],
        [f"{number:03d}.png" for number in range(60)],
        [f"IMG_{number:04d}.JPG" for number in range(60)],
        [f"{number:03d}.png" for number in range(20)] * 5,  # in a folder for each type
        [f"image ({number}).png" for number in range(20)] * 5,
        [f"{number:03d}-crop.png" for number in range(20)] * 5,
        [f"exp{camera}_num_{number}.jpg" for camera in range(6) for number in range(80)],  # a camera is not a part
        [f"line2_{number:04d}_ok.png" for number in range(60)],
        [f"202605{day:02d}_{number:03d}.png" for day in range(1, 29) for number in range(3)],  # days
        [f"2026-05-{day:02d}_{number:03d}.png" for day in range(1, 29) for number in range(3)],
        [f"part{part}_{view}.png" for part in range(3) for view in "ab"],  # too few parts
        [f"part{part}_a.png" for part in range(60)] + ["part0_b.png", "part1_b.png"],
        [f"part{part}_{view}.png" for part in range(10) for view in "ab"] + [f"x{one}.png" for one in range(10)],
    ],
)
def test_a_counter_a_camera_or_a_day_is_not_a_part(names: list[str]) -> None:
    assert pattern_of(names) is None


def test_groups_are_found_in_the_names_of_tiles_and_not_in_those_of_bottles(shared_data: Path) -> None:
    tiles = [path.name for path in shared_data.glob("magnetic_tile/t*/*/*.jpg")]
    found = find_groups(tiles)
    assert found is not None
    assert found.flag == "--group_by '^(tile[0-9]+)'"
    assert None not in found.parts
    assert find_groups([path.name for path in shared_data.glob("mvtec_ad_sample/bottle/t*/*/*.png")]) is None
