"""Augment: image and masks are transformed together, to the pixel, and nothing else changes."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from pycocotools.coco import COCO

from flawmask.coco import read_split
from flawmask.data.augment import VARIANTS, AugmentConfig, Augmented, augment
from flawmask.data.prepare import PrepareConfig, prepare
from flawmask.errors import FlawmaskError
from flawmask.files import read_json
from flawmask.masks import encode

Make = Callable[..., Path]
Digests = Callable[[Path], dict[str, str]]
Array = npt.NDArray[Any]

TRAIN, VAL = 6, 5  # images in `dataset`

# NumPy's transformations, to test Flawmask's, which use OpenCV.
MOVES: dict[str, Callable[[Array], Array]] = {
    "flip_h": lambda pixels: pixels[:, ::-1],
    "rotate_90": lambda pixels: np.rot90(pixels, -1),  # rot90 turns counter-clockwise
    "rotate_180": lambda pixels: np.rot90(pixels, 2),
    "rotate_270": lambda pixels: np.rot90(pixels, 1),
}


@pytest.fixture
def dataset(tiny_category: Make) -> Path:
    """A prepared COCO folder: 6 training and 5 validation images, with noisy masks that have holes."""
    folder = tiny_category(good=5, crack=4, hole=2)
    config = PrepareConfig(
        mvtec_root=folder.parent, category="part", output_dir=folder.parents[1] / "set", train_ratio=0.6
    )
    return prepare(config).dataset_dir


def run(dataset: Path, **settings: Any) -> Augmented:
    return augment(AugmentConfig(**{"dataset_dir": dataset, "augmentation_factor": 6, **settings}))


def content(folder: Path, split: str = "train") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / split / "annotations.json").read_text())
    return found


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    found = content(folder)
    change(found)
    (folder / "train/annotations.json").write_text(json.dumps(found))


def variants(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    return [image for image in content(folder, split)["images"] if "augmentation" in image]


def raw(folder: Path, image: dict[str, Any], split: str = "train") -> Array:
    found = cv2.imread(str(folder / split / "images" / image["file_name"]), cv2.IMREAD_UNCHANGED)
    assert found is not None
    return found


def check_exactness(folder: Path, split: str = "train") -> Counter[str]:
    """Compare every geometric variant, with masks, boxes and areas, to NumPy's transform of its source."""
    coco = COCO(str(folder / split / "annotations.json"))
    seen: Counter[str] = Counter()
    for image in coco.dataset["images"]:
        move = MOVES.get(image.get("augmentation", ""))
        if move is None:
            continue
        seen[image["augmentation"]] += 1
        source = coco.imgs[image["source_id"]]
        expected = move(raw(folder, source, split))
        found = raw(folder, image, split)
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected)
        assert (image["height"], image["width"]) == expected.shape[:2]
        before, after = coco.imgToAnns[source["id"]], coco.imgToAnns[image["id"]]
        assert len(before) == len(after)
        for old, new in zip(before, after, strict=True):
            truth = move(coco.annToMask(old)).astype(bool)
            mask = coco.annToMask(new).astype(bool)
            assert (mask & truth).sum() / (mask | truth).sum() == 1.0
            rows, columns = np.nonzero(truth)
            assert new["bbox"] == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert new["area"] == old["area"] == truth.sum()
            assert new["category_id"] == old["category_id"]
            assert new["iscrowd"] == 0
            assert new["segmentation"] == encode(truth)
    return seen


def test_every_geometric_variant_is_exactly_the_transformed_image_and_mask(dataset: Path) -> None:
    made = run(dataset)
    assert check_exactness(made.dataset_dir) == dict.fromkeys(MOVES, TRAIN)


