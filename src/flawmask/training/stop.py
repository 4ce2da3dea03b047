"""Signals that end a training: the step is finished and saved first."""

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, NoReturn

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Ctrl-C, and what schedulers send before they take a machine away."""


class Stop:
    """Takes the signals while it is entered; only the main thread of a program gets any.

    Attributes:
        waits: whether a signal is noted in `asked`, to be acted upon after the step, instead of ending things now.
        asked: the signal that came, 0 for none. A second one ends things at once.
    """

    def __init__(self) -> None:
        self.deferring, self.received_signal = False, 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, _: FrameType | None) -> None:
        ends_now = self.received_signal or not self.deferring
        self.received_signal = number  # first: Python drops what is raised in a destructor, and then the next step sees it
        if ends_now:
            end(number)
        log.warning("told to stop: this step is finished and saved first")


def end(number: int) -> NoReturn:
    """End the program as a signal does: with status 130 after Ctrl-C, and 143 after SIGTERM."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
