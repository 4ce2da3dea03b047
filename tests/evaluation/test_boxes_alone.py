"""Networks that predict boxes and no masks: they are evaluated by boxes, without metrics of masks and pixels."""

import contextlib
import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade_split import NAMES, blob, make_split, predicted, rectangle, shaken
from handmade_split import instance as outlined
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from random_network import network, patchwork, spec_of

from flawmask.coco import CocoSplit, annotation, read_split, write_split
from flawmask.errors import FlawmaskError
from flawmask.evaluation.against import Other, compare, read_other, read_predictions
from flawmask.evaluation.average_precision import coco_results
from flawmask.evaluation.config import EvaluateConfig
from flawmask.evaluation.evaluate import evaluate
from flawmask.evaluation.instances import instance_errors
from flawmask.evaluation.measure import SplitMetrics, measure, quick_figures
from flawmask.evaluation.summary import summary
from flawmask.images import write_png
from flawmask.inference.config import PredictConfig
from flawmask.inference.predict import predict
from flawmask.masks import Mask, rle_of_box
from flawmask.model import checkpoint
from flawmask.prediction import Instance, Prediction

MASK_FIGURES = ("mask_ap", "mask_ap50", "mask_ap75", "mask_ar", "mask_ap_small", "mask_ap_medium", "mask_ap_large")
PIXEL_FIGURES = ("auroc", "ap", "aupro", "aupro_05", "iou", "dice", "f1_max", "f1_max_threshold")
NEVER = (*MASK_FIGURES, "mean_mask_iou", *(f"pixel_{name}" for name in PIXEL_FIGURES))
"""The metrics that a network without masks lacks."""


def boxed(label: str, score: float, mask: Mask) -> Instance:
    """The box of a mask, as such a network predicts it."""
    whole = outlined(label, score, mask)
    rle = rle_of_box(whole.box, *mask.shape)
    return replace(whole, rle=rle, area=int((whole.box[2] - whole.box[0]) * (whole.box[3] - whole.box[1])))


def found_boxes(*instances: Instance) -> Prediction:
    return replace(predicted(*instances), has_masks=False)


def random_case(seed: int, images: int = 10) -> tuple[CocoSplit, list[Prediction]]:
    random = np.random.default_rng(seed)
    truths = [
        [(int(random.choice([1, 3, 7])), blob(random)) for _ in range(random.integers(0, 4))] for _ in range(images)
    ]
    predictions = [
        found_boxes(
            *(boxed(NAMES[category], float(random.random()), shaken(mask, random)) for category, mask in truth),
            *([boxed("crack", float(random.random()), blob(random))] if at % 3 else []),
        )
        for at, truth in enumerate(truths)
    ]
    return make_split([*truths, []]), [*predictions, found_boxes()]


def measured(split: CocoSplit, predictions: list[Prediction]) -> SplitMetrics:
    return measure(split, predictions, 0.5, 0, resamples=30, seed=0)


def test_every_figure_of_masks_and_pixels_is_none_and_never_0() -> None:
    split, predictions = random_case(0)
    found = measured(split, predictions)
    for name in NEVER:
        assert found.metrics[name] is None, name
        assert name not in found.metrics["intervals"], name
    for figures in found.metrics["ap_by_class"].values():
        assert {name for name, value in figures.items() if value is None} == {*MASK_FIGURES[:4]}
    assert not {"mask_pr"} & set(found.curves)
    assert not [name for name in found.curves if name.startswith("pixel")]
    assert any("predicts boxes and no masks" in note for note in found.metrics["notes"])
    assert quick_figures(split, predictions)["segm_ap"] is None


def test_the_other_figures_are_there_with_their_intervals() -> None:
    metrics = measured(*random_case(0)).metrics
    for name in ("accuracy", "recall", "image_auroc", "box_ap", "box_ap50"):
        assert metrics[name] is not None, name
        low, high = metrics["intervals"][name]
        assert low <= high
    assert metrics["box_ap"] > 0


