"""Folders for the results of `run` and `compare`: new ones, earlier ones that go on, and those that users name."""

from pathlib import Path
from typing import Any

import pytest

from flawmask.errors import FlawmaskError
from flawmask.files import read_json, write_json
from flawmask.runs import COMPARISON, FOLDS, RUNS, begin_or_continue, check_folder, new_run_dir

SETTINGS = {"epochs": 3, "seed": 1}
ORIGIN: dict[str, Any] = {"made_by": "flawmask compare", "version": "1", "settings": SETTINGS, "source": ["a"]}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def begin(output_dir: Path | None = None, *, overwrite: bool = False, **changes: Any) -> Path:
    return begin_or_continue(COMPARISON, ORIGIN | changes, output_dir, overwrite=overwrite)


def test_a_new_run_folder_is_removed_where_nothing_was_written() -> None:
    with new_run_dir() as first, new_run_dir() as second:
        assert first != second
        (second / "best.pt").touch()
    assert list(RUNS.iterdir()) == [second]


def test_a_folder_that_the_user_named_is_left_to_the_training(tmp_path: Path) -> None:
    with new_run_dir(output_dir=tmp_path / "mine") as folder:
        assert folder == tmp_path / "mine"
    assert not folder.exists()


def test_an_earlier_comparison_of_the_same_origin_goes_on() -> None:
    folder = begin()
    assert folder.parent == RUNS
    assert begin() == folder
    assert begin(source=["b"]) != folder
    assert begin(overwrite=True) != folder


def test_in_a_named_folder_a_comparison_begins_and_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    assert begin_or_continue(FOLDS, ORIGIN, folder, overwrite=False, done=[]) == folder
    assert read_json(folder / FOLDS) == {**ORIGIN, "done": []}
    write_json(folder / FOLDS, {**ORIGIN, "done": [1]})
    assert begin_or_continue(FOLDS, ORIGIN, folder, overwrite=False, done=[]) == folder
    assert read_json(folder / FOLDS)["done"] == [1]
    assert not RUNS.exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"source": ["b"]}, "mine holds a comparison of other images, or of another version of Flawmask: name another"),
        ({"version": "2"}, "mine holds a comparison of other images, or of another version"),
        ({"settings": SETTINGS | {"epochs": 9}}, "mine holds a comparison with another --epochs: name another folder"),
    ],
)
def test_a_named_folder_with_another_comparison_is_replaced_only_when_asked(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    folder = begin(tmp_path / "mine")
    (folder / "old.txt").touch()
    with pytest.raises(FlawmaskError, match=says):
        begin(folder, **changes)
    assert (folder / "old.txt").exists()
    assert begin(folder, overwrite=True, **changes) == folder
    assert [path.name for path in folder.iterdir()] == [COMPARISON]
    assert read_json(folder / COMPARISON) == ORIGIN | changes


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_named_folder_that_holds_something_else_is_refused_and_left_as_it_is(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    write_json(tmp_path / "other" / COMPARISON, {"made_by": "somebody else"})
    for name, says in {
        "file": "file is a file: name a folder for the comparison",
        "photos": r"photos holds something else \(no comparison.json\): name a new folder for the comparison",
        "other": r"other holds something else \(.*comparison.json was not written by flawmask compare\)",
    }.items():
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(FlawmaskError, match=says):
            check_folder(tmp_path / name, COMPARISON, SETTINGS, overwrite=overwrite)
        with pytest.raises(FlawmaskError, match=says):
            begin(tmp_path / name, overwrite=overwrite)
        assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_and_a_setting_of_a_later_version_are_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    check_folder(tmp_path / "empty", COMPARISON, SETTINGS, overwrite=False)
    assert begin(tmp_path / "empty") == tmp_path / "empty"
    check_folder(tmp_path / "empty", COMPARISON, SETTINGS | {"crowds": "ignore"}, overwrite=False)
