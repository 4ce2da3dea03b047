"""The image reader: files of every kind are read exactly and upright, and no damaged file is accepted."""

import hashlib
import io
import os
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch.nn import functional as F

from flawmask.errors import FlawmaskError, ImageError
from flawmask.images import (
    Levels,
    content_digest,
    decode_parts,
    encode_png,
    exceeds_8_bits,
    is_image,
    is_readable,
    levels_problem,
    max_pixels,
    read_image,
    read_mask,
    read_pixels,
    resize,
    to_mask,
    to_rgb,
    write_png,
)

Array = npt.NDArray[Any]

DRAW = np.random.default_rng(11)
GREY = DRAW.integers(0, 256, (7, 10), dtype=np.uint8)
DEEP = DRAW.integers(0, 65536, (7, 10), dtype=np.uint16)
RGB = DRAW.integers(0, 256, (7, 10, 3), dtype=np.uint8)
DEEP_RGB = DRAW.integers(0, 65536, (7, 10, 3), dtype=np.uint16)
ALPHA = DRAW.integers(0, 256, (7, 10), dtype=np.uint8)
BITS = DRAW.random((7, 10)) > 0.5
CLOUDS = np.asarray(cv2.GaussianBlur(DRAW.random((40, 60, 3)), (0, 0), 5) * 255, dtype=np.uint8)


