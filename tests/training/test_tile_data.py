"""Tiles while training: exact masks, every defect shown, a bounded epoch, and draws that depend on nothing but the
seed, the epoch and the image."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import image_of, numbered, spec_for
from scipy import ndimage

from flawmask.coco import CocoSplit, annotation, read_split, write_split
from flawmask.images import read_image, write_png
from flawmask.masks import to_rle
from flawmask.model.targets import crops
from flawmask.tiles import Tiling, Window
from flawmask.training.cache import PixelCache
from flawmask.training.loader import Augmenting, Order, make_loader, read
from flawmask.training.tile_data import BESIDE, GOOD_GROUND, MAX_DEFECTS, TileDataset, draws_of, log_cost, pieces_in

TILE = 64
SPEC = spec_for(TILE, 16)
EIGHT = np.ones((3, 3), dtype=bool)


def plates(folder: Path, sizes: Sequence[tuple[int, int]] = ((200, 260), (300, 180), (40, 50))) -> CocoSplit:
    """Write images whose pixels say which defect they show, one of them smaller than a tile, and a good one."""
    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for place, (height, width) in enumerate([*sizes, (150, 150)], start=1):
        canvas = np.zeros((height, width), np.uint8)
        if place <= len(sizes):
            cv2.line(canvas, (3, 5), (width - 9, height - 4), 1, 2)
            cv2.circle(canvas, (width - 12, 12), 7, 1, -1)
        numbers = numbered(canvas > 0)
        records.append({"id": place, "file_name": f"{place}.png", "height": height, "width": width})
        write_png(folder / "train" / "images" / f"{place}.png", image_of(numbers))
        for number in range(1, numbers.max() + 1):
            annotations.append(
                annotation(numbers == number, id=len(annotations) + 1, image_id=place, category_id=2 + number % 2)
            )
        if not numbers.any():
            whole = np.ones((height, width), dtype=bool)
            annotations.append(annotation(whole, id=len(annotations) + 1, image_id=place, category_id=1))
    categories = [{"id": 1, "name": "good"}, {"id": 2, "name": "crack"}, {"id": 3, "name": "scratch"}]
    write_split(folder / "train", records, annotations, categories)
    return read_split(folder, "train")


@pytest.fixture
def split(tmp_path: Path) -> CocoSplit:
    return plates(tmp_path)


def shown(items: TileDataset, epoch: int, workers: int = 0) -> list[Any]:
    order = Order(items.shapes, 4, seed=1, marks_epochs=True)
    order.epoch = epoch
    batches = read(make_loader(items, order, workers=workers, pin=False))
    return [
        (batch.pixels.numpy(), [{k: v.numpy() for k, v in one.items()} for one in batch.targets]) for batch in batches
    ]


def is_same(one: Any, other: Any) -> bool:
    return bool(
        all(
            np.array_equal(pixels, others)
            and all(np.array_equal(a[name], b[name]) for a, b in zip(targets, other_targets, strict=True) for name in a)
            for (pixels, targets), (others, other_targets) in zip(one, other, strict=True)
        )
    )


def test_masks_of_tiles_are_exactly_the_pixels_of_their_defects(split: CocoSplit) -> None:
    items = TileDataset(split, SPEC, seed=3)
    seen = 0
    for place in range(12 * len(items)):
        pixels, target = items[place]
        numbers = pixels.numpy()[0].astype(int)
        assert numbers.shape == (TILE, TILE)
        labelled = np.zeros_like(numbers)
        for (left, top, *_), crop, label in zip(
            target["windows"].tolist(), crops(target), target["labels"], strict=True
        ):
            window = labelled[top : top + crop.shape[0], left : left + crop.shape[1]]
            (number,) = set(numbers[top : top + crop.shape[0], left : left + crop.shape[1]][crop.numpy() > 0].tolist())
            window[crop.numpy() > 0] = number
            assert label == 2 + number % 2
            seen += 1
        missed, count = ndimage.label((numbers > 0) & (labelled == 0), EIGHT)
        assert all((missed == one).sum() < 16 for one in range(1, count + 1))  # slivers only
        assert (labelled[numbers == 0] == 0).all()
    assert seen > 50


def test_defects_take_turns_if_the_image_has_fewer_tiles_than_defects(tmp_path: Path) -> None:
    numbers = np.zeros((64, 112), np.int32)
    for number, x in enumerate((2, 7, 96, 100, 104, 108), start=1):  # two tiles cover it, and none shows both sides
        numbers[30:34, x : x + 3] = number
    write_png(tmp_path / "train" / "images" / "1.png", image_of(numbers))
    records = [{"id": 1, "file_name": "1.png", "height": 64, "width": 112}]
    labels = [annotation(numbers == one, id=one, image_id=1, category_id=1) for one in range(1, 7)]
    write_split(tmp_path / "train", records, labels, [{"id": 1, "name": "crack"}])
    items = TileDataset(read_split(tmp_path, "train"), SPEC, seed=3)
    assert [one.kind for one in items.draws] == ["defect", "defect"]
    seen = {int(one) for place in range(20) for one in np.unique(items[place][0].numpy()[0])}
    assert seen == set(range(7))


def test_each_kind_of_tile_shows_what_it_is_for(split: CocoSplit) -> None:
    items = TileDataset(split, SPEC, seed=3)
    shows = {"defect": [0, 0], "beside": [0, 0], "good": [0, 0]}
    for place in range(6 * len(items)):
        pixels, _ = items[place]
        shows[items.draws[place % len(items)].kind][int(bool(pixels.any()))] += 1
    assert shows["defect"][0] == 0
    assert min(shows["beside"]) > 0
    assert shows["good"] == [6 * GOOD_GROUND, 0]


def test_an_epoch_is_bounded_and_its_cost_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    canvas = np.zeros((300, 300), dtype=bool)
    canvas[::75, ::75] = True
    numbers = numbered(canvas)
    write_png(tmp_path / "train" / "images" / "1.png", image_of(numbers))
    records = [annotation(numbers == one, id=one, image_id=1, category_id=2) for one in range(1, 17)]
    images = [{"id": 1, "file_name": "1.png", "height": 300, "width": 300}]
    write_split(tmp_path / "train", images, records, [{"id": 2, "name": "crack"}])
    split = read_split(tmp_path, "train")
    with caplog.at_level(logging.INFO):
        log_cost(split, Tiling(64, 16))
    assert len(draws_of(split, Tiling(64, 16))) == MAX_DEFECTS + BESIDE
    assert (
        "shows 8 tiles, drawn anew each time, of 1 images that 36 tiles cover: 6 with a defect, 2 beside" in caplog.text
    )
    assert len(draws_of(split, Tiling(300, 16))) == 1  # no more than cover the image
    items = TileDataset(split, spec_for(64, 16), seed=1)
    held = {int(one) for place in range(16 * len(items)) for one in np.unique(items[place][0][0]) if one}
    assert held == set(range(1, 17))  # every defect has its turn


def test_every_defect_of_an_image_with_few_is_in_each_epoch(split: CocoSplit) -> None:
    items = TileDataset(split, SPEC, seed=5)
    for epoch in range(3):
        held: dict[int, set[int]] = {}
        for at, draw in enumerate(items.draws):
            held.setdefault(draw.image, set()).update(np.unique(items[epoch * len(items) + at][0][0]).tolist())
        assert all(held[image] >= {1, 2} for image in range(2))


@pytest.mark.parametrize("workers", [0, 2])
def test_tiles_depend_on_seed_epoch_and_image_only(split: CocoSplit, tmp_path: Path, workers: int) -> None:
    first = shown(TileDataset(split, SPEC, seed=7), 2)
    sizes = [(image["height"], image["width"]) for image in split.images]
    cached = TileDataset(split, SPEC, seed=7, cache=PixelCache(tmp_path / "pixels", sizes, 10**9))
    assert is_same(first, shown(cached, 2, workers))
    assert is_same(first, shown(cached, 2, workers))
    assert not is_same(first, shown(cached, 3))
    assert not is_same(first, shown(TileDataset(split, SPEC, seed=8), 2))


def test_tiles_are_augmented(split: CocoSplit) -> None:
    def mirrored(image: Any, masks: Any, names: list[str], draw: np.random.Generator) -> Any:
        return image[:, ::-1].copy(), masks[:, :, ::-1].copy(), names

    plain = TileDataset(split, SPEC, seed=7)
    turned = TileDataset(split, SPEC, seed=7, augmenting=Augmenting(mirrored, 7))
    for place in range(len(plain)):
        assert np.array_equal(turned[place][0].numpy()[:, :, ::-1], plain[place][0].numpy())
        assert len(turned[place][1]["boxes"]) == len(plain[place][1]["boxes"])


@settings(deadline=None, max_examples=80)
@given(
    arrays.arrays(np.bool_, (20, 26), elements=st.integers(0, 2).map(lambda one: one == 0)),
    st.integers(0, 19),
    st.integers(0, 25),
    st.integers(1, 26),
    st.integers(1, 20),
)
def test_pieces_of_a_cut_defect_are_its_connected_parts_without_slivers(
    mask: Any, y: int, x: int, wide: int, high: int
) -> None:
    window = Window(x, y, min(wide, 26 - x), min(high, 20 - y))
    pieces = pieces_in(to_rle(mask), window, 32)
    part = mask[y : y + window.height, x : x + window.width]
    if part.sum() == mask.sum():
        assert len(pieces) == bool(mask.any())
        assert all(piece.sum() == mask.sum() for piece in pieces)
        return
    label, count = ndimage.label(part, EIGHT)
    kept = [label == one for one in range(1, count + 1) if (label == one).sum() >= min(16, mask.sum() / 2)]
    assert sorted(piece[: window.height, : window.width].tobytes() for piece in pieces) == sorted(
        one.tobytes() for one in kept
    )
    assert all(piece.shape == (32, 32) for piece in pieces)


def test_the_pixels_are_those_of_the_file(split: CocoSplit) -> None:
    items = TileDataset(split, SPEC, seed=1)
    small = next(at for at, one in enumerate(items.draws) if one.image == 2)
    pixels = items[small][0].numpy().transpose(1, 2, 0)
    assert np.array_equal(pixels[:40, :50], read_image(split.image_path(split.images[2])))
    assert not pixels[40:].any() and not pixels[:, 50:].any()
