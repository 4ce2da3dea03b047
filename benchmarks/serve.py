"""Measures `flawmask serve` on this machine, and prints a section of docs/benchmarks.md.

    python benchmarks/serve.py                                      # about 10 minutes on two cores
    python benchmarks/serve.py --model run/best.pt --size 256 --images 8 --seconds 5 --rounds 1   # a trial

The server and the bare predictor are processes of their own, and take turns. Requests go over loopback, with images as
PNG files. The predictor reads the same files. Percentiles of the server are at 70 % of the rate that it can bear.
"""

import argparse
import http.client
import json
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from inference import sparing_network
from measuring import Record, demo_at, measured_here, table

from flawmask.data.demo_drawing import Defect, draw
from flawmask.images import write_png

QUEUE = 4
"""`--max_queue` where the rate is measured: always one image to take, whatever the clients do."""

SHORT_QUEUE = 2
"""`--max_queue` under too much load. All images in it must be answered within the two seconds in which the server is to
recover."""

PARTS = ("rate", "overload")

CLIENTS = 3
"""Clients that each send the next image when they have the answer. With fewer, the network would wait for them."""


@dataclass
class Answers:
    """What clients received: seconds by status. The status 0 is a connection that broke."""

    seconds: dict[int, list[float]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, status: int, seconds: float) -> None:
        """Count an answer."""
        with self.lock:
            self.seconds.setdefault(status, []).append(seconds)

    def count(self, status: int) -> int:
        """Return the number of answers with a status."""
        return len(self.seconds.get(status, []))

    def percentile(self, share: float) -> float:
        """Return the milliseconds within which this share of the answers with a verdict came."""
        return float(1000 * np.percentile(self.seconds[200], 100 * share))


class Server:
    """A server in a process of its own."""

    def __init__(self, model: Path, device: str, queue: int) -> None:
        """Start it with this `--max_queue`, and wait until it is ready."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        command = [sys.executable, "-c", "from flawmask.cli import main; main()", "serve", "--model", str(model)]
        command += ["--port", str(self.port), "--device", device, "--max_queue", str(queue)]
        self.process = subprocess.Popen(command)
        while self.ask("GET", "/health/ready")[0] != 200:
            if self.process.poll() is not None:
                raise SystemExit("the server did not start")
            time.sleep(0.1)

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Return the status and the body of an answer; the status 0 if the connection broke."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, body)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException):
            return 0, b""
        finally:
            connection.close()

    def predict(self, image: bytes, answers: Answers) -> int:
        """Send an image, count the answer, and return its status. An answer must have a verdict, or say why not."""
        begun = time.perf_counter()
        status, body = self.ask("POST", "/v1/predict", image)
        answers.add(status, time.perf_counter() - begun)
        if status:
            assert (json.loads(body)["verdict"] is None) == (status != 200), body
        return status

    def megabytes(self) -> float:
        """Return the memory that the process uses now."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 2**10


@contextmanager
def running(model: Path, device: str, queue: int) -> Iterator[Server]:
    """Yield a server, and end it."""
    server = Server(model, device, queue)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()


