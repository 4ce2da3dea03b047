"""The folder layouts of COCO exports: every split and every image is found, or a message says which is not."""

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import draw_image

from flawmask.coco import CocoSplit, read_split
from flawmask.coco_files import FileIndex, has_split, split_names
from flawmask.data.augment import AugmentConfig, augment
from flawmask.errors import FlawmaskError
from flawmask.report.results import Results, read_truth

OUTLINE = {"segmentation": [[1, 1, 5, 1, 5, 4]], "bbox": [1, 1, 4, 3], "area": 6, "iscrowd": 0}


def export(annotation_file: Path, names: Sequence[str], files: Sequence[Path] = ()) -> None:
    """Write a COCO file of images, the first one with a defect, and the image files."""
    images = [{"id": n, "file_name": name, "width": 8, "height": 6} for n, name in enumerate(names, start=1)]
    annotations: list[dict[str, Any]] = [{"id": 1, "image_id": 1, "category_id": 1, **OUTLINE}]
    annotation_file.parent.mkdir(parents=True, exist_ok=True)
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "dent"}]}
    annotation_file.write_text(json.dumps(content))
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(path.as_posix().encode())


def contents_of(split: CocoSplit) -> list[str]:
    """Return the content of the image files of the records: each file contains its own path."""
    return [split.image_path(image).read_bytes().decode() for image in split.images]


def test_valid_and_other_names_of_the_validation_split_mean_val(tmp_path: Path) -> None:
    for number, name in enumerate(("valid", "validation", "Val")):
        dataset = tmp_path / str(number)
        export(dataset / name / "_annotations.coco.json", ["a.png"], [dataset / name / "a.png"])
        assert split_names(dataset) == ["val"]
        assert has_split(dataset, "val")
        split = read_split(dataset, "val")
        assert (split.name, split.folder) == ("val", dataset / name)
        assert contents_of(split) == [f"{dataset}/{name}/a.png"]
        assert not has_split(dataset, "test")


def test_two_folders_of_the_same_split_are_refused(tmp_path: Path) -> None:
    for name in ("val", "valid"):
        export(tmp_path / name / "a.json", ["a.png"], [tmp_path / name / "a.png"])
    with pytest.raises(FlawmaskError, match="holds val and valid, which are the same split"):
        read_split(tmp_path, "val")


def test_the_images_of_cvat_are_found_in_the_folder_of_their_subset(tmp_path: Path) -> None:
    files = [tmp_path / "train/images/default" / name for name in ("a.png", "b.png")]
    export(tmp_path / "train/annotations/instances_default.json", ["a.png", "b.png"], files)
    split = read_split(tmp_path, "train")
    assert contents_of(split) == [str(path) for path in files]
    assert [image["file_name"] for image in split.images] == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("annotations", "images", "listed"),
    [
        ("annotations/instances_{}.json", "images/{}", ("Train", "Validation")),  # CVAT, a whole project
        ("annotations/instances_{}2017.json", "{}2017", ("train", "val")),  # COCO itself
        ("annotations/{}.json", "images", ("train", "val")),
        ("{}.json", "{}", ("train", "valid")),
    ],
)
def test_annotation_files_in_one_folder_belong_to_the_splits_in_their_names(
    tmp_path: Path, annotations: str, images: str, listed: tuple[str, str]
) -> None:
    for name in listed:
        path = tmp_path / images.format(name) / f"{name[0]}.png"
        export(tmp_path / annotations.format(name), [path.name], [path])
    (tmp_path / "annotations").mkdir(exist_ok=True)
    (tmp_path / "annotations" / "captions_train2017.json").write_text("{}")
    (tmp_path / "dataset_info.json").write_text("{}")
    assert split_names(tmp_path) == ["train", "val"]
    for split_name, name in zip(("train", "val"), listed, strict=True):
        split = read_split(tmp_path, split_name)
        assert split.name == split_name
        assert split.folder.parent == tmp_path
        assert contents_of(split) == [str(tmp_path / images.format(name) / f"{name[0]}.png")]
        assert split.annotation_file == tmp_path / annotations.format(name)


WRITTEN_ELSEWHERE = {
    "Windows": r"images\a.png",
    "Windows, upwards": r"..\..\label-studio\media\upload\4\a.png",
    "a drive": r"C:\Users\me\a.png",
    "an upload folder": "images/1/a.png",
    "an absolute path": "/data/upload/4/a.png",
    "upwards": "../../media/a.png",
    "an address": "https://host/data/a.png?token=x",
    "a local storage": "/data/local-files/?d=parts/a.png",
    "a prefix of uploads": "/data/upload/4/1f2e3d4c-a.png",
    "capitals": r"images\A.PNG",
}


