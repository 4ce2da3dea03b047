"""The text that `evaluate` prints."""

from collections.abc import Mapping
from typing import Any

from flawmask.evaluation.metrics import METRICS, Line, Metric, Shown
from flawmask.report.headline import exact_test, images_of_parts, interval_of, lookup, shown_of

RULE = "=" * 60


def percent(value: float | None) -> str:
    """Return a fraction as `88.24%`; None as `n/a`."""
    return "n/a" if value is None else f"{value:.2%}"


def metrics_block(metrics: Mapping[str, Any]) -> str:
    """Return the block of overall metrics."""
    body = [f"{label:<9}: {_value(metrics, one)}" for one, label in _on(metrics, "block")]
    return "\n".join(["OVERALL METRICS", RULE, *body, RULE])


def summary(metrics: Mapping[str, Any]) -> str:
    """Return the block of overall metrics, and below it counts, intervals, further metrics and notes."""
    intervals = (text.format(_interval(metrics, one)) for one, text in _on(metrics, "intervals"))
    groups = metrics.get("groups")
    lines = [
        metrics_block(metrics),
        *([f"Images: {images_of_parts(metrics['total_images'], groups)}; intervals are over parts"] if groups else []),
        f"95 % intervals: {', '.join(intervals)}",
        f"Verdicts: {metrics['tp_defect']} defects found, {metrics['fn_defect']} missed; "
        f"{metrics['tn_good']} good {'images' if groups else 'parts'} passed, {metrics['fp_defect']} rejected",
        f"Found by type: {_by_type(metrics) or 'n/a'}",
        f"Threshold: {_threshold(metrics['threshold'])}",
        f"Ranking of images: {', '.join(_line(metrics, 'ranking'))}",
        f"False alarms at a recall of {_levels(metrics, 'false alarms')}",
        *([f"Recall at false alarms of {recalls}"] if (recalls := _levels(metrics, "recall at false alarms")) else []),
        f"Mask AP: {', '.join(_line(metrics, 'masks'))}",
        "; ".join(_line(metrics, "boxes")),
        f"Pixels: {', '.join(_line(metrics, 'pixels'))}",
        f"Instances: {metrics['instances']['matched']} of {metrics['instances']['truth']} found; wrong: "
        + ", ".join(f"{count} {kind}" for kind, count in metrics["instance_errors"].items() if kind != "missed"),
        *([_seconds(metrics)] if "seconds" in metrics else []),
        *_folds(metrics),
        *_against(metrics),
        *(f"Note: {note}" for note in metrics["notes"]),
    ]
    return "\n".join(lines)


def _on(metrics: Mapping[str, Any], line: Line) -> list[tuple[Metric, str]]:
    """Return the metrics of a line, each with its text. Results of earlier versions may lack some metrics."""
    return [(one, one.console[line]) for one in METRICS.values() if line in one.console and lookup(metrics, one.key)[0]]


def _line(metrics: Mapping[str, Any], line: Line) -> list[str]:
    """Return the texts of a line's metrics, each value with its interval if it has one."""
    return [text.format(_with_interval(metrics, one)) for one, text in _on(metrics, line)]


def _levels(metrics: Mapping[str, Any], line: Line) -> str:
    """Return the texts of a line's metrics, each value with its interval. A missing interval is shown as n/a."""
    return "; ".join(
        text.format(f"{_value(metrics, one)} ({_interval(metrics, one)})") for one, text in _on(metrics, line)
    )


def _value(metrics: Mapping[str, Any], metric: Metric) -> str:
    value = lookup(metrics, metric.key)[1]
    return "n/a" if value is None else _written(value, metric.shown)


def _interval(metrics: Mapping[str, Any], metric: Metric) -> str:
    bounds = interval_of(metrics, metric.key)
    return "n/a" if bounds is None else " to ".join(_written(bound, metric.shown, digits=1) for bound in bounds)


def _with_interval(metrics: Mapping[str, Any], metric: Metric) -> str:
    has_interval = interval_of(metrics, metric.key) is not None
    return _value(metrics, metric) + (f" ({_interval(metrics, metric)})" if has_interval else "")


def _written(value: float, shown: Shown, sign: str = "", digits: int = 2) -> str:
    """Return a value as text.

    Args:
        value: the value.
        shown: the number format.
        sign: `+` for a difference.
        digits: decimal places of percentages.
    """
    if shown == "percent":
        return f"{value:{sign}.{digits}%}"
    return f"{value:{sign}.3f}" if shown == "decimal" else f"{value:{sign}.1f}".removesuffix(".0")


def _by_type(metrics: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {row['found']} of {row['images']}" for name, row in metrics["recall_by_type"].items())


def _threshold(threshold: Mapping[str, Any]) -> str:
    if threshold["how"] != "aim":
        return f"{threshold['value']:.3f} ({threshold['how']})"
    parts = f" ({threshold['groups']} parts)" if "groups" in threshold else ""
    where = f"chosen for {threshold['aim']} on {threshold['images']} images{parts} of {threshold['chosen_on']}"
    interval = threshold["interval"]
    spread = f", 95 % interval {interval[0]:.3f} to {interval[1]:.3f}" if interval else ""
    return f"{threshold['value']:.3f} ({where}{spread})"


def _seconds(metrics: Mapping[str, Any]) -> str:
    parts = ", ".join(f"{part} {value:.3f}" for part, value in metrics["seconds"].items())
    return f"Seconds per image: {metrics['seconds_per_image']:.3f} ({parts})"


def _folds(metrics: Mapping[str, Any]) -> list[str]:
    if "folds" not in metrics:
        return []
    count = len(next(iter(metrics["folds"].values()))["values"])
    rows = ", ".join(f"{name} {_spread(row, shown_of(name))}" for name, row in metrics["folds"].items())
    return [f"Mean and spread of {count} folds: {rows}"]


def _spread(row: Mapping[str, Any], shown: Shown) -> str:
    mean, deviation = row["mean"], row["sd"]
    if mean is None:
        return "n/a"
    if deviation is None:
        return _written(mean, shown)
    return f"{_written(mean, shown)} ± {_written(deviation, shown, digits=1).removesuffix('%')}"


def _against(metrics: Mapping[str, Any]) -> list[str]:
    if "against" not in metrics:
        return []
    comparison = metrics["against"]
    rows = [f"  {name}: {_difference(row, shown_of(name))}" for name, row in comparison["figures"].items()]
    test = comparison["mcnemar"]
    verdicts = (
        f"  verdicts: right for {test['only_this_right']} images by this model only, for {test['only_other_right']} by "
        f"the other only; {exact_test(comparison)} p = {test['p']:.3f}"
    )
    return [f"Compared with {comparison['other']}, this model minus the other:", *rows, verdicts]


def _difference(row: Mapping[str, Any], shown: Shown) -> str:
    difference = _written(row["difference"], shown, "+")
    if not row["interval"]:
        return difference
    return f"{difference} ({' to '.join(_written(bound, shown, '+', digits=1) for bound in row['interval'])})"
