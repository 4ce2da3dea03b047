"""The exit statuses: the table in docs/formats.md has all of them, and commands end with them."""

import re
import signal
import sys
from pathlib import Path

import pytest
from random_network import SPEC, network, patchwork

from flawmask import cli
from flawmask.images import write_png
from flawmask.model import checkpoint

pytestmark = pytest.mark.usefixtures("small_network")

DOCS = Path(__file__).parents[1] / "docs" / "formats.md"


def table() -> dict[int, str]:
    section = DOCS.read_text(encoding="utf-8").split("## Exit statuses")[1].split("\n## ")[0]
    return {int(number): when for number, when in re.findall(r"^\| (\d+) \| (.*) \|$", section, flags=re.MULTILINE)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a checkpoint, and two images among which one cannot be read."""
    monkeypatch.chdir(tmp_path)
    checkpoint.save(tmp_path / "best.pt", network(), SPEC)
    write_png(tmp_path / "parts/a.png", patchwork(60, 80))
    write_png(tmp_path / "more/a.png", patchwork(60, 80))
    (tmp_path / "more/photo.cr2").write_bytes(b"II*\0raw")
    write_png(tmp_path / "damaged/a.png", patchwork(60, 80))
    (tmp_path / "damaged/b.png").write_bytes(b"no image")
    return tmp_path


def ended(monkeypatch: pytest.MonkeyPatch, command: str) -> int:
    monkeypatch.setattr(sys, "argv", ["flawmask", *command.split()])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_the_table_has_every_status() -> None:
    own = {cli.OK, cli.DEFECT_FOUND, cli.FAILED, cli.UNUSED, cli.INTERRUPTED, cli.BROKEN_PIPE}
    assert set(table()) == own | {128 + signal.SIGTERM}
    assert cli.INTERRUPTED == 128 + signal.SIGINT


PREDICT = "predict --model best.pt --device cpu --conf 0.05 --input "


@pytest.mark.parametrize(
    ("status", "command"),
    [
        (0, "--version"),
        (0, PREDICT + "parts --strict"),
        (0, PREDICT + "more"),
        (1, PREDICT + "more --fail_on_defect"),
        (2, PREDICT + "nowhere"),
        (2, PREDICT + "parts --no_such_flag"),
        (2, PREDICT + "damaged --fail_on_defect"),
        (3, PREDICT + "more --strict"),
        (3, PREDICT + "more --strict --fail_on_defect"),
        (3, PREDICT + "damaged --strict"),
    ],
)
def test_a_command_ends_with_the_status_of_the_table(
    folder: Path, monkeypatch: pytest.MonkeyPatch, status: int, command: str
) -> None:
    assert status in table()
    assert ended(monkeypatch, command) == status
    is_written = PREDICT in command and (status < 2 or "damaged" in command) and "--strict" not in command
    assert (folder / "predictions").exists() == (is_written or "parts --strict" in command)


def test_an_interrupt_ends_with_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_dispatch", interrupted)
    assert ended(monkeypatch, "doctor --category none") == 130
