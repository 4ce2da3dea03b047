"""schemathesis makes requests from the server's own specification, and finds nothing that differs from it."""

import subprocess
import sys
from pathlib import Path

import pytest

from serve.served import config_of, save_model, serving

pytestmark = [pytest.mark.services, pytest.mark.usefixtures("small_network")]

CONFIG = """
[checks.not_a_server_error]
# They are no failures: the queue is full, and a deadline of a fraction of a millisecond is always missed.
expected-statuses = ["2xx", "4xx", 503, 504]
[checks.positive_data_acceptance]
# No schema can say that bytes must be an image (415), or that an unknown model has no name (404).
expected-statuses = ["2xx", 401, 404, 406, 415, 503, 504]
"""


@pytest.mark.parametrize("has_token", [False, True])
def test_the_server_keeps_to_its_specification(tmp_path: Path, has_token: bool) -> None:
    pytest.importorskip("schemathesis", reason="schemathesis is not installed: pip install flawmask[dev]")
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    (tmp_path / "token").write_text("0123456789abcdef")
    settings = {"token_file": tmp_path / "token"} if has_token else {}
    with serving(config_of(save_model(tmp_path / "best.pt"), **settings)) as it:
        command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(tmp_path / "schemathesis.toml")]
        command += ["run", f"http://127.0.0.1:{it.port}/openapi.json", "--checks", "all", "--max-examples", "30"]
        command += ["--no-color", "--seed", "1"]
        command += ["--header", "Authorization: Bearer 0123456789abcdef"] if has_token else []
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout
        assert "5 selected / 5 total" in done.stdout
        assert it.get("/health/live").status == 200
