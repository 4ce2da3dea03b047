"""Which images `predict` is pointed at: files, folders and patterns; and what lies there and is none."""

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from flawmask import images
from flawmask.errors import FlawmaskError
from flawmask.files import is_junk, real_path, walk
from flawmask.tally import Tally


@dataclass
class Inputs:
    """What files, folders and patterns lead to.

    Attributes:
        images: the images, each once, in the order named, folders sorted.
        not_predicted: what else lies there, with the reason: files in formats that are not read, and such as a person
            would not take for an image either, texts for example. Hidden files, thumbnails and the like are left aside.
        tally: the images that were found; those above are used as far as one can tell before they are read. A text is
            no image that was found.
    """

    images: list[Path] = field(default_factory=list)
    not_predicted: dict[Path, str] = field(default_factory=dict)
    tally: Tally = field(default_factory=lambda: Tally("images"))


def find_images(inputs: tuple[str, ...], output: Path) -> Inputs:
    """Return what files, folders and patterns lead to.

    A file named outright is an image, whatever its suffix. A name that is there is that file or folder, even where it
    has the signs of a pattern, and so is each folder of a pattern.

    Args:
        inputs: as on the command line.
        output: where the results go; the pictures that an earlier run left there are none to be predicted.

    Raises:
        FlawmaskError: one of them leads to no image, or to where the results go.
        OSError: a folder cannot be opened.
    """
    found: dict[Path, str | None] = {}
    results = real_path(output)
    for text in inputs:
        real = real_path(Path(text))
        if real.exists() and results in (real, *real.parents):
            raise FlawmaskError(f"--input {text} lies in {output}, which is replaced: name another folder by --output")
        paths = {path: reason for path, reason in _expand(text) if results not in real_path(path).parents}
        if None not in paths.values():
            raise FlawmaskError(_no_image(text, paths))
        # A file that was named is an image, even where a folder or a pattern leads to it too.
        found |= {path: reason for path, reason in paths.items() if reason is None or path not in found}
    if not found:
        raise FlawmaskError("--input names no image: give it files, folders or patterns")
    result = Inputs()
    for path, reason in found.items():
        if reason is None:
            result.images.append(path)
            continue
        result.not_predicted[path] = reason
        if images.may_be_image(path):
            result.tally.leave_out(path.as_posix(), "unknown format")
    result.tally.used = len(result.images)
    return result


def _no_image(text: str, left: dict[Path, str | None]) -> str:
    """Return the message for an input that leads to no image, with the first of what it leads to."""
    example = next((f"; {path.as_posix()}: {reason}" for path, reason in left.items()), "")
    return f"--input {text}: there is no such file, or no image ({_formats()}) there{example}"


def _expand(text: str) -> Iterator[tuple[Path, str | None]]:
    """Yield what a text of the command line names, with the reason why it is no image, None where it is one."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        yield path, None
        return
    for one in [path] if path.is_dir() else _matching(path):
        if one.is_dir():
            yield from ((below, _reason(below)) for below in walk(one))
        else:
            yield one, _reason(one)


def _matching(pattern: Path) -> list[Path]:
    """Return what a pattern leads to, sorted; a part of it that is there by its very name stands for itself."""
    found = [Path()]
    for part in pattern.parts:
        found = [one for base in found if base.is_dir() for one in _step(base, part)]
    return sorted(set(found))


def _step(base: Path, part: str) -> list[Path]:
    if os.path.lexists(base / part):
        return [base / part]
    # Not Path.glob, which finds hidden files too.
    found = [Path(one) for one in glob.glob(str(Path(glob.escape(str(base)), part)), recursive=True)]  # noqa: PTH207
    is_asked = is_junk(part)
    return [one for one in found if is_asked or not any(map(is_junk, one.relative_to(base).parts))]


def _reason(path: Path) -> str | None:
    """Return why a file that nobody named is no image, None where it is one."""
    if path.exists() and not path.is_file():
        return "no file, but a pipe or a device: name it to read it"
    if images.is_readable(path):
        return None
    if not images.may_be_image(path):
        return "no image"
    return f"none of the formats {_formats()}: convert it, or name the file itself if it is one of them"


def _formats() -> str:
    return ", ".join(sorted(suffix[1:] for suffix in images.READABLE))
