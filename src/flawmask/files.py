"""Write files and folders atomically: they are complete or do not exist."""

import errno
import getpass
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from flawmask.errors import FlawmaskError

LITTER = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})
"""Files that file managers leave in every folder that they show."""

PARTIAL = re.compile(r"\..+\.[0-9a-f]{16}\.partial")
"""The name of a file that `atomic_file` has not finished."""

JUNK = frozenset({"__macosx", "thumb", "thumbs", "thumbnail", "thumbnails"})
"""Names, in lower case, of folders that programs make for their own copies of files."""

_THUMBNAIL = re.compile(r"thumb(?:nail)?s?[ ._-]+(?P<after>.+)|(?P<before>.+?)[ ._-]+thumb(?:nail)?s?", re.IGNORECASE)


def is_junk(name: str) -> bool:
    """Return whether the name is that of a file or folder that the user did not make.

    Such files are hidden, or were made by a file manager, an archiver or a network drive (`.DS_Store`, `__MACOSX`,
    `@eaDir`, `thumbnails`).
    """
    return name.startswith((".", "@")) or name in LITTER or name.casefold() in JUNK


def walk(folder: Path) -> list[Path]:
    """Return the files below a folder, sorted; none if the folder does not exist. See `walked`."""
    return list(walked(folder))


