"""What `evaluate` and the stages before it left on disk, read and checked for the report."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flawmask import coco
from flawmask.coco import CocoSplit, Record, read_split
from flawmask.coco_files import has_split
from flawmask.errors import FlawmaskError
from flawmask.files import read_json
from flawmask.settings import Reading

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Results:
    """The results of one evaluation, with what is known of the run and the data set.

    Attributes:
        folder: where `metrics.json` is.
        metrics: its content.
        curves: the content of `curves.json`; empty where there is none.
        run: the run folder's `config.json`; empty where there is none.
        folds: the `folds.json` of a cross-validation, whose results stand for several models; else empty.
        history: its `history.json`; empty where there is none.
        data: the data set's `dataset_info.json`; empty where there is none.
    """

    folder: Path
    metrics: Record
    curves: Record
    run: Record
    folds: Record
    history: dict[str, list[Any]]
    data: Record


def read_results(folder: Path) -> Results:
    """Return what lies in a results folder, the run folder of its model and the data set's folder.

    Raises:
        FlawmaskError: `metrics.json` is missing, is no JSON or lacks what every one of them has.
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
    is_run = run.get("made_by") == "flawmask train"  # many programs leave a config.json
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
    """Return the object in a JSON file that a report can do without; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        content = read_json(path)
    except FlawmaskError as error:
        log.warning("the report leaves it out: %s", error)
        return {}
    return content if isinstance(content, dict) else {}


def read_truth(results: Results) -> CocoSplit:
    """Return the split that was judged.

    Raises:
        FlawmaskError: it is not where `metrics.json` says, or is damaged.
    """
    dataset, split = Path(results.metrics["dataset"]), str(results.metrics["split"])
    if not has_split(dataset, split):
        raise FlawmaskError(
            f"{results.folder / 'metrics.json'} speaks of {dataset / split}, which is not here: "
            "start from the folder that evaluate was started from"
        )
    reading = {name: results.metrics[name] for name in ("crowds", "on_error", "good_name") if name in results.metrics}
    return read_split(dataset, split, Reading(**reading))


def read_detections(results: Results, split: CocoSplit) -> dict[int, list[Record]]:
    """Return the defect detections of each image id, the highest score first; every id of the split is there.

    Raises:
        FlawmaskError: see `coco.read_results`.
    """
    found = coco.read_results(results.folder / "predictions.json", split)
    return {
        number: [record for record in of_image if record["category_id"] in split.defect_ids]
        for number, of_image in found.items()
    }
