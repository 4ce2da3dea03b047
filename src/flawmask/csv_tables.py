"""CSV files that spreadsheets open correctly: names in any script are preserved, and no name becomes a formula.

The files follow RFC 4180, with two additions. A file begins with a byte order mark, so that Excel recognises UTF-8
("Opening CSV UTF-8 files correctly in Excel", Microsoft Support). A text that a spreadsheet would read as a formula
gets an apostrophe in front (OWASP Application Security Verification Standard 5.0, requirement 1.2.10). Numbers do not.
"""

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

Cell = str | int | float

_FORMULA = re.compile("'*(?:\\s*[=+\\-@\uff1d\uff0b\uff0d\uff20]|[\\t\\r\\n\\0])")
"""The beginning of a formula; the full-width signs count in Japanese settings. Leading apostrophes match too, so that
an apostrophe of the name itself can be told from the one that we add."""


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
    """Write a table with a header row.

    Bytes of a file name that are not Unicode are written as Python escapes: `\\udcff`.

    Args:
        path: the file to write.
        columns: the names of the columns.
        rows: the rows, with one value for each column. Text is protected against being read as a formula. Numbers are
            written in the form of `repr`.
    """
    with path.open("w", newline="", encoding="utf-8-sig", errors="backslashreplace") as file:
        table = csv.writer(file)
        table.writerow(columns)
        table.writerows([_protected(cell) for cell in row] for row in rows)


def _protected(cell: Cell) -> Cell:
    return f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table that `write_table` wrote: text by column name, without the protecting apostrophes.

    A table without a byte order mark is read too.

    Raises:
        OSError: the file cannot be opened.
    """
    return list(rows_of(path))


def rows_of(path: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of `read_table` one by one."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        for row in csv.DictReader(file, restval=""):
            yield {name: _plain(cell) for name, cell in row.items()}


def _plain(cell: str) -> str:
    return cell[1:] if cell[:1] == "'" and _FORMULA.match(cell) else cell
