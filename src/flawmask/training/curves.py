"""`curves.png`: the losses and the learning rate over the epochs."""

import io
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flawmask.files import write_bytes

# Okabe and Ito's palette, which colour-blind people can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def draw_curves(history: dict[str, list[Any]], best_epoch: int, select_by: str, path: Path) -> None:
    """Write the curves of a training as a PNG.

    Args:
        history: a list per figure, an entry per epoch, as in `history.json`.
        best_epoch: the epoch that became `best.pt`.
        select_by: what chose it.
        path: where the picture goes.
    """
    figure = Figure(figsize=(13, 4), layout="constrained")
    total, parts, rate = figure.subplots(1, 3)
    epochs = history["epoch"]
    marker = "o" if len(epochs) < 30 else None
    for name, colour in zip(("train_loss", "val_loss", "segm_ap", "f1"), COLOURS, strict=False):
        values = history.get(name, [])
        if any(value is not None for value in values):
            total.plot(
                epochs,
                [float("nan") if one is None else one for one in values],
                marker=marker,
                label=name,
                color=colour,
            )
    total.axvline(best_epoch, color="grey", linestyle=":", label=f"best.pt (by {select_by})")
    total.set_title("Total loss")
    names = [name for name in history if name.startswith("loss_")]
    for name, colour in zip(names, COLOURS, strict=False):
        parts.plot(epochs, history[name], marker=marker, label=name.removeprefix("loss_"), color=colour)
    parts.set_title("Training loss by part")
    rate.plot(epochs, history["learning_rate"], marker=marker, color=COLOURS[0])
    rate.set_title("Learning rate at the end of the epoch")
    for axes in (total, parts, rate):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)
    total.legend()
    parts.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    write_bytes(path, picture.getvalue())
