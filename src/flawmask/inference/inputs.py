"""The images that `predict` finds in files, folders and patterns, and the other files there."""

import glob
import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from heapq import merge
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np

from flawmask import images, remote
from flawmask.errors import FlawmaskError
from flawmask.files import is_junk, real_path, walked
from flawmask.tally import Tally

LIST = "@"
"""The first letter of an input that is a list of images."""


@dataclass
class Inputs:
    """The files that the inputs lead to.

    Attributes:
        images: the images without duplicates, in the order of the inputs; the files of a folder are sorted.
        not_predicted: the other files, each with the reason: images in unknown formats, and files that are no images,
            such as texts. Hidden files, thumbnails and the like are ignored.
        tally: the number of images used and not used, as far as this is known before they are read. Files that are no
            images do not count.
    """

    images: list[Path] = field(default_factory=list)
    not_predicted: dict[Path, str] = field(default_factory=dict)
    tally: Tally = field(default_factory=lambda: Tally("images"))


def find_images(inputs: tuple[str, ...], output: Path) -> Inputs:
    """Return the files that the inputs lead to.

    A file that is named itself counts as an image, whatever its suffix. A name with characters of a pattern, such as
    `[1]`, is taken literally if such a file or folder exists. The same holds for each folder in a pattern.

    Args:
        inputs: files, folders and patterns, as on the command line.
        output: the folder for the results. Pictures of an earlier run in it are no inputs.

    Raises:
        FlawmaskError: an input leads to no image, or lies in the folder for the results.
        OSError: a folder cannot be opened.
    """
    reasons: dict[Path, str | None] = {}
    results = real_path(output)
    for text in inputs:
        real = real_path(Path(text))
        if real.exists() and results in (real, *real.parents):
            raise FlawmaskError(f"--input {text} lies in {output}, which is replaced: name another --output_dir")
        paths = {path: reason for path, reason in _expand(text) if results not in real_path(path).parents}
        if None not in paths.values():
            raise FlawmaskError(_no_image(text, paths))
        # A file that is named itself stays an image, even if a folder or a pattern leads to it, too.
        reasons |= {path: reason for path, reason in paths.items() if reason is None or path not in reasons}
    if not reasons:
        raise FlawmaskError("--input names no image: give it files, folders or patterns")
    result = Inputs()
    for path, reason in reasons.items():
        if reason is None:
            result.images.append(path)
            continue
        result.not_predicted[path] = reason
        if images.may_be_image(path):
            result.tally.leave_out(path.as_posix(), "unknown format")
    result.tally.used = len(result.images)
    return result


def _no_image(text: str, others: dict[Path, str | None]) -> str:
    """Return the message for an input that leads to no image, with one of the other files as an example."""
    example = next((f"; {path.as_posix()}: {reason}" for path, reason in others.items()), "")
    return f"--input {text}: there is no such file, or no image ({_formats()}) there{example}"


def _expand(text: str) -> Iterator[tuple[Path, str | None]]:
    """Yield the files of an input, each with the reason why it is no image; None for an image."""
    path = Path(text)
    if text.startswith(LIST) and not path.exists():
        yield from ((_local(line), None) for line in lines(Path(text[len(LIST) :])))
        return
    _local(text)
    if path.exists() and not path.is_dir():
        yield path, None
        return
    for one in [path] if path.is_dir() else _matching(path):
        if one.is_dir():
            yield from ((below, _reason(below)) for below in walked(one))
        else:
            yield one, _reason(one)


def _local(text: str) -> Path:
    """Return the path of a local file. An address is refused."""
    if remote.is_address(text):
        raise FlawmaskError(f"--input {text} is an address: use --records, which writes rows instead of pictures")
    return Path(text)


def lines(path: Path) -> Iterator[str]:
    """Yield the lines of a list of images, without empty ones.

    Raises:
        FlawmaskError: the list cannot be read.
    """
    try:
        with path.open("rb") as file:
            for line in file:
                if name := os.fsdecode(line.rstrip(b"\r\n")):
                    yield name
    except OSError as error:
        raise FlawmaskError(f"--input {LIST}{path}: the list cannot be read: {error.strerror}") from None


def _matching(pattern: Path) -> Iterable[Path]:
    """Return the files and folders that match a pattern, sorted. A part of it that exists is taken literally.

    Only the names of a few folders are in memory, unless the pattern has a `**`.
    """
    paths = _in_steps(Path(), pattern.parts)
    return sorted(set(paths)) if "**" in pattern.parts else paths


