"""Download MVTec AD from servers that break off, stall, send another file, or send an archive with unsafe paths."""

import io
import ssl
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from files_read_back import names

from flawmask.data import download as module
from flawmask.data.download import CATEGORIES, SHA256, DownloadConfig, download
from flawmask.errors import FlawmaskError
from flawmask.files import sha256

NOISE = np.random.default_rng(0).bytes(300_000)


def archive_of(members: dict[str, bytes], **links: str) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, leads_to in links.items():
            member = tarfile.TarInfo(name.replace("__", "/"))
            member.type, member.linkname = tarfile.SYMTYPE, leads_to
            archive.addfile(member)
    return data.getvalue()


GOOD = archive_of({"bottle/test/good/0.png": NOISE, "bottle/license.txt": b"CC", "cable/test/good/0.png": b"cable"})


class Served:
    """The data that a server sends, and the requests that it received."""

    def __init__(self, data: bytes, **how: Any) -> None:
        self.data, self.how = data, how
        self.asked: list[str | None] = []


@contextmanager
def serving(served: Served) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            given = self.headers.get("Range")
            served.asked.append(given)
            attempt = len(served.asked)
            if "status" in served.how:
                self.send_error(served.how["status"])
                return
            start = int(given.split("=")[1].rstrip("-")) if given and not served.how.get("no_ranges") else 0
            if start >= len(served.data):
                self.send_error(416)
                return
            rest = served.data[start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(rest)))
            self.end_headers()
            most = served.how.get("breaks_after")
            if most is not None and attempt <= served.how.get("times", 1):
                self.wfile.write(rest[:most])
                return
            if served.how.get("stalls") and attempt == 1:
                self.wfile.write(rest[:1000])
                self.wfile.flush()
                time.sleep(1.5)
                return
            self.wfile.write(rest)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/mvtec.tar.xz"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(module, "PATIENCE", 0.5)


