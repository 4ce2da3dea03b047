"""Evaluate a labelled split: run the network, compare predictions with the truth, and write the results."""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from flawmask import images
from flawmask.coco import CocoSplit, Record, read_split
from flawmask.errors import FlawmaskError
from flawmask.evaluation.against import compare, read_other
from flawmask.evaluation.aim import choose
from flawmask.evaluation.calibrate import fit, out_of_fold
from flawmask.evaluation.config import EvaluateConfig, EvaluateSettings
from flawmask.evaluation.leak import Leak, content_digests, seen_in_training
from flawmask.evaluation.measure import decide_verdicts, measure
from flawmask.evaluation.results import write_results
from flawmask.evaluation.uncertainty import resample
from flawmask.evaluation.verdicts import groups_of
from flawmask.files import check_output_folder, read_json
from flawmask.inference import calibration, exported, threshold
from flawmask.inference.backend import Backend, check_classes
from flawmask.inference.calibration import Calibration
from flawmask.inference.predictor import check_floor, load
from flawmask.inference.stream import NetworkOutput, predict_all
from flawmask.inference.threshold import Threshold
from flawmask.launch import world_size
from flawmask.prediction import Prediction
from flawmask.progress import track
from flawmask.report.report import ENTRIES as REPORT_ENTRIES
from flawmask.settings import require
from flawmask.strips import StripImage, opened
from flawmask.tiles import check_sizes

if TYPE_CHECKING:
    from flawmask.distributed import Processes

log = logging.getLogger(__name__)

ENTRIES = ("metrics.json", "curves.json", "predictions.json", "predictions.csv", "overlays", *REPORT_ENTRIES)

VALIDATION = "val"
"""The split on which thresholds are chosen."""


@dataclass(frozen=True)
class Evaluated:
    """The results of `evaluate`.

    Attributes:
        results_dir: the folder with `metrics.json`, `predictions.json`, `predictions.csv` and `overlays/`.
        metrics: the content of `metrics.json`.
    """

    results_dir: Path
    metrics: dict[str, Any]


def evaluate(config: EvaluateConfig) -> Evaluated:
    """Evaluate a split and write the results.

    Raises:
        FlawmaskError: the checkpoint or the data set is damaged; they have different classes; an image cannot be read
            or was used for training; no threshold can be chosen; or the output folder holds something else. Nothing is
            written then.
    """
    from flawmask.distributed import Processes, processes

    if config.predictions is not None:
        from flawmask.evaluation.evaluate_stored import evaluate_stored

        return evaluate_stored(config)
    config = replace(config, model=exported.file_of(config.checkpoint))
    if exported.is_export(config.checkpoint):
        require(world_size() == 1, f"{config.checkpoint} runs in one process: start evaluate as a single process")
        return _evaluate(config, Processes())
    from flawmask.runtime import choose_device

    with processes(choose_device(config.device)) as team:
        return _evaluate(config, team)


def _evaluate(config: EvaluateConfig, team: "Processes") -> Evaluated:
    """Evaluate a split, perhaps together with other processes. The main process writes the results."""
    check_output_folder(config.results_dir, "metrics.json", overwrite=True, what="evaluation", entries=ENTRIES)
    split = read_split(config.dataset_dir, config.split, config)
    split.warn(strict=config.strict)
    backend = _load(config, split)
    conf = threshold.DEFAULT if config.conf == "auto" else config.conf
    if config.conf != "auto":
        check_floor(backend, conf, config, config.checkpoint)
    other = read_other(config.against, split, conf, config.min_area) if config.against else None
    digests = team.from_main(lambda: content_digests(split, backend.spec.intensity))
    leak = seen_in_training(split, digests, config.checkpoint, allow=config.allow_leak)
    predictions, seconds = _predict(config, backend, split, team)
    chosen = _threshold(config, backend, split, digests, predictions, team)
    check_floor(backend, chosen.value, config, config.checkpoint)
    predictions, fitted = _calibrate(config, backend, split, digests, predictions, team)
    facts: dict[str, Any] = {
        "seconds": seconds,
        "seconds_per_image": sum(seconds.values()),
        "dataset": config.dataset_dir.as_posix(),
        "model": config.checkpoint.as_posix(),
        "model_sha256": exported.digest_of(config.checkpoint),
        "intensity": list(backend.spec.intensity),
        "join": backend.spec.join,
        **backend.spec.tiles_as_json,
    }
    if other is not None:
        facts["against"] = compare(
            split,
            predictions,
            chosen.value,
            other,
            min_area=config.min_area,
            resamples=config.resamples,
            seed=config.seed,
        )
    shared = len(set(chosen.chosen_by) & set(digests.values()))
    facts["threshold"] = {
        **{name: value for name, value in chosen.to_dict().items() if name != "chosen_by"},
        "same_split": shared > 0,
    }
    manifest = exported.manifest_of(config.checkpoint) if exported.is_export(config.checkpoint) else None
    unproven = [] if manifest is None else manifest.unproven_note
    all_notes = [*unproven, *notes(split, config.checkpoint, leak), *threshold_notes(chosen, shared, len(split.images))]
    if fitted is not None:
        facts["calibration"], calibration_notes = _describe_calibration(fitted, split, digests)
        all_notes += calibration_notes

    def write() -> Evaluated:
        """Write the results folder, and keep what was chosen and fitted beside the checkpoint."""
        evaluated = write_evaluation(
            config.results_dir, split, predictions, chosen.value, config, config.seed, facts, all_notes
        )
        if chosen.how == "aim":
            threshold.save(chosen, config.checkpoint)
        if fitted is not None and split.name == VALIDATION:
            _save_calibration(fitted, config.checkpoint)
        return evaluated

    return team.from_main(write)


