"""Predictions: verdicts, masks, arrays, and the formats of other tools."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pycocotools.coco import COCO
from torchvision.models.detection.roi_heads import paste_masks_in_image

import flawmask
from flawmask.errors import FlawmaskError
from flawmask.masks import Mask, box_of, decode, to_rle
from flawmask.prediction import Instance, Prediction, RawDetections, Verdict, post_process


def instance(label: str, score: float, mask: Mask) -> Instance:
    x, y, width, height = box_of(mask)
    return Instance(
        label, score, (float(x), float(y), float(x + width), float(y + height)), to_rle(mask), int(mask.sum())
    )


def rectangle(y: int, x: int, height: int, width: int) -> Mask:
    mask = np.zeros((20, 30), dtype=bool)
    mask[y : y + height, x : x + width] = True
    return mask


GOOD = instance("good", 0.99, rectangle(0, 0, 20, 30))
CRACK = instance("crack", 0.8, rectangle(2, 3, 4, 5))  # 20 pixels
SCRATCH = instance("scratch", 0.6, rectangle(10, 0, 1, 30))  # 30 pixels
SPECK = instance("crack", 0.3, rectangle(5, 7, 1, 1))  # on the crack
PREDICTION = Prediction(20, 30, (GOOD, CRACK, SCRATCH, SPECK))


def test_an_instance_gives_its_mask_at_the_images_size() -> None:
    assert (CRACK.mask == rectangle(2, 3, 4, 5)).all()


@pytest.mark.parametrize(
    ("conf", "min_area", "expected"),
    [
        (0.0, 0, [CRACK, SCRATCH, SPECK]),
        (0.3, 0, [CRACK, SCRATCH, SPECK]),
        (0.31, 0, [CRACK, SCRATCH]),
        (0.6, 0, [CRACK, SCRATCH]),
        (0.61, 0, [CRACK]),
        (0.81, 0, []),
        (0.0, 20, [CRACK, SCRATCH]),
        (0.0, 21, [SCRATCH]),
        (0.7, 21, []),
    ],
)
def test_defects_score_at_least_conf_and_cover_at_least_min_area(
    conf: float, min_area: int, expected: list[Instance]
) -> None:
    assert PREDICTION.defects(conf, min_area) == expected
    assert PREDICTION.verdict(conf, min_area).is_defect == bool(expected)


def test_the_score_of_an_image_is_that_of_its_best_large_enough_defect_for_any_conf() -> None:
    assert PREDICTION.verdict(0.9) == Verdict(is_defect=False, score=0.8)
    assert PREDICTION.verdict(0.5, min_area=25).score == 0.6
    assert PREDICTION.verdict(0.5, min_area=999).score == 0.0


def test_the_class_good_takes_no_part_in_the_verdict_and_the_mask() -> None:
    only_good = Prediction(20, 30, (GOOD,))
    assert not only_good.verdict(0.0).is_defect
    assert only_good.verdict().score == 0.0
    assert not only_good.defect_mask(0.0).any()
    assert only_good.within(rectangle(0, 0, 1, 1)).instances == (GOOD,)


def test_the_defect_mask_is_the_union_of_the_defects_that_count() -> None:
    assert (PREDICTION.defect_mask() == (CRACK.mask | SCRATCH.mask)).all()
    assert (PREDICTION.defect_mask(0.7) == CRACK.mask).all()
    assert (PREDICTION.defect_mask(0.0, 25) == SCRATCH.mask).all()


@pytest.mark.parametrize(("conf", "min_area"), [(0.5, 0), (0.0, 0), (0.7, 0), (0.0, 25), (0.9, 0)])
def test_the_defect_area_is_that_of_the_defect_mask(conf: float, min_area: int) -> None:
    assert PREDICTION.defect_area(conf, min_area) == PREDICTION.defect_mask(conf, min_area).sum()


def test_a_region_cuts_defects_and_drops_those_outside() -> None:
    cut = PREDICTION.within(rectangle(0, 0, 20, 5))  # the five columns on the left
    assert [(one.label, one.area, one.box) for one in cut.defects()] == [
        ("crack", 8, (3.0, 2.0, 5.0, 6.0)),
        ("scratch", 5, (0.0, 10.0, 5.0, 11.0)),
    ]
    assert (cut.defect_mask(0.0) == (PREDICTION.defect_mask(0.0) & rectangle(0, 0, 20, 5))).all()
    assert not PREDICTION.within(rectangle(18, 0, 1, 1)).verdict(0.0).is_defect


def test_a_region_of_another_size_is_refused() -> None:
    with pytest.raises(FlawmaskError, match="is 20x30 but the image is 30x20"):
        PREDICTION.within(np.ones((30, 20), dtype=bool))


def test_without_probabilities_the_score_map_is_the_score_in_the_whole_mask() -> None:
    scores = PREDICTION.score_map()
    assert np.allclose(scores[CRACK.mask], 0.8)
    assert np.allclose(scores[SCRATCH.mask], 0.6)
    assert (scores[~(CRACK.mask | SCRATCH.mask)] == 0).all()


CLASSES = ("good", "crack", "scratch")
WHOLE = replace(PREDICTION, classes=CLASSES, conf=0.7, image=np.full((20, 30, 3), 90, dtype=np.uint8))


def test_arrays_are_those_of_the_instances() -> None:
    assert PREDICTION.labels.tolist() == ["good", "crack", "scratch", "crack"]
    assert PREDICTION.scores.dtype == PREDICTION.boxes.dtype == np.float32
    assert PREDICTION.scores.tolist() == pytest.approx([0.99, 0.8, 0.6, 0.3])
    assert PREDICTION.boxes.tolist() == [list(one.box) for one in PREDICTION.instances]
    assert PREDICTION.masks.shape == (4, 20, 30)
    assert all((mask == one.mask).all() for mask, one in zip(PREDICTION.masks, PREDICTION.instances, strict=True))
    nothing = Prediction(20, 30, ())
    assert (nothing.labels.shape, nothing.scores.shape, nothing.boxes.shape) == ((0,), (0,), (0, 4))
    assert nothing.masks.shape == (0, 20, 30)
    assert len(nothing) == 0


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        (0, (GOOD,)),
        (-1, (SPECK,)),
        (slice(1, 3), (CRACK, SCRATCH)),
        ([2, 0], (SCRATCH, GOOD)),
        (PREDICTION.scores > 0.7, (GOOD, CRACK)),
        (PREDICTION.labels == "crack", (CRACK, SPECK)),
        (np.zeros(4, dtype=bool), ()),
    ],
)
def test_it_is_indexed_like_an_array(which: Any, expected: tuple[Instance, ...]) -> None:
    chosen = WHOLE[which]
    assert chosen.instances == expected
    assert replace(chosen, instances=WHOLE.instances) == WHOLE


@pytest.mark.parametrize("which", [4, [0, 7], np.ones(3, dtype=bool)])
def test_an_index_without_an_instance_is_refused(which: Any) -> None:
    with pytest.raises(IndexError):
        WHOLE[which]


def test_iterating_over_it_yields_its_instances() -> None:
    assert [one.instances for one in WHOLE] == [(one,) for one in WHOLE.instances]  # type: ignore[attr-defined]


def test_its_own_limits_make_the_verdict_where_none_are_given() -> None:
    assert WHOLE.is_defect
    assert WHOLE.verdict() == Verdict(is_defect=True, score=0.8)
    assert not replace(WHOLE, min_area=21).is_defect
    assert replace(WHOLE, min_area=21).verdict(0.5).is_defect
    assert (WHOLE.defect_mask() == CRACK.mask).all()
    assert WHOLE.defect_area() == 20


def test_a_dictionary_is_ready_for_json_and_masks_come_back() -> None:
    content = json.loads(json.dumps(WHOLE.to_dict()))
    assert (content["verdict"], content["score"]) == ("defect", 0.8)
    assert (content["width"], content["height"], content["defect_area_px"]) == (30, 20, 20)
    (only,) = content["instances"]
    assert (only["class"], only["box"], only["area"]) == ("crack", [3.0, 2.0, 5.0, 4.0], 20)
    assert (decode(only["segmentation"], 20, 30) == CRACK.mask).all()
    assert len(WHOLE.to_dict(conf=0.0)["instances"]) == 3


def test_pycocotools_reads_what_to_coco_returns() -> None:
    truth = COCO()
    truth.dataset = {
        "images": [{"id": 7, "height": 20, "width": 30}],
        "categories": [{"id": 40 + number, "name": name} for number, name in enumerate(CLASSES)],
        "annotations": [],
    }
    truth.createIndex()
    results = WHOLE.to_coco(7, {name: 40 + number for number, name in enumerate(CLASSES)})
    read = truth.loadRes(json.loads(json.dumps(results)))
    assert [one["category_id"] for one in read.dataset["annotations"]] == [40, 41, 42, 41]
    for one, instance in zip(read.dataset["annotations"], WHOLE.instances, strict=True):
        assert (read.annToMask(one).astype(bool) == instance.mask).all()
        assert (one["score"], one["area"]) == (instance.score, instance.area)
    assert [one["category_id"] for one in WHOLE.to_coco(7)] == [1, 2, 3, 2]
    assert "segmentation" not in replace(WHOLE, has_masks=False).to_coco(7)[0]


def test_supervision_has_the_same_boxes_masks_scores_and_names() -> None:
    pytest.importorskip("supervision", reason="supervision is not installed")
    found = WHOLE.to_supervision()
    assert (found.xyxy == WHOLE.boxes).all()
    assert (found.mask == WHOLE.masks).all()
    assert (found.confidence == WHOLE.scores).all()
    assert found.class_id.tolist() == [1, 2, 3, 2]
    assert found["class_name"].tolist() == WHOLE.labels.tolist()
    assert len(Prediction(20, 30, (), classes=CLASSES).to_supervision()) == 0
    assert replace(WHOLE, has_masks=False).to_supervision().mask is None


def test_an_overlay_shows_the_defects_of_the_verdict_on_the_image() -> None:
    picture = WHOLE.overlay()
    assert (picture.mode, picture.width / picture.height) == ("RGB", 1.5)
    changed = np.asarray(picture) != 90
    _, columns = np.nonzero(changed.any(axis=2))
    scale = picture.width / 30
    assert columns.min() >= 3 * scale - 5  # the crack's left edge; its tag runs to the right
    assert (
        np.asarray(WHOLE[WHOLE.labels == "good"].overlay()).tolist() == np.full_like(np.asarray(picture), 90).tolist()
    )
    assert np.asarray(PREDICTION.overlay(np.zeros((20, 30, 3), dtype=np.uint8))).any()
    with pytest.raises(FlawmaskError, match="does not hold its image: give it to overlay"):
        PREDICTION.overlay()


@pytest.mark.parametrize("cells", [1, 7, 28, 56])
def test_probabilities_of_any_size_become_the_mask_that_torchvision_pastes(cells: int) -> None:
    draw = np.random.default_rng(cells)
    boxes = np.array([[4, 2, 14, 12], [1.5, 0.5, 29, 19.5], [20, 10, 40, 30]], dtype=np.float32)
    probabilities = draw.random((3, cells, cells), dtype=np.float32)
    scores = np.array([0.4, 0.9, 0.6], dtype=np.float32)
    prediction = post_process(RawDetections(boxes, np.array([2, 3, 1]), scores, probabilities), CLASSES, 20, 30)
    assert prediction.labels.tolist() == ["scratch", "good", "crack"]
    assert (prediction.classes, prediction.has_masks) == (CLASSES, True)
    pasted = paste_masks_in_image(torch.from_numpy(probabilities)[:, None], torch.from_numpy(boxes), (20, 30))[:, 0]
    expected = pasted.numpy()[[1, 2, 0]]
    different = prediction.masks != (expected > 0.5)
    assert (np.abs(expected[different] - 0.5) < 1e-5).all()
    assert [one.area for one in prediction.instances] == prediction.masks.sum(axis=(1, 2)).tolist()


NOTHING = RawDetections(
    np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros((0, 28, 28), np.float32)
)


def interpolated(grid: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the values of a grid at the pixels of an image with 4 x 4 pixels for each cell."""
    weights = []
    for cells in grid.shape:
        # Beyond the centres of the outermost cells, their values go on.
        place = np.clip((np.arange(4 * cells) + 0.5) / 4 - 0.5, 0, cells - 1)
        weights.append(np.maximum(0, 1 - abs(place[:, None] - np.arange(cells))))
    return np.asarray(weights[0] @ grid @ weights[1].T, dtype=np.float32)


