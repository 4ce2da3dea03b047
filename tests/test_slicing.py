"""The benchmark of slicers: all get the same instances of a tile, as the network gives them."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import Oracle, image_of, spec_for

from flawmask.prediction import RawDetections

ROOT = Path(__file__).parent.parent


class WithMaps(Oracle):
    """An oracle with a branch for pixels that sees no defect anywhere."""

    def infer(self, batch: Any, /) -> list[RawDetections]:
        nowhere = np.zeros((len(self.spec.classes), 16, 16), np.float32)
        return [replace(one, maps=nowhere) for one in super().infer(batch)]


def test_other_slicers_get_the_instances_of_a_tile_neither_joined_nor_with_a_second_opinion(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    slicing = importlib.import_module("slicing")
    numbers = np.zeros((64, 64), np.int32)
    numbers[10:20, 10:20], numbers[20:30, 10:20] = 1, 3  # they touch, and have one class
    spec = spec_for(64, 16, join="touching")
    expected = slicing.of_tile(Oracle(spec), image_of(numbers))
    assert [one.area for one in expected.instances] == [100, 100]
    assert slicing.of_tile(WithMaps(spec), image_of(numbers)) == expected
    sys.modules.pop("slicing")
