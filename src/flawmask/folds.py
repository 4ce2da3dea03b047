"""K-fold cross-validation: K runs, and one judgement of all images, each by the model that has not seen it."""

import logging
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

import flawmask
from flawmask.coco import CocoSplit, read_split, total_tallies, write_split
from flawmask.data import dataset_info, layouts
from flawmask.evaluation.config import EvaluateConfig, EvaluateSettings
from flawmask.evaluation.evaluate import evaluate, predict_split, write_judgement
from flawmask.evaluation.metrics import METRICS
from flawmask.files import read_json, whole_folder, write_json
from flawmask.images import UPPER_BITS
from flawmask.inference.predictor import load
from flawmask.prediction import Prediction
from flawmask.report.headline import lookup
from flawmask.runs import FOLDS, POOLED, earlier, new_run_dir
from flawmask.settings import as_json, require, stage
from flawmask.stages import Finished, RunConfig, augmented, prepared
from flawmask.training.choose import choose_network
from flawmask.training.config import TrainConfig
from flawmask.training.learnable import check_learnable
from flawmask.training.loop import train
from flawmask.training.resume import has_state

log = logging.getLogger(__name__)


def cross_validate(config: RunConfig, name: str) -> Finished:
    """Train and judge each fold of a category or a data set, then all images together; return what became of it.

    Folds that an earlier call with the same settings on the same images finished are kept, unless `overwrite` is on.

    Raises:
        FlawmaskError: see `prepare`, `augment`, `train` and `evaluate`.
    """
    folders = prepared_folds(config, name)
    variants = 0 if config.skip_augment else config.augmentation_factor
    training = read_split(folders[0], "train", config)
    check_learnable(training, config.arch, config.good_name)
    images = len(training.images) * (1 + variants)
    config = choose_network(config, images, has_masks=not training.boxes_alone)
    info = read_json(folders[0] / dataset_info.NAME)
    method = info.get("split_method")  # folds that were divided in another way go on with none of these
    origin = {
        "made_by": "flawmask run --folds",
        "version": flawmask.__version__,
        # These change no fold, and what was begun before there were such settings goes on.
        "settings": {
            key: value for key, value in as_json(config).items() if key not in ("compile", "offline", "strict")
        }
        | {"overwrite": False, **_of_category(config, name)},
        "source": info["source"],
        **({"split_method": method} if method else {}),
    }
    run_dir = None if config.overwrite else earlier(f"*_folds/{FOLDS}", origin)
    if run_dir is None:
        with new_run_dir("_folds") as run_dir:
            write_json(run_dir / FOLDS, {**origin, "done": []})
    return Finished(name, run_dir, fold_by_fold(config, folders, run_dir))


def _of_category(config: RunConfig, name: str) -> dict[str, Any]:
    """Return the settings that say which category of several it is; none of a data set."""
    if config.dataset_dir is not None:
        return {}
    return {"category": name, "layout": layouts.layout_of(config.mvtec_root, config)}


def prepared_folds(config: RunConfig, name: str) -> list[Path]:
    """Return the COCO folder of each fold of a category or a data set, made or reused.

    Raises:
        FlawmaskError: see `prepared`; or some were divided in another way than others, and may share images.
    """
    category = name if config.dataset_dir is None else None
    folders = [prepared(replace(config, category=category, fold=fold), name) for fold in range(1, config.folds + 1)]
    methods = {read_json(folder / dataset_info.NAME).get("split_method") for folder in folders}
    require(
        len(methods) == 1,
        f"{folders[0]} and others were divided by different versions of Flawmask: make all anew with --overwrite",
    )
    return folders


def fold_by_fold(config: RunConfig, folders: list[Path], run_dir: Path) -> dict[str, Any]:
    """Train and judge each fold that `folds.json` in the run folder does not call done; return what all come to.

    Args:
        config: the settings.
        folders: the COCO folder of each fold.
        run_dir: holds `folds.json`.
    """
    content = read_json(run_dir / FOLDS)
    done = list(content["done"])
    for fold, folder in enumerate(folders, start=1):
        log.info("fold %d of %d%s", fold, len(folders), " was finished before" if fold in done else "")
        if fold not in done:
            _one_fold(config, folder, run_dir / f"fold_{fold}")
            done.append(fold)
            write_json(run_dir / FOLDS, {**content, "done": done})
    return _judge_all(config, folders, run_dir)