def walked(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, sorted, with the names of only a few folders in memory.

    Links are followed. Junk files and junk folders are skipped (see `is_junk`). So are thumbnails of a file in the same
    folder, such as `001_thumb.jpg` beside `001.png`.

    Raises:
        OSError: a folder cannot be read.
    """
    yield from _below(folder, folder) if folder.is_dir() else ()


def _below(folder: Path, top: Path) -> Iterator[Path]:
    if _is_loop(folder, top):
        return
    with os.scandir(folder) as entries:
        is_folder = {entry.name: _is_folder(entry) for entry in entries if not is_junk(entry.name)}
    stems = {Path(name).stem.casefold() for name, one in is_folder.items() if not one}
    for name in sorted(is_folder, key=os.path.normcase):  # the order of paths
        if is_folder[name]:
            yield from _below(folder / name, top)
        elif not _is_thumbnail(name, stems):
            yield folder / name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_loop(folder: Path, top: Path) -> bool:
    """Return whether `folder` is a link back to one of its parents below `top`."""
    parents = [folder.parents[up] for up in range(len(folder.relative_to(top).parts))]
    return bool(parents) and real_path(folder) in {real_path(parent) for parent in parents}


def _is_thumbnail(name: str, stems: Collection[str]) -> bool:
    match = _THUMBNAIL.fullmatch(Path(name).stem)
    return match is not None and (match["after"] or match["before"]).casefold() in stems


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path` to write to. If the block succeeds, the file is flushed and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(path)  # only after the file is closed: Windows cannot rename an open file
        _flush(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        _name(error, path)
        raise


def _flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk, as far as the system can tell."""
    is_windows, is_folder = os.name == "nt", path.is_dir()
    if is_windows and is_folder:  # Windows cannot open a folder
        return
    try:
        handle = os.open(path, os.O_RDWR if is_windows else os.O_RDONLY)
    except PermissionError:  # the file is written, but we may not open it again
        return
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot flush a folder.
        if not is_folder or error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically. NaN is refused: a missing value must be null.

    Bytes of a file name that are not Unicode are written as JSON escapes, `\\udcff`, and are read back unchanged.
    """
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False)
    write_bytes(path, f"{text}\n".encode(errors="backslashreplace"))


def write_json_lines(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object as JSON, atomically, with each element of its lists on a separate line.

    This is for lists of a hundred thousand records. It is seven times as fast as `write_json`, and files with many
    numbers are a third as large. A diff still shows a line for each record, and only one record at a time is in memory
    as text.
    """
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        file.writelines(piece.encode(errors="backslashreplace") for piece in _json_pieces(content))  # as `write_json`


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
    """The integers of a JSON file by their text. Equal integers share one object.

    Polygons have millions of coordinates with a few thousand different values. Shared integers need a fifth of the
    memory.
    """

    def __missing__(self, text: str) -> int:
        value = int(text)
        if len(text) <= 5:  # a coordinate; longer numbers are ids and areas, which seldom occur twice
            self[text] = value
        return value


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        FlawmaskError: the file is missing or is not JSON.
    """
    try:
        return json.loads(_text(path), parse_int=_Integers().__getitem__)
    except FileNotFoundError:
        raise FlawmaskError(f"{path} does not exist") from None
    except UnicodeDecodeError as error:
        raise FlawmaskError(f"{path} cannot be read as JSON: {_encoding_problem(error)}") from None
    except (ValueError, OSError) as error:
        raise FlawmaskError(f"{path} cannot be read as JSON: {error}") from None


def _text(path: Path) -> str:
    """Return a JSON file's text, in any UTF encoding. (`json.loads` would keep the bytes in memory while it parses.)"""
    data = path.read_bytes()
    return data.decode(json.detect_encoding(data), "surrogatepass")


ENCODINGS = ("gb18030", "cp932", "big5", "cp949", "cp1251", "cp1252")
"""Encodings that tools use instead of UTF-8, in China, Japan, Taiwan, Korea, Eastern and Western Europe."""


def _encoding_problem(error: UnicodeDecodeError) -> str:
    """Return a message about bytes that are not in the expected encoding, with the first word read in other encodings.

    A few bytes do not tell which encoding is right, since several may fit. A person who sees the words knows.
    """
    words = re.finditer(rb"[\x40-\xff]+", error.object[max(0, error.start - 60) : error.start + 60])
    word = next((found[0] for found in words if found.end() > min(error.start, 60)), b"")
    shown = []
    for encoding in ENCODINGS:
        text = word.decode(encoding, "ignore")
        is_word = text.replace("_", "").isalpha() and text.encode(encoding) == word
        # A word is not partly Latin and partly Chinese, for example.
        if is_word and len({ord(letter) < 0x250 for letter in text}) == 1:
            shown.append(f"{text} in {encoding}")
    guess = f", and {word!r} there is {', or '.join(shown)}" if shown else ""
    name = error.encoding.upper()
    return f"it is not {name} at byte {error.start}{guess}: save it as UTF-8, in an editor or with iconv"


def sha256(data: bytes) -> str:
    """Return the SHA-256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def fingerprint(contents: Iterable[tuple[str, str]]) -> str:
    """Return one SHA-256 for a set of (name, SHA-256 of the content) pairs. Their order does not matter."""
    lines = "\n".join(f"{digest} {name}" for name, digest in sorted(contents))
    return sha256(lines.encode(errors="surrogateescape"))  # a file name need not be Unicode


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, or one for all files of a folder, in hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    if not path.is_dir():
        return sha256(path.read_bytes())
    return fingerprint((one.relative_to(path).as_posix(), sha256(one.read_bytes())) for one in walk(path))


def check_output_folder(
    folder: Path, marker: str, *, overwrite: bool, what: str, entries: Collection[str] | None = None
) -> None:
    """Raise an error unless `folder` is new or empty, or was made by the same stage and `overwrite` is on.

    Incomplete files of a killed process do not count: perhaps it was killed while it wrote the first one.

    Args:
        folder: the folder that the stage is about to write.
        marker: the file that the stage writes into every folder it makes. Only a folder with this file is replaced.
        overwrite: whether a folder that the same stage made may be replaced.
        what: the content of the folder, for the message.
        entries: the names of everything that the stage may write, if the marker's name is a common one. A folder with
            any other name in it was not made by the stage.

    Raises:
        FlawmaskError: the folder holds something else, or would need `overwrite`.
    """
    if folder.exists() and not folder.is_dir():
        raise FlawmaskError(f"{folder} is a file: name a folder for the {what}")
    ignored = {*LITTER, *(path.name for path in _partial_files(folder))}
    names = sorted(path.name for path in folder.iterdir() if path.name not in ignored) if folder.exists() else []
    if not names:
        return
    if not (folder / marker).is_file():
        raise FlawmaskError(f"{folder} holds something else (no {marker}): name a new folder for the {what}")
    unknown = [name for name in names if entries is not None and name not in entries]
    if unknown:
        raise FlawmaskError(f"{folder} holds something else ({unknown[0]}): name a new folder for the {what}")
    if not overwrite:
        raise FlawmaskError(f"{folder} already holds a {what}: name another folder, or replace it with --overwrite")


def real_path(path: Path) -> Path:
    """Return the path with all links followed. A link loop is returned as it is; `Path.resolve` would raise."""
    return Path(os.path.realpath(path))


def this_user() -> str:
    """Return an identifier of this user that is unique on this machine."""
    return str(os.getuid()) if hasattr(os, "getuid") else getpass.getuser()  # on POSIX, a user need not have a name


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Lock a folder, so that no other Flawmask process on this machine writes into it.

    The system releases the lock when the process ends, for whatever reason.

    Raises:
        FlawmaskError: another process holds the lock.
    """
    name = sha256(f"{this_user()} {real_path(folder)}".encode())[:16]
    lock = FileLock(Path(tempfile.gettempdir()) / f"flawmask_{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FlawmaskError(f"another process writes into {folder}: wait for it, or name another folder") from None
    try:
        yield
    finally:
        if os.name != "nt":  # on Windows, the lock removes its file itself
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `target` to fill. If the block succeeds, the folder replaces `target`.

    If the block raises an error, `target` stays as it was.

    Raises:
        FlawmaskError: another process writes into `target`.
    """
    target = real_path(target)  # a link to a folder stays a link
    target.parent.mkdir(parents=True, exist_ok=True)
    with folder_lock(target):
        _tidy(target)
        temporary = _beside(target)
        temporary.mkdir()
        try:
            yield temporary
            for path in (*temporary.rglob("*"), temporary):
                _flush(path)
            _swap(temporary, target)
            _flush(target.parent)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            _name(error, target)
            raise


def _name(error: BaseException, path: Path) -> None:
    """Set the file name of a system error, such as a full disk. A failed write has none, and a failed copy names its
    source."""
    if (
        isinstance(error, OSError)
        and error.errno is not None
        and (error.filename is None or error.filename2 is not None)
    ):
        error.filename = str(path)


def _tidy(target: Path) -> None:
    """Clean up after killed processes: restore `target` from `.old` if it is missing, and delete all other leftovers.

    The caller must hold the lock of `target`.
    """
    for old in _hidden(target, ".old"):
        if target.exists():
            _remove(old)
        else:
            old.rename(target)
    for partial in _hidden(target, ".partial"):
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def remove_partial_files(folder: Path) -> None:
    """Remove the incomplete files of a killed process. No other process may be writing into the folder.

    Incomplete folders stay: `atomic_folder` removes them, under its own lock.
    """
    for path in _partial_files(folder):
        path.unlink()


def _partial_files(folder: Path) -> list[Path]:
    return [path for path in folder.glob(".*.partial") if PARTIAL.fullmatch(path.name) and not path.is_dir()]


def _hidden(path: Path, suffix: str) -> list[Path]:
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{16}}{re.escape(suffix)}")
    return [other for other in path.parent.iterdir() if pattern.fullmatch(other.name)]


def _swap(new: Path, target: Path) -> None:
    """Replace `target` by `new`. A folder cannot be replaced in one step, so `target` is renamed first."""
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
    _remove(old)


def _beside(path: Path) -> Path:
    """Return a hidden, unused name beside `path`. (Files from `tempfile` would be readable by their owner only.)"""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