def saved(path: Path, pixels: Array, **options: Any) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "TIFF"])
def test_grey_and_rgb_are_read_exactly(tmp_path: Path, suffix: str) -> None:
    for pixels in (GREY, RGB):
        found = read_pixels(saved(tmp_path / f"a.{suffix}", pixels))
        assert found.dtype == np.uint8
        assert np.array_equal(found, pixels)
        assert found.flags.writeable


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_stays_16_bit(tmp_path: Path, suffix: str) -> None:
    assert cv2.imwrite(str(tmp_path / f"a.{suffix}"), DEEP)
    found = read_pixels(tmp_path / f"a.{suffix}")
    assert found.dtype == np.uint16
    assert np.array_equal(found, DEEP)
    assert np.array_equal(read_image(tmp_path / f"a.{suffix}"), np.dstack([DEEP // 256] * 3))


def test_a_big_endian_16_bit_tiff_is_read(tmp_path: Path) -> None:
    with Image.fromarray(DEEP.astype(">u2")) as picture:
        picture.save(tmp_path / "a.tif")
    assert np.array_equal(read_pixels(tmp_path / "a.tif"), DEEP)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_colours_keep_all_bits_and_networks_see_the_upper_8(tmp_path: Path, suffix: str) -> None:
    assert cv2.imwrite(str(tmp_path / f"a.{suffix}"), DEEP_RGB[:, :, ::-1])
    assert np.array_equal(read_pixels(tmp_path / f"a.{suffix}"), DEEP_RGB)
    assert np.array_equal(read_image(tmp_path / f"a.{suffix}"), DEEP_RGB // 256)


@pytest.mark.parametrize(("bits", "levels"), [(8, (0, 255)), (10, (0, 1023)), (12, (0, 4095)), (14, (0, 16383))])
def test_with_matching_levels_networks_see_the_upper_8_bits_of_fewer_bits(
    tmp_path: Path, bits: int, levels: Levels
) -> None:
    for pixels in (DEEP, DEEP_RGB):
        narrow = (pixels >> (16 - bits)).astype(np.uint16)
        write_png(tmp_path / "a.png", narrow)
        found = read_image(tmp_path / "a.png", levels)
        upper = narrow >> (bits - 8)
        assert np.array_equal(found, upper if upper.ndim == 3 else np.dstack([upper] * 3))
    assert np.array_equal(to_rgb(RGB, levels), RGB), "8 bits stay as they are"


def test_values_between_two_levels_are_scaled_from_black_to_white_in_even_steps() -> None:
    values = np.array([[0, 99, 100, 101, 355, 356, 60_000]], np.uint16)
    assert to_rgb(values, (100, 355))[0, :, 0].tolist() == [0, 0, 0, 1, 255, 255, 255]
    assert to_rgb(values, (100, 611))[0, :, 0].tolist() == [0, 0, 0, 0, 127, 128, 255]


@pytest.mark.parametrize("mode", ["I", "I;16"])
def test_32_bit_integers_are_read_if_16_bits_hold_them_and_refused_otherwise(tmp_path: Path, mode: str) -> None:
    values = DEEP.astype(np.int32)
    saved(tmp_path / "a.tif", values if mode == "I" else DEEP)
    assert np.array_equal(read_pixels(tmp_path / "a.tif"), DEEP)
    for low, high in ((0, 65536), (-1, 100)):
        saved(tmp_path / "b.tif", np.array([[low, high]], np.int32))
        with pytest.raises(ImageError, match=f"b.tif holds values from {low} to {high}: export it with 8 or 16 bits"):
            read_pixels(tmp_path / "b.tif")


def test_values_outside_the_levels_are_reported_and_8_bit_images_always_fit() -> None:
    picture = np.linspace(0, 4095, 400).astype(np.uint16).reshape(20, 20)
    assert not levels_problem(picture, (0, 4095))
    assert "no value above 4095, and 65535 becomes white" in levels_problem(picture, (0, 65535))
    assert "values up to 4095, and all above 1023 become white" in levels_problem(picture, (0, 1023))
    assert "values down to 0, and all below 1000 become black" in levels_problem(picture, (1000, 4095))
    few = picture // 4
    few[0, 0] = 4095
    assert not levels_problem(few, (0, 1023)), "a hot pixel"
    assert not levels_problem(GREY // 16, (0, 4095))


def test_transparency_is_dropped(tmp_path: Path) -> None:
    rgba = np.dstack((RGB, ALPHA))
    assert np.array_equal(read_pixels(saved(tmp_path / "rgba.png", rgba)), RGB)
    assert np.array_equal(read_pixels(saved(tmp_path / "rgba.tif", rgba)), RGB)
    assert np.array_equal(read_pixels(saved(tmp_path / "la.png", np.dstack((GREY, ALPHA)))), GREY)
    deep = np.dstack([DEEP_RGB[:, :, ::-1], DEEP])
    assert cv2.imwrite(str(tmp_path / "deep.png"), deep)
    assert np.array_equal(read_pixels(tmp_path / "deep.png"), DEEP_RGB)


def test_two_channels_are_grey_and_transparency_with_8_and_with_16_bits(tmp_path: Path) -> None:
    for name, grey in (("a.png", GREY), ("b.png", DEEP)):
        (tmp_path / name).write_bytes(png_of_two_channels(grey, ALPHA.astype(grey.dtype)))
        found = read_pixels(tmp_path / name)
        assert found.dtype == grey.dtype
        assert np.array_equal(found, grey)


def png_of_two_channels(grey: Array, alpha: Array) -> bytes:
    """Return a PNG of colour type 4, built by the PNG specification."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    bits = 8 * grey.itemsize
    rows = np.dstack((grey, alpha)).astype(grey.dtype.newbyteorder(">"))
    header = struct.pack(">IIBBBBB", grey.shape[1], grey.shape[0], bits, 4, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_a_palette_gives_its_colours_and_one_bit_gives_0_and_255(tmp_path: Path) -> None:
    palette = Image.fromarray(GREY % 3)
    palette.putpalette([10, 20, 30, 200, 100, 50, 0, 255, 0])
    for suffix in ("png", "bmp", "tif"):
        palette.save(tmp_path / f"p.{suffix}")
        colours = np.array([[10, 20, 30], [200, 100, 50], [0, 255, 0]])
        assert np.array_equal(read_pixels(tmp_path / f"p.{suffix}"), colours[GREY % 3])
        Image.fromarray(BITS).save(tmp_path / f"b.{suffix}")
        assert np.array_equal(read_pixels(tmp_path / f"b.{suffix}"), BITS * np.uint8(255))


def test_a_cmyk_jpeg_is_read_as_rgb(tmp_path: Path) -> None:
    colour = np.full((32, 32, 3), (200, 60, 30), np.uint8)
    Image.fromarray(colour).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    found = read_image(tmp_path / "a.jpg")
    assert found.shape == (32, 32, 3)
    assert np.abs(found.astype(int) - colour).max() < 6


def test_a_jpeg_is_read_like_opencv_reads_it_within_three_grey_levels(tmp_path: Path) -> None:
    saved(tmp_path / "a.jpg", CLOUDS, quality=95)
    reference = cv2.imread(str(tmp_path / "a.jpg"))
    assert reference is not None
    assert np.abs(read_image(tmp_path / "a.jpg").astype(int) - reference[:, :, ::-1]).max() <= 3


TURNS: dict[int, Callable[[Array], Array]] = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_90_CLOCKWISE),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_90_COUNTERCLOCKWISE),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_exif_turns_the_image_upright(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = read_pixels(saved(tmp_path / f"plain.{suffix}", CLOUDS))
    turned = saved(tmp_path / f"turned.{suffix}", CLOUDS, exif=exif)
    assert np.array_equal(read_pixels(turned), TURNS[orientation](stored))
    with Image.open(turned) as file:
        assert np.array_equal(read_pixels(turned), np.asarray(ImageOps.exif_transpose(file)))


def test_16_bit_images_are_turned_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    saved(tmp_path / "a.png", DEEP, exif=exif)
    assert np.array_equal(read_pixels(tmp_path / "a.png"), np.rot90(DEEP, -1))


@pytest.mark.parametrize("orientation", TURNS)
def test_16_bit_colours_are_turned_too_and_the_orientation_is_returned(tmp_path: Path, orientation: int) -> None:
    exif = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01" + struct.pack(">HHI", orientation, 0, 0)
    data = encode_png(DEEP_RGB)
    chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif + struct.pack(">I", zlib.crc32(b"eXIf" + exif))
    parts = decode_parts(data[:33] + chunk + data[33:], tmp_path)
    assert np.array_equal(parts.colour, TURNS[orientation](DEEP_RGB))
    assert parts.orientation == orientation
    assert decode_parts(data, tmp_path).orientation is None


# Rare files


@pytest.mark.parametrize("pixels", [GREY, DEEP, RGB, DEEP_RGB], ids=["grey", "grey16", "rgb", "rgb16"])
@pytest.mark.parametrize(
    "options",
    [
        {"bigtiff": True},
        {"bigtiff": True, "tile": (16, 16)},
        {"tile": (16, 16)},
        {"tile": (16, 32), "compression": "deflate"},
        {"rowsperstrip": 2, "compression": "lzw", "predictor": True},
        {"byteorder": ">"},
    ],
    ids=["big", "big_tiled", "tiled", "tiled_deflate", "strips_lzw", "big_endian"],
)
def test_a_tiff_is_read_with_any_internal_layout(tmp_path: Path, pixels: Array, options: dict[str, Any]) -> None:
    large = np.tile(pixels, (5, 4, *[1] * (pixels.ndim - 2)))
    photometric = "rgb" if pixels.ndim == 3 else "minisblack"
    tifffile.imwrite(tmp_path / "a.tif", large, photometric=photometric, **options)
    found = read_pixels(tmp_path / "a.tif")
    assert found.dtype == pixels.dtype
    assert np.array_equal(found, large)
    assert exceeds_8_bits(tmp_path / "a.tif") == (pixels.dtype == np.uint16)


@pytest.mark.parametrize("pixels", [GREY, DEEP], ids=["grey", "grey16"])
def test_a_tiff_in_which_0_is_white_is_read_correctly(tmp_path: Path, pixels: Array) -> None:
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="miniswhite")
    assert np.array_equal(read_pixels(tmp_path / "a.tif"), np.iinfo(pixels.dtype).max - pixels)


@pytest.mark.parametrize("pixels", [RGB, DEEP_RGB], ids=["rgb", "rgb16"])
def test_colours_stored_in_planes_are_read_correctly_or_refused_with_the_file_name(
    tmp_path: Path, pixels: Array
) -> None:
    planes = pixels.transpose(2, 0, 1)
    tifffile.imwrite(tmp_path / "a.tif", planes, photometric="rgb", planarconfig="separate")
    try:
        found = read_pixels(tmp_path / "a.tif")
    except ImageError as error:
        assert pixels.dtype == np.uint16
        assert "a.tif" in str(error)
    else:
        assert np.array_equal(found, pixels)


def test_a_page_of_a_file_with_several_images_is_read_and_a_missing_page_is_refused(tmp_path: Path) -> None:
    files: dict[str, list[Array]] = {
        "a.tif": [RGB, RGB[::-1], RGB[:3]],
        "b.tif": [DEEP_RGB, DEEP_RGB[:, ::-1], DEEP_RGB[:3]],
    }
    for name, pages in files.items():
        with tifffile.TiffWriter(tmp_path / name) as file:
            for page in pages:
                file.write(page, photometric="rgb", contiguous=False)
        for number, page in enumerate(pages, start=1):
            assert np.array_equal(read_pixels(tmp_path / name, number), page)
        with pytest.raises(ImageError, match=f"{name} holds 3 images: .*--page"):
            read_pixels(tmp_path / name)
        with pytest.raises(ImageError, match=f"{name} has no page 4: it holds 3 images"):
            read_pixels(tmp_path / name, 4)
    with pytest.raises(ImageError, match=r"c\.png has no page 2: it holds 1 image"):
        read_pixels(saved(tmp_path / "c.png", RGB), 2)


def test_the_rows_of_a_bmp_go_up_or_down_as_its_header_says(tmp_path: Path) -> None:
    data = bytearray(saved(tmp_path / "up.bmp", RGB).read_bytes())
    assert struct.unpack_from("<i", data, 22) == (7,), "the rows must go from the bottom up, as in most files"
    assert np.array_equal(read_pixels(tmp_path / "up.bmp"), RGB)
    struct.pack_into("<i", data, 22, -7)
    (tmp_path / "down.bmp").write_bytes(data)
    assert np.array_equal(read_pixels(tmp_path / "down.bmp"), RGB[::-1])


@pytest.mark.parametrize("suffix", ["webp", "jfif", "jp2", "gif"])
def test_further_kinds_of_files_that_predict_reads_in_folders_are_read_and_refused_if_damaged(
    tmp_path: Path, suffix: str
) -> None:
    given: dict[str, dict[str, Any]] = {"webp": {"lossless": True}, "jfif": {"format": "JPEG", "quality": 95}}
    options = given.get(suffix, {})
    pixels = CLOUDS[:, :, 0] // 16 * 16 if suffix == "gif" else CLOUDS
    path = saved(tmp_path / f"a.{suffix}", pixels, **options)
    assert is_readable(path)
    assert np.abs(read_image(path).astype(int) - to_rgb(pixels)).max() <= (3 if suffix == "jfif" else 0)
    data = path.read_bytes()
    for share in (0.3, 0.6, 0.95):
        path.write_bytes(data[: int(len(data) * share)])
        _assert_refused(path)


def test_an_animation_is_refused(tmp_path: Path) -> None:
    frames = [Image.fromarray(GREY), Image.fromarray(GREY[::-1])]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match=r"a\.gif holds 2 images"):
        read_pixels(tmp_path / "a.gif")


def test_files_that_another_program_would_have_to_draw_are_refused_by_name(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png", "EPS")
    with pytest.raises(ImageError, match=r"a\.png is EPS, which holds no pixels"):
        read_pixels(tmp_path / "a.png")


def test_a_picture_that_is_converted_strip_by_strip_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: list[Array] = [GREY, RGB, DEEP, BITS]
    files = [saved(tmp_path / f"{number}.png", pixels) for number, pixels in enumerate(kinds)]
    write_png(tmp_path / "deep.png", DEEP_RGB)
    palette = Image.fromarray(GREY % 3)
    palette.putpalette([10, 20, 30, 200, 100, 50, 0, 255, 0])
    palette.save(tmp_path / "p.png")
    files += [tmp_path / "deep.png", tmp_path / "p.png"]
    whole = [(read_pixels(path), read_image(path)) for path in files]
    monkeypatch.setattr("flawmask.images.STRIP", 20)
    for path, (pixels, image) in zip(files, whole, strict=True):
        assert np.array_equal(read_pixels(path), pixels)
        assert np.array_equal(read_image(path), image)


def test_a_large_image_is_resized_colour_by_colour_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = resize(CLOUDS, (17, 23))
    monkeypatch.setattr("flawmask.images.STRIP", 100)
    assert np.array_equal(resize(CLOUDS, (17, 23)), expected)


# Masks


def test_colours_alpha_and_palette_are_read_in_one_call() -> None:
    def parts(picture: Image.Image, **options: Any) -> Any:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", **options)
        return decode_parts(buffer.getvalue(), Path("a.png"))

    found = parts(Image.fromarray(np.dstack((RGB, ALPHA))))
    assert np.array_equal(found.colour, RGB)
    assert np.array_equal(found.alpha, ALPHA)
    assert found.palette is None
    palette = Image.fromarray(GREY % 3)
    palette.putpalette([0, 0, 0, 64, 0, 0, 255, 255, 255])
    found = parts(palette)
    assert np.array_equal(found.palette, GREY % 3)
    assert found.alpha is None
    assert np.array_equal(parts(palette, transparency=0).alpha, np.where(GREY % 3, 255, 0))
    assert parts(Image.fromarray(GREY)).palette is None


def test_half_of_8_bits_lies_between_127_and_128(tmp_path: Path) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(read_mask(saved(tmp_path / "a.png", levels)), levels > 127)


def test_half_of_16_bits_lies_between_32767_and_32768(tmp_path: Path) -> None:
    levels = np.array([[0, 1, 128, 255, 256, 32767, 32768, 65535]], np.uint16)
    assert cv2.imwrite(str(tmp_path / "a.png"), levels)
    assert read_mask(tmp_path / "a.png").tolist() == [[False] * 6 + [True] * 2]
    assert cv2.imwrite(str(tmp_path / "colour.png"), np.dstack([levels] * 3))
    assert read_mask(tmp_path / "colour.png").tolist() == [[False] * 6 + [True] * 2]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_mask_with_0_and_1_is_defect_at_1_and_one_with_0_1_and_2_is_not(tmp_path: Path, dtype: type) -> None:
    assert cv2.imwrite(str(tmp_path / "a.png"), BITS.astype(dtype))
    assert np.array_equal(read_mask(tmp_path / "a.png"), BITS)
    assert cv2.imwrite(str(tmp_path / "b.png"), BITS.astype(dtype) * 2)
    assert not read_mask(tmp_path / "b.png").any()


def test_a_mask_may_have_colours_transparency_or_one_bit(tmp_path: Path) -> None:
    for channel in range(3):
        colour = np.zeros((7, 10, 3), np.uint8)
        colour[:, :, channel] = BITS * 255
        assert np.array_equal(read_mask(saved(tmp_path / "colour.png", colour)), BITS)
    opaque = np.dstack([BITS * np.uint8(255)] * 3 + [np.full((7, 10), 255, np.uint8)])
    assert np.array_equal(read_mask(saved(tmp_path / "opaque.png", opaque)), BITS)
    assert np.array_equal(read_mask(saved(tmp_path / "bits.png", BITS)), BITS)


def test_an_empty_mask_and_a_full_mask_are_read_correctly() -> None:
    assert not to_mask(np.zeros((3, 4), np.uint8)).any()
    assert not to_mask(np.zeros((3, 4), np.uint16)).any()
    assert to_mask(np.full((3, 4), 255, np.uint8)).all()
    assert to_mask(np.full((3, 4), 65535, np.uint16)).all()


# Damaged files


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "tif"])
def test_a_truncated_file_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], suffix: str, share: float
) -> None:
    path = saved(tmp_path / f"a.{suffix}", RGB if suffix == "png" else CLOUDS)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    _assert_refused(path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("options", [{"compression": "tiff_lzw"}, {"compression": "tiff_adobe_deflate"}])
def test_a_truncated_compressed_tiff_is_refused_and_libtiff_prints_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], options: dict[str, str]
) -> None:
    path = saved(tmp_path / "a.tif", CLOUDS, **options)
    assert np.array_equal(read_pixels(path), CLOUDS)
    path.write_bytes(path.read_bytes()[:-200])
    _assert_refused(path)
    assert capfd.readouterr() == ("", "")


def _assert_refused(path: Path) -> None:
    for read in (read_pixels, read_image, read_mask):
        with pytest.raises(ImageError) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data", [b"", b"just text, no pixels", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"II*\x00"]
)
def test_a_file_that_is_not_an_image_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.png").write_bytes(data)
    _assert_refused(tmp_path / "a.png")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    _assert_refused(tmp_path / "none.png")
    (tmp_path / "folder.png").mkdir()
    _assert_refused(tmp_path / "folder.png")


def test_floating_point_numbers_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "a.tif", GREY.astype(np.float32))
    with pytest.raises(ImageError, match="floating-point"):
        read_pixels(tmp_path / "a.tif")


def test_signed_numbers_of_8_bits_are_refused(tmp_path: Path) -> None:
    with Image.fromarray(GREY) as picture:
        picture.save(tmp_path / "a.tif", tiffinfo={339: 2})
    with pytest.raises(ImageError, match="signed numbers"):
        read_pixels(tmp_path / "a.tif")


@pytest.mark.parametrize("suffix", ["tif", "png"])
def test_several_images_in_a_file_are_refused_but_a_thumbnail_does_not_count(tmp_path: Path, suffix: str) -> None:
    pictures = [Image.fromarray(RGB), Image.fromarray(RGB[::-1])]
    pictures[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=pictures[1:])
    with pytest.raises(ImageError, match=r"a\.\w+ holds 2 images: export each as a separate file"):
        read_pixels(tmp_path / f"a.{suffix}")
    pictures[0].save(tmp_path / "b.tif", save_all=True, append_images=[Image.fromarray(RGB[::2, ::2])])
    assert np.array_equal(read_pixels(tmp_path / "b.tif"), RGB)


def test_an_image_with_too_many_pixels_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    with Image.new("1", (20_000, 20_000)) as picture:
        picture.save(tmp_path / "a.png")
        # Between the limit and twice the limit, Pillow only warns.
        picture.crop((0, 0, 20_000, 9_000)).save(tmp_path / "b.png")
    assert (tmp_path / "a.png").stat().st_size < 100_000
    tracemalloc.start()
    try:
        with pytest.raises(ImageError, match=r"a\.png has more than 178 million pixels: .*FLAWMASK_MAX_PIXELS"):
            read_pixels(tmp_path / "a.png")
        with pytest.raises(ImageError, match=r"b\.png has more than 178 million pixels"):
            read_pixels(tmp_path / "b.png")
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()
    code = """
import sys, warnings
from pathlib import Path
from flawmask import launch
from flawmask.errors import ImageError
from flawmask.images import read_pixels
from PIL import Image
before = list(warnings.filters), Image.MAX_IMAGE_PIXELS
if sys.argv[2] == "own":
    launch.own_process()
try:
    print(read_pixels(Path(sys.argv[1])).shape)
except ImageError as error:
    print(error)
    assert before == (list(warnings.filters), Image.MAX_IMAGE_PIXELS)"""
    printed = []
    for whose in ("own", "host"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "a.png"), whose],
            env=os.environ | {"FLAWMASK_MAX_PIXELS": "400000000"},
            capture_output=True,
            text=True,
            check=True,
        )
        printed.append(done.stdout)
        assert not done.stderr
    assert printed[0] == "(20000, 20000)\n"
    assert "178 million pixels" in printed[1]
    assert "raise the limit by PIL.Image.MAX_IMAGE_PIXELS" in printed[1]


@pytest.mark.parametrize("value", ["many", "-5", "0", "1e9"])
def test_a_limit_that_is_not_a_number_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("FLAWMASK_MAX_PIXELS", value)
    max_pixels.cache_clear()
    with pytest.raises(FlawmaskError, match=f"FLAWMASK_MAX_PIXELS is '{value}': it must be a number of pixels"):
        read_pixels(saved(tmp_path / "a.png", RGB))


def test_an_image_of_one_pixel_is_an_image(tmp_path: Path) -> None:
    assert read_image(saved(tmp_path / "a.png", RGB[:1, :1])).tolist() == [[RGB[0, 0].tolist()]]


@pytest.mark.parametrize(
    "name", ["a b.png", "größe.png", "部品.png", "line\nbreak.png", "-x.png", "a'b\"c.png", "a.PNG.png"]
)
def test_a_file_may_have_any_name(tmp_path: Path, name: str) -> None:
    assert np.array_equal(read_image(saved(tmp_path / name, RGB)), RGB)


def test_a_link_that_loops_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to(tmp_path / "b.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"a\.png cannot be opened"):
        read_pixels(tmp_path / "a.png")


def test_damage_in_the_middle_of_a_png_is_refused(tmp_path: Path) -> None:
    data = bytearray(encode_png(CLOUDS))
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "a.png").write_bytes(data)
    _assert_refused(tmp_path / "a.png")


def test_a_normal_decode_prints_nothing_and_does_not_change_the_warning_filters(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    paths = [saved(tmp_path / f"a.{suffix}", CLOUDS) for suffix in ("png", "jpg", "bmp", "tif")]
    before = list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read_pixels, paths * 20))
    assert list(warnings.filters) == before
    assert capfd.readouterr() == ("", "")


# Further functions


def test_image_suffixes_are_known_in_upper_and_lower_case_and_hidden_files_are_not_images() -> None:
    for name in ("a.png", "a.JPG", "b/c.Jpeg", "a.bmp", "a.tif", "a.TIFF", "a.b.png"):
        assert is_image(Path(name)), name
    for name in ("a.txt", "png", "a.gif", "._a.png", ".png", "a.png.bak"):
        assert not is_image(Path(name)), name


@pytest.mark.parametrize("pixels", [GREY, DEEP, RGB, RGB[:, ::-1]])
def test_a_written_png_holds_exactly_the_pixels(tmp_path: Path, pixels: Any) -> None:
    write_png(tmp_path / "a.png", pixels)
    assert np.array_equal(read_pixels(tmp_path / "a.png"), pixels)
    reference = cv2.imread(str(tmp_path / "a.png"), cv2.IMREAD_UNCHANGED)
    assert reference is not None
    assert reference.dtype == pixels.dtype
    assert np.array_equal(reference, pixels if pixels.ndim == 2 else pixels[:, :, ::-1])


@pytest.mark.parametrize("pixels", [RGB, RGB[:, ::-1], GREY])
def test_the_digest_is_that_of_shape_and_pixels(pixels: Any) -> None:
    expected = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
    assert content_digest(pixels) == expected
    assert content_digest(pixels[:0]) != expected


def test_to_rgb_repeats_grey_and_keeps_colours() -> None:
    assert np.array_equal(to_rgb(GREY), np.dstack([GREY] * 3))
    assert to_rgb(RGB) is RGB


def test_a_file_in_memory_is_read_like_one_on_disk(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(RGB).save(buffer, "PNG")
    (tmp_path / "a.bmp").write_bytes(buffer.getvalue())  # the content counts, not the name
    assert np.array_equal(read_pixels(tmp_path / "a.bmp"), RGB)


def bilinear(image: Array, shape: tuple[int, int]) -> npt.NDArray[np.float64]:
    """Return the image, interpolated bilinearly with half-pixel centres, in float64 without rounding."""
    found = image.astype(np.float64)
    for axis, wanted in enumerate(shape):
        pixels = image.shape[axis]
        at = np.clip((np.arange(wanted) + 0.5) * pixels / wanted - 0.5, 0, pixels - 1)
        low = np.floor(at).astype(np.int64)
        share = (at - low).reshape(-1, *[1] * (2 - axis))
        found = found.take(low, axis) * (1 - share) + found.take(np.minimum(low + 1, pixels - 1), axis) * share
    return found


@st.composite
def resizings(draw: st.DrawFn) -> tuple[npt.NDArray[np.uint8], tuple[int, int]]:
    """Return an image of noise or of black and white, and a new size. The size is arbitrary, or larger or smaller by a
    whole factor; then many values lie midway between two grey levels."""
    height, width = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    shape = draw(st.integers(1, 120)), draw(st.integers(1, 120))
    if draw(st.booleans()):
        times = draw(st.integers(2, 5))
        shape = (height * times, width * times)
        if draw(st.booleans()):
            (height, width), shape = shape, (height, width)
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    levels = draw(st.sampled_from([np.arange(256), np.array([0, 255]), np.array([100, 101])]))
    return random.choice(levels, (height, width, 3)).astype(np.uint8), shape


@given(resizings())
@settings(max_examples=200, deadline=None)
def test_a_resized_image_is_the_rounded_bilinear_interpolation(
    drawn: tuple[npt.NDArray[np.uint8], tuple[int, int]],
) -> None:
    image, shape = drawn
    before = image.copy()
    found = resize(image, shape)
    assert found.shape == (*shape, 3)
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    assert (image == before).all()
    tolerance = 0.5 + 0.0001 * max(image.shape)
    assert np.abs(found - bilinear(image, shape)).max() <= tolerance
    assert found.min() >= image.min()
    assert found.max() <= image.max()


@pytest.mark.parametrize(("size", "shape"), [((3000, 7), (1777, 9)), ((7, 5000), (4, 4999)), ((9, 4000), (2, 640))])
def test_the_tolerance_of_a_resized_image_holds_along_a_long_side(
    size: tuple[int, int], shape: tuple[int, int]
) -> None:
    image = (np.random.default_rng(0).integers(0, 2, (*size, 3)) * 255).astype(np.uint8)
    assert np.abs(resize(image, shape) - bilinear(image, shape)).max() <= 0.5 + 0.0001 * max(size)


@given(resizings())
@settings(max_examples=200, deadline=None)
def test_a_resized_image_equals_torchvisions_resizing_rounded_to_the_bit(
    drawn: tuple[npt.NDArray[np.uint8], tuple[int, int]],
) -> None:
    """With channels first in memory, for which PyTorch uses other code."""
    image, shape = drawn
    whole = torch.from_numpy(image).permute(2, 0, 1)[None].contiguous().float()
    expected = F.interpolate(whole, size=shape, mode="bilinear", align_corners=False)[0].round().byte()
    assert np.array_equal(resize(image, shape), expected.permute(1, 2, 0).numpy())


def test_an_image_of_the_wanted_size_is_returned_as_it_is_and_a_view_is_resized() -> None:
    assert resize(RGB, (7, 10)) is RGB
    mirrored = RGB[::-1, ::-1]
    assert np.array_equal(resize(mirrored, (5, 6)), resize(mirrored.copy(), (5, 6)))


def test_images_are_opened_by_pillow_even_if_another_package_replaced_its_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Importing ultralytics replaces it, and a file that is no image then gets a package installed, or its name."""

    def replaced(*_: Any) -> None:
        raise ModuleNotFoundError("No module named 'pi_heif'")

    monkeypatch.setattr(Image, "open", replaced)
    path = tmp_path / "a.png"
    write_png(path, np.zeros((3, 4, 3), np.uint8))
    assert read_image(path).shape == (3, 4, 3)
    path.write_bytes(b"no image")
    with pytest.raises(ImageError, match="cannot identify image file"):
        read_image(path)