def test_real_images_are_moved_exactly(shared_data: Path, tmp_path: Path) -> None:
    tiles = tmp_path / "mvtec" / "tile"  # a few of each type, as PNG, since two libraries decode a JPEG differently
    for mask in sorted((shared_data / "magnetic_tile/ground_truth").glob("*/*_mask.png"))[::40]:
        kind, stem = mask.parent.name, mask.name.removesuffix("_mask.png")
        for folder in (tiles / "test" / kind, tiles / "ground_truth" / kind):
            folder.mkdir(parents=True, exist_ok=True)
        Image.open(shared_data / f"magnetic_tile/test/{kind}/{stem}.jpg").save(tiles / f"test/{kind}/{stem}.png")
        shutil.copy(mask, tiles / "ground_truth" / kind)
    made = prepare(
        PrepareConfig(mvtec_root=tiles.parent, category="tile", output_dir=tmp_path / "set", train_ratio=0.9)
    )
    seen = check_exactness(run(made.dataset_dir).dataset_dir)
    assert seen == dict.fromkeys(MOVES, made.train["images"])


def test_real_bottles_are_moved_exactly(shared_data: Path, tmp_path: Path) -> None:
    root = shared_data / "mvtec_ad_sample"
    made = prepare(PrepareConfig(mvtec_root=root, category="bottle", output_dir=tmp_path / "set", train_ratio=0.3))
    seen = check_exactness(run(made.dataset_dir, augmentation_factor=3).dataset_dir)
    assert sum(seen.values()) >= made.train["images"]


def test_a_large_mask_with_holes_is_moved_exactly(dataset: Path) -> None:
    ring = np.zeros((14, 18), np.uint8)
    cv2.circle(ring, (8, 6), 5, 1, 2)
    rle: dict[str, Any] = {"size": [14, 18]}
    edges = np.flatnonzero(np.diff(ring.T.ravel())) + 1
    rle["counts"] = np.diff([0, *edges, ring.size]).tolist()  # some tools write uncompressed RLE

    def change(found: dict[str, Any]) -> None:
        record = next(one for one in found["annotations"] if one["category_id"] == 2)
        record.update(segmentation=rle, bbox=[3, 1, 11, 11], area=int(ring.sum()))

    edit(dataset, change)
    folder = run(dataset).dataset_dir
    assert check_exactness(folder) == dict.fromkeys(MOVES, TRAIN)
    rings = [one for one in content(folder)["annotations"] if one["area"] == ring.sum()]
    assert len(rings) == 7  # the original and its six variants
    assert all(isinstance(one["segmentation"], dict) for one in rings)


def test_blur_and_brightness_change_pixels_and_keep_the_annotations(dataset: Path) -> None:
    folder = run(dataset).dataset_dir
    coco = COCO(str(folder / "train/annotations.json"))
    seen: Counter[str] = Counter()
    for image in variants(folder):
        if image["augmentation"] in MOVES:
            continue
        seen[image["augmentation"]] += 1
        source = coco.imgs[image["source_id"]]
        assert raw(folder, image).shape == raw(folder, source).shape
        assert not np.array_equal(raw(folder, image), raw(folder, source))
        for old, new in zip(coco.imgToAnns[source["id"]], coco.imgToAnns[image["id"]], strict=True):
            assert {**new, "id": 0, "image_id": 0} == {**old, "id": 0, "image_id": 0}
    assert seen == {"blur": TRAIN, "bright": TRAIN}


@pytest.mark.parametrize("factor", range(7))
def test_a_factor_adds_that_many_distinct_variants_of_each_training_image(dataset: Path, factor: int) -> None:
    made = run(dataset, augmentation_factor=factor)
    found = variants(made.dataset_dir)
    names: dict[int, set[str]] = {image["id"]: set() for image in content(dataset)["images"]} if factor else {}
    for image in found:
        assert image["augmentation"] in VARIANTS
        assert image["augmentation"] not in names[image["source_id"]]
        names[image["source_id"]].add(image["augmentation"])
    assert all(len(kinds) == factor for kinds in names.values())
    assert (made.originals, made.variants) == (TRAIN + VAL, TRAIN * factor)
    assert len(found) == TRAIN * factor
    pixels = {raw(made.dataset_dir, image).tobytes() for image in content(made.dataset_dir)["images"]}
    assert len(pixels) == TRAIN * (1 + factor)


