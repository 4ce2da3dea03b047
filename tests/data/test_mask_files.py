"""Mask files: one rule for a category, for the masks of any tool, and turned like their images."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from prepared import Make, info, joined, records, run, truth_of, write_mask

from flawmask.data.doctor import DoctorConfig, examine
from flawmask.errors import FlawmaskError
from flawmask.masks import Mask

Array = npt.NDArray[Any]
HEIGHT, WIDTH = 14, 18


def shape(seed: int) -> Mask:
    """Return a defect in two pieces that does not touch the corners."""
    random = np.random.default_rng(seed)
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    for left in (1, 10):
        y, x = random.integers(1, 5, 2)
        mask[y : y + 6, left + x : left + x + 3] = True
    return mask


def category(make: Make, draw: Callable[[Mask, int], Image.Image | Array], suffix: str = "png") -> Path:
    """Return the tiny category with masks from `draw`."""
    folder = make(crack=4, hole=3)
    for number, path in enumerate(sorted(folder.glob("ground_truth/*/*.png"))):
        path.unlink()
        drawn = draw(shape(number), number)
        picture = drawn if isinstance(drawn, Image.Image) else Image.fromarray(drawn)
        picture.save(path.with_suffix(f".{suffix}"), quality=90)  # a PNG ignores the quality
    return folder


def truths(folder: Path) -> dict[str, Mask]:
    paths = sorted(folder.glob("ground_truth/*/*"))
    return {f"part/test/{path.parent.name}/{path.stem[:3]}.png": shape(at) for at, path in enumerate(paths)}


def errors_of_doctor(folder: Path, **settings: Any) -> list[str]:
    report = examine(DoctorConfig(mvtec_root=folder.parent, category=folder.name, sheet_images=0, **settings))
    return [
        f"{one.severity} {one.kind}: {one.where} {one.message}" for one in report.problems if "images" not in one.kind
    ]


def grey(value: int, dtype: type = np.uint8) -> Callable[[Mask, int], Array]:
    return lambda mask, _: mask.astype(dtype) * dtype(value)


def in_alpha(colour: tuple[int, int, int]) -> Callable[[Mask, int], Array]:
    return lambda mask, _: np.dstack([*(np.full_like(mask, one, np.uint8) for one in colour), mask * np.uint8(255)])


def palette(*colours: tuple[int, int, int]) -> Callable[[Mask, int], Image.Image]:
    """Return a function that draws a mask with palette index 1, or 2 on every other image."""

    def draw(mask: Mask, number: int) -> Image.Image:
        picture = Image.fromarray(mask * np.uint8(1 + number % 2))
        picture.putpalette([channel for colour in colours for channel in colour])
        return picture

    return draw


def strokes(mask: Mask, _: int) -> Array:
    """Draw like a painting program: the defect is red, and transparent pixels have no colour."""
    return np.dstack((mask * np.uint8(255), np.zeros((HEIGHT, WIDTH, 2), np.uint8), mask * np.uint8(255)))


BLACK, RED = (0, 0, 0), (255, 0, 0)

KINDS: dict[str, tuple[str, Callable[[Mask, int], Any]]] = {
    "255": ("white", grey(255)),
    "1": ("nonzero", grey(1)),
    "100": ("nonzero", grey(100)),
    "255 in 16 bits": ("nonzero", grey(255, np.uint16)),
    "65535 in 16 bits": ("white", grey(65535, np.uint16)),
    "class numbers": ("nonzero", lambda mask, number: mask * np.uint8(1 + number % 3)),
    "1 on some, 255 on others": ("nonzero", lambda mask, number: mask * np.uint8(255 if number % 2 else 1)),
    "one bit": ("white", lambda mask, _: mask),
    "alpha of a white picture": ("alpha", in_alpha((255, 255, 255))),
    "alpha of a black picture": ("alpha", in_alpha(BLACK)),
    "alpha of a grey picture": ("alpha", in_alpha((90, 90, 90))),
    "strokes of a brush": ("white", strokes),
    "opaque white": (
        "white",
        lambda mask, _: np.dstack([mask * np.uint8(255)] * 3 + [np.full_like(mask, 255, np.uint8)]),
    ),
    "bright palette": ("white", palette(BLACK, RED, (0, 200, 0))),
    "dark palette": ("palette", palette(BLACK, (60, 0, 0), (0, 128, 0))),
    "dark colours": ("nonzero", lambda mask, _: np.dstack([mask * np.uint8(one) for one in (80, 0, 20)])),
}


@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_every_kind_are_read_exactly_with_one_rule_that_is_logged(
    tiny_category: Make, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    caplog.set_level(logging.INFO)
    rule, draw = KINDS[kind]
    folder = category(tiny_category, draw)
    prepared = run(folder)
    assert info(prepared)["mask_values"] == rule
    assert any("masks of part: " in one and f"--mask_values {rule}" in one for one in caplog.messages)
    found = joined(prepared)
    for name, truth in truths(folder).items():
        assert np.array_equal(found[name], truth), name
    assert not [one for one in errors_of_doctor(folder) if one.startswith("error")]


def test_jpeg_noise_is_not_a_defect_and_gives_a_warning(tiny_category: Make, caplog: pytest.LogCaptureFixture) -> None:
    folder = category(tiny_category, grey(255), "jpg")
    prepared = run(folder)
    assert info(prepared)["mask_values"] == "white"
    found = joined(prepared)
    for name, truth in truths(folder).items():
        assert (found[name] != truth).sum() <= 4, name
    assert any("hold several values" in one and "export them as PNG" in one for one in caplog.messages)
    dark = category(lambda **types: tiny_category(name="other", **types), grey(100), "jpg")
    with pytest.raises(
        FlawmaskError, match=r"000_mask\.jpg has no defect pixel"
    ):  # otherwise its noise would be a defect
        run(dark)


def test_several_values_where_one_was_expected_give_a_warning(
    tiny_category: Make, caplog: pytest.LogCaptureFixture
) -> None:
    def numbered(mask: Mask, _: int) -> Array:
        return mask * (np.arange(WIDTH) // 9 + 1).astype(np.uint8)

    folder = category(tiny_category, numbered)
    run(folder)
    (said,) = [one for one in caplog.messages if "several values" in one]
    assert said == (
        "part: 7 of 7 masks hold several values (1, 2), for example 000_mask.png; all count as defect: "
        "--mask_classes says which type each is"
    )
    assert any(one.startswith("warning mask values: part 7 of 7 masks") for one in errors_of_doctor(folder))
    caplog.clear()
    coloured = category(
        lambda **types: tiny_category(name="other", **types),
        lambda mask, _: np.dstack([numbered(mask, 0) * 120, numbered(mask, 0) % 2, numbered(mask, 0) * 0]),
    )
    run(coloured)
    assert any("#780100, #f00000" in one for one in caplog.messages)


def test_masks_of_two_kinds_without_a_common_rule_are_refused(tiny_category: Make) -> None:
    folder = category(tiny_category, in_alpha((255, 255, 255)))
    write_mask(folder / "ground_truth/hole/001_mask.png", shape(0) * np.uint8(255))
    said = r"000_mask\.png has its defect in the alpha channel, and .*hole.001_mask\.png does not: export all"
    with pytest.raises(FlawmaskError, match=said):
        run(folder)
    (problem,) = errors_of_doctor(folder)
    assert problem.startswith("error masks of two kinds: part cannot be read: ")
    report = examine(DoctorConfig(mvtec_root=folder.parent, category=folder.name, sheet_images=0))
    assert [tally.used for tally in report.tallies] == [0, 0]
    assert len(run(folder, mask_values="alpha", on_error="skip").left_out) == 1


@pytest.mark.parametrize(
    ("rule", "says"),
    [("white", "has no defect pixel"), ("alpha", "has no alpha channel"), ("palette", "has no palette")],
)
def test_a_rule_in_the_settings_is_followed(tiny_category: Make, rule: str, says: str) -> None:
    folder = category(tiny_category, grey(100))
    with pytest.raises(FlawmaskError, match=rf"_mask\.png {says}"):
        run(folder, mask_values=rule)
    assert len(errors_of_doctor(folder, mask_values=rule)) == 7
    assert not run(folder, mask_values="nonzero").left_out


def test_a_mask_without_a_0_is_not_entirely_defect(tiny_category: Make) -> None:
    folder = category(tiny_category, lambda mask, _: mask + np.uint8(1))
    with pytest.raises(FlawmaskError, match="has no defect pixel"):
        run(folder)


# Values that are defect types


def of_two_types(mask: Mask, _: int) -> Array:
    return mask * np.where(np.arange(WIDTH) < 9, 3, 7).astype(np.uint8)


def colours_of_two_types(mask: Mask, _: int) -> Array:
    return np.array([BLACK, (200, 10, 0), (0, 0, 90)], np.uint8).take(of_two_types(mask, 0) // 3, axis=0)


def numbers_of_a_palette(mask: Mask, number: int) -> Image.Image:
    picture = Image.fromarray(of_two_types(mask, number))
    picture.putpalette([7, 7, 7] * 256)
    return picture


@pytest.mark.parametrize(
    ("draw", "classes"),
    [
        (of_two_types, {"3": "dent", "7": "chip"}),
        (colours_of_two_types, {"#C80A00": "dent", "#00005a": "chip"}),
        (numbers_of_a_palette, {"0": None, "3": "dent", "7": "chip"}),
    ],
)
def test_values_and_colours_become_defect_types(tiny_category: Make, tmp_path: Path, draw: Any, classes: Any) -> None:
    folder = category(tiny_category, draw)
    only_dents = np.where(np.arange(WIDTH) < 9, shape(0), False)
    drawn = draw(only_dents, 0)
    path = folder / "ground_truth/crack/000_mask.png"
    (drawn if isinstance(drawn, Image.Image) else Image.fromarray(drawn)).save(path)
    (tmp_path / "classes.json").write_text(json.dumps(classes | ({} if "3" not in classes else {"200": "never"})))
    prepared = run(folder, classes="type", mask_classes=tmp_path / "classes.json")
    assert info(prepared)["mask_values"] == "classes"
    found = joined(prepared)
    for name, truth in truths(folder).items():
        assert np.array_equal(found[name], only_dents if name.endswith("crack/000.png") else truth)
    ids = {one["id"]: one["category_id"] for one in records(prepared, "annotations")}
    assert sorted(set(ids.values())) == [1, 2, 3], "good, chip and dent; a type on no mask has no class"
    by_side = {
        (one["bbox"][0] >= 9, one["category_id"]) for one in records(prepared, "annotations") if one["category_id"] > 1
    }
    assert by_side == {(False, 3), (True, 2)}
    assert not errors_of_doctor(folder, mask_classes=tmp_path / "classes.json")


def test_a_value_that_is_not_in_the_classes_file_is_an_error_that_names_it(tiny_category: Make, tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text('{"3": "dent"}')
    folder = category(tiny_category, of_two_types)
    with pytest.raises(FlawmaskError, match=r"000_mask\.png holds 7, which .*classes\.json does not list"):
        run(folder, mask_classes=tmp_path / "classes.json")
    assert all("error mask values" in one for one in errors_of_doctor(folder, mask_classes=tmp_path / "classes.json"))
    coloured = category(lambda **types: tiny_category(name="other", **types), colours_of_two_types)
    with pytest.raises(FlawmaskError, match=r"holds colours, and .*classes\.json names values"):
        run(coloured, mask_classes=tmp_path / "classes.json")
    (tmp_path / "classes.json").write_text('{"#c80a00": "dent"}')
    with pytest.raises(FlawmaskError, match="holds #00005a, which"):
        run(coloured, mask_classes=tmp_path / "classes.json")


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", "7", '{"x": "a"}', '{"-1": "a"}', '{"70000": "a"}', '{"1": 2}', '{"1": ""}'),
        *('{"1": "good"}', '{"1": null}', '{"1": "a", "#ff0000": "b"}', '{"#ff00": "b"}'),
    ],
)
def test_a_classes_file_of_another_form_is_refused(tiny_category: Make, tmp_path: Path, text: str) -> None:
    (tmp_path / "classes.json").write_text(text)
    with pytest.raises(FlawmaskError, match=r"--mask_classes .*classes\.json"):
        run(tiny_category(), mask_classes=tmp_path / "classes.json")
    with pytest.raises(FlawmaskError, match=r"--mask_classes .*gone\.json cannot be read"):
        run(tiny_category(name="other"), mask_classes=tmp_path / "gone.json")


def test_a_changed_classes_file_is_noticed(tiny_category: Make, tmp_path: Path) -> None:
    folder = category(tiny_category, of_two_types)
    settings: dict[str, Any] = {"mask_classes": tmp_path / "classes.json"}
    (tmp_path / "classes.json").write_text('{"3": "dent", "7": "chip"}')
    run(folder, **settings)
    assert run(folder, **settings).reused
    (tmp_path / "classes.json").write_text('{"3": "dent", "7": null}')
    with pytest.raises(FlawmaskError, match="made from other images or settings"):
        run(folder, **settings)


# Turned images


def turned_image(path: Path, orientation: int, size: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(orientation).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, exif=exif)


@pytest.mark.parametrize(("orientation", "size"), [(6, (18, 18)), (8, (18, 18)), (3, (14, 18)), (2, (14, 18))])
def test_a_mask_that_fits_a_turned_image_in_two_ways_needs_a_setting(
    tiny_category: Make, orientation: int, size: tuple[int, int]
) -> None:
    folder = tiny_category(crack=3)
    turned_image(folder / "test/crack/000.png", orientation, size)
    mask = np.zeros(size, dtype=bool)
    mask[2:4, 3:9] = True
    write_mask(folder / "ground_truth/crack/000_mask.png", mask * np.uint8(255))
    said = r"000_mask\.png has no Exif orientation, .*--exif_masks with_image.*--exif_masks as_stored"
    with pytest.raises(FlawmaskError, match=said):
        run(folder)
    assert any(one.startswith("error mask turned: part/ground_truth/crack/000") for one in errors_of_doctor(folder))
    name = "part/test/crack/000.png"
    assert np.array_equal(joined(run(folder, exif_masks="as_stored"))[name], mask)
    upright = {6: np.rot90(mask, -1), 8: np.rot90(mask), 3: mask[::-1, ::-1], 2: mask[:, ::-1]}[orientation]
    assert np.array_equal(joined(run(folder, exif_masks="with_image", overwrite=True))[name], upright)
    assert not errors_of_doctor(folder, exif_masks="with_image")


def test_if_only_one_orientation_fits_it_is_used(tiny_category: Make) -> None:
    folder = tiny_category(crack=3)
    truth = truth_of(folder.parent, "part/test/crack/000.png")
    for number, lies in enumerate((truth, np.rot90(truth))):  # drawn upright, and drawn on the stored pixels
        turned_image(folder / f"test/crack/00{number}.png", 6, (18, 14))
        write_mask(folder / f"ground_truth/crack/00{number}_mask.png", lies * np.uint8(255))
    found = joined(run(folder))
    for number in range(2):
        assert np.array_equal(found[f"part/test/crack/00{number}.png"], truth)


def test_a_mask_with_its_own_orientation_or_a_symmetric_mask_needs_no_setting(tiny_category: Make) -> None:
    folder = tiny_category(crack=3)
    mask = np.zeros((18, 18), dtype=bool)
    mask[2:4, 3:9] = True
    exif = Image.Exif()
    exif[0x0112] = 1
    turned_image(folder / "test/crack/000.png", 6, (18, 18))
    write_mask(folder / "ground_truth/crack/000_mask.png", mask * np.uint8(255), exif=exif)
    turned_image(folder / "test/crack/001.png", 8, (18, 18))
    square = np.pad(np.ones((4, 4), dtype=bool), 7)
    write_mask(folder / "ground_truth/crack/001_mask.png", square * np.uint8(255))
    found = joined(run(folder))
    assert np.array_equal(found["part/test/crack/000.png"], mask)
    assert np.array_equal(found["part/test/crack/001.png"], square)
