"""Python looks for garbage less often while something of ours runs, and as before when nothing does."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from eventbus.garbage import YOUNG_OBJECTS, rarely


@pytest.fixture(autouse=True)
def thresholds() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    yield
    gc.set_threshold(*before)


def test_within_the_block_and_until_the_last_one_ends() -> None:
    first, second = rarely(), rarely()
    first.__enter__()
    second.__enter__()
    assert gc.get_threshold() == (YOUNG_OBJECTS, 10, 10)

    first.__exit__(None, None, None)
    assert gc.get_threshold() == (YOUNG_OBJECTS, 10, 10)
    second.__exit__(None, None, None)

    assert gc.get_threshold() == (700, 10, 10)


@pytest.mark.parametrize("young", [0, YOUNG_OBJECTS, YOUNG_OBJECTS + 1])
def test_what_the_program_has_set_itself_stays(young: int) -> None:
    gc.set_threshold(young, 5, 5)

    with rarely():
        assert gc.get_threshold() == (young, 5, 5)

    assert gc.get_threshold() == (young, 5, 5)


def test_what_the_program_sets_meanwhile_stays() -> None:
    with rarely():
        gc.set_threshold(1000, 5, 5)

    assert gc.get_threshold() == (1000, 5, 5)
    with rarely():
        assert gc.get_threshold() == (YOUNG_OBJECTS, 5, 5)
    assert gc.get_threshold() == (1000, 5, 5)
