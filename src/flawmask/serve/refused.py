"""Why there is no verdict."""

from collections.abc import Mapping


class Refused(Exception):  # noqa: N818 - it is an answer, not an error of the server
    """A request or an image that gets no verdict.

    Attributes:
        status: the HTTP status.
        reason: what is wrong and what to do, for whoever reads the answer.
        kind: the reason in a word, for the metrics.
        headers: further headers of the answer.
    """

    def __init__(self, status: int, kind: str, reason: str, headers: Mapping[str, str] | None = None) -> None:
        """Make the refusal of a request or an image."""
        super().__init__(reason)
        self.status, self.kind, self.reason, self.headers = status, kind, reason, dict(headers or {})
