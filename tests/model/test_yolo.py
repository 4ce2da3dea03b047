"""YOLO compared with ultralytics' own suppression, masks and losses, and the error without the package."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_network import detect, patchwork, random_network, resized, spec_of
from torch import Tensor
from torch.nn import functional as F
from ultralytics.utils.nms import non_max_suppression
from ultralytics.utils.ops import process_mask, scale_boxes

from flawmask.coco import annotation
from flawmask.errors import FlawmaskError
from flawmask.masks import Mask
from flawmask.model import yolo
from flawmask.model.arch import Arch
from flawmask.model.build import build, set_score_floor
from flawmask.model.layers import to_device
from flawmask.model.spec import ModelSpec
from flawmask.model.targets import Target, make_target

FLOOR = 0.3
BOTH: tuple[Arch, ...] = ("yolo11n", "yolo11n-seg")


@pytest.fixture(scope="module", params=BOTH)
def network(request: pytest.FixtureRequest) -> Any:
    """Return a cached random network that predicts something, with its spec in `flawmask`. It must not be changed."""
    spec = replace(spec_of(request.param), image_size=96, max_detections=30)
    model = to_device(random_network(spec), torch.device("cpu"))
    set_score_floor(model, FLOOR)
    return model


def letterboxed(image: Tensor) -> Tensor:
    """Pad a resized image like ultralytics: with grey at the right and below, to whole strides."""
    height, width = image.shape[1:]
    batch = torch.full((1, 3, -(-height // 32) * 32, -(-width // 32) * 32), 114 / 255)
    batch[0, :, :height, :width] = image
    return batch


def ultralytics_finds(model: Any, batch: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return its own detections on a batch of one, (N, 6 and mask coefficients) x1 y1 x2 y2 score class, and the masks'
    prototypes."""
    spec: ModelSpec = model.flawmask
    with torch.inference_mode():
        raw, _ = model(batch)
    scores, prototypes = raw if spec.has_masks else (raw, None)
    (found,) = non_max_suppression(
        scores.clone(), FLOOR, iou_thres=0.7, max_det=spec.max_detections, nc=len(spec.classes)
    )
    return found, None if prototypes is None else prototypes[0]


@pytest.mark.parametrize("size", [(96, 128), (75, 91), (200, 130), (64, 300)])
def test_boxes_scores_and_labels_equal_those_of_ultralytics_suppression(network: Any, size: tuple[int, int]) -> None:
    spec: ModelSpec = network.flawmask
    seen, sizes = resized(spec, patchwork(*size, 2))
    batch = letterboxed(seen[0] / 255)
    expected, _ = ultralytics_finds(network, batch)
    with torch.inference_mode():
        (found,) = yolo.infer(network, seen, sizes)
    assert len(expected) > 5
    assert len(set(expected[:, 5].tolist())) > 1
    torch.testing.assert_close(found["scores"], expected[:, 4], atol=1e-6, rtol=0)
    assert found["labels"].tolist() == (expected[:, 5] + 1).tolist()
    # Ultralytics has one scale for both axes. Rounding to whole pixels makes the two differ a little.
    height, width = spec.resized(*size)
    scale = (height / size[0] + width / size[1]) / 2
    scaled = scale_boxes(
        (batch.shape[2], batch.shape[3]), expected[:, :4].clone(), size, ratio_pad=((scale, scale), (0, 0))
    )
    torch.testing.assert_close(found["boxes"], scaled, atol=0.02 * max(size), rtol=0)
    exact = expected[:, :4] * torch.tensor([size[1] / width, size[0] / height] * 2)
    limits = torch.tensor([size[1], size[0]] * 2)
    torch.testing.assert_close(found["boxes"], torch.minimum(exact.clamp(min=0), limits), atol=1e-4, rtol=0)


def test_masks_cover_the_same_pixels_as_ultralytics_masks() -> None:
    spec = replace(spec_of("yolo11n-seg"), image_size=96, max_detections=30)
    model = to_device(random_network(spec), torch.device("cpu"))
    set_score_floor(model, FLOOR)
    # Smooth prototypes, as in a trained network. Noise would differ between 28 cells per box and one cell per 4 pixels.
    model.model[-1].proto.register_forward_hook(lambda _, __, output: F.avg_pool2d(output, 9, 1, 4) * 9)
    seen, _ = resized(spec, patchwork(96, 128, 2))  # neither resized nor padded
    found, prototypes = ultralytics_finds(model, seen[0][None] / 255)
    assert prototypes is not None
    masks = process_mask(prototypes, found[:, 6:], found[:, :4], (96, 128), upsample=True).bool().numpy()
    prediction = detect(model, spec, patchwork(96, 128, 2))
    assert len(prediction.instances) == len(masks)
    overlaps = []
    for one, mask in zip(prediction.instances, masks, strict=True):
        if mask.sum() > 50:
            overlaps.append((one.mask & mask).sum() / (one.mask | mask).sum())
    assert len(overlaps) > 5
    assert np.mean(overlaps) > 0.9
    assert min(overlaps) > 0.75


def rectangle(size: tuple[int, int], y: int, x: int, height: int, width: int) -> Mask:
    mask = np.zeros(size, dtype=bool)
    mask[y : y + height, x : x + width] = True
    return mask


