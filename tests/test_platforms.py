"""What can be checked of Windows and macOS without them; docs/platforms.md says what cannot."""

import ast
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import flawmask

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "flawmask"

LINUX_ONLY = {"launch.py", "runtime.py", "training/fit.py"}
"""Modules that read files of Linux's proc and control groups, which are ASCII or of no known encoding."""

NO_FILES = {"Image", "PIL.Image", "os", "tarfile"}
"""What has an `open` that opens no text file."""

MISSING_ON_WINDOWS = {os: ("fork", "geteuid", "getuid", "sched_getaffinity", "setsid"), signal: ("SIGKILL",)}


def text_calls(code: str) -> Iterator[tuple[str, ast.Call]]:
    """Yield the calls that read or write a file as text, each with `read` or `write`."""
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in ("read_text", "write_text"):
            yield name.removesuffix("_text"), node
        elif name == "open":
            is_method = isinstance(node.func, ast.Attribute)
            if isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) in NO_FILES:
                continue
            modes = [*node.args[0 if is_method else 1 :], *(one.value for one in node.keywords if one.arg == "mode")]
            mode = ast.literal_eval(modes[0]) if modes and isinstance(modes[0], ast.Constant) else "r"
            if modes and not isinstance(modes[0], ast.Constant):
                mode = ast.unparse(modes[0])
            if "b" not in mode and "devnull" not in ast.unparse(node.func):
                yield "read" if mode == "r" else "write", node


def unnamed(code: str) -> list[str]:
    """Return the calls that leave the encoding, or the line ends of what they write, to the system."""
    found = []
    for kind, call in text_calls(code):
        named = {one.arg for one in call.keywords}
        if "encoding" not in named or (kind == "write" and "newline" not in named):
            found.append(ast.unparse(call))
    return found


def test_every_text_file_is_read_and_written_in_a_named_encoding_with_named_line_ends() -> None:
    assert unnamed("a.open(); open(a, 'w', encoding='utf-8'); a.read_text(); a.open('rb'); Image.open(a)") == [
        "a.open()",
        "open(a, 'w', encoding='utf-8')",
        "a.read_text()",
    ]
    bad = {
        path.relative_to(SOURCE).as_posix(): calls
        for path in sorted(SOURCE.rglob("*.py"))
        if (calls := unnamed(path.read_text(encoding="utf-8")))
    }
    assert set(bad) == LINUX_ONLY, bad


def is_refused_by_windows(name: str) -> bool:
    """Return whether Windows takes a file or folder of this name for something else, or not at all
    (https://learn.microsoft.com/windows/win32/fileio/naming-a-file)."""
    is_device = re.fullmatch(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", name, flags=re.IGNORECASE)
    return bool(is_device or re.search(r'[<>:"/\\|?*\x00-\x1f]', name)) or name.endswith((" ", "."))


@pytest.mark.parametrize("name", ["12:30.json", "a?.png", "NUL", "aux.json", "a.", "a "])
def test_names_that_windows_refuses_are_known(name: str) -> None:
    assert is_refused_by_windows(name)
    assert not is_refused_by_windows("001_missed_crack_004.png")


@pytest.fixture
def as_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away the functions that Windows does not have."""
    for module, names in MISSING_ON_WINDOWS.items():
        for name in names:
            monkeypatch.delattr(module, name, raising=False)
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setenv("USER", "somebody")


@pytest.fixture
def renamed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, list[str]]]:
    """What was renamed, and which files in it this process had open or mapped into memory: Windows renames no such
    file, and no folder that holds one."""
    seen: list[tuple[Path, list[str]]] = []

    def watched(rename: Callable[[Path, Any], Path]) -> Callable[[Path, Any], Path]:
        def watching(source: Path, target: Any) -> Path:
            seen.append((source, [one for one in in_use() if Path(one).is_relative_to(source.absolute())]))
            return rename(source, target)

        return watching

    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, watched(getattr(Path, name)))
    return seen


def in_use() -> list[str]:
    """Return the files that this process has open, and those that it has mapped into memory."""
    handles = []
    for one in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # closed since
            handles.append(str(one.readlink()))
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    return [*handles, *(line.split(maxsplit=5)[5] for line in maps if line.count(" ") > 4 and "/" in line)]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system does not list open files")
def test_an_open_file_is_seen_when_it_is_renamed(tmp_path: Path, renamed: list[tuple[Path, list[str]]]) -> None:
    with (tmp_path / "a").open("wb"):
        (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "b").rename(tmp_path / "c")
    assert [used for _, used in renamed] == [[str(tmp_path / "a")], []]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system does not list open files")
@pytest.mark.usefixtures("small_network", "as_on_windows")
def test_a_whole_run_needs_no_function_that_windows_lacks_and_names_and_renames_files_as_it_allows(
    tiny_category: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    renamed: list[tuple[Path, list[str]]],
) -> None:
    monkeypatch.chdir(tmp_path)
    root = tiny_category(good=6, crack=6).parent
    small: dict[str, Any] = {"arch": "maskrcnn_resnet18_fpn", "weights": "none", "image_size": 64, "epochs": 2}
    small |= {"device": "cpu", "workers": 0, "proposals": 30, "roi_samples": 16}
    flawmask.run(category="part", mvtec_root=root, **small)
    (model,) = Path("model_maskrcnn").glob("*/best.pt")
    images = root / "part" / "test" / "good"
    flawmask.predict(model=model, input=(str(images),), conf=0.1, device="cpu", save_masks=True)
    written = [path for path in tmp_path.rglob("*") if root not in path.parents and path != root]
    assert len(written) > 40
    assert [str(path) for path in written if is_refused_by_windows(path.name)] == []
    assert len(renamed) > 20
    assert [(path, used) for path, used in renamed if used] == []


def test_no_text_file_of_the_repository_has_carriage_returns_and_git_adds_none() -> None:
    assert "* text=auto eol=lf" in (ROOT / ".gitattributes").read_text(encoding="utf-8").splitlines()
    kinds = {".py", ".md", ".toml", ".lock", ".html", ".css", ".js", ""}
    folders = [ROOT / name for name in ("src", "tests", "docs", "examples", "benchmarks", ".ci")]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in kinds and path.is_file()]
    files += [path for path in ROOT.iterdir() if path.suffix in kinds and path.is_file()]
    assert len(files) > 200
    assert [str(path) for path in files if b"\r" in path.read_bytes()] == []
