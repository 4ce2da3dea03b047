"""README and docs: links lead somewhere, commands and flags exist, prose has one width, words are the glossary's."""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from flawmask.cli import COMMANDS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
WRITTEN = [page for page in PAGES if page.name != "api.md"]  # that one is made from docstrings
WIDTH = 120


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


SCRIPTS = {
    "run_maskrcnn_pipeline.py": "run",
    "prepare_maskrcnn_dataset.py": "prepare",
    "augment_maskrcnn_dataset.py": "augment",
    "train_maskrcnn.py": "train",
    "inference_maskrcnn.py": "evaluate",
}

FOREIGN = {
    *("--multi_gpu", "--cpu", "--nproc_per_node"),  # launchers
    *("--start_method", "--help", "--require-hashes", "--download-offline-databases"),  # pytest, any program, pip, osv
    *("--device", "--tiny", "--parts"),  # benchmarks
}
"""Flags that are named without their command, and are no command's of Flawmask."""

INDEXES = tuple(".".join(parts) for parts in (("pypi", "org"), ("pythonhosted", "org"), ("anaconda", "org")))
INDEXES += ("/".join(("download.pytorch.org", "whl")),)
"""Hosts of package indexes, put together so that this file names none."""


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    plain = heading.replace("&lt;", "<").replace("&gt;", ">").strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", without_code(read(page)), flags=re.MULTILINE)
    return {slug(one) for one in headings} | set(re.findall(r'<a id="([^"]+)"', read(page)))


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", without_code(read(page))))


def broken(page: Path) -> list[str]:
    found = []
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", WRITTEN, ids=named)
def test_every_link_leads_to_a_page_and_a_heading_that_exist(page: Path) -> None:
    assert broken(page) == []


def test_a_link_to_nothing_is_seen(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# A `name` &lt;x&gt;, here\n", encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md#a-name-x-here) [b](other.md#b) [c](none.md) [d](#d)\n\n```\n# D\n```\n", encoding="utf-8"
    )
    assert broken(page) == ["other.md#b", "none.md", "#d"]


def test_the_index_lists_every_page_once() -> None:
    index = ROOT / "docs" / "README.md"
    listed = [(index.parent / link).resolve() for link in links(index)]
    for page in (ROOT / "docs").glob("*.md"):
        assert listed.count(page) == (page != index), page.name


@pytest.mark.parametrize("page", WRITTEN, ids=named)
def test_prose_has_one_width(page: Path) -> None:
    lines = without_code(read(page)).split("\n")
    assert [line for line in lines if len(line) > WIDTH and not line.startswith("|")] == []


def test_the_first_screen_of_the_readme_says_what_it_is_with_one_picture_and_one_command() -> None:
    screen = read(README).split("\n## ")[0]
    assert len(screen.split("\n")) <= 40
    assert "What goes in" in screen
    assert "What comes out" in screen
    assert screen.count("![") == 1
    assert re.findall(r"^make .*$", screen, flags=re.MULTILINE) == ["make demo"]


def flags_of(command: str) -> set[str]:
    """Return a command's flags, with underscores."""
    kind: Any = COMMANDS[command]
    renamed = {"source_format": "from"}
    return {f"--{renamed.get(field.name, field.name)}" for field in fields(kind)} | {"--root", "--help", "--verbose"}


