"""`run` and `compare` with a COCO folder: new splits by folds or parts or for a test, or advice to use `import`."""

from pathlib import Path
from typing import Any

import pytest
from stained_plates import make_dataset

from flawmask.coco import read_split
from flawmask.coco_files import split_names
from flawmask.errors import FlawmaskError
from flawmask.files import read_json, write_json
from flawmask.folds import prepared_folds
from flawmask.pipeline import run
from flawmask.stages import RunConfig, prepare_dataset


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A COCO folder `plates` in the working folder, with 6 training and 3 validation images."""
    monkeypatch.chdir(tmp_path)
    return make_dataset(Path("plates"), training=6, validation=3)


def digests(folder: Path, split: str) -> list[bytes]:
    found = read_split(folder, split)
    return [found.image_path(image).read_bytes() for image in found.images]


def test_each_image_of_all_splits_is_held_back_in_one_fold(dataset: Path) -> None:
    everything = sorted(digests(dataset, "train") + digests(dataset, "val"))
    (dataset / "val").rename(dataset / "valid")  # as Roboflow has it
    config = RunConfig(dataset_dir=dataset, folds=3)
    folders = prepared_folds(config, dataset.name)
    assert [folder.as_posix() for folder in folders] == [f"datasets/plates_fold{k}of3" for k in (1, 2, 3)]
    held_back = [one for folder in folders for one in digests(folder, "val")]
    assert sorted(held_back) == everything
    for folder in folders:
        assert sorted(digests(folder, "val") + digests(folder, "train")) == everything
        assert read_split(folder, "train").categories == read_split(dataset, "train").categories
    names = [image["file_name"] for folder in folders for image in read_split(folder, "val").images]
    assert len(set(names)) == len(names)
    changed = {path: path.stat().st_mtime_ns for path in Path("datasets").rglob("annotations.json")}
    assert prepared_folds(config, dataset.name) == folders
    assert changed == {path: path.stat().st_mtime_ns for path in Path("datasets").rglob("annotations.json")}


def test_dividing_does_not_change_instances(dataset: Path) -> None:
    folder = prepare_dataset(RunConfig(dataset_dir=dataset, test_ratio=0.3), dataset.name)
    assert folder == Path("datasets/plates_divided")
    assert split_names(folder) == ["test", "train", "val"]

    def instances(place: Path) -> list[Any]:
        found = []
        for name in split_names(place):
            split = read_split(place, name)
            for image in split.images:
                found += [
                    (one["segmentation"], one["bbox"], one["category_id"], split.image_path(image).read_bytes())
                    for one in split.annotations[image["id"]]
                ]
        return sorted(found, key=repr)

    assert instances(folder) == instances(dataset)


def test_all_images_of_a_part_stay_in_one_split(dataset: Path) -> None:
    for split, first in (("train", 0), ("val", 6)):
        content = read_json(dataset / split / "annotations.json")
        for number, image in enumerate(content["images"], start=first):
            name = f"part{number // 3}_{number}.png"
            (dataset / split / "images" / image["file_name"]).rename(dataset / split / "images" / name)
            image["file_name"] = name
        write_json(dataset / split / "annotations.json", content)
    folder = prepare_dataset(RunConfig(dataset_dir=dataset, group_by="^(part[0-9])"), dataset.name)
    sides = [{image["group"] for image in read_split(folder, name).images} for name in ("train", "val")]
    assert not set.intersection(*sides)
    assert set.union(*sides) == {"part0", "part1", "part2"}


def test_without_settings_for_new_splits_a_folder_is_used_as_it_is(dataset: Path) -> None:
    assert prepare_dataset(RunConfig(dataset_dir=dataset), dataset.name) == dataset
    assert not Path("datasets").exists()


def test_group_by_with_a_test_split_needs_a_test_ratio(dataset: Path) -> None:
    (dataset / "val").rename(dataset / "test")
    with pytest.raises(FlawmaskError, match=r"has a test split.*give the test split.s share with --test_ratio"):
        prepare_dataset(RunConfig(dataset_dir=dataset, group_by="part"), dataset.name)


def test_for_labels_in_another_format_the_error_has_the_import_command(tmp_path: Path) -> None:
    folder = tmp_path / "my parts"
    folder.mkdir()
    (folder / "a.json").write_text('{"version": "5.5.0", "shapes": [], "imagePath": "a.png"}')
    with pytest.raises(FlawmaskError, match="holds labels of labelme and no splits") as caught:
        run(RunConfig(dataset_dir=folder))
    assert f"flawmask import '{folder}' --output_dir 'datasets/my parts'" in str(caught.value)
