"""Who may ask: tokens, Host and Origin, TLS; and what the answers let a browser do."""

import re
import shutil
import ssl
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from flawmask.errors import FlawmaskError
from flawmask.serve.app import PAGES
from flawmask.serve.config import ServeConfig
from flawmask.serve.security import read_token
from flawmask.serve.server import serve
from serve.served import Served, config_of, image, save_model, serving

pytestmark = pytest.mark.usefixtures("small_network")

TOKEN = "0123456789abcdef"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, small_network: None) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "best.pt")


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[Served]:
    with serving(config_of(model)) as it:
        yield it


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:80", "[::1]:8000", "localhost:1234"])
def test_this_machines_names_are_served(served: Served, host: str) -> None:
    assert served.get("/v1/model", Host=host).status == 200
    assert served.get("/v1/model", Host=host, Origin=f"http://{host}").status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "flaw.example"},
        {"Host": "localhost.flaw.example:8000"},
        {"Host": "192.168.0.5"},
        {"Host": "a@b@localhost:x"},
        {"Host": ""},
        {"Host": "localhost", "Origin": "http://flaw.example"},
        {"Host": "localhost", "Origin": "http://localhost:3000"},
        {"Host": "localhost", "Origin": "null"},
    ],
)
def test_a_foreign_host_or_origin_is_refused(served: Served, headers: dict[str, str]) -> None:
    for path in ("/", "/v1/model", "/metrics", "/docs"):
        answer = served.get(path, **headers)
        assert (answer.status, answer.json["verdict"]) == (403, None)
    before = served.metric("flawmask_batch_images_count")
    assert served.predict(image(), **headers).status == 403
    assert served.metric("flawmask_batch_images_count") == before


def test_with_a_token_nothing_about_images_is_said_without_it(model: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    # The test listens on loopback; the settings are those of a server that others reach.
    with serving(config_of(model, host="0.0.0.0", token_file=tmp_path / "token")) as it:
        for wrong in (
            {},
            {"Authorization": TOKEN},
            {"Authorization": f"Bearer {TOKEN}0"},
            {"Authorization": "Bearer é"},
        ):
            for answer in (it.predict(image(), **wrong), it.get("/v1/model", **wrong), it.get("/metrics", **wrong)):
                assert (answer.status, answer.json["verdict"]) == (401, None)
                assert answer.headers["www-authenticate"] == "Bearer"
        right = {"Authorization": f"Bearer {TOKEN}", "Host": "flawmask.example", "Origin": "https://other.example"}
        assert it.predict(image(), **right).json["verdict"] == "defect"
        assert b"flawmask_verdicts_total" in it.get("/metrics", **right).body
        for path in ("/", "/page.js", "/docs", "/openapi.json", "/health/live", "/health/ready"):
            assert it.get(path).status == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.5", "::", "flawmask.example"])
def test_other_hosts_need_a_token(host: str) -> None:
    with pytest.raises(FlawmaskError, match="needs --token_file"):
        ServeConfig(model=("best.pt",), host=host)
    ServeConfig(model=("best.pt",), host=host, token_file=Path("token"))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1"])
def test_this_machine_needs_none(host: str) -> None:
    assert ServeConfig(model=("best.pt",), host=host).is_loopback


@pytest.mark.parametrize("content", ["", "short", "0123456789 abcdef", "0123456789äbcdef", "a" * 16 + "\nb" * 16])
def test_a_token_that_protects_nothing_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(content, encoding="utf-8")
    with pytest.raises(FlawmaskError, match="must hold one token of at least 16"):
        read_token(tmp_path / "token")
    with pytest.raises(FlawmaskError, match="cannot be read"):
        read_token(tmp_path / "none")


def test_every_answer_has_the_headers_and_no_page_has_a_script_or_a_style_inside(served: Served) -> None:
    paths = [*PAGES, "/openapi.json", "/v1/model", "/health/live", "/metrics", "/nothing", "/v1/predict"]
    for path in paths:
        answer = served.get(path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert "server" not in answer.headers
    for path, (_, _, kind) in PAGES.items():
        answer = served.get(path)
        assert answer.headers["content-type"].startswith(kind)
        if kind == "text/html":
            text = answer.body.decode()
            assert re.search(r"<script(?![^>]*\bsrc=)|<style|\bstyle=|\bon\w+=|https?://", text) is None


@pytest.mark.parametrize("path", ["/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/page/../answers.py", "/static/"])
def test_no_path_of_a_client_is_opened(served: Served, path: str) -> None:
    assert served.get(path).status == 404


def test_tls_serves_https(model: Path, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed: no certificate can be made")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    subprocess.run([*command.split(), "-keyout", key, "-out", cert], check=True, capture_output=True)
    context = ssl.create_default_context(cafile=str(cert))
    with (
        serving(config_of(model, tls_cert=cert, tls_key=key)) as it,
        urllib.request.urlopen(f"https://localhost:{it.port}/health/ready", context=context) as answer,
    ):
        assert answer.status == 200
    with pytest.raises(FlawmaskError, match="need each other"):
        config_of(model, tls_cert=cert)
    for wrong in (replace(it.server.config, tls_key=cert), replace(it.server.config, tls_cert=tmp_path / "none")):
        with pytest.raises(FlawmaskError, match="cannot be used"):
            serve(wrong)