def config(root: Path, url: str, data: bytes = GOOD, **changes: Any) -> DownloadConfig:
    given: dict[str, Any] = {"category": "bottle", "mvtec_root": root, "url": url, "sha256": sha256(data)}
    return DownloadConfig(**given | changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


BOTTLE = {"license.txt": b"CC", "test/good/0.png": NOISE}


def test_one_category_is_unpacked_and_the_archive_kept_for_the_next(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    served = Served(GOOD)
    with serving(served) as url, caplog.at_level("INFO"):
        assert download(config(tmp_path, url)) == tmp_path / "bottle"
        assert contents(tmp_path / "bottle") == BOTTLE
        assert names(tmp_path) == ["bottle", "mvtec.tar.xz"]
        assert caplog.messages[0].startswith("MVTec AD (Bergmann")
        assert "CC BY-NC-SA 4.0" in caplog.messages[0]
        download(config(tmp_path, url, category="cable"))
    assert contents(tmp_path / "cable") == {"test/good/0.png": b"cable"}
    assert served.asked == [None], "it was fetched twice"


@pytest.mark.parametrize("how", [{"breaks_after": 1000}, {"breaks_after": 70_000, "times": 3}, {"stalls": True}])
def test_a_transfer_that_breaks_off_or_stalls_is_continued(tmp_path: Path, how: dict[str, Any]) -> None:
    served = Served(GOOD, **how)
    with serving(served) as url:
        download(config(tmp_path, url))
    assert contents(tmp_path / "bottle") == BOTTLE
    assert len(served.asked) == how.get("times", 1) + 1
    assert all(one is not None and one.startswith("bytes=") for one in served.asked[1:])


def test_a_server_that_cannot_continue_sends_the_whole_file_again(tmp_path: Path) -> None:
    with serving(Served(GOOD, breaks_after=1000, no_ranges=True)) as url:
        download(config(tmp_path, url))
    assert contents(tmp_path / "bottle") == BOTTLE


def test_the_partial_file_of_an_earlier_call_is_continued(tmp_path: Path) -> None:
    (tmp_path / "mvtec.tar.xz.partial").write_bytes(GOOD[:5000])
    served = Served(GOOD)
    with serving(served) as url:
        download(config(tmp_path, url))
    assert served.asked == ["bytes=5000-"]
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "mvtec.tar.xz.partial").write_bytes(GOOD)
    with serving(served) as url:
        download(config(tmp_path / "whole", url))
    assert contents(tmp_path / "whole" / "bottle") == BOTTLE


def refused(says: str, given: DownloadConfig) -> None:
    with pytest.raises(FlawmaskError, match=says) as caught:
        download(given)
    assert "\n" not in str(caught.value)
    assert not (given.mvtec_root / given.category).exists()
    assert not [name for name in names(given.mvtec_root) if name.startswith(".")]


def test_a_server_that_sends_nothing_is_given_up(tmp_path: Path) -> None:
    served = Served(GOOD, breaks_after=0, times=100)
    with serving(served) as url:
        refused(
            r"mvtec.tar.xz cannot be fetched \(.*\): try again later, or name a mirror with --url",
            config(tmp_path, url),
        )
    assert len(served.asked) == module.ATTEMPTS
    with serving(Served(GOOD, status=404)) as url:
        refused(r"cannot be fetched \(HTTP 404 Not Found\)", config(tmp_path, url))
    with serving(Served(GOOD, status=503)) as url:
        refused(r"cannot be fetched \(HTTP 503 ", config(tmp_path, url))
    refused("cannot be fetched", config(tmp_path, "http://127.0.0.1:9/mvtec.tar.xz"))


def test_a_file_with_another_checksum_is_deleted(tmp_path: Path) -> None:
    with serving(Served(GOOD[:-1] + b"!")) as url:
        refused(
            r"is another file than wanted \(SHA-256 [0-9a-f]{64}, not [0-9a-f]{64}\): it was deleted",
            config(tmp_path, url),
        )
    assert names(tmp_path) == []
    (tmp_path / "mvtec.tar.xz").write_bytes(b"mine")
    refused(r"is another file than --sha256 says: delete it", config(tmp_path, "http://127.0.0.1:9/mvtec.tar.xz"))
    assert (tmp_path / "mvtec.tar.xz").read_bytes() == b"mine"


@pytest.mark.parametrize(
    "data",
    [
        archive_of({"bottle/a": b"a", "bottle/../../escaped": b"x"}),
        archive_of({"bottle/a": b"a", "bottle//tmp/escaped": b"x", "bottle/../../../tmp/escaped": b"x"}),
        archive_of({"bottle/a": b"a"}, bottle__link="../../escaped"),
        archive_of({"bottle/a": b"a"}, bottle__link="/etc/passwd"),
        archive_of({"bottle/a": b"a"}, bottle__link="a"),
    ],
)
def test_an_archive_with_paths_outside_its_folder_is_refused(tmp_path: Path, data: bytes) -> None:
    root = tmp_path / "deep" / "root"
    with serving(Served(data)) as url:
        refused("cannot be unpacked", config(root, url, data))
    assert names(tmp_path) == ["deep"]
    assert names(root) == ["mvtec.tar.xz"]


def test_a_damaged_archive_or_one_without_the_category_is_refused(tmp_path: Path) -> None:
    for data, says in ((b"no archive at all", "cannot be unpacked"), (GOOD, "holds no zipper")):
        with serving(Served(data)) as url:
            refused(says, config(tmp_path / sha256(data)[:4], url, data, category="zipper"))


def test_an_existing_category_is_replaced_only_on_request(tmp_path: Path) -> None:
    (tmp_path / "bottle" / "test").mkdir(parents=True)
    (tmp_path / "bottle" / "mine").touch()
    with serving(Served(GOOD)) as url:
        with pytest.raises(FlawmaskError, match=r"bottle is there already: replace it with --overwrite"):
            download(config(tmp_path, url))
        with pytest.raises(FlawmaskError, match=r"bottle holds something else \(mine\): move it away"):
            download(config(tmp_path, url, overwrite=True))
        assert names(tmp_path / "bottle") == ["mine", "test"]
        (tmp_path / "bottle" / "mine").unlink()
        download(config(tmp_path, url, overwrite=True))
        assert contents(tmp_path / "bottle") == BOTTLE
        (tmp_path / "cable").touch()
        with pytest.raises(FlawmaskError, match=r"cable is a file: move it away"):
            download(config(tmp_path, url, category="cable", overwrite=True))


def test_a_lost_connection_is_resumed_whatever_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, lost = HTTPResponse.read1, [OSError(113, "No route to host"), ssl.SSLError("bad record"), TimeoutError()]

    def losing(self: HTTPResponse, count: int = -1) -> bytes:
        if lost:
            raise lost.pop()
        return read(self, count)

    monkeypatch.setattr(HTTPResponse, "read1", losing)
    with serving(Served(GOOD)) as url:
        download(config(tmp_path, url))
    assert contents(tmp_path / "bottle") == BOTTLE


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"category": "bottles", "sha256": SHA256}, f"--category bottles: MVTec AD has {', '.join(CATEGORIES)}"),
        ({"category": "../x"}, "--category '../x' is not the name of a folder"),
        ({"category": ""}, "--category '' is not the name of a folder"),
        ({"url": "file:///etc/passwd"}, "--url file:///etc/passwd: it must start with https"),
        *(
            ({"url": url}, "this is not the address of a file")
            for url in ("http://[::1/a.tar", "http://host/", "http://host/ä.tar.xz", "http://host:x/a.tar", "http:///a")
        ),
        ({"sha256": "abc"}, "--sha256 'abc': it must be 64 hexadecimal digits"),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(FlawmaskError, match=says):
        config(tmp_path, **{"url": "http://127.0.0.1:9/a.tar.xz"} | changes)
