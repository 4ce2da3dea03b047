"""The sections of the report, each as HTML. A section without content is an empty text."""

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import flawmask
from flawmask.coco import CocoSplit
from flawmask.evaluation.metrics import METRICS, Shown
from flawmask.report.figures import EXPLANATIONS, confusion_of, inline
from flawmask.report.headline import (
    DASH,
    NBSP,
    by_level,
    decimal,
    exact_test,
    format_interval,
    format_metric,
    images_of_parts,
    interval_of,
    label_of,
    lookup,
    percent,
    percent_range,
    shown_of,
    whole_percent,
)
from flawmask.report.page import esc, facts, table
from flawmask.report.results import Results
from flawmask.tally import Tally

MAX_OPEN_ROWS = 12  # longer lists are folded
MAX_ROWS = 2000  # of a list


def title(results: Results) -> str:
    """Return the name of the data set and of the split, as text."""
    return f"{Path(results.metrics['dataset']).name}, split {results.metrics['split']}"


def header(results: Results, split: CocoSplit) -> str:
    """Return the top of the page: data set, verdict, threshold and notes."""
    metrics = results.metrics
    model = Path(metrics["model"])
    notes = "".join(f"<li>{esc(note)}</li>" for note in [*(metrics.get("notes") or []), *_not_all_used(metrics)])
    links = {"figures": "Figures", "curves": "Curves", "types": "Types", "gallery": "Images", "data": "Data"}
    return (
        "<header>"
        f"<h1>{esc(title(results))}</h1>"
        f'<p class="what">{_image_count(split)} evaluated with {esc(model.parent.name or ".")}/{esc(model.name)}</p>'
        f'<p class="verdict">{verdict(metrics)}</p>'
        f'<p class="threshold">{esc(threshold_sentence(metrics))}</p>'
        + (f'<div class="notes" role="note"><h2>Notes</h2><ul>{notes}</ul></div>' if notes else "")
        + f'<nav aria-label="Sections">{"".join(f"""<a href="#{to}">{name}</a>""" for to, name in links.items())}'
        '<a href="#run">Run</a></nav></header>'
    )


def _not_all_used(metrics: Mapping[str, Any]) -> list[str]:
    """Return a line, as on the command line, for each kind of item that was found and not used."""
    tallies = [Tally(what, tally["used"], tally["not_used"]) for what, tally in (metrics.get("tally") or {}).items()]
    return [f"{tally.line()}." for tally in tallies if not tally.all_used]


def _image_count(split: CocoSplit) -> str:
    groups = split.groups
    return f"{len(split.images)} images" if groups is None else images_of_parts(len(groups), len(set(groups)))


def verdict(metrics: Mapping[str, Any]) -> str:
    """Return a sentence, as HTML, on how many defective parts are found and how many good parts are rejected.

    It counts images where groups are known, because a part may have several images.
    """
    what = _unit(metrics)
    found, missed = metrics["tp_defect"], metrics["fn_defect"]
    alarms, passed = metrics["fp_defect"], metrics["tn_good"]
    first, second = f"No defective {what} was evaluated: the recall is not known", f"no good {what} was evaluated"
    if found + missed:
        share = _share(found, found + missed, interval_of(metrics, "recall"))
        first = f"Finds <strong>{found} of {_counted(found + missed, f'defective {what}')}</strong> {share}"
    if alarms + passed:
        share = _share(alarms, alarms + passed, interval_of(metrics, "false_alarm_rate"))
        count = f"{alarms or 'no'} false alarm{'' if alarms == 1 else 's'}"
        second = f"<strong>{count} in {_counted(alarms + passed, f'good {what}')}</strong> {share}"
    return f"{first}; {second}."


def _unit(metrics: Mapping[str, Any]) -> str:
    """Return the unit that is counted: parts, or images where a part may have several images."""
    return "part" if metrics.get("groups") is None else "image"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _share(part: int, whole: int, interval: tuple[float, float] | None) -> str:
    share = f"{whole_percent(part / whole)}{NBSP}%"
    if interval is None:
        return f"({share})"
    low, high = (whole_percent(bound) for bound in interval)
    return f'({share}, 95{NBSP}% interval <span class="whole">{low}{DASH}{high}{NBSP}%</span>)'


