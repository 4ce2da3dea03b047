"""Fixtures for several test files: a tiny category to prepare, and the real images if they are there."""

import gc
import hashlib
import logging
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from flawmask.launch import own_process


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--start_method",
        choices=multiprocessing.get_all_start_methods(),
        help="how processes are started where nothing else is said: as on macOS and Windows with spawn",
    )


def pytest_configure(config: pytest.Config) -> None:
    own_process()  # messages are those of the command line; what a library does is tested in processes of its own
    if method := config.getoption("--start_method"):
        multiprocessing.set_start_method(method)


def pytest_sessionfinish() -> None:
    """Kill data loader processes that a failed training left behind. Otherwise Python would wait for them forever."""
    gc.collect()
    for one in multiprocessing.active_children():
        one.kill()


@pytest.fixture(autouse=True)
def _quiet_logger() -> Iterator[None]:
    """Remove the handlers that the command line adds to the logger, and restore its level."""
    logger = logging.getLogger("flawmask")
    handlers, level = [*logger.handlers], logger.level
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)


@pytest.fixture
def tiny_category(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a category in MVTec's layout and returns its folder, `<tmp_path>/mvtec/<name>`.

    Images are 18 wide and 14 high, no two alike; masks are noise, full of holes and pixels that touch by a corner.
    """

    def make(*, name: str = "part", good: int = 4, train_good: int = 0, **types: int) -> Path:
        draw = np.random.default_rng(5)
        folder = tmp_path / "mvtec" / name
        wanted = {"test/good": good, "train/good": train_good}
        wanted |= {f"test/{kind}": count for kind, count in (types or {"crack": 3, "hole": 2}).items()}
        for place, count in wanted.items():
            (folder / place).mkdir(parents=True)
            for number in range(count):
                write(folder / place / f"{number:03d}.png", draw.integers(0, 256, (14, 18, 3), dtype=np.uint8))
                if "good" not in place:
                    mask = np.where(draw.random((14, 18)) > 0.6, 255, 0).astype(np.uint8)
                    write(folder / place.replace("test", "ground_truth") / f"{number:03d}_mask.png", mask)
        return folder

    return make


def write(path: Path, pixels: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels)


@pytest.fixture
def digests() -> Callable[[Path], dict[str, str]]:
    """Return a function that returns the SHA-256 of every file under a folder, by its relative path."""

    def of(folder: Path) -> dict[str, str]:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    return of


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the real images. Tests that need it are skipped where it is missing."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here: the real images are no part of the repository")
    return folder


# Below, imports within: these modules import PyTorch and Matplotlib, which not all tests need.


@pytest.fixture(scope="module")
def small_network() -> Iterator[None]:
    """Replace the smallest Mask R-CNN by a smaller network in this process, while the module's tests run."""
    from small_network import in_place

    with in_place():
        yield


@pytest.fixture(scope="module")
def undrawn() -> Iterator[None]:
    """Draw no pictures in trainings and reports while the module's tests run."""
    from undrawn import STUBS, patched

    with patched(STUBS):
        yield


@pytest.fixture
def drawn() -> Iterator[None]:
    """Draw pictures in spite of `undrawn`, for a test of the pictures."""
    from undrawn import REAL, patched

    with patched(REAL):
        yield
