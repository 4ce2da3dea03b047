"""Tables for spreadsheets: names are preserved, no name becomes a formula, and tables are read back unchanged."""

import csv
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flawmask.csv_tables import Cell, read_table, write_table


def raw(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8-sig") as lines:
        return list(csv.reader(lines))


def test_a_table_begins_with_a_byte_order_mark_and_keeps_names_and_numbers(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    rows: list[list[Cell]] = [['Teil_ü, 划痕 "A".png', "good", 0.25, 3], ["a.png", "-", -0.5, 0]]
    write_table(path, ["file", "verdict", "score", "count"], rows)
    assert path.read_bytes().startswith(b"\xef\xbb\xbffile,verdict,score,count\r\n")
    assert raw(path)[1:] == [['Teil_ü, 划痕 "A".png', "good", "0.25", "3"], ["a.png", "'-", "-0.5", "0"]]
    assert [list(row.values()) for row in read_table(path)] == [[str(cell) for cell in row] for row in rows]


@pytest.mark.parametrize(
    "name", ["=1+2.png", "+1.png", "-1.png", "@A1.png", "\t=1.png", " =1.png", "\r=1", "\uff1d1.png"]
)
def test_no_name_becomes_a_formula(tmp_path: Path, name: str) -> None:
    write_table(tmp_path / "table.csv", ["file"], [[name]])
    assert raw(tmp_path / "table.csv")[1] == [f"'{name}"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8") | st.sampled_from("'=+-@\t "), min_size=1)))
def test_a_written_table_is_read_back_unchanged(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "table.csv"
    write_table(path, ["file", "kind"], [[name, "x"] for name in names])
    assert [row["file"] for row in read_table(path)] == names
    assert not any(cell.lstrip()[:1] in tuple("=+-@") for cell, _ in raw(path)[1:])


def test_a_table_without_a_byte_order_mark_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("file,truth\na.png,good\nb.png\n", encoding="utf-8")
    assert read_table(tmp_path / "table.csv") == [{"file": "a.png", "truth": "good"}, {"file": "b.png", "truth": ""}]
