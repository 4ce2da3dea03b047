"""The demo category: the same seed gives the same bytes, and the masks are exactly the defects."""

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from flawmask.data import demo
from flawmask.data.demo import DemoConfig, generate
from flawmask.data.demo_drawing import (
    DEFECTS,
    HARDER_DEFECTS,
    HARDER_PRODUCTS,
    MIN_AREA,
    PRODUCTS,
    Defect,
    Product,
    draw,
)
from flawmask.data.layouts import samples
from flawmask.errors import FlawmaskError
from flawmask.files import read_json, sha256
from flawmask.images import read_image, read_mask, read_pixels
from flawmask.masks import Mask, components

SMALL = DemoConfig(image_size=64, good=3, defective=2, train_good=2)


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): sha256(path.read_bytes()) for path in files}


def drawn(product: Product, defect: Defect | None, seed: int, size: int = 128) -> tuple[Any, Mask]:
    return draw(np.random.default_rng(seed), product, defect, size)


def masks_of(defect: Defect, count: int) -> list[Mask]:
    products = list(PRODUCTS)
    return [drawn(products[seed % len(products)], defect, seed)[1] for seed in range(count)]


def has_hole(mask: Mask) -> bool:
    _, tree = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    return bool((tree[0, :, 3] >= 0).any())


def test_the_same_seed_gives_the_same_bytes_in_any_folder(tmp_path: Path) -> None:
    first = generate(replace(SMALL, mvtec_root=tmp_path / "a"))
    second = generate(replace(SMALL, mvtec_root=tmp_path / "b"))
    assert digests(first.folder) == digests(second.folder)
    assert len(digests(first.folder)) == 2 + 3 + 2 * 4 * 2 + 1


def test_another_seed_gives_other_images_and_0_is_a_valid_seed(tmp_path: Path) -> None:
    seeds = [0, 1, 42]
    made = [generate(replace(SMALL, mvtec_root=tmp_path / str(seed), seed=seed)).folder for seed in seeds]
    images = {sha256(path.read_bytes()) for folder in made for path in folder.glob("t*/*/*.png")}
    assert len(images) == len(seeds) * (2 + 3 + 2 * 4)


def test_larger_counts_do_not_change_the_earlier_images(tmp_path: Path) -> None:
    few = digests(generate(replace(SMALL, mvtec_root=tmp_path / "few")).folder)
    more = replace(SMALL, mvtec_root=tmp_path / "more", good=5, defective=3, train_good=4)
    many = digests(generate(more).folder)
    assert {name for name in few if few[name] != many[name]} == {"demo_info.json"}


def test_the_folder_has_the_layout_of_an_mvtec_category(tmp_path: Path) -> None:
    made = generate(replace(SMALL, mvtec_root=tmp_path, image_size=72))
    found = samples(tmp_path, "demo")
    assert made == demo.Demo(tmp_path / "demo", images=len(found), defective=8)
    assert {sample.defect_type for sample in found} == {"good", *DEFECTS}
    assert (made.folder / "test/scratch/001.png").is_file()
    assert (made.folder / "ground_truth/scratch/001_mask.png").is_file()
    assert read_json(made.folder / "demo_info.json")["made_by"] == "flawmask demo"
    for sample in found:
        assert read_image(sample.image).shape == (72, 72, 3)
        assert len(sample.masks) == (0 if sample.is_good else 1)
        for mask in sample.masks:
            pixels = read_pixels(mask.path)
            assert pixels.shape == (72, 72)
            assert set(np.unique(pixels)) == {0, 255}
            assert read_mask(mask.path).sum() >= MIN_AREA * 72 * 72


@pytest.mark.parametrize("defect", list(DEFECTS))
@pytest.mark.parametrize("product", list(PRODUCTS))
def test_the_mask_is_exactly_what_the_defect_changed(product: Product, defect: Defect) -> None:
    for seed in range(8):
        clean, nothing = drawn(product, None, seed)
        image, mask = drawn(product, defect, seed)
        change = np.abs(image.astype(int) - clean).max(axis=2)
        assert not nothing.any()
        assert not change[~mask].any()
        for region in components(mask):
            assert region.sum() >= MIN_AREA * mask.size
            # Because of its own light and shade, a defect may be as bright as the product in a few pixels.
            assert (change[region] > 10).mean() > 0.85
            assert change[region].mean() > 35


