"""Augmentation while training: masks move with their images, and all randomness comes from the generator."""

import pickle
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2

from flawmask.coco import annotation
from flawmask.model.targets import Target, crops, make_target
from flawmask.training.augmentation import ALL_VALUES, Augmentation, Turn, _crop, _jittered, _mapped

LEVELS: tuple[Literal["light", "strong"], ...] = ("light", "strong")


def spotted(
    height: int, width: int, count: int, seed: int
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_], list[str]]:
    """Return a grey image with bright rectangles, their masks, and names, the first of them of a good instance."""
    draw = np.random.default_rng(seed)
    image, masks = np.full((height, width, 3), 40, np.uint8), np.zeros((count, height, width), bool)
    masks[:1] = True
    for mask in masks[1:]:
        y, x = draw.integers(0, max(1, height - 3)), draw.integers(0, max(1, width - 3))
        mask[y : y + 8, x : x + 6] = True
        image[mask] = 220
    return image, masks, ["good", *["defect"] * count][:count]


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=40, deadline=None)
@given(st.integers(12, 60), st.integers(12, 60), st.integers(0, 4), st.integers(0, 2**32))
def test_masks_move_with_their_pixels(
    level: Literal["light", "strong"], height: int, width: int, count: int, seed: int
) -> None:
    image, masks, names = spotted(height, width, count, seed)
    changed, outlined, kept = Augmentation(level)(image.copy(), masks.copy(), names, np.random.default_rng(seed))
    assert changed.dtype == np.uint8
    assert outlined.dtype == bool
    assert outlined.shape == (count, *changed.shape[:2])
    assert kept == names
    if count:
        assert outlined[0].all()
    defects = outlined[1:].any(axis=0)
    if level == "light":
        # All changes of pixel values keep their order, so the bright pixels are still those of the defects.
        assert outlined.sum() == masks.sum()
        grey = changed.mean(axis=2)
        if defects.any() and not defects.all():
            assert grey[defects].min() > grey[~defects].max()
    elif masks[1:].any():
        assert defects.any()


def target_of(masks: npt.NDArray[np.bool_]) -> Target:
    records = [annotation(mask, id=number, image_id=7, category_id=1) for number, mask in enumerate(masks)]
    return make_target(records, {1: 1}, 7, masks.shape[1:], masks.shape[1:], "image")


def masks_of(target: Target, height: int, width: int) -> npt.NDArray[np.bool_]:
    """Return the instances' masks, (N, height, width), after checking that windows have their margins."""
    masks = np.zeros((len(target["windows"]), height, width), bool)
    for mask, crop, (x, y, wide, high) in zip(masks, crops(target), target["windows"].tolist(), strict=True):
        mask[y : y + high, x : x + wide] = crop.numpy() > 0
        assert x == 0 or not mask[:, x].any()
        assert y == 0 or not mask[y].any()
        assert x + wide == width or not mask[:, x + wide - 1].any()
        assert y + high == height or not mask[y + high - 1].any()
    return masks


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 4), st.integers(0, 2**32))
def test_a_resized_image_is_changed_as_a_whole_one(height: int, width: int, count: int, seed: int) -> None:
    image, masks, names = spotted(height, width, count, seed)
    expected, outlined, _ = Augmentation("light")(image.copy(), masks.copy(), names, np.random.default_rng(seed))
    image.flags.writeable = False  # as those of the cache
    before = target_of(masks)
    found, target = Augmentation("light").of_resized(image, before, np.random.default_rng(seed))
    assert np.array_equal(found, expected)
    assert np.array_equal(masks_of(target, *found.shape[:2]), outlined)
    wanted = target_of(outlined)
    for name in ("boxes", "labels", "image_id"):
        assert torch.equal(target[name], wanted[name])
    assert {name: tensor.dtype for name, tensor in target.items()} == {
        name: tensor.dtype for name, tensor in before.items()
    }


