"""The settings of `serve`."""

import re
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from flawmask.inference.config import VerdictSettings
from flawmask.settings import require

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""The name of a model: it is part of addresses, of labels of metrics, and of file names."""

MAX_WAIT = 10.0
"""The longest `--max_wait`, in seconds."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig(VerdictSettings):
    """Serve verdicts over HTTP, and a page to drop images on.

    On 127.0.0.1, only programs on this machine reach it. For any other host, a token is required. SIGTERM ends it after
    the accepted images are answered. SIGHUP loads the models again.
    """

    model: tuple[str, ...]
    """Checkpoints or exported models. To name one: bottle=run/best.pt. Otherwise its folder names it."""
    host: str = "127.0.0.1"
    """The address to listen on, such as 0.0.0.0 for all. It needs --token_file unless it is this machine's own."""
    port: int = 8000
    """The port to listen on."""
    max_wait: str = "5ms"
    """How long an image waits for others to share a batch with, such as 5ms. With a batch size of 1, none waits."""
    max_queue: int = 16
    """Images accepted and not yet answered. Beyond, the answer is 503 with Retry-After."""
    max_upload_mb: int = 64
    """The largest request, in megabytes."""
    max_megapixels: int = 100
    """The largest image, in millions of pixels."""
    send_timeout: float = 10.0
    """Seconds that a client has to send its request."""
    decoders: int = 1
    """Processes that decode the uploaded images."""
    token_file: Path | None = None
    """A file with the token that requests must carry, at least 16 characters. Required unless --host is loopback."""
    tls_cert: Path | None = None
    """The server's certificate, PEM, for https."""
    tls_key: Path | None = None
    """The key of --tls_cert, PEM."""
    check_image: Path | None = None
    """An image of a defective part. A model that finds no defect on it is not used. Default: a drawn one is tried."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.model), "--model names no model")
        self.models  # noqa: B018 - refuses names that cannot be used
        require(1 <= self.port <= 65535, f"--port is {self.port}: it must lie between 1 and 65535")
        self.wait_seconds  # noqa: B018 - refuses what is no duration
        for name, most in (("max_queue", 10_000), ("max_upload_mb", 4096), ("max_megapixels", 4096), ("decoders", 64)):
            value = getattr(self, name)
            require(1 <= value <= most, f"--{name} is {value}: it must lie between 1 and {most}")
        timeout = self.send_timeout
        require(0 < timeout <= 3600, f"--send_timeout is {timeout}: it must be above 0, and at most 3600 seconds")
        require((self.tls_cert is None) == (self.tls_key is None), "--tls_cert and --tls_key need each other")
        require(
            self.is_loopback or self.token_file is not None,
            f"--host {self.host} can be reached from other machines: it needs --token_file",
        )

    @property
    def models(self) -> dict[str, Path]:
        """The path of each model by its name. The first one is the default.

        Raises:
            FlawmaskError: a name is used twice or has other characters than letters, digits, dots, - and _.
        """
        named: dict[str, Path] = {}
        for text in self.model:
            before, between, after = text.partition("=")
            if between and not Path(text).exists():
                name, path = before, Path(after)
            else:
                path = Path(text)
                name = (path if path.is_dir() else path.absolute().parent).resolve().name or "model"
            require(
                NAME.fullmatch(name) is not None,
                f"--model {text}: name it with letters, digits, dots, - and _, as in --model bottle={path}",
            )
            require(name not in named, f"--model has two models with the name {name}: name one, as in other={path}")
            named[name] = path
        return named

    @property
    def wait_seconds(self) -> float:
        """`max_wait` in seconds.

        Raises:
            FlawmaskError: it is no duration in ms or s, or too long.
        """
        match = re.fullmatch(r"(\d{1,6}(?:\.\d+)?) ?(ms|s)", self.max_wait)
        require(match is not None, f"--max_wait is {self.max_wait!r}: give a time such as 5ms or 0.1s")
        assert match is not None
        seconds = float(match[1]) / (1000 if match[2] == "ms" else 1)
        require(seconds <= MAX_WAIT, f"--max_wait is {self.max_wait}: it must be at most {MAX_WAIT:.0f}s")
        return seconds

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
