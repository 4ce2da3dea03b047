"""Any file content is read, or refused with one line: no crash, no hang, and no more memory than the file's size.

With TORTURE=1 in the environment (`make torture`) as often as docs/reliability.md says; else a few times.
"""

import io
import json
import os
import pickle
import resource
import zipfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from random_network import SPEC

from flawmask import images, masks
from flawmask.coco import annotation, instance_masks, instance_rles, read_split, write_split
from flawmask.errors import FlawmaskError
from flawmask.files import write_bytes
from flawmask.model import checkpoint
from flawmask.model.weights import load_file
from flawmask.training.loader import SplitDataset

CASES = 25_000 if os.environ.get("TORTURE") else 60

many = settings(
    max_examples=CASES,
    deadline=timedelta(seconds=20),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)


@pytest.fixture(autouse=True)
def memory_is_bounded() -> Iterator[None]:
    """Allow each case at most a gigabyte more than the process has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with Path("/proc/self/statm").open() as lines:
        pages = int(lines.read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@cache
def files() -> tuple[bytes, ...]:
    """A small image in every format and mode that the reader knows."""
    random = np.random.default_rng(0)
    grey, colours = (
        random.integers(0, 256, (9, 12), dtype=np.uint8),
        random.integers(0, 256, (9, 12, 3), dtype=np.uint8),
    )
    pictures = [Image.fromarray(grey), Image.fromarray(colours), Image.fromarray(grey.astype(np.uint16) * 200)]
    pictures += [pictures[1].convert(mode) for mode in ("P", "CMYK", "RGBA", "1", "F")]
    found = []
    for kind, options in (
        ("png", {}),
        ("jpeg", {"quality": 90, "exif": b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"}),
        ("jpeg", {"progressive": True}),
        ("bmp", {}),
        ("tiff", {}),
        ("tiff", {"compression": "tiff_lzw"}),
        ("tiff", {"compression": "tiff_adobe_deflate"}),
        ("gif", {}),
        ("webp", {}),
        ("ppm", {}),
    ):
        for picture in pictures:
            data = io.BytesIO()
            try:
                picture.save(data, kind, **options)
            except (OSError, ValueError):  # not every format has every mode
                continue
            found.append(data.getvalue())
    return tuple(found)


@st.composite
def damaged(draw: st.DrawFn, sources: Callable[[], tuple[bytes, ...]]) -> bytes:
    """Return a file with bytes changed, removed, inserted, or cut off."""
    data = bytearray(draw(st.sampled_from(sources())))
    for _ in range(draw(st.integers(0, 8))):
        if not data:
            break
        at = draw(st.integers(0, len(data) - 1))
        match draw(st.sampled_from(["change", "number", "cut", "out", "in", "swap"])):
            case "change":
                data[at] = draw(st.integers(0, 255))
            case "number":
                data[at : at + 4] = draw(
                    st.sampled_from([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\1\0\0"])
                )
            case "cut":
                del data[at:]
            case "out":
                del data[at : at + draw(st.integers(1, 64))]
            case "in":
                data[at:at] = draw(st.binary(max_size=32))
            case "swap":
                other = draw(st.sampled_from(sources()))
                data[at:] = other[at:]
    return bytes(data)


@many
@given(st.one_of(damaged(files), st.binary(max_size=400)))
def test_an_image_is_read_or_refused(data: bytes) -> None:
    try:
        pixels = images.decode(data, Path("a.png"))
    except FlawmaskError as error:
        assert "\n" not in str(error)
        return
    assert pixels.ndim in (2, 3)
    assert pixels.dtype in (np.uint8, np.uint16)
    assert images.to_rgb(pixels).shape == (*pixels.shape[:2], 3)
    assert images.to_mask(pixels).shape == pixels.shape[:2]


numbers = st.one_of(
    st.integers(-5, 40),
    st.floats(),
    st.sampled_from([2**31, -(2**31), 2**63, 10**30, 1e308, -1e308]),
    st.none(),
    st.booleans(),
    st.text(max_size=3),
)
anything = st.recursive(
    numbers,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
counts = st.one_of(
    st.lists(numbers, max_size=8), st.text(max_size=20), st.text("0123456789:;<=>?@OPQ_`no", max_size=20)
)
segmentations = st.one_of(
    st.lists(st.lists(st.one_of(numbers, st.integers(0, 12)), max_size=12), max_size=3),
    st.fixed_dictionaries({"size": st.one_of(st.just([9, 12]), anything), "counts": counts}),
    anything,
)


@many
@given(segmentations)
def test_a_segmentation_is_decoded_or_has_a_reason(segmentation: Any) -> None:
    reason = masks.segmentation_problem(segmentation, 9, 12)
    if reason:
        assert "\n" not in reason
        return
    rle = masks.as_rle(segmentation, 9, 12)
    mask = masks.decode(segmentation, 9, 12)
    assert mask.shape == (9, 12)
    assert masks.area(rle) == mask.sum()
    if mask.any():
        assert masks.box_of_rle(rle) == masks.box_of(mask)
        assert np.array_equal(masks.decode(masks.encode(mask), 9, 12), mask)
        assert sum(crop.mask.sum() for crop in masks.crop_components(mask)) == mask.sum()


@st.composite
def coco_files(draw: st.DrawFn) -> str:
    """Return a COCO file in which some values are replaced."""
    mask = np.zeros((9, 12), dtype=bool)
    mask[2:6, 3:9] = True
    content: dict[str, Any] = {
        "images": [{"id": number, "file_name": f"{number}.png", "width": 12, "height": 9} for number in (1, 2)],
        "annotations": [annotation(mask, id=number, image_id=number, category_id=2) for number in (1, 2)],
        "categories": [{"id": 1, "name": "good"}, {"id": 2, "name": "defect"}],
    }
    for _ in range(draw(st.integers(0, 4))):
        key = draw(st.sampled_from(["images", "annotations", "categories"]))
        if draw(st.integers(0, 9)) == 0 or not isinstance(content.get(key), list):
            content[key] = draw(anything)
            continue
        place = draw(st.integers(0, 1))
        record = content[key][place] if place < len(content[key]) else None
        if not isinstance(record, dict) or not record or draw(st.integers(0, 9)) == 0:
            content[key][place:place] = [draw(anything)]
            continue
        name = draw(st.sampled_from(sorted(record)))
        if draw(st.booleans()):
            record[name] = draw(segmentations if name == "segmentation" else anything)
        else:
            del record[name]
    text = json.dumps(content)
    cut = draw(st.integers(0, 5 * len(text)))
    return text[:cut] if cut < len(text) else text


@pytest.fixture(scope="module")
def coco_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coco")
    write_split(folder / "train", [], [], [])
    for number in (1, 2):
        images.write_png(folder / "train" / "images" / f"{number}.png", np.zeros((9, 12), dtype=np.uint8))
    return folder


@many
@given(text=coco_files())
def test_a_coco_file_is_read_or_refused(coco_folder: Path, text: str) -> None:
    write = (coco_folder / "train" / "annotations.json").write_text
    write(text)
    try:
        split = read_split(coco_folder, "train")
    except FlawmaskError as error:
        assert "\n" not in str(error)
        return
    for image in split.images:
        records, size = split.annotations[image["id"]], (image["height"], image["width"])
        assert len(instance_rles(records, *size, "")) == len(records)
        if size[0] * size[1] < 10**6:
            assert all(mask.shape == size for mask in instance_masks(records, *size, ""))
        assert split.image_path(image).is_file()
        assert ", ".join(split.class_names)
        if size == (9, 12):
            item = SplitDataset(split, SPEC)[split.images.index(image)]
            assert len(item[1]["boxes"]) <= len(records)


class Bomb:
    """An object whose pickle runs code when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@cache