def code_of(text: str) -> Iterator[str]:
    """Yield each command in a block of code, its lines joined, and each piece of code within prose."""
    for block in re.findall(r"^```\w*\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        yield from re.sub(r"\\?\n    +", " ", block).splitlines()
    for span in re.findall(r"`([^`]+)`", without_code(text)):
        yield re.sub(r"\s+", " ", span)


def calls_of(code: str) -> tuple[str | None, list[str]]:
    """Return the command of Flawmask in a piece of code, None where there is none, and its flags with underscores."""
    code = re.sub(r"\s# .*", "", code)
    names = "|".join(COMMANDS)
    scripts = "|".join(re.escape(name) for name in SCRIPTS)
    match = re.search(rf"(?:flawmask (?P<command>{names})|python (?P<script>{scripts}))(?P<rest>\s.*|)$", code)
    match = match or re.match(rf"(?P<command>{names})(?P<script>)(?P<rest> --.*)$", code)
    rest = match["rest"] if match else code
    flags = [one.replace("-", "_").replace("__", "--", 1) for one in re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", rest)]
    return (match["command"] or SCRIPTS[match["script"]]) if match else None, flags


def unknown_flags(text: str) -> list[str]:
    every = set().union(*(flags_of(command) for command in COMMANDS))
    found = []
    for code in code_of(text):
        command, flags = calls_of(code)
        if command is not None:
            found += [f"{command} {flag}" for flag in flags if flag not in flags_of(command)]
        elif code.startswith("--"):
            foreign = {one.replace("-", "_").replace("__", "--", 1) for one in FOREIGN}
            found += [flag for flag in flags if flag not in every | foreign]
    return found


@pytest.mark.parametrize("page", [page for page in WRITTEN if page.name != "CHANGELOG.md"], ids=named)
def test_every_flag_in_a_command_exists(page: Path) -> None:
    assert unknown_flags(read(page)) == []


def test_a_flag_that_does_not_exist_is_seen() -> None:
    text = "`--no_such` `--conf auto` `predict --conf auto --folds 3`\n\n"
    text += "```\nflawmask run --folds 3 \\\n    --nothing\n```\n"
    assert unknown_flags(text) == ["run --nothing", "--no_such", "predict --folds"]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_target_of_make_exists(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), flags=re.MULTILINE)
    wanted = [name for code in code_of(read(page)) for name in re.findall(r"^make ([a-z-]+)", code)]
    assert [name for name in wanted if name not in targets] == []


@pytest.mark.parametrize("page", WRITTEN, ids=named)
def test_every_test_and_file_of_the_repository_that_is_named_exists(page: Path) -> None:
    text = re.sub(r"\s+", " ", read(page))
    for name in re.findall(r"`((?:tests|benchmarks|docs|examples|src)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`((?:model|training|evaluation|inference|data)/\w+\.py)`", text):
        assert (ROOT / "src" / "flawmask" / name).is_file(), name


def test_every_choice_of_tests_in_the_docs_chooses_some() -> None:
    rows = re.findall(
        r"`([^`]*pytest [^`]*|\.\.\. -k [^`]*)` \|$", read(ROOT / "docs" / "reliability.md"), re.MULTILINE
    )
    assert len(rows) > 20
    files: list[Path] = []
    for row in rows:
        files = [ROOT / name for name in re.findall(r"tests/[\w/]+\.py", row)] or files
        names = [name for file in files for name in re.findall(r"^def (test_\w+)", read(file), flags=re.MULTILINE)]
        assert names, row
        chosen = re.search(r'-k (?:"([^"]*)"|(\w+))', row)
        for word in re.findall(r"\b(?!and\b|or\b)\w+", (chosen[1] or chosen[2]) if chosen else ""):
            parameters = "".join(read(file) for file in files)
            assert any(word in name for name in names) or f'"{word}' in parameters, f"{row}: {word}"


def test_only_the_readme_names_the_host_of_a_package_index_and_only_pytorchs_for_cpus() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split(
        "\n"
    )
    files = [ROOT / name for name in listed if name] or [*PAGES, *(ROOT / "src").rglob("*.py"), *ROOT.glob("*.lock")]
    found = []
    for path in files:
        if path.suffix in (".png", ".jpg") or not path.is_file():
            continue
        for line in read(path).splitlines():
            found += [(path.name, line) for host in INDEXES if host in line]
    assert found == [("README.md", f"pip install torch torchvision --index-url https://{INDEXES[-1]}/cpu")]


def test_the_glossary_has_ten_words_and_the_docs_follow_it() -> None:
    section = read(ROOT / "CONTRIBUTING.md").split("## Words")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| [^|]+ \|$", section, flags=re.MULTILINE)
    words = ["evaluate", "prediction", "mask", "baseline", "threshold", "region proposal", "micro-batch", "all-reduce"]
    assert rows == ["word", "---", *words, "shard", "group"]
    for page in WRITTEN:
        prose = re.sub(r"`[^`]*`", "", without_code(read(page).replace(section, "")))
        assert re.findall(r"\b(?:judg\w*|yardstick\w*)", prose, flags=re.IGNORECASE) == [], page.name
