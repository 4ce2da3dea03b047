"""Who may ask, and what a browser may do with the answers."""

import hmac
import re
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flawmask.errors import FlawmaskError
from flawmask.serve.metrics import Metrics

PROTECTED = ("/v1/", "/metrics")
"""What needs the token. The page itself does not: it asks for the token."""

SHORTEST_TOKEN = 16

OWN_NAMES = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?")
"""What a browser on this machine calls it, with a port."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""The headers of every answer. Scripts come from this server and from files only, and no other page may show ours."""


def read_token(path: Path) -> str:
    """Return the token in a file.

    Raises:
        FlawmaskError: the file cannot be read, or its token is short or has spaces or letters other than ASCII.
    """
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise FlawmaskError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is no text'}") from None
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise FlawmaskError(
            f"{path} must hold one token of at least {SHORTEST_TOKEN} ASCII characters without spaces, as "
            "`openssl rand -hex 32` makes it"
        )
    return token


class Guard:
    """Checks each request before the application sees it, and adds `HEADERS` to each answer.

    On loopback, any web page in a browser on this machine could send requests here. So Host must be this machine's own
    name (another one has been made to point here, by DNS rebinding), and Origin, where there is one, must be the same.
    """

    def __init__(self, app: ASGIApp, token: str | None, metrics: Metrics, *, is_loopback: bool) -> None:
        """Take the application and the token; None where none is needed."""
        self._app, self._metrics, self._is_loopback = app, metrics, is_loopback
        self._token = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self._refusal(Headers(scope=scope), scope["path"])
        await (refusal or self._app)(scope, receive, send_with_headers)

    def _refusal(self, headers: Headers, path: str) -> JSONResponse | None:
        if self._is_loopback and not _is_from_here(headers):
            return self._refused(403, "foreign", "Host or Origin is not this server: use it from its own page")
        if self._token is None or not path.startswith(PROTECTED):
            return None
        # Compared in constant time, or the time would tell how much of a guess is right.
        if hmac.compare_digest(headers.get("authorization", "").encode(), self._token):
            return None
        refusal = self._refused(401, "token", "send the server's token, as Authorization: Bearer TOKEN")
        refusal.headers["WWW-Authenticate"] = "Bearer"
        return refusal

    def _refused(self, status: int, kind: str, reason: str) -> JSONResponse:
        self._metrics.refused.labels(kind).inc()
        return JSONResponse({"verdict": None, "reason": reason}, status)


def _is_from_here(headers: Headers) -> bool:
    """Return whether Host is a name of this machine, and Origin, where there is one, has the same host and port."""
    host = headers.get("host", "")
    return OWN_NAMES.fullmatch(host) is not None and all(
        origin in (f"http://{host}", f"https://{host}") for origin in headers.getlist("origin")
    )
