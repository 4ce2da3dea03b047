"""What docs/serve.md says runs: the line with curl, the client, and what the container is made of."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from flawmask.serve.config import ServeConfig
from serve.served import DEFECT, GOOD, Served, config_of, image, save_model, serving

pytestmark = [pytest.mark.services, pytest.mark.usefixtures("small_network")]

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    (tmp_path / "part.png").write_bytes(image(DEFECT))
    (tmp_path / "good.png").write_bytes(image(GOOD))
    (tmp_path / "note.png").write_bytes(b"no image")
    with serving(config_of(save_model(tmp_path / "run" / "best.pt"))) as it:
        yield it


def test_the_line_with_curl_gives_a_verdict(served: Served, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    (line,) = re.findall(r"^curl .*$", PAGE, flags=re.MULTILINE)
    command = shlex.split(line.replace(":8000", f":{served.port}"))
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    assert json.loads(done.stdout)["verdict"] == "defect"


def test_the_client_prints_verdicts_and_never_good_without_one(served: Served, tmp_path: Path) -> None:
    (client,) = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert len([line for line in client.splitlines() if line]) <= 20
    (tmp_path / "client.py").write_text(client.replace(":8000", f":{served.port}"))

    def printed() -> list[str]:
        command = [sys.executable, "client.py", "part.png", "good.png", "note.png", "none.png"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.splitlines()

    lines = printed()
    assert [line.split()[:2] for line in lines[:2]] == [["part.png", "defect"], ["good.png", "good"]]
    assert lines[2].startswith("note.png None image cannot be read")
    assert lines[3].startswith("none.png None no answer")
    (tmp_path / "client.py").write_text(client.replace(":8000", ":1"))  # nobody listens there
    assert all(" None no answer: " in line for line in printed())


def test_the_container_is_made_of_what_there_is(tmp_path: Path) -> None:
    steps = re.sub(r"\\\n", "", (ROOT / "Dockerfile").read_text())
    for sources in re.findall(r"^COPY (?!--from)(.*) \S+$", steps, flags=re.MULTILINE):
        assert all((ROOT / name).exists() for name in sources.split())
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert allowed == set(" ".join(re.findall(r"^COPY (?!--from)(.*) \S+$", steps, flags=re.MULTILINE)).split())
    (user,) = re.findall(r"^USER (\d+)$", steps, flags=re.MULTILINE)
    assert int(user) > 0
    entry, command = (
        json.loads(*re.findall(rf"^{name} (\[.*)$", steps, flags=re.MULTILINE)) for name in ("ENTRYPOINT", "CMD")
    )
    known = {f"--{one.name}" for one in fields(ServeConfig)}
    assert {part for part in (*entry, *command) if part.startswith("--")} <= known
    (make,) = re.findall(r"^RUN (sed .*)$", steps, flags=re.MULTILINE)
    (tmp_path / "requirements-dev.lock").write_bytes((ROOT / "requirements-dev.lock").read_bytes())
    subprocess.run(["sh", "-c", make], cwd=tmp_path, check=True)
    pinned = [Requirement(line).name for line in (tmp_path / "constraints.txt").read_text().splitlines()]
    assert {"torch", "fastapi", "uvicorn", "prometheus-client"} <= set(pinned)


def test_compose_joins_the_server_and_prometheus() -> None:
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    server, prometheus = compose["services"]["flawmask"], compose["services"]["prometheus"]
    assert server["read_only"]
    assert server["cap_drop"] == ["ALL"]
    assert set(server["secrets"]) | set(prometheus["secrets"]) == set(compose["secrets"])
    (scrape,) = yaml.safe_load(compose["configs"]["prometheus"]["content"])["scrape_configs"]
    assert scrape["static_configs"] == [{"targets": ["flawmask:8000"]}]
    assert scrape["authorization"] == {"credentials_file": "/run/secrets/token"}
