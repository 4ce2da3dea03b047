"""Predicting many images: in order, with the results of single images, few in memory at a time, and no thread left."""

import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import random_network
import torch
from random_network import patchwork

from flawmask import images
from flawmask.errors import FlawmaskError
from flawmask.images import read_image, write_png
from flawmask.inference.backend import Resized, detect
from flawmask.inference.stream import THREADS, NetworkOutput, map_in_order, predict_all
from flawmask.inference.torch_backend import TorchBackend
from flawmask.model.arch import Arch
from flawmask.model.spec import ModelSpec
from flawmask.prediction import Prediction

pytestmark = pytest.mark.usefixtures("small_network")

SPEC = replace(random_network.SPEC, max_detections=8)
"""The specification of a fast network, because masks take most of the time."""

SIZES = [(60, 80), (60, 80), (70, 50), (60, 80), (60, 80), (60, 80), (64, 64), (70, 50), (70, 50), (60, 80)]
BAD = 4
"""The index of the file that is no image."""


REALLY = TorchBackend._infer


def backend(spec: ModelSpec = SPEC) -> TorchBackend:
    return TorchBackend(random_network.network(spec), spec)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Images of several sizes, some consecutive ones of the same size, and an unreadable one between them."""
    paths = [tmp_path / f"{number}.png" for number in range(len(SIZES))]
    for seed, (path, size) in enumerate(zip(paths, SIZES, strict=True)):
        write_png(path, patchwork(*size, seed))
    paths[BAD].write_bytes(b"no image")
    return paths


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, ...]]]:
    """The sizes of the images in each batch that the network has seen so far."""
    seen: list[list[tuple[int, ...]]] = []

    def infer(self: TorchBackend, batch: Sequence[Resized]) -> Any:
        sizes: list[tuple[int, ...]] = [(image.height, image.width) for image in batch]
        assert [image.pixels.shape[:2] for image in batch] == [
            self.spec.resized(image.height, image.width) for image in batch
        ]
        seen.append(sizes)
        return REALLY(self, batch)

    monkeypatch.setattr(TorchBackend, "_infer", infer)
    return seen


def outcome(path: Path, output: NetworkOutput | FlawmaskError) -> tuple[Path, Prediction | FlawmaskError]:
    if isinstance(output, FlawmaskError):
        return path, output
    return path, output.prediction(SPEC)


def evaluated(paths: list[Path], **settings: Any) -> Generator[tuple[Path, Prediction | FlawmaskError], None, None]:
    return predict_all(backend(), paths, read_image, outcome, **settings)


@pytest.mark.parametrize("batch_size", [None, 1, 2, 3, 50])
def test_batches_have_the_results_of_single_images_in_order_and_errors_in_their_place(
    paths: list[Path], batch_size: int | None
) -> None:
    results = list(evaluated(paths, batch_size=batch_size))
    assert [path for path, _ in results] == paths
    found = 0
    for number, (path, result) in enumerate(results):
        if number == BAD:
            assert isinstance(result, FlawmaskError)
            assert str(path) in str(result)
            continue
        assert isinstance(result, Prediction)
        alone = detect(backend(), read_image(path))
        assert (result.height, result.width) == SIZES[number]
        assert [(one.label, one.rle) for one in result.instances] == [(one.label, one.rle) for one in alone.instances]
        for one, other in zip(result.instances, alone.instances, strict=True):
            assert one.score == pytest.approx(other.score, abs=1e-5)
            assert one.box == pytest.approx(other.box, abs=1e-3)
        found += len(alone.instances)
    assert found > 50


def test_a_batch_holds_only_consecutive_images_of_one_size(
    paths: list[Path], batches: list[list[tuple[int, ...]]]
) -> None:
    list(evaluated(paths, batch_size=3))
    # What cannot be read takes its place among its neighbours.
    expected = [[(60, 80)] * 2, [(70, 50)], [(60, 80)] * 2, [(64, 64)], [(70, 50)] * 2, [(60, 80)]]
    assert batches == expected
    batches.clear()
    list(evaluated(paths))
    assert batches == [[size] for number, size in enumerate(SIZES) if number != BAD], "one by one on a CPU"


def holding(most: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Limit memory to a number of images, and return the sizes of the batches that the network gets."""
    asked = []

    def infer(self: TorchBackend, batch: Sequence[Resized]) -> Any:
        asked.append(len(batch))
        if len(batch) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return REALLY(self, batch)

    monkeypatch.setattr(TorchBackend, "_infer", infer)
    return asked


