"""What `evaluate` prints."""

from collections.abc import Mapping
from typing import Any

RULE = "=" * 60

HEADLINE = {
    "accuracy": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "F1": "f1_score",
    "false alarms": "false_alarm_rate",
}

PIXELS = {"AUROC": "auroc", "AUPRO": "aupro", "AP": "ap", "IoU": "iou", "Dice": "dice"}


def percent(value: float | None) -> str:
    """Return a fraction as `88.24%`; `n/a` where there is none."""
    return "n/a" if value is None else f"{value:.2%}"


def metrics_block(metrics: Mapping[str, Any]) -> str:
    """Return the block that `evaluate` ends with."""
    lines = {
        "Accuracy ": "accuracy",
        "Precision": "precision",
        "Recall   ": "recall",
        "F1-Score ": "f1_score",
        "Defect detection rate": "defect_detection_rate",
        "Composite": "composite_score",
        "Confidence": "confidence",
    }
    body = [f"{label}: {percent(metrics[key])}" for label, key in lines.items()]
    return "\n".join(["OVERALL METRICS", RULE, *body, RULE])


def summary(metrics: Mapping[str, Any]) -> str:
    """Return the metrics block, and below it what it has no line for: counts, intervals, notes."""
    lines = [
        metrics_block(metrics),
        "95 % intervals: " + ", ".join(f"{label} {_interval(metrics, name)}" for label, name in HEADLINE.items()),
        f"Verdicts: {metrics['tp_defect']} defects found, {metrics['fn_defect']} missed; "
        f"{metrics['tn_good']} good parts passed, {metrics['fp_defect']} rejected",
        f"Found by type: {_by_type(metrics) or 'n/a'}",
        f"Threshold: {_threshold(metrics['threshold'])}",
        f"Ranking of images: AUROC {_with_interval(metrics, 'image_auroc')}, AP {_with_interval(metrics, 'image_ap')}, "
        f"best F1 {_with_interval(metrics, 'image_f1_max')}",
        "False alarms at a recall of " + "; ".join(_false_alarms(metrics)),
        f"Mask AP: {_with_interval(metrics, 'mask_ap')} at IoU 0.50:0.95, "
        f"{_with_interval(metrics, 'mask_ap50')} at 0.50, {_with_interval(metrics, 'mask_ap75')} at 0.75",
        f"Box AP: {_with_interval(metrics, 'box_ap')}; mean mask IoU: {_with_interval(metrics, 'mean_mask_iou')}",
        "Pixels: " + ", ".join(f"{label} {_with_interval(metrics, f'pixel_{name}')}" for label, name in PIXELS.items()),
        f"Instances: {metrics['instances']['matched']} of {metrics['instances']['truth']} found; wrong: "
        + ", ".join(f"{count} {kind}" for kind, count in metrics["instance_errors"].items() if kind != "missed"),
        "Seconds per image: "
        + f"{metrics['seconds_per_image']:.3f} ("
        + ", ".join(f"{part} {value:.3f}" for part, value in metrics["seconds"].items())
        + ")",
        *_folds(metrics),
        *_against(metrics),
        *(f"Note: {note}" for note in metrics["notes"]),
    ]
    return "\n".join(lines)


def _interval(metrics: Mapping[str, Any], name: str) -> str:
    bounds = metrics["intervals"].get(name)
    return "n/a" if bounds is None else f"{bounds[0]:.1%} to {bounds[1]:.1%}"


def _with_interval(metrics: Mapping[str, Any], name: str) -> str:
    has_interval = metrics["intervals"].get(name) is not None
    return percent(metrics[name]) + (f" ({_interval(metrics, name)})" if has_interval else "")


def _false_alarms(metrics: Mapping[str, Any]) -> list[str]:
    rates = metrics["false_alarms_at_recall"].items()
    return [
        f"{level} %: {percent(rate)} ({_interval(metrics, f'false_alarms_at_recall_{level}')})" for level, rate in rates
    ]


def _by_type(metrics: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {row['found']} of {row['images']}" for name, row in metrics["recall_by_type"].items())


def _threshold(threshold: Mapping[str, Any]) -> str:
    if threshold["how"] != "aim":
        return f"{threshold['value']:.3f} ({threshold['how']})"
    where = f"chosen for {threshold['aim']} on {threshold['images']} images of {threshold['chosen_on']}"
    interval = threshold["interval"]
    spread = f", 95 % interval {interval[0]:.3f} to {interval[1]:.3f}" if interval else ""
    return f"{threshold['value']:.3f} ({where}{spread})"


def _folds(metrics: Mapping[str, Any]) -> list[str]:
    if "folds" not in metrics:
        return []
    count = len(next(iter(metrics["folds"].values()))["values"])
    rows = ", ".join(
        f"{name} {percent(row['mean'])}" + (f" ± {100 * row['sd']:.1f}" if row["sd"] is not None else "")
        for name, row in metrics["folds"].items()
    )
    return [f"Mean and spread of {count} folds: {rows}"]


def _against(metrics: Mapping[str, Any]) -> list[str]:
    if "against" not in metrics:
        return []
    found = metrics["against"]
    rows = [
        f"  {name}: {row['difference']:+.2%}"
        + (f" ({row['interval'][0]:+.1%} to {row['interval'][1]:+.1%})" if row["interval"] else "")
        for name, row in found["figures"].items()
    ]
    test = found["mcnemar"]
    verdicts = (
        f"  verdicts: {test['only_this_right']} images only this one gets right, {test['only_other_right']} only the "
        f"other; McNemar's exact p = {test['p']:.3f}"
    )
    return [f"Compared with {found['other']}, this one less the other:", *rows, verdicts]
