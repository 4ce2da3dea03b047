"""Files and folders that are there whole or not at all."""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flawmask.errors import FlawmaskError

LITTER = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})
"""What file managers leave in every folder that they show."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path` to write to; it is flushed to disk and renamed when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file)
        temporary.replace(path)  # only now, since Windows renames no open file
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all. NaN is refused: a figure that is not there is null."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode())


def write_json_lines(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object as JSON, each element of its lists on a line of its own, whole or not at all.

    For lists of a hundred thousand records: seven times as fast as `write_json`, a third of its size where there are
    many numbers, still a line for each record in a diff, and never more than one of them in memory as text.
    """
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(_json_pieces(content))


def _json_pieces(content: Mapping[str, Any]) -> Iterator[str]:
    encode = json.JSONEncoder(allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode
    before = "{\n"
    for key, value in content.items():
        yield f"{before}{encode(key)}:"
        before = ",\n"
        if isinstance(value, list | tuple) and value:
            yield f"[\n{encode(value[0])}"
            yield from (f",\n{encode(element)}" for element in value[1:])
            yield "\n]"
        else:
            yield encode(value)
    yield "\n}\n" if content else "{}\n"


class _Integers(dict[str, int]):
    """The integers in a JSON file by how they are written: one object for each, however often it is there.

    Outlines are millions of coordinates from a few thousand values: a list of them takes a fifth of the memory.
    """

    def __missing__(self, text: str) -> int:
        value = int(text)
        if len(text) <= 5:  # a coordinate; ids and areas are many and seldom there twice
            self[text] = value
        return value


def read_json(path: Path) -> Any:
    """Return what the JSON file holds.

    Raises:
        FlawmaskError: the file is missing or is not JSON.
    """
    try:
        return json.loads(_text(path), parse_int=_Integers().__getitem__)
    except FileNotFoundError:
        raise FlawmaskError(f"{path} does not exist") from None
    except (ValueError, OSError) as error:
        raise FlawmaskError(f"{path} cannot be read as JSON: {error}") from None


def _text(path: Path) -> str:
    """Return a JSON file's text, in whichever UTF. (`json.loads` would keep the bytes beside it while it parses.)"""
    data = path.read_bytes()
    return data.decode(json.detect_encoding(data), "surrogatepass")


def sha256(data: bytes) -> str:
    """Return the SHA-256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def fingerprint(contents: Iterable[tuple[str, str]]) -> str:
    """Return one SHA-256 for a set of (name, SHA-256 of the content) pairs, whatever their order."""
    return sha256("\n".join(f"{digest} {name}" for name, digest in sorted(contents)).encode())


def check_output_folder(
    folder: Path, marker: str, *, overwrite: bool, what: str, entries: Collection[str] | None = None
) -> None:
    """Refuse to write into `folder` unless it is new, empty, or (with `overwrite`) made by the same stage.

    Args:
        folder: where the stage is about to write.
        marker: the file that the stage leaves in every folder it makes; only such a folder is ever replaced.
        overwrite: whether a folder the stage made before may be replaced.
        what: what the folder would hold, for the message.
        entries: all that the stage ever writes there, where the marker's name is a common one; a folder with anything
            else in it is not the stage's.

    Raises:
        FlawmaskError: the folder holds something else, or something that `overwrite` would have to replace.
    """
    if folder.exists() and not folder.is_dir():
        raise FlawmaskError(f"{folder} is a file: name a folder for the {what}")
    names = sorted(path.name for path in folder.iterdir() if path.name not in LITTER) if folder.exists() else []
    if not names:
        return
    if not (folder / marker).is_file():
        raise FlawmaskError(f"{folder} holds something else (no {marker}): name a new folder for the {what}")
    strange = [name for name in names if entries is not None and name not in entries]
    if strange:
        raise FlawmaskError(f"{folder} holds something else ({strange[0]}): name a new folder for the {what}")
    if not overwrite:
        raise FlawmaskError(f"{folder} already holds a {what}: name another folder, or replace it with --overwrite")


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder beside `target` to fill; it takes `target`'s place when the block ends well.

    What was at `target` stays until then, and stays for good when the block raises.
    """
    target = target.resolve()  # a link to a folder elsewhere stays one
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(target)
    temporary.mkdir()
    try:
        yield temporary
        _swap(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _swap(new: Path, target: Path) -> None:
    """Put `new` in the place of `target`. A folder cannot be replaced in one step, so the old one steps aside."""
    if not target.exists():
        new.rename(target)
        return
    old = new.with_suffix(".old")
    target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old)


def _beside(path: Path) -> Path:
    """Return a hidden name beside `path` that nobody has taken. (What `tempfile` makes, only its owner may read.)"""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