SIZE = (96, 128)
TRUTH: tuple[list[tuple[int, Mask]], ...] = (
    [(2, rectangle(SIZE, 9, 17, 62, 78)), (3, rectangle(SIZE, 25, 33, 14, 22))],  # the small box lies on the large one
    [],
    [(1, rectangle(SIZE, 41, 5, 30, 26))],
)
"""What is on three images: labels and masks. No edge lies on that of a cell of 4 pixels, which the last digit of a box
would put on either side."""


def targets() -> list[Target]:
    made = []
    for truth in TRUTH:
        records: list[dict[str, Any]] = [annotation(mask, id=1, image_id=1, category_id=label) for label, mask in truth]
        made.append(make_target(records, {1: 1, 2: 2, 3: 3}, 1, SIZE, SIZE, "an image"))
    return made


def ultralytics_batch(images: list[Tensor]) -> dict[str, Tensor]:
    """The same as ultralytics' data sets make it: classes from 0, boxes by centre and size as shares of the image, and
    in each cell of a quarter of the image the number of the instance, the largest first."""
    rows, masks = [], []
    for number, truth in enumerate(TRUTH):
        cells = torch.zeros(SIZE[0] // 4, SIZE[1] // 4)
        for place, (label, mask) in enumerate(sorted(truth, key=lambda one: -one[1].sum()), start=1):
            ys, xs = np.nonzero(mask)
            left, top, right, bottom = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
            centre = ((left + right) / 2 / SIZE[1], (top + bottom) / 2 / SIZE[0])
            rows.append([number, label - 1, *centre, (right - left) / SIZE[1], (bottom - top) / SIZE[0]])
            cells[torch.from_numpy(mask[2::4, 2::4].copy())] = place
        masks.append(cells)
    table = torch.tensor(rows, dtype=torch.float32)
    return {
        "img": torch.stack([image / 255 for image in images]),
        "batch_idx": table[:, 0],
        "cls": table[:, 1:2],
        "bboxes": table[:, 2:],
        "masks": torch.stack(masks),
    }


@pytest.mark.parametrize("arch", BOTH)
def test_losses_equal_those_of_ultralytics_on_its_own_batches(arch: Arch) -> None:
    torch.manual_seed(0)
    model = build(replace(spec_of(arch), image_size=96)).train()
    images = [torch.from_numpy(patchwork(*SIZE, seed).copy()).permute(2, 0, 1) for seed in range(3)]
    with torch.no_grad():
        found = yolo.losses(model, images, targets(), None)
        total, expected = model.loss(ultralytics_batch(images))
    names = model.flawmask.architecture.loss_names
    assert set(names) <= set(expected)
    for name in names:
        assert float(found[name]) == pytest.approx(float(expected[name]), rel=1e-5), name
        assert float(found[name]) > 0, name
    assert float(sum(found.values())) == pytest.approx(float(total.sum()) / 3, rel=1e-5)


def test_images_of_several_shapes_are_learned_as_if_padded_with_grey() -> None:
    torch.manual_seed(0)
    model = build(replace(spec_of("yolo11n-seg"), image_size=96)).train()
    image = torch.from_numpy(patchwork(96, 96, 1).copy()).permute(2, 0, 1)
    records: list[dict[str, Any]] = [annotation(rectangle((96, 96), 8, 16, 40, 32), id=1, image_id=1, category_id=2)]
    narrow = make_target(records, {2: 2}, 1, (96, 96), (96, 96), "an image")
    grey = torch.full((3, 96, 32), 114, dtype=torch.uint8)
    wide = torch.from_numpy(patchwork(*SIZE, 2).copy()).permute(2, 0, 1)
    with torch.no_grad():
        found = yolo.losses(model, [image, wide], [narrow, targets()[0]], None)
        expected = yolo.losses(model, [torch.cat([image, grey], dim=2), wide], [narrow, targets()[0]], None)
    assert {name: float(one) for name, one in found.items()} == pytest.approx(
        {name: float(one) for name, one in expected.items()}, rel=1e-6
    )


def test_without_ultralytics_the_error_names_the_command_and_the_licence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("ultralytics", "ultralytics.nn"):
        monkeypatch.setitem(sys.modules, name, None)
    yolo._tasks.cache_clear()
    try:
        with pytest.raises(FlawmaskError, match=r'pip install "flawmask\[yolo\]"') as caught:
            build(ModelSpec("yolo11n", ("good", "defect")))
    finally:
        yolo._tasks.cache_clear()
    assert "AGPL-3.0" in str(caught.value)
    assert "\n" not in str(caught.value)


REPORTS = """
import socket
asked = []
socket.getaddrinfo = lambda host, *_, **__: asked.append(host) or []  # as if there were internet
from flawmask.model.build import build
from flawmask.model.spec import ModelSpec
import cv2, PIL.Image, torch
before = PIL.Image.open, torch.save, cv2.imread
build(ModelSpec("yolo11n", ("good", "defect")))
assert before == (PIL.Image.open, torch.save, cv2.imread)
from ultralytics.utils.events import events
print(bool(events.enabled), asked)
"""


@pytest.mark.services
def test_ultralytics_sends_no_report_opens_no_connection_and_replaces_no_function(tmp_path: Path) -> None:
    """It runs in a process and with settings of its own, because ultralytics never reports under pytest."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "YOLO", "GITHUB"))}

    def said(**given: str) -> str:
        environment = {**outside, "YOLO_CONFIG_DIR": str(tmp_path), **given}
        command = [sys.executable, "-c", REPORTS]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert said().splitlines()[-1] == "False []"
    assert said(YOLO_OFFLINE="false").splitlines()[-1].startswith("True ['"), "a test that cannot fail"
