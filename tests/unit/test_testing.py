"""What users' tests are written with."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest

from eventbus import Context, Envelope, EnvelopeError, Event, Reject, Retry, Service, SetupError
from eventbus.delay import LONGEST
from eventbus.testing import Harness, context


class Placed(Event, name="placed"):
    order_id: int = 1


class Captured(Event, name="captured"):
    order_id: int = 1


class CapturedV2(Event, name="captured", version=2):
    order_id: int = 1


def service(**options: Any) -> Service[Any]:
    return Service("shop", retry=Retry(attempts=4, delay=timedelta(seconds=1), factor=2), **options)


# ── a context of one's own ──────────────────────────────────────────────────────────────────────────────────────────


async def capture(event: Placed, context: Context[str]) -> None:
    await context.publish(Captured(order_id=event.order_id), subject=context.state)


async def test_a_handler_is_called_directly_and_what_it_published_is_listed() -> None:
    ctx = context(Placed(order_id=7), state="ada")

    await capture(Placed(order_id=7), ctx)

    assert ctx.published == [Captured(order_id=7)]


async def test_a_context_says_what_it_was_given() -> None:
    ctx = context(Placed(order_id=7), state="ada", attempt=3)

    assert ctx.state == "ada"
    assert ctx.attempt == 3
    assert ctx.envelope.event(Placed) == Placed(order_id=7)
    assert (ctx.service, ctx.handler) == ("test", "test")
    assert context().state is None
    assert context().attempt == 1


async def test_a_recorded_context_returns_envelopes_as_a_real_one() -> None:
    ctx = context(Placed(), state=None)

    first, again = await ctx.publish(Captured()), await ctx.publish(Captured())

    assert first.extensions["causationid"] == ctx.envelope.id
    assert first.id != again.id


@pytest.mark.parametrize("delay", [timedelta(seconds=-1), LONGEST + timedelta(seconds=1)])
async def test_a_recorded_context_refuses_what_a_real_one_refuses(delay: timedelta) -> None:
    ctx = context(Placed(), state=None)

    with pytest.raises(ValueError, match="a delay of"):
        await ctx.publish(Captured(), delay=delay)
    with pytest.raises(EnvelopeError):
        await ctx.publish(Captured(), id="")

    assert ctx.published == []


# ── time ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_publishing_handles_nothing_yet_and_settling_everything() -> None:
    shop = service()

    @shop.on("placed")
    async def handle(event: Placed) -> None: ...

    async with Harness(shop) as harness:
        sent = await harness.publish(Placed(), id="mine")
        assert harness.attempts(handle) == 0
        await harness.settled()

        assert harness.attempts(handle) == 1
        assert (sent.id, sent.source) == ("mine", "/tests")


async def test_advancing_handles_what_is_due_by_then_and_no_more() -> None:
    shop = service()

    @shop.on("placed")
    async def handle(event: Placed) -> None:
        raise ConnectionError

    async with Harness(shop) as harness:
        await harness.publish(Placed())
        # Attempts at 0, 1, 3 and 7 seconds.
        for by_s, attempts in [(0, 1), (0.9, 1), (0.1, 2), (1.9, 2), (0.1, 3), (3.5, 3), (0.5, 4), (1000, 4)]:
            await harness.advance(timedelta(seconds=by_s))
            assert harness.attempts(handle) == attempts
        assert len(harness.dead_letters(shop)) == 1


async def test_weeks_pass_in_no_time() -> None:
    shop = service()

    @shop.on("placed")
    async def handle(event: Placed) -> None: ...

    began = time.monotonic()
    async with Harness(shop) as harness:
        await harness.publish(Placed(), delay=timedelta(days=40))
        await harness.advance(timedelta(days=39))
        assert harness.attempts(handle) == 0
        await harness.settled()
        assert harness.attempts(handle) == 1
    assert time.monotonic() - began < 5


async def test_a_handler_may_wait_for_real_things() -> None:
    shop = service()
    ended: list[int] = []

    @shop.on("placed")
    async def handle(event: Placed) -> None:
        await asyncio.to_thread(time.sleep, 0.02)
        ended.append(event.order_id)

    async with Harness(shop) as harness:
        await harness.publish(Placed())
        await harness.settled()

        assert ended == [1]


async def test_what_happens_is_dated_by_the_virtual_clock() -> None:
    shop = service()

    @shop.on("placed")
    async def handle(event: Placed) -> None:
        raise Reject("no")

    async with Harness(shop) as harness:
        first = await harness.publish(Placed(), delay=timedelta(days=1))
        await harness.advance(timedelta(days=1))
        second = await harness.publish(Placed())
        await harness.settled()

        failed, _ = harness.dead_letters(shop)
        assert timedelta(days=1) <= failed.first_failed - first.time < timedelta(days=1.16)
        assert timedelta(days=1) <= second.time - first.time


async def test_done_is_forgotten_after_seven_virtual_days() -> None:
    shop = service()

    @shop.on("placed")
    async def handle(event: Placed) -> None: ...

    async with Harness(shop) as harness:
        await harness.publish(Placed(), id="1")
        await harness.advance(timedelta(days=6))
        await harness.publish(Placed(), id="1")
        await harness.advance(timedelta(days=2))
        assert harness.attempts(handle) == 1
        await harness.publish(Placed(), id="1")
        await harness.settled()
        assert harness.attempts(handle) == 2


# ── what never ends ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_event_that_comes_back_later_for_ever_is_found_out() -> None:
    shop = service()

    @shop.on("placed")
    async def handle(event: Placed, context: Context) -> None:
        await context.publish(Placed(order_id=event.order_id + 1), delay=timedelta(days=10))

    async with Harness(shop) as harness:
        await harness.publish(Placed())
        with pytest.raises(AssertionError, match="does a handler publish its own event again"):
            await harness.settled()


async def test_an_event_that_comes_back_at_once_for_ever_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eventbus.testing.MOST_ATTEMPTS_AT_ONCE", 100)
    shop = service()
    goes_round = True

    @shop.on("placed")
    async def handle(event: Placed, context: Context) -> None:
        if goes_round:
            await context.publish(Placed(order_id=event.order_id + 1))

    async with Harness(shop) as harness:
        await harness.publish(Placed())
        with pytest.raises(AssertionError, match="not settled after 100 attempts: does a handler publish its own"):
            await harness.settled()
        goes_round = False


# ── what is asked ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_was_published_is_listed_by_class_and_version_each_event_once_in_order() -> None:
    shop = service()

    @shop.on("placed")
    async def handle(event: Placed, context: Context) -> None:
        await context.publish(Captured(order_id=event.order_id))
        await context.publish(CapturedV2(order_id=event.order_id))
        if context.attempt == 1:
            raise ConnectionError  # and publishes them again

    async with Harness(shop) as harness:
        await harness.publish(Placed(order_id=1))
        await harness.publish(Placed(order_id=2))
        await harness.settled()

        assert harness.published(Placed) == [Placed(order_id=1), Placed(order_id=2)]
        assert harness.published(Captured) == [Captured(order_id=1), Captured(order_id=2)]
        assert harness.published(CapturedV2) == [CapturedV2(order_id=1), CapturedV2(order_id=2)]


async def test_time_does_not_go_back() -> None:
    shop = service()
    shop.on("placed")(capture)

    async with Harness(shop) as harness:
        with pytest.raises(ValueError, match="lies in the past"):
            await harness.advance(timedelta(seconds=-1))


async def test_dead_letters_are_asked_of_its_own_services_only() -> None:
    shop = service()
    shop.on("placed")(capture)

    async with Harness(shop) as harness:
        with pytest.raises(SetupError, match=r"Service\('stranger'\) is not run by this harness"):
            harness.dead_letters(Service("stranger"))


async def test_attempts_are_asked_of_handlers_only() -> None:
    shop = service()
    shop.on("placed")(capture)

    async def stranger(event: Placed) -> None: ...

    async with Harness(shop) as harness:
        with pytest.raises(SetupError, match="is no handler of these services"):
            harness.attempts(stranger)


async def test_a_handler_of_two_services_is_counted_in_both() -> None:
    one, other = Service[Any]("one"), Service[Any]("other")
    one.on("placed")(capture)
    other.on("placed", name="x")(capture)

    async with Harness(one, other) as harness:
        await harness.publish(Placed())
        await harness.settled()

        assert harness.attempts(capture) == 2


# ── dead letters that nobody looked at ──────────────────────────────────────────────────────────────────────────────


def refuse_at(order_id: int, of: Service[Any]) -> None:
    @of.on("placed")
    async def handle(event: Placed) -> None:
        if event.order_id == order_id:
            raise LookupError("where is it")


async def test_a_dead_letter_that_was_not_looked_at_fails_the_test_with_the_handlers_traceback() -> None:
    shop = Service[Any]("shop", retry=Retry(attempts=1))
    refuse_at(1, shop)

    with pytest.raises(AssertionError) as raised:
        await play(shop)

    told = str(raised.value)
    assert told.startswith("1 dead letters that the test did not look at:\n\n")
    assert "shop.handle gave up placed.v1 (exhausted): LookupError: where is it" in told
    assert 'raise LookupError("where is it")' in told


async def play(shop: Service[Any]) -> None:
    async with Harness(shop) as harness:
        await harness.publish(Placed(order_id=1))
        await harness.settled()


async def test_a_dead_letter_that_was_looked_at_is_fine_but_not_one_that_came_later() -> None:
    shop = Service[Any]("shop", retry=Retry(attempts=1))
    refuse_at(1, shop)
    harness = Harness(shop)
    await harness.__aenter__()
    await harness.publish(Placed(order_id=1))
    await harness.settled()
    assert len(harness.dead_letters(shop)) == 1
    await harness.publish(Placed(order_id=1))

    with pytest.raises(AssertionError, match="1 dead letters that the test did not look at"):
        await harness.__aexit__(None, None, None)


async def test_a_test_that_fails_by_itself_is_not_told_of_dead_letters() -> None:
    shop = Service[Any]("shop", retry=Retry(attempts=1))
    refuse_at(1, shop)

    with pytest.raises(ZeroDivisionError):
        await play_and_fail(shop)


async def play_and_fail(shop: Service[Any]) -> None:
    async with Harness(shop) as harness:
        await harness.publish(Placed(order_id=1))
        await harness.settled()
        raise ZeroDivisionError


# ── starting ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_mistakes_are_told_when_it_is_entered() -> None:
    with pytest.raises(SetupError, match="subscribes to nothing"):
        await Harness(service()).__aenter__()


def test_a_harness_that_is_not_entered_says_so() -> None:
    shop = service()
    shop.on("placed")(capture)

    with pytest.raises(SetupError, match="the harness is not running"):
        Harness(shop).attempts(capture)


async def test_resources_are_swapped_by_replace() -> None:
    left: list[str] = []

    @asynccontextmanager
    async def fake(_: Service[Any]) -> AsyncIterator[str]:
        yield "fake"
        left.append("fake")

    shop = service()
    shop.on("placed")(capture)
    async with Harness(shop.replace(lifespan=fake)) as harness:
        await harness.publish(Placed())
        await harness.settled()
        (envelope,) = (e for e in harness._published if e.type == "captured.v1")

        assert envelope.subject == "fake"
    assert left == ["fake"]


async def test_harnesses_share_nothing_and_read_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVENTBUS_URL", "amqp://nobody.invalid/")
    monkeypatch.setenv("EVENTBUS_NAMESPACE", "Not One")
    shop = service()

    @shop.on("#")
    async def handle(envelope: Envelope) -> None: ...

    async with Harness(shop) as one, Harness(shop) as other:
        await one.publish(Placed())
        await one.settled()
        await other.settled()

        assert (one.attempts(handle), other.attempts(handle)) == (1, 0)
