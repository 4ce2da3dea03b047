"""Tiles at inference, with an oracle in the network's place: one instance for each defect, exact to the pixel, wherever
the seams lie."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Numbers, Oracle, assert_exact, image_of, numbered, spec_for

from flawmask.inference import maps
from flawmask.inference.backend import Resized, detect
from flawmask.inference.tiled import TiledDetections, prediction_of
from flawmask.joining import Join
from flawmask.masks import box_of_rle, part_of_rle
from flawmask.model.spec import ModelSpec
from flawmask.prediction import Prediction, RawDetections
from flawmask.tiles import Tiling, Window, cut

HEIGHT, WIDTH, TILE, OVERLAP = 90, 110, 32, 8


def check(numbers: Numbers, oracle: Oracle) -> Prediction:
    prediction = detect(oracle, image_of(numbers))
    assert_exact([(one.label, one.score, one.mask) for one in prediction.instances], numbers)
    return prediction


def handmade() -> Numbers:
    """Defects of every shape that seams can cut: long, bent, forked, hollow, round, tiny, and close to each other."""
    canvas = np.zeros((HEIGHT, WIDTH), np.uint8)
    cv2.line(canvas, (2, 3), (105, 80), 1, 1)  # a hair scratch across all tiles
    cv2.ellipse(canvas, (80, 25), (20, 14), 0, 0, 360, 1, 2)  # a ring
    for x in (8, 14, 20, 26):  # a comb, whose teeth are single pieces in some tiles
        cv2.line(canvas, (x, 45), (x, 80), 1, 1)
    cv2.line(canvas, (8, 80), (26, 80), 1, 2)
    cv2.circle(canvas, (45, 70), 9, 1, -1)
    canvas[::11, 106] = canvas[87:, 60:75] = canvas[0, 50] = canvas[5:20, 0] = 1
    return numbered(canvas > 0)


@dataclass(frozen=True)
class Moved(ModelSpec):
    """A spec whose grid is moved up and to the left by different numbers of pixels."""

    shifts: tuple[int, int] = (0, 0)

    @property
    def tiling(self) -> Tiling:
        return Tiling(self.tile or TILE, self.overlap, *self.shifts)


def moved(tile: int, overlap: int, up: int, left: int, join: Join = "off") -> Oracle:
    return Oracle(Moved(**vars(spec_for(tile, overlap, join=join)), shifts=(up, left)))


STEPS = TILE - OVERLAP


@pytest.mark.parametrize("join", ["touching", "off"])
@pytest.mark.parametrize("up", range(STEPS))
def test_each_defect_is_one_instance_to_the_pixel_for_every_row_and_every_column_of_the_grid(
    up: int, join: Join
) -> None:
    check(handmade(), moved(TILE, OVERLAP, up, (7 * up + 5) % STEPS, join))


@pytest.mark.services
@pytest.mark.parametrize("join", ["touching", "off"])
@pytest.mark.parametrize("up", range(STEPS))
def test_each_defect_is_one_instance_to_the_pixel_for_every_place_of_the_grid(up: int, join: Join) -> None:
    numbers = handmade()
    for left in range(STEPS):
        check(numbers, moved(TILE, OVERLAP, up, left, join))


@pytest.mark.parametrize("shift", range(0, TILE - OVERLAP, 3))
def test_pieces_that_a_tile_shows_of_one_defect_are_joined(shift: int) -> None:
    check(handmade(), Oracle(spec_for(TILE, OVERLAP, shift, join="touching"), in_pieces=True))


@st.composite
def scribbles(draw: st.DrawFn) -> Numbers:
    """Return defects of random shapes, in an image that may be smaller than a tile."""
    height, width = draw(st.integers(20, 100)), draw(st.integers(20, 100))
    canvas = np.zeros((height, width), np.uint8)
    for _ in range(draw(st.integers(0, 4))):
        places = st.tuples(st.integers(0, width - 1), st.integers(0, height - 1))
        corners = np.array(draw(st.lists(places, min_size=1, max_size=4)), np.int32)
        cv2.polylines(canvas, [corners], draw(st.booleans()), 1, draw(st.integers(1, 5)))
    return numbered(canvas > 0)


@settings(deadline=None, max_examples=60)
@given(
    scribbles(),
    st.integers(1, TILE // 2),
    st.tuples(st.integers(0, TILE), st.integers(0, TILE)),
    st.sampled_from(["touching", "off"]),
)
def test_defects_of_any_shape_are_exact_for_any_overlap(
    numbers: Numbers, overlap: int, shifts: tuple[int, int], join: Join
) -> None:
    check(numbers, moved(TILE, overlap, *shifts, join))


def large(height: int, width: int, tile: int, overlap: int) -> Numbers:
    """Return an image with defects across seams and corners of its unshifted grid, long scratches, and small ones."""
    canvas = np.zeros((height, width), np.uint8)
    step = tile - overlap
    for y in range(step, height, 2 * step):
        for x in range(step, width, 2 * step):
            cv2.circle(canvas, (x + overlap // 2, y + overlap // 2), overlap, 1, 3)  # around a corner of four tiles
            canvas[y - 3 : y + 3, x + step // 2] = 1
            canvas[y + step // 2, x - 3 : x + 3] = 1
    cv2.line(canvas, (20, 30), (width - 40, 30 + height // 9), 1, 1)
    cv2.line(canvas, (width // 2, height - 5), (width // 2 + 60, height // 2 + 100), 1, 2)
    draw = np.random.default_rng(20)
    for x, y in zip(draw.integers(0, width - 30, 80), draw.integers(0, height - 30, 80), strict=True):
        cv2.ellipse(canvas, (int(x), int(y)), (int(x) % 11 + 3, int(y) % 7 + 2), int(x) % 180, 0, 360, 1, -1)
    return numbered(canvas > 0)


@pytest.fixture(scope="module")
def huge() -> Iterator[tuple[Numbers, npt.NDArray[np.uint8]]]:
    numbers = large(6000, 8000, 1024, 128)
    yield numbers, image_of(numbers)


@settings(deadline=None, max_examples=2)
@given(up=st.integers(0, 1024 - 128 - 1), left=st.integers(0, 1024 - 128 - 1))
def test_an_image_of_8000_by_6000_pixels_is_exact(
    huge: tuple[Numbers, npt.NDArray[np.uint8]], up: int, left: int
) -> None:
    numbers, image = huge
    prediction = detect(moved(1024, 128, up, left), image)
    assert len(prediction) == numbers.max()
    areas = np.bincount(numbers.ravel())
    for one in prediction.instances:
        box = box_of_rle(one.rle)
        under = cut(numbers, Window(*box))[part_of_rle(one.rle, *box)]
        assert (under == under[0]).all() and under[0] > 0
        assert one.area == areas[under[0]]
        areas[under[0]] = -1  # no other instance may show this defect


def test_boxes_of_a_network_without_masks_are_joined_to_the_box_around_them() -> None:
    spec = replace(spec_for(64, 16), arch="fasterrcnn_resnet50_fpn", join="touching")
    left = RawDetections(
        np.array([[10, 20, 64, 30], [2, 2, 9, 9]], np.float32), np.array([2, 3]), np.array([0.6, 0.7], np.float32)
    )
    right = RawDetections(np.array([[0, 21, 40, 31]], np.float32), np.array([2]), np.array([0.8], np.float32))
    tiles = ((Window(0, 0, 64, 64), left), (Window(48, 0, 64, 64), right))
    prediction = prediction_of(TiledDetections(tiles), spec, 64, 112)
    assert not prediction.has_masks
    assert prediction.labels.tolist() == ["crack", "scratch"]
    assert prediction.boxes.tolist() == [[10, 20, 88, 31], [2, 2, 9, 9]]
    assert [one.area for one in prediction.instances] == [78 * 11, 49]
    assert prediction.scores.tolist() == np.array([0.8, 0.7], np.float32).tolist()
    assert prediction.score_map()[25, 80] == np.float32(0.8)


class Mapper(Oracle):
    """An oracle that also scores pixels: a cell's value is the share of its pixels that are defective, times 0.9."""

    def infer(self, batch: Sequence[Resized], /) -> list[RawDetections]:
        found = []
        for one, raw in zip(batch, super().infer(batch), strict=True):
            numbers = one.pixels[:, :, 0] + 256 * one.pixels[:, :, 1].astype(np.int32)
            height, width = (side // 4 for side in numbers.shape)
            of_kinds = [(numbers > 0) & (numbers % 2 == kind) for kind in (0, 1)]
            cells = [one.reshape(height, 4, width, 4).mean(axis=(1, 3)) for one in of_kinds]
            found.append(replace(raw, maps=np.array(cells, dtype=np.float32) * np.float32(0.9)))
        return found


def whole(oracle: Mapper, numbers: Numbers) -> Prediction:
    """Return the prediction of the oracle for the whole image."""
    spec = replace(oracle.spec, tile=None, overlap=0, image_size=min(numbers.shape))
    return detect(Mapper(spec), image_of(numbers))


@pytest.mark.parametrize("defects", [0, 1, 3])
def test_the_second_opinion_is_the_same_as_without_tiles(defects: int) -> None:
    numbers = np.zeros((96, 128), np.int32)
    for number in range(1, defects + 1):
        numbers[10 * number : 10 * number + 5, 20 * number : 20 * number + 50] = number
    oracle = Mapper(spec_for(64, 16))  # tiles begin at multiples of 4, so cells lie as in the whole image
    tiled, expected = detect(oracle, image_of(numbers)), whole(oracle, numbers)
    np.testing.assert_allclose(tiled.score_map(), expected.score_map(), atol=1e-5)
    assert [one.label for one in tiled.instances] == [one.label for one in expected.instances]
    np.testing.assert_allclose(tiled.scores, expected.scores, atol=1e-5)
    assert tiled.verdict().score == pytest.approx(expected.verdict().score, abs=1e-5)
    region = np.zeros((96, 128), dtype=bool)
    region[:40, :60] = True
    inside, wanted = tiled.within(region), expected.within(region)
    assert inside.verdict().score == pytest.approx(wanted.verdict().score, abs=1e-5)
    assert len(inside.instances) == len(wanted.instances)


def test_where_no_tile_is_seen_the_map_of_the_small_image_counts() -> None:
    coarse = np.zeros((2, 6, 8), np.float32)
    coarse[1, 2, 3] = 0.4
    alone = prediction_of(TiledDetections((), coarse), spec_for(64, 16), 96, 128)
    assert alone.verdict().score == pytest.approx(0.2)
    (region,) = alone.instances
    assert (region.mask == np.kron(coarse[1] > 0, np.ones((16, 16), dtype=bool))).all()
    floats = [np.zeros(shape, np.float32) for shape in ((0, 4), (0,), (0, 1, 1))]
    nothing = RawDetections(floats[0], np.zeros(0, np.int64), floats[1], floats[2])
    seen = (Window(64, 32, 64, 64), replace(nothing, maps=np.full((2, 16, 16), 0.1, np.float32)))
    both = prediction_of(TiledDetections((seen,), coarse), spec_for(64, 16), 96, 128)
    assert 0.15 < both.verdict().score <= 0.2, "the coarse map is interpolated"
    assert both.score_map()[80, 120] == pytest.approx(0.1)
    assert both.score_map()[80, 10] == 0


def test_the_map_of_a_large_image_is_bounded_and_keeps_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "MAX_CELLS", 10)
    nothing = np.zeros((2, 16, 16), np.float32)
    peak = nothing.copy()
    peak[1, 5, 9] = 0.7
    seen = [(Window(x, 0, 64, 64), peak if x == 64 else nothing) for x in (0, 64, 128)]
    found = maps.of_tiles(seen, 64, 64, 192)
    assert found.shape == (2, 10, 10)
    assert found.max() == pytest.approx(0.7, abs=1e-3)
    assert found[1, 5 * 10 // 16, 25 * 10 // 48] == found.max()
