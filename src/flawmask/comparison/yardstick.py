"""The yardsticks trained and judged on what the detectors are: the images, the folds, the threshold, the checks."""

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
from flawmask.comparison.entry import Entry, Ground, Learned, Scored
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
from flawmask.evaluation.verdicts import Judged
from flawmask.images import Levels
from flawmask.inference import threshold
from flawmask.inference.threshold import Threshold
from flawmask.progress import track
from flawmask.runs import POOLED
from flawmask.runtime import choose_device, peak_memory

Scorer = Callable[[Sequence[npt.NDArray[np.uint8]]], list[Scored]]

OUTLINED = ("pixel_iou", "pixel_dice")
"""The figures of pixels that are marked, which takes a threshold for pixels."""


def train_and_judge(config: CompareConfig, ground: Ground, folder: Path, name: str) -> Entry:
    """Train a yardstick, once or fold by fold, and judge it on the images that the others are judged on."""
    run_dir = folder / name
    run_dir.mkdir(exist_ok=True)
    chosen: Threshold | None = None
    judged: list[CocoSplit] = []
    scored: list[Scored] = []
    lessons: list[tuple[Learned, Path]] = []
    notes: list[str] = []
    for fold, (prepared_dir, trained_dir) in enumerate(zip(ground.prepared, ground.trained, strict=True), start=1):
        path = run_dir / (f"fold_{fold}.pt" if ground.pooled else "best.pt")
        training = read_split(trained_dir, "train", config)
        # With --conf auto val is looked at first, if only to choose the threshold.
        chooses = config.conf == "auto" and VALIDATION not in ground.splits
        names = (*([VALIDATION] if chooses else []), *ground.splits)
        splits = [read_split(prepared_dir, one, config) for one in names]
        levels = intensity.of_dataset(config.intensity, [training])
        if name == CLASSIFIER:
            notes = _leak(config, training, splits, levels)
            lessons.append((classifier.learn(config, training, path, levels), path))
        else:
            lessons.append((patchcore.learn(config, training, splits, path, levels), path))
        scorer = load(config, name, path)
        for split in splits:
            found = _score(scorer, split, levels)
            if config.conf == "auto" and split.name == VALIDATION:
                chosen = _choose(config, split, found)
        judged.append(splits[-1])
        scored += found
    learned, best = max(lessons, key=lambda one: one[0].seconds)
    _write(config, name, judged, scored, chosen, notes, run_dir / ground.results)
    return Entry(
        name,
        results=f"{name}/{ground.results}",
        checkpoint=best.relative_to(folder).as_posix(),
        checkpoint_bytes=best.stat().st_size,
        learned=replace(learned, peak_bytes=peak_memory(choose_device(config.device))),
    )


def load(config: CompareConfig, name: str, path: Path) -> Scorer:
    """Return a yardstick's function that scores images, each (height, width, 3) uint8 RGB."""
    return classifier.load(config, path) if name == CLASSIFIER else patchcore.load(config, path)


def _leak(config: CompareConfig, training: CocoSplit, judged: Sequence[CocoSplit], levels: Levels) -> list[str]:
    """Refuse to judge images that were trained on, or whose parts were, as `evaluate` does, or return notes of it.

    Raises:
        FlawmaskError: there are some, and `allow_leak` is off.
    """
    known, trained = set(content_digests(training, levels).values()), set(training.groups or ())
    seen = parts = 0
    for split in judged:
        of_images = split.groups or [""] * len(split.images)
        for digest, group in zip(content_digests(split, levels).values(), of_images, strict=True):
            seen += digest in known
            parts += digest not in known and group in trained
    said = []
    for count, are, were in ((seen, "are", "were"), (parts, "show parts that are", "show parts that were")):
        if count and not config.allow_leak:
            raise FlawmaskError(
                f"{count} of the judged images {are} in {training.folder}: judge others, or --allow_leak"
            )
        if count:
            said.append(f"{count} of the judged images {were} trained on: the figures are too good.")
    return said


