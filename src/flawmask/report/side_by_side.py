"""`report`: write the report of one run again, or a page with several runs side by side."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flawmask.csv_tables import read_table
from flawmask.errors import FlawmaskError
from flawmask.evaluation.metrics import Metric
from flawmask.files import write_bytes
from flawmask.report.config import ReportConfig
from flawmask.report.figures import draw_losses, inline
from flawmask.report.headline import (
    by_level,
    format_interval,
    format_metric,
    images_of_parts,
    interval_of,
    lookup,
    percent,
)
from flawmask.report.page import GENERATOR, esc, page, section, table
from flawmask.report.report import write_report
from flawmask.report.results import Results, read_results
from flawmask.report.sections import threshold_sentence, verdict

log = logging.getLogger(__name__)


def report(config: ReportConfig) -> list[Path]:
    """Write the reports of one run, or a page with several runs side by side, and return the paths.

    Raises:
        FlawmaskError: a folder holds no results, or `--output` names something else.
    """
    if len(config.runs) > 1:
        return [compare_reports(config.runs, config.output)]
    written = [write_report(folder, gallery_limit=config.gallery) for folder in results_in(config.runs[0])]
    for path in written:
        log.info("wrote %s", path)
    return written


def results_in(run: Path) -> list[Path]:
    """Return the results folders of a run, the newest last. For a results folder, return only that folder.

    Raises:
        FlawmaskError: there is none.
    """
    if (run / "metrics.json").is_file():
        return [run]
    files = sorted(run.glob("inference_*/metrics.json"), key=lambda path: (path.stat().st_mtime, path))
    if not files:
        problem = "holds no results (inference_<split>/metrics.json)" if run.is_dir() else "is not there"
        raise FlawmaskError(f"{run} {problem}: name the folder of a run that flawmask evaluate has evaluated")
    return [path.parent for path in files]


def compare_reports(runs: Sequence[Path], output: Path) -> Path:
    """Write a page with the metrics, the differing settings, the losses and the defect types of several runs.

    It shows the results for the newest split on which all runs were evaluated. If there is no such split, it shows the
    newest results of each run.

    Args:
        runs: run folders or results folders.
        output: the page. Only a page that Flawmask wrote is replaced.

    Raises:
        FlawmaskError: a folder holds no results, or `output` is something else.
    """
    _check_output(output)
    chosen = [read_results(folder) for folder in _chosen([results_in(run) for run in runs])]
    named = dict(zip(_names(chosen), chosen, strict=True))
    notes = _notes(chosen)
    mind = f'<div class="notes" role="note"><h2>Notes</h2><ul>{notes}</ul></div>' if notes else ""
    body = "".join(
        (
            f"<header><h1>{len(named)} runs side by side</h1>{_verdicts(named)}{mind}</header><main>",
            section("figures", "Figures", _figures(named)),
            section("types", "Recall by defect type", _types(named)),
            section("settings", "Settings that differ", _differences(named)),
            section("losses", "Losses", _losses(named)),
            "</main>",
        )
    )
    write_bytes(output, page("Runs side by side", body).encode(errors="replace"))
    log.info("wrote %s", output)
    return output


def _check_output(output: Path) -> None:
    if output.is_dir():
        raise FlawmaskError(f"{output} is a folder: name a file for the page, as in --output comparison.html")
    if output.exists() and GENERATOR.encode() not in output.read_bytes()[:500]:
        raise FlawmaskError(f"{output} is not a page of Flawmask's: name another --output")


def _chosen(found: Sequence[Sequence[Path]]) -> list[Path]:
    """Return a results folder for each run: of the newest split that all have, or else the newest of each run."""
    shared = set.intersection(*({folder.name for folder in folders} for folders in found))
    candidates = [folder for folders in found for folder in folders if folder.name in shared]
    if not candidates:
        return [folders[-1] for folders in found]
    split = max(candidates, key=lambda folder: (folder / "metrics.json").stat().st_mtime).name
    return [next(folder for folder in folders if folder.name == split) for folders in found]


def _names(results: Sequence[Results]) -> list[str]:
    """Return a name for each run: the name of its folder, with a number after it where several are the same."""
    names = [_name(one.folder.resolve()) for one in results]
    total, so_far = Counter(names), Counter[str]()
    numbered = []
    for name in names:
        so_far[name] += 1
        numbered.append(f"{name} ({so_far[name]})" if total[name] > 1 else name)
    return numbered


def _name(folder: Path) -> str:
    return folder.parent.name if folder.name.startswith("inference_") else folder.name


def _verdicts(named: Mapping[str, Results]) -> str:
    """Return each run's verdict in plain words."""
    return "".join(
        f"<h3>{esc(name)}, split {esc(one.metrics['split'])}{_parts(one.metrics)}</h3><p>{verdict(one.metrics)}</p>"
        f'<p class="small">{esc(threshold_sentence(one.metrics))}</p>'
        for name, one in named.items()
    )


