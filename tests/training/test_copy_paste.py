"""Copy-paste: what is pasted, where, and what becomes of the masks."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_network import SPEC
from scipy import ndimage
from torch import Tensor

from flawmask.coco import annotation, read_split, write_split
from flawmask.images import write_png
from flawmask.masks import components
from flawmask.model.targets import crops
from flawmask.training.augmentation import Augmentation, augmenting_of
from flawmask.training.config import TrainConfig
from flawmask.training.copy_paste import MAX_SHARE, Shown, pasted
from flawmask.training.loader import Augmenting, Order, SplitDataset, make_loader, read

GROUND, DEFECT = 60, 200


def part(height: int, width: int, boxes: list[tuple[int, int, int, int]], ground: int = GROUND) -> Shown:
    """Return an even part with bright rectangles, given by their upper left corner, height and width.

    One without rectangles is good: it has an instance of class good that covers it.
    """
    image = np.full((height, width, 3), ground, np.uint8)
    masks = np.zeros((max(1, len(boxes)), height, width), bool)
    for mask, (y, x, high, wide) in zip(masks, boxes, strict=False):
        mask[y : y + high, x : x + wide] = True
        image[mask] = DEFECT
    if not boxes:
        masks[:] = True
    return Shown(image, masks, ["defect"] * len(boxes) or ["good"])


def boxes_of(draw: np.random.Generator, height: int, width: int) -> list[tuple[int, int, int, int]]:
    """Return up to three rectangles that do not touch each other."""
    free, boxes = np.ones((height, width), bool), []
    for _ in range(int(draw.integers(4))):
        high, wide = draw.integers(1, 9, 2).tolist()
        y, x = int(draw.integers(0, height - high + 1)), int(draw.integers(0, width - wide + 1))
        around = slice(max(0, y - 1), y + high + 1), slice(max(0, x - 1), x + wide + 1)
        if free[around].all():
            free[around] = False
            boxes.append((y, x, high, wide))
    return boxes


@settings(max_examples=150, deadline=None)
@given(st.integers(30, 60), st.integers(30, 60), st.integers(0, 2**32))
def test_pasted_defects_and_their_masks_are_where_their_pixels_are(height: int, width: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    target = part(height, width, boxes_of(draw, height, width))
    rows, columns = draw.integers(30, 61, 2).tolist()
    source = part(rows, columns, boxes_of(draw, rows, columns))
    before = target.image.copy()
    image, masks, names = pasted(target, source, draw)
    assert masks.dtype == bool
    assert masks.shape == (len(names), height, width)
    if names == ["good"]:
        assert masks.all()
        assert np.array_equal(image, before)
        return
    # The ground is even, so the smooth seam is the ground itself: exactly the pixels of defects are bright.
    assert set(names) == {"defect"}
    defective = np.asarray(masks.any(axis=0))
    assert np.array_equal(image == DEFECT, np.broadcast_to(defective[..., None], image.shape))
    assert set(np.unique(image)) <= {GROUND, DEFECT}
    # Each instance is one connected component, as in a data set.
    assert len(list(components(defective))) == len(masks)
    # Those that were there come first and are unchanged. The others keep their size, or were too large.
    old = 0 if target.names == ["good"] else len(target.names)
    assert np.array_equal(masks[:old], target.masks[:old])
    possible = [int(mask.sum()) for mask in source.masks if mask.mean() <= MAX_SHARE]
    for mask in masks[old:]:
        possible.remove(int(mask.sum()))


def pastes(target: Shown, source: Shown, times: int = 40) -> list[Shown]:
    """Return what several draws make of the target, where they paste something."""
    results = [
        pasted(Shown(target.image.copy(), *target[1:]), source, np.random.default_rng(at)) for at in range(times)
    ]
    return [one for one in results if not np.array_equal(one.image, target.image)]


def corner(mask: npt.NDArray[np.bool_]) -> list[int]:
    return [int(axis.min()) for axis in np.nonzero(mask)]


def test_a_defect_comes_to_lie_near_its_own_place_and_at_the_edge_stays_there() -> None:
    good = part(200, 100, [])
    inner = [corner(one.masks[0]) for one in pastes(good, part(100, 50, [(40, 20, 8, 6)]))]
    assert len(inner) == 40
    assert len({tuple(place) for place in inner}) > 20
    # The window is 16 x 14 with its margin, and begins at row 36 of 84 that are free, and at column 16 of 36.
    for y, x in inner:
        assert abs((y - 4) / 184 - 36 / 84) <= 0.15 + 1 / 184
        assert abs((x - 4) / 86 - 16 / 36) <= 0.15 + 1 / 86
    left = [corner(one.masks[0]) for one in pastes(good, part(100, 50, [(40, 0, 8, 6)]))]
    assert {x for _, x in left} == {0}
    assert len({y for y, _ in left}) > 10
    corners = [corner(one.masks[0]) for one in pastes(good, part(100, 50, [(92, 44, 8, 6)]))]
    assert corners == [[192, 94]] * 40
    turned = [corner(one.masks[0]) for one in pastes(good, part(50, 100, [(44, 92, 6, 8)]))]
    assert turned == [[192, 94]] * 40  # a wide image is transposed for a tall one


def test_what_cannot_be_pasted_is_left_out() -> None:
    good, source = part(60, 60, []), part(60, 60, [(20, 20, 8, 8)])
    assert len(pastes(good, source)) == 40
    assert not pastes(good, good)
    assert not pastes(good, source._replace(names=["good"]))
    assert not pastes(part(12, 60, []), source)  # too narrow for it
    assert not pastes(good, part(60, 60, [(20, 20, 20, 19)]))  # more than a tenth of its image
    assert pastes(good, part(60, 60, [(20, 20, 18, 20)]))
    assert not pastes(part(60, 60, [(2, 2, 56, 56)]), source)  # touches another defect wherever it lies
    assert not pastes(part(60, 60, [], ground=GROUND * 3), source)
    assert not pastes(part(60, 60, [], ground=GROUND // 3), source)
    noisy = part(60, 60, [])
    noisy.image[::2] = 10
    assert not pastes(noisy, source)
    red = part(60, 60, [])
    red.image[..., 0] = 3 * GROUND
    red.image[..., 1:] = 0
    assert not pastes(red, source)


def test_of_the_places_the_one_with_similar_ground_is_taken() -> None:
    half_rough = part(200, 200, [])
    half_rough.image[100:, ::2] = 80  # similar enough to be taken, but less so
    rows = [corner(one.masks[0])[0] for one in pastes(half_rough, part(200, 200, [(96, 96, 8, 8)]))]
    assert len(rows) == 40
    assert sum(row + 8 + 4 <= 100 for row in rows) >= 36  # a single draw would give 20
    rough = part(200, 200, [])
    rough.image[:, ::2] = 80
    assert len(pastes(rough, part(200, 200, [(96, 96, 8, 8)]))) == 40


def test_a_defect_becomes_as_bright_as_the_ground_and_has_no_seam() -> None:
    dark = part(60, 60, [(20, 20, 8, 8)])
    dark.image[dark.masks[0]] = 90
    found = pastes(part(60, 60, [], ground=100), dark)
    assert len(found) == 40
    for image, masks, _ in found:
        assert set(image[masks[0]].ravel()) == {round(90 * 101 / 61)}
        assert abs(image[~masks[0]].astype(int) - 100).max() <= 1
    # Where the grounds differ, the pixels go over from one to the other within the margin.
    textured = part(60, 60, [(20, 20, 8, 8)])
    textured.image[:, ::2] = 70
    textured.image[textured.masks[0]] = DEFECT
    found = pastes(part(60, 60, []), textured)
    assert len(found) == 40
    for image, masks, _ in found:
        far = ndimage.distance_transform_cdt(~masks[0], "chessboard")
        assert (image[far > 4] == GROUND).all()
        assert (image[far == 1] != GROUND).any()


def make_split(folder: Path, records: list[tuple[Shown, dict[str, Any]]]) -> SplitDataset:
    """Write the parts as a split, with further keys of their annotations, and return it as a data set."""
    images, annotations, number = [], [], 0
    for at, (shown, extra) in enumerate(records, start=1):
        write_png(folder / "train" / "images" / f"{at}.png", shown.image)
        size = dict(zip(("height", "width"), shown.image.shape[:2], strict=True))
        images.append({"id": at, "file_name": f"{at}.png", **size})
        for mask, name in zip(shown.masks, shown.names, strict=True):
            number += 1
            category_id = {"good": 1, "defect": 2}[name]
            annotations.append({**annotation(mask, id=number, image_id=at, category_id=category_id), **extra})
    categories = [{"id": 1, "name": "good"}, {"id": 2, "name": "defect"}]
    write_split(folder / "train", images, annotations, categories)
    return SplitDataset(read_split(folder, "train"), SPEC)


def epoch_of(items: SplitDataset, epoch: int, workers: int = 0) -> dict[int, tuple[Tensor, Any]]:
    """Return image and target of each image of an epoch, by its id."""
    order = Order(items.shapes, 2, seed=1, marks_epochs=True)
    order.epoch = epoch
    found = {}
    for batch in read(make_loader(items, order, workers=workers, pin=False)):
        for image, target in zip(batch.images, batch.targets, strict=True):
            found[int(target["image_id"])] = (image, target)
    return found


def test_a_training_shows_pasted_defects_with_their_masks(tmp_path: Path) -> None:
    size = SPEC.resized(64, 64)[0]
    records: list[tuple[Shown, dict[str, Any]]] = [
        (part(size, size, []), {}),
        (part(size, size, []), {}),
        (part(size, size, [(20, 24, 8, 6)]), {}),
    ]
    plain = make_split(tmp_path, records)
    items = SplitDataset(plain.split, SPEC, augmenting=Augmenting(None, 5, 1.0))
    for epoch in range(1, 5):
        shown = epoch_of(items, epoch)
        for number, (image, target) in shown.items():
            assert target["labels"].tolist() == ([2] if number < 3 else [2] * len(target["labels"]))
            masks = np.zeros((len(target["labels"]), size, size), bool)
            for mask, crop, (x, y, wide, high) in zip(masks, crops(target), target["windows"].tolist(), strict=True):
                mask[y : y + high, x : x + wide] = crop
            assert np.array_equal(image[0] == DEFECT, masks.any(axis=0))
            assert masks.sum() == 48 * len(masks)
        assert all(np.array_equal(shown[at][0], epoch_of(items, epoch, workers=2)[at][0]) for at in (1, 2, 3))
        assert not np.array_equal(shown[1][0], epoch_of(items, epoch + 1)[1][0])
    seldom = SplitDataset(plain.split, SPEC, augmenting=Augmenting(None, 5, 0.3))
    views = [epoch_of(seldom, epoch)[at][1]["labels"].tolist() for epoch in range(1, 101) for at in (1, 2)]
    assert 30 <= views.count([2]) <= 90
    assert views.count([2]) + views.count([1]) == 200


def test_boxes_without_masks_are_not_pasted(tmp_path: Path) -> None:
    defect, extra = part(64, 64, [(20, 24, 8, 6)]), {"is_box": True}
    boxed = make_split(tmp_path / "boxed", [(part(64, 64, []), {}), (defect, extra)])
    items = SplitDataset(boxed.split, SPEC, augmenting=Augmenting(None, 5, 1.0))
    assert all(epoch_of(items, epoch)[1][1]["labels"].tolist() == [1] for epoch in range(1, 9))


@pytest.mark.parametrize(("augment", "share"), [("off", 0.0), ("off", 0.2), ("light", 0.0), ("strong", 0.5)])
def test_settings(augment: Any, share: float) -> None:
    config = TrainConfig(
        dataset_dir=Path("data"), output_dir=Path("run"), train_augment=augment, copy_paste=share, seed=9
    )
    augmenting = augmenting_of(config)
    if augmenting is None:
        assert (augment, share) == ("off", 0.0)
        return
    assert (augmenting.copy_paste, augmenting.seed) == (share, 9)
    assert isinstance(augmenting.transform, Augmentation) == (augment != "off")