def _score(scorer: Scorer, split: CocoSplit, levels: Levels) -> list[Scored]:
    paths = track([split.image_path(image) for image in split.images], f"judging {split.name}")
    return [scorer([images.read_image(path, levels)])[0] for path in paths]


def _choose(config: CompareConfig, split: CocoSplit, scored: Sequence[Scored]) -> Threshold:
    truth = np.array([split.is_defective(image) for image in split.images], dtype=bool)
    groups = numbered(split.groups)
    weights = resample(truth, config.resamples, config.seed, groups)
    return choose(truth, np.array([one.score for one in scored]), weights, config.aim, VALIDATION, 0, groups)


def _write(
    config: CompareConfig,
    name: str,
    splits: Sequence[CocoSplit],
    scored: Sequence[Scored],
    chosen: Threshold | None,
    notes: Sequence[str],
    results_dir: Path,
) -> None:
    """Write the figures that a yardstick has: of images, and of pixels where it says where the defect is."""
    pairs = [(split, image) for split in splits for image in split.images]
    groups = groups_of([image for _, image in pairs])
    of_images: Sequence[str | None] = groups or [None] * len(pairs)
    used = chosen or threshold.given(threshold.DEFAULT if config.conf == "auto" else config.conf)
    found = [
        Judged(
            image["file_name"],
            split.type_of(image),
            split.is_defective(image),
            one.score >= used.value,
            one.score,
            group,
        )
        for (split, image), one, group in zip(pairs, scored, of_images, strict=True)
    ]
    metrics = measure_scores(found, resamples=config.resamples, seed=config.seed)
    # A distance has no natural threshold; a probability has one at 0.5, and so do the detectors' scores.
    has_threshold = name == CLASSIFIER or chosen is not None
    if not has_threshold:
        of_verdicts = (one.key for one in METRICS.values() if one.group == "verdicts" and one.key != "total_images")
        dropped = [*of_verdicts, "ece", "brier"]
        names = {key.replace(".", "_") for key in dropped}
        intervals = {name: bounds for name, bounds in metrics["intervals"].items() if name not in names}
        nothing = dict.fromkeys([*(key.partition(".")[0] for key in dropped), "recall_by_type"])
        metrics |= nothing | {"intervals": intervals}
    if all(one.map is not None for one in scored) and not any(split.boxes_alone for split in splits):
        pixels = _pixels(config, pairs, scored, numbered(groups))
        metrics |= pixels | {"intervals": metrics["intervals"] | pixels["intervals"]}
    same = chosen is not None and splits[0].name == VALIDATION
    metrics |= {
        "threshold": {"value": used.value, "how": used.how, "same_split": same},
        "conf": used.value,
        "seed": config.seed,
        "split": splits[0].name if len(splits) == 1 else POOLED,
        "model": name,
        "notes": [*notes, *threshold_notes(used, len(found) if same else 0, len(found))],
    }
    write_scores(results_dir, found, metrics, has_threshold=has_threshold)


def _pixels(
    config: CompareConfig, pairs: Sequence[tuple[CocoSplit, Any]], scored: Sequence[Scored], groups: Groups | None
) -> dict[str, Any]:
    """Return the figures of pixels that follow from scores alone, and `intervals`, theirs."""
    tally = PixelTally()
    for (split, image), one in track(list(zip(pairs, scored, strict=True)), "counting pixels"):
        truth = true_mask(split, image)
        where = cv2.resize(np.asarray(one.map), truth.shape[::-1], interpolation=cv2.INTER_LINEAR)
        tally.add(image["file_name"], where.clip(0, 1), truth, np.zeros_like(truth))
    figures: dict[str, Any] = {key: value for key, value in tally.figures().items() if key not in OUTLINED}
    truth = np.array([split.is_defective(image) for split, image in pairs], dtype=bool)
    intervals = bootstrap(tally.resampled, truth, groups, config.resamples, config.seed)
    known = {key: bounds for key, bounds in intervals.items() if bounds is not None and key not in OUTLINED}
    return figures | {"intervals": known}
