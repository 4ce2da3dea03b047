"""The page of a comparison: every model is on it, even where some of its results are missing."""

from pathlib import Path
from typing import Any

import pytest

from flawmask.comparison.entry import Entry
from flawmask.comparison.page import write_page
from flawmask.comparison.table import Column

TIMED = {"1": {"median": 0.12, "p99": 0.5, "rounds": 50}, "8": {"median": 0.01, "p99": 0.02, "rounds": 6}}
METRICS = {"image_auroc": 0.9, "mask_ap": 0.0, "box_ap": None, "intervals": {"image_auroc": [0.8, 1.0]}}


def written(folder: Path, *columns: Column) -> str:
    write_page(folder, "plate & more", columns, ["Take a."], ["No difference <shown>."], ["Budget: 1 epoch."])
    return (folder / "comparison.html").read_text()


@pytest.mark.parametrize("speed", [TIMED, {"1": TIMED["1"], "reason": "no room"}, {"reason": "no room"}, {}])
def test_a_model_is_on_the_page_even_where_timing_it_failed(tmp_path: Path, speed: dict[str, Any]) -> None:
    known = Column(Entry("a", results="a/inference_test"), METRICS, speed)
    html = written(tmp_path, known, Column(Entry("b"), METRICS, TIMED), Column(Entry("c"), {}, {}))
    assert "<h1>3 models on plate &amp; more</h1>" in html
    assert "No difference &lt;shown&gt;." in html
    assert html.split("<table")[1].count(">0.12<") == 1 + ("1" in speed)
    alone = written(tmp_path, known)
    assert ("Seconds per image" in alone.split("<table")[0]) == ("1" in speed)


def test_a_metric_of_0_is_drawn_and_one_that_no_model_has_is_not(tmp_path: Path) -> None:
    picture = written(tmp_path, Column(Entry("a"), METRICS, {})).split("<table")[0]
    assert "Segmenting defects" in picture
    assert "Locating defects" not in picture


def test_there_is_the_table_alone_where_no_model_was_evaluated(tmp_path: Path) -> None:
    html = written(tmp_path, Column(Entry("a", reason="memory ran out", failed=True), {}, {}))
    assert "<svg" not in html
    assert "memory ran out" in html


def test_a_models_name_links_to_its_report(tmp_path: Path) -> None:
    report = tmp_path / "a" / "inference_test" / "report.html"
    report.parent.mkdir(parents=True)
    report.write_text("")
    html = written(tmp_path, Column(Entry("a", results="a/inference_test"), METRICS, {}), Column(Entry("b"), {}, {}))
    assert '<a href="a/inference_test/report.html">a</a>' in html
    assert "<th>b</th>" in html or ">b</th>" in html
