"""Duplicates: a copy of a picture is recognised in another file, and different pictures are not mixed up."""

import cv2
import numpy as np
import pytest

from flawmask.data import duplicates
from flawmask.data.duplicates import (
    MIN_CORRELATION,
    Compared,
    Descriptor,
    descriptor_of,
    exact_duplicates,
    near_duplicates,
)
from flawmask.draw import Picture


def picture(seed: int) -> Picture:
    clouds = cv2.GaussianBlur(np.random.default_rng(seed).random((48, 60, 3)), (0, 0), 1.5)
    return np.asarray(cv2.normalize(clouds, clouds, 0, 255, cv2.NORM_MINMAX), dtype=np.uint8)


def correlation(one: Picture, other: Picture) -> float:
    return float(descriptor_of(one).astype(np.float32) @ descriptor_of(other).astype(np.float32))


def compared(*seeds: int, split: str = "train", variant: bool = False) -> list[Compared]:
    """Return the data by which pictures are compared. Each has a unique digest, so that none counts as identical."""
    return [
        Compared(f"{split} {place}", descriptor_of(picture(seed)), split, variant) for place, seed in enumerate(seeds)
    ]


def test_a_descriptor_has_length_1_and_recognises_smaller_darker_and_compressed_copies() -> None:
    image = picture(0)
    descriptor: Descriptor = descriptor_of(image)
    assert descriptor.shape == (4096,)
    assert descriptor.dtype == np.float16
    smaller = np.asarray(cv2.resize(image, (55, 44), interpolation=cv2.INTER_AREA), dtype=np.uint8)
    darker = np.asarray(np.rint(image * 0.9), dtype=np.uint8)
    coded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
    compressed = np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR), dtype=np.uint8)
    assert correlation(image, image) == pytest.approx(1, abs=1e-3)
    assert correlation(image, darker) > MIN_CORRELATION
    assert correlation(image, compressed) > MIN_CORRELATION
    assert correlation(image, smaller) > 0.9
    assert all(correlation(image, picture(seed)) < 0.5 for seed in range(1, 20))


def test_an_image_without_detail_is_similar_to_no_other() -> None:
    blank = np.full((48, 60, 3), 130, np.uint8)
    assert correlation(blank, blank) < MIN_CORRELATION


def test_indices_with_the_same_digest_are_grouped_in_order() -> None:
    assert exact_duplicates(["a", "b", "a", "c", "b", "a"]) == [[0, 2, 5], [1, 4]]
    assert exact_duplicates(["a", "b"]) == exact_duplicates([]) == []


@pytest.mark.parametrize("block", [1, 2, 3, 1024])
def test_each_copy_is_paired_with_the_first_for_any_block_size(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(duplicates, "BLOCK", block)
    assert near_duplicates(compared(0, 1, 0, 2, 1, 0)) == [(2, 0), (4, 1), (5, 0)]
    assert near_duplicates([]) == []


def test_files_with_the_same_bytes_are_not_reported_as_near_duplicates() -> None:
    (image,) = compared(0)
    assert near_duplicates([image, image]) == []


def test_a_copy_in_the_same_split_and_one_in_another_split_are_both_reported() -> None:
    assert near_duplicates([*compared(0), *compared(0, 0, split="val")]) == [(1, 0), (2, 0), (2, 1)]


def test_a_variant_is_compared_only_with_other_splits() -> None:
    source, held_back = compared(0), compared(0, split="val")
    variant = [Compared("variant", descriptor_of(picture(0)), "train", variant=True)]
    assert near_duplicates([*source, *variant]) == []
    assert near_duplicates([*source, *variant, *held_back]) == [(2, 0)]
    assert near_duplicates([*variant, *held_back]) == [(1, 0)]