def threshold_sentence(metrics: Mapping[str, Any]) -> str:
    """Return sentences on the threshold of the verdicts and how it was chosen."""
    threshold = metrics.get("threshold") or {}
    value = decimal(threshold.get("value", metrics["conf"]))
    area = metrics["min_area"]
    min_area = f" and covers at least {area} pixel{'' if area == 1 else 's'}" if area else ""
    what = "A part" if _unit(metrics) == "part" else "An image"
    sentence = f"{what} is rejected if a predicted defect scores at least {value}{min_area}."
    if threshold.get("how") == "aim":
        bounds, images = threshold.get("interval"), threshold.get("images")
        spread = f" (95 % interval {decimal(bounds[0])}{DASH}{decimal(bounds[1])})" if bounds else ""
        parts = f" ({threshold['groups']} parts)" if "groups" in threshold else ""
        where = f"{images} images{parts} of the split" if images else "split"
        sentence += f" The threshold was chosen on the {where} {threshold.get('chosen_on')} for the aim "
        sentence += f"{threshold.get('aim')}{spread}."
        if threshold.get("same_split"):
            sentence += " These are the very images evaluated here."
    elif threshold.get("how"):
        origins = {"default": " This is the default.", "given": " The threshold was given by hand."}
        sentence += origins.get(threshold["how"], "")
    return sentence


def headline(metrics: Mapping[str, Any]) -> str:
    """Return a table of metrics with their intervals for each level: images, instances, pixels."""
    parts = []
    for title, group in by_level().items():
        rows = []
        for one in group:
            has_metric, value = lookup(metrics, one.key)
            if has_metric:
                bounds = interval_of(metrics, one.key)
                meaning = one.meaning.replace("part", _unit(metrics))
                name = f'{esc(one.label)}<span class="meaning">{esc(meaning)}</span>'
                interval = format_interval(bounds, one.shown) if bounds else ""
                line = _range(value, bounds) if one.shown == "percent" else ""
                rows.append((name, format_metric(value, one.shown), interval, line))
        if rows:
            head = (esc(title), "value", "95 % interval", "from 0 to 100 %")
            parts.append(table(head, rows, "figures"))
    return "".join(parts) + _speed(metrics)


def _range(value: float | None, bounds: tuple[float, float] | None) -> str:
    """Return a drawing of a value and its interval on a line from 0 to 100 %."""
    if value is None:
        return ""
    low, high = bounds or (value, value)
    span = f'<i style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"></i>'
    return f'<span class="range" aria-hidden="true">{span}<b style="left:{100 * value:.1f}%"></b></span>'


def _speed(metrics: Mapping[str, Any]) -> str:
    """Return the seconds per image, with their parts where the results have them."""
    total = metrics.get("seconds_per_image")
    if total is None:
        return ""
    parts = metrics.get("seconds") or {}
    names = {"read": "reading", "network": "network", "post": "post-processing"}
    split = ", ".join(f"{names.get(name, name)} {value:.3f}" for name, value in parts.items() if value is not None)
    resamples = metrics.get("resamples")
    over, of_parts = (" over parts", " of whole parts") if metrics.get("groups") is not None else ("", "")
    how = f" Intervals{over}: by formula for proportions, F1 and AUROC, else from {resamples} resamples{of_parts}."
    how = how if resamples else ""
    return f'<p class="small">{total:.3f} seconds per image{esc(f" ({split})" if split else "")}.{esc(how)}</p>'


def by_class(metrics: Mapping[str, Any]) -> str:
    """Return a table of the average precision of each class, if there are several."""
    classes = metrics.get("ap_by_class") or {}
    if len(classes) < 2:
        return ""
    shown = [one for one in METRICS.values() if one.comparison and any(one.key in row for row in classes.values())]
    rows = [
        (esc(name), *(format_metric(row.get(one.key), one.shown) for one in shown)) for name, row in classes.items()
    ]
    return table(("class", *(esc(one.label[0].lower() + one.label[1:]) for one in shown)), rows)


def folds(metrics: Mapping[str, Any]) -> str:
    """Return a table of the folds' values of a cross-validation, with their mean and their spread."""
    rows = [
        (
            esc(label_of(key)),
            *(format_metric(value, shown_of(key)) for value in (row["mean"], row["sd"], *row["values"])),
        )
        for key, row in (metrics.get("folds") or {}).items()
    ]
    if not rows:
        return ""
    return table(
        ("figure", "mean", "standard deviation", *(f"fold {place}" for place in range(1, len(rows[0]) - 2))), rows
    )


