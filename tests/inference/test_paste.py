"""Masks as runs of pixels: the same pixels as torchvision's, with a fraction of the memory."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torchvision.models.detection.roi_heads import paste_masks_in_image

from flawmask import masks
from flawmask.inference.paste import Floats, expand_boxes, mask_changes, probabilities_in_box

ROUNDING = 4e-6
"""Pixels this close to the threshold may differ: PyTorch computes their position among 30 cells in float32."""

corners = st.floats(-60, 160, width=32)
sides = st.one_of(st.floats(0, 2, width=32), st.floats(0, 140, width=32), st.floats(500, 2000, width=32))


def some_probabilities(kind: str, seed: int) -> Floats:
    random = np.random.default_rng(seed)
    noise = random.random((28, 28)).astype(np.float32)
    if kind == "noise":
        return noise
    if kind == "sure":  # as a trained network gives them
        return (noise > 0.3).astype(np.float32)
    y, x = np.mgrid[-1:1:28j, -1:1:28j]
    return np.asarray(1 / (1 + np.exp(-8 * (random.uniform(0.2, 1.2) - np.hypot(x, y)))), dtype=np.float32)


@settings(max_examples=500, deadline=None)
@given(
    x=corners,
    y=corners,
    width=sides,
    height=sides,
    size=st.tuples(*[st.integers(1, 120)] * 2),
    kind=st.sampled_from(["noise", "sure", "disc"]),
    seed=st.integers(0, 9),
)
@example(x=0.0, y=0.0, width=0.0, height=0.0, size=(1, 1), kind="noise", seed=0)
@example(x=-0.9, y=-0.9, width=50.0, height=50.0, size=(20, 20), kind="sure", seed=1)
@example(x=119.5, y=119.5, width=0.4, height=0.4, size=(120, 120), kind="noise", seed=2)
@example(x=0.0, y=0.0, width=120.0, height=120.0, size=(120, 120), kind="disc", seed=3)
@example(x=-500.0, y=-500.0, width=2000.0, height=2000.0, size=(120, 90), kind="sure", seed=4)
def test_runs_are_the_pixels_that_torchvision_pastes(
    x: float, y: float, width: float, height: float, size: tuple[int, int], kind: str, seed: int
) -> None:
    image_height, image_width = size
    box = np.array([[x, y, x + width, y + height]], dtype=np.float32)
    left, top, right, bottom = (int(side) for side in expand_boxes(box, 28)[0])
    meets = left < image_width and top < image_height and right >= 0 and bottom >= 0
    probabilities = some_probabilities(kind, seed)
    if meets:
        pasted = paste_masks_in_image(torch.from_numpy(probabilities)[None, None], torch.from_numpy(box), size)[0, 0]
    else:  # torchvision would count from the far end, and fail
        pasted = torch.zeros(size)
    changes = mask_changes(probabilities, expand_boxes(box, 28)[0], *size)
    assert (np.diff(changes) > 0).all()
    rle, area = masks.rle_of_changes(changes, *size)
    mask = masks.decode(rle, *size)
    different = mask != (pasted > 0.5).numpy()
    assert (np.abs(pasted.numpy()[different] - 0.5) < ROUNDING).all()
    assert rle == masks.to_rle(mask), "the runs are merged as pycocotools merges them"
    assert area == mask.sum()

    local, column, row = probabilities_in_box(probabilities, expand_boxes(box, 28)[0], *size)
    whole = np.zeros(size, dtype=np.float32)
    whole[row : row + local.shape[0], column : column + local.shape[1]] = local
    assert local.dtype == np.float32
    assert np.abs(whole - pasted.numpy()).max() < ROUNDING


def test_a_mask_over_a_large_image_is_the_one_that_torchvision_pastes() -> None:
    box = np.array([[12.5, 30.25, 2890.0, 2950.75]], dtype=np.float32)
    for kind in ("noise", "sure", "disc"):
        probabilities = some_probabilities(kind, 3)
        pasted = paste_masks_in_image(
            torch.from_numpy(probabilities)[None, None], torch.from_numpy(box), (3000, 2900)
        ).numpy()[0, 0]
        rle, _ = masks.rle_of_changes(mask_changes(probabilities, expand_boxes(box, 28)[0], 3000, 2900), 3000, 2900)
        different = masks.decode(rle, 3000, 2900) != (pasted > 0.5)
        assert np.count_nonzero(different) < 100
        assert (np.abs(pasted[different] - 0.5) < ROUNDING).all()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6))
def test_a_pixel_just_at_the_threshold_is_outside_as_in_torchvision(seed: int) -> None:
    """A box that grows to 30 x 30 pixels has one pixel for each cell: no interpolation, and so no rounding."""
    probabilities = np.random.default_rng(seed).choice(np.array([0.25, 0.5, 0.75], np.float32), (28, 28))
    box = np.array([[5.5, 5.5, 33.0, 33.0]], dtype=np.float32)
    assert (np.diff(expand_boxes(box, 28)[0].reshape(2, 2), axis=0) == 29).all()
    pasted = paste_masks_in_image(torch.from_numpy(probabilities)[None, None], torch.from_numpy(box), (40, 40))[0, 0]
    rle, _ = masks.rle_of_changes(mask_changes(probabilities, expand_boxes(box, 28)[0], 40, 40), 40, 40)
    assert np.array_equal(masks.decode(rle, 40, 40), (pasted > 0.5).numpy())


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux alone tells a process's own peak of memory")
def test_a_hundred_masks_on_a_large_image_need_little_memory() -> None:
    """A new process measures its own peak. As arrays, the masks would take 1.6 GB, and as floats 6.4 GB."""
    code = """
import re
from pathlib import Path
import numpy as np
from random_network import SPEC
from flawmask.prediction import RawDetections, post_process
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
random = np.random.default_rng(0)
sides = np.geomspace(20, 3990, 100)[:, None] * [1, 0.9]
corners = random.random((100, 2)) * (4000 - sides)
y, x = np.mgrid[-1:1:28j, -1:1:28j]
disc = (1 / (1 + np.exp(8 * np.hypot(x, y) - 7))).astype(np.float32)
boxes, scores = np.hstack((corners, corners + sides)).astype(np.float32), np.linspace(0.5, 1, 100, dtype=np.float32)
found = RawDetections(boxes, np.full(100, 2), scores, np.repeat(disc[None], 100, axis=0))
before = peak()
record = post_process(found, SPEC.classes, 4000, 4000).to_dict(0.5)
print(len(record["instances"]), record["defect_area_px"], before, peak())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    instances, area, before, after = (float(word) for word in done.stdout.split())
    assert instances == 100
    assert area > 8_000_000
    assert after - before < 100, "in MB"
    assert after < 2000
