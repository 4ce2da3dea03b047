"""Lists in JSON files are read and written element by element, like `json` reads them as a whole."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flawmask import json_lists
from flawmask.errors import FlawmaskError
from flawmask.files import read_json
from flawmask.json_lists import NoListError, read_json_list, write_json_list

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(st.lists(VALUES, max_size=6), st.integers(1, 40), st.sampled_from([None, 0, 3]))
def test_lists_are_read_however_they_are_laid_out(
    tmp_path_factory: pytest.TempPathFactory, elements: list[Any], characters: int, indent: int | None
) -> None:
    path = tmp_path_factory.mktemp("list") / "list.json"
    path.write_text(json.dumps(elements, indent=indent), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(json_lists, "CHARACTERS", characters)
        assert list(read_json_list(path)) == elements
        write_json_list(path, iter(elements))
        assert list(read_json_list(path)) == elements
    assert read_json(path) == elements
    assert len(path.read_text(encoding="utf-8").split("\n")) == (len(elements) + 3 if elements else 2)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_lists_are_read_in_any_utf(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "list.json").write_text('["é", 1]', encoding=encoding)
    assert list(read_json_list(tmp_path / "list.json")) == ["é", 1]


@pytest.mark.parametrize("text", ["", "[", "[1", "[1,", "[1,]", "[1 2]", "[1] 2", '["a', "[1]]", "]", "[,1]", "\xff"])
def test_what_is_no_json_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "list.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(FlawmaskError, match=r"list\.json cannot be read as JSON"):
        list(read_json_list(tmp_path / "list.json"))


@pytest.mark.parametrize("text", ["{}", "3", '"[1]"', "null"])
def test_other_json_is_no_list(tmp_path: Path, text: str) -> None:
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(NoListError, match="must hold a list"):
        list(read_json_list(tmp_path / "list.json"))


def test_a_missing_file_is_refused_and_nan_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(FlawmaskError, match="does not exist"):
        list(read_json_list(tmp_path / "none.json"))
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_list(tmp_path / "nan.json", [1.0, float("nan")])
    assert not list(tmp_path.iterdir())