def _parts(metrics: Mapping[str, Any]) -> str:
    """Return the number of evaluated images and parts, where groups are known."""
    groups = metrics.get("groups")
    return "" if groups is None else f", {images_of_parts(metrics['total_images'], groups)}"


def _notes(results: Sequence[Results]) -> str:
    """Return notes as list items: what makes the comparison invalid, and the notes of the evaluations."""
    notes = Counter(note for one in results for note in one.metrics.get("notes") or [])
    lines = [f"{note} ({count} of {len(results)} runs)" for note, count in notes.items()]
    evaluated = {_evaluated_images(one) for one in results}
    if len(evaluated) > 1:
        lines.insert(0, "The runs were evaluated on different images: their figures cannot be compared.")
    return "".join(f"<li>{esc(line)}</li>" for line in lines)


def _evaluated_images(results: Results) -> frozenset[tuple[str, ...]]:
    """Return the names and the truth of the evaluated images; without a table of images, the data set and the split."""
    path = results.folder / "predictions.csv"
    if not path.is_file():
        return frozenset({(results.metrics["dataset"], results.metrics["split"])})
    return frozenset((row["file"], row["truth"]) for row in read_table(path))


def _figures(named: Mapping[str, Results]) -> str:
    """Return a table of metrics for each level, with a column for each run."""
    parts = []
    for title, group in by_level().items():
        rows = [_row(one, named) for one in group if any(lookup(run.metrics, one.key)[0] for run in named.values())]
        if rows:
            parts.append(table((esc(title), *map(esc, named)), rows, "compare"))
    return "".join(parts) + (
        '<p class="small">In brackets: the 95 % interval. A figure is marked as best if its interval lies beyond those '
        "of all other runs. Intervals that overlap show neither that runs are equal nor which one is better: "
        "flawmask evaluate --against compares two runs image by image.</p>"
    )


def _row(metric: Metric, named: Mapping[str, Results]) -> list[str]:
    best = best_of(metric, [one.metrics for one in named.values()])
    cells = []
    for place, one in enumerate(named.values()):
        there, value = lookup(one.metrics, metric.key)
        bounds = interval_of(one.metrics, metric.key)
        text = format_metric(value, metric.shown) if there else ""
        mark = f'<strong class="best">{text} best</strong>' if place == best else text
        interval = f' <span class="small">({format_interval(bounds, metric.shown)})</span>' if bounds else ""
        cells.append(mark + interval)
    return [esc(metric.label), *cells]


def best_of(metric: Metric, metrics: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the index of the run whose interval lies beyond those of all others; None where there is no such run."""
    intervals = [interval_of(one, metric.key) for one in metrics]
    defined = [bounds for bounds in intervals if bounds is not None]
    if len(defined) < len(intervals) or len(defined) < 2:
        return None
    for place, (low, high) in enumerate(defined):
        others = defined[:place] + defined[place + 1 :]
        if all(high < other[0] if metric.lower_is_better else low > other[1] for other in others):
            return place
    return None


def _types(named: Mapping[str, Results]) -> str:
    """Return a table of the parts of each type that each run finds."""
    tables = [one.metrics.get("recall_by_type") or {} for one in named.values()]
    rows = []
    for kind in sorted({kind for by_type in tables for kind in by_type}):
        of_type = [by_type.get(kind) for by_type in tables]
        cells = (f"{row['found']} of {row['images']} ({percent(row['recall'])})" if row else "" for row in of_type)
        rows.append((esc(kind), *cells))
    return table(("type", *map(esc, named)), rows, "compare") if rows else ""


def _differences(named: Mapping[str, Results]) -> str:
    """Return a table of the settings in which the runs differ."""
    settings = [_settings(one) for one in named.values()]
    keys = {key: None for one in settings for key in one}  # used as an ordered set
    rows = [
        (esc(key), *(esc(one.get(key, "")) for one in settings))
        for key in keys
        if len({repr(one.get(key)) for one in settings}) > 1
    ]
    return table(("setting", *map(esc, named)), rows, "compare") if rows else "<p>None.</p>"


def _settings(results: Results) -> dict[str, Any]:
    """Return the settings of a run and of its evaluation, without the run's own folder."""
    run = results.folds or results.run
    training = {
        key: value for key, value in (run.get("settings") or {}).items() if key not in ("output_dir", "overwrite")
    }
    about = {key: run[key] for key in ("device", "precision", "cores") if key in run}
    versions = {f"version of {name}": version for name, version in (run.get("versions") or {}).items()}
    evaluation = {f"evaluation: {key}": results.metrics[key] for key in ("dataset", "split", "conf", "min_area")}
    return training | about | versions | evaluation


def _losses(named: Mapping[str, Results]) -> str:
    drawn = draw_losses({name: one.history for name, one in named.items()})
    pictures = (f"<figure>{inline(svg, key, key.replace('_', ' '))}</figure>" for key, svg in drawn.items())
    return f'<div class="curves wide">{"".join(pictures)}</div>' if drawn else ""
