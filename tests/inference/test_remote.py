"""`predict --records` on addresses, with a real server on this machine."""

import functools
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from random_network import SPEC, network, patchwork

from flawmask import remote
from flawmask.errors import FlawmaskError
from flawmask.images import write_png
from flawmask.inference import records
from flawmask.inference.archive import predict_records
from flawmask.inference.config import PredictConfig
from flawmask.inference.inputs import find_images
from flawmask.model import checkpoint

pytestmark = pytest.mark.usefixtures("small_network")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a server that shows `tmp_path / "files"`, with images, a damaged one and a text."""
    folder = tmp_path / "files"
    for seed, name in enumerate(("b.png", "a.png", "deep/c.png")):
        write_png(folder / "archive" / name, patchwork(60, 50 + seed, seed))
    (folder / "archive" / "bad.png").write_bytes(b"\x89PNG")
    (folder / "archive" / "notes.txt").write_text("not an image")
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as running:
        thread = Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def rows(tmp_path: Path, text: str, **settings: Any) -> list[dict[str, Any]]:
    model = tmp_path / "best.pt"
    checkpoint.save(model, network(), SPEC)
    settings = {"output_dir": tmp_path / "rows", "records": "jsonl", "device": "cpu", **settings}
    done = predict_records(PredictConfig(model=model, input=(text,), **settings))
    return [row for part in sorted(done.output.glob("part-*")) for row in records.read_part(part)]


def test_a_folder_on_a_server_gives_the_rows_of_its_files(server: str, tmp_path: Path) -> None:
    there = rows(tmp_path, f"{server}/archive/")
    here = rows(tmp_path, str(tmp_path / "files" / "archive"), output_dir=tmp_path / "local")
    names = [row["file"] for row in there]
    assert names == [f"{server}/archive/{name}" for name in ("a.png", "b.png", "bad.png", "deep/c.png")]
    by_name = {Path(row["file"]).name: row for row in here}
    for row in there:
        own = {"file": "", "reason": ""}
        assert row | own == by_name[Path(row["file"]).name] | own
    (bad,) = [row for row in there if row["verdict"] is None]
    assert "bad.png cannot be read as an image" in bad["reason"]


def test_a_list_may_hold_addresses_and_paths(server: str, tmp_path: Path) -> None:
    local = tmp_path / "files" / "archive" / "a.png"
    gone = f"{server}/archive/gone.png"
    (tmp_path / "list.txt").write_text(f"{server}/archive/b.png\n{local}\n{gone}\n")
    found = rows(tmp_path, f"@{tmp_path / 'list.txt'}")
    assert [row["verdict"] is None for row in found] == [False, False, True]
    assert found[-1]["reason"].startswith(f"{gone} cannot be opened: ")


def test_the_files_of_a_folder_come_sorted_and_a_pattern_names_some() -> None:
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    names = [f"memory:///archive/{name}" for name in ("a.png", "b.png", "deep/c.png", "deep/er/d.png")]
    for name in reversed(names):
        system.pipe(name, b"")
    assert list(remote.find("memory:///archive")) == names
    assert list(remote.find("memory:///archive/deep/*.png")) == names[2:3]
    assert list(remote.find("memory:///archive/a.png")) == names[:1]
    system.rm("/archive", recursive=True)


def test_what_cannot_be_listed_is_refused_and_nothing_is_written(server: str, tmp_path: Path) -> None:
    for text, message in (
        ("unknown://bucket/a", "unknown://bucket/a cannot be read: Protocol not known: unknown"),
        (f"{server}/nothing/*.png", "cannot be listed|there is no image"),
    ):
        with pytest.raises(FlawmaskError, match=message):
            rows(tmp_path, text)
    assert not (tmp_path / "rows").exists()
    with pytest.raises(FlawmaskError, match="is an address: use --records"):
        find_images((f"{server}/archive/a.png",), tmp_path / "out")