def against(metrics: Mapping[str, Any]) -> str:
    """Return a table of how this model differs from another one on the same images."""
    comparison = metrics.get("against")
    if not comparison:
        return ""
    rows = [
        (
            esc(label_of(key)),
            format_metric(row["this"], shown_of(key)),
            format_metric(row["other"], shown_of(key)),
            *_difference(row, shown_of(key)),
        )
        for key, row in comparison["figures"].items()
    ]
    test = comparison["mcnemar"]
    return (
        f"<p>The other model: {esc(comparison['other'])}. If the interval of a difference contains 0, these images "
        "cannot tell which model is better.</p>"
        + table(("figure", "this", "other", "difference", "95 % interval"), rows)
        + f"<p>Verdicts: right for {test['only_this_right']} images by this model only, for "
        f"{test['only_other_right']} by the other only; {exact_test(comparison)} p = {test['p']:.3f}.</p>"
    )


def _difference(row: Mapping[str, Any], shown: Shown) -> tuple[str, str]:
    """Return a difference and its interval; for percentages, in percentage points."""
    scale, form, unit = (100, "+.1f", " points") if shown == "percent" else (1, "+.3g", "")
    interval = " to ".join(format(scale * bound, form) for bound in row["interval"] or ())
    return f"{scale * row['difference']:{form}}{unit}", interval


def curves(results: Results, drawn: Mapping[str, str]) -> str:
    """Return all figures that were drawn, each with a sentence on what it shows."""
    names, rows = confusion_of(results)
    labels = {
        "confusion_matrix": "Confusion matrix. "
        + " ".join(
            f"Truth {truth}: {', '.join(f'{count} called {name}' for name, count in zip(names, row, strict=True))}."
            for truth, row in zip(names, rows, strict=True)
        )
    }
    pictures = (
        f"<figure>{inline(svg, name, esc(labels.get(name, EXPLANATIONS[name])))}"
        f"<figcaption>{esc(EXPLANATIONS[name])}</figcaption></figure>"
        for name, svg in drawn.items()
    )
    return f'<div class="curves">{"".join(pictures)}</div>'


def types(metrics: Mapping[str, Any]) -> str:
    """Return a table of the parts of each defect type that are found."""
    rows = [
        (
            esc(name),
            str(row["images"]),
            str(row["found"]),
            str(row["images"] - row["found"]),
            percent(row["recall"]),
            percent_range(row["interval"]) if row.get("interval") else "",
            _range(row["recall"], row.get("interval")),
        )
        for name, row in (metrics.get("recall_by_type") or {}).items()
    ]
    head = ("type", "images", "found", "missed", "recall", "95 % interval", "from 0 to 100 %")
    return table(head, rows, "figures") if rows else ""


def instances(metrics: Mapping[str, Any]) -> str:
    """Return the numbers of missed and spurious instances, the kinds of errors, and lists of them."""
    counts = metrics.get("instances") or {}
    errors = metrics.get("instance_errors") or {}
    overlap = "box" if metrics.get("finds") == "boxes" else "mask"
    parts = []
    if counts:
        parts.append(
            f"<p>{counts['truth']} true instances, {counts['found']} predicted at the threshold, "
            f"{counts['matched']} of the true ones matched ({overlap} IoU of at least 0.5).</p>"
        )
    if errors:
        rows = [(esc(name), str(errors[name]), esc(why)) for name, why in ERROR_KINDS.items() if name in errors]
        parts.append(table(("error", "count", "what it is"), rows))
    missed = [
        (_link(one["file"]), f"{one['area']:.0f}", _box(one.get("bbox")), f"{one['best_iou']:.2f}")
        for one in metrics.get("missed_instances") or []
    ]
    parts.append(_list("missed", ("image", "area in pixels", "box x, y, width, height", "best IoU"), missed))
    spurious = [
        (
            _link(one["file"]),
            esc(one.get("label", "")),
            f"{one['score']:.2f}",
            f"{one['area']:.0f}",
            _box(one.get("bbox")),
            esc(one.get("kind", "")),
        )
        for one in metrics.get("spurious_instances") or []
    ]
    head = ("image", "class", "score", "area in pixels", "box x, y, width, height", "kind")
    parts.append(_list("spurious", head, spurious))
    return "".join(parts)


ERROR_KINDS = {
    "classification": "a true defect is there, but of another class",
    "localisation": "a true defect is there, but the prediction does not cover it well enough",
    "duplicate": "another prediction matches the same defect",
    "background": "no defect is there",
    "missed": "a true defect that no prediction matches",
}


def _link(file: str) -> str:
    """Return an image's name as a button that opens it in the gallery."""
    return f'<button type="button" class="link" data-file="{esc(file)}">{esc(file)}</button>'


def _box(sides: Sequence[float] | None) -> str:
    return ", ".join(f"{side:.0f}" for side in sides or ())


