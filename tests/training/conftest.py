"""Trainings in a moment: a small network, and no pictures where a test does not ask for them."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def trained_in_a_moment(small_network: None, undrawn: None) -> None:
    """Of which network a training is, and what is drawn beside it, few of the tests here are."""
