"""The page of the proof: what an export changed, beside its checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flawmask.files import write_bytes
from flawmask.report import sections
from flawmask.report.page import esc, page, section, table


def write_page(path: Path, parity: Mapping[str, Any], model: str) -> None:
    """Write `parity.html`.

    Args:
        path: the page.
        parity: what `parity.prove` returned.
        model: the checkpoint's path.
    """
    name = f"{parity['format']}, {parity['precision']}"
    failures = "".join(f"<li>{esc(line)}</li>" for line in parity["failures"])
    notes = (
        f'<div class="notes" role="note"><h2>Outside the tolerance</h2><ul>{failures}</ul></div>' if failures else ""
    )
    splits = parity["splits"]
    body = "".join(
        (
            f"<header><h1>The export beside its checkpoint: {esc(name)}</h1>",
            f'<p class="verdict">{esc(_verdict(parity))}</p><p class="small">{esc(_rule(parity, model))}</p>',
            f"{notes}</header><main>",
            section("differences", "Differences", _differences({**splits, **_odd(parity)})),
            section("verdicts", "Verdicts that changed", _verdicts({**splits, **_odd(parity)})),
            *(
                section(f"figures-{split}", f"Figures on {split}", sections.against(report))
                for split, report in splits.items()
            ),
            section("seconds", "Seconds per image", _seconds(splits)),
            "</main>",
            sections.footer(),
        )
    )
    write_bytes(path, page(f"Export: {name}", body).encode(errors="replace"))


def _odd(parity: Mapping[str, Any]) -> dict[str, Any]:
    return {f"odd images: {kind}": report for kind, report in parity["odd"].items()}


def _verdict(parity: Mapping[str, Any]) -> str:
    reports = [*parity["splits"].values(), *parity["odd"].values()]
    changed, count = sum(len(one["changed_verdicts"]) for one in reports), sum(one["images"] for one in reports)
    what = "no verdict changed" if not changed else f"{changed} verdicts changed"
    outcome = "not within the tolerance" if parity["failures"] else "within the tolerance"
    return f"Of {count} images, {what}: {outcome}."


def _rule(parity: Mapping[str, Any], model: str) -> str:
    allowed = parity["tolerance"]
    verdict = (
        "No verdict may change"
        if not allowed["verdict"]
        else f"A verdict may change if the checkpoint's score is within {allowed['verdict']} of the threshold"
    )
    return (
        f"Checkpoint: {model}. Threshold: {parity['conf']:.3f}. {verdict}. AP may fall by {allowed['ap']}. "
        f"The mean IoU of masks must be at least {allowed['iou']}."
    )


def _differences(reports: Mapping[str, Any]) -> str:
    rows = [
        (
            esc(name),
            str(one["images"]),
            str(one["without_detections"]),
            str(len(one["changed_verdicts"])),
            _number(one["largest_score"]),
            _number(one["largest_instance_score"]),
            _number(one["largest_box"]),
            _number(one["mean_iou"]),
            _number(one["lowest_iou"]),
            f"{one['unmatched']} of {one['unmatched'] + one['matched']}",
        )
        for name, one in reports.items()
    ]
    head = (
        *("images", "number", "without detections", "verdicts changed", "image's score", "instance's score"),
        *("box, pixels", "mask IoU, mean", "mask IoU, lowest", "instances of one only"),
    )
    note = (
        "Scores and boxes: the largest difference. Instances count from the threshold on; two are the same one if "
        "their masks have an IoU of at least 0.5."
    )
    return table(head, rows) + f'<p class="small">{note}</p>'


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _verdicts(reports: Mapping[str, Any]) -> str:
    rows = [
        (
            esc(row["file"]),
            esc(name),
            f"{row['before']:.4f}",
            f"{row['after']:.4f}",
            "yes" if row["is_allowed"] else "no",
        )
        for name, one in reports.items()
        for row in one["changed_verdicts"]
    ]
    return table(("file", "images", "checkpoint", "export", "within the tolerance"), rows) if rows else "<p>None.</p>"


def _seconds(splits: Mapping[str, Any]) -> str:
    rows = [
        (esc(f"{name}, {whose}"), *(f"{seconds[part]:.4f}" for part in ("read", "network", "post")))
        for name, one in splits.items()
        for whose, seconds in one["seconds"].items()
    ]
    note = "The checkpoint ran in float32. Both ran on the machine that exported, once: this is no benchmark."
    return table(("model", "read", "network", "post-processing"), rows) + f'<p class="small">{note}</p>'
