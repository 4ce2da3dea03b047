"""How models are timed: the batches that each gets, and the seconds per image."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from flawmask.comparison import speed
from flawmask.comparison.conclusions import _notes
from flawmask.comparison.config import CompareConfig
from flawmask.comparison.entry import Entry


def pictures(count: int) -> list[Any]:
    return [np.full((4, 5, 3), number, dtype=np.uint8) for number in range(count)]


def recording(into: list[Any], name: str) -> Callable[[Sequence[Any]], None]:
    return lambda batch: into.append((name, [int(one[0, 0, 0]) for one in batch]))


def test_models_take_turns_on_the_same_images_and_images_are_used_again() -> None:
    calls: list[Any] = []
    found = speed.measure({name: recording(calls, name) for name in "abc"}, pictures(3))
    singles = [call for call in calls if len(call[1]) == 1]
    eights = [call for call in calls if len(call[1]) == 8]
    for group in (singles, eights):
        for at in range(0, len(group), 3):
            together = group[at : at + 3]
            assert {name for name, _ in together} == set("abc")
            assert len({str(batch) for _, batch in together}) == 1
    assert {group[0] for group in singles[::3]} == set("abc")  # each model comes first in some rounds
    assert eights[0][1] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert len(singles) == len(eights) == 3 * (speed.MAX_ROUNDS + 1)  # the first one warms up
    assert found["a"]["1"]["rounds"] == found["c"]["8"]["rounds"] == speed.MAX_ROUNDS


def test_seconds_are_per_image_and_the_first_round_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    taken = {1: iter([100.0, *(float(one) for one in range(1, 101))]), 8: iter([100.0, *[16.0] * 100])}

    def model(batch: Sequence[Any]) -> None:
        clock[0] += next(taken[len(batch)])

    monkeypatch.setattr(speed, "MAX_SECONDS", 1e9)
    found = speed.measure({"a": model}, pictures(100))
    assert found["a"]["1"] == {"median": 50.5, "p99": 100.0, "rounds": 100}
    assert found["a"]["8"] == {"median": 2.0, "p99": 2.0, "rounds": 100}


def test_slow_models_are_timed_for_a_limited_time_but_for_a_minimum_of_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def model(_: Sequence[Any]) -> None:
        clock[0] += speed.MAX_SECONDS

    found = speed.measure({"a": model}, pictures(100))
    assert found["a"]["1"]["rounds"] == speed.MIN_ROUNDS


def test_a_model_that_fails_at_a_batch_keeps_its_earlier_times_and_the_others_go_on() -> None:
    calls: list[Any] = []

    def fails(batch: Sequence[Any]) -> None:
        if len(batch) == 8:
            raise MemoryError("no room")

    found = speed.measure({"a": fails, "b": recording(calls, "b")}, pictures(2))
    assert set(found["a"]) == {"1", "reason"}
    assert found["a"]["reason"] == "in batches of 8: MemoryError: no room"
    assert set(found["b"]) == {"1", "8"}
    assert set(speed.measure({"a": fails}, pictures(2))["a"]) == {"1", "reason"}


def test_a_model_that_fails_at_once_has_no_times() -> None:
    def fails(_: Sequence[Any]) -> None:
        raise MemoryError("no room")

    assert speed.measure({"a": fails}, pictures(2)) == {"a": {"reason": "in batches of 1: MemoryError: no room"}}


def test_a_note_says_why_a_model_could_not_be_timed() -> None:
    config = CompareConfig(category="plate", weights="none", archs="yolo11n", time_budget="5m")
    notes = _notes(config, [Entry("a"), Entry("b")], {}, [], {"a": {"1": {}, "reason": "no room"}, "b": {"1": {}}})
    assert notes[0] == "Budget: 5m of training each, from nothing."
    assert [line for line in notes if "timed" in line] == ["a could not be timed: no room"]
    assert not [line for line in notes if "starts from nothing" in line]


def test_a_note_names_the_networks_that_start_from_nothing_beside_others() -> None:
    config = CompareConfig(category="plate", weights="auto,yolo11n=none", archs="yolo11n,ssd300_vgg16", epochs=5)
    notes = _notes(config, [Entry("yolo11n"), Entry("ssd300_vgg16")], {}, [], {})
    assert [line for line in notes if "starts from nothing" in line] == [
        "yolo11n starts from nothing: with pretrained weights, it may rank otherwise."
    ]
