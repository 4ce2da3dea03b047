"""How a comparison ranks models where images come in groups, from score tables made by hand."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from report.made import make_dataset

from flawmask.coco import read_split
from flawmask.comparison.conclusions import _ranked
from flawmask.comparison.config import BASELINES, CompareConfig
from flawmask.comparison.entry import Entry, SharedData


def group(dataset: Path, names: Sequence[str | None]) -> None:
    path = dataset / "val" / "annotations.json"
    content = json.loads(path.read_text())
    for image, name in zip(content["images"], names, strict=True):
        image["group"] = name
    path.write_text(json.dumps(content))


def write_scores(folder: Path, dataset: Path, spread: float) -> None:
    split, rng = read_split(dataset, "val"), np.random.default_rng(int(10 * spread))
    folder.mkdir(parents=True)
    with (folder / "predictions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "truth", "score"])
        for image in split.images:
            truth = split.is_defective(image)
            score = 1 / (1 + np.exp(-truth - spread * rng.normal()))
            table.writerow([image["file_name"], "defect" if truth else "good", repr(float(score))])


def test_groups_widen_intervals_and_do_not_change_values(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data", count=40, size=32)
    config = CompareConfig(dataset_dir=dataset, archs="ssd300_vgg16", resamples=0)
    shared = SharedData((dataset,), (dataset,), ("val",), pooled=False)
    entries = []
    for name, spread in zip(BASELINES, (0.5, 1.5), strict=True):
        write_scores(tmp_path / name / "inference_val", dataset, spread)
        entries.append(Entry(name, results=f"{name}/inference_val"))
    assert shared.groups is None
    (alone,) = _ranked(config, shared, tmp_path, entries, {})
    kinds = [image["defect_type"] == "good" for image in read_split(dataset, "val").images]
    group(dataset, [f"{kind} {at // 10}" for at, kind in enumerate(kinds)])
    (parts,) = _ranked(config, shared, tmp_path, entries, {})
    assert (parts.best, parts.value, parts.others[0].value) == (alone.best, alone.value, alone.others[0].value)
    assert alone.others[0].interval is not None
    assert parts.others[0].interval is not None
    assert parts.others[0].interval != pytest.approx(alone.others[0].interval)


def test_the_groups_of_folds_are_in_the_order_of_their_images(tmp_path: Path) -> None:
    folds = [make_dataset(tmp_path / name, count=6, size=32) for name in "ab"]
    group(folds[0], ["x", "x", None, "y", "y", "y"])
    shared = SharedData(tuple(folds), tuple(folds), ("val",), pooled=True)
    first = read_split(folds[0], "val").images[2]["file_name"]
    second = [image["file_name"] for image in read_split(folds[1], "val").images]
    assert shared.groups == ["x", "x", f"only {first}", "y", "y", "y", *(f"only {name}" for name in second)]
    assert SharedData(tuple(folds), tuple(folds), ("val",), pooled=False).groups == (shared.groups or [])[:6]
