"""The errors that Flawmask raises on purpose."""

import re
from collections.abc import Sequence
from pathlib import Path

from flawmask.launch import is_own_process

_SETTING = re.compile(r"flawmask \w+[^:;,()]*|(?<!\S)--(\w+)(?: ([^\s:;,]+)(?=:| is not there))?")
"""A command-line flag in a message, perhaps with its value; or a command to type, which stays as it is."""


class FlawmaskError(Exception):
    """An error that the user can fix. The message names the file, what is wrong with it, and what to do.

    The command line prints the message as one line and exits with status 2. Messages are written with command-line
    flags. In a program that imports Flawmask, they name arguments instead: `device='tpu' is not there`.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return text if is_own_process() else _SETTING.sub(_argument, text)


def _argument(setting: re.Match[str]) -> str:
    name, value = setting.groups()
    return setting[0] if name is None else name if value is None else f"{name}={value!r}"


class ImageError(FlawmaskError):
    """A file or a value is not an image, or cannot be read as one."""


class TooManyPixelsError(ImageError):
    """An image has more pixels than are allowed."""


class UnusedError(FlawmaskError):
    """Images or annotations were found and are not used, although `--strict` is on.

    The command line exits with status 3.
    """


class OutOfReachError(FlawmaskError):
    """Weights are not on this machine, and cannot or must not be downloaded."""


class RecordsError(FlawmaskError):
    """Some records of a file cannot be used.

    The command line prints a line for each record.

    Attributes:
        path: the file.
        problems: one problem for each bad record. The message holds only the first.
    """

    def __init__(self, path: Path, problems: Sequence[str]) -> None:
        """Make the message from the first problem."""
        more = f"; it is the first of {len(problems)} records that cannot be used" if len(problems) > 1 else ""
        super().__init__(f"{path}: {problems[0]}{more}")
        self.path, self.problems = path, tuple(problems)
