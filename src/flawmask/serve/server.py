"""Runs the server: its socket, its signals, and how long a client may take."""

import asyncio
import logging
import signal
import socket
import ssl
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from flawmask.errors import FlawmaskError
from flawmask.serve.app import PATIENCE, make_app
from flawmask.serve.config import ServeConfig
from flawmask.serve.parts import Server
from flawmask.serve.security import Guard, read_token

log = logging.getLogger(__name__)

KEEP_SECONDS = 60
"""How long an idle connection is kept: longer than a line usually pauses between two parts."""

DRAIN_SECONDS = int(PATIENCE) + 30
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
    server = Server(config)
    problems: list[FlawmaskError] = []
    runner = make_runner(server, problems)
    with listen(config) as listening:
        try:
            runner.run(sockets=[listening])
        except SystemExit:  # uvicorn's, after the error was raised in the lifespan
            if problems:
                raise problems[0] from None
            raise


def make_runner(server: Server, problems: list[FlawmaskError]) -> uvicorn.Server:
    """Return what runs a server on a socket.

    Args:
        server: the server. Its models are loaded when it runs.
        problems: gets the reason if they cannot be.

    Raises:
        FlawmaskError: the token or the certificate cannot be used.
    """
    config = server.config
    token = None if config.token_file is None else read_token(config.token_file)
    _check_tls(config)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        """Start the server's models before the first request, and stop them after the last."""
        try:
            async with server.running():
                _reload_on_hangup(server)
                _announce(server)
                yield
        except FlawmaskError as error:
            problems.append(error)
            raise

    app = make_app(server)
    app.router.lifespan_context = lifespan
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # it would log each bad header, and our errors again
    return uvicorn.Server(
        uvicorn.Config(
            Guard(app, token, server.metrics, is_loopback=config.is_loopback),
            http=impatient(config.send_timeout),
            ws="none",
            lifespan="on",
            ssl_certfile=config.tls_cert,
            ssl_keyfile=config.tls_key,
            timeout_keep_alive=KEEP_SECONDS,
            timeout_graceful_shutdown=DRAIN_SECONDS,
            log_config=None,
            access_log=False,
            server_header=False,
        )
    )


def _check_tls(config: ServeConfig) -> None:
    if config.tls_cert is None or config.tls_key is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.tls_cert, config.tls_key)
    except OSError as error:  # SSLError is one
        raise FlawmaskError(f"{config.tls_cert} and {config.tls_key} cannot be used: {error}") from None


def listen(config: ServeConfig) -> socket.socket:
    """Return a socket that listens. So a port that is taken is known before a model is loaded.

    Raises:
        FlawmaskError: the host is not this machine's, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=2048)
    except OSError as error:
        raise FlawmaskError(f"--host {config.host} --port {config.port} cannot be used: {error.strerror}") from None


def _reload_on_hangup(server: Server) -> None:
    if not hasattr(signal, "SIGHUP") or threading.current_thread() is not threading.main_thread():
        return  # Windows has no such signal, and only the main thread gets signals
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()

    def reload() -> None:
        task = loop.create_task(server.models.replace_all())
        tasks.add(task)  # the loop itself keeps only weak references
        task.add_done_callback(tasks.discard)

    loop.add_signal_handler(signal.SIGHUP, reload)


def _announce(server: Server) -> None:
    config = server.config
    scheme = "http" if config.tls_cert is None else "https"
    host = f"[{config.host}]" if ":" in config.host else config.host
    log.info("serving %s at %s://%s:%d", ", ".join(server.models.names), scheme, host, config.port)
    if not config.is_loopback and config.tls_cert is None:
        log.warning("images and the token travel unencrypted: give --tls_cert and --tls_key, or a proxy that has them")
