"""Runs the server: its socket, its signals, and how long a client may take."""

import asyncio
import logging
import signal
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from flawmask.errors import FlawmaskError
from flawmask.serve.app import Server, make_app
from flawmask.serve.config import ServeConfig
from flawmask.serve.security import Guard, read_token

log = logging.getLogger(__name__)

DRAIN_SECONDS = 90
"""How long accepted images may take after SIGTERM. That is longer than any answer may."""


class ImpatientProtocol(H11Protocol):
    """uvicorn's protocol, which also closes a connection whose request headers do not arrive in time.

    uvicorn waits for them without end. (Its timeout is for connections that have been answered and are idle.)
    """

    patience: float
    """Seconds for the headers of a request; `impatient` sets it."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._timer: asyncio.TimerHandle | None = None
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Take what arrived, and wait for the rest of the headers."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        super().connection_lost(exc)
        self._stop()

    def _watch(self) -> None:
        """Start the time where headers are missing, and stop it where they are complete."""
        if self.conn.their_state is not h11.IDLE:
            self._stop()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.patience, self.transport.close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def impatient(seconds: float) -> type[ImpatientProtocol]:
    """Return the protocol with a time for a request's headers."""
    return type("Impatient", (ImpatientProtocol,), {"patience": seconds})


def serve(config: ServeConfig) -> None:
    """Serve until SIGTERM or Ctrl-C. Accepted images are answered first.

    Raises:
        FlawmaskError: a model, the token, the certificate or the check image cannot be used, or the port is taken.
    """
    token = None if config.token_file is None else read_token(config.token_file)
    context = _tls(config)
    server = Server(config)
    failure: list[FlawmaskError] = []

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            async with server.running():
                _reload_on_hangup(server)
                _announce(config, listening, token, server)
                yield
        except FlawmaskError as error:  # uvicorn would print a traceback and exit
            failure.append(error)
            raise

    app = make_app(server)
    listening = _socket(config)
    app.router.lifespan_context = lifespan
    settings: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False}
    if context is not None:
        settings |= {"ssl_certfile": config.tls_cert, "ssl_keyfile": config.tls_key}
    runner = uvicorn.Server(
        uvicorn.Config(
            Guard(app, token, server.metrics, is_loopback=config.is_loopback),
            http=impatient(config.send_timeout),
            ws="none",
            lifespan="on",
            timeout_graceful_shutdown=DRAIN_SECONDS,
            **settings,
        )
    )
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # it would log each bad header and our own errors again
    try:
        runner.run(sockets=[listening])
    except SystemExit:
        if failure:
            raise failure[0] from None
        raise
    finally:
        listening.close()


def _tls(config: ServeConfig) -> ssl.SSLContext | None:
    if config.tls_cert is None or config.tls_key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(config.tls_cert, config.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise FlawmaskError(f"{config.tls_cert} and {config.tls_key} cannot be used: {error}") from None
    return context


def _socket(config: ServeConfig) -> socket.socket:
    """Return the listening socket. It listens from now on, so that a port that is taken is said before loading."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=2048)
    except OSError as error:
        raise FlawmaskError(f"--host {config.host} --port {config.port} cannot be used: {error.strerror}") from None


def _reload_on_hangup(server: Server) -> None:
    if not hasattr(signal, "SIGHUP"):  # Windows
        return
    tasks: set[asyncio.Task[None]] = set()

    def reload() -> None:
        task = asyncio.get_running_loop().create_task(server.models.replace_all())
        tasks.add(task)  # the loop keeps weak references only
        task.add_done_callback(tasks.discard)

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)


def _announce(config: ServeConfig, listening: socket.socket, token: str | None, server: Server) -> None:
    scheme = "http" if config.tls_cert is None else "https"
    host = f"[{config.host}]" if ":" in config.host else config.host
    log.info("serving %s at %s://%s:%d", ", ".join(server.models.names), scheme, host, listening.getsockname()[1])
    if not config.is_loopback and config.tls_cert is None:
        log.warning("images and the token travel unencrypted: give --tls_cert and --tls_key, or a proxy that has them")
    assert config.is_loopback or token is not None
