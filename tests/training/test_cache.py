"""The image cache: `get` returns what `put` stored, also in other processes, and the size limit holds."""

import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from flawmask.training.cache import PixelCache, pixel_cache

SHAPES = [(3, 5), (7, 2), (1, 1), (10, 10)]


def picture(place: int) -> npt.NDArray[np.uint8]:
    height, width = SHAPES[place]
    return np.random.default_rng(place).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_get_returns_what_put_stored_and_none_before(tmp_path: Path) -> None:
    cache = PixelCache(tmp_path / "pixels", SHAPES, 10**6)
    assert [cache.get(place) for place in range(4)] == [None] * 4
    for place in (2, 0, 3):
        cache.put(place, picture(place))
    assert cache.get(1) is None
    for place in (0, 2, 3):
        found = cache.get(place)
        assert found is not None
        assert (found == picture(place)).all()
        assert found.shape == (*SHAPES[place], 3)


def fill(cache: PixelCache, places: list[int]) -> None:
    """Put pictures into the cache, as a reading process does, and check the one that is already there."""
    there = cache.get(0)
    assert there is not None
    assert (there == picture(0)).all()
    for place in places:
        cache.put(place, picture(place))


def test_processes_share_the_cache(tmp_path: Path) -> None:
    cache = PixelCache(tmp_path / "pixels", SHAPES, 10**6)
    cache.put(0, picture(0))  # so that this process has mapped the file before other processes get the cache
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=fill, args=(cache, places)) for places in ([1, 2], [2, 3])]
    for one in others:
        one.start()
    for one in others:
        one.join()
    assert [one.exitcode for one in others] == [0, 0]
    for place in range(4):
        found = cache.get(place)
        assert found is not None
        assert (found == picture(place)).all()


@pytest.mark.parametrize(("limit", "kept"), [(0, 0), (48, 0), (49, 1), (90, 1), (91, 2), (94, 3), (10**6, 4)])
def test_images_beyond_the_limit_are_not_cached(tmp_path: Path, limit: int, kept: int) -> None:
    cache = PixelCache(tmp_path / "pixels", SHAPES, limit)
    for place in range(4):
        cache.put(place, picture(place))
    assert [cache.get(place) is not None for place in range(4)] == [True] * kept + [False] * (4 - kept)
    assert (tmp_path / "pixels").stat().st_size <= limit


def test_an_image_of_another_shape_than_its_slot_is_refused(tmp_path: Path) -> None:
    cache = PixelCache(tmp_path / "pixels", SHAPES, 10**6)
    with pytest.raises(ValueError, match="broadcast"):
        cache.put(0, picture(3))


@pytest.mark.parametrize("fails", [False, True])
def test_the_folder_is_deleted_with_the_cache(fails: bool) -> None:
    try:
        with pixel_cache(SHAPES, 1.0) as cache:
            cache.put(0, picture(0))
            assert cache.kept == 4
            folder = cache.path.parent
            assert [path.name for path in folder.iterdir()] == ["pixels"]
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert not folder.exists()


HOLDING = """
import sys, tempfile
tempfile.tempdir = sys.argv[1]
from flawmask.training.cache import pixel_cache
with pixel_cache([(3, 5)], 1.0) as cache:
    print(cache.path.parent, flush=True)
    sys.stdin.read()
"""


def test_folders_of_killed_processes_are_deleted_and_those_of_running_ones_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others, folders = [], []
    for _ in range(2):
        command = [sys.executable, "-c", HOLDING, str(tmp_path)]
        others.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert others[-1].stdout is not None
        folders.append(Path(others[-1].stdout.readline().strip()))
    assert all((folder / "pixels").is_file() for folder in folders)
    others[0].kill()
    others[0].communicate()
    assert folders[0].exists()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pixel_cache(SHAPES, 1.0):
        assert not folders[0].exists()
        assert (folders[1] / "pixels").is_file()
    others[1].communicate("")
    assert list(tmp_path.iterdir()) == []


def test_at_most_half_of_the_free_disk_space_is_used_and_this_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * 94))
    with caplog.at_level(logging.INFO), pixel_cache(SHAPES, 1.0) as cache:
        assert cache.kept == 3
    assert "3 of 4 decoded images are cached" in caplog.text


def test_a_disk_that_turns_out_full_is_no_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with caplog.at_level(logging.INFO), pixel_cache(SHAPES, 1.0) as cache:
        cache.put(0, picture(0))
        assert cache.get(0) is None
    assert "No space left on device" in caplog.text
