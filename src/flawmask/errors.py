"""The errors that Flawmask raises on purpose."""

import re
from collections.abc import Sequence
from pathlib import Path

from flawmask.launch import is_own_process

_SETTING = re.compile(r"flawmask \w+[^:;,()]*|(?<!\S)--(\w+)(?: ([^\s:;,]+)(?=:| is not there))?")
"""A setting in a message, as the command line has it, perhaps with its value; or a command to be typed."""


class FlawmaskError(Exception):
    """Something the user can mend: the message names the file, what is wrong with it and what to do.

    The command line prints it as one line and exits with status 2. A message is written with the flags of the command
    line; in a program that imports Flawmask, it speaks of arguments: `device='tpu' is not there`.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return text if is_own_process() else _SETTING.sub(_argument, text)


def _argument(setting: re.Match[str]) -> str:
    name, value = setting.groups()
    return setting[0] if name is None else name if value is None else f"{name}={value!r}"


class ImageError(FlawmaskError):
    """A file that cannot be read as an image, or a value that is none."""


class UnusedError(FlawmaskError):
    """Images or annotations that were found and are not used, where `--strict` wants all of them to be.

    The command line exits with status 3.
    """


class OutOfReachError(FlawmaskError):
    """Weights that are not on this machine, and cannot be fetched or may not be."""


class RecordsError(FlawmaskError):
    """Records of a file that cannot be used.

    The command line prints a line for each.

    Attributes:
        path: the file.
        problems: what is wrong, record by record; the message holds the first alone.
    """

    def __init__(self, path: Path, problems: Sequence[str]) -> None:
        """Take the file and what is wrong with its records."""
        more = f"; it is the first of {len(problems)} records that cannot be used" if len(problems) > 1 else ""
        super().__init__(f"{path}: {problems[0]}{more}")
        self.path, self.problems = path, tuple(problems)