def _load(config: EvaluateConfig, split: CocoSplit) -> Backend:
    """Return the network, ready to predict the split.

    Raises:
        FlawmaskError: the checkpoint is damaged, or it does not suit the split.
    """
    backend = load(config.checkpoint, config)
    check_classes(backend.spec, split.class_names, config.dataset_dir)
    classes = len(backend.spec.classes)
    require(
        config.num_classes in (None, classes),
        f"--num_classes is {config.num_classes}, but {config.checkpoint} has {classes}: "
        + ", ".join(backend.spec.classes),
    )
    if backend.spec.has_masks:
        split.require_masks(f"{config.checkpoint} predicts masks", "evaluate a network that predicts boxes")
    if backend.spec.tiling is not None:
        sizes = [(image["height"], image["width"]) for image in split.images]
        check_sizes(backend.spec.tiling, sizes, str(split.folder), refuse=isinstance(config.tile, int))
    return backend


def _predict(
    config: EvaluateConfig, backend: Backend, split: CocoSplit, team: "Processes"
) -> tuple[list[Prediction], dict[str, float]]:
    """Return the predictions for the whole split, and the seconds; see `predict_split`. Each process runs a shard."""
    require(
        team.count <= len(split.images),
        f"{split.folder} has {len(split.images)} images: start no more processes than that, not {team.count}",
    )
    shard = replace(split, images=tuple(team.shard(split.images)))
    predictions, seconds = predict_split(backend, shard, config.inference_batch_size)
    return team.gather(predictions), seconds


def write_evaluation(
    results_dir: Path,
    split: CocoSplit,
    predictions: Sequence[Prediction],
    conf: float,
    settings: EvaluateSettings,
    seed: int,
    facts: Mapping[str, Any],
    stage_notes: Sequence[str],
) -> Evaluated:
    """Compute all metrics of a split and write the results folder. An incomplete folder is never left behind.

    Args:
        results_dir: where the results go.
        split: the truth.
        predictions: one per image of the split.
        conf: the verdict's threshold.
        settings: of the evaluation.
        seed: the seed of the bootstrap samples.
        facts: other keys of `metrics.json`; `dataset`, `model` and `threshold` must be among them.
        stage_notes: notes for the reader, before those that follow from the metrics.
    """
    measured = measure(split, predictions, conf, settings.min_area, resamples=settings.resamples, seed=seed)
    metrics = measured.metrics | {
        **facts,
        "conf": conf,
        "min_area": settings.min_area,
        "seed": seed,
        "allow_leak": settings.allow_leak,
        "crowds": settings.crowds,
        "on_error": settings.on_error,
        "good_name": settings.good_name,
        "tally": split.tally,
        "split": split.name,
        "notes": [*stage_notes, *measured.metrics["notes"]],
    }
    write_results(results_dir, split, predictions, replace(measured, metrics=metrics), settings.overlays)
    groups = measured.metrics.get("groups")
    images_of_split = f"{len(predictions)} images of {split.folder}"
    log.info(
        "evaluated %s: results in %s",
        images_of_split if groups is None else f"{images_of_split}, of {groups} parts",
        results_dir,
    )
    return Evaluated(results_dir, metrics)