def test_a_map_of_scores_is_interpolated_to_the_size_of_the_image() -> None:
    maps = np.zeros((2, 5, 6), dtype=np.float32)
    maps[0, 1, 2], maps[1, 3, 4] = 0.8, 0.4
    found = post_process(replace(NOTHING, maps=maps), CLASSES, 20, 24).score_map()
    np.testing.assert_allclose(found, interpolated(maps.max(axis=0)), atol=1e-3)


@pytest.mark.parametrize("peak", [0.0, 0.02, 0.5, 1.0])
def test_the_score_of_an_image_is_the_mean_of_its_best_defect_and_the_peak_of_its_maps(peak: float) -> None:
    detections = replace(
        NOTHING,
        boxes=np.array([[1, 1, 9, 9], [12, 3, 20, 15], [5, 5, 9, 18]], np.float32),
        labels=np.array([2, 3, 1]),  # crack, scratch, good
        scores=np.array([0.3, 0.6, 0.9], np.float32),
        masks=np.ones((3, 28, 28), np.float32),
    )
    plain = post_process(detections, CLASSES, 20, 30)
    maps = np.zeros((2, 5, 8), dtype=np.float32)
    maps[1, 2, 3] = peak
    scored = post_process(replace(detections, maps=maps), CLASSES, 20, 30)
    assert scored.verdict().score == pytest.approx((0.6 + peak) / 2)
    assert {one.label: one.score for one in scored.instances} == pytest.approx(
        {"crack": 0.3 * (0.6 + peak) / 1.2, "scratch": (0.6 + peak) / 2, "good": 0.9}
    )
    assert list(scored.scores) == sorted(scored.scores, reverse=True)
    assert {one.label: one.rle["counts"] for one in scored.instances} == {
        one.label: one.rle["counts"] for one in plain.instances
    }


