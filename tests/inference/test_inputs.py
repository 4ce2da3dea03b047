"""The images that files, folders and patterns lead to: no duplicates, in order, and all other files are listed."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_network import patchwork

from flawmask.errors import FlawmaskError
from flawmask.images import encode_png
from flawmask.inference.inputs import find_images

PNG = encode_png(patchwork(8, 8))


def lay(folder: Path, *names: str, data: bytes = PNG) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def found(folder: Path, *inputs: str | Path) -> list[Path]:
    return find_images(tuple(map(str, inputs)), folder / "out").images


def test_files_folders_and_patterns_are_all_found_each_once_and_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = lay(tmp_path / "parts", "b.png", "a.png", "deep/c.png", "photo.dat")
    everything = [parts / "a.png", parts / "b.png", parts / "deep" / "c.png"]
    assert found(tmp_path, parts) == everything
    assert found(tmp_path, parts / "?.png") == everything[:2]
    assert found(tmp_path, parts / "**" / "*.png") == everything
    assert found(tmp_path, parts / "*") == everything, "a folder that a pattern leads to is searched, as in a shell"
    assert found(tmp_path, parts / "b.png", parts) == [everything[1], everything[0], everything[2]]
    monkeypatch.chdir(parts)
    assert found(tmp_path, "?.png", "deep") == [Path("a.png"), Path("b.png"), Path("deep/c.png")]


@pytest.mark.parametrize("name", ["photo.dat", "photo", ".hidden.png", "@photo.png", "part[1].png"])
def test_a_file_that_is_named_itself_is_an_image_whatever_its_suffix(tmp_path: Path, name: str) -> None:
    lay(tmp_path, name, "part1.png")
    assert found(tmp_path, tmp_path / name) == [tmp_path / name]
    both = find_images((str(tmp_path), str(tmp_path / name)), tmp_path / "out")
    assert sorted(both.images) == sorted({tmp_path / "part1.png", tmp_path / name})
    assert (both.not_predicted, both.tally.found, both.tally.all_used) == ({}, 2, True)


def test_a_folder_whose_name_looks_like_a_pattern_is_taken_literally(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = lay(tmp_path / "línea 3, cámara [2]", "=1+2.png", "b.png")
    lay(tmp_path / "línea 3, cámara 2", "other.png")
    assert found(tmp_path, wanted / "*.png") == [wanted / "=1+2.png", wanted / "b.png"]
    assert found(tmp_path, tmp_path / "*" / "b.png") == [wanted / "b.png"]
    monkeypatch.chdir(tmp_path)
    assert found(tmp_path, "línea 3, cámara [2]/*.png") == [Path(wanted.name, "=1+2.png"), Path(wanted.name, "b.png")]
    assert found(tmp_path, "línea ?, cámara [2]/*.png") == [Path("línea 3, cámara 2/other.png")], "none has that name"


def test_hidden_files_and_thumbnails_are_ignored(tmp_path: Path) -> None:
    junk = ("._a.png", ".cache/a.png", "@eaDir/a.png/SYNO_THUMB_M.jpg", "__MACOSX/._a.png", "thumbnails/a.png")
    lay(tmp_path, "a.png", "Thumbs.db", *junk)
    everything = find_images((str(tmp_path),), tmp_path / "out")
    assert (everything.images, everything.not_predicted) == ([tmp_path / "a.png"], {})
    assert found(tmp_path, tmp_path / "**" / "*.*") == [tmp_path / "a.png"]


@pytest.mark.skipif(os.name == "nt", reason="links want rights there")
def test_links_to_folders_are_followed_unless_they_form_a_loop(tmp_path: Path) -> None:
    lay(tmp_path / "elsewhere", "a.png")
    lay(tmp_path / "parts", "b.png")
    (tmp_path / "parts" / "today").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "parts" / "up").symlink_to(tmp_path / "parts")
    assert found(tmp_path, tmp_path / "parts") == [tmp_path / "parts/b.png", tmp_path / "parts/today/a.png"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_in_a_folder_is_listed_and_not_read(tmp_path: Path) -> None:
    lay(tmp_path, "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    inputs = find_images((str(tmp_path),), tmp_path / "out")
    assert inputs.images == [tmp_path / "a.png"]
    assert "pipe" in inputs.not_predicted[tmp_path / "pipe.png"]
    assert found(tmp_path, tmp_path / "pipe.png") == [tmp_path / "pipe.png"], "the input names it"
    assert inputs.tally.not_used == {"unknown format": [(tmp_path / "pipe.png").as_posix()]}


def test_other_files_in_a_folder_are_listed_and_possible_images_are_counted(
    tmp_path: Path,
) -> None:
    lay(tmp_path, "a.png", "photo.cr2", "photo.heic", "frame", "film.mp4", "unknown.xyz")
    lay(tmp_path, "notes.txt", "labels.json", "camera.log", "export.zip", data=b"text")
    lay(tmp_path, "labels.cache", data=b"\0")
    inputs = find_images((str(tmp_path),), tmp_path / "out")
    assert inputs.images == [tmp_path / "a.png"]
    counted = ["film.mp4", "frame", "photo.cr2", "photo.heic", "unknown.xyz"]
    assert inputs.tally.not_used == {"unknown format": [(tmp_path / name).as_posix() for name in counted]}
    named = {path.name: reason for path, reason in inputs.not_predicted.items()}
    assert sorted(named) == sorted([*counted, "camera.log", "export.zip", "labels.cache", "labels.json", "notes.txt"])
    assert named["notes.txt"] == "no image"
    assert named["photo.cr2"].startswith("none of the formats bmp, ")
    assert named["photo.cr2"].endswith(": convert it, or name the file itself if it is one of them")


NAMES = st.from_regex(r"[a-c]{1,2}\.(png|JPG|tif|cr2|txt|xyz)", fullmatch=True)


@settings(max_examples=30, deadline=None)
@given(
    names=st.sets(st.tuples(st.sampled_from(["", "deep/", "[1]/", ".junk/", "@eaDir/"]), NAMES), min_size=1, max_size=8)
)
def test_every_file_of_a_folder_is_an_image_or_listed(
    tmp_path_factory: pytest.TempPathFactory, names: set[tuple[str, str]]
) -> None:
    folder = lay(tmp_path_factory.mktemp("any"), "always.png", *map("".join, names))
    inputs = find_images((str(folder),), folder / "out")
    there = {folder / "always.png"} | {folder / place / name for place, name in names if place[:1] not in (".", "@")}
    assert len(inputs.images) == len(set(inputs.images))
    assert {*inputs.images, *inputs.not_predicted} == there
    assert not set(inputs.images) & set(inputs.not_predicted)
    texts = {path for path in there if path.suffix == ".txt"}
    assert inputs.tally.found == len(there - texts)
    assert inputs.tally.used == len(inputs.images)
    assert texts <= set(inputs.not_predicted)


@pytest.mark.parametrize("what", ["missing.png", "*.png", "empty", "texts"])
def test_an_input_that_leads_to_no_image_is_an_error(tmp_path: Path, what: str) -> None:
    (tmp_path / "empty").mkdir()
    lay(tmp_path, "texts/notes.txt")
    with pytest.raises(FlawmaskError, match=r"--input .*: there is no such file, or no image"):
        found(tmp_path, tmp_path / what)


def test_the_error_names_a_file_that_is_no_image(tmp_path: Path) -> None:
    lay(tmp_path, "raw/photo.cr2")
    with pytest.raises(FlawmaskError, match=r"no image \(bmp, .*\) there; .*/photo\.cr2: none of the formats"):
        found(tmp_path, tmp_path / "raw")


@pytest.mark.parametrize("what", ["out", "out/overlays/a.png", "out/overlays"])
def test_an_input_in_the_folder_for_the_results_is_refused(tmp_path: Path, what: str) -> None:
    lay(tmp_path, "out/overlays/a.png", "b.png")
    with pytest.raises(FlawmaskError, match=r"lies in .*out, which is replaced: name another --output_dir"):
        found(tmp_path, tmp_path / "b.png", tmp_path / what)
