"""Write the results of `evaluate`: metrics, tables, pictures and the report."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from flawmask import images
from flawmask.coco import CocoSplit
from flawmask.csv_tables import Cell, write_table
from flawmask.evaluation.average_precision import coco_results
from flawmask.evaluation.measure import SplitMetrics
from flawmask.evaluation.verdicts import EvaluatedImage
from flawmask.files import atomic_folder, write_json
from flawmask.fonts import first_writable
from flawmask.images import Levels
from flawmask.inference.overlay import truth_beside_prediction
from flawmask.inference.stream import MAX_THREADS, map_in_order
from flawmask.json_lists import write_json_list
from flawmask.launch import usable_cores
from flawmask.prediction import Prediction
from flawmask.progress import track
from flawmask.report.report import levels_in, write_report


def write_results(
    results_dir: Path, split: CocoSplit, predictions: Sequence[Prediction], measured: SplitMetrics, overlays: int
) -> None:
    """Write all results of `evaluate`, the report included. An incomplete folder is never left behind."""
    conf, min_area = measured.metrics["conf"], measured.metrics["min_area"]
    with atomic_folder(results_dir) as folder:
        write_json(folder / "metrics.json", measured.metrics)
        write_json(folder / "curves.json", measured.curves)
        write_json_list(folder / "predictions.json", coco_results(split, predictions))
        _write_table(folder / "predictions.csv", measured.images, predictions, conf, min_area)
        levels = levels_in(measured.metrics)
        _draw_overlays(folder / "overlays", split, measured.images, predictions, conf, min_area, overlays, levels)
        write_report(folder, split=split)


def write_scores(
    results_dir: Path, evaluated: Sequence[EvaluatedImage], metrics: Mapping[str, Any], *, has_threshold: bool
) -> None:
    """Write `metrics.json` and `predictions.csv` for a model that only scores images.

    Without a threshold there are no verdicts, and their column is empty.
    """
    with atomic_folder(results_dir) as folder:
        write_json(folder / "metrics.json", metrics)
        rows: list[list[Cell]] = []
        for one in evaluated:
            truth, verdict = ("defect" if is_defect else "good" for is_defect in (one.truth, one.verdict))
            rows.append([one.file_name, one.defect_type, truth, verdict if has_threshold else "", one.score])
        write_table(folder / "predictions.csv", ["file", "defect_type", "truth", "verdict", "score"], rows)


def _write_table(
    path: Path, evaluated: Sequence[EvaluatedImage], predictions: Sequence[Prediction], conf: float, min_area: int
) -> None:
    """Write a line for each image: truth, verdict, score, number of instances, defect area, probability of a defect."""
    columns = [
        *("file", "defect_type", "truth", "verdict", "score"),
        *("instances", "defect_area_px", "defect_area_percent", "defect_probability"),
    ]

    def row(one: EvaluatedImage, prediction: Prediction) -> list[Cell]:
        names = ["defect" if is_defect else "good" for is_defect in (one.truth, one.verdict)]
        defects = defect_columns(prediction, conf, min_area)
        probability = "" if one.defect_probability is None else f"{one.defect_probability:.6f}"
        return [one.file_name, one.defect_type, *names, f"{one.score:.6f}", *defects, probability]

    write_table(path, columns, map(row, evaluated, predictions))


def defect_columns(prediction: Prediction, conf: float, min_area: int) -> tuple[int, int | str, str]:
    """Return the number of defects, and the area of their union in pixels and in per cent of the image.

    The areas are empty where the network predicts no masks.
    """
    if not prediction.has_masks:
        return len(prediction.defects(conf, min_area)), "", ""
    area = prediction.defect_area(conf, min_area)
    share = 100 * area / (prediction.height * prediction.width)
    return len(prediction.defects(conf, min_area)), area, f"{share:.4f}"


def _draw_overlays(
    folder: Path,
    split: CocoSplit,
    evaluated: Sequence[EvaluatedImage],
    predictions: Sequence[Prediction],
    conf: float,
    min_area: int,
    limit: int,
    levels: Levels,
) -> None:
    """Draw truth beside prediction for the worst images: wrong verdicts first, then by the error of the score."""
    folder.mkdir()

    def badness(at: int) -> tuple[bool, float]:
        return evaluated[at].outcome == "right", -abs(evaluated[at].truth - evaluated[at].score)

    order = sorted(range(len(evaluated)), key=badness)

    def draw(ranked: tuple[int, int]) -> None:
        """Write the picture of one image, given its rank and its place in the split."""
        rank, at = ranked
        one, image = evaluated[at], split.images[at]
        name = f"{rank:03d}_{one.outcome}_{Path(one.file_name).stem}.png"
        verdict = f"verdict: {'defect' if one.verdict else 'good'} ({one.score:.2f})"
        truth = first_writable(f"truth: {one.defect_type}", f"truth: {'defect' if one.truth else 'good'}")
        defects = predictions[at].defects(conf, min_area)
        pixels = images.read_image(split.image_path(image), levels)
        picture = truth_beside_prediction(split, image, pixels, defects, (truth, verdict))
        (folder / name).write_bytes(images.encode_png(picture))

    worst, threads = enumerate(order[:limit], start=1), min(MAX_THREADS, usable_cores())
    with closing(map_in_order(draw, worst, 2 * threads, threads)) as done:
        for _ in track(done, "drawing", total=len(order[:limit])):
            pass