def _threshold(
    config: EvaluateConfig,
    backend: Backend,
    split: CocoSplit,
    digests: Mapping[str, str],
    predictions: Sequence[Prediction],
    team: "Processes",
) -> Threshold:
    """Return the threshold that the settings ask for.

    `auto` chooses it on the validation split. If that is the split to evaluate, its predictions are used. If not, a
    threshold that was chosen earlier for this checkpoint and aim is taken. If there is none, the validation split is
    predicted now.
    """
    if config.conf != "auto":
        return threshold.given(config.conf)
    if config.split != VALIDATION:
        earlier = team.from_main(lambda: threshold.load(config.checkpoint))
        is_aim = earlier is not None and earlier.aim == config.aim
        if earlier is not None and is_aim and earlier.holds_for(config.min_area, backend.spec.tiles_as_json):
            return earlier
        split = read_split(config.dataset_dir, VALIDATION, config)
        split.warn(strict=config.strict)
        digests = team.from_main(lambda: content_digests(split, backend.spec.intensity))
        seen_in_training(split, digests, config.checkpoint, allow=config.allow_leak)
        predictions, _ = _predict(config, backend, split, team)
    evaluated = decide_verdicts(split, predictions, threshold.DEFAULT, config.min_area)
    truth, scores = np.array([one.truth for one in evaluated]), np.array([one.score for one in evaluated])
    groups = groups_of(evaluated)
    weights = resample(truth, config.resamples, config.seed, groups)
    chosen = choose(truth, scores, weights, config.aim, VALIDATION, config.min_area, groups)
    log.info("threshold %.3f, chosen for %s on %d images of %s", chosen.value, config.aim, len(evaluated), split.folder)
    return replace(chosen, chosen_by=tuple(digests.values()), **backend.spec.tiles_as_json)


def _calibrate(
    config: EvaluateConfig,
    backend: Backend,
    split: CocoSplit,
    digests: Mapping[str, str],
    predictions: list[Prediction],
    team: "Processes",
) -> tuple[list[Prediction], Calibration | None]:
    """Return the predictions with a calibration each, and the calibration of the checkpoint.

    On the validation split, the checkpoint's calibration is fitted. There, the calibration of each image is another
    one, which was fitted to the other images. On another split, all images have the stored calibration of the
    checkpoint.
    """
    tiles = backend.spec.tiles_as_json
    if split.name != VALIDATION:
        stored = team.from_main(lambda: calibration.load(config.checkpoint, config.min_area, tiles))
        return [replace(one, calibration=stored) for one in predictions], stored
    evaluated = decide_verdicts(split, predictions, threshold.DEFAULT, config.min_area)
    truth, scores = np.array([one.truth for one in evaluated]), np.array([one.score for one in evaluated])
    others = out_of_fold(truth, scores, groups_of(evaluated), config.seed, split.name, config.min_area)
    if None in others:
        return predictions, None
    calibrated = [replace(one, calibration=other) for one, other in zip(predictions, others, strict=True)]
    fitted = fit(truth, scores, split.name, config.min_area)
    return calibrated, None if fitted is None else replace(fitted, fitted_by=tuple(digests.values()), **tiles)


def _save_calibration(fitted: Calibration, model: Path) -> None:
    """Write the calibration beside its checkpoint. If that fails, warn only, because nobody asked for this file."""
    try:
        calibration.save(fitted, model)
    except OSError as error:
        log.warning("the calibration is not kept beside the checkpoint: %s", error)