@pytest.mark.parametrize("how", WRITTEN_ELSEWHERE)
def test_names_written_on_another_machine_lead_to_the_images(tmp_path: Path, how: str) -> None:
    names = [WRITTEN_ELSEWHERE[how], WRITTEN_ELSEWHERE[how].replace("a.png", "ä 1.png").replace("A.PNG", "Ä 1.PNG")]
    files = [tmp_path / "train/images" / name for name in ("a.png", unicodedata.normalize("NFD", "ä 1.png"))]
    export(tmp_path / "train/result.json", names, files)
    split = read_split(tmp_path, "train")
    assert contents_of(split) == [str(path) for path in files]
    assert [image["file_name"] for image in split.images] == [path.name for path in files]


def test_the_records_of_augment_lead_to_its_own_copies(tmp_path: Path) -> None:
    for name in ("train", "valid"):
        export(tmp_path / "set" / name / "result.json", [r"images\a.png", r"images\b.png"])
        for seed, file in enumerate("ab"):
            draw_image(tmp_path / "set" / name / "images" / f"{file}.png", seed, (6, 8))
    made = augment(AugmentConfig(dataset_dir=tmp_path / "set", augmentation_factor=1)).dataset_dir
    assert split_names(made) == ["train", "val"]
    assert [len(read_split(made, name).images) for name in ("train", "val")] == [4, 2]
    for image in (split := read_split(made, "val")).images:
        assert split.image_path(image).parent == made / "val" / "images"


def test_a_report_finds_the_evaluated_images_in_valid(tmp_path: Path) -> None:
    export(tmp_path / "set/valid/a.json", ["a.png"], [tmp_path / "set/valid/a.png"])

    def results_on(split: str) -> Results:
        metrics = {"dataset": (tmp_path / "set").as_posix(), "split": split}
        return Results(tmp_path, metrics, curves={}, run={}, folds={}, history={}, data={})

    assert read_truth(results_on("val")).folder == tmp_path / "set" / "valid"
    with pytest.raises(FlawmaskError, match="which does not exist"):
        read_truth(results_on("test"))


def test_the_longest_common_suffix_decides_between_files_of_the_same_name(tmp_path: Path) -> None:
    files = [tmp_path / "train/images" / name for name in ("cam1/a.png", "cam2/a.png", "a.png")]
    names = [r"D:\line\cam2\a.png", r"D:\line\cam1\a.png"]
    export(tmp_path / "train/result.json", names, files)
    assert contents_of(read_split(tmp_path, "train")) == [str(files[1]), str(files[0])]


@pytest.mark.parametrize(
    ("names", "files", "says"),
    [
        ([r"x\a.png"], ["cam1/a.png", "cam2/a.png"], r"names x\\a.png, which may be cam1/a.png or cam2/a.png"),
        (["cam1/a.png", "cam2/a.png"], ["a.png"], "names cam1/a.png and cam2/a.png, but only a.png exists"),
        (["b.png", "c.png"], ["a.png"], r"lists images that are not in .*train/images \(b.png, c.png\)"),
        # If some names are right, a wrong one must not be matched to another image of the same file name.
        (["a.png", "cam1/b.png"], ["a.png", "cam2/b.png"], r"are not in .*train/images \(cam1/b.png\)"),
    ],
)
def test_a_name_that_matches_several_files_or_none_is_refused(
    tmp_path: Path, names: list[str], files: list[str], says: str
) -> None:
    export(tmp_path / "train/result.json", names, [tmp_path / "train/images" / name for name in files])
    with pytest.raises(FlawmaskError, match=says):
        read_split(tmp_path, "train")


def test_hidden_files_are_not_images(tmp_path: Path) -> None:
    junk = ["__MACOSX/a.png", "@eaDir/a.png", ".trash/a.png", "._a.png"]
    files = [tmp_path / "train/images" / name for name in ("x/a.png", *junk)]
    export(tmp_path / "train/result.json", [r"y\a.png"], files)
    assert contents_of(read_split(tmp_path, "train")) == [str(files[0])]


NAMES = st.text(st.sampled_from("abÄä .%1"), min_size=1, max_size=3).filter(lambda name: name.strip(". ") == name)


@settings(max_examples=30)
@given(st.lists(st.tuples(NAMES, NAMES), min_size=1, max_size=6, unique_by=lambda one: tuple(map(str.casefold, one))))
def test_a_complete_path_always_leads_to_its_own_file(
    tmp_path_factory: pytest.TempPathFactory, paths: list[tuple[str, str]]
) -> None:
    root = tmp_path_factory.mktemp("files")
    for folder, name in paths:
        (root / folder).mkdir(exist_ok=True)
        (root / folder / f"{name}.png").touch()
    below = FileIndex(root)
    for folder, name in paths:
        assert below.find(rf"C:\x\{folder}\{name}.png", "a file") == (folder, f"{name}.png")
