"""`curves.png`: losses, validation metrics and the learning rate over the epochs."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flawmask.files import write_bytes
from flawmask.fonts import in_any_script

# Okabe and Ito's palette, which colour-blind people can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

VALIDATION_FIGURES = ("segm_ap", "f1")
"""Optional metrics of the validation split in `history.json`, besides its loss. Each is from 0 to 1."""


def draw_curves(history: dict[str, list[Any]], best_epoch: int, select_by: str, path: Path) -> None:
    """Write the curves of a training as a PNG. A missing value leaves a gap in its curve.

    Args:
        history: a list per metric, an entry per epoch, as in `history.json`.
        best_epoch: the epoch that became `best.pt`.
        select_by: the metric that chose it.
        path: the PNG to write.
    """
    parts = [name for name in history if name.startswith("loss_")]
    panels = {
        "Total loss": ["train_loss", "val_loss"],
        "Training loss by part": parts,
        "Validation": [name for name in VALIDATION_FIGURES if name in history],
        "Learning rate at the end of the epoch": ["learning_rate"],
    }
    shown = {title: names for title, names in panels.items() if names}
    figure = Figure(figsize=(4.4 * len(shown), 4), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, len(shown)), shown.items(), strict=True):
        _plot(axes, history, names)
        axes.set_title(title)
        axes.axvline(best_epoch, color="grey", linestyle=":", label=f"best.pt (by {select_by})")
        axes.set_ylim(bottom=0, top=1.02 if title == "Validation" else None)
        axes.legend(fontsize="small")
    write_figure(figure, path)


def _plot(axes: Axes, history: dict[str, list[Any]], names: Sequence[str]) -> None:
    """Plot the named metrics over the epochs. Metrics without a single value are left out."""
    for name, colour in zip(names, COLOURS, strict=False):
        values = [math.nan if value is None else value for value in history.get(name, [])]
        if not all(math.isnan(value) for value in values):
            # Without markers, a single epoch would be invisible. With many epochs, markers would hide the line.
            marker = "o" if len(values) < 30 else None
            axes.plot(history["epoch"], values, marker=marker, label=name.removeprefix("loss_"), color=colour)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)


def write_figure(figure: Figure, path: Path) -> None:
    """Write a Matplotlib figure as a PNG, whole or not at all."""
    picture = io.BytesIO()
    with in_any_script(figure, "png"):
        figure.savefig(picture, format="png", dpi=110)
    write_bytes(path, picture.getvalue())