def _list(name: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table that can be folded; an empty text if it has no rows."""
    if not rows:
        return ""
    title = f"{len(rows)} {name} instance{'' if len(rows) == 1 else 's'}"
    more = "" if len(rows) <= MAX_ROWS else f"<p>The first {MAX_ROWS} of them. metrics.json lists all.</p>"
    return _folded(title, more + table(head, rows[:MAX_ROWS]), is_open=len(rows) <= MAX_OPEN_ROWS)


def _folded(title: str, content: str, *, is_open: bool) -> str:
    return f"<details{' open' if is_open else ''}><summary>{esc(title)}</summary>{content}</details>"


def gallery_controls(entries: Sequence[Mapping[str, Any]], total: int) -> str:
    """Return the controls of the gallery; the script fills it. `total` is the number of evaluated images."""
    pictures = sum("jpeg" in entry for entry in entries)
    types = sorted({entry["type"] for entry in entries})
    options = "".join(f'<option value="{esc(name)}">{esc(name)}</option>' for name in types)
    limited = f"<p>Of {total} images the {pictures} worst are shown; all of them are counted.</p>"
    outcomes = {"all": "All", "missed": "Missed", "false_alarm": "False alarms", "right": "Right"}
    buttons = "".join(
        f'<button type="button" data-outcome="{key}" aria-pressed="{"true" if key == "all" else "false"}">'
        f'{name} <span data-count="{key}"></span></button>'
        for key, name in outcomes.items()
    )
    return f"""{limited if pictures < total else ""}
<noscript><p>The gallery needs JavaScript, which is switched off here.</p></noscript>
<div class="controls"><div class="sticky">
<div class="slider"><label for="threshold">Threshold</label>
<div class="track"><svg id="histogram" role="img" aria-label="Scores of good and defective parts"></svg>
<input type="range" id="threshold" min="0" max="1" step="0.001"></div>
<output id="value" for="threshold"></output>
<button type="button" id="reset">Reset</button></div>
<p id="live" aria-live="polite"></p></div>
<div class="filters"><div role="group" aria-label="Outcome">{buttons}</div>
<label>Type <select id="type"><option value="">all</option>{options}</select></label></div>
</div>
<p class="legend"><span class="truth">truth</span> <span class="found">prediction at or above the threshold</span>
<span class="hint">Worst first. A threshold picked here is fitted to these images: choose the one you use on other
images.</span></p>
<div id="cards"></div><p id="nothing" hidden>No image is both of this type and this outcome.</p>
<dialog id="viewer" aria-label="Image, enlarged"></dialog>"""


def data(results: Results, split: CocoSplit) -> str:
    """Return the content of the data set, the evaluated split, and what was left out and why."""
    chain = _origins(results.data)
    sizes = Counter(f"{image['width']} x {image['height']}" for image in split.images)
    common = [f"{size} ({count})" for size, count in sizes.most_common(5)]
    varied = [f"{len(sizes) - 5} other sizes"] if len(sizes) > 5 else []
    about = {
        "Data set": results.metrics["dataset"],
        "Split evaluated": results.metrics["split"],
        "Images evaluated": len(split.images),
        "Parts they show": None if split.groups is None else len(set(split.groups)),
        "True defects on them": sum(len(split.defects(image)) for image in split.images),
        "Image sizes in pixels": ", ".join(common + varied),
        "Classes": ", ".join(split.class_names),
    }
    parts = [facts(about), _unused(results), _counts(results.data)]
    for info in chain:
        source = {f"source {key}": value for key, value in (info.get("source") or {}).items()}
        parts.append(f"<h3>{esc(info.get('made_by', 'made by'))}</h3>")
        divided = {"images divided by": info.get("split_method")}
        parts.append(facts(source | _as_text(info.get("settings") or {}) | divided))
    left_out = [item for info in chain for item in info.get("left_out") or []]
    if left_out:
        rows = [(esc(item["file"]), esc(item["reason"])) for item in left_out]
        title = f"{len(rows)} file{'' if len(rows) == 1 else 's'} left out"
        parts.append(_folded(title, table(("file", "reason"), rows), is_open=len(rows) <= MAX_OPEN_ROWS))
    elif chain:
        parts.append("<p>No file was left out.</p>")
    return "".join(parts)


def _unused(results: Results) -> str:
    """Return a table of the items that evaluation, training and preparation found and did not use, by reason.

    It is empty where all items are used.
    """
    trained = {f"training, {split}": of_split for split, of_split in (results.run.get("tally") or {}).items()}
    prepared = {info.get("made_by", ""): info.get("tally") or {} for info in _origins(results.data)}
    stages = {"evaluation": results.metrics.get("tally") or {}, **trained, **prepared}
    rows = [
        (esc(stage), esc(what), str(tally["found"]), str(tally["used"]), esc(reason), esc(", ".join(names)))
        for stage, tallies in stages.items()
        for what, tally in tallies.items()
        if "not_used" in tally
        for reason, names in tally["not_used"].items()
    ]
    head = ("stage", "what", "found", "used", "not used", "which")
    return _folded("Found and not used", table(head, rows), is_open=len(rows) <= MAX_OPEN_ROWS) if rows else ""


def _origins(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the `dataset_info.json` of each stage that made the data set, the first stage first."""
    if not data:
        return []
    source = data.get("source_info")
    return [*(_origins(source) if isinstance(source, dict) else []), data]


def _counts(data: Mapping[str, Any]) -> str:
    """Return a table of images by split and type."""
    splits = {name: part for name, part in data.items() if isinstance(part, dict) and "by_type" in part}
    if not splits:
        return ""
    types = sorted({kind for part in splits.values() for kind in part["by_type"]})
    rows = [
        (esc(name), str(part["images"]), *(str(part["by_type"].get(kind, 0)) for kind in types))
        for name, part in splits.items()
    ]
    return table(("split", "images", *map(esc, types)), rows)


def run(results: Results) -> str:
    """Return facts on the training of the model, its settings, and the commands that repeat it."""
    run, history = results.run, results.history
    settings = (results.folds or run).get("settings") or {}
    seconds = sum(value for value in history.get("seconds", []) if value is not None)
    about = {
        "Model": results.metrics["model"],
        "Started from": run.get("weights"),
        "Epochs": len(history.get("epoch", [])) or None,
        "Time to train": _duration(seconds) if seconds else None,
        "Seed": settings.get("seed"),
        "Device": run.get("device"),
        "Precision": run.get("precision"),
        "Processor cores": run.get("cores"),
    }
    versions = {name.capitalize(): version for name, version in (run.get("versions") or {}).items()}
    commands = "\n".join(esc(line) for line in commands_of(results))
    return "".join(
        (
            facts(about | versions),
            f"<h3>Settings of the training</h3>{facts(_as_text(settings))}" if settings else "",
            f"<h3>To do it again</h3><pre>{commands}</pre>",
        )
    )


def _as_text(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return settings as text. Those that are None are left out."""
    return {
        name: ", ".join(map(str, value))
        if isinstance(value, list)
        else str(value).lower()
        if isinstance(value, bool)
        else str(value)
        for name, value in settings.items()
        if value is not None
    }


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = ((hours, "h"), (minutes, "min"), (rest, "s"))
    return " ".join(f"{value} {unit}" for value, unit in parts if value) or "0 s"


def commands_of(results: Results) -> list[str]:
    """Return the commands that repeat these results: data set, training and evaluation, each a line for a shell."""
    metrics = results.metrics
    if results.folds:
        return [_command("flawmask run", results.folds.get("settings") or {})]
    lines = []
    for info in _origins(results.data):
        source = info.get("source") or {}
        inputs = {"mvtec_root": info.get("mvtec_root"), "category": source.get("category")}
        if "dataset" in source:
            dataset = Path(metrics["dataset"])
            inputs = {"dataset_dir": str(dataset.with_name(source["dataset"])), "output_dir": str(dataset)}
        if str(info.get("made_by", "")).startswith("flawmask "):
            lines.append(_command(info["made_by"], inputs | (info.get("settings") or {})))
    if results.run:
        lines.append(_command("flawmask train", results.run.get("settings") or {}))
    keys = ("split", "conf", "min_area", "seed", "resamples", "allow_leak", "crowds", "on_error", "good_name")
    given = {"model": metrics["model"], "dataset_dir": metrics["dataset"], **{key: metrics.get(key) for key in keys}}
    threshold = metrics.get("threshold") or {}
    if threshold.get("how") == "aim":
        given |= {"conf": "auto", "aim": threshold["aim"]}
    lines.append(_command("flawmask evaluate", given))
    return lines


def _command(start: str, settings: Mapping[str, Any]) -> str:
    words = start.split()
    for name, value in settings.items():
        if value is None or value is False:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, values)]
    return shlex.join(words)


def footer() -> str:
    """Return the version of Flawmask and the time."""
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"<footer>Written by Flawmask {esc(flawmask.__version__)}, {now}.</footer>"
