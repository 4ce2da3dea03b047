"""The page of a comparison: the recommendation, the reasons, and the table."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from flawmask.comparison.differences import questions
from flawmask.comparison.table import NOT_THERE, Column, rows
from flawmask.files import write_bytes
from flawmask.report.figures import BLUE, INK, STYLE, inline, saved
from flawmask.report.headline import interval_of
from flawmask.report.page import esc, page, section, table


def write_page(
    folder: Path,
    title: str,
    columns: Sequence[Column],
    recommended: Sequence[str],
    shown: Sequence[str],
    notes: Sequence[str],
) -> None:
    """Write `comparison.html`.

    Args:
        folder: the comparison's folder.
        title: the category or data set.
        columns: the models.
        recommended: the recommendation, as sentences.
        shown: what the metrics show, as sentences.
        notes: notes on the protocol, as sentences.
    """
    reports = [
        f'<a href="{esc(one.entry.results)}/report.html">{esc(one.entry.name)}</a>'
        if one.entry.results and (folder / one.entry.results / "report.html").is_file()
        else esc(one.entry.name)
        for one in columns
    ]
    body = "".join(
        (
            f"<header><h1>{len(columns)} models on {esc(title)}</h1>",
            "".join(f'<p class="verdict">{esc(line)}</p>' for line in recommended),
            f'<div class="notes" role="note"><h2>Notes</h2>{_list(notes)}</div></header><main>',
            section("shown", "What the figures show", _list(shown), _picture(columns)),
            section("table", "Figures and costs", _table(reports, rows(columns))),
            "</main>",
        )
    )
    write_bytes(folder / "comparison.html", page(f"Models on {title}", body).encode())


def _list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{esc(line)}</li>' for line in lines)}</ul>" if lines else ""


def _table(reports: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return the table, with intervals in small print and links from the models' names to their reports."""
    cells = [[esc(row[0]), *(_cell(text) for text in row[1:])] for row in body]
    note = '<p class="small">In brackets: the 95 % interval of each figure by itself.</p>'
    return table(("", *reports), cells, "compare") + note


def _cell(text: str) -> str:
    figure, bracket, interval = text.partition(" (")
    return esc(figure) + (f' <span class="small">({esc(interval)}</span>' if bracket else "")


def _picture(columns: Sequence[Column]) -> str:
    """Return a picture with a panel for each ranked metric, with intervals, and a panel for the time per image."""
    evaluated = [one for one in columns if one.metrics]
    panels: list[tuple[str, Callable[[Axes, Sequence[Column]], None]]] = [
        (title, partial(_figures, key))
        for key, title in questions().items()
        if any(one.metrics.get(key) is not None for one in evaluated)
    ]
    if any("1" in one.speed for one in evaluated):
        panels.append(("Seconds per image", _speeds))
    if not panels:
        return ""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.2 + 2.6 * len(panels), 1.1 + 0.36 * len(evaluated)), layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for place, (title, draw) in zip(axes, panels, strict=True):
            draw(place, evaluated)
            place.set_title(title.replace(" (", "\n("))
            place.grid(visible=False, axis="y")
        axes[0].set_yticks(range(len(evaluated)), [one.entry.name for one in evaluated])
        axes[0].set_ylim(len(evaluated) - 0.5, -0.5)
        svg = saved(figure, "svg").decode()
    return (
        f"<figure>{inline(svg, 'models', 'Each model, its figures with their 95 % intervals, and its time')}</figure>"
    )


def _figures(key: str, axes: Axes, columns: Sequence[Column]) -> None:
    for place, one in enumerate(columns):
        value = one.metrics.get(key)
        if value is None:
            axes.text(0.0, place, NOT_THERE, va="center", color=INK, fontsize=8)
            continue
        low, high = interval_of(one.metrics, key) or (value, value)
        axes.plot([low, high], [place, place], color=BLUE, linewidth=4, alpha=0.4, solid_capstyle="butt")
        axes.plot([value], [place], "|", color=BLUE, markersize=11, markeredgewidth=2.5)
    axes.set_xlim(-0.02, 1.02)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _speeds(axes: Axes, columns: Sequence[Column]) -> None:
    for place, one in enumerate(columns):
        measured = one.speed.get("1")
        if measured is not None:
            axes.plot([measured["median"]], [place], "o", color=BLUE, markersize=6)
            axes.plot([measured["p99"]], [place], "|", color=BLUE, markersize=11)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("median, and p99 as a line")
