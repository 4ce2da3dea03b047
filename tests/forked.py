"""Processes of their own that need not import PyTorch first: forks of one that has done so.

Interpreters that only start take longer than what most tests look at. Signals, exit statuses, output and limits are
those of any other process. There is no fork on Windows, where these tests are skipped.
"""

import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from runpy import run_path
from threading import Thread

PRELOADED = ["flawmask.cli", "flawmask.training.loop", "flawmask.evaluation.evaluate", "flawmask.inference.predict"]
"""What a fork need not import. These are installed: the server does not look where the tests are."""


class Forked:
    """A running Python program, with what the tests use of `subprocess.Popen`; what it prints goes to one place."""

    def __init__(
        self,
        program: Sequence[str | Path],
        environment: Mapping[str, str],
        most_bytes: int | None = None,
        cwd: Path | None = None,
    ) -> None:
        """Start `python PROGRAM`, which may write no file of more than `most_bytes`, in a folder."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        printed, output = context.Pipe(duplex=False)
        method = multiprocessing.get_start_method()
        arguments = ([str(one) for one in program], dict(environment), output, most_bytes, method, cwd)
        self._process = context.Process(target=_run, args=arguments)
        self._process.start()
        output.close()
        self._text: list[bytes] = []
        self._reader = Thread(target=self._read, args=(printed,), daemon=True)
        self._reader.start()

    def _read(self, printed: Connection) -> None:
        while data := os.read(printed.fileno(), 65536):
            self._text.append(data)
        printed.close()

    @property
    def pid(self) -> int:
        """Of the process, which leads a process group."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """What it ended with; None where it has not."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return the same."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send it a signal, where it is still there."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait for its end and return what it printed."""
        self._process.join(timeout)
        assert self.poll() is not None, f"it still runs after {timeout} s"
        self._reader.join(1)  # what it printed is there; a process that it started may hold the other end for longer
        return b"".join(self._text).decode(), None


def _run(
    program: list[str],
    environment: dict[str, str],
    output: Connection,
    most_bytes: int | None,
    method: str,
    cwd: Path | None,
) -> None:
    import torch

    if cwd is not None:
        os.chdir(cwd)
    multiprocessing.set_start_method(method, force=True)  # as it is elsewhere; here it would be this process's own
    os.setsid()
    for number in (1, 2):
        os.dup2(output.fileno(), number)
    output.close()
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    if most_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, resource.RLIM_INFINITY))
    sys.argv = program
    run_path(program[0], run_name="__main__")
