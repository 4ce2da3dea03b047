"""The results for reports, made once."""

from pathlib import Path

import pytest

from report.made import make_dataset, make_run


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COCO folder with 24 drawn parts."""
    return make_dataset(tmp_path_factory.mktemp("data") / "drawn_augmented", count=24)


@pytest.fixture
def results_dir(tmp_path: Path, dataset: Path) -> Path:
    """The results of a run on it, a new copy for each test."""
    return make_run(tmp_path / "run_a", dataset)