def checkpoints() -> tuple[bytes, ...]:
    found = []
    for content in (
        {"spec": {"arch": "x", "classes": ["a"]}, "model_state_dict": {"a": torch.arange(6.0)}},
        [1, "a"],
        {},
    ):
        data = io.BytesIO()
        torch.save(content, data)
        found.append(data.getvalue())
    found.append(pickle.dumps({"a": 1}))
    return tuple(found)


@pytest.fixture(scope="module")
def checkpoint_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights") / "a.pt"


@many
@given(data=st.one_of(damaged(checkpoints), st.binary(max_size=200)))
@example(data=b"X\x00\x00\x009")  # a text of 956 million characters
def test_a_checkpoint_is_read_or_refused(checkpoint_path: Path, data: bytes) -> None:
    checkpoint_path.write_bytes(data)
    for read in (load_file, checkpoint.load):
        try:
            read(checkpoint_path)
        except FlawmaskError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["a.pt", "best.pt", "state.pt"])
def test_a_pickle_that_carries_code_is_refused_and_not_run(tmp_path: Path, name: str) -> None:
    target, path = tmp_path / "written by the pickle", tmp_path / name
    for content in (Bomb(target), {"model_state_dict": {"a": Bomb(target)}, "flawmask": "1", "spec": {}}):
        pickled = io.BytesIO()
        torch.save(content, pickled)
        for data in (pickled.getvalue(), pickle.dumps(content)):
            write_bytes(path, data)
            for read in (load_file, checkpoint.load):
                with pytest.raises(FlawmaskError, match="is not a file of weights, or is damaged"):
                    read(path)
            assert not target.exists()


def test_a_changed_byte_in_a_checkpoint_is_detected_by_its_checksum(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(100_000.0)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        (tensor,) = [one for one in archive.infolist() if one.filename.endswith("data/0")]
        at = tensor.header_offset + 100_000
    data = bytearray((tmp_path / "a.pt").read_bytes())
    data[at] ^= 1
    (tmp_path / "a.pt").write_bytes(data)
    assert torch.load(tmp_path / "a.pt", weights_only=True)["a"].shape == (100_000,), "torch itself must not notice"
    with pytest.raises(FlawmaskError, match=r"the checksum of .*data/0 is wrong"):
        load_file(tmp_path / "a.pt")
