"""The loader gives exact targets and every image, in an order that only the seed decides."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_network import SPEC
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from flawmask import images
from flawmask.coco import CocoSplit, annotation, read_split, write_split
from flawmask.errors import FlawmaskError
from flawmask.images import Levels, resize, write_png
from flawmask.launch import usable_cores
from flawmask.masks import Mask
from flawmask.model.architecture import STRIDE
from flawmask.model.spec import ModelSpec
from flawmask.model.targets import Target, crops
from flawmask.training.augmentation import Augmentation, Turn
from flawmask.training.cache import PixelCache
from flawmask.training.loader import (
    Augmenting,
    Batch,
    Order,
    SplitDataset,
    default_workers,
    make_loader,
    read,
    resized_shapes,
)
from flawmask.training.tile_data import cached_shapes

HANGING_READER = Path(__file__).parents[1] / "hanging_reader.py"
HEIGHT, WIDTH = 24, 32
AS_IT_IS = replace(SPEC, image_size=HEIGHT)
"""A network that does not resize images of this size."""
CATEGORIES = [
    {"id": 9, "name": "scratch"},
    {"id": 4, "name": "good"},
]  # labels 2 and 1: in the order of the ids, not of the list


def rectangle(y: int, x: int, height: int, width: int) -> Mask:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[y : y + height, x : x + width] = True
    return mask


RING = rectangle(2, 2, 9, 9) & ~rectangle(4, 4, 5, 5)
LINE = rectangle(0, 31, 24, 1)  # a scratch one pixel wide, on the last column
WHOLE = rectangle(0, 0, HEIGHT, WIDTH)
TRUTH = [[(9, RING), (9, LINE)], [(4, WHOLE)], [], [(9, rectangle(5, 6, 7, 8))], [(4, WHOLE)]]


@pytest.fixture
def split(tmp_path: Path) -> CocoSplit:
    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, truth in enumerate(TRUTH, start=1):
        pixels = np.random.default_rng(number).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        write_png(tmp_path / "train" / "images" / f"{number}.png", pixels)
        records.append({"id": number, "file_name": f"{number}.png", "width": WIDTH, "height": HEIGHT})
        for category, mask in truth:
            annotations.append(annotation(mask, id=len(annotations) + 1, image_id=number, category_id=category))
    write_split(tmp_path / "train", records, annotations, CATEGORIES)
    return read_split(tmp_path, "train")


def edited(split: CocoSplit, change: Any) -> CocoSplit:
    path = split.folder / "annotations.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return read_split(split.folder.parent, "train")


def whole_masks(target: Target, height: int = HEIGHT, width: int = WIDTH) -> Mask:
    """Return the instances' masks as large as the image, (N, height, width)."""
    masks = np.zeros((len(target["windows"]), height, width), dtype=bool)
    for mask, crop, (left, top, wide, high) in zip(masks, crops(target), target["windows"].tolist(), strict=True):
        mask[top : top + high, left : left + wide] = crop.numpy() > 0
    return masks


def test_a_target_is_exact_and_a_one_pixel_line_has_a_one_pixel_box(split: CocoSplit) -> None:
    image, target = SplitDataset(split, AS_IT_IS)[0]
    expected = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    assert image.dtype == torch.uint8
    assert torch.equal(image, torch.from_numpy(expected).permute(2, 0, 1))
    assert target["boxes"].tolist() == [[2, 2, 11, 11], [31, 0, 32, 24]]
    assert target["boxes"].dtype == torch.float32
    assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()
    assert target["labels"].tolist() == [2, 2]
    assert target["labels"].dtype == torch.int64
    assert target["windows"].dtype == torch.int64
    assert target["mask_pixels"].dtype == torch.uint8
    assert (whole_masks(target) == np.stack([RING, LINE])).all()
    assert target["image_id"].tolist() == [1]


def test_a_good_image_is_one_instance_as_large_as_the_image(split: CocoSplit) -> None:
    _, target = SplitDataset(split, AS_IT_IS)[1]
    assert target["boxes"].tolist() == [[0, 0, WIDTH, HEIGHT]]
    assert target["labels"].tolist() == [1]
    assert target["windows"].tolist() == [[0, 0, WIDTH, HEIGHT]]
    assert target["mask_pixels"].all()


