"""When a session is tried again, and when it is given up. No network: what builds a session is given."""

from __future__ import annotations

import asyncio
import logging
from typing import cast

import pytest
from yarl import URL

from eventbus.errors import SetupError, TransportError
from eventbus.transport.base import CONNECT_TIMEOUT_S
from eventbus.transport.rabbitmq import session
from eventbus.transport.rabbitmq.refusals import Address, LoginRefused, Missing, Unreachable
from eventbus.transport.rabbitmq.session import Backoff, Calling, Lost, Session, first, rebuild

ADDRESS = Address.of(URL("amqp://rabbit.example/"))


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "FIRST_BACKOFF_S", 0.001)
    monkeypatch.setattr(session, "MAX_BACKOFF_S", 0.002)


class Builds:
    """What becomes of each try, one after the other; the last is what was built."""

    def __init__(self, *outcomes: Exception | str) -> None:
        self.outcomes = list(outcomes)

    async def __call__(self) -> str:
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def give_up(refused: SetupError) -> None:
    raise refused


def test_the_waits_grow_from_short_to_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    backoff = Backoff()

    waits = [backoff.next_s() for _ in range(20)]

    assert 0.1 <= waits[0] <= 0.5
    assert all(2.0 <= wait <= 10.0 for wait in waits[6:])


async def test_the_first_session_waits_for_a_broker_that_is_not_there_yet() -> None:
    builds = Builds(Unreachable("refused"), Lost(None), Unreachable("refused"), "a session")

    assert await first(builds, ADDRESS) == "a session"


@pytest.mark.parametrize("refusal", [LoginRefused("no"), SetupError("no"), TransportError("unknown host")])
async def test_the_first_session_does_not_wait_for_what_waiting_does_not_mend(refusal: Exception) -> None:
    with pytest.raises(type(refusal), match=str(refusal)):
        await first(Builds(refusal, "a session"), ADDRESS)


async def test_the_first_session_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "CONNECT_TIMEOUT_S", 0.05)

    with pytest.raises(TransportError, match=r"at rabbit\.example:5672 within 0 s \(refused\)"):
        await first(Builds(*[Unreachable("refused")] * 1000), ADDRESS)


async def test_a_lost_session_is_rebuilt_for_ever_while_nobody_answers() -> None:
    builds = Builds(*[Unreachable("refused")] * 50, Lost(None), TransportError("unknown host"), "a session")

    assert await rebuild(builds, give_up, Backoff()) == "a session"


@pytest.mark.parametrize("passing", [LoginRefused("no"), Missing("no queue")])
async def test_what_a_starting_broker_may_say_is_no_refusal_yet(passing: SetupError) -> None:
    assert await rebuild(Builds(passing, passing, "a session"), give_up, Backoff()) == "a session"


@pytest.mark.parametrize("lasting", [LoginRefused("no"), Missing("no queue")])
async def test_after_a_while_it_is_one(lasting: SetupError, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "GRACE_S", 0.02)

    with pytest.raises(type(lasting)):
        await rebuild(Builds(*[lasting] * 1000), give_up, Backoff())


async def test_a_refusal_that_is_only_noted_does_not_end_the_tries() -> None:
    noted: list[SetupError] = []
    refusal = SetupError("permission lost")

    assert await rebuild(Builds(refusal, refusal, "a session"), noted.append, Backoff()) == "a session"
    assert noted == [refusal, refusal]


async def test_the_client_keeps_the_log_level_that_somebody_chose() -> None:
    chosen, other = logging.getLogger("aiormq"), logging.getLogger("aio_pika")
    before = chosen.level, other.level
    try:
        chosen.setLevel(logging.DEBUG)
        other.setLevel(logging.NOTSET)
        with pytest.raises(TransportError):
            async with asyncio.timeout(5):
                await session.connect(URL("amqp://127.0.0.1:1/"), "a test")

        assert (chosen.level, other.level) == (logging.DEBUG, logging.CRITICAL)
    finally:
        chosen.setLevel(before[0])
        other.setLevel(before[1])


async def test_a_try_that_hangs_is_ended_soon_where_others_were_quick_and_gets_more_time_after_several(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session, "LEAST_TRY_S", 0.02)
    backoff, given_s = Backoff(), []
    await first(Builds("a session"), ADDRESS, backoff)

    async def hangs() -> str:
        began_s = asyncio.get_running_loop().time()
        try:
            await asyncio.Event().wait()
        finally:
            given_s.append(asyncio.get_running_loop().time() - began_s)
        return "never"

    for _ in range(session.PATIENT_AFTER + 1):
        with pytest.raises(TimeoutError):
            await backoff.tried(hangs)

    # The event loop's timers may ring a clock tick early.
    assert all(0.019 <= each < CONNECT_TIMEOUT_S for each in given_s)
    assert given_s[-1] >= 0.039
    assert await rebuild(Builds("a session"), give_up, backoff) == "a session"


class Closed:
    """As much of a session that was closed in order as a call asks for."""

    reason = None


@pytest.mark.parametrize("error", [Exception(), RuntimeError("closed"), ConnectionResetError()], ids=repr)
async def test_whatever_the_client_ends_a_call_with_is_a_lost_session(error: Exception) -> None:
    with pytest.raises(Lost):
        async with Calling(cast("Session", Closed())):
            raise error


async def test_what_is_no_end_of_a_session_is_raised_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError):
        async with Calling(cast("Session", Closed())):
            raise ZeroDivisionError