@pytest.mark.parametrize("factor", [-1, 7])
def test_a_factor_beyond_6_is_refused_saying_why(dataset: Path, factor: int) -> None:
    with pytest.raises(FlawmaskError, match="there are 6 variants") as caught:
        run(dataset, augmentation_factor=factor)
    assert "\n" not in str(caught.value)


def test_few_variants_are_drawn_from_all_kinds(tiny_category: Make) -> None:
    folder = tiny_category(good=30)
    config = PrepareConfig(mvtec_root=folder.parent, category="part", output_dir=folder.parents[1] / "set")
    found = variants(run(prepare(config).dataset_dir, augmentation_factor=2).dataset_dir)
    assert set(Counter(image["augmentation"] for image in found)) == set(VARIANTS)


def test_originals_keep_their_files_records_and_ids(dataset: Path, digests: Digests) -> None:
    folder = run(dataset).dataset_dir
    before, after = content(dataset), content(folder)
    assert after["images"][:TRAIN] == before["images"]
    assert after["annotations"][: len(before["annotations"])] == before["annotations"]
    assert after["categories"] == before["categories"]
    assert digests(dataset / "train/images").items() <= digests(folder / "train/images").items()
    assert not any({"augmentation", "source_id"} & set(image) for image in after["images"][:TRAIN])


def test_variants_point_to_their_source_and_all_ids_differ(dataset: Path) -> None:
    found = content(run(dataset).dataset_dir)
    by_id = {image["id"]: image for image in found["images"]}
    assert len(by_id) == len(found["images"]) == 7 * TRAIN
    assert len({record["id"] for record in found["annotations"]}) == len(found["annotations"])
    assert len({image["file_name"].lower() for image in found["images"]}) == 7 * TRAIN
    for image in found["images"][TRAIN:]:
        source = by_id[image["source_id"]]
        assert "augmentation" not in source
        assert image["original_file"] == source["original_file"]
        assert image["defect_type"] == source["defect_type"]
        assert image["file_name"].endswith(".png")


@pytest.mark.parametrize("link", ["copy", "symlink"])
def test_the_validation_split_is_copied_byte_for_byte(tiny_category: Make, digests: Digests, link: Any) -> None:
    folder = tiny_category()
    Image.open(folder / "test/good/000.png").convert("RGB").save(folder / "test/good/photo.jpg")
    config = PrepareConfig(mvtec_root=folder.parent, category="part", output_dir=folder.parents[1] / "set", link=link)
    dataset = prepare(config).dataset_dir
    augmented = run(dataset).dataset_dir
    assert digests(augmented / "val") == digests(dataset / "val")
    assert not any(path.is_symlink() for path in augmented.rglob("*"))


def test_the_validation_split_is_augmented_on_request(dataset: Path) -> None:
    made = run(dataset, augment_val=True)
    assert made.variants == 6 * (TRAIN + VAL)
    assert check_exactness(made.dataset_dir, "val") == dict.fromkeys(MOVES, VAL)
    assert content(made.dataset_dir, "val")["images"][:VAL] == content(dataset, "val")["images"]
    info = json.loads((made.dataset_dir / "augmentation_info.json").read_text())
    assert Counter(one["split"] for one in info["variants"]) == {"train": 6 * TRAIN, "val": 6 * VAL}


def test_a_test_split_is_copied_unchanged(dataset: Path, digests: Digests) -> None:
    shutil.copytree(dataset / "val", dataset / "test")
    augmented = run(dataset, augment_val=True).dataset_dir
    assert digests(augmented / "test") == digests(dataset / "test")


