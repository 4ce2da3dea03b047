"""The checkpoint that the tests of this folder predict with."""

from pathlib import Path

import pytest
from random_network import SPEC, network

from flawmask.model import checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "best.pt"
    checkpoint.save(path, network(), SPEC)
    return path