def test_an_image_without_annotations_is_kept_with_empty_targets_of_the_right_shape(split: CocoSplit) -> None:
    _, target = SplitDataset(split, AS_IT_IS)[2]
    assert target["boxes"].shape == (0, 4)
    assert target["boxes"].dtype == torch.float32
    assert target["labels"].shape == (0,)
    assert target["labels"].dtype == torch.int64
    assert target["windows"].shape == (0, 4)
    assert target["windows"].dtype == torch.int64
    assert target["mask_pixels"].shape == (0,)
    assert target["mask_pixels"].dtype == torch.uint8
    assert crops(target) == []
    assert len(SplitDataset(split, AS_IT_IS)) == 5


def test_crowds_and_empty_masks_are_left_out(split: CocoSplit) -> None:
    def change(content: dict[str, Any]) -> None:
        content["annotations"][0]["iscrowd"] = 1
        image = next(one for one in content["images"] if one["id"] == content["annotations"][2]["image_id"])
        size = [image["height"], image["width"]]
        content["annotations"][2]["segmentation"] = {"size": size, "counts": [size[0] * size[1]]}

    split = edited(split, change)
    assert SplitDataset(split, AS_IT_IS)[0][1]["boxes"].tolist() == [[31, 0, 32, 24]]
    assert SplitDataset(split, AS_IT_IS)[1][1]["boxes"].shape == (0, 4)


def order(split: CocoSplit, seed: int | None, epochs: int = 2, *, workers: int = 0) -> list[list[int]]:
    shuffled = Order([(8, 8)] * len(split.images), 2, seed=seed)
    loader = make_loader(SplitDataset(split, AS_IT_IS), shuffled, workers=workers, pin=False)
    seen = []
    for shuffled.epoch in range(1, epochs + 1):
        seen.append([int(target["image_id"]) for batch in read(loader) for target in batch.targets])
    return seen


def test_the_seed_decides_the_order_and_each_epoch_has_its_own(split: CocoSplit) -> None:
    first = order(split, 0, epochs=4)
    torch.manual_seed(99)
    assert order(split, 0, epochs=4) == first
    assert order(split, 1, epochs=4) != first
    assert len({tuple(epoch) for epoch in first}) > 1
    assert all(sorted(epoch) == [1, 2, 3, 4, 5] for epoch in first)


def test_without_a_seed_the_order_is_that_of_the_file(split: CocoSplit) -> None:
    assert order(split, None) == [[1, 2, 3, 4, 5]] * 2


def test_worker_processes_change_nothing(split: CocoSplit) -> None:
    assert order(split, 3, workers=2) == order(split, 3)


def test_reading_does_not_use_the_global_generator(split: CocoSplit) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    order(split, 3)
    assert torch.equal(torch.get_rng_state(), before)


@given(
    images=st.integers(1, 40),
    batch_size=st.integers(1, 12),
    processes=st.integers(1, 5),
    seed=st.none() | st.integers(0, 3),
    epoch=st.integers(1, 3),
)
def test_an_epoch_shows_each_image_once_and_gives_each_process_one_per_batch(
    images: int, batch_size: int, processes: int, seed: int | None, epoch: int
) -> None:
    batch_size = max(batch_size, processes)  # as `train` guarantees
    orders = [
        Order([(8, 8)] * images, batch_size, seed=seed, rank=rank, processes=processes) for rank in range(processes)
    ]
    for one in orders:
        one.epoch = epoch
    batches = [list(one) for one in orders]
    assert {len(one) for one in orders} == {len(of_one) for of_one in batches} == {len(orders[0].bounds)}
    assert sorted(place for of_one in batches for batch in of_one for place in batch) == list(range(images))
    for shards, (start, end) in zip(zip(*batches, strict=True), orders[0].bounds, strict=True):
        assert sum(len(shard) for shard in shards) == end - start < batch_size + processes
        assert images < processes or min(len(shard) for shard in shards) >= 1
        assert max(len(shard) for shard in shards) - min(len(shard) for shard in shards) <= 1
    whole = list(zip(*batches, strict=True))
    alone = Order([(8, 8)] * images, batch_size, seed=seed)
    alone.epoch = epoch
    if alone.bounds == orders[0].bounds:
        for shards, batch in zip(whole, alone, strict=True):
            assert sorted(place for shard in shards for place in shard) == sorted(batch), "others than alone"


