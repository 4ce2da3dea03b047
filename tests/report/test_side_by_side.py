"""Several runs on one page. A metric is marked as best only where the intervals allow it."""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import tyro

from flawmask.errors import FlawmaskError
from flawmask.evaluation.metrics import METRICS
from flawmask.files import read_json, write_json
from flawmask.report.config import ReportConfig
from flawmask.report.side_by_side import best_of, compare_reports, report
from report.made import make_run
from report.test_report import change, parsed, words


@pytest.fixture
def runs(tmp_path: Path, dataset: Path) -> list[Path]:
    """Two runs evaluated on the same images."""
    return [make_run(tmp_path / name, dataset, seed=seed).parent for name, seed in (("run_a", 0), ("run_b", 5))]


def test_runs_stand_side_by_side_with_figures_settings_types_and_losses(runs: list[Path], tmp_path: Path) -> None:
    page = compare_reports(runs, tmp_path / "comparison.html")
    text = words(page)
    first, second = (read_json(run / "inference_val" / "metrics.json") for run in runs)
    low, high = first["intervals"]["recall"]
    assert f"Recall {100 * first['recall']:.1f} % ( {100 * low:.1f}" in text.replace("(", "( ")
    assert f"{100 * second['recall']:.1f} % ({100 * second['intervals']['recall'][0]:.1f}\u2013" in text
    assert f"{100 * high:.1f} %)" in text
    assert "seed 0 5" in text
    assert "epochs" not in text.split("Settings that differ")[1].split("Losses")[0]
    row = first["recall_by_type"]["scratch"]
    assert f"scratch {row['found']} of {row['images']}" in text
    assert sum(tag == "svg" for tag, _ in parsed(page).tags) == 2
    assert "different images" not in text
    assert not re.search(r"https?://", page.read_text(encoding="utf-8"))


def test_an_interval_is_best_only_if_it_lies_beyond_all_others() -> None:
    def metrics(*bounds: float | None) -> dict[str, object]:
        return {"x": 0.5, "intervals": {"x": None if None in bounds else list(bounds)}}

    more, less = (replace(METRICS["recall"], key="x", lower_is_better=is_lower) for is_lower in (False, True))
    apart, touching = [metrics(0.1, 0.3), metrics(0.4, 0.6)], [metrics(0.1, 0.4), metrics(0.4, 0.6)]
    assert best_of(more, apart) == 1
    assert best_of(less, apart) == 0
    assert best_of(more, touching) is None
    assert best_of(less, touching) is None
    assert best_of(more, [*apart, metrics(None)]) is None
    assert best_of(more, [*apart, metrics(0.5, 0.7)]) is None
    assert best_of(more, apart[:1]) is None


def test_the_page_marks_the_best_interval(runs: list[Path], tmp_path: Path) -> None:
    assert " best" not in words(compare_reports(runs, tmp_path / "comparison.html")).split("In brackets")[0]
    path = runs[1] / "inference_val" / "metrics.json"
    metrics = read_json(path)
    change(path, mask_ap=0.9, intervals={**metrics["intervals"], "mask_ap": [0.85, 0.95]})
    assert "Mask AP 51.2 % (45.2\u201355.2 %) 90.0 % best (85.0\u201395.0 %)" in words(
        compare_reports(runs, tmp_path / "comparison.html")
    )


def test_runs_evaluated_on_different_images_are_compared_with_a_note(runs: list[Path], tmp_path: Path) -> None:
    table = runs[1] / "inference_val" / "predictions.csv"
    table.write_text("\n".join(table.read_text().splitlines()[:-1]) + "\n")
    text = words(compare_reports(runs, tmp_path / "comparison.html"))
    assert "The runs were evaluated on different images: their figures cannot be compared." in text


def test_the_newest_split_that_all_were_evaluated_on_is_compared(runs: list[Path], tmp_path: Path) -> None:
    for run, splits in zip(runs, (("test", "other"), ("test",)), strict=True):
        for split in splits:
            folder = run / f"inference_{split}"
            folder.mkdir()
            metrics = read_json(run / "inference_val" / "metrics.json")
            write_json(folder / "metrics.json", {**metrics, "split": split})
            os.utime(folder / "metrics.json", ns=(0, 2**62))
    text = words(compare_reports(runs, tmp_path / "comparison.html"))
    assert "run_a, split test" in text
    assert "run_b, split test" in text


def test_runs_with_the_same_name_are_numbered(runs: list[Path], tmp_path: Path) -> None:
    text = words(compare_reports([runs[0], runs[0] / "inference_val"], tmp_path / "comparison.html"))
    assert "run_a (1), split val" in text
    assert "run_a (2), split val" in text


def test_one_run_gets_its_reports_written_again(runs: list[Path]) -> None:
    config = tyro.cli(ReportConfig, args=[str(runs[0]), "--gallery", "2"])
    assert report(config) == [runs[0] / "inference_val" / "report.html"]
    assert "the 2 worst are shown" in words(runs[0] / "inference_val" / "report.html")


def test_several_runs_go_to_the_named_page(runs: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "pages" / "both.html"
    assert report(tyro.cli(ReportConfig, args=[*map(str, runs), "--output", str(output)])) == [output]
    assert report(tyro.cli(ReportConfig, args=[*map(str, runs), "--output", str(output)])) == [output]


def test_a_folder_without_results_and_an_output_that_is_no_page_are_refused(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FlawmaskError, match=r"empty holds no results \(inference_<split>/metrics\.json\)"):
        report(ReportConfig(runs=(tmp_path / "empty",)))
    with pytest.raises(FlawmaskError, match="gone is not there"):
        report(ReportConfig(runs=(runs[0], tmp_path / "gone"), output=tmp_path / "page.html"))
    other = tmp_path / "thesis.html"
    other.write_text("<html>mine</html>")
    with pytest.raises(FlawmaskError, match=r"thesis\.html is not a page of Flawmask's"):
        compare_reports(runs, other)
    assert other.read_text() == "<html>mine</html>"
    with pytest.raises(FlawmaskError, match="is a folder: name a file"):
        compare_reports(runs, tmp_path)
    with pytest.raises(FlawmaskError, match="--gallery is -1"):
        ReportConfig(runs=(runs[0],), gallery=-1)
    with pytest.raises(FlawmaskError, match="at least one run"):
        ReportConfig(runs=())
