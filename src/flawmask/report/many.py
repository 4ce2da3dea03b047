"""The report of more images than a page can hold: pictures of the worst, counts of all, and a table in files.

In memory are the worst images, and a score and a bit for each of the others. The table of all images is in parts beside
the page. The page's script loads them when it is asked to.
"""

import heapq
import json
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from flawmask import coco_results
from flawmask.coco import CocoSplit, Record
from flawmask.csv_tables import rows_of
from flawmask.errors import FlawmaskError
from flawmask.files import atomic_folder
from flawmask.report.page import esc
from flawmask.report.results import Results

MANY = 10_000
"""With more images than this, the page has pictures of the worst only, and a table."""

WORST = 500
"""The number of pictures."""

PART = 50_000
"""Rows of the table in each file: about 2 MB."""

STEPS = 1000
"""The page counts all images at thresholds that are multiples of 1 / STEPS, as the slider's steps are."""

TABLE = "table"
"""The folder of the table's parts."""

OUTCOMES = {(False, False): 0, (True, True): 1, (True, False): 2, (False, True): 3}
"""The number of an outcome in the table, by truth and verdict."""


@dataclass(frozen=True)
class Counted:
    """What the report says of all images.

    Attributes:
        worst: the names of the worst images.
        truths: 1 for each defective image, 0 for each good one.
        scores: the score of each image, with six decimals.
        parts: the number of files of the table.
        size: their size in bytes.
        types: the defect types by their number in the table.
    """

    worst: frozenset[str]
    truths: "array[int]"
    scores: "array[float]"
    parts: int
    size: int
    types: tuple[str, ...]

    def pairs(self) -> list[tuple[bool, float]]:
        """Return for each image whether it is defective, and its score."""
        return [(truth == 1, score) for truth, score in zip(self.truths, self.scores, strict=True)]

    def to_json(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Return the numbers of images for the page's script: by truth and step of the score, and at the threshold."""
        steps = np.floor(np.array(self.scores) * STEPS + 1e-6).astype(int)
        truths = np.array(self.truths)
        return {
            "good": np.bincount(steps[truths == 0], minlength=STEPS + 1).tolist(),
            "defective": np.bincount(steps[truths == 1], minlength=STEPS + 1).tolist(),
            "atConf": {name[:2]: metrics[name] for name in ("tp_defect", "fp_defect", "fn_defect", "tn_good")},
        }

    @property
    def table(self) -> dict[str, Any]:
        """Where the table is, for the page's script."""
        return {"folder": TABLE, "parts": self.parts, "types": self.types}


def write_table(results: Results, count: int) -> Counted:
    """Write the table's parts beside the page, from `predictions.csv`, and return what the page says of all images.

    Args:
        results: the results of an evaluation.
        count: the number of images that the page shows.

    Raises:
        FlawmaskError: `predictions.csv` is missing or damaged.
    """
    path = results.folder / "predictions.csv"
    truths, scores, types = array("b"), array("d"), dict[str, int]()
    worst: list[tuple[float, str]] = []
    try:
        rows = rows_of(path)
        with atomic_folder(results.folder / TABLE) as folder:
            number = 0
            while part := list(islice(rows, PART)):
                truth, verdict = ([row[key] == "defect" for row in part] for key in ("truth", "verdict"))
                score = [float(row["score"]) for row in part]
                rated = [
                    ((true == seen) - abs(true - value), row["file"])
                    for row, true, seen, value in zip(part, truth, verdict, score, strict=True)
                ]
                worst = heapq.nsmallest(count, [*worst, *rated])
                columns = {
                    "files": [row["file"] for row in part],
                    "types": [types.setdefault(row["defect_type"], len(types)) for row in part],
                    "outcomes": [OUTCOMES[pair] for pair in zip(truth, verdict, strict=True)],
                    "scores": score,
                }
                text = json.dumps(columns, ensure_ascii=False, separators=(",", ":"))
                (folder / f"{number}.js").write_text(
                    f"flawmaskRows({number},{text});\n", encoding="utf-8", newline="\n"
                )
                truths.extend(truth)
                scores.extend(score)
                number += 1
    except (OSError, KeyError, ValueError) as error:
        raise FlawmaskError(f"{path} is no table that flawmask evaluate wrote: evaluate again ({error})") from None
    size = sum(file.stat().st_size for file in (results.folder / TABLE).iterdir())
    return Counted(frozenset(file for _, file in worst), truths, scores, number, size, tuple(types))


def shown(results: Results, split: CocoSplit, counted: Counted) -> tuple[CocoSplit, dict[int, list[Record]]]:
    """Return the part of the split that the page shows, and the defect detections for each image id of it.

    Raises:
        FlawmaskError: see `coco_results.results_of`.
    """
    images = tuple(image for image in split.images if image["file_name"] in counted.worst)
    detections: dict[int, list[Record]] = {image["id"]: [] for image in images}
    for record in coco_results.results_of(results.folder / "predictions.json", split, detections.keys()):
        if record["category_id"] in split.defect_ids:
            detections[record["image_id"]].append(record)
    for of_image in detections.values():
        of_image.sort(key=lambda record: -float(record["score"]))
    return replace(split, images=images), detections


def controls(counted: Counted) -> str:
    """Return the table of all images with its filters; the script fills it."""
    options = "".join(f'<option value="{at}">{esc(name)}</option>' for at, name in enumerate(counted.types))
    outcomes = {"": "all", "2": "missed", "3": "false alarm", "1": "right, defective", "0": "right, good"}
    results = "".join(f'<option value="{key}">{name}</option>' for key, name in outcomes.items())
    return f"""<p id="table-load">{len(counted.scores)} images, in {counted.parts} files of the folder
<code>{TABLE}</code> beside this page.
<button type="button" id="load">Load the table ({counted.size / 1e6:.0f} MB)</button></p>
<div id="table" hidden><div class="filters">
<label>Name contains <input id="table-name" type="search"></label>
<label>Type <select id="table-type"><option value="">all</option>{options}</select></label>
<label>Outcome <select id="table-outcome">{results}</select></label>
<label>Score from <input id="table-low" type="number" min="0" max="1" step="0.01" value="0"></label>
<label>to <input id="table-high" type="number" min="0" max="1" step="0.01" value="1"></label>
<label>Order <select id="table-order"><option value="file">as in the data set</option>
<option value="falling">highest score first</option><option value="rising">lowest score first</option></select></label>
</div><p id="table-count" aria-live="polite"></p>
<div class="scroll"><table><thead><tr><th scope="col">image</th><th scope="col">truth</th><th scope="col">outcome</th>
<th scope="col">score</th></tr></thead><tbody id="table-rows"></tbody></table></div>
<p><button type="button" id="table-back">Back</button> <button type="button" id="table-next">Next</button></p></div>"""
