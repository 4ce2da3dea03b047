"""The queue, deadlines, and clients that are slow, broken or gone: each gets an answer without a verdict, or none."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from flawmask.images import UPPER_BITS
from flawmask.serve.app import PATIENCE
from flawmask.serve.parts import Server
from flawmask.serve.server import make_runner
from serve import deadly
from serve.served import Served, config_of, image, save_model, serving, until

pytestmark = pytest.mark.usefixtures("small_network")

PLACES = 4


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, small_network: None) -> Iterator[Served]:
    model = save_model(tmp_path_factory.mktemp("model") / "best.pt")
    with serving(config_of(model, max_queue=PLACES, send_timeout=0.5)) as it:
        yield it


@pytest.fixture(autouse=True)
def _nothing_stays(served: Served) -> Iterator[None]:
    """After each test, all places are free, and the server gives verdicts."""
    yield
    until(lambda: served.metric("flawmask_queue_images") == 0)
    assert served.predict(image()).json["verdict"] == "defect"
    assert served.get("/health/live").status == served.get("/health/ready").status == 200


def test_beyond_the_queue_the_answer_is_to_come_again(served: Served) -> None:
    with ThreadPoolExecutor(PLACES) as pool:
        with served.held():
            accepted = [pool.submit(served.predict, image(seed)) for seed in range(PLACES)]
            until(lambda: served.metric("flawmask_queue_images") == PLACES)
            assert served.get("/health/ready").status == 503
            assert served.get("/health/live").status == 200
            refused = served.predict(image())
            assert (refused.status, refused.json["verdict"]) == (503, None)
            assert int(refused.headers["retry-after"]) >= 1
        assert {one.result().status for one in accepted} == {200}
    assert served.metric("flawmask_refused_total", reason="queue_full") >= 1


def test_more_images_than_places_are_refused_together(served: Served) -> None:
    answer = served.predict_form({str(seed): image(seed) for seed in range(PLACES + 1)})
    assert (answer.status, answer.json["verdict"]) == (400, None)
    with ThreadPoolExecutor(1) as pool:
        with served.held():
            first = pool.submit(served.predict, image())
            until(lambda: served.metric("flawmask_queue_images") == 1)
            assert served.predict_form({str(seed): image(seed) for seed in range(PLACES)}).status == 503
        assert first.result().status == 200


def test_what_would_be_too_late_is_not_computed(served: Served) -> None:
    before = served.metric("flawmask_batch_images_sum")
    with served.held():
        answer = served.predict(image(), **{"X-Deadline-Ms": "100"})
        assert (answer.status, answer.json["verdict"]) == (504, None)
    until(lambda: not served.server.batcher._waiting)
    assert served.metric("flawmask_batch_images_sum") == before
    model = served.server.models.get(None)
    assert model is not None
    model.expected_seconds = 5.0
    answer = served.predict(image(), **{"X-Deadline-Ms": "2000"})  # there is time, but not enough
    assert (answer.status, answer.json["verdict"]) == (504, None)
    assert "was not computed" in answer.json["reason"]
    assert model.expected_seconds == pytest.approx(4.5)
    assert served.metric("flawmask_batch_images_sum") == before
    assert served.predict(image(), **{"X-Deadline-Ms": "30000"}).json["verdict"] == "defect"
    assert model.expected_seconds < 4.5


@pytest.mark.parametrize("text", ["0", "-1", "nan", "soon", "1e99", "60001"])
def test_a_deadline_that_is_none_is_refused(served: Served, text: str) -> None:
    answer = served.predict(image(), **{"X-Deadline-Ms": text})
    assert (answer.status, answer.json["verdict"]) == (422, None)


def test_every_answer_that_is_begun_may_end_after_sigterm(served: Served) -> None:
    (header,) = [
        one
        for one in served.get("/openapi.json").json["paths"]["/v1/predict"]["post"]["parameters"]
        if one["in"] == "header"
    ]
    drained = make_runner(Server(config_of("best.pt")), []).config.timeout_graceful_shutdown
    assert drained is not None
    assert header["schema"]["maximum"] / 1000 < drained
    assert drained > PATIENCE


def test_a_client_that_leaves_is_not_computed(served: Served) -> None:
    before = served.metric("flawmask_batch_images_sum")
    with served.held(), served.connected() as connection:
        connection.sendall(request_of(image()))
        until(lambda: len(served.server.batcher._waiting) == 1)
        connection.close()
        until(lambda: served.metric("flawmask_queue_images") == 0)
    until(lambda: not served.server.batcher._waiting)
    assert served.metric("flawmask_batch_images_sum") == before


def request_of(data: bytes, length: int | None = None) -> bytes:
    """Return the bytes of a request with an image."""
    head = f"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length or len(data)}\r\n\r\n"
    return head.encode() + data


def received(connection: socket.socket) -> bytes:
    """Return all that the server sends until it closes the connection."""
    parts = []
    with suppress(ConnectionResetError):  # it may close before it has read all
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def test_half_a_request_is_answered_in_time_and_keeps_no_place(served: Served) -> None:
    with served.connected() as connection:
        connection.sendall(request_of(image())[:-100])
        until(lambda: served.metric("flawmask_queue_images") == 1)
        assert served.predict(image()).status == 200  # others do not wait for it
        answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"verdict":null' in answer


def test_half_a_request_of_a_client_that_leaves_keeps_no_place(served: Served) -> None:
    with served.connected() as connection:
        connection.sendall(request_of(image())[:-100])
        until(lambda: served.metric("flawmask_queue_images") == 1)
    until(lambda: served.metric("flawmask_queue_images") == 0)


def test_a_slow_client_gets_its_answer_in_time(served: Served) -> None:
    data = request_of(image())
    with served.connected() as connection:
        for at in range(0, len(data), 100):
            connection.sendall(data[at : at + 100])
            time.sleep(0.005)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(("at_once", "expected"), [("nothing", b""), ("the headers", b"HTTP/1.1 408 ")])
def test_a_client_that_trickles_is_cut_off_in_time(served: Served, at_once: str, expected: bytes) -> None:
    """Each byte comes in time, and all of them would take a day. Without its headers, a request has no answer."""
    data = request_of(image(), 10**6)
    begin = data.index(b"\r\n\r\n") + 4 if at_once == "the headers" else 0
    stop = threading.Event()
    with served.connected() as connection:
        connection.sendall(data[:begin])

        def trickle() -> None:
            with suppress(OSError):
                for byte in data[begin:]:
                    if stop.wait(0.05):
                        return
                    connection.sendall(bytes([byte]))

        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            answer = received(connection)
        finally:
            stop.set()
            thread.join()
    assert answer[: len(expected) or None] == expected
    assert begin == 0 or b'"verdict":null' in answer


@pytest.mark.parametrize(
    "headers", [b"", b"POST /v1/predict HT", b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nX-A: "]
)
def test_headers_that_do_not_end_close_the_connection(served: Served, headers: bytes) -> None:
    with served.connected() as connection:
        connection.sendall(headers)
        assert received(connection) == b""


def test_headers_that_do_not_end_after_an_answer_close_the_connection(served: Served) -> None:
    with served.connected() as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b""
        while not answer.endswith(b'{"status":"live"}'):  # the body may come in a packet of its own
            part = connection.recv(65536)
            assert part, answer
            answer += part
        assert answer.startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"GET /health/live HTT")
        assert received(connection) == b""


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"\x00\xff\xfe\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost localhost\r\n\r\n",
    ],
)
def test_garbage_is_refused(served: Served, garbage: bytes) -> None:
    with served.connected() as connection:
        with suppress(OSError):  # it may have closed the connection already
            connection.sendall(garbage)
            connection.shutdown(socket.SHUT_WR)
        answer = received(connection)
    assert answer.split(b" ")[1:2] in ([], [b"400"], [b"403"])
    assert b'"good"' not in answer


def test_an_image_that_makes_the_network_fail_has_no_verdict_and_its_neighbours_have_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(config_of(save_model(tmp_path / "best.pt"), inference_batch_size=4, max_wait="1s")) as it:
        backend = it.server.models.get(None).backend  # type: ignore[union-attr]
        infer = backend.infer

        def failing(batch: list) -> list:  # type: ignore[type-arg]
            if any(one.width == 91 for one in batch):
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return infer(batch)

        monkeypatch.setattr(backend, "infer", failing)
        found = it.predict_form({"a": image(), "b": image(width=91), "c": image()}).json
        assert [one["verdict"] for one in found["images"]] == ["defect", None, "defect"]
        assert it.predict(image(width=91)).status == 500
        nan = infer

        def unsound(batch: list) -> list:  # type: ignore[type-arg]
            found = nan(batch)
            for one in found:
                one.scores[:] = float("nan")
            return found

        monkeypatch.setattr(backend, "infer", unsound)
        answer = it.predict(image())
        assert (answer.status, answer.json["verdict"]) == (500, None)
        assert "scores holds what is no number" in answer.json["reason"]


def test_a_decoder_that_is_killed_is_replaced(served: Served) -> None:
    (pool,) = served.server.decoders._pools
    for process in list(pool._processes.values()):
        process.kill()
    assert served.predict(image()).json["verdict"] == "defect"
    assert pool not in served.server.decoders._pools


def test_an_image_that_kills_the_decoder_takes_nobody_with_it(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flawmask.serve.decoders._decode", deadly.decode)
    found = served.predict_form({"a": image(), "b": deadly.FILE, "c": image()}).json["images"]
    assert [one["verdict"] for one in found] == ["defect", None, "defect"]
    assert "the decoder ended while it read the file" in found[1]["reason"]


def test_a_client_that_leaves_a_killing_image_behind_takes_nobody_with_it(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flawmask.serve.decoders._decode", deadly.decode)
    decoders = served.server.decoders

    async def leave() -> bool:
        left = asyncio.ensure_future(decoders.decode(deadly.FILE, "b", UPPER_BITS))
        await asyncio.sleep(0.01)
        left.cancel()
        with suppress(asyncio.CancelledError):
            await left
        return decoders._free.empty()

    assert served.call(leave())
    assert served.predict(image()).json["verdict"] == "defect"
