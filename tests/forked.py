"""Processes that start quickly: forks of a process that has imported PyTorch.

Starting a Python interpreter takes longer than most tests. A fork has its own signals, exit status, output and limits,
like any process. Windows has no fork, so these tests are skipped there.
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
"""Modules that a fork need not import. They must be installed, because the server does not search the tests' folder."""


class Forked:
    """A running Python program, with the parts of `subprocess.Popen` that tests use. All its output is one text."""

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
        """The id of the process, which is also that of its process group."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status; None while the process runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return the same."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal to the process if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait for the end of the process and return its output."""
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
