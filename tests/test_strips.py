"""Large images read in strips: the same pixels as from the reader of all stages, and only a few rows in memory."""

import logging
import os
import threading
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image
from random_network import patchwork

from flawmask import strips
from flawmask.errors import ImageError
from flawmask.images import read_image
from flawmask.inference.stream import map_in_order
from flawmask.strips import Bands, StripImage, opened, reduced, shrunk
from flawmask.tiles import Tiling

pytest.importorskip("pyvips", reason='pyvips is not installed: pip install "flawmask[large]"')

HEIGHT, WIDTH = 603, 801

WRITTEN: list[tuple[str, dict[str, Any]]] = [
    ("a.jpg", {"quality": 85}),
    ("b.jpg", {"quality": 95, "subsampling": 0}),
    ("a.png", {}),
    ("a.tif", {}),
    ("b.tif", {"compression": "tiff_lzw"}),
    ("c.tif", {"compression": "tiff_deflate"}),
    ("d.tif", {"compression": "jpeg"}),
]


@pytest.fixture(autouse=True)
def _all_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips, "MIN_PIXELS", 1)


def photograph() -> Image.Image:
    return Image.fromarray(patchwork(HEIGHT, WIDTH)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def large(path: Path) -> StripImage:
    image = opened(path)
    assert image is not None
    return image


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(("name", "how"), WRITTEN)
def test_strips_have_the_pixels_that_the_image_reader_gives(
    tmp_path: Path, name: str, how: dict[str, Any], mode: str
) -> None:
    photograph().convert(mode).save(tmp_path / name, **how)
    image = large(tmp_path / name)
    assert (image.height, image.width) == (HEIGHT, WIDTH)
    assert np.array_equal(np.concatenate([*image.strips(100)]), read_image(tmp_path / name))


def test_a_tiff_of_tiles_is_read_in_strips(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.asarray(photograph()), tile=(64, 64))
    assert np.array_equal(np.concatenate([*large(tmp_path / "a.tif").strips()]), read_image(tmp_path / "a.tif"))


@pytest.mark.parametrize(
    ("name", "change", "how", "reason"),
    [
        ("a.bmp", "RGB", {}, "only JPEG, PNG and TIFF"),
        ("a.jpg", "CMYK", {}, "only grey and RGB images of 8 bits"),
        ("a.png", "RGBA", {}, "only grey and RGB images of 8 bits"),
        ("a.png", "I;16", {}, "only grey and RGB images of 8 bits"),
        ("a.jpg", "RGB", {"progressive": True}, "progressive"),
        ("a.jpg", "RGB", {"exif": 6}, "Exif orientation"),
    ],
)
def test_an_image_that_cannot_be_read_in_strips_is_named_with_the_memory_that_it_takes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, change: str, how: dict[str, Any], reason: str
) -> None:
    if "exif" in how:
        exif = Image.Exif()
        exif[0x0112] = how["exif"]
        how = {"exif": exif}
    picture = photograph().convert("L" if change == "I;16" else change)
    if change == "I;16":
        picture = Image.fromarray(np.asarray(picture, np.uint16) * 256)
    picture.save(tmp_path / name, **how)
    with caplog.at_level(logging.WARNING):
        assert opened(tmp_path / name) is None
    assert reason in caplog.text and "is decoded whole, which takes 0.0 GB" in caplog.text
    assert read_image(tmp_path / name).shape == ((WIDTH, HEIGHT, 3) if "exif" in how else (HEIGHT, WIDTH, 3))


def odd_file(path: Path, kind: str) -> None:
    """Write a file that Pillow calls RGB or L, although it has other bits or bands."""
    pixels = np.asarray(photograph())
    if kind == "16-bit RGB PNG":
        path.write_bytes(cv2.imencode(".png", pixels.astype(np.uint16) * 257)[1].tobytes())
    elif kind == "RGBX TIFF":
        four = np.dstack((pixels, pixels[:, :, :1]))
        tifffile.imwrite(path, four, photometric="rgb", extrasamples=["unspecified"])
    else:
        grey = kind == "grey PNG with a transparent value"
        photograph().convert("L" if grey else "RGB").save(path, transparency=7 if grey else (1, 2, 3))