def test_without_detections_the_box_ap_is_0_and_the_mask_ap_undefined() -> None:
    split, predictions = random_case(1)
    metrics = measured(split, [found_boxes() for _ in predictions]).metrics
    assert metrics["box_ap"] == 0
    assert [metrics[name] for name in NEVER] == [None] * len(NEVER)


@pytest.mark.parametrize("seed", range(4))
def test_figures_of_boxes_are_those_of_pycocotools(seed: int) -> None:
    split, predictions = random_case(seed)
    results = list(coco_results(split, predictions))
    assert results
    assert not any("segmentation" in record for record in results)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        annotations = [dict(one) for image in split.images for one in split.annotations[image["id"]]]
        truth.dataset = {
            "images": list(split.images),
            "annotations": annotations,
            "categories": list(split.categories),
        }
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes([dict(one) for one in results]), "bbox")
        evaluator.params.imgIds = [image["id"] for image in split.images]
        evaluator.params.catIds = sorted(split.defect_ids)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    metrics = measured(split, predictions).metrics
    for name, place in {"ap": 0, "ap50": 1, "ap75": 2, "ar": 8}.items():
        assert metrics[f"box_{name}"] == pytest.approx(float(evaluator.stats[place]), abs=1e-6), name


def ring() -> Mask:
    """A frame 20 pixels wide and high and 2 pixels thick: it fills little of its box."""
    return rectangle(10, 10, 20, 20) & ~rectangle(12, 12, 16, 16)


def test_a_defect_matches_by_its_box_even_if_it_fills_little_of_it() -> None:
    split = make_split([[(3, ring())]])
    boxes = instance_errors(split, [found_boxes(boxed("crack", 0.9, ring()))], 0.5, 0)
    assert (boxes.missed, boxes.spurious) == ([], [])
    # The same pixels, if they were claimed to be a mask, would cover the defect by a third.
    as_mask = instance_errors(split, [predicted(boxed("crack", 0.9, ring()))], 0.5, 0)
    assert [one["best_iou"] for one in as_mask.missed] == [pytest.approx(144 / 400)]


def test_errors_are_classified_by_boxes() -> None:
    split = make_split([[(3, ring())]])
    found = [
        found_boxes(
            boxed("crack", 0.9, rectangle(10, 10, 20, 18)),
            boxed("crack", 0.8, ring()),
            boxed("scratch", 0.7, ring()),
            boxed("crack", 0.6, rectangle(10, 10, 20, 5)),
            boxed("crack", 0.55, rectangle(45, 60, 9, 9)),
        )
    ]
    errors = instance_errors(split, found, 0.5, 0)
    assert [one["kind"] for one in errors.spurious] == ["duplicate", "classification", "localisation", "background"]
    assert errors.missed == []


def written(path: Path, split: CocoSplit, found: list[Prediction]) -> Path:
    path.write_text(json.dumps(list(coco_results(split, found))))
    return path


def test_predictions_come_back_from_their_file_and_have_no_masks_there_either(tmp_path: Path) -> None:
    split, found = random_case(3)
    back = read_predictions(written(tmp_path / "p.json", split, found), split)
    assert back == found
    assert not any(one.has_masks for one in back), "also of an image on which nothing was found"


def compared(split: CocoSplit, mine: list[Prediction], theirs: list[Prediction]) -> dict[str, Any]:
    found = compare(split, mine, 0.5, Other("other", theirs, 0.5), min_area=0, resamples=20, seed=0)
    figures: dict[str, Any] = found["figures"]
    return figures


def test_it_is_compared_with_a_network_with_masks_by_the_metrics_of_both() -> None:
    split, boxes = random_case(4)
    masks = [replace(one, has_masks=True) for one in boxes]
    for mine, theirs in ((boxes, masks), (masks, boxes)):
        figures = compared(split, mine, theirs)
        assert {"accuracy", "image_auroc", "box_ap", "box_ap50", "box_ap75"} <= set(figures)
        assert not {name for name in figures if "mask" in name}
        assert all(row["difference"] == pytest.approx(0) for row in figures.values())
    assert "mask_ap" in compared(split, masks, masks)
    assert "box_ap" in compared(split, boxes, boxes)


