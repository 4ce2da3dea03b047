"""The server as a process: signals, overload, and a machine that takes parts of it away."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from random_network import patchwork

from flawmask.files import sha256_of
from flawmask.images import encode_png
from serve.served import PATIENCE, image, save_model, until

pytestmark = [pytest.mark.services, pytest.mark.usefixtures("small_network")]

LARGE = encode_png(patchwork(1500, 1500, 1))
"""It takes long enough to decode that several are in the server at a time."""


class Process:
    """A server in a process of its own, on a free port."""

    def __init__(self, model: Path, *flags: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        command = [sys.executable, str(Path(__file__).parents[1] / "quick_flawmask.py"), "serve", "--model", str(model)]
        command += ["--device", "cpu", "--precision", "fp32", "--port", str(self.port), *flags]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        until(lambda: self.process.poll() is not None or self.status("/health/ready") == 200)

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes, str | None]:
        """Return the status, the body, and Retry-After; status 0 if there is no answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request(method, path, body)
            answer = connection.getresponse()
            return answer.status, answer.read(), answer.getheader("Retry-After")
        except (OSError, http.client.HTTPException):
            return 0, b"", None
        finally:
            connection.close()

    def status(self, path: str) -> int:
        return self.ask("GET", path)[0]

    def queue(self) -> float:
        lines = self.ask("GET", "/metrics")[1].decode().splitlines()
        return next((float(line.split()[1]) for line in lines if line.startswith("flawmask_queue_images ")), 0.0)

    def memory(self) -> float:
        """The megabytes that the process uses now."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1000


@contextmanager
def started(model: Path, *flags: str) -> Iterator[Process]:
    it = Process(model, *flags)
    try:
        yield it
    finally:
        it.process.kill()
        it.process.communicate()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, small_network: None) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "best.pt")


@pytest.mark.parametrize("to_group", [False, True])
def test_sigterm_answers_what_was_accepted(model: Path, to_group: bool) -> None:
    with started(model) as it, ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(it.ask, "POST", "/v1/predict", LARGE) for _ in range(12)]
        until(lambda: it.queue() >= 8)
        kill = os.killpg if to_group else os.kill  # schedulers tell the whole group
        kill(it.process.pid, signal.SIGTERM)
        answers = [one.result() for one in asked]
        assert it.process.wait(PATIENCE) == -signal.SIGTERM
    answered = [json.loads(body)["verdict"] for status, body, _ in answers if status == 200]
    assert len(answered) >= 8
    assert set(answered) == {"defect"} or set(answered) == {"good"}
    assert {status for status, _, _ in answers} <= {200, 0}  # 0: not accepted any more


def test_ctrl_c_ends_it_with_130(model: Path) -> None:
    with started(model) as it:
        os.killpg(it.process.pid, signal.SIGINT)
        _, printed = it.process.communicate(timeout=PATIENCE)
        assert it.process.returncode == 130
        assert "Traceback" not in printed


def test_sighup_loads_the_model_again(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "best.pt"
    copy.write_bytes(model.read_bytes())
    with started(copy) as it:
        before = json.loads(it.ask("GET", "/v1/model")[1])["loaded_at"]
        time.sleep(1)  # the time is said in whole seconds
        it.process.send_signal(signal.SIGHUP)
        until(lambda: json.loads(it.ask("GET", "/v1/model")[1])["loaded_at"] != before)
        assert json.loads(it.ask("GET", "/v1/model")[1])["sha256"] == sha256_of(copy)


def test_killed_it_leaves_no_process_behind(model: Path) -> None:
    with started(model, "--decoders", "2") as it:
        children = Path(f"/proc/{it.process.pid}/task/{it.process.pid}/children").read_text().split()
        assert len(children) >= 2
        it.process.kill()
        it.process.wait()
        until(lambda: not any(Path(f"/proc/{child}/exe").exists() for child in children))


def test_at_many_times_its_rate_nothing_accepted_is_lost_and_memory_stays(model: Path) -> None:
    with started(model, "--max_queue", "8") as it:
        for _ in range(20):
            assert it.ask("POST", "/v1/predict", LARGE)[0] == 200
        before = it.memory()
        with ThreadPoolExecutor(40) as pool:
            answers = list(pool.map(lambda _: it.ask("POST", "/v1/predict", LARGE), range(400)))
        statuses = [status for status, _, _ in answers]
        assert set(statuses) == {200, 503}
        assert statuses.count(503) > statuses.count(200) / 2
        for status, body, retry in answers:
            verdict = json.loads(body)["verdict"]
            assert (verdict is None, retry is not None) == (status == 503, status == 503)
        assert it.memory() < before + 150  # megabytes; 40 such images are 270 MB, and 400 are 2,700
        until(lambda: it.ask("POST", "/v1/predict", image())[0] == 200)
        assert it.queue() == 0


def test_a_bad_start_is_one_line_and_status_2(tmp_path: Path) -> None:
    (tmp_path / "best.pt").write_bytes(b"nothing")
    with started(tmp_path / "best.pt") as it:
        _, printed = it.process.communicate(timeout=PATIENCE)
        assert it.process.returncode == 2
        assert "Traceback" not in printed
        assert printed.startswith("error: ")
        assert "best.pt" in printed
