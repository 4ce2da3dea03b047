"""A server that a command of its own runs, perhaps in an environment without PyTorch."""

import http.client
import json
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from serve.served import PATIENCE, until

Ask = Callable[..., tuple[int, Any]]


@contextmanager
def served(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Iterator[Ask]:
    """Run a `flawmask serve` on a free port, and yield what asks it when it is ready: `ask(method, path, body)`.

    It returns the status and the JSON of the answer; status 0 if the server cannot be reached.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def ask(method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        try:
            connection.request(method, path, body, {"Content-Type": "image/png"})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        except OSError:
            return 0, None
        finally:
            connection.close()

    with subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.DEVNULL, env=environment) as server:
        try:
            until(lambda: server.poll() is not None or ask("GET", "/health/ready")[0] == 200)
            yield ask
        finally:
            server.terminate()
