"""JSON files that hold a list of any length: only one element is in memory at a time."""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from flawmask.errors import FlawmaskError
from flawmask.files import atomic_file, read_json

CHARACTERS = 2**20
"""The number of characters that are read at once."""


class NoListError(FlawmaskError):
    """A JSON file holds something else than a list."""


_AFTER = tuple(", ]\t\r\n")
"""The characters that may follow an element."""

_NO_SPACE = re.compile(r"[^ \t\r\n]")


def write_json_list(path: Path, elements: Iterable[Any]) -> None:
    """Write a list as JSON, atomically, with each element on a separate line. NaN is refused, as in `write_json`."""
    encode = json.JSONEncoder(allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        before = "[\n"
        for element in elements:
            file.write(f"{before}{encode(element)}".encode(errors="backslashreplace"))  # as `write_json`
            before = ",\n"
        file.write(b"[]\n" if before == "[\n" else b"\n]\n")


def read_json_list(path: Path) -> Iterator[Any]:
    """Yield the elements of the list in a JSON file, however it is laid out.

    Raises:
        FlawmaskError: the file is missing or is not JSON. Elements before the fault have been yielded.
        NoListError: it holds something else.
    """
    try:
        yield from _elements(path)
    except (ValueError, OSError):
        read_json(path)  # says what is wrong, and where
        raise NoListError(f"{path} must hold a list") from None


def _elements(path: Path) -> Iterator[Any]:
    decode = json.JSONDecoder().raw_decode
    with path.open("rb") as beginning:
        encoding = json.detect_encoding(beginning.read(4))
    with path.open(encoding=encoding, errors="surrogatepass") as file:
        text, at = "", 0

        def upcoming() -> str:
            """Return the next character that is no space; "" at the end of the file."""
            nonlocal text, at
            while True:
                at = len(text) if (found := _NO_SPACE.search(text, at)) is None else found.start()
                if at < len(text):
                    return text[at]
                text, at = file.read(CHARACTERS), 0
                if not text:
                    return ""

        separator = upcoming()
        _expect("[", separator)
        at += 1
        is_empty = upcoming() == "]"
        while separator != "]" and not is_empty:
            upcoming()
            while True:
                with suppress(json.JSONDecodeError):
                    element, end = decode(text, at)
                    if text[end : end + 1] in _AFTER:  # otherwise, the text ends within a number
                        break
                more = file.read(max(CHARACTERS, len(text) - at))
                if not more:
                    raise ValueError("the list does not end")
                text, at = text[at:] + more, 0
            yield element
            at = end
            separator = upcoming()
            _expect(",]", separator)
            at += 1
        at += is_empty
        _expect("", upcoming())


def _expect(characters: str, found: str) -> None:
    if found not in characters or bool(found) != bool(characters):
        raise ValueError(f"{found!r} where {characters!r} should be")