def _describe_calibration(
    fitted: Calibration, split: CocoSplit, digests: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """Return the calibration's record in `metrics.json`, and notes on it, as sentences."""
    is_cross_fitted = split.name == VALIDATION
    record = {name: value for name, value in asdict(fitted).items() if name != "fitted_by"}
    shared = 0 if is_cross_fitted else len(set(fitted.fitted_by) & set(digests.values()))
    note = f"The calibration was fitted to {shared} of these {len(split.images)} images: its error is too small."
    return {**record, "cross_fitted": is_cross_fitted}, [note] if shared else []


def notes(split: CocoSplit, model: Path, leak: Leak | None) -> list[str]:
    """Return notes on the images and the model, as sentences.

    Args:
        split: the evaluated split.
        model: the checkpoint.
        leak: the images and parts that the model was trained on; None where its training images are unknown.
    """
    lines = []
    if leak is None:
        lines.append(
            "This model's training images are not known. So it was not checked whether these images are among them."
        )
    else:
        for names, what in (
            (leak.images, "were used for training"),
            (leak.parts, "show parts that were used for training"),
        ):
            if names:
                lines.append(f"{len(names)} of these {len(split.images)} images {what}: the figures are too good.")
    variants = sum("augmentation" in image for image in split.images)
    if variants:
        lines.append(f"{variants} of these {len(split.images)} images are augmented variants, not photographs.")
    path = model.parent / "config.json"
    config = read_json(path) if path.is_file() else None
    settings = config.get("settings") if isinstance(config, dict) else None
    chosen_by = settings.get("select_by", "train_loss") if isinstance(settings, dict) else "train_loss"
    if chosen_by != "train_loss" and model.name == "best.pt" and split.name == VALIDATION:
        lines.append(f"The epoch was chosen by {chosen_by} on the validation split: its figures are too good.")
    return lines


def threshold_notes(chosen: Threshold, shared: int, images_evaluated: int) -> list[str]:
    """Return notes on the threshold, as sentences.

    Args:
        chosen: the threshold.
        shared: the number of evaluated images on which it was chosen.
        images_evaluated: the number of evaluated images.
    """
    lines = []
    if shared:
        which = "these very images" if shared == images_evaluated else f"{shared} of these {images_evaluated} images"
        lines.append(f"The threshold was chosen on {which}: the figures are too good. Evaluate a test split.")
    if not chosen.reached:
        lines.append(f"The aim {chosen.aim} was out of reach on {chosen.chosen_on}: the nearest threshold was taken.")
    return lines


def predict_split(
    backend: Backend, split: CocoSplit, batch_size: int | None = None
) -> tuple[list[Prediction], dict[str, float]]:
    """Return a prediction for each image of the split, and the median seconds per image.

    The seconds are split into `read` (from file to pixels), `network` (the time of a batch, divided by its images) and
    `post` (from probabilities to masks). Threads read images and make masks while the network runs. So a split takes
    less time than the sum over its images.

    Args:
        backend: runs the network.
        split: the images to predict.
        batch_size: the largest batch; by default the backend's own.

    Raises:
        FlawmaskError: an image cannot be read, or its size is not that of its record.
    """

    first: dict[str, Path] = {}

    def read(image: Record) -> npt.NDArray[np.uint8] | StripImage:
        """Return the image's pixels after checking their size against its record."""
        path = split.image_path(image)
        large = opened(path, first) if backend.spec.tile is not None else None
        pixels = large or images.read_image(path, backend.spec.intensity)
        height, width = pixels.shape[:2]
        if (height, width) != (image["height"], image["width"]):
            sizes = f"{width}x{height} but its record says {image['width']}x{image['height']}"
            raise FlawmaskError(f"{path} is {sizes}: export the annotations again")
        return pixels

    def post(_: Record, output: NetworkOutput | FlawmaskError) -> tuple[Prediction, tuple[float, float, float]]:
        """Return the prediction and the seconds of reading, network and post-processing."""
        if isinstance(output, FlawmaskError):
            raise output
        start = time.perf_counter()
        prediction = output.prediction(backend.spec)
        return prediction, (output.read, output.network, time.perf_counter() - start)

    # Images are sorted by size. So batches are full, and a GPU, which is slow at a new size, meets each size only once.
    sizes = [(image["height"], image["width"]) for image in split.images]
    order = sorted(range(len(sizes)), key=lambda place: (backend.spec.padded(*sizes[place]), sizes[place]))
    with closing(predict_all(backend, (split.images[place] for place in order), read, post, batch_size)) as outputs:
        pairs = list(track(outputs, f"predicting {split.name}", total=len(split.images)))
    seconds = np.median([one for _, one in pairs], axis=0).tolist()
    predictions = {place: prediction for place, (prediction, _) in zip(order, pairs, strict=True)}
    in_order = [predictions[place] for place in range(len(sizes))]
    return in_order, dict(zip(("read", "network", "post"), seconds, strict=True))