def test_an_image_without_a_detection_gets_the_region_around_the_peak() -> None:
    maps = np.full((2, 5, 6), 0.01, dtype=np.float32)
    maps[1, 2, 2:4], maps[1, 4, 0], maps[0, 0, 0] = (0.2, 0.18), 0.19, 0.1
    scored = post_process(replace(NOTHING, maps=maps), CLASSES, 20, 24)
    (region,) = scored.instances
    assert region.label == "scratch"
    assert region.score == pytest.approx(0.1)
    expected = np.zeros((20, 24), dtype=bool)
    expected[8:12, 8:16] = True
    assert (region.mask == expected).all()
    assert (region.box, region.area) == ((8.0, 8.0, 16.0, 12.0), expected.sum())
    assert not scored.is_defect
    assert scored.verdict(0.09).is_defect
    assert not scored.verdict(0.09, min_area=region.area + 1).is_defect
    assert not post_process(NOTHING, CLASSES, 20, 24).instances


def test_only_the_region_of_interest_counts_for_the_second_opinion() -> None:
    maps = np.full((2, 5, 6), 0.02, dtype=np.float32)
    maps[0, 0, 5], maps[0, 3, 1] = 0.9, 0.3
    left = np.zeros((20, 24), dtype=bool)
    left[:, :11] = True
    boxes = np.array([[1, 1, 9, 9], [14, 3, 22, 15]], np.float32)
    one_each = RawDetections(
        boxes, np.array([2, 2]), np.array([0.4, 0.8], np.float32), np.ones((2, 28, 28), np.float32)
    )
    cut = post_process(replace(one_each, maps=maps), CLASSES, 20, 24).within(left)
    assert [one.label for one in cut.instances] == ["crack"]
    assert cut.verdict().score == pytest.approx((0.4 + 0.3) / 2)
    assert (cut.score_map()[:, 14:] == 0).all()
    again = cut.within(left)
    assert again.verdict().score == pytest.approx((0.4 + 0.3) / 2)
    (region,) = post_process(replace(NOTHING, maps=maps), CLASSES, 20, 24).within(left).instances
    assert region.score == pytest.approx(0.15)
    assert region.mask[12:16, 5:7].any()
    assert not (region.mask & ~left).any()
    corner = np.zeros((20, 24), dtype=bool)
    corner[0, 0] = True
    assert (
        not post_process(replace(NOTHING, maps=np.where(maps < 0.1, 0, maps)), CLASSES, 20, 24).within(corner).instances
    )


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 300), (1, 9)])
def test_the_region_around_the_peak_is_never_empty(height: int, width: int) -> None:
    maps = np.zeros((2, 64, 64), dtype=np.float32)
    maps[0, 17, 41] = 0.9
    (region,) = post_process(replace(NOTHING, maps=maps), CLASSES, height, width).instances
    assert region.area >= 1
    assert region.mask.shape == (height, width)


LOOKED_THROUGH = "evaluation", "report", "data"
ALSO = (
    *("api", "draw", "prediction", "comparison.page", "comparison.table", "inference.backend", "inference.overlay"),
    *("inference.predict", "inference.predictor", "inference.stream", "inference.threshold"),
)


def test_evaluation_report_and_drawing_load_no_torch() -> None:
    """A new process imports the modules one after the other and names the first one that loads it."""
    source = Path(flawmask.__file__).parent
    modules = [
        f"{package}.{path.stem}" for package in LOOKED_THROUGH for path in sorted((source / package).glob("*.py"))
    ]
    code = f"""
import sys
from importlib import import_module
for name in {[*modules, *ALSO]}:
    import_module(f"flawmask.{{name}}")
    assert not {{"torch", "torchvision"}} & sys.modules.keys(), name"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