def test_the_same_seed_gives_the_same_bytes_and_another_seed_gives_others(dataset: Path, digests: Digests) -> None:
    made = [
        digests(run(dataset, augmentation_factor=3, seed=seed, output_dir=dataset.parent / name).dataset_dir)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert made[0] == made[1]
    assert set(made[0]) != set(made[2])


def test_16_bit_grey_stays_16_bit(tiny_category: Make) -> None:
    folder = tiny_category()
    rng = np.random.default_rng(1)
    for path in folder.glob("test/*/*.png"):
        assert cv2.imwrite(str(path), rng.integers(0, 65536, (14, 18), dtype=np.uint16))
    config = PrepareConfig(mvtec_root=folder.parent, category="part", output_dir=folder.parents[1] / "set")
    augmented = run(prepare(config).dataset_dir).dataset_dir
    assert set(check_exactness(augmented)) == set(MOVES)
    for image in variants(augmented):
        assert raw(augmented, image).dtype == np.uint16
        assert len(np.unique(raw(augmented, image) % 256)) > 50, "the lower 8 bits are lost"
    check_brightness(augmented)


def test_variants_of_images_turned_by_exif_are_made_from_upright_pixels(tiny_category: Make) -> None:
    folder = tiny_category(good=3)
    exif = Image.Exif()
    exif[0x0112] = 8
    for path in folder.glob("test/good/*.png"):
        with Image.open(path) as picture:
            picture.load()
        picture.save(path, exif=exif)
    config = PrepareConfig(mvtec_root=folder.parent, category="part", output_dir=folder.parents[1] / "set")
    augmented = run(prepare(config).dataset_dir).dataset_dir
    by_id = {image["id"]: image for image in content(augmented)["images"]}
    turned = [one for one in variants(augmented) if one["defect_type"] == "good" and one["augmentation"] in MOVES]
    assert len(turned) == 8
    for image in turned:
        with Image.open(augmented / "train/images" / by_id[image["source_id"]]["file_name"]) as file:
            lying = np.asarray(file)[:, :, ::-1]
        upright = cv2.rotate(lying, cv2.ROTATE_90_COUNTERCLOCKWISE)
        assert np.array_equal(raw(augmented, image), MOVES[image["augmentation"]](upright))


def test_images_without_annotations_get_variants_without_annotations(tiny_category: Make) -> None:
    folder = tiny_category()
    config = PrepareConfig(
        mvtec_root=folder.parent, category="part", output_dir=folder.parents[1] / "set", good_as="empty"
    )
    augmented = run(prepare(config).dataset_dir).dataset_dir
    marked = {record["image_id"] for record in content(augmented)["annotations"]}
    for image in content(augmented)["images"]:
        assert (image["id"] in marked) == (image["defect_type"] != "good")
    assert any(image["defect_type"] == "good" for image in variants(augmented))


def test_augmentation_info_says_what_was_made_from_what(dataset: Path) -> None:
    folder = run(dataset, augmentation_factor=2, seed=9).dataset_dir
    info = json.loads((folder / "augmentation_info.json").read_text())
    expected = {"seed": 9, "augmentation_factor": 2, "augment_val": False, "on_error": "stop", "intensity": "auto"}
    assert info["settings"] == expected
    assert info["source"]["dataset"] == "set"
    assert info["originals"] == TRAIN + VAL
    made = {one["file_name"]: one for one in info["variants"]}
    assert len(made) == 2 * TRAIN
    for image in variants(folder):
        one = made[image["file_name"]]
        assert (one["split"], one["source_id"], one["augmentation"]) == (
            "train",
            image["source_id"],
            image["augmentation"],
        )
        assert (one["parameter"] is None) == (image["augmentation"] in MOVES)
    counts = json.loads((folder / "dataset_info.json").read_text())
    assert counts["train"]["images"] == 3 * TRAIN
    assert counts["val"]["images"] == VAL
    assert counts["source_info"]["made_by"] == "flawmask prepare"


def check_brightness(folder: Path) -> None:
    """Compare every brightened variant to its source, multiplied and rounded pixel by pixel."""
    by_id = {image["id"]: image for image in content(folder)["images"]}
    names = {image["file_name"]: image for image in variants(folder)}
    made = json.loads((folder / "augmentation_info.json").read_text())["variants"]
    bright = [one for one in made if one["augmentation"] == "bright"]
    assert bright
    for one in bright:
        source = raw(folder, by_id[one["source_id"]])
        expected = np.clip(np.rint(source * one["parameter"]), 0, np.iinfo(source.dtype).max)
        assert np.array_equal(raw(folder, names[one["file_name"]]), expected)


def test_brightness_is_exact(dataset: Path) -> None:
    check_brightness(run(dataset).dataset_dir)


@pytest.mark.parametrize("cores", [1, 7])
def test_the_number_of_cores_changes_nothing(
    dataset: Path, digests: Digests, monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    expected = digests(run(dataset).dataset_dir)
    monkeypatch.setattr("flawmask.data.augment.usable_cores", lambda: cores)
    assert digests(run(dataset, overwrite=True).dataset_dir) == expected


def test_the_recorded_strength_is_the_one_that_was_applied(dataset: Path) -> None:
    folder = run(dataset).dataset_dir
    by_id = {image["id"]: image for image in content(folder)["images"]}
    info = json.loads((folder / "augmentation_info.json").read_text())
    images = {image["file_name"]: image for image in variants(folder)}
    for one in info["variants"]:
        source = raw(folder, by_id[one["source_id"]])
        found = raw(folder, images[one["file_name"]])
        if one["augmentation"] == "bright":
            assert 0.7 <= one["parameter"] <= 0.9 or 1.1 <= one["parameter"] <= 1.3
            assert np.abs(found - np.clip(source * one["parameter"], 0, 255)).max() <= 0.5
        if one["augmentation"] == "blur":
            assert np.array_equal(found, cv2.GaussianBlur(source, (0, 0), one["parameter"]))


# Existing output, and bad input


def test_the_same_source_and_settings_are_reused_and_others_need_overwrite(dataset: Path, digests: Digests) -> None:
    first = run(dataset)
    before = digests(first.dataset_dir)
    second = run(dataset)
    assert second.reused
    assert (second.originals, second.variants) == (first.originals, first.variants)
    with pytest.raises(FlawmaskError, match="--overwrite"):
        run(dataset, seed=1)
    assert digests(first.dataset_dir) == before
    image = dataset / "val/images" / content(dataset, "val")["images"][0]["file_name"]
    assert cv2.imwrite(str(image), np.zeros((14, 18, 3), np.uint8))
    with pytest.raises(FlawmaskError, match="--overwrite"):
        run(dataset)
    assert not run(dataset, overwrite=True).reused
    assert digests(first.dataset_dir) != before


def refused(dataset: Path, digests: Digests, **settings: Any) -> str:
    before = digests(dataset.parent)
    with pytest.raises(FlawmaskError) as caught:
        run(dataset, **settings)
    assert digests(dataset.parent) == before
    assert not [path.name for path in dataset.parent.iterdir() if path.name.startswith(".")]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_augmented_folder_is_not_augmented_again(dataset: Path, digests: Digests) -> None:
    augmented = run(dataset).dataset_dir
    assert "holds variants already" in refused(augmented, digests)


@pytest.mark.parametrize("overwrite", [False, True])
def test_only_an_augmented_folder_is_ever_replaced(
    dataset: Path, tmp_path: Path, digests: Digests, overwrite: bool
) -> None:
    shutil.copytree(dataset, tmp_path / "prepared")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.png").write_text("mine")
    for name in ("prepared", "mine"):
        message = refused(dataset, digests, output_dir=tmp_path / name, overwrite=overwrite)
        assert "holds something else" in message
        assert str(tmp_path / name) in message
    for same in (dataset, dataset.parent / "mine" / ".." / dataset.name):
        assert "in place" in refused(dataset, digests, output_dir=same, overwrite=overwrite)


def test_the_current_folder_can_be_augmented(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(dataset)
    made = run(Path())
    assert made.dataset_dir == dataset.parent / "set_augmented"
    assert made.dataset_dir.is_dir()


def first_image(dataset: Path) -> Path:
    return dataset / "train/images" / str(content(dataset)["images"][0]["file_name"])


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def first_defect(found: dict[str, Any]) -> dict[str, Any]:
    return next(record for record in found["annotations"] if record["category_id"] == 2)


def add_as_variant(folder: Path) -> None:
    """List the first image a second time, under the file name that its blurred variant will have."""
    first = content(folder)["images"][0]
    name = f"{first_image(folder).stem}-{first['id']}__blur.png"
    shutil.copy(first_image(folder), folder / "train/images" / name)
    edit(folder, lambda found: found["images"].append({**first, "id": 10**6, "file_name": name}))


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a truncated image": (lambda folder: cut_in_half(first_image(folder)), "cannot be read as an image"),
    "an image that is not there": (lambda folder: first_image(folder).unlink(), "lists images that are not in"),
    "an image of another size": (
        lambda folder: edit(folder, lambda found: found["images"][0].update(width=99)),
        "is 18x14 but its record says 99x14: export the annotations again",
    ),
    "an unknown category": (
        lambda folder: edit(folder, lambda found: found["annotations"][0].update(category_id=5)),
        "category 5, which is not listed",
    ),
    "no segmentation": (
        lambda folder: edit(folder, lambda found: first_defect(found).update(segmentation="?")),
        "no usable segmentation",
    ),
    "no json": (lambda folder: (folder / "val/annotations.json").write_text("{"), "cannot be read as JSON"),
    "no train": (lambda folder: shutil.rmtree(folder / "train"), "has no split train"),
    "an image with a variant's name": (add_as_variant, "has the name of a variant"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_damaged_set_is_refused_with_nothing_written(dataset: Path, digests: Digests, what: str) -> None:
    damage, message = BAD[what]
    damage(dataset)
    said = refused(dataset, digests)
    assert message in said
    assert "set" in said


def test_when_writing_fails_half_way_nothing_is_left(
    dataset: Path, digests: Digests, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digests(dataset.parent)
    written: list[str] = []
    write = Path.write_bytes

    def fail(self: Path, data: Any) -> int:
        if self.parent.name == "images":
            written.append(self.name)
            if len(written) == 3:
                raise OSError("the disk is full")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="full"):
        run(dataset)
    assert digests(dataset.parent) == before
    assert sorted(path.name for path in dataset.parent.iterdir()) == ["mvtec", "set"]


def test_a_library_call_prints_nothing(dataset: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(dataset)
    assert capfd.readouterr() == ("", "")


def test_an_annotation_without_a_pixel_gets_no_variant_and_is_counted(dataset: Path) -> None:
    edit(dataset, lambda found: first_defect(found).update(segmentation=[[-9, 0, -5, 0, -5, 5]]))
    made = augment(AugmentConfig(dataset_dir=dataset))
    info = read_json(made.dataset_dir / "dataset_info.json")["tally"]["annotations"]
    assert [len(names) for names in info["not_used"].values()] == [1]
    assert info["found"] == info["used"] + 1
    assert not any(
        record["segmentation"] == [[-9, 0, -5, 0, -5, 5]] for record in content(made.dataset_dir)["annotations"]
    )


def test_a_bad_image_is_left_out_of_every_split(dataset: Path) -> None:
    for split in ("train", "val"):
        cut_in_half(next((dataset / split / "images").iterdir()))
    before = [len(read_split(dataset, split).images) for split in ("train", "val")]
    made = augment(AugmentConfig(dataset_dir=dataset, augmentation_factor=1, on_error="skip"))
    after = [len(read_split(made.dataset_dir, split).images) for split in ("train", "val")]
    assert after == [2 * (before[0] - 1), before[1] - 1]
    assert read_json(made.dataset_dir / "dataset_info.json")["tally"]["images"]["found"] == sum(before)


def test_an_annotation_with_only_a_box_is_transformed_as_a_box(dataset: Path) -> None:
    edit(dataset, lambda found: [one.update(segmentation=[], bbox=[2.5, 3, 4.25, 5]) for one in found["annotations"]])
    made = read_split(augment(AugmentConfig(dataset_dir=dataset, augmentation_factor=6)).dataset_dir, "train")
    # The images are 18 wide and 14 high.
    moved = {
        "flip_h": [11.25, 3, 4.25, 5],
        "rotate_90": [6, 2.5, 5, 4.25],
        "rotate_180": [11.25, 6, 4.25, 5],
        "rotate_270": [3, 11.25, 5, 4.25],
    }
    variants = [image for image in made.images if "augmentation" in image]
    assert variants
    for image in variants:
        for record in made.annotations[image["id"]]:
            assert record["bbox"] == moved.get(image["augmentation"], [2.5, 3, 4.25, 5])
            assert record["is_box"]
