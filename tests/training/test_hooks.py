"""Extensions of a training by a user's program: a transform of the images, and callbacks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from random_network import SPEC
from stained_plates import make_dataset, same_weights, settings

from flawmask.coco import annotation, read_split, write_split
from flawmask.errors import FlawmaskError
from flawmask.files import read_json
from flawmask.images import write_png
from flawmask.model.targets import crops
from flawmask.training.callbacks import Callback
from flawmask.training.loader import Augmenting, Order, SplitDataset, make_loader, read
from flawmask.training.loop import train
from flawmask.training.run import Run

pytestmark = pytest.mark.usefixtures("small_network", "undrawn")

Image = npt.NDArray[np.uint8]
Masks = npt.NDArray[np.bool_]
CATEGORIES = [{"id": 9, "name": "crack"}, {"id": 4, "name": "good"}, {"id": 11, "name": "scratch"}]


@pytest.fixture
def items(tmp_path: Path) -> SplitDataset:
    """Three images of 64 x 64, each with a crack of 20 x 10 pixels whose upper left corner is at (8, 4)."""
    mask = np.zeros((64, 64), dtype=bool)
    mask[4:14, 8:28] = True
    records, annotations = [], []
    for number in (1, 2, 3):
        write_png(tmp_path / "train" / "images" / f"{number}.png", np.full((64, 64, 3), 40 * number, dtype=np.uint8))
        records.append({"id": number, "file_name": f"{number}.png", "height": 64, "width": 64})
        annotations.append(annotation(mask, id=number, image_id=number, category_id=9))
    write_split(tmp_path / "train", records, annotations, CATEGORIES)
    return SplitDataset(read_split(tmp_path, "train"), SPEC)


def cut(image: Image, masks: Masks, names: list[str], draw: np.random.Generator) -> tuple[Image, Masks, list[str]]:
    """Crop to the upper half or two thirds, masks too, and rename cracks to scratches."""
    assert names == ["crack"]
    assert masks.shape == (1, *image.shape[:2])
    rows = int(draw.choice([32, 48]))
    image[:2, :2] = 255
    return image[:rows], masks[:, :rows], ["scratch"]


def augmented(items: SplitDataset, transform: Any = cut, seed: int = 7) -> SplitDataset:
    return SplitDataset(items.split, SPEC, augmenting=Augmenting(transform, seed))


def shown(items: SplitDataset, epoch: int, workers: int = 0) -> dict[int, tuple[Any, ...]]:
    """Return size, pixels and box of each image of an epoch, by its id."""
    order = Order(items.shapes, 2, seed=1, marks_epochs=True)
    order.epoch = epoch
    found = {}
    for batch in read(make_loader(items, order, workers=workers, pin=False)):
        for image, target in zip(batch.images, batch.targets, strict=True):
            found[int(target["image_id"])] = tuple(image.shape), image.sum().item(), target["boxes"].tolist()
    return found


def test_items_are_what_the_transform_returns_resized_for_the_network(
    items: SplitDataset,
) -> None:
    image, target = augmented(items)[3]  # the first image in the first epoch
    height, width = image.shape[1:]
    (rows,) = [rows for rows in (32, 48) if SPEC.resized(rows, 64) == (height, width)]
    assert target["labels"].tolist() == [3]  # good, crack, scratch: by id
    scale = height / rows
    assert target["boxes"].tolist()[0] == pytest.approx([8 * width / 64, 4 * scale, 28 * width / 64, 14 * scale])
    (mask,) = crops(target)
    assert mask.sum() == pytest.approx(20 * 10 * scale * width / 64, rel=0.05)
    assert int(image[:, 0, 0].min()) == 255  # a transform may change its inputs
    assert int(augmented(items)[3][0][:, -1, -1].max()) == 40, "and changes nothing but that"


def test_randomness_depends_on_seed_epoch_and_image_and_not_on_the_process(items: SplitDataset) -> None:
    first = shown(augmented(items), 1)
    assert first == shown(augmented(items), 1) == shown(augmented(items), 1, workers=2)
    epochs = [shown(augmented(items), epoch) for epoch in range(1, 9)]
    assert len({str(one) for one in epochs}) > 3
    assert {one[0] for epoch in epochs for one in epoch.values()} == {(3, *SPEC.resized(rows, 64)) for rows in (32, 48)}
    assert [shown(augmented(items, seed=8), epoch) for epoch in range(1, 9)] != epochs


@pytest.mark.parametrize(
    ("returned", "why"),
    [
        (lambda image, masks, names, _: (image[:, :, 0], masks, names), "returned no image with masks of its size"),
        (
            lambda image, masks, names, _: (image / 2, masks, names),
            "returned no image with masks of its size",
        ),
        (lambda image, masks, names, _: (image[:9], masks, names), "returned no image with masks of its size"),
        (lambda image, masks, names, _: (image, masks, []), "returned no image with masks of its size"),
        (lambda image, masks, _, __: (image, masks, ["dent"]), "returned 'dent', which is no class"),
    ],
)
def test_a_wrong_result_of_a_transform_is_refused_with_the_files_name(
    items: SplitDataset, returned: Any, why: str
) -> None:
    with pytest.raises(FlawmaskError, match=rf"1\.png: the transform {why}"):
        augmented(items, returned)[3]


def test_a_transform_may_remove_and_add_instances(items: SplitDataset) -> None:
    assert augmented(items, lambda image, masks, _, __: (image, masks[:0], []))[3][1]["boxes"].shape == (0, 4)
    target = augmented(items, lambda image, masks, _, __: (image, np.repeat(masks, 2, axis=0), ["crack", "good"]))[3][1]
    assert target["labels"].tolist() == [2, 1]
    emptied = augmented(items, lambda image, masks, names, _: (image, masks & False, names))[3][1]
    assert emptied["labels"].tolist() == []


class Noted(Callback):
    """Records its calls, and raises an interrupt in an epoch."""

    def __init__(self, until: int | None = None) -> None:
        self.calls: list[Any] = []
        self.until = until

    def on_begin(self, run: Run) -> None:
        self.calls.append(("begin", (run.setup.run_dir / "config.json").is_file()))

    def on_write(self, run: Run) -> None:
        epochs = run.history["epoch"]
        self.calls.append(("write", len(epochs), (run.setup.run_dir / "last.pt").is_file()))

    def on_epoch_end(self, run: Run, figures: Mapping[str, Any]) -> None:
        self.calls.append(("epoch", figures["epoch"], (run.setup.run_dir / "history.json").is_file()))
        if figures["epoch"] == self.until:
            raise KeyboardInterrupt

    def on_end(self, run: Run) -> None:
        self.calls.append(("end", run.epoch))


def turned(image: Image, masks: Masks, names: list[str], draw: np.random.Generator) -> tuple[Image, Masks, list[str]]:
    times = int(draw.integers(4))
    return np.rot90(image, times).copy(), np.rot90(masks, times, axes=(1, 2)).copy(), names


@pytest.mark.slow
def test_callbacks_are_called_in_order_and_a_training_with_a_transform_resumes_to_the_bit(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data")
    whole, half, rest = Noted(), Noted(until=1), Noted()
    expected = train(settings(tmp_path / "data", epochs=2), transform=turned, callbacks=[whole])
    moments = [("write", 1, True), ("epoch", 1, True), ("write", 2, True), ("epoch", 2, True), ("end", 2)]
    assert whole.calls == [("begin", True), *moments]
    config = settings(tmp_path / "data", epochs=2, output_dir=tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        train(config, transform=turned, callbacks=[half])
    again = train(settings(tmp_path / "data", resume=tmp_path / "stopped"), transform=turned, callbacks=[rest])
    assert half.calls == whole.calls[:3]
    assert rest.calls == whole.calls[3:]
    assert same_weights(again.run_dir / "last.pt", expected.run_dir / "last.pt")
    assert read_json(again.run_dir / "config.json")["settings"]["train_augment"] == "off"
    plain = train(settings(tmp_path / "data", epochs=2, output_dir=tmp_path / "plain", train_augment="off"))
    assert not same_weights(plain.run_dir / "last.pt", expected.run_dir / "last.pt")


@pytest.mark.slow
@pytest.mark.parametrize("level", ["light", "strong"])
def test_a_training_with_augmentation_resumes_to_the_bit(tmp_path: Path, level: str) -> None:
    make_dataset(tmp_path / "data")
    expected = train(settings(tmp_path / "data", epochs=2, train_augment=level))
    config = settings(tmp_path / "data", epochs=2, train_augment=level, output_dir=tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[Noted(until=1)])
    again = train(settings(tmp_path / "data", resume=tmp_path / "stopped"))
    assert same_weights(again.run_dir / "last.pt", expected.run_dir / "last.pt")
    off = train(settings(tmp_path / "data", epochs=2, train_augment="off", output_dir=tmp_path / "off"))
    assert not same_weights(off.run_dir / "last.pt", expected.run_dir / "last.pt")