SPEC = spec_of("ssdlite320_mobilenet_v3_large", classes=("good", "defect"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "best.pt"
    checkpoint.save(path, network(SPEC), SPEC)
    return path


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Three defective images and a good one."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(1, 5):
        write_png(tmp_path / "data" / "val" / "images" / f"{number}.png", patchwork(60, 80, number))
        images.append({"id": number, "file_name": f"{number}.png", "width": 80, "height": 60})
        if number > 1:
            mask = rectangle(10, 10, 20, 12 + 5 * number)
            annotations.append(annotation(mask, id=number, image_id=number, category_id=2))
    write_split(
        tmp_path / "data" / "val", images, annotations, [{"id": 1, "name": "good"}, {"id": 2, "name": "defect"}]
    )
    return tmp_path / "data"


def test_evaluate_writes_metrics_table_pictures_and_report_without_masks(model: Path, dataset: Path) -> None:
    settings: dict[str, Any] = {"model": model, "dataset_dir": dataset, "device": "cpu", "resamples": 20}
    done = evaluate(EvaluateConfig(output_dir=dataset.parent / "first", **settings))
    metrics = json.loads((done.results_dir / "metrics.json").read_text())
    assert [metrics[name] for name in NEVER] == [None] * len(NEVER)
    assert metrics["box_ap"] is not None
    results = json.loads((done.results_dir / "predictions.json").read_text())
    assert len(results) > 10
    assert not any("segmentation" in record for record in results)
    with (done.results_dir / "predictions.csv").open(newline="", encoding="utf-8-sig") as lines:
        rows = list(csv.DictReader(lines))
    assert {(row["defect_area_px"], row["defect_area_percent"]) for row in rows} == {("", "")}
    assert max(int(row["instances"]) for row in rows) > 0
    assert len(list((done.results_dir / "overlays").iterdir())) == 4
    text = summary(done.metrics)
    assert "Mask AP: n/a" in text
    assert "mean mask IoU: n/a" in text
    assert "Pixels: AUROC n/a, AUPRO n/a, AP n/a, IoU n/a, Dice n/a" in text

    split = read_split(dataset, "val")
    other = read_other(done.results_dir, split, 0.5, 0)
    assert not any(one.has_masks for one in other.predictions)
    (done.results_dir / "predictions.json").write_text("[]")  # no prediction: still a network of boxes
    assert not any(one.has_masks for one in read_other(done.results_dir, split, 0.5, 0).predictions)
    (done.results_dir / "predictions.json").write_text(json.dumps(results))
    again = evaluate(EvaluateConfig(output_dir=dataset.parent / "second", against=done.results_dir, **settings))
    figures = again.metrics["against"]["figures"]
    assert {"accuracy", "box_ap"} <= set(figures)
    assert all(row["difference"] == pytest.approx(0) for row in figures.values())


def test_predict_writes_boxes_and_no_area(model: Path, dataset: Path) -> None:
    images = str(dataset / "val" / "images")
    config = PredictConfig(model=model, input=(images,), output_dir=dataset.parent / "out", device="cpu", conf=0.1)
    with pytest.raises(FlawmaskError, match=r"--save_masks: ssd.* predicts boxes and no masks"):
        predict(replace(config, save_masks=True))
    assert not config.output_dir.exists()
    done = predict(config)
    assert len(done.defective) > 0
    records = json.loads((done.output / "predictions.json").read_text())["images"]
    for record in records:
        assert record["defect_area_px"] is record["defect_area_percent"] is None
        assert all(one["segmentation"] is None for one in record["instances"])
        for one in record["instances"]:
            x, y, width, height = one["box"]
            assert 0 <= x < x + width <= 80
            assert 0 <= y < y + height <= 60
            assert one["area"] >= int(width) * int(height)
    with (done.output / "predictions.csv").open(newline="", encoding="utf-8-sig") as lines:
        assert {(row["defect_area_px"], row["defect_area_percent"]) for row in csv.DictReader(lines)} == {("", "")}
