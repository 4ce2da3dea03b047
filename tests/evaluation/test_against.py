"""Another model on the same images: its results are checked, and compared on the same resampled images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade_split import blob, grouped, instance, make_split, predicted, rectangle, shaken

from flawmask.coco import CocoSplit
from flawmask.errors import FlawmaskError
from flawmask.evaluation.against import Other, compare, read_other, read_predictions
from flawmask.evaluation.average_precision import coco_results
from flawmask.evaluation.measure import measure
from flawmask.prediction import Prediction


def case(seed: int, sharp: float, images: int = 24) -> tuple[CocoSplit, list[Prediction]]:
    """Half of the images have a crack; a sharp model scores cracks high and good images low."""
    truth_rng, rng = np.random.default_rng(5), np.random.default_rng(seed)
    truths = [[(3, blob(truth_rng))] if at % 2 else [] for at in range(images)]
    found = []
    for truth in truths:
        high, low = (float(np.clip(rng.normal(mean, 0.2), 0, 1)) for mean in (sharp, 1 - sharp))
        crack = [instance("crack", high, shaken(mask, rng)) for _, mask in truth]
        found.append(predicted(*crack, instance("crack", low, blob(rng))))
    return make_split(truths), found


def compared(split: CocoSplit, mine: list[Prediction], theirs: list[Prediction], conf: float = 0.5) -> dict[str, Any]:
    return compare(split, mine, 0.5, Other("other", theirs, conf), min_area=0, resamples=200, seed=0)


def test_a_model_does_not_differ_from_itself() -> None:
    split, found = case(0, 0.8)
    result = compared(split, found, found)
    assert all(row["difference"] == 0 and row["interval"] == (0, 0) for row in result["figures"].values())
    assert result["mcnemar"] == {"only_this_right": 0, "only_other_right": 0, "p": 1.0}


def test_differences_are_those_of_the_metrics_and_change_sign_with_the_order() -> None:
    split, mine = case(1, 0.9)
    _, theirs = case(2, 0.5)
    result, reverse = compared(split, mine, theirs), compared(split, theirs, mine)
    alone = [measure(split, found, 0.5, 0, resamples=0, seed=0).metrics for found in (mine, theirs)]
    assert set(result["figures"]) > {"accuracy", "f1_score", "image_auroc", "mask_ap", "box_ap75", "mean_mask_iou"}
    for name, row in result["figures"].items():
        assert (row["this"], row["other"]) == pytest.approx((alone[0][name], alone[1][name]))
        assert row["difference"] == pytest.approx(row["this"] - row["other"])
        low, high = row["interval"]
        assert low <= row["difference"] <= high
        assert reverse["figures"][name]["interval"] == pytest.approx((-high, -low))
    assert result["figures"]["accuracy"]["interval"][0] > 0
    assert result["mcnemar"]["p"] == pytest.approx(reverse["mcnemar"]["p"])
    assert result["mcnemar"]["p"] < 0.05


def test_images_that_are_hard_for_both_do_not_widen_the_interval() -> None:
    split, mine = case(3, 0.65)
    theirs = [*mine[:-1], predicted()]
    (low, high) = compared(split, mine, theirs)["figures"]["accuracy"]["interval"]
    alone = measure(split, mine, 0.5, 0, resamples=200, seed=0).metrics["intervals"]["accuracy"]
    assert high - low < (alone[1] - alone[0]) / 2


def test_over_groups_differences_are_the_same_and_intervals_wider() -> None:
    split, mine = case(1, 0.9)
    _, theirs = case(2, 0.5)
    alone, parts = compared(split, mine, theirs), compared(grouped(split, 4), mine, theirs)
    assert parts["groups"] == 6
    assert "groups" not in alone
    assert parts["mcnemar"]["p"] > alone["mcnemar"]["p"]
    assert parts["mcnemar"]["only_this_right"] == alone["mcnemar"]["only_this_right"]
    for name, row in parts["figures"].items():
        assert row["difference"] == alone["figures"][name]["difference"]
        assert row["interval"] != alone["figures"][name]["interval"]
    each = compared(grouped(split, 1), mine, theirs)
    assert each["mcnemar"] == pytest.approx(alone["mcnemar"])


def written(path: Path, split: CocoSplit, found: list[Prediction], **change: Any) -> Path:
    records = list(coco_results(split, found))
    records[0] |= change
    path.write_text(json.dumps(records))
    return path


def test_predictions_come_back_from_their_file(tmp_path: Path) -> None:
    split, found = case(4, 0.8)
    back = read_predictions(written(tmp_path / "p.json", split, found), split)
    assert back == found


def test_results_are_found_in_a_run_in_a_results_folder_and_in_a_file(tmp_path: Path) -> None:
    split, found = case(5, 0.8)
    folder = tmp_path / "run" / "inference_val"
    folder.mkdir(parents=True)
    written(folder / "predictions.json", split, found)
    lines = [f"{image['file_name']},{'defect' if split.is_defective(image) else 'good'}" for image in split.images]
    (folder / "predictions.csv").write_text("\n".join(["file,truth", *lines]))
    (folder / "metrics.json").write_text('{"conf": 0.3, "min_area": 7, "notes": ["Mind."]}')
    for place, conf, area in ((tmp_path / "run", 0.3, 7), (folder, 0.3, 7), (folder / "predictions.json", 0.6, 2)):
        other = read_other(place, split, 0.6, 2)
        assert (other.predictions, other.conf, other.min_area) == (found, conf, area)
    assert read_other(folder, split, 0.6, 2).notes == ("Mind.",)
    with pytest.raises(FlawmaskError, match="holds no results for val"):
        read_other(tmp_path, split, 0.5, 0)
    (folder / "metrics.json").write_text("[]")
    with pytest.raises(FlawmaskError, match=r"metrics\.json was not written by flawmask evaluate"):
        read_other(folder, split, 0.5, 0)
    (folder / "predictions.csv").write_text("\n".join(["file,truth", *lines[1:]]))
    with pytest.raises(FlawmaskError, match="holds results for other images than"):
        read_other(folder, split, 0.5, 0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"image_id": 999}, "record 0 names the image 999"),
        ({"image_id": [1]}, "record 0 names the image"),
        ({"category_id": 99}, "record 0 names the class 99"),
        ({"score": 1.5}, r"record 0 has the score 1\.5"),
        ({"score": -0.1}, r"record 0 has the score -0\.1"),
        ({"score": float("nan")}, "not valid JSON|has the score nan"),
        ({"score": None}, "has the score None"),
        ({"segmentation": {"size": [10, 10], "counts": "d3"}}, "record 0 has no mask of 80x60 pixels"),
        ({"segmentation": {"size": 5, "counts": "d3"}}, "record 0 has no mask of 80x60 pixels"),
        ({"segmentation": None}, "record 0 has no mask of 80x60 pixels"),
        ({"bbox": [1, 2]}, r"record 0 has the box \[1, 2\]"),
    ],
)
def test_invalid_predictions_are_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    split, found = case(6, 0.8)
    with pytest.raises(FlawmaskError, match=says) as caught:
        read_predictions(written(tmp_path / "p.json", split, found, **change), split)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_list_of_predictions_is_refused(tmp_path: Path) -> None:
    split, _ = case(6, 0.8)
    (tmp_path / "p.json").write_text('{"images": []}')
    with pytest.raises(FlawmaskError, match="not in COCO's results format"):
        read_predictions(tmp_path / "p.json", split)
    (tmp_path / "p.json").write_text("[1]")
    with pytest.raises(FlawmaskError, match="record 0 is not an object: 1"):
        read_predictions(tmp_path / "p.json", split)


def test_a_metric_that_one_model_lacks_is_left_out() -> None:
    split = make_split([[], []])
    found = [predicted(), predicted(instance("crack", 0.9, rectangle(1, 1, 5, 5)))]
    result = compared(split, found, [predicted(), predicted()])
    assert set(result["figures"]) == {"accuracy"}
