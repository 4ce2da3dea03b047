"""Matched instances and kinds of errors, checked against a loop and against cases made by hand."""

import numpy as np
import pytest
from handmade_split import NAMES, blob, instance, make_split, predicted, rectangle, shaken

from flawmask.coco import CocoSplit
from flawmask.evaluation.instances import instance_errors
from flawmask.masks import to_rle


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("conf", "min_area"), [(0.0, 0), (0.5, 0), (0.3, 20)])
def test_mean_mask_iou_is_what_a_loop_over_all_pairs_gives(seed: int, conf: float, min_area: int) -> None:
    random = np.random.default_rng(seed)
    truths = [[(int(random.choice([1, 3, 7])), blob(random)) for _ in range(random.integers(0, 4))] for _ in range(6)]
    predictions = [
        predicted(
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
    errors = instance_errors(make_split(truths), predictions, conf, min_area)
    assert errors.mean_iou == pytest.approx(float(np.mean(best)))
    ones = np.ones((1, len(truths)))
    assert errors.resampled_iou(ones)[0] == pytest.approx(float(np.mean(best)))


def test_every_kind_of_error_is_recognised() -> None:
    crack, scratch = rectangle(5, 5, 20, 20), rectangle(5, 50, 20, 20)
    split = make_split([[(3, crack), (7, scratch)], [(3, crack)]])
    found = [
        predicted(
            instance("crack", 0.9, crack),
            instance("crack", 0.8, rectangle(5, 5, 20, 18)),  # the same defect once more
            instance("crack", 0.7, scratch),  # the right place, the wrong class
            instance("crack", 0.6, rectangle(40, 40, 10, 10)),  # nothing there
        ),
        predicted(instance("crack", 0.5, rectangle(5, 5, 5, 20))),  # a quarter of it
    ]
    errors = instance_errors(split, found, 0.0, 0)
    assert [one["kind"] for one in errors.spurious] == ["duplicate", "classification", "background", "localisation"]
    assert errors.counts == {"localisation": 1, "classification": 1, "duplicate": 1, "background": 1, "missed": 2}
    assert [(one["file"], one["annotation_id"]) for one in errors.missed] == [("0.png", 102), ("1.png", 103)]
    assert [one["best_iou"] for one in errors.missed] == pytest.approx([1.0, 0.25])
    assert (errors.truths, errors.found) == (3, 5)
    assert [one["area"] for one in errors.missed] == [400, 400]


def test_each_defect_is_matched_once_with_the_highest_score() -> None:
    first, second = rectangle(5, 5, 20, 20), rectangle(5, 10, 20, 20)
    split = make_split([[(3, first), (3, second)]])
    found = [predicted(instance("crack", 0.9, rectangle(5, 7, 20, 20)), instance("crack", 0.8, first))]
    errors = instance_errors(split, found, 0.0, 0)
    assert errors.missed == []
    assert errors.spurious == []


def test_conf_and_min_area_decide_which_predictions_count() -> None:
    crack = rectangle(5, 5, 10, 10)
    split = make_split([[(3, crack)]])
    found = [predicted(instance("crack", 0.4, crack))]
    assert instance_errors(split, found, 0.4, 100).missed == []
    assert len(instance_errors(split, found, 0.41, 0).missed) == 1
    assert len(instance_errors(split, found, 0.0, 101).missed) == 1


def test_a_crowd_is_no_missed_defect_and_a_prediction_in_it_no_error() -> None:
    split = make_split([[(3, rectangle(0, 0, 30, 40))]])
    record = {**split.annotations[11][0], "iscrowd": 1, "segmentation": to_rle(rectangle(0, 0, 30, 40))}
    split = CocoSplit(split.folder, split.images, {11: (record,)}, split.categories)
    errors = instance_errors(split, [predicted(instance("crack", 0.9, rectangle(3, 3, 5, 5)))], 0.0, 0)
    assert (errors.truths, errors.missed, errors.spurious, errors.mean_iou) == (0, [], [], None)
    nothing = instance_errors(split, [predicted()], 0.0, 0)
    assert (nothing.missed, nothing.spurious) == ([], [])
