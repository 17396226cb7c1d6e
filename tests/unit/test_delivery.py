"""What becomes of a delivery: each row of the rule by name, and what holds for all of them."""

from __future__ import annotations

import traceback
from datetime import timedelta
from typing import Literal, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventbus import delay
from eventbus.delivery import (
    LONGEST_WAIT_FOR_A_CLAIM,
    Ack,
    Again,
    Cancelled,
    ClaimedElsewhere,
    DeadLetter,
    Duplicate,
    Failed,
    Handled,
    Nothing,
    Outcome,
    Postponed,
    Reason,
    Refused,
    StoreDown,
    Unmatched,
    decide,
)
from eventbus.retry import Retry

NEVER_AGAIN: tuple[Literal["invalid-envelope", "invalid-data", "rejected"], ...] = (
    "invalid-envelope",
    "invalid-data",
    "rejected",
)
UNMATCHED: tuple[Literal["no-handler", "unknown-version"], ...] = ("no-handler", "unknown-version")
POLICY = Retry(attempts=3, delay=timedelta(seconds=1), factor=2, max_delay=timedelta(seconds=60), jitter=0.5)


def durations(up_to: timedelta) -> st.SearchStrategy[timedelta]:
    return st.timedeltas(timedelta(0), up_to)


@st.composite
def policies(draw: st.DrawFn) -> Retry:
    max_delay = draw(durations(timedelta(days=42)))
    return Retry(
        attempts=draw(st.integers(1, 20) | st.integers(1, 10**9)),
        delay=draw(durations(max_delay)),
        factor=draw(st.floats(1, 1e300)),
        max_delay=max_delay,
        jitter=draw(st.floats(0, 1)),
    )


OUTCOMES: st.SearchStrategy[Outcome] = st.one_of(
    st.just(Handled()),
    st.just(Duplicate()),
    st.builds(ClaimedElsewhere, st.timedeltas()),
    st.builds(Refused, st.sampled_from(NEVER_AGAIN), st.text()),
    st.builds(Unmatched, st.sampled_from(UNMATCHED), st.text()),
    st.builds(Failed, st.text(), st.text()),
    st.builds(Postponed, st.timedeltas(timedelta(0)), st.text()),
    st.just(Cancelled()),
    st.builds(StoreDown, st.text()),
)
ATTEMPTS = st.integers(1, 20) | st.integers(1, 2**62)  # a header holds any number
JITTERS = st.floats(-1, 1)


# ── the rows ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("outcome", [Handled(), Duplicate()])
def test_handled_or_a_duplicate_of_something_handled_is_acked(outcome: Outcome) -> None:
    assert decide(outcome, 1, POLICY) == Ack()
    assert decide(outcome, POLICY.attempts + 1, POLICY) == Ack()


@pytest.mark.parametrize(
    ("lease_left", "wait"),
    [
        (timedelta(seconds=30), LONGEST_WAIT_FOR_A_CLAIM),
        (timedelta(seconds=2), timedelta(seconds=2)),
        (timedelta(0), timedelta(0)),
        (timedelta(seconds=-1), timedelta(0)),  # clocks of two computers
    ],
)
@pytest.mark.parametrize("attempt", [1, POLICY.attempts, POLICY.attempts + 5])
def test_what_another_worker_has_claimed_comes_later_as_the_same_attempt(
    lease_left: timedelta, wait: timedelta, attempt: int
) -> None:
    settlement = decide(ClaimedElsewhere(lease_left), attempt, POLICY)

    assert isinstance(settlement, Again)
    assert (settlement.delay, settlement.attempt) == (wait, attempt)


@pytest.mark.parametrize("reason", NEVER_AGAIN)
def test_what_no_attempt_can_handle_is_dead_lettered_now_with_the_reason(
    reason: Literal["invalid-envelope", "invalid-data", "rejected"],
) -> None:
    assert decide(Refused(reason, "why"), 1, POLICY) == DeadLetter(reason, "why")


@pytest.mark.parametrize("reason", UNMATCHED)
def test_what_nothing_here_can_take_is_retried_as_a_failure_for_a_newer_worker_may_know_it(
    reason: Literal["no-handler", "unknown-version"],
) -> None:
    assert decide(Unmatched(reason, "why"), 2, POLICY) == Again(timedelta(seconds=2), 3, "why")


@pytest.mark.parametrize("reason", UNMATCHED)
def test_what_nothing_can_take_on_the_last_attempt_is_dead_lettered_as_that(
    reason: Literal["no-handler", "unknown-version"],
) -> None:
    assert decide(Unmatched(reason, "why"), 3, POLICY) == DeadLetter(reason, "why")


