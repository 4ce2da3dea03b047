"""Pictures of a training: label statistics are exact, and masks and colours are in the right places."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from random_network import SPEC, network, patchwork, spec_of

from flawmask.coco import CocoSplit, annotation, read_split, write_split
from flawmask.draw import SURROUND, TRUTH
from flawmask.images import read_image, write_png
from flawmask.inference.torch_backend import TorchBackend
from flawmask.model import rcnn
from flawmask.training import loader
from flawmask.training.label_plots import GRID, Labels, draw_labels, measure_labels
from flawmask.training.pictures import draw_predictions, draw_train_batch

CATEGORIES = ({"id": 1, "name": "good"}, {"id": 2, "name": "crack"}, {"id": 5, "name": "scratch"})


def split_of(
    images: list[dict[str, Any]], annotations: list[dict[str, Any]], categories: Any = CATEGORIES
) -> CocoSplit:
    by_image = {image["id"]: tuple(one for one in annotations if one["image_id"] == image["id"]) for image in images}
    return CocoSplit(Path("parts/train"), tuple(images), by_image, tuple(categories))


def boxed(image_id: int, category_id: int, *bbox: float, **more: Any) -> dict[str, Any]:
    return {"id": 0, "image_id": image_id, "category_id": category_id, "bbox": list(bbox), **more}


IMAGES = [
    {"id": 1, "file_name": "a.png", "width": 100, "height": 50},
    {"id": 2, "file_name": "b.png", "width": 128, "height": 128},
    {"id": 3, "file_name": "c.png", "width": 640, "height": 64},
]


def test_labels_are_measured_exactly_without_good_crowds_and_broken_boxes() -> None:
    annotations = [
        boxed(1, 5, 0, 0, 50, 25),
        boxed(1, 5, 90, 48, 9, 1),
        boxed(1, 1, 0, 0, 100, 50),
        boxed(2, 2, 64, 64, 64, 16),
        boxed(2, 2, 0, 0, 9, 9, iscrowd=1),
        boxed(2, 2),
        boxed(2, 2, 0, 0, 0, 9),
        boxed(2, 2, 0, 0, float("nan"), 9),
        boxed(3, 5, 0, 0, 64, 4),
    ]
    labels = measure_labels(split_of(IMAGES, annotations), SPEC)
    assert labels.counts == {"scratch": 3, "crack": 1}
    assert labels.per_image.tolist() == [2, 1, 1]
    # The shorter side becomes 64, but the longer one at most 107.
    scales = np.array([107 / 100, 107 / 100, 64 / 128, 107 / 640])
    assert labels.sizes == pytest.approx(scales * np.sqrt([50 * 25, 9, 64 * 16, 64 * 4]))
    assert labels.aspects == pytest.approx([2, 9, 4, 16])
    expected = np.zeros((GRID, GRID))
    expected[:25, :25] += 1 / 4
    expected[48:49, 45:50] += 1 / 4
    expected[25:32, 25:] += 1 / 4
    expected[:4, :5] += 1 / 4
    assert labels.coverage == pytest.approx(expected)


def test_labels_are_measured_at_the_size_of_a_network_with_square_inputs(tmp_path: Path) -> None:
    spec = spec_of("ssdlite320_mobilenet_v3_large")
    split = split_of(IMAGES, [boxed(1, 5, 0, 0, 50, 25), boxed(3, 2, 0, 0, 64, 4)])
    labels = measure_labels(split, spec)
    assert labels.sizes == pytest.approx([160, np.sqrt(32 * 20)])
    assert labels.aspects == pytest.approx([1, 32 / 20])
    draw_labels(split, spec, tmp_path / "labels.png")
    assert is_readable(tmp_path / "labels.png")


def test_a_box_beyond_the_image_covers_only_its_part_inside() -> None:
    labels = measure_labels(split_of(IMAGES, [boxed(2, 2, -64, -64, 96, 96), boxed(2, 2, 96, 96, 64, 64)]), SPEC)
    expected = np.zeros((GRID, GRID))
    expected[:13, :13] += 1 / 2
    expected[37:, 37:] += 1 / 2
    assert labels.coverage == pytest.approx(expected)


def test_without_a_usable_box_all_statistics_are_zero(tmp_path: Path) -> None:
    split = split_of(IMAGES, [boxed(1, 2)])
    labels = measure_labels(split, SPEC)
    assert (labels.counts, labels.per_image.sum(), labels.coverage.sum()) == ({"crack": 0, "scratch": 0}, 0, 0)
    draw_labels(split, SPEC, tmp_path / "labels.png")
    assert is_readable(tmp_path / "labels.png")


def is_readable(path: Path) -> bool:
    """Return whether it is a large picture with something on it: neither all paper nor all ink."""
    pixels = read_image(path)
    paper = (pixels == 255).all(axis=2).mean()
    return pixels.shape[0] > 600 and pixels.shape[1] > 1200 and 0.2 < float(paper) < 0.9


def test_labels_are_drawn_for_one_instance_and_for_ten_thousand_of_forty_classes(tmp_path: Path) -> None:
    draw_labels(split_of(IMAGES, [boxed(1, 2, 10, 10, 20, 20)]), SPEC, tmp_path / "one.png")
    without_anchors = spec_of("ssd300_vgg16")
    draw_labels(split_of(IMAGES, [boxed(1, 2, 10, 10, 20, 20)]), without_anchors, tmp_path / "size.png")
    assert is_readable(tmp_path / "size.png")
    random = np.random.default_rng(0)
    categories = [{"id": 1, "name": "good"}]
    categories += [{"id": number, "name": f"type {number} {'x' * (number % 40)}"} for number in range(2, 42)]
    images = [{"id": number, "file_name": f"{number}.png", "width": 640, "height": 480} for number in range(500)]
    sides = random.lognormal(3, 1, (10_000, 2)).clip(1, 480)
    many = [
        boxed(at % 500 if at % 7 else 3, 2 + int(random.geometric(0.1)) % 40, *random.uniform(0, 400, 2), *sides[at])
        for at in range(10_000)
    ]
    draw_labels(split_of(images, many, categories), SPEC, tmp_path / "many.png")
    pictures = [read_image(tmp_path / name) for name in ("one.png", "many.png")]
    assert is_readable(tmp_path / "one.png")
    assert is_readable(tmp_path / "many.png")
    assert (pictures[0] != pictures[1]).any()


def stained(folder: Path, sizes: list[tuple[int, int]]) -> CocoSplit:
    """Grey plates of (height, width), each with a dark square from row 20 to 40 and column 30 to 50."""
    images, annotations = [], []
    for number, (height, width) in enumerate(sizes, start=1):
        pixels = np.full((height, width, 3), 170, np.uint8)
        mask = np.zeros((height, width), dtype=bool)
        mask[20:40, 30:50] = True
        pixels[mask] = 40
        write_png(folder / "images" / f"{number}.png", pixels)
        images.append({"id": number, "file_name": f"{number}.png", "width": width, "height": height})
        annotations.append(annotation(mask, id=number, image_id=number, category_id=2))
    write_split(folder, images, annotations, list(CATEGORIES))
    return read_split(folder.parent, folder.name)


def sheet_of(split: CocoSplit, batch_size: int, path: Path) -> npt.NDArray[np.uint8]:
    items = loader.SplitDataset(split, SPEC)
    order = loader.Order(items.shapes, batch_size, seed=None)
    batches = loader.make_loader(items, order, workers=0, pin=False)
    draw_train_batch(network(), rcnn, loader.read(batches), split, path)
    return read_image(path)


def near(pixels: npt.NDArray[np.uint8], colour: tuple[int, int, int], within: int = 30) -> npt.NDArray[np.bool_]:
    return np.asarray(np.abs(pixels.astype(int) - colour).max(axis=-1) <= within)


def test_a_batch_shows_its_masks_in_place_its_images_in_their_own_colours_and_its_padding(tmp_path: Path) -> None:
    split = stained(tmp_path / "train", [(64, 64), (64, 96)])
    sheet = sheet_of(split, 2, tmp_path / "train_batch.jpg")
    # Two cells of 480 x 320 side by side, 13 pixels apart, each below its name. Both images are padded to 64 x 96. They
    # are sorted by aspect ratio: the wider one comes first.
    cells = [sheet[-13 - 320 : -13, left : left + 480] for left in (13, 13 + 480 + 13)]
    for cell in cells:
        ring = near(cell, TRUTH)
        rows, columns = np.nonzero(ring)
        # The square is now 100 pixels wide, from 100 to 200 and 150 to 250. Its tag is above it.
        assert (columns.min(), columns.max(), rows.max()) == pytest.approx((149, 251, 201), abs=3)
        assert rows.min() > 60
        assert ring[150, 145:155].any()
        assert ring[150, 247:257].any()
        assert ring[196:206, 200].any()
        assert not ring[110:190, 160:240].any(), "the defect itself is hidden"
        assert near(cell[150, 200], (30, 70, 59), 12), "the mask is not tinted"
        assert near(cell[300, 50], (170, 170, 170), 4)
    assert near(cells[0][40:300, 340:470], (170, 170, 170), 6).all()
    assert near(cells[1][40:300, 340:470], (124, 116, 104), 6).all(), "what pads the narrower image"


@pytest.mark.parametrize(("images", "batch_size", "rows", "columns"), [(1, 4, 1, 1), (7, 2, 3, 2), (20, 9, 3, 8)])
def test_three_batches_are_shown_as_rows_of_at_most_eight_images(
    tmp_path: Path, images: int, batch_size: int, rows: int, columns: int
) -> None:
    sheet = sheet_of(stained(tmp_path / "train", [(64, 64)] * images), batch_size, tmp_path / "train_batch.jpg")
    cell = min(480, 1920 // columns)
    gap = max(2, cell // 24)
    assert sheet.shape[1] == columns * (cell + gap) + gap
    assert sheet.shape[0] // (cell + gap) == rows
    assert not near(sheet, SURROUND, 2).all(axis=1).any()


def test_drawing_a_batch_leaves_the_random_state_as_it_was(tmp_path: Path) -> None:
    split = stained(tmp_path / "train", [(64, 64)] * 3)
    before = torch.get_rng_state()
    sheet_of(split, 2, tmp_path / "train_batch.jpg")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def validation(tmp_path: Path) -> CocoSplit:
    """Nine patchwork images; the last seven have a crack."""
    images, annotations = [], []
    for number in range(1, 10):
        write_png(tmp_path / "val" / "images" / f"{number}.png", patchwork(60, 80, number))
        images.append({"id": number, "file_name": f"{number}.png", "width": 80, "height": 60})
        mask = np.zeros((60, 80), dtype=bool)
        mask[10:30, 20:60] = True
        if number > 2:
            annotations.append(annotation(mask, id=number, image_id=number, category_id=2))
    write_split(tmp_path / "val", images, annotations, list(CATEGORIES))
    return read_split(tmp_path, "val")


def test_the_same_four_defective_images_are_drawn_with_truth_on_the_left(validation: CocoSplit) -> None:
    drawn = draw_predictions(TorchBackend(network(), SPEC), validation)
    assert list(drawn) == ["3.png", "5.png", "7.png", "9.png"]
    again = draw_predictions(TorchBackend(network(), SPEC), validation)
    assert all((again[name] == picture).all() for name, picture in drawn.items())
    for picture in drawn.values():
        middle = picture.shape[1] // 2
        assert near(picture[:, :middle], TRUTH, 5).sum() > 500
        assert picture.dtype == np.uint8
        assert not (picture[-300:, :middle] == picture[-300:, -middle:]).all()


def test_a_split_without_defects_shows_good_images(validation: CocoSplit) -> None:
    good = CocoSplit(validation.folder, validation.images[:2], validation.annotations, validation.categories)
    assert list(draw_predictions(TorchBackend(network(), SPEC), good)) == ["1.png", "2.png"]


def test_labels_hold_arrays_as_documented() -> None:
    labels: Labels = measure_labels(split_of(IMAGES, [boxed(1, 2, 0, 0, 5, 5)]), SPEC)
    assert labels.per_image.dtype == np.int64
    assert labels.sizes.dtype == labels.aspects.dtype == labels.coverage.dtype == np.float64
    assert labels.coverage.shape == (GRID, GRID)
