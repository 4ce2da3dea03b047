"""The errors that Flawmask raises on purpose."""

from collections.abc import Sequence
from pathlib import Path


class FlawmaskError(Exception):
    """Something the user can mend: the message names the file, what is wrong with it and what to do.

    The command line prints it as one line and exits with status 2.
    """


class ImageError(FlawmaskError):
    """A file that cannot be read as an image, or a value that is none."""


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
