"""Read metrics from results, and format them for the report and the comparison."""

import math
from collections.abc import Mapping
from typing import Any

from flawmask.evaluation.metrics import METRICS, Group, Metric, Shown, placed

NBSP, DASH = "\u00a0", "\u2013"
NOT_THERE = "n/a"

LEVELS: dict[str, tuple[Group, ...]] = {
    "Images: good or defect": ("verdicts", "ranking"),
    "Instances: found one by one": ("precision", "overlap"),
    "Pixels": ("pixels",),
}
"""The headings of the report's tables, and the groups of metrics below each."""


def by_level() -> dict[str, list[Metric]]:
    """Return the metrics that the report shows under each heading, in their order."""
    shown = placed(lambda one: one.report)
    return {title: [one for one in shown if one.group in groups] for title, groups in LEVELS.items()}


def lookup(metrics: Mapping[str, Any], key: str) -> tuple[bool, float | None]:
    """Return whether the results have the metric, and its value, which is None where it is undefined."""
    value: Any = metrics
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return False, None
        value = value[part]
    return True, value


def interval_of(metrics: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    """Return the metric's 95 % interval (low, high); None where there is none. For key `a.b` it is under `a_b`."""
    bounds = (metrics.get("intervals") or {}).get(key.replace(".", "_"))
    if not bounds or None in bounds:
        return None
    return float(bounds[0]), float(bounds[1])


def label_of(key: str) -> str:
    """Return a metric's name in the report. A key that an older version wrote is its own name."""
    return METRICS[key].label if key in METRICS else key


def shown_of(key: str) -> Shown:
    """Return the number format of a metric. For an unknown key, from another version's results, it is `percent`."""
    return METRICS[key].shown if key in METRICS else "percent"


def images_of_parts(images: int, groups: int | None) -> str:
    """Return the number of images and, where groups are known, of parts: `201 images of 48 parts`."""
    counted = f"{images} image{'' if images == 1 else 's'}"
    return counted if groups is None else f"{counted} of {groups} part{'' if groups == 1 else 's'}"


def exact_test(against: Mapping[str, Any]) -> str:
    """Return the name of the test behind the p for two models' verdicts."""
    groups = against.get("groups")
    return "McNemar's exact" if groups is None else f"exact, over {groups} parts,"


def format_metric(value: float | None, shown: Shown = "percent") -> str:
    """Return a metric as text; None as n/a."""
    if value is None or shown == "percent":
        return percent(value)
    return decimal(value) if shown == "decimal" else f"{value:.1f}".removesuffix(".0")


def format_interval(bounds: tuple[float, float], shown: Shown = "percent") -> str:
    """Return a metric's interval as text."""
    if shown == "percent":
        return percent_range(bounds)
    return f"{format_metric(bounds[0], shown)}{DASH}{format_metric(bounds[1], shown)}"


def percent(value: float | None) -> str:
    """Return a fraction as `85.7 %`, or n/a."""
    return NOT_THERE if value is None else f"{_tenths(value)}{NBSP}%"


def percent_range(bounds: tuple[float, float] | None) -> str:
    """Return an interval of fractions as `75.0-92.2 %`, with a dash, or n/a."""
    return NOT_THERE if bounds is None else f"{_tenths(bounds[0])}{DASH}{_tenths(bounds[1])}{NBSP}%"


def _tenths(value: float) -> str:
    """Return a fraction as per cent with one decimal. Halves are rounded up, as in the page's script."""
    return f"{math.floor(1000 * value + 0.5) / 10:.1f}"


def whole_percent(value: float) -> str:
    """Return a fraction as whole per cent without the sign. A decimal is added if 0 or 100 would be only rounded."""
    rounded = int(100 * value + 0.5)
    return f"{100 * value:.1f}" if rounded in (0, 100) and value not in (0, 1) else str(rounded)


def decimal(value: float | None) -> str:
    """Return a threshold or a score with two decimals, three where it needs them, or n/a."""
    if value is None:
        return NOT_THERE
    return f"{value:.2f}" if abs(value - round(value, 2)) < 5e-4 else f"{value:.3f}"
