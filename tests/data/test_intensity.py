"""Intensity levels: how they are chosen for a data set, logged, stored and used."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prepared import Make, info, run

from flawmask.coco import read_split
from flawmask.data.augment import AugmentConfig, augment
from flawmask.data.doctor import DoctorConfig, examine
from flawmask.data.intensity import of_dataset, of_images
from flawmask.errors import FlawmaskError
from flawmask.images import content_digest, read_image, read_pixels, write_png


def pictures(folder: Path, bits: int, count: int = 3) -> list[Path]:
    """Images that use this many of 16 bits: the first one up to the highest value, the others up to half of it."""
    paths = []
    for number in range(count):
        top = 2**bits // (2 if number else 1)
        pixels = np.random.default_rng(number).integers(0, top, (12, 16)).astype(np.uint16)
        pixels[0, 0] = top - 1
        paths.append(folder / f"{number}.png")
        write_png(paths[-1], pixels)
    return paths


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_auto_uses_as_many_bits_as_all_images_together_need_and_logs_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bits: int
) -> None:
    caplog.set_level(logging.INFO)
    paths = [*pictures(tmp_path, bits), tmp_path / "grey.png", tmp_path / "gone.png"]
    write_png(paths[3], np.full((3, 4), 200, np.uint8))
    assert of_images("auto", paths, "parts") == (0, 2**bits - 1)
    (said,) = caplog.messages
    top = 2**bits - 1
    assert said.startswith(
        f"parts: 3 of 5 images hold more than 8 bits, their highest value {top} needs {bits}: 0 to {top} "
    )


def test_8_bit_images_are_not_decoded_and_nothing_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    write_png(tmp_path / "a.png", np.full((3, 4, 3), 9, np.uint8))
    monkeypatch.setattr("flawmask.images.read_pixels", lambda path: pytest.fail(f"{path} was decoded"))
    for rule in ("auto", "percentile"):
        assert of_images(rule, [tmp_path / "a.png"], "parts") == (0, 65535)
    assert not caplog.messages


def test_percentiles_are_those_of_all_values_and_span_at_least_256_values(tmp_path: Path) -> None:
    values = np.arange(2000, 4000, dtype=np.uint16)
    for number, half in enumerate((values[::2], values[1::2])):
        write_png(tmp_path / f"{number}.png", half.reshape(20, 50))
    assert of_images("percentile", [tmp_path / "0.png", tmp_path / "1.png"], "parts") == (2009, 3989)
    write_png(tmp_path / "flat.png", np.full((20, 50), 65000, np.uint16))
    assert of_images("percentile", [tmp_path / "flat.png"], "parts") == (65000, 65255)
    write_png(tmp_path / "flat.png", np.full((20, 50), 65500, np.uint16))
    assert of_images("percentile", [tmp_path / "flat.png"], "parts") == (65280, 65535)


def test_a_fixed_number_of_bits_is_used_without_reading_the_images(tmp_path: Path) -> None:
    assert of_images("12", [tmp_path / "gone.png"], "parts") == (0, 4095)


# The stages


@pytest.fixture
def twelve_bits(tiny_category: Make) -> Path:
    """The tiny category as a 12-bit camera would have taken it."""
    folder = tiny_category(good=6, crack=4)
    for path in folder.glob("test/*/*.png"):
        write_png(path, read_pixels(path).astype(np.uint16) * 16 + 15)
    return folder


def test_prepare_logs_the_levels_and_stores_them_in_the_data_set(
    twelve_bits: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    prepared = run(twelve_bits)
    assert any(
        "10 of 10 images hold more than 8 bits, their highest value 4095 needs 12" in one for one in caplog.messages
    )
    assert info(prepared)["intensity"] == {"rule": "auto", "levels": [0, 4095]}
    split = read_split(prepared.dataset_dir, "train")
    assert of_dataset("auto", [split]) == (0, 4095)
    assert of_dataset("16", [split]) == (0, 65535)
    explicit = run(twelve_bits, intensity="14", overwrite=True)
    assert of_dataset("auto", [read_split(explicit.dataset_dir, "train")]) == (0, 16383)


def test_a_data_set_with_8_bit_images_stores_no_levels(tiny_category: Make) -> None:
    assert "intensity" not in info(run(tiny_category()))


def test_brightened_variants_have_no_more_bits_than_the_camera_and_do_not_change_the_levels(twelve_bits: Path) -> None:
    prepared = run(twelve_bits)
    made = augment(AugmentConfig(dataset_dir=prepared.dataset_dir, augmentation_factor=6))
    split = read_split(made.dataset_dir, "train")
    bright = [one for one in split.images if one.get("augmentation") == "bright"]
    assert bright
    assert max(int(read_pixels(split.image_path(one)).max()) for one in bright) == 4095
    assert of_dataset("auto", [split]) == (0, 4095)
    (made.dataset_dir / "dataset_info.json").unlink()
    write_png(split.image_path(bright[0]), np.full((14, 18), 60000, np.uint16))
    assert of_dataset("auto", [split]) == (0, 4095), "the levels must come from the original images"


def test_damaged_levels_in_a_data_set_are_reported(twelve_bits: Path) -> None:
    prepared = run(twelve_bits)
    path = prepared.dataset_dir / "dataset_info.json"
    path.write_text(json.dumps(info(prepared) | {"intensity": {"levels": "all"}}))
    with pytest.raises(FlawmaskError, match=r"dataset_info\.json is damaged: its `intensity`"):
        of_dataset("auto", [read_split(prepared.dataset_dir, "train")])


def test_images_that_differ_only_in_their_lower_bits_are_not_copies(tiny_category: Make) -> None:
    folder = tiny_category(good=6, crack=4)
    for path in folder.glob("test/*/*.png"):  # 16-bit values of 0 to 255, whose upper 8 bits are 0
        write_png(path, read_pixels(path).astype(np.uint16))
    prepared = run(folder)
    assert info(prepared)["intensity"]["levels"] == [0, 255]
    assert info(prepared)["split_method"] == "shuffle", "each image must be its own group"
    split = read_split(prepared.dataset_dir, "train")
    assert len({content_digest(read_image(split.image_path(one), (0, 255))) for one in split.images}) == len(
        split.images
    )


@pytest.mark.parametrize("is_coco", [False, True])
def test_the_doctor_applies_the_levels_and_warns_about_nearly_black_or_white_images(
    twelve_bits: Path, tmp_path: Path, is_coco: bool
) -> None:
    dark = read_pixels(twelve_bits / "test/good/000.png") // 32
    write_png(twelve_bits / "test/good/000.png", dark)
    write_png(twelve_bits / "test/good/001.png", 4095 - dark)
    place: dict[str, Any] = {"mvtec_root": twelve_bits.parent, "category": "part"}
    if is_coco:
        place = {"dataset_dir": run(twelve_bits).dataset_dir}

    def found(**settings: Any) -> set[tuple[str, str]]:
        problems = examine(DoctorConfig(**place, **settings, contact_sheet=tmp_path / "sheet.png")).problems
        there = [one for one in problems if one.kind in ("nearly black", "nearly white")]
        return {(one.kind, one.where.replace("/", "_").partition("good_")[2] or one.where) for one in there}

    assert found() == {("nearly black", "000.png"), ("nearly white", "001.png")}
    assert read_image(tmp_path / "sheet.png").mean() > 60
    assert len(found(intensity="16")) >= 9, "the upper 8 of 16 bits are dark in all images"
    assert any(kind == "nearly white" for kind, _ in found(intensity="8"))
