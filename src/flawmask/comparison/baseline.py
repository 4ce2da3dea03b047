"""Train and evaluate the baselines with the same images, folds, threshold and checks as the detectors."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from flawmask import images
from flawmask.coco import CocoSplit, groups_of, read_split
from flawmask.comparison import classifier, patchcore
from flawmask.comparison.config import CLASSIFIER, CompareConfig
from flawmask.comparison.entry import Entry, ImageScore, SharedData, TrainingSummary
from flawmask.data import intensity
from flawmask.errors import FlawmaskError
from flawmask.evaluation.aim import choose
from flawmask.evaluation.by_group import bootstrap, numbered
from flawmask.evaluation.evaluate import VALIDATION, threshold_notes
from flawmask.evaluation.leak import content_digests
from flawmask.evaluation.measure import measure_scores, true_mask
from flawmask.evaluation.metrics import METRICS
from flawmask.evaluation.pixels import PixelTally
from flawmask.evaluation.results import write_scores
from flawmask.evaluation.uncertainty import Groups, resample
from flawmask.evaluation.verdicts import EvaluatedImage
from flawmask.images import Levels
from flawmask.inference import threshold
from flawmask.inference.threshold import Threshold
from flawmask.progress import track
from flawmask.runs import POOLED
from flawmask.runtime import choose_device, peak_memory

Scorer = Callable[[Sequence[npt.NDArray[np.uint8]]], list[ImageScore]]

NEED_PIXEL_THRESHOLD = ("pixel_iou", "pixel_dice")
"""Pixel metrics that need a threshold for pixels. A baseline has none."""


def train_and_evaluate(config: CompareConfig, shared: SharedData, folder: Path, name: str) -> Entry:
    """Train a baseline, once or fold by fold, and evaluate it on the same images as the other models."""
    run_dir = folder / name
    run_dir.mkdir(exist_ok=True)
    chosen: Threshold | None = None
    evaluated: list[CocoSplit] = []
    scores: list[ImageScore] = []
    trainings: list[tuple[TrainingSummary, Path]] = []
    notes: list[str] = []
    folders = zip(shared.prepared_dirs, shared.training_dirs, strict=True)
    for fold, (prepared_dir, training_dir) in enumerate(folders, start=1):
        path = run_dir / (f"fold_{fold}.pt" if shared.pooled else "best.pt")
        training = read_split(training_dir, "train", config)
        # --conf auto chooses the threshold on val, even where val is not evaluated.
        chooses = config.conf == "auto" and VALIDATION not in shared.splits
        names = (*([VALIDATION] if chooses else []), *shared.splits)
        splits = [read_split(prepared_dir, one, config) for one in names]
        levels = intensity.of_dataset(config.intensity, [training])
        if name == CLASSIFIER:
            notes = _check_leak(config, training, splits, levels)
            trainings.append((classifier.train(config, training, path, levels), path))
        else:
            trainings.append((patchcore.train(config, training, splits, path, levels), path))
        scorer = load(config, name, path)
        for split in splits:
            of_split = _score(scorer, split, levels)
            if config.conf == "auto" and split.name == VALIDATION:
                chosen = _choose(config, split, of_split)
        evaluated.append(splits[-1])
        scores += of_split
    learned, best = max(trainings, key=lambda one: one[0].seconds)
    _write(config, name, evaluated, scores, chosen, notes, run_dir / shared.results_name)
    return Entry(
        name,
        results=f"{name}/{shared.results_name}",
        checkpoint=best.relative_to(folder).as_posix(),
        checkpoint_bytes=best.stat().st_size,
        learned=replace(learned, peak_bytes=peak_memory(choose_device(config.device))),
    )


def load(config: CompareConfig, name: str, path: Path) -> Scorer:
    """Return the function with which a baseline scores images, each (height, width, 3) uint8 RGB."""
    return classifier.load(config, path) if name == CLASSIFIER else patchcore.load(config, path)


def _check_leak(
    config: CompareConfig, training: CocoSplit, evaluated: Sequence[CocoSplit], levels: Levels
) -> list[str]:
    """Check whether evaluated images, or other images of their parts, were trained on; return notes, see `allow_leak`.

    Raises:
        FlawmaskError: some were, and `allow_leak` is off.
    """
    training_digests, training_groups = set(content_digests(training, levels).values()), set(training.groups or ())
    images = parts = 0
    for split in evaluated:
        groups = split.groups or [""] * len(split.images)
        for digest, group in zip(content_digests(split, levels).values(), groups, strict=True):
            images += digest in training_digests
            parts += digest not in training_digests and group in training_groups
    notes = []
    for count, are, were in ((images, "are", "were used"), (parts, "show parts that are", "show parts that were used")):
        if count and not config.allow_leak:
            raise FlawmaskError(
                f"{count} of the evaluated images {are} in {training.folder}: evaluate others, or give --allow_leak"
            )
        if count:
            notes.append(f"{count} of the evaluated images {were} for training: the figures are too good.")
    return notes


def _score(scorer: Scorer, split: CocoSplit, levels: Levels) -> list[ImageScore]:
    paths = track([split.image_path(image) for image in split.images], f"evaluating {split.name}")
    return [scorer([images.read_image(path, levels)])[0] for path in paths]


def _choose(config: CompareConfig, split: CocoSplit, scores: Sequence[ImageScore]) -> Threshold:
    truth = np.array([split.is_defective(image) for image in split.images], dtype=bool)
    groups = numbered(split.groups)
    weights = resample(truth, config.resamples, config.seed, groups)
    return choose(truth, np.array([one.score for one in scores]), weights, config.aim, VALIDATION, 0, groups)


def _write(
    config: CompareConfig,
    name: str,
    splits: Sequence[CocoSplit],
    scores: Sequence[ImageScore],
    chosen: Threshold | None,
    notes: Sequence[str],
    results_dir: Path,
) -> None:
    """Write the metrics that a baseline has: those of images and, if it scores each place of an image, of pixels."""
    pairs = [(split, image) for split in splits for image in split.images]
    groups = groups_of([image for _, image in pairs])
    group_of_image: Sequence[str | None] = groups or [None] * len(pairs)
    used = chosen or threshold.given(threshold.DEFAULT if config.conf == "auto" else config.conf)
    evaluated = [
        EvaluatedImage(
            image["file_name"],
            split.type_of(image),
            split.is_defective(image),
            one.score >= used.value,
            one.score,
            group,
        )
        for (split, image), one, group in zip(pairs, scores, group_of_image, strict=True)
    ]
    metrics = measure_scores(evaluated, resamples=config.resamples, seed=config.seed)
    # The classifier's score is a probability, with a natural threshold of 0.5. PatchCore's is a distance and has none.
    has_threshold = name == CLASSIFIER or chosen is not None
    if not has_threshold:
        of_verdicts = (one.key for one in METRICS.values() if one.group == "verdicts" and one.key != "total_images")
        dropped = [*of_verdicts, "ece", "brier"]
        names = {key.replace(".", "_") for key in dropped}
        intervals = {name: bounds for name, bounds in metrics["intervals"].items() if name not in names}
        undefined = dict.fromkeys([*(key.partition(".")[0] for key in dropped), "recall_by_type"])
        metrics |= undefined | {"intervals": intervals}
    if all(one.map is not None for one in scores) and not any(split.box_only_defects for split in splits):
        pixels = _pixels(config, pairs, scores, numbered(groups))
        metrics |= pixels | {"intervals": metrics["intervals"] | pixels["intervals"]}
    same = chosen is not None and splits[0].name == VALIDATION
    metrics |= {
        "threshold": {"value": used.value, "how": used.how, "same_split": same},
        "conf": used.value,
        "seed": config.seed,
        "split": splits[0].name if len(splits) == 1 else POOLED,
        "model": name,
        "notes": [*notes, *threshold_notes(used, len(evaluated) if same else 0, len(evaluated))],
    }
    write_scores(results_dir, evaluated, metrics, has_threshold=has_threshold)


def _pixels(
    config: CompareConfig, pairs: Sequence[tuple[CocoSplit, Any]], scores: Sequence[ImageScore], groups: Groups | None
) -> dict[str, Any]:
    """Return the pixel metrics that need no threshold, and under `intervals` their intervals."""
    tally = PixelTally()
    for (split, image), one in track(list(zip(pairs, scores, strict=True)), "counting pixels"):
        truth = true_mask(split, image)
        score_map = cv2.resize(np.asarray(one.map), truth.shape[::-1], interpolation=cv2.INTER_LINEAR)
        tally.add(image["file_name"], score_map.clip(0, 1), truth, np.zeros_like(truth))
    figures: dict[str, Any] = {key: value for key, value in tally.figures().items() if key not in NEED_PIXEL_THRESHOLD}
    truth = np.array([split.is_defective(image) for split, image in pairs], dtype=bool)
    drawn = bootstrap(tally.resampled, truth, groups, config.resamples, config.seed)
    intervals = {key: bounds for key, bounds in drawn.items() if bounds is not None and key not in NEED_PIXEL_THRESHOLD}
    return figures | {"intervals": intervals}
