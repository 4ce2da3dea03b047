"""Results in the form of `evaluate`: drawn parts, invented predictions, and metrics that follow from them."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flawmask.coco import CocoSplit, annotation, instance_masks, read_split, write_split
from flawmask.data.demo_drawing import DEFECTS, PRODUCTS, Defect, draw
from flawmask.evaluation.measure import measure_scores
from flawmask.evaluation.verdicts import EvaluatedImage
from flawmask.files import write_json
from flawmask.good_names import GOOD
from flawmask.images import encode_png
from flawmask.masks import Mask, box_of, components, decode, to_rle

CATEGORIES = [{"id": 1, "name": "good"}, {"id": 2, "name": "defect"}]
KINDS: tuple[Defect | None, ...] = (None, *DEFECTS, None)
DISTINCT = 24  # drawings; more images than these are copies of them


def make_dataset(folder: Path, count: int = 12, size: int = 96, seed: int = 0) -> Path:
    """Write a COCO folder with a split `val` of drawn parts, a third of them good, and return it."""
    drawings = []
    for index in range(min(count, DISTINCT)):
        rng, kind = np.random.default_rng([seed, index]), KINDS[index % len(KINDS)]
        product = list(PRODUCTS)[index // len(KINDS) % len(PRODUCTS)]
        drawings.append((kind or GOOD, *draw(rng, product, kind, size)))
    files = [encode_png(pixels) for _, pixels, _ in drawings]
    (folder / "val" / "images").mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        defect_type, _, mask = drawings[index % len(drawings)]
        name = f"{defect_type}_{index:03d}.png"
        (folder / "val" / "images" / name).write_bytes(files[index % len(files)])
        images.append({"id": index + 1, "file_name": name, "width": size, "height": size, "defect_type": defect_type})
        regions = components(mask) if defect_type != GOOD else [np.ones((size, size), dtype=bool)]
        for region in regions:
            category = 1 if defect_type == GOOD else 2
            annotations.append(annotation(region, id=len(annotations) + 1, image_id=index + 1, category_id=category))
    write_split(folder / "val", images, annotations, CATEGORIES)
    write_json(folder / "dataset_info.json", _dataset_info(images))
    return folder


def _dataset_info(images: Sequence[dict[str, Any]]) -> dict[str, Any]:
    kinds = [image["defect_type"] for image in images]
    by_type = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
    counts: dict[str, Any] = {"images": len(kinds), "good": by_type.get(GOOD, 0), "by_type": by_type}
    prepared = {
        "made_by": "flawmask prepare",
        "settings": {"seed": 42, "train_ratio": 0.8, "classes": "defect", "group_by": None, "link": "copy"},
        "source": {"category": "drawn", "sha256": "c0ffee" * 10},
        "version": "0.1.0",
        "train": counts,
        "val": counts,
        "left_out": [{"file": "drawn/test/hole/009.png", "reason": "drawn/test/hole/009.png has no mask: draw it"}],
    }
    return {
        "made_by": "flawmask augment",
        "settings": {"seed": 42, "augmentation_factor": 3, "augment_val": False},
        "source": {"dataset": "drawn", "sha256": "decade" * 10},
        "version": "0.1.0",
        "source_info": prepared,
        "train": {**counts, "images": 4 * counts["images"]},
        "val": counts,
    }


def make_run(folder: Path, dataset: Path, *, conf: float = 0.5, min_area: int = 0, seed: int = 0) -> Path:
    """Write a run folder whose model evaluated the data set, and return its results folder, `inference_val`."""
    results = folder / "inference_val"
    results.mkdir(parents=True)
    split = read_split(dataset, "val")
    predictions = _predictions(split, np.random.default_rng(seed))
    evaluated = _evaluated(split, predictions, conf, min_area)
    write_json(results / "predictions.json", predictions)
    write_json(results / "metrics.json", _metrics(evaluated, dataset, folder, conf, min_area))
    write_json(results / "curves.json", _curves(evaluated))
    _write_table(results / "predictions.csv", evaluated)
    write_json(folder / "config.json", _config(folder, dataset, seed))
    write_json(folder / "history.json", _history(seed))
    return results


def _predictions(split: CocoSplit, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Most defects are predicted, a little displaced; some twice, some with a low score. So are some good parts."""
    found = []
    for image in split.images:
        shape = image["height"], image["width"]
        for mask in instance_masks(split.defects(image), *shape, "made"):
            for score in (rng.beta(5, 1.6), *([0.2 * rng.random() + 0.05] if rng.random() < 0.3 else [])):
                found.append(_detection(image, _moved(mask, rng), float(score)))
        if rng.random() < 0.5:
            blob = np.zeros(shape, dtype=bool)
            y, x = (int(rng.integers(0, side - 12)) for side in shape)
            blob[y : y + 12, x : x + 9] = True
            found.append(_detection(image, blob, float(0.05 + 0.9 * rng.beta(1, 3))))
        found.append({**_detection(image, np.ones(shape, dtype=bool), 0.9), "category_id": 1})
    return found


