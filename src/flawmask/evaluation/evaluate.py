"""Judge a labelled split: run the network over it, compare, and write figures, tables and pictures."""

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
from flawmask.evaluation.measure import judge, measure
from flawmask.evaluation.results import write_results
from flawmask.evaluation.uncertainty import resample
from flawmask.evaluation.verdicts import groups_of
from flawmask.files import check_output_folder, read_json
from flawmask.inference import calibration, threshold
from flawmask.inference.backend import Backend, check_classes
from flawmask.inference.calibration import Calibration
from flawmask.inference.predictor import load
from flawmask.inference.stream import Seen, judge_all
from flawmask.inference.threshold import Threshold
from flawmask.prediction import Prediction
from flawmask.progress import track
from flawmask.report.report import ENTRIES as REPORT_ENTRIES
from flawmask.settings import require

if TYPE_CHECKING:
    from flawmask.distributed import Processes

log = logging.getLogger(__name__)

ENTRIES = ("metrics.json", "curves.json", "predictions.json", "predictions.csv", "overlays", *REPORT_ENTRIES)

VALIDATION = "val"
"""The split that thresholds are chosen on."""


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
            read or was trained on, there is no threshold to be had, or the output folder holds something else. Nothing
            is written then.
    """
    from flawmask.distributed import processes
    from flawmask.runtime import choose_device

    with processes(choose_device(config.device)) as team:
        return _evaluate(config, team)


def _evaluate(config: EvaluateConfig, team: "Processes") -> Evaluated:
    """Judge a split together with other processes, or alone; the first one writes."""
    check_output_folder(config.results_dir, "metrics.json", overwrite=True, what="evaluation", entries=ENTRIES)
    split = read_split(config.dataset_dir, config.split, config)
    split.warn(strict=config.strict)
    backend = load(config.model, config)
    check_classes(backend.spec, split.class_names, config.dataset_dir)
    classes = len(backend.spec.classes)
    require(
        config.num_classes in (None, classes),
        f"--num_classes is {config.num_classes}, but {config.model} has {classes}: {', '.join(backend.spec.classes)}",
    )
    if backend.spec.has_masks:
        split.refuse_boxes_alone(f"{config.model} outlines what it finds", "evaluate a network that finds boxes")
    conf = threshold.DEFAULT if config.conf == "auto" else config.conf
    other = read_other(config.against, split, conf, config.min_area) if config.against else None
    digests = team.from_main(lambda: content_digests(split, backend.spec.intensity))
    seen = seen_in_training(split, digests, config.model, allow=config.allow_leak)
    predictions, seconds = _predict(config, backend, split, team)
    chosen = _threshold(config, backend, split, digests, predictions, team)
    predictions, curve = _calibrated(config, split, digests, predictions, team)
    facts: dict[str, Any] = {
        "seconds": seconds,
        "seconds_per_image": sum(seconds.values()),
        "dataset": config.dataset_dir.as_posix(),
        "model": config.model.as_posix(),
        "intensity": list(backend.spec.intensity),
        "join": backend.spec.join,
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
    said = [*notes(split, config.model, seen), *threshold_notes(chosen, shared, len(split.images))]
    if curve is not None:
        facts["calibration"], note = _calibration_told(curve, split, digests)
        said += note

    def write() -> Evaluated:
        judged = write_judgement(config.results_dir, split, predictions, chosen.value, config, config.seed, facts, said)
        if chosen.how == "aim":
            threshold.save(chosen, config.model)
        if curve is not None and split.name == VALIDATION:
            _keep(curve, config.model)
        return judged

    return team.from_main(write)


def _predict(
    config: EvaluateConfig, backend: Backend, split: CocoSplit, team: "Processes"
) -> tuple[list[Prediction], dict[str, float]]:
    """Return what `predict_split` does of the whole split, of which each process looks at its share."""
    require(
        team.count <= len(split.images),
        f"{split.folder} has {len(split.images)} images: start no more processes than that, not {team.count}",
    )
    mine = replace(split, images=tuple(team.share(split.images)))
    predictions, seconds = predict_split(backend, mine, config.inference_batch_size)
    return team.gather(predictions), seconds


def write_judgement(
    results_dir: Path,
    split: CocoSplit,
    predictions: Sequence[Prediction],
    conf: float,
    settings: EvaluateSettings,
    seed: int,
    facts: Mapping[str, Any],
    said: Sequence[str],
) -> Evaluated:
    """Work out all figures of a split and write the results folder, whole or not at all.

    Args:
        results_dir: where the results go.
        split: the truth.
        predictions: one per image of the split.
        conf: the verdict's threshold.
        settings: what counts, and how much is drawn.
        seed: decides the bootstrap samples.
        facts: what `metrics.json` holds beside the figures: `dataset`, `model` and `threshold` at least.
        said: notes for the reader.
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
        "notes": [*said, *measured.metrics["notes"]],
    }
    write_results(results_dir, split, predictions, replace(measured, metrics=metrics), settings.overlays)
    groups = measured.metrics.get("groups")
    judged = f"{len(predictions)} images of {split.folder}" + (f", of {groups} parts" if groups is not None else "")
    log.info("evaluated %s: results in %s", judged, results_dir)
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

    `auto` chooses on the validation split: on the predictions at hand where that is what is judged; else it takes what
    was chosen for this checkpoint and this aim before, or chooses on the data set's `val` now.
    """
    if config.conf != "auto":
        return threshold.given(config.conf)
    if config.split != VALIDATION:
        kept = team.from_main(lambda: threshold.load(config.model))
        if kept is not None and (kept.aim, kept.min_area) == (config.aim, config.min_area):
            return kept
        split = read_split(config.dataset_dir, VALIDATION, config)
        split.warn(strict=config.strict)
        digests = team.from_main(lambda: content_digests(split, backend.spec.intensity))
        seen_in_training(split, digests, config.model, allow=config.allow_leak)
        predictions, _ = _predict(config, backend, split, team)
    judged = judge(split, predictions, threshold.DEFAULT, config.min_area)
    truth, scores = np.array([one.truth for one in judged]), np.array([one.score for one in judged])
    groups = groups_of(judged)
    weights = resample(truth, config.resamples, config.seed, groups)
    chosen = choose(truth, scores, weights, config.aim, VALIDATION, config.min_area, groups)
    log.info("threshold %.3f, chosen for %s on %d images of %s", chosen.value, config.aim, len(judged), split.folder)
    return replace(chosen, chosen_by=tuple(digests.values()))


def _calibrated(
    config: EvaluateConfig,
    split: CocoSplit,
    digests: Mapping[str, str],
    predictions: list[Prediction],
    team: "Processes",
) -> tuple[list[Prediction], Calibration | None]:
    """Return the predictions with what tells how likely a defect is, and the checkpoint's calibration.

    It is fitted to the validation split. Its images have others: each one that was fitted to the other images.
    """
    if split.name != VALIDATION:
        kept = team.from_main(lambda: calibration.load(config.model, config.min_area))
        return [replace(one, calibration=kept) for one in predictions], kept
    judged = judge(split, predictions, threshold.DEFAULT, config.min_area)
    truth, scores = np.array([one.truth for one in judged]), np.array([one.score for one in judged])
    others = out_of_fold(truth, scores, groups_of(judged), config.seed, split.name, config.min_area)
    if None in others:
        return predictions, None
    with_others = [replace(one, calibration=other) for one, other in zip(predictions, others, strict=True)]
    curve = fit(truth, scores, split.name, config.min_area)
    return with_others, None if curve is None else replace(curve, fitted_by=tuple(digests.values()))


def _keep(curve: Calibration, model: Path) -> None:
    """Write the calibration beside its checkpoint, where that can be written to: nobody has asked for the file."""
    try:
        calibration.save(curve, model)
    except OSError as error:
        log.warning("the calibration is not kept beside the checkpoint: %s", error)


def _calibration_told(
    curve: Calibration, split: CocoSplit, digests: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """Return what `metrics.json` says of the calibration, and what a reader has to know of it, as sentences."""
    is_cross_fitted = split.name == VALIDATION
    fitted = {name: value for name, value in asdict(curve).items() if name != "fitted_by"}
    shared = 0 if is_cross_fitted else len(set(curve.fitted_by) & set(digests.values()))
    note = f"{shared} of these {len(split.images)} images fitted the calibration: its error is too small."
    return {**fitted, "cross_fitted": is_cross_fitted}, [note] if shared else []


def notes(split: CocoSplit, model: Path, seen: Leak | None) -> list[str]:
    """Return what a reader has to know of the images and the model, as sentences.

    Args:
        split: what was judged.
        model: the checkpoint.
        seen: what of the images was trained on; None where nobody knows what was.
    """
    said = []
    if seen is None:
        said.append("What this model was trained on is not known: nobody checked whether these images were among it.")
    else:
        for found, what in ((seen.images, "were trained on"), (seen.parts, "show parts that were trained on")):
            if found:
                said.append(f"{len(found)} of these {len(split.images)} images {what}: the figures are too good.")
    variants = sum("augmentation" in image for image in split.images)
    if variants:
        said.append(f"{variants} of these {len(split.images)} images are augmented variants, not photographs.")
    path = model.parent / "config.json"
    config = read_json(path) if path.is_file() else None
    made = config.get("settings") if isinstance(config, dict) else None
    chosen_by = made.get("select_by", "train_loss") if isinstance(made, dict) else "train_loss"
    if chosen_by != "train_loss" and model.name == "best.pt" and split.name == VALIDATION:
        said.append(f"The epoch was chosen by {chosen_by} on the validation split: its figures are too good.")
    return said


def threshold_notes(chosen: Threshold, shared: int, judged: int) -> list[str]:
    """Return what a reader has to know of the threshold, as sentences.

    Args:
        chosen: the threshold.
        shared: how many of the judged images it was chosen on.
        judged: how many images were judged.
    """
    said = []
    if shared:
        which = "these very images" if shared == judged else f"{shared} of these {judged} images"
        said.append(f"The threshold was chosen on {which}: the figures are too good. Judge a test split.")
    if not chosen.reached:
        said.append(f"The aim {chosen.aim} was out of reach on {chosen.chosen_on}: the nearest threshold was taken.")
    return said


def predict_split(
    backend: Backend, split: CocoSplit, batch_size: int | None = None
) -> tuple[list[Prediction], dict[str, float]]:
    """Return a prediction for each image of the split, and the median seconds that an image took.

    The seconds are those of `read` (file to pixels), `network` (a batch's, shared out among its images), and `post`
    (masks from probabilities). Threads read and make masks while the network works, so that they share the machine, and
    a whole split takes less than the sum for each image.

    Args:
        backend: what runs the network.
        split: whose images are judged.
        batch_size: the most images that the network sees at once; by default as many as the backend says.

    Raises:
        FlawmaskError: an image cannot be read or is not of the size that its record says.
    """

    def read(image: Record) -> npt.NDArray[np.uint8]:
        """Return the image's pixels after checking them against its record."""
        path = split.image_path(image)
        pixels = images.read_image(path, backend.spec.intensity)
        if pixels.shape[:2] != (image["height"], image["width"]):
            size = f"{pixels.shape[1]}x{pixels.shape[0]}"
            raise FlawmaskError(f"{path} is {size} but its record says {image['width']}x{image['height']}")
        return pixels

    def post(_: Record, seen: Seen | FlawmaskError) -> tuple[Prediction, tuple[float, float, float]]:
        """Return the prediction and the seconds of reading, network and post-processing."""
        if isinstance(seen, FlawmaskError):
            raise seen
        start = time.perf_counter()
        prediction = seen.prediction(backend.spec)
        return prediction, (seen.read, seen.network, time.perf_counter() - start)

    # By size, so that batches fill, and so that a GPU, which takes long over the first of a size, meets each size once.
    sizes = [(image["height"], image["width"]) for image in split.images]
    order = sorted(range(len(sizes)), key=lambda place: (backend.spec.padded(*sizes[place]), sizes[place]))
    with closing(judge_all(backend, (split.images[place] for place in order), read, post, batch_size)) as judged:
        both = list(track(judged, f"judging {split.name}", total=len(split.images)))
    seconds = np.median([one for _, one in both], axis=0).tolist()
    predictions = {place: prediction for place, (prediction, _) in zip(order, both, strict=True)}
    in_order = [predictions[place] for place in range(len(sizes))]
    return in_order, dict(zip(("read", "network", "post"), seconds, strict=True))