def test_defects_vary_some_stains_are_rings_some_images_have_several_and_scratches_are_thin() -> None:
    rings = [has_hole(mask) for mask in masks_of("contamination", 20)]
    assert 2 <= sum(rings) < 18
    for defect in DEFECTS:
        counts = [len(list(components(mask))) for mask in masks_of(defect, 20)]
        assert min(counts) == 1 < max(counts)
    for mask in masks_of("scratch", 20):
        assert cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 5).max() < 3.5


@pytest.mark.parametrize("defect", list(HARDER_DEFECTS))
@pytest.mark.parametrize("product", [*PRODUCTS, *HARDER_PRODUCTS])
def test_the_mask_of_a_harder_defect_is_exactly_what_it_changed(product: Product, defect: Defect) -> None:
    for seed in range(6):
        clean, _ = drawn(product, None, seed)
        image, mask = drawn(product, defect, seed)
        change = np.abs(image.astype(int) - clean).max(axis=2)
        assert not change[~mask].any()
        for region in components(mask):
            assert region.sum() >= MIN_AREA * mask.size
            assert (change[region] > 2).mean() > 0.8


def test_pits_are_many_and_small_stains_are_faint_and_cracks_are_thin() -> None:
    size = 256
    pits = [drawn("slab", "pits", seed, size)[1] for seed in range(8)]
    regions = [region for mask in pits for region in components(mask)]
    assert len(regions) > 4 * len(pits)
    assert max(region.sum() for region in regions) < 0.003 * size * size
    for seed in range(8):
        clean, _ = drawn("slab", None, seed, size)
        image, mask = drawn("slab", "stain", seed, size)
        assert 5 < np.abs(image.astype(int) - clean)[mask].mean() < 25
        _, mask = drawn("slab", "crack", seed, size)
        assert cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 5).max() < 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"products": ("slab",)}, "a slab has no edge to break"),
        ({"image_size": 63}, "--image_size is 63: it must be 64 to"),
        ({"good": -1}, "--good is -1: it must be 0 to"),
        ({"defective": -1}, "--defective is -1: "),
        ({"train_good": -2}, "--train_good is -2: "),
        ({"seed": -1}, "--seed is -1: "),
        ({"category": "a/b"}, "not the name of a folder"),
        ({"category": ".."}, "not the name of a folder"),
        ({"category": ""}, "not the name of a folder"),
        ({"products": ()}, "--products is empty"),
        ({"products": ("nut",)}, "each at most once, of washer"),
        ({"defects": ("hole", "hole")}, "each at most once"),
        ({"good": 0, "defects": ()}, "no image to draw"),
        ({"good": 0, "defective": 0}, "no image to draw"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    root = tmp_path / "root"
    with pytest.raises(FlawmaskError, match=message) as caught:
        generate(replace(SMALL, mvtec_root=root, **change))
    assert "\n" not in str(caught.value)
    assert not root.exists()


def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FlawmaskError, match="is a file"):
        generate(replace(SMALL, mvtec_root=tmp_path / "file"))


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "encode_png", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(replace(SMALL, mvtec_root=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_category_made_with_the_same_settings_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SMALL, mvtec_root=tmp_path)
    made = generate(config)
    monkeypatch.setattr(demo, "draw", None)  # drawing anything would raise
    assert generate(config) == made


def test_other_settings_need_overwrite_and_a_foreign_folder_is_never_replaced(tmp_path: Path) -> None:
    config = replace(SMALL, mvtec_root=tmp_path)
    before = digests(generate(config).folder)
    with pytest.raises(FlawmaskError, match="--overwrite"):
        generate(replace(config, seed=7))
    assert digests(tmp_path / "demo") == before
    generate(replace(config, seed=7, overwrite=True))
    assert digests(tmp_path / "demo") != before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.png").write_bytes(b"mine")
    with pytest.raises(FlawmaskError, match="holds something else"):
        generate(replace(config, category="mine", overwrite=True))


def test_an_image_depends_only_on_its_seed_folder_and_number(tmp_path: Path) -> None:
    made = generate(replace(SMALL, mvtec_root=tmp_path, seed=5))
    rng = np.random.default_rng([5, zlib.crc32(b"test/hole"), 1])
    image, mask = draw(rng, "plate", "hole", 64)
    assert np.array_equal(read_image(made.folder / "test/hole/001.png"), image)
    assert np.array_equal(read_mask(made.folder / "ground_truth/hole/001_mask.png"), mask)