@pytest.mark.parametrize(("attempt", "delay_s"), [(1, 1), (2, 2)])
def test_what_failed_with_attempts_left_is_retried_after_the_policys_delay(attempt: int, delay_s: int) -> None:
    assert decide(Failed("why"), attempt, POLICY) == Again(timedelta(seconds=delay_s), attempt + 1, "why")


def test_the_last_failed_attempt_is_dead_lettered_as_exhausted_with_its_trace() -> None:
    assert decide(Failed("why", "trace"), 3, POLICY) == DeadLetter("exhausted", "why", "trace")


def test_retry_later_is_retried_after_the_given_time_and_uses_up_an_attempt() -> None:
    assert decide(Postponed(timedelta(minutes=1), "why"), 1, POLICY) == Again(timedelta(minutes=1), 2, "why")


def test_retry_later_on_the_last_attempt_is_dead_lettered_as_exhausted() -> None:
    assert decide(Postponed(timedelta(minutes=1), "why"), 3, POLICY) == DeadLetter("exhausted", "why")


@pytest.mark.parametrize("outcome", [Cancelled(), StoreDown("why")])
@pytest.mark.parametrize("attempt", [1, 3, 4])
def test_what_was_cancelled_or_never_run_is_left_to_the_broker(outcome: Outcome, attempt: int) -> None:
    assert decide(outcome, attempt, POLICY) == Nothing()


# ── what holds for all ──────────────────────────────────────────────────────────────────────────────────────────────


def test_every_outcome_is_among_those_that_are_tried_here() -> None:
    told = set()

    @given(OUTCOMES)
    def collect(outcome: Outcome) -> None:
        told.add(type(outcome))

    collect()

    assert told == set(get_args(Outcome))


@given(OUTCOMES, ATTEMPTS, policies(), JITTERS)
def test_there_is_a_settlement_for_everything(outcome: Outcome, attempt: int, policy: Retry, jitter: float) -> None:
    assert isinstance(decide(outcome, attempt, policy, jitter=jitter), Ack | Again | DeadLetter | Nothing)


@given(OUTCOMES, ATTEMPTS, policies(), JITTERS)
def test_no_attempt_is_scheduled_past_the_policy(outcome: Outcome, attempt: int, policy: Retry, jitter: float) -> None:
    match decide(outcome, attempt, policy, jitter=jitter):
        case Again(attempt=following) if following != attempt:
            assert following == attempt + 1 <= policy.attempts
        case Again():
            assert isinstance(outcome, ClaimedElsewhere)
        case _:
            pass


@given(OUTCOMES, ATTEMPTS, policies(), JITTERS)
def test_every_delay_fits_the_delay_tree(outcome: Outcome, attempt: int, policy: Retry, jitter: float) -> None:
    settlement = decide(outcome, attempt, policy, jitter=jitter)

    if isinstance(settlement, Again):
        assert settlement.delay <= delay.rounded(settlement.delay) <= delay.LONGEST


@given(OUTCOMES, ATTEMPTS, policies(), JITTERS)
def test_what_is_given_up_has_a_reason_of_the_closed_set(
    outcome: Outcome, attempt: int, policy: Retry, jitter: float
) -> None:
    settlement = decide(outcome, attempt, policy, jitter=jitter)

    if isinstance(settlement, DeadLetter):
        assert settlement.reason in get_args(Reason)


@given(OUTCOMES, ATTEMPTS, policies(), JITTERS)
def test_the_same_question_has_the_same_answer(outcome: Outcome, attempt: int, policy: Retry, jitter: float) -> None:
    assert decide(outcome, attempt, policy, jitter=jitter) == decide(outcome, attempt, policy, jitter=jitter)


@given(policies(), st.integers(1, 50))
def test_a_handler_that_always_fails_is_tried_as_often_as_its_policy_says(policy: Retry, most: int) -> None:
    policy = Retry(attempts=most, delay=policy.delay, factor=policy.factor, max_delay=policy.max_delay)
    attempt, tried = 1, 1

    while isinstance(settlement := decide(Failed("why"), attempt, policy), Again):
        attempt, tried = settlement.attempt, tried + 1

    assert tried == most
    assert settlement == DeadLetter("exhausted", "why")


def test_what_is_no_outcome_is_a_bug_and_not_a_settlement() -> None:
    with pytest.raises(AssertionError) as raised:
        decide(object(), 1, POLICY)  # type: ignore[arg-type]

    assert "assert_never" in "".join(traceback.format_tb(raised.tb))