def main() -> None:
    """Print the section, or measure once when called by itself with `--measure`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint; by default a Mask R-CNN on ResNet-50, not trained")
    parser.add_argument("--size", type=int, default=512, help="height and width of the images, and of the network")
    parser.add_argument("--images", type=int, default=40, help="the number of images of a turn")
    parser.add_argument("--seconds", type=float, default=60, help="how long each load lasts")
    parser.add_argument("--rounds", type=int, default=3, help="number of turns; the median is shown")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if measured_here(options, {"predictor": measure_predictor}):
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, paths = made(folder, options)
        print("## Serving")
        if "rate" in options.parts:
            with running(model, options.device, QUEUE) as server:
                throughput(server, model, paths, options)
        if "overload" not in options.parts:
            return
        with running(model, options.device, SHORT_QUEUE) as server:
            overload(server, [path.read_bytes() for path in paths], options.seconds)
            drain(server, paths[0].read_bytes())


def made(folder: Path, options: argparse.Namespace) -> tuple[Path, list[Path]]:
    """Write a checkpoint, unless one is given, and images; return their paths."""
    paths = [folder / f"{number:03d}.png" for number in range(options.images)]
    for number, path in enumerate(paths):
        defect: Defect | None = "scratch" if number % 2 else None
        write_png(path, draw(np.random.default_rng(number), "washer", defect, options.size)[0])
    return options.model or sparing_network(folder, demo_at(folder, options.size), options.size), paths


def measure_predictor(model: str, paths: list[str], device: str) -> Record:
    """Return the images per second of the bare predictor, and its milliseconds an image, one at a time."""
    from flawmask.inference.predictor import Predictor

    predictor = Predictor(model, device)
    list(predictor.predict(paths[:3]))
    begun = time.perf_counter()
    count = sum(1 for _ in predictor.predict(paths))
    rate = count / (time.perf_counter() - begun)
    alone = []
    for path in paths:
        begun = time.perf_counter()
        predictor(path)
        alone.append(time.perf_counter() - begun)
    return {"rate": rate, "ms": [1000 * one for one in alone]}


def throughput(server: Server, model: Path, paths: Sequence[Path], options: argparse.Namespace) -> None:
    """Print the rate and the latency of the server, beside those of the predictor."""
    bodies = [path.read_bytes() for path in paths]
    rates: list[float] = []
    bare: list[Record] = []
    for _ in range(options.rounds):
        what = {"what": "predictor", "model": str(model), "paths": [str(path) for path in paths]}
        command = [sys.executable, sys.argv[0], "--measure", json.dumps({**what, "device": options.device})]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        bare.append(json.loads(done.stdout.splitlines()[-1]))
        rates.append(closed_loop(server, bodies))
    rate, plain = statistics.median(rates), statistics.median(one["rate"] for one in bare)
    answers = Answers()
    open_loop(server, bodies, 0.7 * rate, options.seconds, answers)
    alone = [ms for one in bare for ms in one["ms"]]
    rows = [
        ["bare predictor", f"{plain:.2f}", "100", *(f"{np.percentile(alone, share):.0f}" for share in (50, 99, 99.9))]
    ]
    served = [f"{answers.percentile(share):.0f}" for share in (0.5, 0.99, 0.999)]
    rows.append(["flawmask serve", f"{rate:.2f}", f"{100 * rate / plain:.0f}", *served])
    print(
        f"\n{options.model or 'Mask R-CNN on ResNet-50, not trained'}, {options.size} px, {options.device}; the median "
        f"of {options.rounds} turns of {len(paths)} images. Latency: of the predictor, one image at a time; of the "
        f"server, {answers.count(200)} images that came at 70 % of its rate.\n"
    )
    print(table(["", "images/s", "% of the predictor", "p50, ms", "p99, ms", "p99.9, ms"], rows))


def closed_loop(server: Server, bodies: Sequence[bytes]) -> float:
    """Return the images per second with `CLIENTS` that each wait for their answer."""
    answers = Answers()
    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(lambda body: server.predict(body, answers), bodies[:CLIENTS]))
        begun = time.perf_counter()
        statuses = list(pool.map(lambda body: server.predict(body, answers), bodies))
        seconds = time.perf_counter() - begun
    assert set(statuses) == {200}, statuses
    return len(bodies) / seconds


def open_loop(
    server: Server,
    bodies: Sequence[bytes],
    rate: float,
    seconds: float,
    answers: Answers,
    watch: Callable[[], None] = lambda: None,
) -> float:
    """Send images at a rate, answered or not. Return the seconds from the last one sent to the last answer."""
    waiting: list[Future[int]] = []
    with ThreadPoolExecutor(64) as pool:
        begun = time.perf_counter()
        for number in range(max(1, round(rate * seconds))):
            time.sleep(max(0.0, begun + number / rate - time.perf_counter()))
            waiting.append(pool.submit(server.predict, bodies[number % len(bodies)], answers))
            watch()
        over = time.perf_counter()
    assert all(one.done() for one in waiting)
    return time.perf_counter() - over


def overload(server: Server, bodies: Sequence[bytes], seconds: float) -> None:
    """Print what happens at ten times the rate that the server can bear."""
    quiet = Answers()
    for body in bodies[:6]:
        server.predict(body, quiet)
    usual = quiet.percentile(0.5) / 1000
    before, most = server.megabytes(), [0.0]

    def watch() -> None:
        most[0] = max(most[0], server.megabytes())

    answers = Answers()
    emptied = open_loop(server, bodies, 10 / usual, seconds, answers, watch)
    after = Answers()
    server.predict(bodies[0], after)
    rows = [
        ["images sent", f"{sum(len(one) for one in answers.seconds.values())}"],
        ["answered with a verdict", f"{answers.count(200)}"],
        ["told to come again (503)", f"{answers.count(503)}"],
        ["lost", f"{answers.count(0)}"],
        ["memory before, MB", f"{before:.0f}"],
        ["most memory, MB", f"{most[0]:.0f}"],
        ["seconds from the last image sent until the queue was empty", f"{emptied:.1f}"],
        ["the next answer, ms (before the load)", f"{after.percentile(0.5):.0f} ({quiet.percentile(0.5):.0f})"],
    ]
    print(f"\n### At ten times its rate\n\nFor {seconds:g} seconds, with `--max_queue {SHORT_QUEUE}`.\n")
    print(table(["", ""], rows))


def drain(server: Server, body: bytes) -> None:
    """Print whether accepted images are answered after SIGTERM."""
    answers = Answers()
    with ThreadPoolExecutor(SHORT_QUEUE) as pool:
        asked = [pool.submit(server.predict, body, answers) for _ in range(SHORT_QUEUE)]
        while f"flawmask_queue_images {SHORT_QUEUE}.0" not in server.ask("GET", "/metrics")[1].decode():
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        statuses = [one.result() for one in asked]
    server.process.wait()
    print(
        f"\nAfter SIGTERM, {statuses.count(200)} of {SHORT_QUEUE} accepted images were answered, and the server ended."
    )


if __name__ == "__main__":
    main()
