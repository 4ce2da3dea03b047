"""K-fold cross-validation: K training runs, and one evaluation of all images.

Each image is evaluated with the model that was not trained on it.
"""

import logging
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

import flawmask
from flawmask.coco import CocoSplit, read_split, total_tallies, write_split
from flawmask.data import dataset_info, layouts
from flawmask.evaluation.config import EvaluateSettings
from flawmask.evaluation.evaluate import evaluate, predict_split, write_evaluation
from flawmask.evaluation.metrics import METRICS
from flawmask.files import atomic_folder, folder_lock, read_json, write_json
from flawmask.images import UPPER_BITS
from flawmask.inference.predictor import load
from flawmask.model.arch import is_chosen
from flawmask.prediction import Prediction
from flawmask.report.headline import lookup
from flawmask.runs import FOLDS, MADE_BY, POOLED, begin_or_continue, check_folder
from flawmask.settings import as_json, require, stage
from flawmask.stages import Finished, RunConfig, augment_dataset, evaluation_of, prepare_dataset
from flawmask.tiles import WHOLE_IMAGES
from flawmask.training.choose import choose_network
from flawmask.training.config import TrainConfig
from flawmask.training.learnable import check_learnable
from flawmask.training.loop import train
from flawmask.training.resume import has_state

log = logging.getLogger(__name__)

SAME_ANYWAY = ("compile", "offline", "strict", "output_dir")
"""Settings that change no fold: a cross-validation goes on although they have changed."""


def cross_validate(config: RunConfig, name: str) -> Finished:
    """Train and evaluate each fold of a category or a data set, then evaluate all images together.

    Folds that an earlier call finished, with the same settings on the same images, are reused unless `overwrite` is on.

    Raises:
        FlawmaskError: see `prepare`, `augment`, `train` and `evaluate`.
    """
    folders = prepared_folds(config, name)
    variants = 0 if config.skip_augment else config.augmentation_factor
    training = read_split(folders[0], "train", config)
    check_learnable(training, config.arch, config.good_name)
    images = len(training.images) * (1 + variants)
    config = choose_network(config, images, has_masks=not training.box_only_defects)
    info = read_json(folders[0] / dataset_info.NAME)
    method = info.get("split_method")  # a run with folds that were divided in another way is not continued
    origin = {
        "made_by": MADE_BY[FOLDS],
        "version": flawmask.__version__,
        "settings": _settings(config) | _of_category(config, name),
        "source": info["source"],
        **({"split_method": method} if method else {}),
    }
    run_dir = begin_or_continue(FOLDS, origin, config.output_dir, overwrite=config.overwrite, done=[])
    with folder_lock(run_dir / "folds"):
        return Finished(name, run_dir, fold_by_fold(config, folders, run_dir))


def check_output_dir(config: RunConfig) -> None:
    """Refuse an `--output_dir` that holds something else than a cross-validation with these settings.

    Raises:
        FlawmaskError: it does. Whether the images are the same is checked once they are divided.
    """
    if config.output_dir is None:
        return
    unknown = ("category", "layout") if is_chosen(config.arch) else ("category", "layout", "arch")
    known = {key: value for key, value in _settings(config).items() if key not in unknown}
    check_folder(config.output_dir, FOLDS, known, overwrite=config.overwrite)


def _settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings that have to be the same for a cross-validation to go on."""
    same = {key: value for key, value in as_json(config).items() if key not in SAME_ANYWAY}
    return same | {"overwrite": False}


def _of_category(config: RunConfig, name: str) -> dict[str, Any]:
    """Return the settings that name the category, since there may be several; nothing for a COCO folder."""
    if config.dataset_dir is not None:
        return {}
    return {"category": name, "layout": layouts.layout_of(config.mvtec_root, config)}


def prepared_folds(config: RunConfig, name: str) -> list[Path]:
    """Make or reuse the COCO folder of each fold, and return the folders.

    Raises:
        FlawmaskError: see `prepare_dataset`; or folds that were divided in different ways may share images.
    """
    category = name if config.dataset_dir is None else None
    folders = [
        prepare_dataset(replace(config, category=category, fold=fold), name) for fold in range(1, config.folds + 1)
    ]
    methods = {read_json(folder / dataset_info.NAME).get("split_method") for folder in folders}
    require(
        len(methods) == 1,
        f"{folders[0]} and others were divided by different versions of Flawmask: make all anew with --overwrite",
    )
    return folders


def fold_by_fold(config: RunConfig, folders: list[Path], run_dir: Path) -> dict[str, Any]:
    """Train and evaluate each fold that is not done according to `folds.json`; return the metrics of all images.

    Args:
        config: the settings.
        folders: the COCO folder of each fold.
        run_dir: the run folder with `folds.json`.
    """
    content = read_json(run_dir / FOLDS)
    done = list(content["done"])
    for fold, folder in enumerate(folders, start=1):
        log.info("fold %d of %d%s", fold, len(folders), " was finished before" if fold in done else "")
        if fold not in done:
            _one_fold(config, folder, run_dir / f"fold_{fold}")
            done.append(fold)
            write_json(run_dir / FOLDS, {**content, "done": done})
    return _evaluate_all(config, folders, run_dir)


def _one_fold(config: RunConfig, prepared_dir: Path, run_dir: Path) -> None:
    """Train and evaluate one fold. An interrupted training is resumed; a finished one is not repeated."""
    if has_state(run_dir):
        train(TrainConfig(resume=run_dir))
    else:
        dataset_dir = augment_dataset(config, prepared_dir)
        train(stage(TrainConfig, config, dataset_dir=dataset_dir, output_dir=run_dir, overwrite=True))
    evaluate(evaluation_of(config, run_dir, prepared_dir))


def _evaluate_all(config: RunConfig, folders: list[Path], run_dir: Path) -> dict[str, Any]:
    """Evaluate all images together, each with the model of its own fold.

    Returns the metrics, with their spread over the folds.
    """
    split, predictions = _out_of_fold(config, folders, run_dir)
    settings = EvaluateSettings(**{field.name: getattr(config, field.name) for field in fields(EvaluateSettings)})
    by_fold = [read_json(run_dir / f"fold_{fold}/inference_val/metrics.json") for fold in range(1, config.folds + 1)]
    seconds = {
        part: float(np.median([of_fold["seconds"][part] for of_fold in by_fold])) for part in by_fold[0]["seconds"]
    }
    conf = by_fold[0]["conf"]
    facts = {
        "dataset": run_dir.as_posix(),
        "model": run_dir.as_posix(),
        "threshold": by_fold[0]["threshold"],
        "intensity": by_fold[0].get("intensity", list(UPPER_BITS)),  # missing if an older version made the fold
        **of_all_folds(by_fold, ("join", *WHOLE_IMAGES)),
        "seconds": seconds,
        "seconds_per_image": sum(seconds.values()),
        "folds": spreads(by_fold),
    }
    notes = [
        f"{config.folds}-fold cross-validation: each image was evaluated with the one of {config.folds} models that "
        "was not trained on it. A model trained on all images should be about as good, or slightly better.",
        *_rare_types(split, config.folds),
        *_other_tiles(by_fold),
        *dict.fromkeys(f"Some folds: {note}" for of_fold in by_fold for note in of_fold["notes"]),
    ]
    results_dir = run_dir / f"inference_{POOLED}"
    return write_evaluation(results_dir, split, predictions, conf, settings, config.seed, facts, notes).metrics


def _other_tiles(by_fold: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a note if the networks of the folds saw different tiles."""
    sizes = [of_fold.get("tile") for of_fold in by_fold]
    named = ", ".join("whole images" if size is None else f"{size} pixels" for size in sizes)
    return [f"The folds have different tiles: {named}."] if len(set(sizes)) > 1 else []


