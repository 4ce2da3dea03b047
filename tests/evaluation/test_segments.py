"""Average precision, held against pycocotools; mask IoU, held against a loop."""

import contextlib
import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from flawmask.coco import CocoSplit, annotation
from flawmask.evaluation.segments import average_precision, coco_results, mean_mask_iou
from flawmask.inference.predictor import Instance, Prediction
from flawmask.masks import Mask, box_of, decode, to_rle

HEIGHT, WIDTH = 60, 80
KEYS = ("ap", "ap50", "ap75")
NAMES = {1: "good", 3: "crack", 7: "scratch"}


def reference(split: CocoSplit, results: list[dict[str, Any]]) -> dict[str, float | None]:
    """What pycocotools says of the defect classes, its 12 figures cut to the first three; -1 stands for None."""
    records = [copy.deepcopy(one) for image in split.images for one in split.annotations[image["id"]]]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": list(split.images),
            "annotations": records,
            "categories": list(split.categories),
        }
        truth.createIndex()
        found = truth.loadRes(copy.deepcopy(results)) if results else COCO()
        figures: dict[str, float | None] = {}
        for name, kind in (("mask", "segm"), ("box", "bbox")):
            evaluator = COCOeval(truth, found, kind)
            evaluator.params.imgIds = [image["id"] for image in split.images]
            evaluator.params.catIds = sorted(split.defect_ids)
            evaluator.evaluate()
            evaluator.accumulate()
            evaluator.summarize()
            for key, value in zip(KEYS, evaluator.stats, strict=False):
                figures[f"{name}_{key}"] = None if value == -1 else float(value)
    return figures


def assert_as_pycocotools(split: CocoSplit, predictions: list[Prediction]) -> dict[str, float | None]:
    results = coco_results(split, predictions)
    ours, theirs = average_precision(split, results), reference(split, results)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name] == (None if value is None else pytest.approx(value, abs=1e-6)), name
    return ours


def rectangle(y: int, x: int, height: int, width: int) -> Mask:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[y : y + height, x : x + width] = True
    return mask


def instance(label: str, score: float, mask: Mask) -> Instance:
    x, y, width, height = box_of(mask)
    box = (float(x), float(y), float(x + width), float(y + height))
    return Instance(label, score, box, to_rle(mask), int(mask.sum()))


def make_split(truths: list[list[tuple[int, Mask]]], names: dict[int, str] = NAMES) -> CocoSplit:
    """A split of an image for each list of (category id, mask); ids start at 11."""
    images: list[dict[str, Any]] = [
        {"id": 11 + at, "file_name": f"{at}.png", "width": WIDTH, "height": HEIGHT} for at in range(len(truths))
    ]
    annotations: dict[int, tuple[dict[str, Any], ...]] = {}
    number = 100
    for image, truth in zip(images, truths, strict=True):
        records = []
        for category, mask in truth:
            number += 1
            records.append(annotation(mask, id=number, image_id=image["id"], category_id=category))
        annotations[image["id"]] = tuple(records)
    categories = tuple({"id": number, "name": name} for number, name in names.items())
    return CocoSplit(Path("data/val"), tuple(images), annotations, categories)


def predict(*instances: Instance) -> Prediction:
    return Prediction(HEIGHT, WIDTH, tuple(sorted(instances, key=lambda one: -one.score)))


def blob(random: np.random.Generator) -> Mask:
    """A rectangle, some of them hollow, some thin."""
    height, width = (int(side) for side in random.integers(1, 25, 2))
    y, x = int(random.integers(0, HEIGHT - height)), int(random.integers(0, WIDTH - width))
    mask = rectangle(y, x, height, width)
    if height > 6 and width > 6 and random.random() < 0.4:
        mask &= ~rectangle(y + 2, x + 2, height - 4, width - 4)
    return mask


def shaken(mask: Mask, random: np.random.Generator) -> Mask:
    moved = np.roll(mask, tuple(random.integers(-2, 3, 2)), axis=(0, 1))
    return moved if moved.any() else mask


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("tied", [False, True])
def test_random_cases_agree_with_pycocotools(seed: int, tied: bool) -> None:
    random = np.random.default_rng(seed)
    truths = [[(int(random.choice([1, 3, 7])), blob(random)) for _ in range(random.integers(0, 6))] for _ in range(8)]
    predictions = []
    for truth in truths:
        found = []
        for category, mask in truth:
            for _ in range(random.integers(0, 3)):
                label = NAMES[category] if random.random() < 0.8 else "crack"
                score = float(random.integers(1, 5)) / 5 if tied else float(random.random())
                found.append(instance(label, score, shaken(mask, random)))
        for _ in range(random.integers(0, 3)):
            found.append(instance(NAMES[int(random.choice([1, 3, 7]))], float(random.random()), blob(random)))
        predictions.append(predict(*found))
    figures = assert_as_pycocotools(make_split(truths), predictions)
    assert 0 < (figures["mask_ap50"] or 0) < 1


def test_without_a_true_defect_there_is_no_figure() -> None:
    split = make_split([[(1, rectangle(0, 0, HEIGHT, WIDTH))], []])
    found = [predict(instance("crack", 0.9, rectangle(1, 1, 5, 5))), predict()]
    assert set(assert_as_pycocotools(split, found).values()) == {None}
    assert mean_mask_iou(split, found, 0.5, 0) is None


