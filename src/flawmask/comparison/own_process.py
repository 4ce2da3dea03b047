"""Run a function in a new process, and forward to it the signals that this process receives."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

from flawmask.training.stop import SIGNALS


def run_in_own_process(function: Callable[..., None], *args: Any, **kwargs: Any) -> int:
    """Call the function in a new process and return that process's exit status.

    Raises:
        KeyboardInterrupt: one of the two processes received SIGINT.
        SystemExit: one of them received SIGTERM.
    """
    process = multiprocessing.get_context("spawn").Process(target=function, args=args, kwargs=kwargs)
    received: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        received.append(number)
        if process.pid is not None and os.name != "nt":  # there, Ctrl-C reaches both
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)

    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, forward) for number in SIGNALS} if is_main else {}
    try:
        process.start()
        process.join()  # after a signal, the process saves its training before it ends
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    status = process.exitcode or 0
    if signal.SIGINT in received or status in (128 + signal.SIGINT, -signal.SIGINT):
        raise KeyboardInterrupt
    if received or status in (128 + signal.SIGTERM, -signal.SIGTERM):
        raise SystemExit(128 + signal.SIGTERM)
    return status


def describe_exit(status: int) -> str:
    """Return a sentence on how a process ended that left no message."""
    if status == -getattr(signal, "SIGKILL", 0) != 0:
        return "its process was killed: perhaps memory ran out"
    return f"its process ended with status {status}"
