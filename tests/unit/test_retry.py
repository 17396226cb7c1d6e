"""Attempt -> delay."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventbus import delay, retry
from eventbus.errors import SetupError
from eventbus.retry import Retry


def delays(up_to: timedelta = retry.LONGEST) -> st.SearchStrategy[timedelta]:
    return st.timedeltas(timedelta(0), up_to)


@st.composite
def policies(draw: st.DrawFn) -> Retry:
    max_delay = draw(delays())
    return Retry(
        attempts=draw(st.integers(1, 10**6)),
        delay=draw(delays(max_delay)),
        factor=draw(st.floats(1, 1e300)),
        max_delay=max_delay,
        jitter=draw(st.floats(0, 1)),
    )


ATTEMPTS = st.integers(1, 10**6)
JITTERS = st.floats(-1, 1)


def test_the_default_waits_three_times_longer_each_time_up_to_ten_minutes() -> None:
    waits = [Retry().delay_after(attempt).total_seconds() for attempt in range(1, 10)]

    assert waits == [1, 3, 9, 27, 81, 243, 600, 600, 600]


@given(policies(), ATTEMPTS, JITTERS)
def test_a_delay_is_never_negative_and_always_fits_the_delay_tree(policy: Retry, attempt: int, jitter: float) -> None:
    wait = policy.delay_after(attempt, jitter=jitter)

    assert timedelta(0) <= wait <= delay.LONGEST


@given(policies(), ATTEMPTS)
def test_without_jitter_it_never_shrinks_and_stays_between_delay_and_max_delay(policy: Retry, attempt: int) -> None:
    wait = policy.delay_after(attempt)

    assert policy.delay <= wait <= policy.max_delay
    assert wait <= policy.delay_after(attempt + 1)


@given(policies(), ATTEMPTS, JITTERS)
def test_jitter_moves_it_by_that_share_at_most(policy: Retry, attempt: int, jitter: float) -> None:
    plain, moved = policy.delay_after(attempt), policy.delay_after(attempt, jitter=jitter)

    assert abs(moved - plain) <= plain * policy.jitter + timedelta(microseconds=1)


@given(policies(), ATTEMPTS, JITTERS)
def test_the_same_question_has_the_same_answer(policy: Retry, attempt: int, jitter: float) -> None:
    assert policy.delay_after(attempt, jitter=jitter) == policy.delay_after(attempt, jitter=jitter)


def test_jitter_goes_both_ways() -> None:
    policy = Retry(delay=timedelta(seconds=100), jitter=0.25)

    assert policy.delay_after(1, jitter=-1) == timedelta(seconds=75)
    assert policy.delay_after(1, jitter=1) == timedelta(seconds=125)


@pytest.mark.parametrize("attempt", [400, 10_000, 10**9])
def test_a_huge_attempt_waits_as_long_as_any(attempt: int) -> None:
    assert Retry(factor=10).delay_after(attempt) == timedelta(minutes=10)
    assert Retry(delay=timedelta(0)).delay_after(attempt) == timedelta(0)


def test_the_longest_delay_is_within_the_delay_trees() -> None:
    assert retry.LONGEST <= delay.LONGEST < retry.LONGEST + timedelta(days=1)


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"attempts": 0}, "attempts=0"),
        ({"attempts": True}, "attempts=True"),
        ({"attempts": 1.5}, "attempts=1.5"),
        ({"factor": 0.5}, "factor=0.5"),
        ({"factor": float("inf")}, "factor=inf"),
        ({"factor": float("nan")}, "factor=nan"),
        ({"factor": "2"}, "factor='2'"),
        ({"jitter": -0.1}, "jitter=-0.1"),
        ({"jitter": 1.1}, "jitter=1.1"),
        ({"jitter": float("nan")}, "jitter=nan"),
        ({"delay": 5}, "delay=5.*give a timedelta"),
        ({"max_delay": 600}, "max_delay=600.*give a timedelta"),
        ({"delay": timedelta(seconds=-1)}, "from 0 to 42 days"),
        ({"max_delay": timedelta(days=43)}, "from 0 to 42 days"),
        ({"delay": timedelta(hours=1)}, "raise max_delay"),
    ],
)
def test_a_policy_that_cannot_be_is_refused_with_its_value(keywords: dict[str, Any], said: str) -> None:
    with pytest.raises(SetupError, match=said):
        Retry(**keywords)


def test_a_policy_does_not_change() -> None:
    policy = Retry()

    with pytest.raises(FrozenInstanceError):
        policy.attempts = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (Retry(), "10 attempts, 1 s \u00d7 3 up to 10 min"),
        (Retry(attempts=4, delay=timedelta(milliseconds=250)), "4 attempts, 250 ms \u00d7 3 up to 10 min"),
        (Retry(attempts=1), "1 attempt, no retry"),
        (Retry(attempts=3, factor=1, delay=timedelta(seconds=1.5)), "3 attempts, 1.5 s apart"),
        (Retry(attempts=3, delay=timedelta(minutes=10)), "3 attempts, 10 min apart"),
        (Retry(factor=1.5, max_delay=timedelta(days=2)), "10 attempts, 1 s \u00d7 1.5 up to 2 d"),
        (Retry(max_delay=timedelta(hours=2)), "10 attempts, 1 s \u00d7 3 up to 2 h"),
    ],
)
def test_a_policy_says_what_it_does(policy: Retry, said: str) -> None:
    assert str(policy) == said
