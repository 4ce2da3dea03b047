"""Write `report.html` beside `metrics.json`: a verdict in plain words, metrics, curves and all images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flawmask.coco import CocoSplit
from flawmask.files import write_bytes
from flawmask.images import UPPER_BITS, Levels
from flawmask.report import many, sections
from flawmask.report.figures import draw_figures
from flawmask.report.gallery import gallery, image_score
from flawmask.report.page import page, section
from flawmask.report.results import read_detections, read_results, read_truth

NAME = "report.html"

ENTRIES = (NAME, "figures", many.TABLE)
"""The entries that a report adds to a results folder."""


def levels_in(metrics: Mapping[str, Any]) -> Levels:
    """Return the values that became black and white in images of more than 8 bits. Old `metrics.json` lack them."""
    low, high = metrics.get("intensity", UPPER_BITS)
    return low, high


def write_report(results_dir: Path, *, gallery_limit: int | None = None, split: CocoSplit | None = None) -> Path:
    """Write `report.html` and `figures/` into a results folder and return the page's path.

    The page does not contain the folder's path, because the folder may still have a temporary name.

    Args:
        results_dir: the folder with `metrics.json` and `predictions.json` of an evaluation.
        gallery_limit: the most images in the gallery, the worst first; by default all, or 500 if there are more than
            10,000. The page then has a table of all images, too; its rows are in the folder `table`.
        split: the split that was evaluated; by default it is read again.

    Raises:
        FlawmaskError: a file of the results or of the data set is missing or damaged. Then no page is written.
    """
    results = read_results(results_dir)
    metrics, split = results.metrics, split or read_truth(results)
    conf, min_area = metrics["conf"], metrics["min_area"]
    levels, counted = levels_in(metrics), None
    if len(split.images) > many.MANY:
        counted = many.write_table(results, many.WORST if gallery_limit is None else gallery_limit)
        entries = gallery(*many.shown(results, split, counted), conf, min_area, None, levels)
        scores = counted.pairs()
    else:
        entries = gallery(split, read_detections(results, split), conf, min_area, gallery_limit, levels)
        scores = [(entry["truth"], image_score(entry, min_area)) for entry in entries]
    drawn = draw_figures(results, scores)
    body = "".join(
        (
            sections.header(results, split),
            "<main>",
            section("figures", "Figures", sections.headline(metrics), sections.by_class(metrics)),
            section("folds", "Fold by fold", sections.folds(metrics)),
            section("against", "Compared with another model", sections.against(metrics)),
            section("curves", "Curves", sections.curves(results, drawn)),
            section("types", "By defect type", sections.types(metrics)),
            section("instances", "Missed and spurious instances", sections.instances(metrics)),
            section("gallery", "Every image", sections.gallery_controls(entries, len(split.images))),
            section("rows", "Every image, as a table", many.controls(counted) if counted else ""),
            section("data", "The data", sections.data(results, split)),
            section("run", "The run", sections.run(results)),
            "</main>",
            sections.footer(),
        )
    )
    path = results_dir / NAME
    content = {"conf": conf, "min_area": min_area, "images": entries}
    if counted:
        content["all"] = counted.to_json(metrics)
    title = f"{sections.title(results)}: inspection report"
    write_bytes(path, page(title, body, content, counted.table if counted else None).encode(errors="replace"))
    return path
