"""The figures of the report: saved as PNG and SVG, and put into the page as SVG in the page's colours."""

import io
import math
import re
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from flawmask.evaluation.metrics import METRICS
from flawmask.files import write_bytes
from flawmask.fonts import in_any_script
from flawmask.good_names import GOOD
from flawmask.report.headline import decimal, format_metric, lookup
from flawmask.report.results import Results

# Okabe and Ito's palette, which colour-blind people can tell apart. Good and defective also differ in lightness.
BLUE, ORANGE, VERMILLION = "#0072B2", "#E69F00", "#D55E00"
LINES = (BLUE, VERMILLION, "#009E73", "#CC79A7", ORANGE, "#56B4E9", "#000000")

INK, RULE, PAPER = "#1b1b1a", "#c9c9c8", "#ffffff"
THEME = {INK.lower(): "var(--ink)", RULE.lower(): "var(--rule)", PAPER.lower(): "none", BLUE.lower(): "var(--good)"}
"""The colours that the page replaces by its own, so that a figure is readable with a light and a dark background."""

STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "figure.facecolor": PAPER,
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",  # text stays text, which is smaller and can be selected
    "svg.hashsalt": "flawmask",  # the same figure gives the same bytes
    "text.color": INK,
    "text.parse_math": False,  # a defect type may be named $a_b$
    "xtick.color": INK,
    "ytick.color": INK,
}

SIZE = (4.4, 3.3)  # inches
MAX_NAME_LETTERS = 18  # of a class on an axis; a longer name is cut

LOSSES = {"train_loss": "training", "val_loss": "validation"}

Drawing = Callable[[Results, Sequence[tuple[bool, float]], Axes], bool]


def draw_figures(results: Results, scores: Sequence[tuple[bool, float]]) -> dict[str, str]:
    """Write `figures/<name>.png` and `.svg` into the results folder and return each figure's SVG by its name.

    A figure is left out if the results lack its data; then the files of an earlier report are removed.

    Args:
        results: the results of an evaluation.
        scores: for each image, whether it is defective, and its score.
    """
    drawn = {}
    with mpl.rc_context(STYLE):
        for name, draw in DRAWINGS.items():
            figure = Figure(figsize=SIZE, layout="constrained")
            targets = [results.folder / "figures" / f"{name}.{kind}" for kind in ("png", "svg")]
            if draw(results, scores, figure.subplots()):
                png, svg = saved(figure, "png"), saved(figure, "svg")
                write_bytes(targets[0], png)
                write_bytes(targets[1], svg)
                drawn[name] = svg.decode()
            else:
                for path in targets:
                    path.unlink(missing_ok=True)
    return drawn


def saved(figure: Figure, kind: Literal["png", "svg"]) -> bytes:
    """Return the figure as a file; the same figure gives the same bytes."""
    data = io.BytesIO()
    with in_any_script(figure, kind):
        figure.savefig(data, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
    return data.getvalue()


def inline(svg: str, name: str, label: str) -> str:
    """Return an SVG file as an element of an HTML page, in the page's colours.

    Args:
        svg: the file, as `draw_figures` returns it.
        name: a prefix for its ids, which would otherwise be the same in all figures.
        label: a description for people who cannot see the figure, as HTML.
    """
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'xlink:href="#', 'href="#', body)
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", body)
    for colour, own in THEME.items():
        body = re.sub(rf"(fill|stroke): {colour}", rf"\1: {own}", body)
    return re.sub(r"<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>", rf'<svg \1 role="img" aria-label="{label}">', body, count=1)


def draw_losses(histories: dict[str, dict[str, list[Any]]]) -> dict[str, str]:
    """Return a figure with the training losses of several runs, and one with the validation losses, as SVG by key.

    Args:
        histories: `history.json` of each run, by the run's name.
    """
    drawn = {}
    with mpl.rc_context(STYLE):
        for key, title in LOSSES.items():
            known = {name: history for name, history in histories.items() if _has(history, key)}
            figure = Figure(figsize=(6.6, 3.6), layout="constrained")
            axes = figure.subplots()
            for (name, history), colour in zip(known.items(), cycle(LINES)):
                _plot_epochs(axes, history, key, name, colour)
            if known:
                _finish_losses(axes, f"{title.capitalize()} loss")
                drawn[key] = saved(figure, "svg").decode()
    return drawn


def _has(history: dict[str, list[Any]], key: str) -> bool:
    return bool(history.get("epoch")) and any(value is not None for value in history.get(key, []))


