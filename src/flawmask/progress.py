"""Progress bars and lines that only the command line turns on: a library call never prints."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

T = TypeVar("T")

_console: Console | None = None


def show_progress_on(console: Console | None) -> None:
    """Show the bars of `track` on `console` from now on; None hides them."""
    global _console  # noqa: PLW0603 - the one switch between a library and a program
    _console = console


def log_to(console: Console) -> None:
    """Show what the library logs as plain lines that do not disturb a progress bar."""

    class _Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            style = "yellow" if record.levelno >= logging.WARNING else ""
            console.print(self.format(record), style=style, markup=False, highlight=False, soft_wrap=True)

    logger = logging.getLogger("flawmask")
    logger.handlers = [_Lines()]
    logger.setLevel(logging.INFO)


def show_details() -> None:
    """Show debug lines too from now on."""
    logging.getLogger("flawmask").setLevel(logging.DEBUG)


def has_details() -> bool:
    """Return whether debug lines are shown."""
    return logging.getLogger("flawmask").isEnabledFor(logging.DEBUG)


def is_shown() -> bool:
    """Return whether progress is shown."""
    return _console is not None


def track(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Yield `items` one by one, under a bar named `label` where progress is shown.

    Args:
        items: what to go through.
        label: a word or two; what is being done.
        total: how many there are, where `items` has no length.
    """
    if _console is None:
        yield from items
        return
    with _bar(_console) as bar:
        yield from bar.track(items, total=total, description=label)


@contextmanager
def bar(label: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Give a function that moves a bar on by so many bytes; it shows nothing where progress is not shown.

    Args:
        label: a word or two; what is being done.
        total: how many bytes there are; 0 where nobody knows.
        done: how many of them are done.
    """
    if _console is None:
        yield lambda _: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=_console, transient=_console.is_terminal) as shown:
        task = shown.add_task(label, total=total or None, completed=done)
        yield lambda count: shown.advance(task, count)


@contextmanager
def _bar(console: Console) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # A bar drawn over and over would fill a log file: without a terminal only its last state is printed.
    with Progress(*columns, console=console, transient=console.is_terminal) as bar:
        yield bar
