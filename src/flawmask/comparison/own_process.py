"""A function in a process of its own, which gets the signals that this one gets."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

from flawmask.training.stop import SIGNALS


def in_own_process(work: Callable[..., None], *given: Any, **named: Any) -> int:
    """Call the function in a new process and return the status that it ends with.

    Raises:
        KeyboardInterrupt: it was interrupted, or this one was.
        SystemExit: it was told to stop.
    """
    process = multiprocessing.get_context("spawn").Process(target=work, args=given, kwargs=named)
    asked: list[int] = []

    def hand_on(number: int, _: FrameType | None) -> None:
        asked.append(number)
        if process.pid is not None and os.name != "nt":  # there, Ctrl-C reaches both
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)

    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, hand_on) for number in SIGNALS} if is_main else {}
    try:
        process.start()
        process.join()  # told to stop, it saves first
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    status = process.exitcode or 0
    if signal.SIGINT in asked or status in (128 + signal.SIGINT, -signal.SIGINT):
        raise KeyboardInterrupt
    if asked or status in (128 + signal.SIGTERM, -signal.SIGTERM):
        raise SystemExit(128 + signal.SIGTERM)
    return status


def death(status: int) -> str:
    """Return what the status means that a process ended with and that says nothing else."""
    if status == -getattr(signal, "SIGKILL", 0) != 0:
        return "its process was killed: memory ran out, perhaps"
    return f"its process ended with status {status}"