def _plot_epochs(axes: Axes, history: dict[str, list[Any]], key: str, label: str, colour: str) -> None:
    values = [math.nan if value is None else value for value in history[key]]
    axes.plot(history["epoch"], values, label=label, color=colour, marker="o" if len(values) < 20 else None, ms=3)


def _finish_losses(axes: Axes, title: str) -> None:
    axes.set(title=title, xlabel="epoch", ylabel="loss")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.legend()


def _loss(results: Results, scores: Sequence[tuple[bool, float]], axes: Axes) -> bool:
    del scores
    names = [name for name in LOSSES if _has(results.history, name)]
    for name, colour in zip(names, LINES, strict=False):
        _plot_epochs(axes, results.history, name, LOSSES[name], colour)
    if names:
        _finish_losses(axes, "Loss while training")
    return bool(names)


def _unit_axes(axes: Axes, x: str, y: str, title: str) -> None:
    """Let both axes reach from 0 to 100 %."""
    axes.set(title=title, xlabel=x, ylabel=y, xlim=(-0.02, 1.02), ylim=(-0.02, 1.04))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))


def _titled(results: Results, title: str, curve: str) -> str:
    """Return the title with the metrics of a curve, as in `ROC: AUROC 98.1 %`.

    Args:
        results: the results of an evaluation.
        title: the title without metrics.
        curve: the key of the curve in `curves.json`.
    """
    parts = []
    for one in METRICS.values():
        has_metric, value = lookup(results.metrics, one.key)
        if has_metric and one.curve and one.curve[0] == curve:
            parts.append(f"{one.curve[1]} {format_metric(value, one.shown)}")
    return f"{title}: {', '.join(parts)}" if parts else title


def _curve(key: str, x: str, y: str, title: str) -> Drawing:
    """Return a function that draws a curve of `curves.json` on axes from 0 to 100 %."""

    def draw(results: Results, scores: Sequence[tuple[bool, float]], axes: Axes) -> bool:
        """Draw the curve and, if it has one, the point of the verdicts' threshold. Return whether there is a curve."""
        del scores
        curve = results.curves.get(key)
        if not curve:
            return False
        axes.plot(curve["x"], curve["y"], color=BLUE)
        point = _operating_point(results, key)
        if point is not None:
            label = f"threshold {decimal(results.metrics['conf'])}"
            axes.plot(*point, "o", color=VERMILLION, ms=7, label=label, clip_on=False, zorder=5)
            axes.legend(loc="lower right" if key == "roc" else "lower left")
        _unit_axes(axes, x, y, _titled(results, title, key))
        return True

    return draw


def _operating_point(results: Results, key: str) -> tuple[float, float] | None:
    """Return the point of the verdicts' threshold on an image-level curve; None where there is none."""
    metrics = results.metrics
    recall, precision = metrics.get("recall"), metrics.get("precision")
    good = metrics["fp_defect"] + metrics["tn_good"]
    if key == "pr" and recall is not None and precision is not None:
        return recall, precision
    if key == "roc" and recall is not None and good:
        return metrics["fp_defect"] / good, recall
    return None


def _pro(results: Results, scores: Sequence[tuple[bool, float]], axes: Axes) -> bool:
    del scores
    curve = results.curves.get("pro")
    if not curve:
        return False
    axes.plot(curve["x"], curve["y"], color=BLUE)
    _unit_axes(
        axes,
        "false-positive rate over pixels",
        "overlap per region",
        _titled(results, "PRO", "pro"),
    )
    axes.set_xlim(-0.006, 0.306)  # Bergmann et al. use the curve up to 0.3
    axes.axvline(0.05, color=RULE, linestyle="--", linewidth=1)
    return True


def _calibration(results: Results, scores: Sequence[tuple[bool, float]], axes: Axes) -> bool:
    del scores
    named = {"score": ("calibration", BLUE), "calibrated": ("calibrated", ORANGE)}
    curves = {name: (results.curves.get(key) or [], colour) for name, (key, colour) in named.items()}
    if not curves["score"][0]:
        return False
    axes.plot([0, 1], [0, 1], color=RULE, linewidth=1.2)
    for name, (bins, colour) in curves.items():
        max_count = max((one["count"] for one in bins), default=1)
        means, shares = ([one[key] for one in bins] for key in ("mean_score", "share_defective"))
        axes.plot(means, shares, color=colour, lw=1)
        sizes = [20 + 130 * one["count"] / max_count for one in bins]
        axes.scatter(means, shares, s=sizes, color=colour, zorder=3, label=name if bins else None)
    if curves["calibrated"][0]:
        axes.legend(loc="lower right")
    _unit_axes(axes, "mean score", "share that is defective", _titled(results, "Calibration", "calibration"))
    return True