def _in_steps(base: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    if not parts:
        yield base
    elif base.is_dir():
        for one in sorted(_step(base, parts[0])):
            yield from _in_steps(one, parts[1:])


def _step(base: Path, part: str) -> list[Path]:
    if os.path.lexists(base / part):
        return [base / part]
    # Path.glob would also find hidden files.
    paths = [Path(one) for one in glob.glob(str(Path(glob.escape(str(base)), part)), recursive=True)]  # noqa: PTH207
    wants_hidden = is_junk(part)
    return [one for one in paths if wants_hidden or not any(map(is_junk, one.relative_to(base).parts))]


def stream_images(inputs: tuple[str, ...], output: Path) -> Iterator[tuple[str, str | None]]:
    """Yield the names of the files that the inputs lead to, each with the reason why it is no image; None for an image.

    They are those of `find_images`, but only a few are in memory. Each file comes once. The files of several inputs are
    sorted. A list keeps its order. An input may also be the address of remote files.

    Raises:
        FlawmaskError: an input leads to no image, or a list is one of several inputs or names an image twice.
        OSError: a folder cannot be opened.
    """
    for text in inputs:
        a_list = text.startswith(LIST) and not Path(text).exists()
        if not a_list and not remote.is_address(text):
            continue
        if len(inputs) > 1:
            raise FlawmaskError(f"--input {text} must be the only input with --records: make a list of all images")
        yield from _in_list(Path(text[len(LIST) :])) if a_list else _remote(text)
        return
    streams = [_with_an_image(text, real_path(output)) for text in inputs]
    for path, same in groupby(merge(*streams, key=itemgetter(0)), key=itemgetter(0)):
        reasons = [reason for _, reason in same]
        yield path.as_posix(), None if None in reasons else reasons[0]


def _in_list(path: Path) -> Iterator[tuple[str, None]]:
    _check_distinct(path)
    found = False
    for name in lines(path):
        found = True
        yield name, None
    if not found:
        raise FlawmaskError(f"--input {LIST}{path}: the list is empty")


def _remote(address: str) -> Iterator[tuple[str, str | None]]:
    found = False
    for name in remote.find(address):
        reason = None if name == address or images.is_readable(Path(name)) else "no image"
        found = found or reason is None
        yield name, reason
    if not found:
        raise FlawmaskError(f"--input {address}: there is no image ({_formats()}) there")


def _with_an_image(text: str, results: Path) -> Iterator[tuple[Path, str | None]]:
    """Yield the files of an input that do not lie in the folder for the results. There must be an image among them."""
    example: dict[Path, str | None] = {}
    has_image = False
    for path, reason in _expand(text):
        if results in real_path(path).parents:
            continue
        has_image = has_image or reason is None
        if not example:
            example[path] = reason
        yield path, reason
    if not has_image:
        raise FlawmaskError(_no_image(text, example))


def _check_distinct(path: Path) -> None:
    """Refuse a list with an equal line. It takes 8 bytes of memory for each line."""
    digests = array("Q", (int.from_bytes(blake2b(os.fsencode(name), digest_size=8).digest()) for name in lines(path)))
    ordered = np.sort(np.frombuffer(digests, dtype=np.uint64))
    repeated = set(ordered[1:][ordered[1:] == ordered[:-1]][:1].tolist())
    for number, digest in enumerate(digests if repeated else (), start=1):
        if digest in repeated:
            raise FlawmaskError(f"{path} names the image of its line {number} twice: each must be there once (sort -u)")


def shard_number(name: str, count: int) -> int:
    """Return which of `count` shards an image belongs to, from 1.

    It follows from the image's name alone. So shards that start at different times never share or miss an image, even
    if other images arrive in between.
    """
    return int.from_bytes(blake2b(os.fsencode(name), digest_size=8).digest()) % count + 1


def _reason(path: Path) -> str | None:
    """Return why a file in a folder or from a pattern is no image; None for an image."""
    if path.exists() and not path.is_file():
        return "a pipe or a device, not a file: name it to read it"
    if images.is_readable(path):
        return None
    if not images.may_be_image(path):
        return "no image"
    return f"none of the formats {_formats()}: convert it, or name the file itself if it is one of them"


def _formats() -> str:
    return ", ".join(sorted(suffix[1:] for suffix in images.READABLE))