def _moved(mask: Mask, rng: np.random.Generator) -> Mask:
    down, across = (int(step) for step in rng.integers(-2, 3, 2))
    return np.roll(mask, (down, across), axis=(0, 1))


def _detection(image: dict[str, Any], mask: Mask, score: float) -> dict[str, Any]:
    box = [float(side) for side in box_of(mask)]
    return {"image_id": image["id"], "category_id": 2, "bbox": box, "score": score, "segmentation": to_rle(mask)}


def _evaluated(
    split: CocoSplit, predictions: Sequence[dict[str, Any]], conf: float, min_area: int
) -> list[EvaluatedImage]:
    evaluated = []
    for image in split.images:
        shape = image["height"], image["width"]
        scores = [
            one["score"]
            for one in predictions
            if one["image_id"] == image["id"]
            and one["category_id"] == 2
            and decode(one["segmentation"], *shape).sum() >= min_area
        ]
        best = max(scores, default=0.0)
        verdict = bool(scores) and best >= conf
        evaluated.append(
            EvaluatedImage(image["file_name"], image["defect_type"], split.is_defective(image), verdict, best)
        )
    return evaluated


def _metrics(evaluated: list[EvaluatedImage], dataset: Path, run: Path, conf: float, min_area: int) -> dict[str, Any]:
    """The metrics of the verdicts are right; those of instances and pixels are invented."""
    figures = measure_scores(evaluated, resamples=0, seed=0)
    good = figures["fp_defect"] + figures["tn_good"]
    defective = figures["tp_defect"] + figures["fn_defect"]
    figures["false_alarm_rate"] = figures["fp_defect"] / good if good else None
    made_up = {
        "image_auroc": 0.931, "image_ap": 0.964, "image_f1_max": 0.941, "image_f1_max_threshold": 0.4217,
        "ece": 0.083, "ece_calibrated": 0.041,
        "mask_ap": 0.512, "mask_ap50": 0.803, "mask_ap75": 0.547, "mask_ap_small": None,
        "mask_ap_medium": 0.498, "mask_ap_large": 0.561, "mask_ar": 0.583, "box_ap": 0.55, "box_ap50": 0.84,
        "box_ap75": 0.61, "box_ar": 0.62, "mean_mask_iou": 0.664, "pixel_auroc": 0.957, "pixel_ap": 0.702,
        "pixel_aupro": 0.841, "pixel_aupro_05": 0.588, "pixel_iou": 0.534, "pixel_dice": 0.696, "pixel_f1_max": 0.711,
        "pixel_f1_max_threshold": 0.38,
    }  # fmt: skip
    intervals: dict[str, Any] = {
        key: None if value is None else [max(0.0, value - 0.06), min(1.0, value + 0.04)]
        for key, value in made_up.items()
    }
    for name, part, whole in (
        ("recall", figures["tp_defect"], defective),
        ("precision", figures["tp_defect"], figures["tp_defect"] + figures["fp_defect"]),
        ("false_alarm_rate", figures["fp_defect"], good),
        ("accuracy", figures["tp_defect"] + figures["tn_good"], len(evaluated)),
    ):
        intervals[name] = wilson(part, whole)
    intervals["false_alarms_at_recall_95"] = [0.02, 0.4]
    missed = [one.file_name for one in evaluated if one.outcome == "missed"]
    return {
        **figures,
        "confidence": 0.79,
        **made_up,
        "false_alarms_at_recall": {"100": 0.5, "99": 0.5, "95": 0.1},
        "recall_at_false_alarms": {"5": 0.9, "1": 0.6},
        "confusion": {
            "classes": ["good", "defect"],
            "rows": [[figures["tn_good"], figures["fp_defect"]], [figures["fn_defect"], figures["tp_defect"]]],
        },
        "ap_by_class": {"defect": {"mask_ap": 0.512, "mask_ap50": 0.803, "box_ap": 0.55, "box_ap50": 0.84}},
        "instance_errors": {"localisation": 3, "duplicate": 2, "background": 4, "missed": len(missed)},
        "instances": {"truth": 50, "found": 48, "matched": 41},
        "missed_instances": [
            {"file": name, "annotation_id": number, "bbox": [10, 12, 30, 8], "area": 187, "best_iou": 0.31}
            for number, name in enumerate(missed)
        ],
        "spurious_instances": [
            {"file": evaluated[0].file_name, "label": "defect", "score": 0.83, "bbox": [3.2, 4, 12, 9], "area": 108,
             "kind": "background"},
        ],
        "seconds_per_image": 0.241,
        "seconds": {"read": 0.011, "network": 0.213, "post": 0.017},
        "intervals": intervals,
        "interval_method": dict.fromkeys(intervals, "wilson"),
        "resamples": 1000,
        "threshold": {
            "value": conf, "how": "aim", "aim": "recall=0.99", "chosen_on": "val", "interval": [0.41, 0.62],
            "same_split": True,
        },
        "notes": ["The threshold was chosen on this very split: its figures flatter.",
                  "mask_ap_small is n/a: no defect is below 32 x 32 pixels."],
        "conf": conf,
        "min_area": min_area,
        "split": "val",
        "dataset": dataset.as_posix(),
        "model": (run / "best.pt").as_posix(),
    }  # fmt: skip