def _one_fold(config: RunConfig, prepared_dir: Path, run_dir: Path) -> None:
    """Train and judge one fold; an interrupted training goes on, and one that has ended ends at once."""
    if has_state(run_dir):
        train(TrainConfig(resume=run_dir))
    else:
        dataset_dir = augmented(config, prepared_dir)
        train(stage(TrainConfig, config, dataset_dir=dataset_dir, output_dir=run_dir, overwrite=True))
    place = {"model": run_dir / "best.pt", "dataset_dir": prepared_dir, "output_dir": None, "against": None}
    evaluate(stage(EvaluateConfig, config, **place))


def _judge_all(config: RunConfig, folders: list[Path], run_dir: Path) -> dict[str, Any]:
    """Judge all images together, each by its own fold's model, and return the metrics with the folds' spread."""
    split, predictions = _out_of_fold(config, folders, run_dir)
    settings = EvaluateSettings(**{field.name: getattr(config, field.name) for field in fields(EvaluateSettings)})
    by_fold = [read_json(run_dir / f"fold_{fold}/inference_val/metrics.json") for fold in range(1, config.folds + 1)]
    seconds = {part: float(np.median([one["seconds"][part] for one in by_fold])) for part in by_fold[0]["seconds"]}
    conf = by_fold[0]["conf"]
    facts = {
        "dataset": run_dir.as_posix(),
        "model": run_dir.as_posix(),
        "threshold": by_fold[0]["threshold"],
        "intensity": by_fold[0].get("intensity", list(UPPER_BITS)),  # of an older version's fold
        "seconds": seconds,
        "seconds_per_image": sum(seconds.values()),
        "folds": spreads(by_fold),
    }
    said = [
        f"{config.folds}-fold cross-validation: each image was judged by the one of {config.folds} models that was not "
        "trained on it. A model trained on all images should be about as good, or slightly better.",
        *_lacking(split, config.folds),
        *dict.fromkeys(f"Of some folds: {note}" for one in by_fold for note in one["notes"]),
    ]
    results_dir = run_dir / f"inference_{POOLED}"
    return write_judgement(results_dir, split, predictions, conf, settings, config.seed, facts, said).metrics


def _lacking(split: CocoSplit, folds: int) -> list[str]:
    """Return a note for the defect types that cannot be in every fold."""
    groups = split.groups or [image["file_name"] for image in split.images]
    types = (split.type_of(image) for image in split.images)
    counts = Counter(kind for kind, _ in set(zip(types, groups, strict=True)))
    rare = ", ".join(f"{kind} ({count})" for kind, count in sorted(counts.items()) if count < folds)
    what = "images" if split.groups is None else "parts"
    return [f"There are fewer {what} than folds of {rare}: some folds judge, or train, without it."] if rare else []


def _out_of_fold(config: RunConfig, folders: list[Path], run_dir: Path) -> tuple[CocoSplit, list[Prediction]]:
    """Write what the folds held back as one split; return it with what the models that never saw it find."""
    predictions: list[Prediction] = []
    parts = [read_split(folder, "val", config) for folder in folders]
    for fold, part in enumerate(parts, start=1):
        backend = load(run_dir / f"fold_{fold}" / "best.pt", config)
        predictions += predict_split(backend, part, config.inference_batch_size)[0]
    with whole_folder(run_dir / POOLED) as folder:
        (folder / "images").mkdir()
        for part in parts:
            for image in part.images:
                _place(part.image_path(image), folder / "images" / image["file_name"])
        images = [image for part in parts for image in part.images]
        annotations = [one for part in parts for of_image in part.annotations.values() for one in of_image]
        write_split(folder, images, annotations, parts[0].categories)
    info = read_json(folders[0] / dataset_info.NAME)
    kept = {name: info[name] for name in ("made_by", "version", "settings", "source", "left_out")}
    write_json(run_dir / dataset_info.NAME, {**kept, POOLED: dataset_info.counts(images)})
    pooled = read_split(run_dir, POOLED, config)
    # Their common file holds nothing but what is used.
    return replace(pooled, tallies=total_tallies(parts)), predictions


def _place(source: Path, target: Path) -> None:
    """Link the file where the file system can, and copy it where it cannot."""
    try:
        target.hardlink_to(source.resolve())
    except OSError:
        shutil.copyfile(source, target)


def spreads(by_fold: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the spread of each metric of which it is told, from the folds' `metrics.json`."""
    told = [one.key for one in METRICS.values() if one.in_folds]
    return {key: spread([lookup(of_fold, key)[1] for of_fold in by_fold]) for key in told}


def spread(values: list[float | None]) -> dict[str, Any]:
    """Return the folds' values, and the mean and sample standard deviation of those that are defined."""
    known = [value for value in values if value is not None]
    return {
        "values": values,
        "mean": float(np.mean(known)) if known else None,
        "sd": float(np.std(known, ddof=1)) if len(known) > 1 else None,
    }
