"""Read and check the files of `evaluate` and earlier stages for the report."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flawmask import coco_results
from flawmask.coco import CocoSplit, Record, read_split
from flawmask.coco_files import has_split
from flawmask.csv_tables import rows_of
from flawmask.errors import FlawmaskError
from flawmask.files import read_json
from flawmask.settings import Reading

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Results:
    """The results of an evaluation, with the files of its run and data set. A missing file is an empty dictionary.

    Attributes:
        folder: the results folder.
        metrics: the content of `metrics.json`.
        curves: the content of `curves.json`.
        run: the content of the run folder's `config.json`.
        folds: the content of `folds.json`; empty for results that belong to no cross-validation.
        history: the content of the run folder's `history.json`.
        data: the content of the data set's `dataset_info.json`.
    """

    folder: Path
    metrics: Record
    curves: Record
    run: Record
    folds: Record
    history: dict[str, list[Any]]
    data: Record


def read_results(folder: Path) -> Results:
    """Read a results folder, the run folder of its model, and the data set's folder.

    Raises:
        FlawmaskError: `metrics.json` is missing, is no JSON, or lacks a required key.
    """
    path = folder / "metrics.json"
    metrics = read_json(path)
    wanted = ("tp_defect", "fp_defect", "tn_good", "fn_defect", "conf", "min_area", "split", "dataset", "model")
    missing = [key for key in wanted if not isinstance(metrics, dict) or key not in metrics]
    if missing:
        raise FlawmaskError(f"{path} has no {missing[0]}: flawmask evaluate did not write it; evaluate again")
    model = Path(metrics["model"])
    run_dir = model.parent
    run = _optional(run_dir / "config.json")
    is_run = run.get("made_by") == "flawmask train"  # other programs write files with this name, too
    return Results(
        folder=folder,
        metrics=metrics,
        curves=_optional(folder / "curves.json"),
        run=run if is_run else {},
        folds=_optional(model / "folds.json"),
        history=_optional(run_dir / "history.json") if is_run else {},
        data=_optional(Path(metrics["dataset"]) / "dataset_info.json"),
    )


def _optional(path: Path) -> dict[str, Any]:
    """Return the object in an optional JSON file; empty where the file is missing or damaged."""
    if not path.is_file():
        return {}
    try:
        content = read_json(path)
    except FlawmaskError as error:
        log.warning("the report leaves it out: %s", error)
        return {}
    return content if isinstance(content, dict) else {}


def read_truth(results: Results) -> CocoSplit:
    """Return the split that was evaluated. Images whose stored predictions had no verdict are not in it.

    Raises:
        FlawmaskError: the split that `metrics.json` names is missing or damaged.
    """
    dataset, split = Path(results.metrics["dataset"]), str(results.metrics["split"])
    if not has_split(dataset, split):
        raise FlawmaskError(
            f"{results.folder / 'metrics.json'} names {dataset / split}, which does not exist: "
            "run this in the folder in which evaluate was run"
        )
    reading = {name: results.metrics[name] for name in ("crowds", "on_error", "good_name") if name in results.metrics}
    truth = read_split(dataset, split, Reading(**reading))
    if results.metrics.get("total_images") in (None, len(truth.images)):
        return truth
    evaluated = {row["file"] for row in rows_of(results.folder / "predictions.csv")}
    return truth.without(at for at, image in enumerate(truth.images) if image["file_name"] not in evaluated)


def read_detections(results: Results, split: CocoSplit) -> dict[int, list[Record]]:
    """Return the defect detections for each image id of the split, the highest score first.

    Raises:
        FlawmaskError: see `coco_results.read_results`.
    """
    detections = coco_results.read_results(results.folder / "predictions.json", split)
    return {
        image_id: [record for record in of_image if record["category_id"] in split.defect_ids]
        for image_id, of_image in detections.items()
    }