def _rare_types(split: CocoSplit, folds: int) -> list[str]:
    """Return a note about the defect types that are too rare to be in every fold."""
    groups = split.groups or [image["file_name"] for image in split.images]
    types = (split.type_of(image) for image in split.images)
    counts = Counter(kind for kind, _ in set(zip(types, groups, strict=True)))
    rare = ", ".join(f"{kind} ({count})" for kind, count in sorted(counts.items()) if count < folds)
    what = "images" if split.groups is None else "parts"
    return (
        [f"These types have fewer {what} than there are folds: {rare}. Some folds train, or evaluate, without them."]
        if rare
        else []
    )


def _out_of_fold(config: RunConfig, folders: list[Path], run_dir: Path) -> tuple[CocoSplit, list[Prediction]]:
    """Write the validation images of all folds as one split; return it with the predictions for it.

    The predictions for an image come from the model that was not trained on it.
    """
    predictions: list[Prediction] = []
    parts = [read_split(folder, "val", config) for folder in folders]
    for fold, (prepared_dir, part) in enumerate(zip(folders, parts, strict=True), start=1):
        settings = evaluation_of(config, run_dir / f"fold_{fold}", prepared_dir)
        backend = load(settings.checkpoint, settings)
        predictions += predict_split(backend, part, config.inference_batch_size)[0]
    with atomic_folder(run_dir / POOLED) as folder:
        (folder / "images").mkdir()
        for part in parts:
            for image in part.images:
                _place(part.image_path(image), folder / "images" / image["file_name"])
        images = [image for part in parts for image in part.images]
        annotations = [record for part in parts for of_image in part.annotations.values() for record in of_image]
        write_split(folder, images, annotations, parts[0].categories)
    info = read_json(folders[0] / dataset_info.NAME)
    kept = {name: info[name] for name in ("made_by", "version", "settings", "source", "left_out")}
    write_json(run_dir / dataset_info.NAME, {**kept, POOLED: dataset_info.counts(images)})
    pooled = read_split(run_dir, POOLED, config)
    # The pooled file holds only what is used, so the tallies come from the folds.
    return replace(pooled, tallies=total_tallies(parts)), predictions


def _place(source: Path, target: Path) -> None:
    """Hard-link the file, or copy it if the file system cannot link."""
    try:
        target.hardlink_to(source.resolve())
    except OSError:
        shutil.copyfile(source, target)


def of_all_folds(by_fold: Sequence[Mapping[str, Any]], keys: Iterable[str]) -> dict[str, Any]:
    """Return the keys that all folds have with the same value; `--tile auto` may choose other tiles in each fold.

    Args:
        by_fold: the content of each fold's `metrics.json`.
        keys: the keys in question.
    """
    first, *others = by_fold
    return {
        key: first[key] for key in keys if key in first and all(key in one and one[key] == first[key] for one in others)
    }


def spreads(by_fold: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the spread over the folds of each metric that is reported by fold.

    Args:
        by_fold: the content of each fold's `metrics.json`.
    """
    keys = [metric.key for metric in METRICS.values() if metric.in_folds]
    return {key: spread([lookup(of_fold, key)[1] for of_fold in by_fold]) for key in keys}


def spread(values: list[float | None]) -> dict[str, Any]:
    """Return the folds' values, with the mean and the sample standard deviation of the defined ones."""
    defined = [value for value in values if value is not None]
    return {
        "values": values,
        "mean": float(np.mean(defined)) if defined else None,
        "sd": float(np.std(defined, ddof=1)) if len(defined) > 1 else None,
    }
