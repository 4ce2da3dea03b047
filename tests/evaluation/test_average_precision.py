"""Average precision and recall, checked against pycocotools; for weighted images, too."""

import contextlib
import copy
import io
from dataclasses import replace
from typing import Any

import hotcoco
import numpy as np
import pytest
from handmade_split import HEIGHT, NAMES, WIDTH, blob, instance, make_split, predicted, rectangle, shaken
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from flawmask.coco import CocoSplit
from flawmask.evaluation import average_precision as average_precision_module
from flawmask.evaluation.average_precision import (
    average_precision,
    coco_results,
    evaluate_instances,
    mask_precision_curve,
)
from flawmask.masks import decode, to_rle
from flawmask.prediction import Prediction

KEYS = {"ap": 0, "ap50": 1, "ap75": 2, "ap_small": 3, "ap_medium": 4, "ap_large": 5, "ar": 8}
"""The positions of the metrics among pycocotools' twelve."""


def reference(split: CocoSplit, results: list[dict[str, Any]]) -> dict[str, float | None]:
    """The metrics of pycocotools for the defect classes, with None in place of -1."""
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
            for key, place in KEYS.items():
                value = float(evaluator.stats[place])
                figures[f"{name}_{key}"] = None if value == -1 else value
    return figures


def assert_as_pycocotools(split: CocoSplit, predictions: list[Prediction]) -> dict[str, float | None]:
    ours = average_precision(split, evaluate_instances(split, predictions))
    theirs = reference(split, list(coco_results(split, predictions)))
    ours.pop("ap_by_class")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name] == (None if value is None else pytest.approx(value, abs=1e-6)), name
    return ours


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
        predictions.append(predicted(*found))
    figures = assert_as_pycocotools(make_split(truths), predictions)
    assert 0 < (figures["mask_ap50"] or 0) < 1


def test_without_a_true_defect_there_is_no_figure() -> None:
    split = make_split([[(1, rectangle(0, 0, HEIGHT, WIDTH))], []])
    found = [predicted(instance("crack", 0.9, rectangle(1, 1, 5, 5))), predicted()]
    assert set(assert_as_pycocotools(split, found).values()) == {None}


def test_without_a_detection_every_figure_is_0() -> None:
    split = make_split([[(3, rectangle(1, 1, 5, 5))], []])
    assert set(assert_as_pycocotools(split, [predicted(), predicted()]).values()) == {0.0, None}


def test_a_perfect_prediction_has_the_figure_1() -> None:
    masks = [rectangle(1, 1, 20, 30), rectangle(40, 2, 1, 70)]
    split = make_split([[(3, masks[0]), (7, masks[1])]])
    found = [predicted(instance("crack", 0.3, masks[0]), instance("scratch", 0.2, masks[1]))]
    figures = assert_as_pycocotools(split, found)
    assert {round(value, 9) for value in figures.values() if value is not None} == {1.0}


def test_the_class_good_does_not_count() -> None:
    whole, crack = rectangle(0, 0, HEIGHT, WIDTH), rectangle(3, 3, 9, 9)
    split = make_split([[(1, whole)], [(3, crack)]])
    without = [predicted(), predicted(instance("crack", 0.6, crack))]
    with_good = [
        predicted(instance("good", 0.9, whole)),
        predicted(instance("crack", 0.6, crack), instance("good", 1, crack)),
    ]
    assert assert_as_pycocotools(split, with_good) == assert_as_pycocotools(split, without)


def test_a_class_without_true_defects_does_not_lower_the_mean() -> None:
    crack = rectangle(3, 3, 9, 9)
    found = [predicted(instance("crack", 0.9, crack), instance("scratch", 0.95, rectangle(30, 30, 5, 5)))]
    assert assert_as_pycocotools(make_split([[(3, crack)]]), found)["mask_ap"] == pytest.approx(1.0)


def test_only_the_best_100_detections_of_an_image_count() -> None:
    crack = rectangle(3, 3, 9, 9)
    random = np.random.default_rng(0)
    wrong = [
        instance("crack", 0.5 + 0.004 * at, blob(random) & rectangle(20, 20, 40, 60) | rectangle(59, 79, 1, 1))
        for at in range(100)
    ]
    split = make_split([[(3, crack)], []])
    assert (
        assert_as_pycocotools(split, [predicted(*wrong, instance("crack", 0.1, crack)), predicted()])["mask_ap"] == 0.0
    )
    found = assert_as_pycocotools(split, [predicted(*wrong[1:], instance("crack", 0.1, crack)), predicted()])
    assert found["mask_ap"] is not None
    assert found["mask_ap"] > 0


def test_crowds_are_ignored_as_pycocotools_ignores_them() -> None:
    split = make_split([[(3, rectangle(0, 0, 30, 40)), (3, rectangle(40, 40, 10, 10))]])
    records = [dict(one) for one in split.annotations[11]]
    records[0] |= {"iscrowd": 1, "segmentation": to_rle(rectangle(0, 0, 30, 40))}
    split = CocoSplit(split.folder, split.images, {11: tuple(records)}, split.categories)
    inside = [instance("crack", 0.9 - 0.1 * at, rectangle(5 * at, 5, 4, 10)) for at in range(3)]
    figures = assert_as_pycocotools(split, [predicted(*inside, instance("crack", 0.2, rectangle(40, 40, 10, 9)))])
    assert (figures["mask_ap50"] or 0) == pytest.approx(1.0)


