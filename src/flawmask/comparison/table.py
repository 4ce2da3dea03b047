"""The table of a comparison: a row for each metric and a column for each model, as text for terminal, page and file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flawmask.comparison.entry import Entry
from flawmask.evaluation.metrics import Metric, placed
from flawmask.report.headline import format_interval, format_metric, interval_of, lookup

NOT_THERE = "n/a"

MAX_REASON_LETTERS = 60
"""A longer reason is cut in its cell; the notes below the table have the whole text."""


@dataclass(frozen=True)
class Column:
    """A model of the table.

    Attributes:
        entry: its entry.
        metrics: the content of its `metrics.json`; empty where it was not evaluated.
        speed: its seconds per image by batch size, as `speed.measure` returns them; empty where it was not timed.
    """

    entry: Entry
    metrics: Mapping[str, Any]
    speed: Mapping[str, Any]


def rows(columns: Sequence[Column]) -> list[tuple[str, ...]]:
    """Return the table's rows: a label, then a cell for each model. A cell without a value reads n/a."""
    return [
        ("Result", *(_result(one.entry) for one in columns)),
        *((label, *(_figure(one, metric) for one in columns)) for metric, label in _figures()),
        *((label, *(cell(one) for one in columns)) for label, cell in COSTS.items()),
    ]


def _result(entry: Entry) -> str:
    if entry.reason is None:
        return "evaluated"
    fits = len(entry.reason) <= MAX_REASON_LETTERS
    reason = entry.reason if fits else f"{entry.reason[: MAX_REASON_LETTERS - 1]}\u2026"
    return f"{'failed' if entry.failed else NOT_THERE}: {reason}"


def _figures() -> list[tuple[Metric, str]]:
    """Return the metrics that the table shows, each with its label."""
    shown = placed(lambda one: one.comparison and one.comparison[0])
    return [(one, one.comparison[1]) for one in shown if one.comparison]


def _figure(column: Column, metric: Metric) -> str:
    _, value = lookup(column.metrics, metric.key)
    bounds = interval_of(column.metrics, metric.key) if value is not None else None
    return format_metric(value, metric.shown) + (f" ({format_interval(bounds, metric.shown)})" if bounds else "")


def _learned(text: Callable[[Any], str]) -> Callable[[Column], str]:
    return lambda column: text(column.entry.learned) if column.entry.learned is not None else NOT_THERE


def _seconds(batch: str, which: str) -> Callable[[Column], str]:
    def cell(column: Column) -> str:
        measured = column.speed.get(batch)
        rounds = f" (of {measured['rounds']})" if measured and which == "p99" else ""
        return f"{measured[which]:.3g}{rounds}" if measured else NOT_THERE

    return cell


COSTS: dict[str, Callable[[Column], str]] = {
    "Parameters, million": _learned(lambda learned: f"{learned.parameters / 1e6:.1f}"),
    "Checkpoint, MB": lambda column: _mega(column.entry.checkpoint_bytes),
    "Image size, pixels": _learned(lambda learned: str(learned.image_size)),
    "Epochs": _learned(lambda learned: str(learned.epochs)),
    "Training time": _learned(lambda learned: _duration(learned.seconds)),
    "Peak memory, MB": _learned(lambda learned: _mega(learned.peak_bytes)),
    "Seconds per image, median": _seconds("1", "median"),
    "Seconds per image, p99": _seconds("1", "p99"),
    "Seconds per image in batches of 8, median": _seconds("8", "median"),
    "Seconds per image in batches of 8, p99": _seconds("8", "p99"),
}
"""The rows on what a model costs: a row's label, and the function that returns a model's cell."""


def _mega(count: int | None) -> str:
    return NOT_THERE if count is None else f"{count / 1e6:.0f}" if count >= 1e7 else f"{count / 1e6:.1f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, with numbers aligned to the right."""
    lines = [head, ["---", *("---:" for _ in head[1:])], *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
