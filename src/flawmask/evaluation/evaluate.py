"""Judge a labelled split: run the network over it, compare, and write figures, tables and pictures."""

import csv
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flawmask import images
from flawmask.coco import CocoSplit, Record, instance_masks, read_split
from flawmask.draw import PREDICTION, TRUTH, fit, fit_mask, outline, side_by_side, title_bar
from flawmask.errors import FlawmaskError
from flawmask.evaluation.config import EvaluateConfig
from flawmask.evaluation.segments import average_precision, coco_results, mean_mask_iou
from flawmask.evaluation.verdicts import Judged, image_metrics
from flawmask.files import check_output_folder, whole_folder, write_json
from flawmask.inference.overlay import draw_instances, viewing_size
from flawmask.inference.predictor import Prediction, Predictor, check_classes
from flawmask.progress import track
from flawmask.settings import require

log = logging.getLogger(__name__)

ENTRIES = ("metrics.json", "predictions.json", "predictions.csv", "overlays")


@dataclass(frozen=True)
class Evaluated:
    """What `evaluate` found.

    Attributes:
        results_dir: where `metrics.json`, `predictions.json`, `predictions.csv` and `overlays/` are.
        metrics: the content of `metrics.json`.
    """

    results_dir: Path
    metrics: dict[str, Any]


def evaluate(config: EvaluateConfig) -> Evaluated:
    """Judge a split and write the results.

    Raises:
        FlawmaskError: the checkpoint or the data set is damaged, they do not belong together, an image cannot be
            read, or the output folder holds something else. Nothing is written then.
    """
    check_output_folder(config.results_dir, "metrics.json", overwrite=True, what="evaluation", entries=ENTRIES)
    split = read_split(config.dataset_dir, config.split)
    predictor = Predictor(config.model, config.device)
    check_classes(predictor.spec, split.class_names, config.dataset_dir)
    classes = len(predictor.spec.classes)
    require(
        config.num_classes in (None, classes),
        f"--num_classes is {config.num_classes}, but {config.model} has {classes}: {', '.join(predictor.spec.classes)}",
    )
    predictions, seconds = predict_split(predictor, split)
    judged = judge(split, predictions, config.conf, config.min_area)
    metrics = split_metrics(split, predictions, judged, config.conf, config.min_area)
    metrics |= {
        "seconds_per_image": seconds,
        "conf": config.conf,
        "min_area": config.min_area,
        "split": config.split,
        "dataset": config.dataset_dir.as_posix(),
        "model": config.model.as_posix(),
    }
    with whole_folder(config.results_dir) as folder:
        write_json(folder / "metrics.json", metrics)
        write_json(folder / "predictions.json", coco_results(split, predictions))
        _write_table(folder / "predictions.csv", judged, predictions, config)
        _draw_worst(folder / "overlays", split, judged, predictions, config)
    log.info("evaluated %d images of %s: results in %s", len(judged), split.folder, config.results_dir)
    return Evaluated(config.results_dir, metrics)


def predict_split(
    predictor: Callable[[npt.NDArray[np.uint8]], Prediction], split: CocoSplit
) -> tuple[list[Prediction], float]:
    """Return a prediction for each image of the split, and the median seconds that one took, reading included.

    Raises:
        FlawmaskError: an image cannot be read or is not of the size that its record says.
    """
    predictions, seconds = [], []
    for image in track(split.images, f"judging {split.folder.name}"):
        start = time.perf_counter()
        path = split.image_path(image)
        pixels = images.read_image(path)
        if pixels.shape[:2] != (image["height"], image["width"]):
            size = f"{pixels.shape[1]}x{pixels.shape[0]}"
            raise FlawmaskError(f"{path} is {size} but its record says {image['width']}x{image['height']}")
        predictions.append(predictor(pixels))
        seconds.append(time.perf_counter() - start)
    return predictions, float(np.median(seconds))


def judge(split: CocoSplit, predictions: Sequence[Prediction], conf: float, min_area: int) -> list[Judged]:
    """Return each image's truth and verdict."""
    judged = []
    for image, prediction in zip(split.images, predictions, strict=True):
        verdict = prediction.verdict(conf, min_area)
        judged.append(
            Judged(
                file_name=image["file_name"],
                defect_type=image.get("defect_type", "unknown"),
                truth=split.is_defective(image),
                verdict=verdict.is_defect,
                score=verdict.score,
            )
        )
    return judged


def split_metrics(
    split: CocoSplit, predictions: Sequence[Prediction], judged: Sequence[Judged], conf: float, min_area: int
) -> dict[str, Any]:
    """Return the figures of `metrics.json` that follow from truth and predictions alone."""
    scores = [one.score for prediction in predictions for one in prediction.instances if one.score >= conf]
    return {
        **image_metrics(judged),
        "confidence": float(np.mean(scores)) if scores else None,
        **average_precision(split, coco_results(split, predictions)),
        "mean_mask_iou": mean_mask_iou(split, predictions, conf, min_area),
    }


def _write_table(
    path: Path, judged: Sequence[Judged], predictions: Sequence[Prediction], config: EvaluateConfig
) -> None:
    """Write a line per image: truth, verdict, score, instances, defect area in pixels and per cent."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(
            ["file", "defect_type", "truth", "verdict", "score", "instances", "defect_area_px", "defect_area_percent"]
        )
        for one, prediction in zip(judged, predictions, strict=True):
            names = ["defect" if is_defect else "good" for is_defect in (one.truth, one.verdict)]
            found = defect_columns(prediction, config.conf, config.min_area)
            table.writerow([one.file_name, one.defect_type, *names, f"{one.score:.6f}", *found])


def defect_columns(prediction: Prediction, conf: float, min_area: int) -> tuple[int, int, str]:
    """Return how many defects there are, the pixels that they cover together, and these in per cent of the image."""
    area = int(prediction.defect_mask(conf, min_area).sum())
    share = 100 * area / (prediction.height * prediction.width)
    return len(prediction.defects(conf, min_area)), area, f"{share:.4f}"


def _draw_worst(
    folder: Path,
    split: CocoSplit,
    judged: Sequence[Judged],
    predictions: Sequence[Prediction],
    config: EvaluateConfig,
) -> None:
    """Draw truth beside prediction: wrong verdicts first, and among equals those whose score was furthest off."""
    folder.mkdir()
    order = sorted(
        range(len(judged)), key=lambda at: (judged[at].outcome == "right", -abs(judged[at].truth - judged[at].score))
    )
    for rank, at in enumerate(track(order[: config.overlays], "drawing"), start=1):
        one, image = judged[at], split.images[at]
        name = f"{rank:03d}_{one.outcome}_{Path(one.file_name).stem}.png"
        (folder / name).write_bytes(images.encode_png(_overlay(split, image, one, predictions[at], config)))


def _overlay(
    split: CocoSplit, image: Record, one: Judged, prediction: Prediction, config: EvaluateConfig
) -> npt.NDArray[np.uint8]:
    path = split.image_path(image)
    pixels = images.read_image(path)
    size = viewing_size(pixels, panels=2)
    left = fit(pixels, *size)
    for mask in instance_masks(split.defects(image), prediction.height, prediction.width, str(path)):
        left = outline(left, fit_mask(mask, *size), TRUTH)
    right = draw_instances(pixels, prediction.defects(config.conf, config.min_area), PREDICTION, size)
    verdict = f"verdict: {'defect' if one.verdict else 'good'} ({one.score:.2f})"
    return side_by_side(title_bar(left, f"truth: {one.defect_type}"), title_bar(right, verdict))
