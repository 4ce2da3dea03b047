"""The proof that an exported network predicts the same as its checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from pycocotools import mask as rle_tools

from flawmask import images
from flawmask.coco import CocoSplit
from flawmask.evaluation.against import Other, compare
from flawmask.evaluation.evaluate import predict_split
from flawmask.export.config import ExportConfig
from flawmask.inference.backend import Backend, Image, detect, prepared
from flawmask.inference.exported import ExportPrecision, Manifest
from flawmask.inference.threshold import DEFAULT
from flawmask.model.spec import ModelSpec
from flawmask.prediction import Instance, Prediction, post_process

MATCHED = 0.5
"""Two instances of one class are the same one if their masks have at least this IoU, as in COCO."""

LARGEST = 1024
"""Odd images are parts of this height and width at most, so that the proof takes no longer for large images."""

ENOUGH = 20
"""So many instances are needed to judge by the mean IoU of their masks."""


@dataclass(frozen=True)
class Tolerance:
    """How far an export may differ from its checkpoint.

    Attributes:
        verdict: a verdict may change only if the checkpoint's score is closer to the threshold than this.
        ap: how much lower mask AP may be, or box AP without masks; None for --max_drop.
        iou: the lowest mean IoU of the masks of the same instances, if they are `ENOUGH`.
    """

    verdict: float
    ap: float | None
    iou: float


TOLERANCES: dict[ExportPrecision, Tolerance] = {
    "fp32": Tolerance(verdict=0.0, ap=0.005, iou=0.99),
    "fp16": Tolerance(verdict=0.02, ap=0.005, iou=0.95),
    "bf16": Tolerance(verdict=0.05, ap=0.005, iou=0.9),
    "int8": Tolerance(verdict=0.15, ap=None, iou=0.8),
}


def prove(
    original: Backend, export: Backend, splits: Mapping[str, CocoSplit], manifest: Manifest, config: ExportConfig
) -> dict[str, Any]:
    """Return the content of `parity.json`.

    Returns:
        `format`, `precision`; `tolerance`, see `Tolerance`; `conf` and `min_area` of the verdicts; `splits`: for each
        split what `_compared` returns, with `against`, all metrics of both and the paired intervals of their
        differences (`against.compare`), and `seconds` per image of both; `odd`: what `_compared` returns for each kind
        of odd images; and `failures`: what lies outside the tolerance, as sentences.
    """
    tolerance = TOLERANCES[manifest.precision]
    allowed_drop = config.max_drop if tolerance.ap is None else tolerance.ap
    conf = DEFAULT if manifest.threshold is None else manifest.threshold.value
    min_area = config.min_area or 0
    limits = _Limits(conf, min_area, tolerance.verdict)
    failures: list[str] = []
    reports: dict[str, Any] = {}
    for name, split in splits.items():
        before, seconds_before = predict_split(original, split)
        after, seconds_after = predict_split(export, split, batch_size=2)
        names = [image["file_name"] for image in split.images]
        report = _compared(names, before, after, limits)
        other = Other("the checkpoint", before, conf, min_area)
        sampling: dict[str, Any] = {"min_area": min_area, "resamples": config.resamples, "seed": config.seed}
        report["against"] = compare(split, after, conf, other, **sampling)
        report["seconds"] = {"checkpoint": seconds_before, "export": seconds_after}
        failures += _failures(name, report, tolerance)
        failures += _lost_precision(name, report, allowed_drop)
        reports[name] = report
    first = next(iter(splits.values()))
    odd = {name: _odd(original, export, several, limits) for name, several in odd_images(first, manifest.spec).items()}
    failures += [line for name, report in odd.items() for line in _failures(f"odd images ({name})", report, tolerance)]
    return {
        "format": manifest.format,
        "precision": manifest.precision,
        "tolerance": {**asdict(tolerance), "ap": allowed_drop},
        "conf": conf,
        "min_area": min_area,
        "splits": reports,
        "odd": odd,
        "failures": failures,
    }


@dataclass(frozen=True)
class _Limits:
    conf: float
    min_area: int
    verdict: float


def _lost_precision(name: str, report: Mapping[str, Any], allowed: float) -> list[str]:
    figures = report["against"]["figures"]
    key = "mask_ap" if "mask_ap" in figures else "box_ap"
    if key not in figures or figures[key]["difference"] >= -allowed:
        return []
    return [f"{name}: {key} fell by {-figures[key]['difference']:.4f}, more than {allowed}"]


def _compared(
    names: Sequence[str], before: Sequence[Prediction], after: Sequence[Prediction], limits: _Limits
) -> dict[str, Any]:
    """Return how two models' predictions for the same images differ.

    Returns:
        `images`: their number; `without_detections`: those on which the checkpoint finds nothing; `changed_verdicts`:
        for each verdict that changed, `file`, `before` and `after`, the scores, and `is_allowed`; `largest_score`: the
        largest difference of an image's score; `unmatched`: instances at or above the threshold without a counterpart
        among the other model's; and of those with one `largest_instance_score`, `largest_box` in pixels, `mean_iou` and
        `lowest_iou` of the masks (None without any).
    """
    changed, scores, pairs, unmatched = [], [], [], 0
    for name, one, other in zip(names, before, after, strict=True):
        old, new = (each.verdict(limits.conf, limits.min_area) for each in (one, other))
        scores.append(abs(old.score - new.score))
        if old.is_defect != new.is_defect:
            is_allowed = abs(old.score - limits.conf) < limits.verdict
            changed.append({"file": name, "before": old.score, "after": new.score, "is_allowed": is_allowed})
        found, alone = _matched(one, other, limits.conf)
        pairs += found
        unmatched += alone
    ious = [iou for _, _, iou in pairs]
    return {
        "images": len(names),
        "without_detections": sum(len(one) == 0 for one in before),
        "changed_verdicts": changed,
        "largest_score": max(scores),
        "unmatched": unmatched,
        "matched": len(pairs),
        "largest_instance_score": max((abs(one.score - other.score) for one, other, _ in pairs), default=None),
        "largest_box": max((_box_difference(one, other) for one, other, _ in pairs), default=None),
        "mean_iou": float(np.mean(ious)) if ious else None,
        "lowest_iou": min(ious, default=None),
    }


def _matched(one: Prediction, other: Prediction, conf: float) -> tuple[list[tuple[Instance, Instance, float]], int]:
    """Return the pairs of the same instance in both predictions with their IoU, and how many have no counterpart.

    An instance with a pixel that scores at least `conf` looks for its counterpart among all of the other prediction's.
    """
    pairs, alone = [], 0
    for these, others in ((one, other), (other, one)):
        for instance in (each for each in these.instances if each.score >= conf and each.area):
            candidates = [each for each in others.instances if each.label == instance.label]
            if candidates:
                ious = rle_tools.iou([instance.rle], [each.rle for each in candidates], [0] * len(candidates))[0]
            best = int(np.argmax(ious)) if candidates else None
            if best is None or ious[best] < MATCHED:
                alone += 1
            elif these is one:
                pairs.append((instance, candidates[best], float(ious[best])))
    return pairs, alone


def _box_difference(one: Instance, other: Instance) -> float:
    return float(np.abs(np.subtract(one.box, other.box)).max())


def _failures(name: str, report: Mapping[str, Any], tolerance: Tolerance) -> list[str]:
    outside = [row for row in report["changed_verdicts"] if not row["is_allowed"]]
    lines = [f"the verdict of {row['file']} changed, {row['before']:.4f} to {row['after']:.4f}" for row in outside]
    iou = report["mean_iou"]
    if iou is not None and iou < tolerance.iou and report["matched"] >= ENOUGH:
        lines.append(f"the masks have a mean IoU of {iou:.3f}, below {tolerance.iou}")
    return [f"{name}: {line}" for line in lines]


def _odd(original: Backend, export: Backend, several: Sequence[Image], limits: _Limits) -> dict[str, Any]:
    """Return what `_compared` returns for images that the checkpoint sees one by one, and the export as one batch."""
    before, after = [detect(original, one) for one in several], _predicted(export, several)
    return _compared([f"{one.shape[1]}x{one.shape[0]}" for one in several], before, after, limits)


def _predicted(backend: Backend, several: Sequence[Image]) -> list[Prediction]:
    """Return the predictions for images in one batch. With tiles, a batch holds those of one image."""
    spec = backend.spec
    if spec.tile is not None:
        return [detect(backend, one) for one in several]
    raw = backend.infer([prepared(one, backend) for one in several])
    return [
        post_process(one, spec.classes, *image.shape[:2], join=spec.join)
        for one, image in zip(raw, several, strict=True)
    ]


def odd_images(split: CocoSplit, spec: ModelSpec) -> dict[str, list[Image]]:
    """Return images that a data set rarely has, made from its first ones, by kind.

    They show at most `LARGEST` pixels a side of these; one and a half tiles, if the network sees tiles.
    """
    side = spec.tile * 3 // 2 if spec.tile else LARGEST
    whole = (images.read_image(split.image_path(image), spec.intensity) for image in split.images[:4])
    first = [one[:side, :side].copy() for one in whole]  # a view would keep the whole image in memory
    height, width = first[0].shape[:2]
    small = [one[: -(-height // 2), : -(-width // 2)] for one in first]
    low, high = spec.intensity
    deep = (low + first[0][..., 0] / 255 * (high - low)).round().astype(np.uint16)
    return {
        "empty": [np.zeros_like(first[0]), np.full_like(first[0], 255)],
        "odd sizes": [np.ascontiguousarray(one[: max(1, height - 7), : max(1, width - 3)]) for one in first],
        "one pixel thin": [first[0][:1], first[0][:, :1], first[0][:1, :1]],
        "grey": [images.to_rgb(one[..., 1]) for one in first],
        "16 bits": [images.to_rgb(deep, spec.intensity)],
        "batch": [small[number % len(small)] for number in range(8)],
        "sizes mixed": [one[: max(1, height - 9 * number), :width] for number, one in enumerate(first)],
    }
