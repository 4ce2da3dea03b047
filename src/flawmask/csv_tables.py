"""CSV files that spreadsheets open as they are: names in any script stay what they are, and none becomes a formula.

A file begins with a byte order mark, by which Excel knows UTF-8 ("Opening CSV UTF-8 files correctly in Excel",
Microsoft Support). A text that a spreadsheet would take for a formula gets an apostrophe in front, as OWASP's
Application Security Verification Standard 5.0 has it in requirement 1.2.10; numbers get none. Otherwise RFC 4180.
"""

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

Cell = str | int | float

_FORMULA = re.compile("'*(?:\\s*[=+\\-@\uff1d\uff0b\uff0d\uff20]|[\\t\\r\\n\\0])")
"""How a formula begins; the wide signs do it in Japanese settings. Apostrophes before it are counted with it, so that
those of a name can be told from ours."""


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
    """Write a table, its columns' names first.

    What a file system has in a name that is no Unicode is written as an escape, as Python writes it: `\\udcff`.

    Args:
        path: where it goes.
        columns: the names of the columns.
        rows: a value for each column; text is protected, and numbers are written as `repr` has them.
    """
    with path.open("w", newline="", encoding="utf-8-sig", errors="backslashreplace") as file:
        table = csv.writer(file)
        table.writerow(columns)
        table.writerows([_protected(cell) for cell in row] for row in rows)


def _protected(cell: Cell) -> Cell:
    return f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table that `write_table` wrote, as text by column, without what protects it.

    One without a byte order mark is read too.

    Raises:
        OSError: it cannot be opened.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        return [{name: _plain(cell) for name, cell in row.items()} for row in csv.DictReader(file, restval="")]


def _plain(cell: str) -> str:
    return cell[1:] if cell[:1] == "'" and _FORMULA.match(cell) else cell
