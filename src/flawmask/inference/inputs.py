"""The images that `predict` finds in files, folders and patterns, and the other files there."""

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
    if path.exists() and not path.is_dir():
        yield path, None
        return
    for one in [path] if path.is_dir() else _matching(path):
        if one.is_dir():
            yield from ((below, _reason(below)) for below in walk(one))
        else:
            yield one, _reason(one)


def _matching(pattern: Path) -> list[Path]:
    """Return the files and folders that match a pattern, sorted. A part of it that exists is taken literally."""
    paths = [Path()]
    for part in pattern.parts:
        paths = [one for base in paths if base.is_dir() for one in _step(base, part)]
    return sorted(set(paths))


def _step(base: Path, part: str) -> list[Path]:
    if os.path.lexists(base / part):
        return [base / part]
    # Path.glob would also find hidden files.
    paths = [Path(one) for one in glob.glob(str(Path(glob.escape(str(base)), part)), recursive=True)]  # noqa: PTH207
    wants_hidden = is_junk(part)
    return [one for one in paths if wants_hidden or not any(map(is_junk, one.relative_to(base).parts))]


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
