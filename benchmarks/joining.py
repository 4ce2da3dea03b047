"""The effect of joining predictions of one class on the figures of instances: `docs/results.md`.

    python benchmarks/joining.py --models run/best.pt other/best.pt --dataset_dir DATA

    python benchmarks/joining.py --models tiles/fold_1/best.pt tiles/fold_2/best.pt --dataset_dir DATA_1 DATA_2

Each network predicts the images of a split once. Then each rule acts on the same predictions. The program prints a
table, with means of the figures and sums of the counts over the models.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import tyro
from pycocotools import mask as rle_tools

from flawmask import joining, masks
from flawmask.coco import read_split
from flawmask.evaluation.evaluate import predict_split
from flawmask.evaluation.measure import Detections
from flawmask.inference.paste import expand_boxes, probabilities_in_box
from flawmask.inference.torch_backend import TorchBackend
from flawmask.prediction import Instance, Prediction

Rule = Callable[[Prediction], Prediction]

COLUMNS = (
    *("rule", "mask AP", "mask AP 50", "box AP", "mean mask IoU", "F1 of instances"),
    *("matched", "predictions", "localisation", "duplicate", "background"),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The networks and the images."""

    models: tuple[Path, ...]
    """Checkpoints."""
    dataset_dir: tuple[Path, ...]
    """The COCO folder that holds the split, or one for each model: the folds of a cross-validation."""
    split: str = "val"
    """The split."""


def off(prediction: Prediction) -> Prediction:
    """Return the network's own predictions."""
    return prediction


def suppressed(max_overlap: float, *, of_the_smaller: bool = False) -> Rule:
    """Return mask NMS, which drops an instance that overlaps one with a higher score of its class by more than this."""

    def rule(prediction: Prediction) -> Prediction:
        overlap = overlaps(prediction.instances, of_the_smaller=of_the_smaller)
        kept: list[int] = []
        for at, label in enumerate(prediction.labels):
            if all(overlap[at, other] <= max_overlap or label != prediction.labels[other] for other in kept):
                kept.append(at)
        return prediction[kept] if kept else prediction

    return rule


def overlaps(instances: Sequence[Instance], *, of_the_smaller: bool) -> npt.NDArray[np.float64]:
    """Return the IoU of each two masks, or the share of the smaller one that the other covers: (N, N)."""
    rles, area = [one.rle for one in instances], np.array([[max(1, one.area) for one in instances]], dtype=float)
    if not rles:
        return np.zeros((0, 0))
    iou = np.asarray(rle_tools.iou(rles, rles, [False] * len(rles)))
    return iou * (area + area.T) / (1 + iou) / np.minimum(area, area.T) if of_the_smaller else iou


def touching(min_score: float) -> Rule:
    """Return Flawmask's rule with another lowest score."""

    def rule(prediction: Prediction) -> Prediction:
        with patch.object(joining, "MIN_SCORE", min_score):
            return prediction.joined()

    return rule


def overlapping(min_share: float, min_score: float) -> Rule:
    """Return the rule that joins if the other mask covers at least this share of the smaller one."""

    def rule(prediction: Prediction) -> Prediction:
        by_rle = {id(one.rle): one for one in prediction.instances}

        def shares(rles: Sequence[dict[str, object]]) -> npt.NDArray[np.bool_]:
            return overlaps([by_rle[id(rle)] for rle in rles], of_the_smaller=True) >= min_share

        with patch.object(joining, "MIN_SCORE", min_score), patch.object(masks, "touching", shares):
            return prediction.joined()

    return rule


def voted(min_score: float) -> Rule:
    """Return the rule that joins touching masks, with a mask from the mean of the probabilities, weighted by score."""

    def rule(prediction: Prediction) -> Prediction:
        with patch.object(joining, "MIN_SCORE", min_score):
            joined = prediction.joined()
        instances = [_voted(one, prediction) if one.parts else one for one in joined.instances]
        return replace(joined, instances=tuple(instances))

    return rule


def _voted(instance: Instance, prediction: Prediction) -> Instance:
    weighted, weights = np.zeros((2, prediction.height, prediction.width), dtype=np.float32)
    for one in instance.parts:
        assert one.probabilities is not None
        (box,) = expand_boxes(np.array([one.box], dtype=np.float32), len(one.probabilities))
        local, x, y = probabilities_in_box(one.probabilities, box, prediction.height, prediction.width)
        window = np.s_[y : y + local.shape[0], x : x + local.shape[1]]
        weighted[window] += one.score * local
        weights[window] += one.score
    mask = weighted > 0.5 * weights
    if not mask.any():
        return instance
    x, y, width, height = masks.box_of(mask)
    box = (float(x), float(y), float(x + width), float(y + height))
    return replace(instance, rle=masks.to_rle(mask), area=int(mask.sum()), box=box)


RULES: dict[str, Rule] = {
    "as they are (`--join off`)": off,
    "mask NMS at an IoU of 0.5": suppressed(0.5),
    "mask NMS at an IoU of 0.3": suppressed(0.3),
    "NMS where half of the smaller mask is covered": suppressed(0.5, of_the_smaller=True),
    **{
        f"joined where they touch, from a score of {score}": touching(score) for score in (0.0, 0.2, 0.3, 0.4, 0.5, 0.7)
    },
    "joined where a tenth of the smaller is covered, from 0.5": overlapping(0.1, 0.5),
    "joined where half of the smaller is covered, from 0.5": overlapping(0.5, 0.5),
    "joined where they touch, from 0.5, the mask by vote": voted(0.5),
}


def main(config: Config) -> None:
    """Print the table."""
    folders = config.dataset_dir * len(config.models) if len(config.dataset_dir) == 1 else config.dataset_dir
    results: dict[str, list[list[float]]] = {name: [] for name in RULES}
    for model, folder in zip(config.models, folders, strict=True):
        split = read_split(folder, config.split)
        predictions, _ = predict_split(_raw(model), split)
        for name, rule in RULES.items():
            detections = Detections(split, [rule(one) for one in predictions], 0.5, 0)
            figures, errors = detections.precision, detections.errors
            matched, counts = errors.truths - len(errors.missed), errors.counts
            shares = [*(figures[key] or 0.0 for key in ("mask_ap", "mask_ap50", "box_ap")), errors.mean_iou or 0.0]
            counted = [matched, errors.found, *(counts[kind] for kind in ("localisation", "duplicate", "background"))]
            results[name].append([*shares, 2 * matched / (errors.truths + errors.found), *counted])
    print(f"| {' | '.join(COLUMNS)} |\n| --- |{' ---: |' * (len(COLUMNS) - 1)}")
    for name, rows in results.items():
        shares, counted = np.mean(rows, axis=0)[:5], np.sum(rows, axis=0)[5:]
        cells = [*(f"{100 * one:.1f} %" for one in shares), *(f"{one:.0f}" for one in counted)]
        print(f"| {name} | {' | '.join(cells)} |")


def _raw(model: Path) -> TorchBackend:
    backend = TorchBackend.load(model)
    backend.spec = replace(backend.spec, join="off")
    return backend


if __name__ == "__main__":
    main(tyro.cli(Config))
