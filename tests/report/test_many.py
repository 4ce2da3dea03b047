"""The report of many images: pictures of the worst, counts of all, and a table in files beside the page."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from flawmask.coco import read_split
from flawmask.csv_tables import read_table
from flawmask.errors import FlawmaskError
from flawmask.evaluation.evaluate import ENTRIES
from flawmask.report import many
from flawmask.report.report import write_report
from report.made import make_dataset, make_run


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results for 40 images, of which five fit on a page, and 15 into a file of the table."""
    for name, value in {"MANY": 20, "WORST": 5, "PART": 15}.items():
        monkeypatch.setattr(many, name, value)
    return make_run(tmp_path / "run", make_dataset(tmp_path / "data", count=40), min_area=60, seed=3)


def data_of(results: Path, name: str = "gallery") -> Any:
    page = (results / "report.html").read_text(encoding="utf-8")
    (text,) = re.findall(f'<script type="application/json" id="{name}-data">(.*?)</script>', page)
    return json.loads(text)


def table_of(results: Path) -> list[tuple[Any, ...]]:
    """The rows of the table's parts: file, type, outcome and score."""
    about = data_of(results, "table")
    rows: list[tuple[Any, ...]] = []
    for number in range(about["parts"]):
        text = (results / about["folder"] / f"{number}.js").read_text(encoding="utf-8")
        (found,) = re.fullmatch(rf"flawmaskRows\({number},(.*)\);\n", text, re.DOTALL).groups()  # type: ignore[union-attr]
        part = json.loads(found)
        kinds = [about["types"][place] for place in part["types"]]
        rows += zip(part["files"], kinds, part["outcomes"], part["scores"], strict=True)
    return rows


def test_the_table_has_the_row_of_each_image_and_the_page_the_worst(results: Path) -> None:
    write_report(results)
    csv = read_table(results / "predictions.csv")
    codes = {("good", "good"): 0, ("defect", "defect"): 1, ("defect", "good"): 2, ("good", "defect"): 3}
    assert table_of(results) == [
        (row["file"], row["defect_type"], codes[row["truth"], row["verdict"]], float(row["score"])) for row in csv
    ]
    assert len(list((results / many.TABLE).iterdir())) == 3
    everything = results.parent / "all"
    results.rename(everything)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(many, "MANY", 1000)
        write_report(everything)
    worst, whole = data_of(everything)["images"][:5], data_of(everything)
    everything.rename(results)
    write_report(results)
    assert [one["file"] for one in data_of(results)["images"]] == [one["file"] for one in worst]
    assert [one["found"] for one in data_of(results)["images"]] == [one["found"] for one in worst] or all(
        len(one["found"]) == len(other["found"]) for one, other in zip(data_of(results)["images"], worst, strict=True)
    )
    counts = data_of(results)["all"]
    truths = Counter(one["truth"] for one in whole["images"])
    assert (sum(counts["good"]), sum(counts["defective"])) == (truths[False], truths[True])
    metrics = json.loads((results / "metrics.json").read_text())
    for step in range(0, many.STEPS + 1, 7):
        rejected = sum(row["truth"] == "defect" and float(row["score"]) >= step / many.STEPS for row in csv)
        assert sum(counts["defective"][step:]) == rejected
    assert counts["atConf"] == {key[:2]: metrics[key] for key in ("tp_defect", "fp_defect", "fn_defect", "tn_good")}


def test_the_page_of_few_images_loads_no_script_and_has_no_table(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(results)
    assert "script-src 'unsafe-inline' 'self'" in (results / "report.html").read_text(encoding="utf-8")
    monkeypatch.setattr(many, "MANY", 1000)
    write_report(results)
    page = (results / "report.html").read_text(encoding="utf-8")
    assert "script-src 'unsafe-inline'\"" in page
    assert "as a table" not in page
    assert len(data_of(results)["images"]) == 40


def test_a_limit_of_the_gallery_counts_and_the_table_is_part_of_the_results(results: Path) -> None:
    write_report(results, gallery_limit=2)
    assert len(data_of(results)["images"]) == 2
    assert many.TABLE in ENTRIES


def test_a_damaged_table_of_verdicts_is_refused_and_no_page_is_written(results: Path) -> None:
    split = read_split(results.parents[1] / "data", "val")
    (results / "predictions.csv").write_text(f"file,truth\n{split.images[0]['file_name']},good\n")
    with pytest.raises(FlawmaskError, match=r"predictions\.csv is no table that flawmask evaluate wrote"):
        write_report(results)
    assert not (results / "report.html").exists()
    assert not (results / many.TABLE).exists()
