"""A checkpoint, a split, and its evaluation."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from patchy_split import SPEC, make_dataset, run
from random_network import network

from flawmask.evaluation.evaluate import Evaluated
from flawmask.model import checkpoint


@pytest.fixture(scope="module")
def run_dir(small_network: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    checkpoint.save(folder / "best.pt", network(SPEC), SPEC)
    return folder


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A split of three defective images and two good ones, of two sizes."""
    return make_dataset(tmp_path / "data")


@pytest.fixture(scope="module")
def evaluated(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Evaluated]:
    """A function that evaluates the split, once for the same settings. Its results must not be changed."""
    dataset = make_dataset(tmp_path_factory.mktemp("evaluated") / "data")

    @cache
    def evaluate_split(**settings: Any) -> Evaluated:
        name = "_".join(f"{name}_{value}" for name, value in settings.items())
        return run(run_dir, dataset, output_dir=dataset.parent / f"out_{name}", **settings)

    return evaluate_split