@pytest.mark.parametrize("seed", [0, 1, None])
def test_tall_and_wide_images_are_in_different_batches_and_batches_change_each_epoch(seed: int | None) -> None:
    shapes = [(64, 200), (200, 64)] * 64 + [(64, 64)]
    order = Order(shapes, 4, seed=seed)
    epochs = []
    for order.epoch in (1, 2):
        batches = list(order)
        assert [len(batch) for batch in batches] == [4] * 32 + [1]
        assert sorted(place for batch in batches for place in batch) == list(range(129))
        # At most one batch of each window is mixed: if the numbers of tall and wide images in it do not fill batches.
        mixed = [batch for batch in batches if len({shapes[place] for place in batch}) > 1]
        assert len(mixed) <= 5
        epochs.append(batches)
    assert (epochs[0] == epochs[1]) == (seed is None)
    kinds = [shapes[batch[0]] for batch in epochs[0]]
    if seed is not None:
        assert kinds != sorted(kinds), "all wide images came before all tall ones"
        assert {frozenset(batch) for batch in epochs[0]} != {frozenset(batch) for batch in epochs[1]}


def test_the_last_batch_may_be_smaller_and_may_mix_image_sizes(split: CocoSplit) -> None:
    items = SplitDataset(split, AS_IT_IS)
    batches = list(read(make_loader(items, Order([(8, 8)] * 5, 2, seed=None), workers=0, pin=False)))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    moved, targets = batches[0].on(torch.device("cpu"))
    assert torch.equal(moved[0], items[0][0])
    assert targets[0].keys() == {"boxes", "labels", "windows", "mask_pixels", "image_id"}


def items_of(*sizes: tuple[int, int]) -> list[tuple[torch.Tensor, Target]]:
    """Return images without a pixel of 0, with targets that are told apart by their image id."""
    draw = torch.Generator().manual_seed(0)
    return [
        (torch.randint(1, 256, (3, *size), dtype=torch.uint8, generator=draw), {"image_id": torch.tensor([at])})
        for at, size in enumerate(sizes)
    ]