def wilson(part: int, whole: int) -> list[float] | None:
    """The 95 % interval of a proportion (Wilson, 1927)."""
    if not whole:
        return None
    z, share = 1.959964, part / whole
    centre, spread = share + z * z / (2 * whole), z * (share * (1 - share) / whole + (z / (2 * whole)) ** 2) ** 0.5
    return [max(0.0, (centre - spread) / (1 + z * z / whole)), min(1.0, (centre + spread) / (1 + z * z / whole))]


def _curves(evaluated: list[EvaluatedImage]) -> dict[str, Any]:
    ordered = sorted(evaluated, key=lambda one: -one.score)
    truth = np.array([one.truth for one in ordered])
    found, alarms = truth.cumsum(), (~truth).cumsum()
    recall = found / max(1, truth.sum())
    steps = np.linspace(0, 1, 60)
    calibration = []
    for low in np.arange(10) / 10:
        inside = [one for one in evaluated if low <= one.score < low + 0.1 or (low == 0.9 and one.score == 1)]
        mean = float(np.mean([one.score for one in inside])) if inside else None
        share = float(np.mean([one.truth for one in inside])) if inside else None
        row = {"low": float(low), "high": float(low + 0.1), "count": len(inside)}
        calibration.append({**row, "mean_score": mean, "share_defective": share})
    return {
        "roc": {"x": [0.0, *(alarms / max(1, (~truth).sum())).tolist()], "y": [0.0, *recall.tolist()]},
        "pr": {"x": [0.0, *recall.tolist()], "y": [1.0, *(found / (found + alarms)).tolist()]},
        "mask_pr": {"x": steps.tolist(), "y": (0.98 - 0.7 * steps**6).tolist()},
        "pro": {"x": (0.3 * steps).tolist(), "y": (1 - np.exp(-14 * steps) * 0.9).tolist()},
        "pixel_roc": {"x": (steps**3).tolist(), "y": (steps**0.5).tolist()},
        "pixel_pr": {"x": steps.tolist(), "y": (0.95 - 0.8 * steps**4).tolist()},
        "calibration": calibration,
    }


def _write_table(path: Path, evaluated: list[EvaluatedImage]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file", "defect_type", "truth", "verdict", "score"])
        for one in evaluated:
            names = ("defect" if is_defect else "good" for is_defect in (one.truth, one.verdict))
            table.writerow([one.file_name, one.defect_type, *names, f"{one.score:.6f}"])


def _config(run: Path, dataset: Path, seed: int) -> dict[str, Any]:
    return {
        "made_by": "flawmask train",
        "settings": {
            "seed": seed, "epochs": 8, "lr": 0.005, "arch": "maskrcnn_resnet18_fpn", "weights": "coco",
            "overwrite": True, "num_classes": None, "anchor_sizes": [8, 16, 32, 64, 128],
            "dataset_dir": dataset.as_posix(), "output_dir": run.as_posix(),
        },
        "model": {"arch": "maskrcnn_resnet18_fpn", "classes": ["good", "defect"]},
        "weights": "COCO weights of torchvision",
        "device": "cpu",
        "precision": "bfloat16",
        "cores": 2,
        "versions": {"flawmask": "0.1.0", "torch": "2.15.0", "torchvision": "0.29.2", "python": "3.11.7"},
    }  # fmt: skip


def _history(seed: int) -> dict[str, list[Any]]:
    epochs = np.arange(1, 9)
    loss = 2.5 / epochs**0.7 + 0.1 * np.random.default_rng(seed).random(8)
    return {
        "epoch": epochs.tolist(),
        "train_loss": loss.tolist(),
        "val_loss": (loss * 1.15 + 0.05).tolist(),
        "seconds": [21.5] * 8,
    }
