"""Ctrl-C and SIGTERM during a training: the current step is finished and saved before the program ends."""

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, NoReturn

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Ctrl-C, and the signal of schedulers that are about to take a machine away."""


class Stop:
    """Handles the signals while its context is entered. Only a program's main thread receives them.

    Attributes:
        deferring: if True, a signal is only stored in `received_signal`, and the training stops after its step. If
            False, a signal ends the program at once.
        received_signal: the number of the signal that came, 0 for none. A second signal ends the program at once.
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
        # Store it before raising: Python drops an exception raised in a destructor. Then the next step sees the signal.
        self.received_signal = number
        if ends_now:
            end(number)
        log.warning("told to stop: this step is finished and saved first")


def end(number: int) -> NoReturn:
    """End the program as a signal does: with status 130 after Ctrl-C, and 143 after SIGTERM."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
