"""Files and folders that are there whole or not at all."""

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
"""What file managers leave in every folder that they show."""

JUNK = frozenset({"__macosx", "thumb", "thumbs", "thumbnail", "thumbnails"})
"""What folders of copies are called that programs make for themselves, in lower case."""

_THUMBNAIL = re.compile(r"thumb(?:nail)?s?[ ._-]+(?P<after>.+)|(?P<before>.+?)[ ._-]+thumb(?:nail)?s?", re.IGNORECASE)


def is_junk(name: str) -> bool:
    """Return whether the name of a file or folder says that it is none of the user's: hidden, or made by a file
    manager, an archiver or a network drive for itself (`.DS_Store`, `__MACOSX`, `@eaDir`, `thumbnails`)."""
    return name.startswith((".", "@")) or name in LITTER or name.casefold() in JUNK


def walk(folder: Path) -> list[Path]:
    """Return the files below a folder, sorted; none where there is no such folder.

    Links are followed. What is left aside is junk by its name, folders with all that is in them, and thumbnails of a
    file beside them, as `001_thumb.jpg` is of `001.png`.

    Raises:
        OSError: a folder cannot be read.
    """
    if not folder.is_dir():
        return []
    found: list[Path] = []
    for place, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        if _is_loop(Path(place), folder):
            folders.clear()
            continue
        folders[:] = [name for name in folders if not is_junk(name)]
        stems = {Path(name).stem.casefold() for name in names}
        found += [Path(place, name) for name in names if not is_junk(name) and not _is_thumbnail(name, stems)]
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def _is_loop(place: Path, top: Path) -> bool:
    """Return whether links lead from a folder between `top` and `place` back to it."""
    above = [place.parents[up] for up in range(len(place.relative_to(top).parts))]
    return bool(above) and real_path(place) in {real_path(one) for one in above}


def _is_thumbnail(name: str, stems: Collection[str]) -> bool:
    match = _THUMBNAIL.fullmatch(Path(name).stem)
    return match is not None and (match["after"] or match["before"]).casefold() in stems


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path` to write to; it is flushed to disk and renamed when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(path)  # only now, since Windows renames no open file
        _flush(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        _name(error, path)
        raise


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk, as far as the system can tell."""
    is_windows, is_folder = os.name == "nt", path.is_dir()
    if is_windows and is_folder:  # it opens no folders
        return
    try:
        handle = os.open(path, os.O_RDWR if is_windows else os.O_RDONLY)
    except PermissionError:  # written, but not to be opened once more
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if not is_folder or error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):  # some network file systems
            raise
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all. NaN is refused: a figure that is not there is null.

    What a file system has in a name that is no Unicode is written as JSON escapes it, `\\udcff`, and read as it was.
    """
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False)
    write_bytes(path, f"{text}\n".encode(errors="backslashreplace"))


def write_json_lines(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object as JSON, each element of its lists on a line of its own, whole or not at all.

    For lists of a hundred thousand records: seven times as fast as `write_json`, a third of its size where there are
    many numbers, still a line for each record in a diff, and never more than one of them in memory as text.
    """
    with whole_file(path) as temporary, temporary.open("wb") as file:
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
    except UnicodeDecodeError as error:
        raise FlawmaskError(f"{path} cannot be read as JSON: {_encoding_problem(error)}") from None
    except (ValueError, OSError) as error:
        raise FlawmaskError(f"{path} cannot be read as JSON: {error}") from None


def _text(path: Path) -> str:
    """Return a JSON file's text, in whichever UTF. (`json.loads` would keep the bytes beside it while it parses.)"""
    data = path.read_bytes()
    return data.decode(json.detect_encoding(data), "surrogatepass")


ENCODINGS = ("gb18030", "cp932", "big5", "cp949", "cp1251", "cp1252")
"""What tools write beside UTF-8, in China, Japan, Taiwan, Korea, Eastern and Western Europe."""


def _encoding_problem(error: UnicodeDecodeError) -> str:
    """Return what is wrong with bytes that are not in their encoding, and how the first word would read in others.

    Several may fit, and a few bytes do not say which one does: a person who sees the words knows.
    """
    words = re.finditer(rb"[\x40-\xff]+", error.object[max(0, error.start - 60) : error.start + 60])
    word = next((found[0] for found in words if found.end() > min(error.start, 60)), b"")
    shown = []
    for encoding in ENCODINGS:
        text = word.decode(encoding, "ignore")
        is_word = text.replace("_", "").isalpha() and text.encode(encoding) == word
        # No word is partly Latin and partly Chinese, say.
        if is_word and len({ord(letter) < 0x250 for letter in text}) == 1:
            shown.append(f"{text} in {encoding}")
    guess = f", and {word!r} there is {', or '.join(shown)}" if shown else ""
    name = error.encoding.upper()
    return f"it is not {name} at byte {error.start}{guess}: save it as UTF-8, in an editor or with iconv"


def sha256(data: bytes) -> str:
    """Return the SHA-256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def fingerprint(contents: Iterable[tuple[str, str]]) -> str:
    """Return one SHA-256 for a set of (name, SHA-256 of the content) pairs, whatever their order."""
    lines = "\n".join(f"{digest} {name}" for name, digest in sorted(contents))
    return sha256(lines.encode(errors="surrogateescape"))  # a name need not be Unicode


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


def real_path(path: Path) -> Path:
    """Return where a path leads, links followed; one that loops, at which `Path.resolve` raises, leads to itself."""
    return Path(os.path.realpath(path))


def this_user() -> str:
    """Return what tells this user from the others of the machine."""
    return str(os.getuid()) if hasattr(os, "getuid") else getpass.getuser()  # a user need not have a name


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Keep other programs on this machine from writing into the folder meanwhile. The system forgets it with the
    process, however that ends.

    Raises:
        FlawmaskError: one does.
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
        if os.name != "nt":  # there, the lock itself removes its file
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder beside `target` to fill; it takes `target`'s place when the block ends well.

    What was at `target` stays until then, and stays for good when the block raises.

    Raises:
        FlawmaskError: another process fills it.
    """
    target = real_path(target)  # a link to a folder elsewhere stays one
    target.parent.mkdir(parents=True, exist_ok=True)
    with only_one(target):
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
    """Let an error of the system, a full disk's for one, say where it happened: a failed write does not, and a failed
    copy names what it copied first."""
    if (
        isinstance(error, OSError)
        and error.errno is not None
        and (error.filename is None or error.filename2 is not None)
    ):
        error.filename = str(path)


def _tidy(target: Path) -> None:
    """Remove what processes that were killed left beside `target`, which nobody else is at; what one of them had put
    aside comes back where nothing has taken its place."""
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
    """Remove the files that a process which was killed had not written whole; nobody else may be at the folder.

    A folder is left to `whole_folder`, which knows by its own lock whether somebody is at it.
    """
    for path in folder.glob(".*.partial"):
        if not path.is_dir():
            path.unlink()


def _hidden(path: Path, suffix: str) -> list[Path]:
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{16}}{re.escape(suffix)}")
    return [one for one in path.parent.iterdir() if pattern.fullmatch(one.name)]


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
    _remove(old)


def _beside(path: Path) -> Path:
    """Return a hidden name beside `path` that nobody has taken. (What `tempfile` makes, only its owner may read.)"""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