def test_without_a_detection_every_figure_is_0() -> None:
    split = make_split([[(3, rectangle(1, 1, 5, 5))], []])
    assert set(assert_as_pycocotools(split, [predict(), predict()]).values()) == {0.0}
    assert mean_mask_iou(split, [predict(), predict()], 0.5, 0) == 0.0


def test_a_perfect_prediction_has_the_figure_1() -> None:
    masks = [rectangle(1, 1, 20, 30), rectangle(40, 2, 1, 70)]
    split = make_split([[(3, masks[0]), (7, masks[1])]])
    found = [predict(instance("crack", 0.3, masks[0]), instance("scratch", 0.2, masks[1]))]
    assert list(assert_as_pycocotools(split, found).values()) == pytest.approx([1.0] * 6)
    assert mean_mask_iou(split, found, 0.1, 0) == 1.0


def test_the_class_good_takes_no_part() -> None:
    whole, crack = rectangle(0, 0, HEIGHT, WIDTH), rectangle(3, 3, 9, 9)
    split = make_split([[(1, whole)], [(3, crack)]])
    without = [predict(), predict(instance("crack", 0.6, crack))]
    with_good = [
        predict(instance("good", 0.9, whole)),
        predict(instance("crack", 0.6, crack), instance("good", 1, crack)),
    ]
    assert assert_as_pycocotools(split, with_good) == assert_as_pycocotools(split, without)
    assert mean_mask_iou(split, with_good, 0.5, 0) == 1.0


def test_a_class_without_truth_does_not_drag_the_mean_down() -> None:
    crack = rectangle(3, 3, 9, 9)
    found = [predict(instance("crack", 0.9, crack), instance("scratch", 0.95, rectangle(30, 30, 5, 5)))]
    assert assert_as_pycocotools(make_split([[(3, crack)]]), found)["mask_ap"] == pytest.approx(1.0)


def test_only_the_best_100_detections_of_an_image_count() -> None:
    crack = rectangle(3, 3, 9, 9)
    random = np.random.default_rng(0)
    wrong = [
        instance("crack", 0.5 + 0.004 * at, blob(random) & rectangle(20, 20, 40, 60) | rectangle(59, 79, 1, 1))
        for at in range(100)
    ]
    split = make_split([[(3, crack)], []])
    assert assert_as_pycocotools(split, [predict(*wrong, instance("crack", 0.1, crack)), predict()])["mask_ap"] == 0.0
    found = assert_as_pycocotools(split, [predict(*wrong[1:], instance("crack", 0.1, crack)), predict()])
    assert found["mask_ap"] is not None
    assert found["mask_ap"] > 0


def test_crowds_are_ignored_as_pycocotools_ignores_them() -> None:
    split = make_split([[(3, rectangle(0, 0, 30, 40)), (3, rectangle(40, 40, 10, 10))]])
    records = [dict(one) for one in split.annotations[11]]
    records[0] |= {"iscrowd": 1, "segmentation": to_rle(rectangle(0, 0, 30, 40))}
    split = CocoSplit(split.folder, split.images, {11: tuple(records)}, split.categories)
    inside = [instance("crack", 0.9 - 0.1 * at, rectangle(5 * at, 5, 4, 10)) for at in range(3)]
    figures = assert_as_pycocotools(split, [predict(*inside, instance("crack", 0.2, rectangle(40, 40, 10, 9)))])
    assert (figures["mask_ap50"] or 0) == pytest.approx(1.0)


def test_results_are_in_the_data_sets_own_ids_and_boxes_as_coco_writes_them() -> None:
    split = make_split([[], [(7, rectangle(2, 3, 4, 5))]])
    (record,) = coco_results(split, [predict(), predict(instance("scratch", 0.7, rectangle(2, 3, 4, 5)))])
    assert (record["image_id"], record["category_id"], record["score"]) == (12, 7, 0.7)
    assert record["bbox"] == [3, 2, 5, 4]
    assert (decode(record["segmentation"], HEIGHT, WIDTH) == rectangle(2, 3, 4, 5)).all()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("conf", "min_area"), [(0.0, 0), (0.5, 0), (0.3, 20)])
def test_mean_mask_iou_is_what_a_loop_over_all_pairs_gives(seed: int, conf: float, min_area: int) -> None:
    random = np.random.default_rng(seed)
    truths = [[(int(random.choice([1, 3, 7])), blob(random)) for _ in range(random.integers(0, 4))] for _ in range(6)]
    predictions = [
        predict(
            *(instance(NAMES[category], float(random.random()), shaken(mask, random)) for category, mask in truth),
            instance("crack", float(random.random()), blob(random)),
        )
        for truth in truths
    ]
    best = []
    for truth, prediction in zip(truths, predictions, strict=True):
        counted = [one for one in prediction.instances if one.score >= conf and one.area >= min_area]
        for category, mask in truth:
            if category == 1:
                continue
            ious = [(mask & one.mask).sum() / (mask | one.mask).sum() for one in counted if one.label != "good"]
            best.append(max(ious, default=0.0))
    assert mean_mask_iou(make_split(truths), predictions, conf, min_area) == pytest.approx(float(np.mean(best)))
