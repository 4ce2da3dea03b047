"""Files and folders are written atomically, and files of other origin are never replaced."""

import json
import os
import stat
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flawmask.errors import FlawmaskError
from flawmask.files import (
    atomic_file,
    atomic_folder,
    check_output_folder,
    fingerprint,
    read_json,
    remove_partial_files,
    sha256,
    walk,
    write_bytes,
    write_json,
    write_json_lines,
)


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.bin"
    for data in (b"first", b"second"):
        write_bytes(path, data)
        assert path.read_bytes() == data
    assert names(tmp_path) == ["new", "new/a.bin"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_file_that_fails_half_way_leaves_the_old_one_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    (tmp_path / "a.bin").write_bytes(b"old")
    with pytest.raises(error), atomic_file(tmp_path / "a.bin") as temporary:
        temporary.write_bytes(b"ne")
        raise error
    assert (tmp_path / "a.bin").read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_the_target_is_unchanged_while_the_temporary_file_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with atomic_file(path) as temporary:
        temporary.write_bytes(b"new")
        assert temporary.parent == path.parent
        assert path.read_bytes() == b"old"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no permission bits")
def test_files_and_folders_get_the_usual_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "a.bin", b"")
        with atomic_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.bin").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


@pytest.mark.parametrize("value", [{"a": [1, 2.5, None, "ä"]}, [], 0])
def test_json_is_read_back(tmp_path: Path, value: Any) -> None:
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


def test_nan_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", float("nan"))
    assert names(tmp_path) == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(content=st.dictionaries(st.text(), JSON))
def test_an_object_written_line_by_line_is_read_back(content: dict[str, Any], tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "lines.json"
    write_json_lines(path, content)
    assert json.loads(path.read_bytes()) == content
    assert read_json(path) == content
    assert path.read_bytes().count(b"\n") == lines_of(content)


def lines_of(content: dict[str, Any]) -> int:
    """Return the expected number of lines: two for the braces, and one for each key, element and closing bracket."""
    return (
        1
        if not content
        else 2 + sum(2 + len(value) if isinstance(value, list) and value else 1 for value in content.values())
    )


@pytest.mark.parametrize("write", [write_json, write_json_lines])
def test_a_name_that_is_not_unicode_is_written_as_an_escape_and_read_back(
    tmp_path: Path, write: Callable[[Path, dict[str, Any]], None]
) -> None:
    write(tmp_path / "a.json", {"names": ["Pr\udcfcfung.png", "划.png"]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert r'"Pr\udcfcfung.png"' in text
    assert "划" in text
    assert read_json(tmp_path / "a.json") == {"names": ["Pr\udcfcfung.png", "划.png"]}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), object()])
def test_a_bad_record_late_in_the_list_leaves_the_old_file(tmp_path: Path, bad: Any) -> None:
    write_json(tmp_path / "a.json", "old")
    records = [{"id": number} for number in range(10_000)]
    with pytest.raises((ValueError, TypeError)):
        write_json_lines(tmp_path / "a.json", {"images": [*records, {"id": bad}]})
    assert read_json(tmp_path / "a.json") == "old"
    assert names(tmp_path) == ["a.json"]


def test_a_long_list_is_never_in_memory_as_text(tmp_path: Path) -> None:
    records = [{"outline": list(range(200))}] * 10_000
    write_json_lines(tmp_path / "a.json", {})  # warm up, so that one-time allocations are not counted
    tracemalloc.start()
    try:
        write_json_lines(tmp_path / "a.json", {"annotations": records})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "a.json").stat().st_size > 5_000_000
    assert peak < 500_000


def test_many_equal_coordinates_share_one_object(tmp_path: Path) -> None:
    count = 200_000
    write_json_lines(tmp_path / "a.json", {"outline": [1000 + number % 1000 for number in range(count)]})
    tracemalloc.start()
    try:
        outline = read_json(tmp_path / "a.json")["outline"]
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(outline) == count
    assert held < 12 * count, "a list entry needs 8 bytes; a separate integer would need 32 more"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32-le"])