def test_the_eight_turns_differ_and_move_fractional_boxes() -> None:
    values = np.arange(6).reshape(2, 3)
    turns = [Turn(bool(number & 1), bool(number & 2), bool(number & 4)) for number in range(8)]
    assert len({(turned.shape, turned.tobytes()) for turned in (turn.of(values) for turn in turns)}) == 8
    box = target_of(np.ones((1, 20, 30), bool)) | {"boxes": torch.tensor([[1.25, 2.5, 4.0, 8.75]])}
    found = [turn.of_target(box, 20, 30)["boxes"].tolist() for turn in turns]
    assert found[0b010] == [[26.0, 2.5, 28.75, 8.75]]
    assert found[0b100] == [[1.25, 11.25, 4.0, 17.5]]
    assert found[0b001] == [[2.5, 1.25, 8.75, 4.0]]
    assert found[0b111] == [[11.25, 26.0, 17.5, 28.75]]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(0, 2**32))
def test_a_crop_is_a_window_that_holds_a_pixel_of_a_defect(height: int, width: int, seed: int) -> None:
    image = np.arange(height * width * 3, dtype=np.uint16).astype(np.uint8).reshape(height, width, 3)
    masks = np.zeros((2, height, width), bool)
    masks[0] = True
    draw = np.random.default_rng(seed)
    masks[1, draw.integers(height), draw.integers(width)] = True
    window, outlined = _crop(image, masks, ["good", "defect"], draw)
    assert window.shape[:2] == outlined.shape[1:]
    assert window.size >= 0.3 * image.size
    assert outlined[1].sum() == 1
    y, x = (int(a[0] - b[0]) for a, b in zip(np.nonzero(masks[1]), np.nonzero(outlined[1]), strict=True))
    assert (image[y : y + len(window), x : x + window.shape[1]] == window).all()


@pytest.mark.parametrize("size", [(1, 1), (37, 61), (256, 300)])
@pytest.mark.parametrize("spread", [1.0, 0.1])
def test_colours_change_as_torchvision_changes_them(size: tuple[int, int], spread: float) -> None:
    draw = np.random.default_rng(3)
    jitter = v2.ColorJitter(brightness=0.3, contrast=0.3)
    for seed in range(20):
        image = (draw.integers(256) * (1 - spread) + draw.integers(0, 256, (*size, 3)) * spread).astype(np.uint8)
        picture = torch.from_numpy(image).permute(2, 0, 1).contiguous()
        torch.manual_seed(seed)
        expected = jitter(picture)
        torch.manual_seed(seed)
        found = _jittered(image, jitter.make_params([]))
        assert np.array_equal(found, expected.permute(1, 2, 0).numpy())
        gamma = float(draw.uniform(0.7, 1.3))
        table = v2.functional.adjust_gamma(ALL_VALUES, gamma)
        assert np.array_equal(_mapped(found, table), v2.functional.adjust_gamma(expected, gamma).permute(1, 2, 0))


@pytest.mark.parametrize("level", LEVELS)
def test_all_randomness_comes_from_the_generator(level: Literal["light", "strong"]) -> None:
    image, masks, names = spotted(50, 40, 3, 0)
    augmentation = Augmentation(level)
    first = [augmentation(image.copy(), masks.copy(), names, np.random.default_rng([1, at])) for at in range(20)]
    torch.manual_seed(99)
    before = torch.get_rng_state()
    handed_over = pickle.loads(pickle.dumps(augmentation))
    again = [handed_over(image.copy(), masks.copy(), names, np.random.default_rng([1, at])) for at in range(20)]
    assert torch.equal(before, torch.get_rng_state())
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(one[0], other[0])
        assert np.array_equal(one[1], other[1])
    assert len({one[0].tobytes() for one in first}) == 20
    turned = {one[0].shape[:2] for one in first}
    assert len(turned) == 2 if level == "light" else len(turned) > 2
