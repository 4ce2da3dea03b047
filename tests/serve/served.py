"""A real server in this process: uvicorn on a port of 127.0.0.1 in a thread, with real decoding processes."""

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from random_network import SPEC, network, patchwork

from flawmask.errors import FlawmaskError
from flawmask.images import encode_png
from flawmask.model import checkpoint
from flawmask.model.spec import ModelSpec
from flawmask.serve.config import ServeConfig
from flawmask.serve.parts import Server
from flawmask.serve.server import make_runner

PATIENCE = 120.0
"""Seconds after which something that should happen at once has failed."""


@dataclass(frozen=True)
class Answer:
    """An answer: its status, its headers in lower case, and its body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Served:
    """A running server."""

    server: Server
    port: int

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Send a request on a connection of its own, and return the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request(method, path, body, dict(headers or {}))
            answer = connection.getresponse()
            return Answer(answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, None, headers)

    def predict(self, data: bytes, query: str = "", **headers: str) -> Answer:
        """Send an image as the body."""
        return self.ask("POST", f"/v1/predict{query}", data, {"Content-Type": "image/png", **headers})

    def predict_form(self, files: Mapping[str, bytes], query: str = "", **headers: str) -> Answer:
        """Send images as a form."""
        parts = [
            f'--edge\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'.encode() + data
            for name, data in files.items()
        ]
        body = b"\r\n".join(parts) + b"\r\n--edge--\r\n"
        kind = {"Content-Type": "multipart/form-data; boundary=edge"}
        return self.ask("POST", f"/v1/predict{query}", body, {**kind, **headers})

    @contextmanager
    def connected(self) -> Iterator[socket.socket]:
        """Yield a connection to write bytes to that are no whole request."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as connection:
            yield connection

    def metric(self, name: str, **labels: str) -> float:
        return self.server.metrics.registry.get_sample_value(name, labels) or 0.0

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self.server.tasks[0].get_loop()

    def call(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Return what the server's event loop makes of a coroutine."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(PATIENCE)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the network busy, as by an image that takes long, until the context ends."""
        held, release = threading.Event(), threading.Event()

        def block() -> None:
            held.set()
            release.wait(PATIENCE)

        asyncio.run_coroutine_threadsafe(self.server.network.run(block), self.loop)
        assert held.wait(PATIENCE)
        try:
            yield
        finally:
            release.set()


@contextmanager
def serving(config: ServeConfig, port: int = 0) -> Iterator[Served]:
    """Yield a server that is ready, on a free port or on this one. It is stopped when the context ends."""
    problems: list[FlawmaskError] = []
    server = Server(config)
    runner = make_runner(server, problems)
    with socket.create_server(("127.0.0.1", port)) as listening:
        thread = threading.Thread(target=runner.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            until(lambda: runner.started or not thread.is_alive())
            if problems:
                raise problems[0]
            yield Served(server, listening.getsockname()[1])
        finally:
            runner.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive()


def until(condition: Any) -> None:
    """Wait until a condition holds, at most `PATIENCE`."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def save_model(path: Path, spec: ModelSpec = SPEC) -> Path:
    """Write a checkpoint of a small network that predicts defects, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(path, network(), spec)
    return path


def config_of(*models: str | Path, **changes: Any) -> ServeConfig:
    """Return settings for the CPU, with a threshold of 0.8."""
    return ServeConfig(model=tuple(str(one) for one in models), device="cpu", precision="fp32", conf=0.8, **changes)


DEFECT, GOOD = 1, 0
"""Seeds of images: the highest scores are 0.82 and 0.79, and the threshold is 0.8."""


def image(seed: int = DEFECT, height: int = 60, width: int = 90) -> bytes:
    """Return a PNG of random patches."""
    return encode_png(patchwork(height, width, seed))