def _scores(results: Results, scores: Sequence[tuple[bool, float]], axes: Axes) -> bool:
    if not scores:
        return False
    conf = results.metrics["conf"]
    sides = [[score for truth, score in scores if truth is wanted] for wanted in (False, True)]
    edges = [place / 20 for place in range(21)]
    axes.hist(sides, bins=edges, color=[BLUE, ORANGE], label=["good", "defective"])
    axes.axvline(conf, color=VERMILLION, linewidth=1.5, label=f"threshold {decimal(conf)}")
    axes.set_title("Score of each image", pad=22)
    axes.set(xlabel="score", ylabel="images", xlim=(-0.02, 1.02))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 0.98), ncols=3)
    return True


def _confusion(results: Results, scores: Sequence[tuple[bool, float]], axes: Axes) -> bool:
    del scores
    names, rows = confusion_of(results)
    axes.grid(visible=False)
    for truth, row in enumerate(rows):
        for verdict, count in enumerate(row):
            share = count / max(1, sum(row))
            colour = BLUE if truth == verdict else VERMILLION
            axes.add_patch(Rectangle((verdict - 0.5, truth - 0.5), 1, 1, fc=colour, alpha=0.6 * share))
            axes.text(verdict, truth, str(count), ha="center", va="center", color=INK, fontsize=11)
    ends = (-0.5, len(names) - 0.5)
    axes.set(title="Confusion matrix", xlabel="verdict", ylabel="truth", xlim=ends, ylim=ends[::-1])
    turned = len(names) > 3
    labels = [name if len(name) <= MAX_NAME_LETTERS else f"{name[: MAX_NAME_LETTERS - 1]}\u2026" for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=35 if turned else 0, ha="right" if turned else "center")
    axes.set_yticks(range(len(names)), labels)
    axes.tick_params(length=0)
    return True


def confusion_of(results: Results) -> tuple[list[str], list[list[int]]]:
    """Return the class names and the counts of images, a row per true class and a column per predicted class."""
    metrics = results.metrics
    confusion = metrics.get("confusion")
    if confusion:
        return list(confusion["classes"]), [list(row) for row in confusion["rows"]]
    rows = [[metrics["tn_good"], metrics["fp_defect"]], [metrics["fn_defect"], metrics["tp_defect"]]]
    return [GOOD, "defect"], rows


DRAWINGS: dict[str, Drawing] = {
    "scores": _scores,
    "confusion_matrix": _confusion,
    "precision_recall": _curve("pr", "recall", "precision", "Precision and recall"),
    "roc": _curve("roc", "good parts rejected", "defective parts found", "ROC"),
    "calibration": _calibration,
    "mask_precision_recall": _curve("mask_pr", "recall", "precision", "Masks at IoU 0.5"),
    "pro": _pro,
    "pixel_precision_recall": _curve("pixel_pr", "recall", "precision", "Pixels"),
    "pixel_roc": _curve("pixel_roc", "false-positive rate", "recall", "Pixel ROC"),
    "loss": _loss,
}
"""The functions that draw the figures, by the name of the file, in the order of the page."""

EXPLANATIONS = {
    "scores": "Good and defective parts by score. Where the colours overlap, no threshold tells them apart.",
    "confusion_matrix": "Images by truth (rows) and verdict (columns).",
    "precision_recall": "The share of rejected parts that are defective, against the share of defects found.",
    "roc": "The share of defective parts found, against the share of good parts rejected.",
    "calibration": "On the diagonal, four in five parts with a score of 80 % are defective. Larger dots: more images.",
    "mask_precision_recall": "The share of predicted masks that are right, against the share of true defects matched.",
    "pro": "The mean share of a true region that is covered, against the share of good pixels marked.",
    "pixel_precision_recall": "The share of marked pixels that are defective, against that of defect pixels found.",
    "pixel_roc": "The share of defect pixels found, against the share of good pixels marked.",
    "loss": "The loss that training minimises. A validation curve that rises again is a sign of overfitting.",
}
"""A sentence on each figure."""
