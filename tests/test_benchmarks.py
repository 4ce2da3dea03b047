"""What benchmarks compare Flawmask with: the plain way reads the same images, and slicers get the same instances."""

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import Oracle, image_of, spec_for
from prepared import run
from pycocotools.coco import COCO

from flawmask.coco import read_split
from flawmask.images import read_image
from flawmask.prediction import Prediction, RawDetections

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


def test_the_plain_way_reads_the_images_and_masks_of_the_split(
    monkeypatch: pytest.MonkeyPatch, tiny_category: Callable[..., Path]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    plain = importlib.import_module("plain")
    split = read_split(run(tiny_category(crack=4)).dataset_dir, "train")
    coco = COCO(str(split.annotation_file))
    items = plain.PlainDataset(split)
    assert len(items) == len(split.images) > 0
    for (image, target), record in zip((items[place] for place in range(len(items))), split.images, strict=True):
        np.testing.assert_array_equal(
            (image * 255).round().numpy().transpose(1, 2, 0), read_image(split.image_path(record))
        )
        truth = [coco.annToMask(one).astype(bool) for one in split.annotations[record["id"]]]
        np.testing.assert_array_equal(target["masks"].numpy(), truth)
        for (left, top, right, bottom), mask in zip(target["boxes"].int().tolist(), truth, strict=True):
            assert mask[top:bottom, left:right].sum() == mask.sum() > 0
            assert mask[top].any() and mask[bottom - 1].any() and mask[:, left].any() and mask[:, right - 1].any()
    sys.modules.pop("plain")


def test_the_coverage_of_intervals_over_parts_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    coverage = importlib.import_module("coverage")
    monkeypatch.setattr(coverage, "POPULATION", 500)
    shares = coverage.grouped_cell(coverage.Options(samples=3, resamples=20), "fair", 15, "medium")
    assert {"recall", "image AUROC", "image AP", "mask AP"} <= set(shares)
    assert all(0 <= share <= 1 for both in shares.values() for share in both)
    sys.modules.pop("coverage")


def test_joining_is_measured_on_each_networks_own_images(
    monkeypatch: pytest.MonkeyPatch, tiny_category: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    joining = importlib.import_module("joining")
    folders = tuple(run(tiny_category(name=name, crack=count)).dataset_dir for name, count in (("one", 4), ("two", 9)))
    seen: list[tuple[str, Path]] = []

    def predict_split(model: Path, split: Any) -> tuple[list[Prediction], dict[str, float]]:
        seen.append((model.name, split.folder.parent))
        return [Prediction(one["height"], one["width"], (), classes=split.class_names) for one in split.images], {}

    monkeypatch.setattr(joining, "_raw", lambda model: model)
    monkeypatch.setattr(joining, "predict_split", predict_split)
    models = (Path("a.pt"), Path("b.pt"))
    joining.main(joining.Config(models=models, dataset_dir=folders))
    joining.main(joining.Config(models=models, dataset_dir=folders[:1]))
    assert seen == [("a.pt", folders[0]), ("b.pt", folders[1]), ("a.pt", folders[0]), ("b.pt", folders[0])]
    assert capsys.readouterr().out.count("| 0 | 0 | 0 | 0 | 0 |") == 2 * len(joining.RULES)
    with pytest.raises(ValueError, match="shorter"):
        joining.main(joining.Config(models=(*models, Path("c.pt")), dataset_dir=folders))
    sys.modules.pop("joining")


def test_fewer_parts_are_whole_ones_and_a_smaller_share_is_within_a_larger_one(
    monkeypatch: pytest.MonkeyPatch, tiny_category: Callable[..., Path], tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    fewer = importlib.import_module("fewer")
    data = run(tiny_category(good=9, crack=30), group_by=r"^(\d\d)").dataset_dir  # ten images at most share two digits
    whole = read_split(data, "train")
    groups = {image["group"] for image in whole.images}
    kept = []
    for share in (1.0, 0.5, 0.01):
        folder = tmp_path / str(share)
        fewer.main(fewer.Config(dataset_dir=data, output_dir=folder, share=share))
        found, validation = read_split(folder, "train"), read_split(folder, "val")
        kept.append({image["group"] for image in found.images})
        assert found.images == tuple(image for image in whole.images if image["group"] in kept[-1])
        assert [found.annotations.get(image["id"]) for image in found.images] == [
            whole.annotations.get(image["id"]) for image in found.images
        ]
        assert len(list((folder / "train" / "images").iterdir())) == len(found.images)
        assert validation.images == read_split(data, "val").images
    assert kept[0] == groups
    assert kept[0] >= kept[1] >= kept[2] and len(kept[2]) >= 1
    ungrouped = run(tiny_category(name="other"), group_by=None).dataset_dir
    for folder, share, message in (
        (data, 0.0, "--share 0.0"),
        (data, 1.5, "--share 1.5"),
        (ungrouped, 0.5, "no known"),
    ):
        with pytest.raises(SystemExit, match=message):
            fewer.main(fewer.Config(dataset_dir=folder, output_dir=tmp_path / "none", share=share))
        assert not (tmp_path / "none").exists()
    sys.modules.pop("fewer")


def test_fewer_parts_keep_the_share_of_each_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    fewer = importlib.import_module("fewer")
    types = {"good": 20, "crack": 9, "hole": 1}
    images = [{"group": f"{name}{at}", "defect_type": name} for name, count in types.items() for at in range(count)]
    images += [{"group": f"crack{at}", "defect_type": "good"} for at in range(9)] * 3  # parts have good images, too
    for seed in range(9):
        kept = fewer.kept_groups(images, 0.5, seed)
        counts = {name: sum(group.startswith(name) for group in kept) for name in types}
        assert counts == {"good": 10, "crack": 5, "hole": 1}
    kept = fewer.kept_groups(images, 0.5, seed=1)
    assert kept == fewer.kept_groups(images[::-1], 0.5, seed=1) != fewer.kept_groups(images, 0.5, seed=2)
    assert fewer.kept_groups(images, 0.25, seed=1) < kept
    sys.modules.pop("fewer")