def test_results_are_in_the_data_sets_own_ids_and_boxes_as_coco_writes_them() -> None:
    split = make_split([[], [(7, rectangle(2, 3, 4, 5))]])
    (record,) = coco_results(split, [predicted(), predicted(instance("scratch", 0.7, rectangle(2, 3, 4, 5)))])
    assert (record["image_id"], record["category_id"], record["score"]) == (12, 7, 0.7)
    assert record["bbox"] == [3, 2, 5, 4]
    assert (decode(record["segmentation"], HEIGHT, WIDTH) == rectangle(2, 3, 4, 5)).all()


def random_case(seed: int, images: int = 8) -> tuple[CocoSplit, list[Prediction]]:
    random = np.random.default_rng(seed)
    truths = [
        [(int(random.choice([1, 3, 7])), blob(random)) for _ in range(random.integers(0, 4))] for _ in range(images)
    ]
    predictions = [
        predicted(
            *(instance(NAMES[category], float(random.random()), shaken(mask, random)) for category, mask in truth),
            instance("crack", float(random.random()), blob(random)),
        )
        for truth in truths
    ]
    return make_split(truths), predictions


@pytest.mark.parametrize("seed", range(4))
def test_an_image_with_weight_n_counts_like_n_copies_of_it(seed: int) -> None:
    split, predictions = random_case(seed)
    evaluations = evaluate_instances(split, predictions)
    assert evaluations is not None
    weights = np.random.default_rng(seed).integers(0, 4, (3, len(predictions))).astype(float)
    for number, row in enumerate(weights):
        copies = [at for at, count in enumerate(row.astype(int)) for _ in range(count)]
        images = tuple({**split.images[at], "id": 1000 + place} for place, at in enumerate(copies))
        annotations = {
            image["id"]: tuple(
                {**one, "id": 100 * image["id"] + place, "image_id": image["id"]}
                for place, one in enumerate(split.annotations[split.images[at]["id"]])
            )
            for image, at in zip(images, copies, strict=True)
        }
        copied = CocoSplit(split.folder, images, annotations, split.categories)
        expected = reference(copied, list(coco_results(copied, [predictions[at] for at in copies])))
        for kind, evaluation in evaluations.items():
            for name, values in evaluation.resampled(weights).items():
                wanted = expected[f"{kind}_{name}"]
                assert values[number] == pytest.approx(np.nan if wanted is None else wanted, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("seed", range(3))
def test_chunks_of_images_give_what_one_evaluation_of_all_gives_to_the_last_digit(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    split, predictions = random_case(seed, images=11)
    predictions = [replace_scores(one, seed + at) for at, one in enumerate(predictions)]
    whole = evaluate_instances(split, predictions)
    monkeypatch.setattr(average_precision_module, "CHUNK", 3)
    chunked = evaluate_instances(split, predictions)
    assert whole is not None
    assert chunked is not None
    weights = np.random.default_rng(seed).multinomial(11, np.full(11, 1 / 11), size=20).astype(float)
    annotations = [one for image in split.images for one in split.defects(image)]
    categories = [one for one in split.categories if one["id"] in split.defect_ids]
    truth = hotcoco.COCO({"images": list(split.images), "annotations": annotations, "categories": categories})
    found = [one for one in coco_results(split, predictions) if one["category_id"] in split.defect_ids]
    for name, kind in (("mask", "segm"), ("box", "bbox")):
        evaluator = hotcoco.COCOeval(truth, truth.loadRes(found), kind)
        evaluator.evaluate()
        evaluator.accumulate()
        figures: Any = evaluator.eval
        for part in (whole[name], chunked[name]):
            assert np.array_equal(part.precision, figures["precision"][..., -1])
            assert np.array_equal(part.recall, figures["recall"][..., -1])
        one, other = whole[name].resampled(weights), chunked[name].resampled(weights)
        assert all(np.array_equal(one[key], other[key]) for key in one)


def replace_scores(prediction: Prediction, seed: int) -> Prediction:
    """Return the prediction with few different scores, so that many are equal."""
    draw = np.random.default_rng(seed)
    instances = (replace(one, score=float(draw.integers(1, 4)) / 4) for one in prediction.instances)
    return replace(prediction, instances=tuple(sorted(instances, key=lambda one: -one.score)))


def test_images_without_a_weight_do_not_count() -> None:
    split, predictions = random_case(1)
    evaluations = evaluate_instances(split, predictions)
    assert evaluations is not None
    assert np.isnan(evaluations["mask"].resampled(np.zeros((2, len(predictions))))["ap"]).all()


def test_each_class_has_its_own_figures() -> None:
    crack, scratch = rectangle(3, 3, 9, 9), rectangle(30, 30, 9, 9)
    split = make_split([[(3, crack), (7, scratch)]])
    found = [predicted(instance("crack", 0.9, crack))]
    figures = average_precision(split, evaluate_instances(split, found))
    by_class = figures["ap_by_class"]
    assert (by_class["crack"]["mask_ap"], by_class["scratch"]["mask_ap"]) == (pytest.approx(1.0), 0.0)
    assert (by_class["crack"]["box_ar"], by_class["scratch"]["box_ar"]) == (pytest.approx(1.0), 0.0)
    assert figures["mask_ap"] == pytest.approx(0.5)


def test_the_precision_curve_has_the_area_of_the_ap_at_half_overlap() -> None:
    split, predictions = random_case(2, images=12)
    evaluations = evaluate_instances(split, predictions)
    curve = mask_precision_curve(evaluations)
    assert curve is not None
    assert np.mean(curve["y"]) == pytest.approx(average_precision(split, evaluations)["mask_ap50"])
    assert mask_precision_curve(None) is None
