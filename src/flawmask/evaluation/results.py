"""What `evaluate` leaves on disk: figures, tables, pictures and the report."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from flawmask import images
from flawmask.coco import CocoSplit
from flawmask.csv_tables import Cell, write_table
from flawmask.evaluation.average_precision import coco_results
from flawmask.evaluation.measure import Measured
from flawmask.evaluation.verdicts import Judged
from flawmask.files import whole_folder, write_json
from flawmask.fonts import first_writable
from flawmask.images import Levels
from flawmask.inference.overlay import truth_beside_prediction
from flawmask.inference.stream import MOST_THREADS, in_order
from flawmask.launch import usable_cores
from flawmask.prediction import Prediction
from flawmask.progress import track
from flawmask.report.report import levels_in, write_report


def write_results(
    results_dir: Path, split: CocoSplit, predictions: Sequence[Prediction], measured: Measured, overlays: int
) -> None:
    """Write everything that `evaluate` leaves, the report included, whole or not at all."""
    conf, min_area = measured.metrics["conf"], measured.metrics["min_area"]
    with whole_folder(results_dir) as folder:
        write_json(folder / "metrics.json", measured.metrics)
        write_json(folder / "curves.json", measured.curves)
        write_json(folder / "predictions.json", coco_results(split, predictions))
        _write_table(folder / "predictions.csv", measured.judged, predictions, conf, min_area)
        levels = levels_in(measured.metrics)
        _draw_worst(folder / "overlays", split, measured.judged, predictions, conf, min_area, overlays, levels)
        write_report(folder)


def write_scores(
    results_dir: Path, judged: Sequence[Judged], metrics: Mapping[str, Any], *, has_threshold: bool
) -> None:
    """Write `metrics.json` and `predictions.csv` of a model that gives each image a score and nothing else; without a
    threshold there are no verdicts."""
    with whole_folder(results_dir) as folder:
        write_json(folder / "metrics.json", metrics)
        rows: list[list[Cell]] = []
        for one in judged:
            truth, verdict = ("defect" if is_defect else "good" for is_defect in (one.truth, one.verdict))
            rows.append([one.file_name, one.defect_type, truth, verdict if has_threshold else "", one.score])
        write_table(folder / "predictions.csv", ["file", "defect_type", "truth", "verdict", "score"], rows)


def _write_table(
    path: Path, judged: Sequence[Judged], predictions: Sequence[Prediction], conf: float, min_area: int
) -> None:
    """Write a line per image: truth, verdict, score, instances, defect area in pixels and per cent, probability."""
    columns = [
        *("file", "defect_type", "truth", "verdict", "score"),
        *("instances", "defect_area_px", "defect_area_percent", "defect_probability"),
    ]
    rows = []
    for one, prediction in zip(judged, predictions, strict=True):
        names = ["defect" if is_defect else "good" for is_defect in (one.truth, one.verdict)]
        found = defect_columns(prediction, conf, min_area)
        probability = "" if one.defect_probability is None else f"{one.defect_probability:.6f}"
        rows.append([one.file_name, one.defect_type, *names, f"{one.score:.6f}", *found, probability])
    write_table(path, columns, rows)


def defect_columns(prediction: Prediction, conf: float, min_area: int) -> tuple[int, int | str, str]:
    """Return how many defects there are, the pixels that they cover together, and these in per cent of the image; the
    last two are empty where the network outlines nothing."""
    if not prediction.has_masks:
        return len(prediction.defects(conf, min_area)), "", ""
    area = prediction.defect_area(conf, min_area)
    share = 100 * area / (prediction.height * prediction.width)
    return len(prediction.defects(conf, min_area)), area, f"{share:.4f}"


def _draw_worst(
    folder: Path,
    split: CocoSplit,
    judged: Sequence[Judged],
    predictions: Sequence[Prediction],
    conf: float,
    min_area: int,
    most: int,
    levels: Levels,
) -> None:
    """Draw truth beside prediction: wrong verdicts first, and among equals those whose score was furthest off."""
    folder.mkdir()
    order = sorted(
        range(len(judged)), key=lambda at: (judged[at].outcome == "right", -abs(judged[at].truth - judged[at].score))
    )

    def draw(ranked: tuple[int, int]) -> None:
        rank, at = ranked
        one, image = judged[at], split.images[at]
        name = f"{rank:03d}_{one.outcome}_{Path(one.file_name).stem}.png"
        verdict = f"verdict: {'defect' if one.verdict else 'good'} ({one.score:.2f})"
        truth = first_writable(f"truth: {one.defect_type}", f"truth: {'defect' if one.truth else 'good'}")
        found = predictions[at].defects(conf, min_area)
        pixels = images.read_image(split.image_path(image), levels)
        picture = truth_beside_prediction(split, image, pixels, found, (truth, verdict))
        (folder / name).write_bytes(images.encode_png(picture))

    drawn, threads = enumerate(order[:most], start=1), min(MOST_THREADS, usable_cores())
    with closing(in_order(draw, drawn, 2 * threads, threads)) as done:
        for _ in track(done, "drawing", total=len(order[:most])):
            pass