def test_json_is_read_in_any_utf(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.json").write_bytes('{"naïve": [-1, 70000, 1e3]}'.encode(encoding))
    assert read_json(tmp_path / "a.json") == {"naïve": [-1, 70000, 1000.0]}


@pytest.mark.parametrize("content", [None, b"{", b"", b"\xff\xfe\x00", b"\x89PNG"])
def test_a_file_that_is_not_json_is_reported_in_one_line_that_names_it(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FlawmaskError) as caught:
        read_json(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_is_refused_as_json(tmp_path: Path) -> None:
    with pytest.raises(FlawmaskError, match="cannot be read"):
        read_json(tmp_path)


def test_a_fingerprint_depends_on_names_and_contents_but_not_on_their_order() -> None:
    a, b = ("a", sha256(b"1")), ("b", sha256(b"2"))
    assert fingerprint([a, b]) == fingerprint([b, a])
    others = [[a], [a, ("b", sha256(b"3"))], [a, ("c", sha256(b"2"))], [("a", b[1]), ("b", a[1])]]
    assert len({fingerprint(other) for other in [[a, b], *others]}) == 5
    assert sha256(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_folder_appears_complete(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "deep" / "out") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("a")
        assert not (tmp_path / "deep" / "out").exists()
    assert names(tmp_path) == ["deep", "deep/out", "deep/out/sub", "deep/out/sub/a"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "new").write_text("new")
        assert names(tmp_path / "out") == ["old"]
    assert names(tmp_path) == ["out", "out/new"]


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_folder_that_fails_half_way_changes_nothing(tmp_path: Path, error: type[BaseException], there: bool) -> None:
    if there:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "old").write_text("old")
    before = names(tmp_path)
    with pytest.raises(error), atomic_folder(tmp_path / "out") as folder:
        (folder / "new").write_text("new")
        raise error
    assert names(tmp_path) == before


def test_if_the_new_folder_cannot_be_renamed_the_old_one_is_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="no"), atomic_folder(tmp_path / "out") as folder:
        (folder / "new").write_text("new")
    assert names(tmp_path) == ["out", "out/old"]


def test_a_folder_with_only_the_first_file_of_a_killed_process_may_be_written(tmp_path: Path) -> None:
    (tmp_path / ".made.json.0123456789abcdef.partial").write_text("{")
    check_output_folder(tmp_path, "made.json", overwrite=False, what="thing")
    remove_partial_files(tmp_path)
    assert names(tmp_path) == []
    (tmp_path / ".mine.partial").write_text("mine")
    remove_partial_files(tmp_path)
    with pytest.raises(FlawmaskError, match="holds something else"):
        check_output_folder(tmp_path, "made.json", overwrite=True, what="thing")
    assert names(tmp_path) == [".mine.partial"]


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_a_folder_behind_a_link_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "old").write_text("old")
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "new").write_text("new")
    assert (tmp_path / "out").is_symlink()
    assert names(tmp_path / "disk") == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]


def test_only_a_new_folder_an_empty_one_or_one_of_the_same_stage_may_be_written(tmp_path: Path) -> None:
    def check(name: str, overwrite: bool) -> None:
        check_output_folder(tmp_path / name, "made.json", overwrite=overwrite, what="thing")

    for name in ("empty", "ours", "theirs"):
        (tmp_path / name).mkdir()
    (tmp_path / "ours" / "made.json").write_text("{}")
    (tmp_path / "theirs" / "photo.png").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for overwrite in (False, True):
        check("new", overwrite)
        check("empty", overwrite)
        with pytest.raises(FlawmaskError, match="holds something else"):
            check("theirs", overwrite)
        with pytest.raises(FlawmaskError, match="is a file"):
            check("file", overwrite)
    check("ours", True)
    with pytest.raises(FlawmaskError, match="--overwrite"):
        check("ours", False)


@pytest.mark.parametrize(
    ("text", "encoding"), [("划痕", "gb18030"), ("Kratzer_größe", "cp1252"), ("трещина", "cp1251")]
)
def test_json_in_another_encoding_is_refused_with_possible_readings(tmp_path: Path, text: str, encoding: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(json.dumps({"name" * 40: text}, ensure_ascii=False).encode(encoding))
    with pytest.raises(FlawmaskError) as caught:
        read_json(path)
    assert str(path) in str(caught.value)
    assert f"{text} in {encoding}" in str(caught.value)
    assert "save it as UTF-8" in str(caught.value)
    path.write_bytes(json.dumps({"name": text}, ensure_ascii=False).encode("utf-8-sig"))
    assert read_json(path) == {"name": text}


def test_noise_is_refused_as_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'{"a": "\xff\xfe@\x81"}')
    with pytest.raises(FlawmaskError, match="it is not UTF-8 at byte 7: save it"):
        read_json(tmp_path / "a.json")


JUNK = (".a.png", "@eaDir/b.png", "x/.git/c.png", "__MACOSX/d.png", "x/Thumbs/e.png", "Thumbs.db", "x/one_thumb.png")


def test_a_walk_skips_files_that_programs_leave(tmp_path: Path) -> None:
    kept = ("one.png", "x/one.PNG", "x/y z/two.jpg", "x/thumb_screw.png", "notes.txt")
    for name in (*JUNK, *kept):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [path.relative_to(tmp_path).as_posix() for path in walk(tmp_path)] == sorted(kept)
    assert walk(tmp_path / "nowhere") == []
    assert [path.name for path in walk(tmp_path / "@eaDir")] == ["b.png"], "a folder that is named explicitly is walked"


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_a_walk_follows_links_except_those_that_lead_back(tmp_path: Path) -> None:
    (tmp_path / "top").mkdir()
    (tmp_path / "top/back").symlink_to(tmp_path / "top")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/one.png").write_bytes(b"")
    for name in ("a", "b"):
        (tmp_path / "top" / name).symlink_to(tmp_path / "elsewhere")
    assert [path.relative_to(tmp_path / "top").as_posix() for path in walk(tmp_path / "top")] == [
        "a/one.png",
        "b/one.png",
    ]
