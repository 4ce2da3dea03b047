"""`evaluate --predictions`: all metrics from stored predictions, without the network."""

import tempfile
from typing import Any, BinaryIO

import numpy as np

from flawmask.coco import CocoSplit, read_split
from flawmask.evaluation.calibrate import out_of_fold
from flawmask.evaluation.config import EvaluateConfig
from flawmask.evaluation.evaluate import ENTRIES, VALIDATION, Evaluated, write_evaluation
from flawmask.evaluation.measure import decide_verdicts
from flawmask.evaluation.spool import StoredPredictions
from flawmask.evaluation.stored import read_stored, stored_facts
from flawmask.evaluation.verdicts import groups_of
from flawmask.files import check_output_folder, sha256_of
from flawmask.inference import threshold
from flawmask.inference.calibration import Calibration
from flawmask.inference.config import SCORE_FLOOR
from flawmask.settings import require

OF_THE_MODEL = ("model_sha256", "intensity", "join", "tile", "overlap", "tile_from")
"""Keys of `records.json` that are also keys of `metrics.json`."""

NO_MODEL = "These predictions were stored earlier. So it was not checked whether training used these images."
NO_MAPS = (
    "Stored predictions hold masks and no score maps. So all figures that need a score for each pixel read n/a: pixel "
    "AUROC, AP, AUPRO and the highest F1."
)


def evaluate_stored(config: EvaluateConfig) -> Evaluated:
    """Evaluate a split from stored predictions and write the results.

    Raises:
        FlawmaskError: predictions or data set are damaged, or do not belong together; an image has no verdict, and
            `on_error` is `stop`; or the output folder holds something else. Nothing is written then.
    """
    with tempfile.TemporaryFile() as file:
        return _evaluate(config, file)


def _evaluate(config: EvaluateConfig, file: BinaryIO) -> Evaluated:
    """Evaluate a split; `file` is an empty file for the predictions."""
    assert config.predictions is not None and isinstance(config.conf, float)
    check_output_folder(config.results_dir, "metrics.json", overwrite=True, what="evaluation", entries=ENTRIES)
    split = read_split(config.dataset_dir, config.split, config)
    split.warn(strict=config.strict)
    facts = stored_facts(config.predictions)
    names = set(split.class_names)
    unknown = [name for name in facts.get("classes", ()) if name not in names]
    require(not unknown, f"{config.predictions} has the class {unknown[:1]}, which {config.dataset_dir} does not list")
    settings = facts.get("settings", {})
    floor = float(settings.get("score_floor", SCORE_FLOOR))
    require(
        floor <= max(config.conf, SCORE_FLOOR),
        f"{config.predictions} lacks instances with a score up to {floor}, so --conf {config.conf:.4g} would miss "
        "defects that count: predict with a lower --score_floor, or give a higher --conf",
    )
    stored, without = read_stored(config.predictions, split, facts, file)
    if without:
        first = min(without)
        require(
            config.on_error == "skip",
            f"{len(without)} of {len(stored)} images have no verdict, for example {split.images[first]['file_name']} "
            f"({without[first]}): leave them out with --on_error skip",
        )
        split = split.without(without)
        stored = stored.kept([at for at in range(len(stored)) if at not in without])
    all_notes = [*facts.get("notes", ()), NO_MODEL, *([NO_MAPS] if facts.get("finds") != "boxes" else [])]
    if settings.get("roi"):
        all_notes.append(
            f"Predictions are cut to the region {settings['roi']}: true defects outside of it count as missed."
        )
    if without:
        all_notes.append(f"{len(without)} images without a verdict were left out: they could not be read.")
    stored, calibrated = _calibrate(config, stored, split, facts)
    chosen = threshold.given(config.conf)
    about: dict[str, Any] = {
        "dataset": config.dataset_dir.as_posix(),
        "model": str(facts.get("model", config.predictions.as_posix())),
        "predictions": config.predictions.as_posix(),
        "threshold": {
            **{name: value for name, value in chosen.to_dict().items() if name != "chosen_by"},
            "same_split": False,
        },
        **{key: facts[key] for key in OF_THE_MODEL if key in facts},
        **calibrated,
    }
    if config.predictions.is_file():
        about["predictions_sha256"] = sha256_of(config.predictions)
    return write_evaluation(config.results_dir, split, stored, config.conf, config, config.seed, about, all_notes)


def _calibrate(
    config: EvaluateConfig, stored: StoredPredictions, split: CocoSplit, facts: dict[str, Any]
) -> tuple[StoredPredictions, dict[str, Any]]:
    """Return the predictions with a calibration each, as `evaluate` gives them, and its record in `metrics.json`.

    On the validation split, they are fitted to the other images. On another split, it is the one of the checkpoint.
    """
    if split.name != VALIDATION:
        known = facts.get("calibration")
        if known is None or facts["min_area"] != config.min_area:
            return stored, {}
        curve = Calibration(known["slope"], known["intercept"], "val", 0, 0, config.min_area)
        return stored.calibrated([curve] * len(stored)), {}
    evaluated = decide_verdicts(split, stored, threshold.DEFAULT, config.min_area)
    truth, scores = np.array([one.truth for one in evaluated]), np.array([one.score for one in evaluated])
    others = out_of_fold(truth, scores, groups_of(evaluated), config.seed, split.name, config.min_area)
    return (stored, {}) if None in others else (stored.calibrated(others), {})