@given(st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70)), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_a_batch_holds_each_image_in_a_corner_with_zero_padding_and_returns_views(
    sizes: list[tuple[int, int]],
) -> None:
    items = items_of(*sizes)
    batch = Batch.of(items)
    assert len(batch) == len(sizes)
    assert batch.sizes == sizes
    assert batch.pixels.dtype == torch.uint8
    tallest, widest = (max(size[axis] for size in sizes) for axis in (0, 1))
    assert batch.pixels.shape == (len(sizes), -(-tallest // 32) * 32, -(-widest // 32) * 32, 3)
    for image, (expected, _) in zip(batch.images, items, strict=True):
        assert torch.equal(image, expected)
        assert image.untyped_storage().data_ptr() == batch.pixels.untyped_storage().data_ptr()
    for pixels, (height, width) in zip(batch.pixels, sizes, strict=True):
        assert not pixels[height:].any()
        assert not pixels[:, width:].any()
        assert int((pixels > 0).sum()) == 3 * height * width
    assert all(found is expected for found, (_, expected) in zip(batch.targets, items, strict=True))


def test_a_shard_may_be_an_empty_batch() -> None:
    batch = Batch.of([])
    assert len(batch) == len(batch.images) == len(batch.targets) == len(list(batch.parts(2))) == 0


@pytest.mark.parametrize(("at_most", "counts"), [(1, [1] * 5), (2, [2, 2, 1]), (3, [3, 2]), (5, [5]), (9, [5])])
def test_micro_batches_keep_the_order_and_are_padded_separately(at_most: int, counts: list[int]) -> None:
    items = items_of((40, 20), (8, 9), (33, 70), (5, 5), (64, 32))
    batch = Batch.of(items)
    parts = list(batch.parts(at_most))
    assert [len(part) for part in parts] == [len(part.targets) for part in parts] == counts
    for part in parts:
        longest = [max(sides) for sides in zip(*part.sizes, strict=True)]
        assert part.pixels.shape[1:3] == tuple(-(-side // STRIDE) * STRIDE for side in longest)
        for pixels, (height, width) in zip(part.pixels, part.sizes, strict=True):
            assert not pixels[height:].any()
            assert not pixels[:, width:].any()
    for image, (expected, _) in zip([one for part in parts for one in part.images], items, strict=True):
        assert torch.equal(image, expected)
    assert [int(one["image_id"]) for part in parts for one in part.targets] == list(range(5))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only CUDA takes page-locked memory")
def test_a_pinned_batch_its_micro_batches_and_its_gpu_copy_are_equal(
    split: CocoSplit,
) -> None:
    items = SplitDataset(split, AS_IT_IS)
    for batch in read(make_loader(items, Order([(8, 8)] * 5, 2, seed=None), workers=0, pin=True)):
        assert isinstance(batch, Batch)
        assert batch.pixels.is_pinned()
        for part in batch.parts(1):
            assert part.pixels.is_pinned()
            images, targets = part.on(torch.device("cuda"))
            (expected, target) = items[int(part.targets[0]["image_id"]) - 1]
            assert images[0].is_cuda
            assert torch.equal(images[0].cpu(), expected)
            assert all(torch.equal(one.cpu(), target[name]) for name, one in targets[0].items())
            assert targets[0]["boxes"].is_cuda


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_a_one_line_error_even_from_a_worker_process(split: CocoSplit, workers: int) -> None:
    (split.folder / "images" / "3.png").write_bytes(b"no image")
    loader = make_loader(SplitDataset(split, AS_IT_IS), Order([(8, 8)] * 5, 2, seed=None), workers=workers, pin=False)
    with pytest.raises(FlawmaskError, match=r"3\.png cannot be read as an image") as caught:
        list(read(loader))
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_an_image_of_another_size_than_its_record_is_refused(split: CocoSplit) -> None:
    write_png(split.folder / "images" / "1.png", np.zeros((HEIGHT, WIDTH + 1, 3), np.uint8))
    with pytest.raises(FlawmaskError, match=r"1\.png is 33x24 but its record says 32x24"):
        SplitDataset(split, AS_IT_IS)[0]


def test_a_segmentation_of_another_size_is_refused(split: CocoSplit) -> None:
    def change(content: dict[str, Any]) -> None:
        content["annotations"][0]["segmentation"] = {"size": [5, 5], "counts": [25]}

    with pytest.raises(FlawmaskError, match="annotation 1 has no usable segmentation"):
        SplitDataset(edited(split, change), AS_IT_IS)[0]


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int, ModelSpec]:
    spec = replace(SPEC, image_size=draw(st.integers(64, 1100)))
    return draw(st.integers(9, 3000)), draw(st.integers(9, 3000)), spec


def torchvision_resized(pixels: torch.Tensor, spec: ModelSpec) -> torch.Tensor:
    transform = GeneralizedRCNNTransform(spec.image_size, spec.max_size, [0.0] * 3, [1.0] * 3).eval()
    resized: torch.Tensor = transform.resize(pixels)[0]
    return resized


@given(sizes())
@settings(max_examples=100, deadline=None)
def test_training_resizes_images_as_torchvision_does_for_prediction_but_without_its_rounding_errors(
    drawn: tuple[int, int, ModelSpec],
) -> None:
    height, width, spec = drawn
    image = torch.empty(3, height, width, device="meta")
    if max(height, width) / min(height, width) < spec.max_size:
        seen, expected = seen_in_training(height, width, spec), torchvision_resized(image, spec).shape[-2:]
        scale = min(Fraction(spec.image_size, min(height, width)), Fraction(spec.max_size, max(height, width)))
        assert seen == tuple(int(side * scale) for side in (height, width))
        for side, ours, theirs in zip((height, width), seen, expected, strict=True):
            assert ours == theirs or (ours == theirs + 1 == side * scale)  # torchvision's float was just below


@pytest.mark.parametrize(("height", "width", "seen"), [(9, 964, (1, 107)), (964, 9, (107, 1)), (1, 3000, (1, 107))])
def test_a_very_narrow_image_keeps_at_least_one_row_of_pixels(height: int, width: int, seen: tuple[int, int]) -> None:
    """torchvision's transform would leave no row and fail."""
    spec = replace(SPEC, image_size=64)
    assert seen_in_training(height, width, spec) == seen
    assert resize(np.zeros((height, width, 3), np.uint8), seen).shape == (*seen, 3)


def seen_in_training(height: int, width: int, spec: ModelSpec) -> tuple[int, int]:
    (seen,) = resized_shapes(CocoSplit(Path(), ({"id": 1, "height": height, "width": width},), {1: ()}, ()), spec)
    return seen


@pytest.mark.parametrize(("height", "width"), [(24, 32), (100, 130), (97, 64), (20, 90), (64, 64)])
def test_resized_pixels_equal_torchvisions_rounded_to_256_levels(height: int, width: int) -> None:
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = torchvision_resized(torch.from_numpy(pixels).permute(2, 0, 1) / 255, SPEC)
    resized = resize(pixels, (expected.shape[1], expected.shape[2]))
    found = torch.from_numpy(resized).permute(2, 0, 1) / 255
    assert resized.dtype == np.uint8
    assert float((found - expected).abs().max()) <= 0.5 / 255 + 1e-5


@pytest.mark.parametrize(
    ("cores", "processes", "on_cpu", "on_cuda"),
    [(1, 1, 0, 0), (2, 1, 1, 1), (4, 1, 3, 3), (16, 1, 4, 15), (64, 1, 4, 16), (64, 4, 4, 15), (8, 8, 4, 0)],
)
def test_the_number_of_reading_processes_depends_on_the_cores_per_training_process(
    cores: int, processes: int, on_cpu: int, on_cuda: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert default_workers(on_cuda=False) == on_cpu
    assert default_workers(on_cuda=True) == on_cuda


def test_only_cores_that_this_process_may_use_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3, 5, 8}, raising=False)
    assert (usable_cores(), default_workers(on_cuda=True)) == (3, 2)
    monkeypatch.delattr("os.sched_getaffinity")
    assert usable_cores() == 64


def test_with_a_cache_each_image_is_decoded_once_and_is_the_same(
    split: CocoSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []
    decode = images.read_image

    def read_image(path: Path, levels: Levels) -> Any:
        decoded.append(path.name)
        return decode(path, levels)

    plain = SplitDataset(split, SPEC)
    expected = [plain[place][0] for place in range(5)]
    monkeypatch.setattr(images, "read_image", read_image)
    cached = SplitDataset(split, SPEC, PixelCache(tmp_path / "pixels", plain.shapes, 10**9))
    loader = make_loader(cached, Order([(8, 8)] * 5, 2, seed=0), workers=0, pin=False)
    for _ in range(2):
        for batch in read(loader):
            for image, target in zip(batch.images, batch.targets, strict=True):
                assert torch.equal(image, expected[int(target["image_id"]) - 1])
        for place in range(5):
            image, _ = cached[place]
            assert torch.equal(image, expected[place])
            image.zero_()  # the returned image is a copy, not the cache itself
    assert sorted(decoded) == ["1.png", "2.png", "3.png", "4.png", "5.png"]


def test_a_transform_that_writes_into_the_image_does_not_change_the_cache(split: CocoSplit, tmp_path: Path) -> None:
    seen: list[Any] = []

    def black(image: Any, masks: Any, names: list[str], _: Any) -> Any:
        seen.append(image.copy())
        image[:] = 0
        return image, masks, names

    shapes = [(image["height"], image["width"]) for image in split.images]
    items = SplitDataset(split, SPEC, PixelCache(tmp_path / "pixels", shapes, 10**9), Augmenting(black, 0))
    for epoch in (1, 2, 3):  # the second is the first that the cache answers
        image, _ = items[epoch * len(items)]
        assert not image.any()
    assert seen[0].any()
    assert np.array_equal(seen[0], seen[1])
    assert np.array_equal(seen[0], seen[2])


def test_light_augmentation_turns_resized_images_with_their_masks(split: CocoSplit, tmp_path: Path) -> None:
    plain = SplitDataset(split, SPEC)
    augmenting = Augmenting(Augmentation("light"), 3)
    shapes = cached_shapes(split, SPEC, augmenting)
    assert shapes == resized_shapes(split, SPEC)
    cached = SplitDataset(split, SPEC, PixelCache(tmp_path / "pixels", shapes, 10**9), augmenting)
    anew = SplitDataset(split, SPEC, None, augmenting)
    seen = set()
    for place in range(len(plain)):
        height, width = plain[place][0].shape[1:]
        before = whole_masks(plain[place][1], height, width)
        for epoch in range(1, 13):
            image, target = cached[epoch * len(plain) + place]
            pixels, again = anew[epoch * len(plain) + place]
            assert torch.equal(image, pixels)
            assert all(torch.equal(target[name], again[name]) for name in target)
            after = whole_masks(target, *image.shape[1:])
            turns = [(numbers, Turn(*numbers)) for numbers in product([False, True], repeat=3)]
            fitting = {numbers for numbers, turn in turns if np.array_equal(turn.of(before, rows=1), after)}
            assert fitting
            if len(fitting) == 1:
                seen |= fitting
                # Colours change, but not which pixels are brighter on the whole.
                turned = Turn(*min(fitting)).of(plain[place][0].permute(1, 2, 0).numpy())
                assert np.corrcoef(turned.ravel(), image.permute(1, 2, 0).numpy().ravel())[0, 1] > 0.95
    assert len(seen) > 4


def test_images_of_one_batch_are_turned_alike_where_that_saves_padding(split: CocoSplit) -> None:
    many = replace(split, images=tuple({**split.images[0], "id": number} for number in range(400)))
    items = SplitDataset(many, SPEC, None, Augmenting(Augmentation("light"), 3))
    (height, width), *_ = items.shapes
    mixed = {True: 0, False: 0}
    for told in (True, False):
        turns = items.lies_on_its_side if told else None
        order = Order(items.shapes, 4, seed=5, marks_epochs=True, lies_on_its_side=turns)
        order.epoch = 2
        places = [place for batch in order for place in batch]
        assert sorted(places) == list(range(800, 1200))
        for batch in order:
            turned = {items.lies_on_its_side(*divmod(place, 400)) for place in batch}
            mixed[told] += len(turned) == 2
    assert mixed[True] <= 400 // (4 * 8) + 1 < 50 < mixed[False]
    assert height != width
    some = SplitDataset(split, SPEC, None, Augmenting(Augmentation("light"), 3))
    for place in range(5, 50):
        lies = some[place][0].shape[1:] == torch.Size((width, height))
        assert lies == some.lies_on_its_side(*divmod(place, 5))


def test_a_transform_of_ones_own_is_given_whole_images(split: CocoSplit) -> None:
    class Mirrored(Augmentation):
        def __call__(self, image: Any, masks: Any, names: Any, draw: Any) -> Any:
            return image[:, ::-1].copy(), masks[:, :, ::-1].copy(), names

    image, _ = SplitDataset(split, AS_IT_IS, None, Augmenting(Mirrored("light"), 3))[5]
    assert torch.equal(image, SplitDataset(split, AS_IT_IS)[0][0].flip(2))


def test_strong_augmentation_needs_whole_images(split: CocoSplit) -> None:
    whole = [(image["height"], image["width"]) for image in split.images]
    assert cached_shapes(split, SPEC, Augmenting(Augmentation("strong"), 3)) == whole


@pytest.mark.slow
@pytest.mark.parametrize(("how", "status"), [("done", 0), ("error", 1), ("interrupted", -signal.SIGINT)])
def test_a_hanging_reading_process_does_not_keep_the_program_alive(how: str, status: int) -> None:
    command = [sys.executable, str(HANGING_READER), how, multiprocessing.get_start_method()]
    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True) as running:
        try:
            _, printed = running.communicate(timeout=60)
            # torch's exit handler imports tabulate where it is installed. Then Python forgets that it was interrupted.
            assert running.returncode == status or (how == "interrupted" and running.returncode == 1), printed
            said = {"done": "", "error": "ValueError\n", "interrupted": "KeyboardInterrupt\n"}[how]
            assert printed.endswith(said) if said else not printed
        finally:
            with suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