@pytest.mark.parametrize(
    "kind", ["16-bit RGB PNG", "RGBX TIFF", "grey PNG with a transparent value", "PNG with a transparent colour"]
)
def test_rgb_of_other_bits_or_bands_is_decoded_whole_and_never_in_strips(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    path = tmp_path / ("a.tif" if "TIFF" in kind else "a.png")
    odd_file(path, kind)
    assert opened(path) is None
    assert "only grey and RGB images of 8 bits" in caplog.text
    assert read_image(path).shape == (HEIGHT, WIDTH, 3)
    with pytest.raises(ImageError, match=r"cannot be read in strips \([1-4] bands of u(char|short)\)"):
        next(StripImage(path, HEIGHT, WIDTH).strips())


def test_several_images_with_one_reason_are_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.bmp", "b.bmp", "c.png", "d.png"):
        photograph().convert("RGBA" if name.endswith("png") else "RGB").save(tmp_path / name)
    first: dict[str, Path] = {}
    assert [opened(tmp_path / name, first) for name in ("a.bmp", "b.bmp", "c.png", "d.png")] == [None] * 4
    assert len(caplog.records) == len(first) == 2
    assert "a.bmp is decoded whole" in caplog.text and "c.png is decoded whole" in caplog.text


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_not_opened_because_it_can_be_read_only_once(tmp_path: Path) -> None:
    photograph().save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    found: list[StripImage | None] = []
    thread = threading.Thread(target=lambda: found.append(opened(tmp_path / "pipe.png")), daemon=True)
    thread.start()
    thread.join(10)
    assert found == [None], "it waits for a writer"


def test_without_pyvips_the_message_says_what_to_install(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    photograph().save(tmp_path / "a.png")
    monkeypatch.setattr(strips, "find_spec", lambda _: None)
    assert opened(tmp_path / "a.png") is None
    assert 'pip install "pyvips[binary]" reads it in strips' in caplog.text


def test_small_and_damaged_files_are_left_to_the_image_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    assert opened(tmp_path / "a.png") is None
    photograph().save(tmp_path / "b.png")
    monkeypatch.setattr(strips, "MIN_PIXELS", HEIGHT * WIDTH + 1)
    assert opened(tmp_path / "b.png") is None


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_a_truncated_file_is_an_error_and_never_grey_rows(tmp_path: Path, name: str) -> None:
    photograph().save(tmp_path / name, **({"compression": "tiff_lzw"} if name.endswith("tif") else {}))
    image = large(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2] if name != "a.tif" else data[: len(data) // 2] + data[-400:])
    with pytest.raises(ImageError, match=f"{name} cannot be read as an image"):
        for _ in image.strips():
            pass


@pytest.mark.parametrize("shift", [0, 37])
def test_tiles_that_threads_cut_are_those_of_the_whole_image_and_few_rows_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: int
) -> None:
    monkeypatch.setattr(strips, "ROWS", 16)
    photograph().save(tmp_path / "a.png")
    pixels, windows = read_image(tmp_path / "a.png"), Tiling(100, 20, shift, shift).windows(HEIGHT, WIDTH)
    bands, kept, lock = Bands(large(tmp_path / "a.png"), windows), 0, threading.Lock()

    def is_right(number: int) -> bool:
        nonlocal kept
        x, y, width, height = windows[number]
        tile = bands.cut(windows[number])
        with lock:
            kept = max(kept, sum(len(strip) for _, strip in [*bands._strips]))
        return np.array_equal(tile, pixels[y : y + height, x : x + width])

    assert all(map_in_order(is_right, range(len(windows)), max_pending=4, threads=3))
    assert kept <= 100 + 80 + 3 * 16  # a row of tiles and, while its last ones are cut, the next row
    assert not bands._strips


def test_the_shrunk_picture_is_the_mean_of_the_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips, "LONGEST_SIDE", 200)
    photograph().crop((0, 0, 800, 600)).save(tmp_path / "a.png")
    picture = shrunk(large(tmp_path / "a.png"))
    assert np.array_equal(picture, reduced(read_image(tmp_path / "a.png"), 150, 200))
