"""Progress bars and log lines. Only the command line turns them on: a library call never prints."""

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
    """From now on, show progress bars on `console`; None hides them."""
    global _console  # noqa: PLW0603 - the one switch between a library and a program
    _console = console


def log_to(console: Console) -> None:
    """Show the library's log messages as plain lines that do not disturb a progress bar."""

    class _Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            style = "yellow" if record.levelno >= logging.WARNING else ""
            console.print(self.format(record), style=style, markup=False, highlight=False, soft_wrap=True)

    logger = logging.getLogger("flawmask")
    logger.handlers = [_Lines()]
    logger.setLevel(logging.INFO)


def show_details() -> None:
    """From now on, show debug lines too."""
    logging.getLogger("flawmask").setLevel(logging.DEBUG)


def has_details() -> bool:
    """Return whether debug lines are shown."""
    return logging.getLogger("flawmask").isEnabledFor(logging.DEBUG)


def is_shown() -> bool:
    """Return whether progress is shown."""
    return _console is not None


def track(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Yield `items` one by one, with a progress bar if progress is shown.

    Args:
        items: the items.
        label: what is being done, in one or two words.
        total: the number of items, if `items` has no length.
    """
    if _console is None:
        yield from items
        return
    with _bar(_console) as bar:
        yield from bar.track(items, total=total, description=label)


@contextmanager
def bar(label: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Yield a function that advances a progress bar by a number of bytes. If progress is hidden, it does nothing.

    Args:
        label: what is being done, in one or two words.
        total: the number of bytes; 0 if unknown.
        done: the number of bytes that are done already.
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
    # Drawing the bar again and again would fill a log file. So without a terminal, only its last state is printed.
    with Progress(*columns, console=console, transient=console.is_terminal) as bar:
        yield bar
