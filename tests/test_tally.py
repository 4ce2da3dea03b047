import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flawmask.errors import UnusedError
from flawmask.tally import Tally, warn_of_unused


def test_a_line_shows_how_many_are_used_and_why_the_others_are_not() -> None:
    tally = Tally("annotations", 11)
    for number in range(11):
        tally.leave_out(f"annotation {number}", "crowd")
    assert tally.line() == "22 annotations: 11 used, 11 not used: crowd"
    tally.leave_out("annotation 30", "no pixel")
    assert tally.line() == "23 annotations: 11 used, 12 not used: 11 crowd, 1 no pixel"
    assert Tally("images", 4).line() == "4 images: all used"


@given(st.integers(0, 50), st.lists(st.tuples(st.text(), st.sampled_from(["crowd", "no pixel", "unreadable"]))))
def test_found_is_the_sum_of_used_and_unused(used: int, others: list[tuple[str, str]]) -> None:
    tally = Tally("images", used)
    for name, reason in others:
        tally.leave_out(name, reason)
    assert tally.found == used + len(others)
    assert tally.all_used == (not others)
    total = Tally("images", 1)
    total.add(tally)
    total.add(tally)
    assert total.found == 1 + 2 * tally.found
    written = tally.to_dict()
    assert written["found"] == written["used"] + sum(len(names) for names in written["not_used"].values())


def test_something_unused_gives_a_warning_and_with_strict_an_error(caplog: pytest.LogCaptureFixture) -> None:
    images, annotations = Tally("images", 3), Tally("annotations", 1)
    for name in "abcd":
        annotations.leave_out(name, "crowd")
    with caplog.at_level(logging.WARNING):
        warn_of_unused([images, annotations], "train")
    assert caplog.messages == ["train: 5 annotations: 1 used, 4 not used: crowd (a, b, c, ...)"]
    with pytest.raises(UnusedError, match="train: 5 annotations: 1 used"):
        warn_of_unused([images, annotations], "train", strict=True)
    warn_of_unused([images], "train", strict=True)