@pytest.mark.parametrize(
    ("most", "expected"), [(2, [6, 3, 2, 2, 2, 2, 2, 2]), (1, [6, 3, 2, *[1] * 12]), (3, [6, 3, 3, 3, 3])]
)
def test_when_memory_runs_out_this_and_later_batches_are_halved_with_a_warning(
    tmp_path: Path,
    most: int,
    expected: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    paths = [tmp_path / f"{seed}.png" for seed in range(12)]
    for seed, path in enumerate(paths):
        write_png(path, patchwork(40, 48, seed))
    without_crowds = list(evaluated(paths))
    asked = holding(most, monkeypatch)
    results = list(evaluated(paths, batch_size=6))
    assert asked == expected
    (warning,) = [one.getMessage() for one in caplog.records]
    assert warning == f"out of memory: continuing with micro-batches of {most} images"
    assert [path for path, _ in results] == paths
    for (_, result), (_, alone) in zip(results, without_crowds, strict=True):
        assert isinstance(result, Prediction)
        assert isinstance(alone, Prediction)
        assert [(one.label, one.rle) for one in result.instances] == [(one.label, one.rle) for one in alone.instances]


def test_too_little_memory_for_one_image_and_other_errors_are_raised(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    holding(0, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        list(evaluated(paths, batch_size=4))

    def broken(*_: Any) -> Any:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(TorchBackend, "_infer", broken)
    with pytest.raises(RuntimeError, match="multiplied"):
        list(evaluated(paths, batch_size=4))


def test_no_image_or_only_unreadable_images_are_no_error(tmp_path: Path) -> None:
    assert list(evaluated([])) == []
    assert [str(result) for _, result in evaluated([tmp_path / "gone.png"] * 3)] == [
        f"{tmp_path / 'gone.png'} cannot be opened: No such file or directory"
    ] * 3


def test_threads_read_and_finish_and_only_the_caller_uses_the_network(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    who: dict[str, set[int]] = {"read": set(), "infer": set(), "finish": set()}

    def infer(*arguments: Any) -> Any:
        who["infer"].add(threading.get_ident())
        return REALLY(*arguments)

    def read(path: Path) -> npt.NDArray[np.uint8]:
        who["read"].add(threading.get_ident())
        return read_image(path)

    def last(_: Path, __: NetworkOutput | FlawmaskError) -> None:
        who["finish"].add(threading.get_ident())

    monkeypatch.setattr(TorchBackend, "_infer", infer)
    assert len(list(predict_all(backend(), paths, read, last))) == len(paths)
    assert who["infer"] == {threading.get_ident()}
    assert threading.get_ident() not in who["read"] | who["finish"]


def test_the_next_images_are_read_while_the_network_is_busy(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    third_is_read = threading.Event()

    def infer(*arguments: Any) -> Any:
        assert third_is_read.wait(timeout=60), "the network would wait for ever"
        return REALLY(*arguments)

    def read(path: Path) -> npt.NDArray[np.uint8]:
        if path == paths[1 + THREADS - 1]:
            third_is_read.set()
        return read_image(path)

    monkeypatch.setattr(TorchBackend, "_infer", infer)
    assert len(list(predict_all(backend(), paths, read, outcome))) == len(paths)


def test_a_reading_thread_uses_one_core_and_does_not_limit_other_threads() -> None:
    """In PyTorch, the limit holds for the thread that sets it, and for threads that start later."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        inside = list(map_in_order(lambda _: torch.get_num_threads(), range(20), 5))
        with ThreadPoolExecutor(1) as pool:
            afterwards = pool.submit(torch.get_num_threads).result()
        assert (set(inside), torch.get_num_threads(), afterwards) == ({1}, 3, 3)
    finally:
        torch.set_num_threads(before)


def test_the_thread_that_reads_an_image_also_resizes_it(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    who: set[int] = set()
    really_resize = images.resize

    def resize(*arguments: Any) -> Any:
        who.add(threading.get_ident())
        return really_resize(*arguments)

    monkeypatch.setattr(images, "resize", resize)
    list(evaluated(paths))
    assert who
    assert threading.get_ident() not in who


@pytest.mark.parametrize(
    "arch", ["maskrcnn_resnet18_fpn", "retinanet_resnet50_fpn", "ssdlite320_mobilenet_v3_large", "yolo11n-seg"]
)
def test_images_of_one_padded_size_share_a_batch_and_have_the_results_of_single_images(
    arch: Arch, tmp_path: Path, batches: list[list[tuple[int, ...]]]
) -> None:
    spec = random_network.spec_of(arch)
    model = backend(spec)
    sizes = [(60, 80), (120, 160), (64, 90), (60, 80)]  # seen at 64 by 85 and 64 by 90, padded to 64 by 96
    paths = [tmp_path / f"{number}.png" for number in range(len(sizes))]
    for number, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        write_png(path, patchwork(*size, number))

    def last(_: Path, output: NetworkOutput | FlawmaskError) -> Prediction:
        assert isinstance(output, NetworkOutput)
        return output.prediction(spec)

    results = list(predict_all(model, paths, read_image, last, batch_size=4))
    assert batches == [sizes]
    for path, size, result in zip(paths, sizes, results, strict=True):
        alone = detect(model, read_image(path))
        assert (result.height, result.width) == size
        assert len(result.instances) == len(alone.instances) > 0
        for one, other in zip(result.instances, alone.instances, strict=True):
            assert one.label == other.label
            assert one.score == pytest.approx(other.score, abs=1e-4)
            assert one.box == pytest.approx(other.box, abs=2e-2)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_no_more_images_are_in_flight_than_a_few_batches(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchBackend, "_infer", lambda _, batch: [None for _ in batch])
    read, done = 0, 0
    most = 0

    def numbers() -> Iterator[int]:  # gone through in this thread, as results are
        nonlocal read, most
        for number in range(60):
            read += 1
            most = max(most, read - done)
            yield number

    for _ in predict_all(backend(), numbers(), lambda seed: patchwork(32, 32, seed), lambda *_: None, batch_size):
        done += 1
    assert done == 60
    assert most <= 2 * batch_size + THREADS + max(batch_size, THREADS)


def test_closing_early_leaves_no_thread(paths: list[Path]) -> None:
    before = set(threading.enumerate())
    results = evaluated(paths, batch_size=2)
    assert next(results)[0] == paths[0]
    assert set(threading.enumerate()) > before
    results.close()
    assert set(threading.enumerate()) == before


def test_closing_early_cancels_items_that_have_not_started() -> None:
    begun: list[int] = []
    go_on = threading.Event()

    def function(number: int) -> None:
        begun.append(number)
        assert number == 0 or go_on.wait(timeout=60)

    results = map_in_order(function, range(50), 20)
    next(results)
    threading.Timer(0.2, go_on.set).start()  # by then what waits is cancelled
    results.close()
    assert len(begun) <= 1 + THREADS


def broken(*_: Any) -> Any:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("which", ["read", "finish"])
def test_an_exception_in_a_thread_ends_the_iteration_and_is_raised(paths: list[Path], which: str) -> None:
    before = set(threading.enumerate())
    functions: dict[str, Any] = {"read": read_image, "finish": outcome, which: broken}
    with pytest.raises(OSError, match="No space left") as caught:  # kept, and the frames in it
        list(predict_all(backend(), paths, **functions))
    assert caught.value.errno == 28
    assert set(threading.enumerate()) == before


def test_an_exception_of_the_network_is_raised_and_no_thread_is_left(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(threading.enumerate())
    monkeypatch.setattr(TorchBackend, "_infer", broken)
    with pytest.raises(OSError, match="No space left") as caught:
        list(evaluated(paths))
    assert caught.value.errno == 28
    assert set(threading.enumerate()) == before


def test_results_keep_their_order_whichever_thread_ends_first() -> None:
    turn = threading.Event()

    def function(number: int) -> int:
        if number == 0 and THREADS > 1:
            assert turn.wait(timeout=60)  # until the second is done
        turn.set()
        return number

    assert list(map_in_order(function, range(9), 3)) == list(range(9))
