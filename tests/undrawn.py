"""Trainings and reports without pictures: drawing takes longer than a short training."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from flawmask.report import figures
from flawmask.report.results import Results
from flawmask.training import curves, label_plots, pictures


def _word(*given: Any) -> None:
    """Stand in for a function that draws a training's picture. Its last argument is the path."""
    path: Path = given[-1]
    path.write_bytes(b"picture")


def _nothing(results: Results, _: Sequence[tuple[bool, float]]) -> dict[str, str]:
    """Stand in for a function that draws a report's figure. A report leaves out figures that cannot be drawn."""
    (results.folder / "figures").mkdir(exist_ok=True)
    return {}


STUBS: dict[str, Callable[..., Any]] = {
    "flawmask.training.callbacks.draw_labels": _word,
    "flawmask.training.callbacks.draw_curves": _word,
    "flawmask.training.callbacks.draw_train_batch": _word,
    "flawmask.report.report.draw_figures": _nothing,
}

REAL: dict[str, Callable[..., Any]] = {
    "flawmask.training.callbacks.draw_labels": label_plots.draw_labels,
    "flawmask.training.callbacks.draw_curves": curves.draw_curves,
    "flawmask.training.callbacks.draw_train_batch": pictures.draw_train_batch,
    "flawmask.report.report.draw_figures": figures.draw_figures,
}


@contextmanager
def patched(what: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Use these drawing functions, STUBS or REAL, until the context ends."""
    with ExitStack() as stack:
        for place, function in what.items():
            stack.enter_context(patch(place, function))
        yield
