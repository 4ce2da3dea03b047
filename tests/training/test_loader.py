"""What the network learns from: exact targets, every image, an order that the seed alone decides."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flawmask.coco import CocoSplit, annotation, read_split, write_split
from flawmask.errors import FlawmaskError
from flawmask.images import write_png
from flawmask.masks import Mask
from flawmask.training.loader import SplitDataset, make_loader, read, to_device

HEIGHT, WIDTH = 24, 32
CATEGORIES = [{"id": 9, "name": "scratch"}, {"id": 4, "name": "good"}]  # labels 2 and 1: by id, not as listed


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
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, truth in enumerate(TRUTH, start=1):
        pixels = np.random.default_rng(number).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        write_png(tmp_path / "train" / "images" / f"{number}.png", pixels)
        images.append({"id": number, "file_name": f"{number}.png", "width": WIDTH, "height": HEIGHT})
        for category, mask in truth:
            annotations.append(annotation(mask, id=len(annotations) + 1, image_id=number, category_id=category))
    write_split(tmp_path / "train", images, annotations, CATEGORIES)
    return read_split(tmp_path, "train")


def edited(split: CocoSplit, change: Any) -> CocoSplit:
    path = split.folder / "annotations.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return read_split(split.folder.parent, "train")


def test_a_target_is_exact_and_a_line_one_pixel_wide_has_a_box_one_pixel_wide(split: CocoSplit) -> None:
    image, target = SplitDataset(split)[0]
    expected = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    assert image.dtype == torch.float32
    assert torch.equal(image, torch.from_numpy(expected).permute(2, 0, 1) / 255)
    assert target["boxes"].tolist() == [[2, 2, 11, 11], [31, 0, 32, 24]]
    assert target["boxes"].dtype == torch.float32
    assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()
    assert target["labels"].tolist() == [2, 2]
    assert target["labels"].dtype == torch.int64
    assert target["masks"].dtype == torch.uint8
    assert (target["masks"].numpy() == np.stack([RING, LINE])).all()
    assert target["image_id"].tolist() == [1]


def test_a_good_image_is_one_instance_as_large_as_the_image(split: CocoSplit) -> None:
    _, target = SplitDataset(split)[1]
    assert target["boxes"].tolist() == [[0, 0, WIDTH, HEIGHT]]
    assert target["labels"].tolist() == [1]
    assert target["masks"].all()


def test_an_image_without_annotations_is_kept_with_empty_targets_of_the_right_shape(split: CocoSplit) -> None:
    _, target = SplitDataset(split)[2]
    assert target["boxes"].shape == (0, 4)
    assert target["boxes"].dtype == torch.float32
    assert target["labels"].shape == (0,)
    assert target["labels"].dtype == torch.int64
    assert target["masks"].shape == (0, HEIGHT, WIDTH)
    assert target["masks"].dtype == torch.uint8
    assert len(SplitDataset(split)) == 5


def test_crowds_and_empty_masks_are_nothing_to_learn(split: CocoSplit) -> None:
    def change(content: dict[str, Any]) -> None:
        content["annotations"][0]["iscrowd"] = 1
        content["annotations"][2]["segmentation"] = []

    split = edited(split, change)
    assert SplitDataset(split)[0][1]["boxes"].tolist() == [[31, 0, 32, 24]]
    assert SplitDataset(split)[1][1]["boxes"].shape == (0, 4)


def order(split: CocoSplit, seed: int, epochs: int = 2, *, workers: int = 0, shuffle: bool = True) -> list[list[int]]:
    loader = make_loader(split, 2, shuffle=shuffle, seed=seed, workers=workers, pin=False)
    return [[int(target["image_id"]) for _, targets in read(loader) for target in targets] for _ in range(epochs)]


def test_the_seed_decides_the_order_and_each_epoch_has_its_own(split: CocoSplit) -> None:
    first = order(split, 0, epochs=4)
    torch.manual_seed(99)
    assert order(split, 0, epochs=4) == first
    assert order(split, 1, epochs=4) != first
    assert len({tuple(epoch) for epoch in first}) > 1
    assert all(sorted(epoch) == [1, 2, 3, 4, 5] for epoch in first)


def test_without_shuffling_the_order_is_the_files(split: CocoSplit) -> None:
    assert order(split, 0, shuffle=False) == [[1, 2, 3, 4, 5]] * 2


def test_worker_processes_change_nothing(split: CocoSplit) -> None:
    assert order(split, 3, workers=2) == order(split, 3)


def test_reading_draws_nothing_from_the_global_generator(split: CocoSplit) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    order(split, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_last_batch_may_be_smaller_and_images_of_any_size_stand_together(split: CocoSplit) -> None:
    batches = list(read(make_loader(split, 2, shuffle=False, seed=0, workers=0, pin=False)))
    assert [len(images) for images, _ in batches] == [2, 2, 1]
    moved, targets = to_device(batches[0], torch.device("cpu"))
    assert torch.equal(moved[0], batches[0][0][0])
    assert targets[0].keys() == {"boxes", "labels", "masks", "image_id"}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_an_error_of_one_line_from_a_worker_process_too(split: CocoSplit, workers: int) -> None:
    (split.folder / "images" / "3.png").write_bytes(b"no image")
    loader = make_loader(split, 2, shuffle=False, seed=0, workers=workers, pin=False)
    with pytest.raises(FlawmaskError, match=r"3\.png cannot be read as an image") as caught:
        list(read(loader))
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_an_image_of_another_size_than_its_record_is_refused(split: CocoSplit) -> None:
    write_png(split.folder / "images" / "1.png", np.zeros((HEIGHT, WIDTH + 1, 3), np.uint8))
    with pytest.raises(FlawmaskError, match=r"1\.png is 33x24 but its record says 32x24"):
        SplitDataset(split)[0]


def test_a_segmentation_of_another_size_is_refused(split: CocoSplit) -> None:
    def change(content: dict[str, Any]) -> None:
        content["annotations"][0]["segmentation"] = {"size": [5, 5], "counts": [25]}

    with pytest.raises(FlawmaskError, match="annotation 1 has no usable segmentation"):
        SplitDataset(edited(split, change))[0]
