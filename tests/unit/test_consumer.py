"""Attempt, decide, settle: what handlers do and what happens to them, on the embedded broker."""

from __future__ import annotations

import asyncio
import contextvars
import json
import logging
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from eventbus import Context, Envelope, Event, Reject, Retry, RetryLater, Service
from eventbus import message as header
from eventbus.dead_letters import DeadLetter
from eventbus.envelope import encode
from eventbus.failure import LONGEST_ERROR, LONGEST_TRACE
from eventbus.idempotency.base import LEASE, Claim, Mine
from eventbus.idempotency.memory import MemoryStore
from eventbus.message import Message
from eventbus.transport.base import NotPublished, Publication, Unpublishable
from tests.rig import FlakyStore, Rig, until

THREE = Retry(attempts=3, delay=timedelta(seconds=1))


class Placed(Event, name="placed"):
    order_id: int = 1
    email: str = "a@b.c"


class PlacedV2(Event, name="placed", version=2):
    order_id: int


class Followed(Event):
    order_id: int


def service(*handlers: Callable[..., Awaitable[None]], of: str = "shop", **options: Any) -> Service:
    """A service whose *handlers* are subscribed to `placed`."""
    made = Service(of, retry=THREE, **options)
    for handler in handlers:
        made.on("placed")(handler)
    return made


def only(letters: list[DeadLetter]) -> DeadLetter:
    (letter,) = letters
    return letter


# ── outcomes ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_handler_that_fails_is_tried_again_until_it_succeeds() -> None:
    attempts: list[int] = []

    async def handle(event: Placed, context: Context) -> None:
        attempts.append(context.attempt)
        if context.attempt < 3:
            raise ConnectionError("away")

    async with Rig(shop := service(handle)) as rig:
        await rig.publish(Placed())
        await rig.advance(timedelta(0))
        assert attempts == [1]
        await rig.advance(timedelta(seconds=1))
        assert attempts == [1, 2]
        await rig.settled()

        assert attempts == [1, 2, 3]
        assert rig.dead_letters(shop) == []


async def test_a_handler_that_always_fails_is_given_up_with_what_it_raised() -> None:
    async def handle(event: Placed) -> None:
        raise ConnectionError("the mail server\nis away")

    async with Rig(shop := service(handle)) as rig:
        sent = await rig.publish(Placed())
        await rig.settled()

        letter = only(rig.dead_letters(shop))
        assert rig.attempts(handle) == 3
        assert (letter.reason, letter.handler, letter.attempts) == ("exhausted", "handle", 3)
        assert letter.error == "ConnectionError: the mail server is away"
        assert 'raise ConnectionError("the mail server' in letter.trace
        assert "eventbus/consumer.py" not in letter.trace
        assert letter.envelope == sent
        assert letter.first_failed == sent.time


async def test_reject_is_given_up_at_once() -> None:
    async def handle(event: Placed) -> None:
        raise Reject("no such product")

    async with Rig(shop := service(handle)) as rig:
        await rig.publish(Placed())
        await rig.settled()

        letter = only(rig.dead_letters(shop))
        assert (letter.reason, letter.error, letter.attempts) == ("rejected", "no such product", 1)


async def test_retry_later_is_tried_at_the_time_given_and_uses_up_an_attempt() -> None:
    async def handle(event: Placed, context: Context) -> None:
        raise RetryLater(timedelta(hours=1), "the bank is closed")

    async with Rig(shop := service(handle)) as rig:
        await rig.publish(Placed())
        await rig.advance(timedelta(minutes=59))
        assert rig.attempts(handle) == 1
        await rig.settled()

        letter = only(rig.dead_letters(shop))
        assert rig.attempts(handle) == 3
        assert (letter.reason, letter.error) == ("exhausted", "the bank is closed")


async def test_a_handler_that_takes_too_long_is_cancelled_and_tried_again() -> None:
    cancelled: list[int] = []

    async def handle(event: Placed, context: Context) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(context.attempt)
            raise

    async with Rig(shop := service(handle, timeout=timedelta(milliseconds=10))) as rig:
        await rig.publish(Placed())
        await rig.settled()

        assert cancelled == [1, 2, 3]
        assert only(rig.dead_letters(shop)).error == "timed out after 0.01 s"


async def test_a_timeout_that_the_handler_swallows_is_a_failure_all_the_same() -> None:
    async def handle(event: Placed) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return

    async with Rig(shop := service(handle, timeout=timedelta(milliseconds=10))) as rig:
        await rig.publish(Placed())
        await rig.settled()

        assert only(rig.dead_letters(shop)).error == "timed out after 0.01 s, and did not let itself be cancelled"


async def test_a_timeout_error_of_the_handlers_own_is_told_as_what_it_is() -> None:
    async def handle(event: Placed) -> None:
        raise TimeoutError("the bank did not answer")

    async with Rig(shop := service(handle)) as rig:
        await rig.publish(Placed())
        await rig.settled()

        assert only(rig.dead_letters(shop)).error == "TimeoutError: the bank did not answer"


class Odd(BaseException):
    """Not an Exception."""


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


async def leave(event: Placed) -> None:
    sys.exit(3)


async def cancel(event: Placed) -> None:
    raise asyncio.CancelledError


async def odd(event: Placed) -> None:
    raise Odd("odd")


async def close(event: Placed) -> None:
    raise GeneratorExit


async def mute(event: Placed) -> None:
    raise Mute


async def several(event: Placed) -> None:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(odd_job())


async def odd_job() -> None:
    raise ConnectionError("away")


@pytest.mark.parametrize(
    ("handle", "error"),
    [
        (leave, "SystemExit: 3"),
        (cancel, "the handler was cancelled from within"),
        (odd, "Odd: odd"),
        (close, "GeneratorExit"),
        (mute, "Mute: (its text cannot be had)"),
        (several, "ExceptionGroup: unhandled errors in a TaskGroup (1 sub-exception): ConnectionError: away"),
    ],
)
async def test_whatever_a_handler_raises_is_its_own_failure(
    handle: Callable[[Placed], Awaitable[None]], error: str
) -> None:
    handled: list[int] = []

    async def neighbour(event: Placed) -> None:
        handled.append(event.order_id)

    async with Rig(shop := service(handle, neighbour)) as rig:
        await rig.publish(Placed(order_id=1))
        await rig.publish(Placed(order_id=2))
        await rig.settled()

        assert sorted(handled) == [1, 2]
        assert {(letter.reason, letter.error) for letter in rig.dead_letters(shop)} == {("exhausted", error)}


class NotAsItSeems:
    """Says that it is a coroutine function, and raises when it is called."""

    async def __call__(self, event: Placed) -> None: ...


async def test_a_handler_that_raises_when_it_is_called_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    shop = Service("shop", retry=THREE)
    shop.on("placed", name="handle")(NotAsItSeems())

    async with Rig(shop) as rig:

        def raising(self: object, event: Placed) -> None:
            raise TypeError("not awaitable")

        monkeypatch.setattr(NotAsItSeems, "__call__", raising)
        await rig.publish(Placed())
        await rig.settled()

        assert only(rig.dead_letters(shop)).error == "TypeError: not awaitable"


async def test_handlers_run_side_by_side_up_to_the_concurrency() -> None:
    running: list[int] = []
    most: list[int] = []
    go_on = asyncio.Event()

    async def handle(event: Placed) -> None:
        running.append(event.order_id)
        most.append(len(running))
        await go_on.wait()
        running.remove(event.order_id)

    async with Rig(service(handle, concurrency=4)) as rig:
        for number in range(10):
            await rig.publish(Placed(order_id=number))
        await until(lambda: len(running) == 4)
        go_on.set()
        await rig.settled()

    assert max(most) == 4
    assert len(most) == 10


# ── deliveries that come together ───────────────────────────────────────────────────────────────────────────────────


async def taken_together(handle: Callable[[Placed], Awaitable[None]], **options: Any) -> None:
    """Have *handle* called with the orders 0 to 3, which come in one turn of the event loop."""
    async with Rig(service(handle, **options)) as rig:
        await rig.consumer.inner.pause()
        for number in range(4):
            await rig.publish(Placed(order_id=number))
        await rig.consumer.inner.resume()
        await rig.settled()
        assert rig.depth("events.shop") == 0


async def test_handlers_that_never_wait_run_one_after_the_other_in_one_task() -> None:
    tasks: list[object] = []

    async def handle(event: Placed) -> None:
        tasks.append((event.order_id, asyncio.current_task()))

    await taken_together(handle)

    assert tasks == [(number, tasks[0][1]) for number in range(4)]  # type: ignore[index]


async def test_what_came_together_with_one_that_waits_does_not_wait_for_it() -> None:
    begun: list[int] = []
    handled: list[int] = []
    others = asyncio.Event()

    async def handle(event: Placed) -> None:
        begun.append(event.order_id)
        if event.order_id == 1:
            await others.wait()
        handled.append(event.order_id)
        if len(handled) == 3:
            others.set()

    await taken_together(handle)

    assert begun == [0, 1, 2, 3]
    assert handled == [0, 2, 3, 1]


async def test_a_store_that_has_to_be_asked_is_asked_for_all_of_a_turn_together() -> None:
    turns: list[int] = []

    async def handle(event: Placed) -> None: ...

    class Asked(MemoryStore):
        """Answers in the next turn of the event loop all that was asked for in one, as a shared store does."""

        _answer: asyncio.Future[None] | None = None

        async def claim(self, key: str, lease: timedelta) -> Claim:
            if self._answer is None:
                self._answer = asyncio.get_running_loop().create_future()
                asyncio.get_running_loop().call_soon(self._reply)
                turns.append(0)
            turns[-1] += 1
            await self._answer
            return await super().claim(key, lease)

        def _reply(self) -> None:
            assert self._answer is not None
            self._answer.set_result(None)
            self._answer = None

    async with Rig(service(handle, prefetch=500, concurrency=500), store=Asked()) as rig:
        for size in (50, 60, 40, 70, 90):
            await rig.consumer.inner.pause()
            for number in range(size):
                await rig.publish(Placed(order_id=number))
            await rig.consumer.inner.resume()
            await rig.settled()

    # The first of all alone, for nobody knows yet; then a hundred with whatever comes with them, then two hundred.
    assert turns == [1, 49, 60, 40, 1, 69, 90]


USER: contextvars.ContextVar[int | None] = contextvars.ContextVar("user", default=None)


async def test_a_variable_that_a_handler_sets_is_nobody_elses() -> None:
    found: list[int | None] = []

    async def handle(event: Placed) -> None:
        found.append(USER.get())
        USER.set(event.order_id)

    await taken_together(handle)

    assert found == [None] * 4


class Incomparable:
    def __eq__(self, other: object) -> bool:
        raise ValueError("ambiguous, as an array says")

    __hash__ = None  # type: ignore[assignment]


DATA: contextvars.ContextVar[Incomparable] = contextvars.ContextVar("data")


async def test_a_variable_that_cannot_be_compared_is_nobody_elses_either() -> None:
    found: list[object] = []
    DATA.set(first := Incomparable())

    async def handle(event: Placed) -> None:
        found.append(DATA.get())
        DATA.set(Incomparable())

    await taken_together(handle)

    assert [value is first for value in found] == [True] * 4


async def test_a_handler_that_cancels_its_own_task_cancels_nobody_elses() -> None:
    begun: list[int] = []

    async def handle(event: Placed) -> None:
        begun.append(event.order_id)
        if event.order_id == 0:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
        else:
            await asyncio.sleep(0)

    await taken_together(handle)

    assert begun == [0, 1, 2, 3]


async def test_each_of_several_that_wait_has_a_timeout_of_its_own() -> None:
    tried: list[int] = []

    async def handle(event: Placed) -> None:
        tried.append(event.order_id)
        if event.order_id % 2 and tried.count(event.order_id) == 1:
            await asyncio.Event().wait()

    await taken_together(handle, timeout=timedelta(seconds=0.05))

    assert sorted(tried) == [0, 1, 1, 2, 3, 3]


# ── several handlers ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_several_handlers_of_one_event_each_run_retry_and_give_up_on_their_own() -> None:
    ran: list[tuple[str, int]] = []

    async def good(event: Placed, context: Context) -> None:
        ran.append(("good", context.attempt))

    async def late(event: Placed, context: Context) -> None:
        ran.append(("late", context.attempt))
        if context.attempt == 1:
            raise ConnectionError

    async def bad(event: Placed, context: Context) -> None:
        ran.append(("bad", context.attempt))
        raise ConnectionError

    async with Rig(shop := service(good, late, bad)) as rig:
        await rig.publish(Placed())
        await rig.settled()

        assert sorted(ran) == [("bad", 1), ("bad", 2), ("bad", 3), ("good", 1), ("late", 1), ("late", 2)]
        assert only(rig.dead_letters(shop)).handler == "bad"


async def test_a_retry_names_its_handler_and_where_it_came_from() -> None:
    async def good(event: Placed) -> None: ...

    async def late(event: Placed, context: Context) -> None:
        if context.attempt == 1:
            raise ConnectionError

    async with Rig(service(good, late)) as rig:
        sent = await rig.publish(Placed())
        await rig.settled()

        (copy,) = rig.copies()
        assert copy.exchange == "events.delay.v1.02"
        assert copy.key.endswith(".retry.shop")
        ours = {name: value for name, value in copy.message.headers.items() if name.startswith(header.OURS)}
        assert ours == {
            header.HANDLER: "late",
            header.ATTEMPT: 2,
            header.FIRST_FAILED: sent.time.isoformat(),
            header.ORIGIN_EXCHANGE: "events",
            header.ORIGIN_KEY: "placed.v1",
        }


async def test_the_original_is_acked_once_all_of_its_handlers_are_settled() -> None:
    go_on = asyncio.Event()
    ran: list[str] = []

    async def quick(event: Placed) -> None:
        ran.append("quick")

    async def slow(event: Placed) -> None:
        await go_on.wait()
        ran.append("slow")

    async with Rig(service(quick, slow)) as rig:
        await rig.publish(Placed())
        await until(lambda: ran == ["quick"])
        await rig.consumer.cut_session()  # the whole comes again, and only one part of it is new
        go_on.set()
        await rig.settled()

    assert ran == ["quick", "slow"]


async def test_one_part_that_comes_to_nothing_makes_the_whole_nothing() -> None:
    started = asyncio.Event()
    attempts: list[str] = []

    async def unpublishable(event: Placed) -> None:
        attempts.append("unpublishable")
        raise ConnectionError

    async def long(event: Placed) -> None:
        attempts.append("long")
        started.set()
        await asyncio.Event().wait()

    def refuse(publication: Publication) -> bool:
        if publication.exchange != "events":
            raise Unpublishable("its headers do not encode")
        return False

    rig = Rig(shop := service(unpublishable, long))
    async with rig:
        rig.transport.fault = refuse
        await rig.publish(Placed())
        await started.wait()
        await until(lambda: len(attempts) == 2)
        await rig.engine.stop(0, asyncio.Event())

        assert rig.depth("events.shop") == 1  # not in the dead letters, where `long` would never have run
        assert rig.dead_letters(shop) == []


# ── what nobody here can take ───────────────────────────────────────────────────────────────────────────────────────


async def test_a_retry_whose_handler_is_gone_is_retried_and_then_given_up_as_no_handler() -> None:
    async def handle(event: Placed) -> None: ...

    async with Rig(shop := service(handle)) as rig:
        message = encode(
            Envelope(id="1", source="/x", type="placed.v1", time=datetime.now(UTC), data=b'{"order_id":1}')
        )
        await rig.raw(message.republished({header.HANDLER: "renamed", header.ATTEMPT: 2}), "placed.v1")
        await rig.advance(timedelta(0))
        assert rig.dead_letters(shop) == []  # a worker that knows it may take over
        await rig.settled()

        letter = only(rig.dead_letters(shop))
        assert (letter.reason, letter.handler, letter.attempts) == ("no-handler", "renamed", 3)
        assert letter.error == "service 'shop' has no handler 'renamed' in this program"
        assert rig.attempts(handle) == 0


async def test_what_only_an_old_binding_brings_is_given_up_as_no_handler() -> None:
    async def handle(event: Placed) -> None: ...

    shop = Service("shop", retry=THREE)
    shop.on("placed.v1")(handle)
    async with Rig(shop) as rig:
        message = encode(Envelope(id="1", source="/x", type="gone.v1", time=datetime.now(UTC)))
        await rig.transport.inner.publish(Publication("", "events.shop", message), timeout_s=1)
        await rig.settled()

        letter = only(rig.dead_letters(shop))
        assert (letter.reason, letter.handler) == ("no-handler", None)
        assert letter.error == "service 'shop' has no subscription to gone.v1 in this program"


async def test_a_version_that_no_handler_reads_is_given_up_as_unknown_version() -> None:
    async def handle(event: Placed) -> None: ...

    async with Rig(shop := service(handle)) as rig:
        await rig.publish(PlacedV2(order_id=1))
        await rig.settled()

        letter = only(rig.dead_letters(shop))
        assert (letter.reason, letter.handler, letter.attempts) == ("unknown-version", "handle", 3)
        assert letter.error == "handler 'handle' reads placed.v1, not placed.v2"
        assert rig.attempts(handle) == 0


async def test_data_that_does_not_fit_is_given_up_at_once_as_it_came() -> None:
    async def handle(event: Placed) -> None: ...

    async with Rig(shop := service(handle)) as rig:
        sent = Envelope(id="1", source="/x", type="placed.v1", time=datetime.now(UTC), data=b'{"order_id": "MARKER"}')
        await rig.raw(encode(sent), "placed.v1")
        await rig.settled()

        letter = only(rig.dead_letters(shop))
        assert (letter.reason, letter.handler, letter.attempts) == ("invalid-data", "handle", 1)
        assert letter.error == "the data does not fit Placed (placed.v1): order_id: int_parsing"
        assert letter.body == sent.data


@pytest.mark.parametrize(
    "message",
    [
        Message({}, b"\xff\x00garbage", "application/octet-stream"),
        Message({"cloudEvents_id": "1"}, b"{}", "application/json"),
        Message({}, b"{not json", "application/cloudevents+json"),
    ],
)
async def test_what_is_no_event_is_given_up_at_once_with_its_body_untouched(message: Message) -> None:
    async def handle(event: Placed) -> None: ...

    async with Rig(shop := service(handle)) as rig:
        await rig.raw(message, "placed.v1")
        await rig.publish(Placed())
        await rig.settled()

        letter = only(rig.dead_letters(shop))
        assert (letter.reason, letter.handler, letter.envelope, letter.body) == (
            "invalid-envelope", None, None, message.body,
        )  # fmt: skip
        assert rig.attempts(handle) == 1  # the consumer went on


# ── claims ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_event_that_was_handled_is_not_handled_again() -> None:
    async def handle(event: Placed) -> None: ...

    async with Rig(service(handle)) as rig:
        for _ in range(3):
            await rig.publish(Placed(), id="the same")
        await rig.settled()

        assert rig.attempts(handle) == 1


async def test_what_another_worker_is_at_comes_back_as_the_same_attempt() -> None:
    attempts: list[int] = []

    async def handle(event: Placed, context: Context) -> None:
        attempts.append(context.attempt)

    async with Rig(service(handle)) as rig:
        key = "shop/handle/placed//tests 1"
        claim = await rig.store.claim(key, LEASE)
        assert isinstance(claim, Mine)
        await rig.publish(Placed(), id="1")
        await rig.advance(timedelta(seconds=20))

        assert attempts == []
        assert {copy.message.headers[header.ATTEMPT] for copy in rig.copies()} == {1}
        assert all(header.FIRST_FAILED not in copy.message.headers for copy in rig.copies())
        assert 4 <= len(rig.copies()) <= 5  # five seconds at most lie between two looks

        await rig.store.free(key, claim.token)
        await rig.settled()
        assert attempts == [1]


async def test_a_claim_that_was_found_expired_was_a_crash_and_counts_as_an_attempt() -> None:
    attempts: list[int] = []

    async def handle(event: Placed, context: Context) -> None:
        attempts.append(context.attempt)

    async with Rig(service(handle)) as rig:
        await rig.store.claim("shop/handle/placed//tests 1", LEASE)  # and never heard of again
        await rig.publish(Placed(), id="1")
        await rig.settled()

    assert attempts == [2]


async def test_an_event_that_crashes_its_worker_again_and_again_is_given_up_without_another_run() -> None:
    async def handle(event: Placed) -> None: ...

    async with Rig(shop := service(handle)) as rig:
        for _ in range(3):
            await rig.store.claim("shop/handle/placed//tests 1", LEASE)
            await rig.advance(LEASE)
        await rig.publish(Placed(), id="1")
        await rig.settled()

        letter = only(rig.dead_letters(shop))
        assert (letter.reason, letter.error) == ("exhausted", "its worker ended 3 times in the middle of it")
        assert letter.attempts == 3
        assert rig.attempts(handle) == 0


async def test_a_long_handlers_claim_is_renewed() -> None:
    go_on = asyncio.Event()

    async def handle(event: Placed) -> None:
        await go_on.wait()

    rig = Rig(service(handle))
    async with rig:
        await rig.publish(Placed(), id="1")
        await until(lambda: rig.attempts(handle))
        for _ in range(20):
            rig._clock.ring_next()
            await until(lambda: rig.engine.consumers[0].is_idle or rig.store.asked[-1] in ("claim", "renew"))
            await asyncio.sleep(0)

        assert rig._clock.monotonic_s() > 3 * LEASE.total_seconds()
        assert not isinstance(await rig.store.claim("shop/handle/placed//tests 1", LEASE), Mine)
        go_on.set()
        await rig.settled()
        assert rig.attempts(handle) == 1


@pytest.mark.parametrize("ends_with", ["CancelledError", "an error of its own", "nothing"])
async def test_a_handler_that_loses_its_claim_is_cancelled_and_leaves_the_work_to_the_other(
    ends_with: str, caplog: pytest.LogCaptureFixture
) -> None:
    ended: list[str] = []

    async def handle(event: Placed) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append(ends_with)
            if ends_with == "nothing":
                return
            if ends_with == "an error of its own":
                raise ConnectionError("the driver's way to say cancelled") from None
            raise

    shop = Service("shop", retry=THREE)
    shop.on("placed", idempotency_key="email")(handle)
    async with Rig(shop) as rig:
        await rig.publish(Placed(email="MARKER"))
        await until(lambda: rig.attempts(handle))
        rig.store.forget()
        other = await rig.store.claim("shop/handle/placed/MARKER", LEASE)
        assert isinstance(other, Mine)
        rig._clock.ring_next()
        await until(lambda: ended)
        await until(rig.copies)

        assert [copy.message.headers[header.ATTEMPT] for copy in rig.copies()] == [1]  # no failure of this worker's
        await rig.store.complete("shop/handle/placed/MARKER", other.token, timedelta(days=7))
        await rig.settled()
        assert rig.attempts(handle) == 1
        assert rig.dead_letters(shop) == []
    assert "lost its claim" in caplog.text
    assert "MARKER" not in caplog.text


# ── the store is down ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_while_the_store_is_down_nothing_is_run_and_consuming_pauses_until_it_is_back() -> None:
    async def handle(event: Placed) -> None: ...

    async with Rig(service(handle)) as rig:
        rig.store.down = {"claim", "renew", "complete", "free"}
        for number in range(5):
            await rig.publish(Placed(order_id=number))
        await until(lambda: rig.consumer.pauses == 1)
        await until(lambda: rig.depth("events.shop") == 5)
        assert rig.attempts(handle) == 0
        rig.store.down = set()
        await until(lambda: rig.consumer.resumes == 1)
        await rig.settled()

        assert rig.attempts(handle) == 5
        assert rig.copies() == []


async def test_a_store_that_only_reads_keeps_the_pause() -> None:
    async def handle(event: Placed) -> None: ...

    async with Rig(service(handle)) as rig:
        rig.store.down = {"claim"}
        await rig.publish(Placed())
        await until(lambda: rig.store.asked.count("claim") >= 3)  # asked again and again, by the pause
        assert (rig.consumer.pauses, rig.consumer.resumes) == (1, 0)
        rig.store.down = set()
        await until(lambda: rig.consumer.resumes == 1)
        await rig.settled()


async def test_work_that_is_done_is_recorded_although_the_store_was_down_for_a_moment() -> None:
    async def handle(event: Placed) -> None:
        rig.store.down = {"complete", "claim"}

    async with Rig(service(handle)) as rig:
        await rig.publish(Placed())
        await until(lambda: rig.store.asked.count("complete") >= 2)
        rig.store.down = set()
        await until(lambda: rig.consumer.resumes)
        await rig.settled()

        assert rig.attempts(handle) == 1  # what came again after the pause was known


async def test_trouble_that_is_told_while_consuming_is_about_to_go_on_is_not_forgotten() -> None:
    async def handle(event: Placed) -> None: ...

    async with Rig(service(handle)) as rig:
        resumed = rig.consumer.inner.resume

        async def resume_and_fail_once() -> None:
            rig.store.down = {"claim"}
            await resumed()
            await until(lambda: rig.store.asked[-1] == "claim" and rig.depth("events.shop") == 0)
            await asyncio.sleep(0)
            rig.store.down = set()
            rig.consumer.inner.resume = resumed  # type: ignore[method-assign]

        rig.consumer.inner.resume = resume_and_fail_once  # type: ignore[method-assign]
        rig.store.down = {"claim"}
        await rig.publish(Placed())
        await until(lambda: rig.consumer.pauses == 1)
        rig.store.down = set()
        await until(lambda: rig.consumer.resumes == 2)
        await rig.settled()

        assert rig.attempts(handle) == 1


class Rude(FlakyStore):
    """Raises what it likes."""

    rude = True

    async def claim(self, key: str, lease: timedelta) -> Claim:
        if self.rude:
            raise OSError(f"cannot write {key}")
        return await super().claim(key, lease)


async def test_a_store_that_raises_anything_else_is_down_too(caplog: pytest.LogCaptureFixture) -> None:
    class OfAnybody:
        """Not a MemoryStore: held to the port."""

        def __init__(self) -> None:
            self.inner = Rude()
            self.claim, self.renew = self.inner.claim, self.inner.renew
            self.complete, self.free = self.inner.complete, self.inner.free

    async def handle(event: Placed) -> None: ...

    async with Rig(service(handle), store=(store := OfAnybody())) as rig:
        await rig.publish(Placed())
        await until(lambda: rig.consumer.pauses)
        store.inner.rude = False
        await until(lambda: rig.consumer.resumes)
        await rig.settled()

        assert rig.attempts(handle) == 1
    assert "OfAnybody raised OSError" in caplog.text
    assert "cannot write" not in caplog.text


# ── copies ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def refused(publication: Publication) -> bool:
    raise NotPublished("nacked", maybe_stored=False)


def timed_out(publication: Publication) -> bool:
    raise NotPublished("no confirm", maybe_stored=True, timed_out=True)


def returned(publication: Publication) -> bool:
    return True


@pytest.mark.parametrize("fault", [refused, timed_out, returned])
@pytest.mark.parametrize("gives_up", [False, True], ids=["a retry", "a dead letter"])
async def test_a_copy_that_is_not_confirmed_is_tried_again_and_the_original_stays(
    fault: Callable[[Publication], bool], gives_up: bool
) -> None:
    faults = 2

    def fault_twice(publication: Publication) -> bool:
        nonlocal faults
        if publication.exchange == "events" or not faults:
            return False
        faults -= 1
        assert rig._broker._queues["events.shop"].unsettled == 1  # nothing was acked yet
        return fault(publication)

    async def handle(event: Placed, context: Context) -> None:
        if gives_up:
            raise Reject("no")
        if context.attempt == 1:
            raise ConnectionError

    async with Rig(shop := service(handle)) as rig:
        rig.transport.fault = fault_twice
        await rig.publish(Placed())
        await rig.settled()

        assert faults == 0
        assert len(rig.dead_letters(shop)) == gives_up
        assert rig.attempts(handle) == (1 if gives_up else 2)
        assert len(rig.copies()) == 1


async def test_what_cannot_be_published_again_is_moved_by_the_broker_untouched() -> None:
    def refuse(publication: Publication) -> bool:
        raise Unpublishable("a header of 2 MB")

    async def handle(event: Placed) -> None:
        raise Reject("no")

    async with Rig(shop := service(handle)) as rig:
        await rig.publish(Placed(order_id=5))
        rig.transport.fault = refuse
        await rig.settled()

        letter = only(rig.dead_letters(shop))
        assert (letter.reason, letter.error) == (
            "rejected", "rejected to the broker: no copy of it could be published",
        )  # fmt: skip
        assert not any(name.startswith(header.OURS) for name in letter.headers)
        assert json.loads(letter.body)["order_id"] == 5


async def test_consuming_pauses_when_half_the_window_waits_for_its_copies() -> None:
    async def handle(event: Placed) -> None:
        raise ConnectionError

    async with Rig(shop := service(handle, prefetch=10)) as rig:
        rig.transport.fault = lambda publication: publication.exchange != "events"
        for number in range(4):
            await rig.publish(Placed(order_id=number))
        await until(lambda: rig.engine.consumers[0].stuck == 4)
        assert rig.consumer.pauses == 0
        await rig.publish(Placed(order_id=4))
        await until(lambda: rig.consumer.pauses == 1)
        rig.transport.fault = None
        await until(lambda: rig.consumer.resumes == 1)
        await rig.settled()

        assert len(rig.dead_letters(shop)) == 5


async def test_a_copy_loses_what_the_broker_wrote_into_its_headers() -> None:
    async def handle(event: Placed, context: Context) -> None:
        if context.attempt == 1:
            raise ConnectionError

    async with Rig(service(handle)) as rig:
        message = encode(
            Envelope(id="1", source="/x", type="placed.v1", time=datetime.now(UTC), data=b'{"order_id":1}')
        )
        brokers = {"x-death": [{"count": 1}], "x-first-death-queue": "q", "x-delivery-count": 3, "CC": ["z"]}
        await rig.raw(Message({**message.headers, **brokers, "mine": "kept"}, message.body), "placed.v1")
        await rig.settled()

        (copy,) = rig.copies()
        assert not copy.message.headers.keys() & brokers.keys()
        assert copy.message.headers["mine"] == "kept"


async def test_a_foreign_attempt_that_is_no_number_is_the_first() -> None:
    attempts: list[int] = []

    async def handle(event: Placed, context: Context) -> None:
        attempts.append(context.attempt)

    async with Rig(service(handle)) as rig:
        for number, foreign in enumerate(("7", 0, -1, None, 2.5, [1])):
            message = encode(
                Envelope(id=str(number), source="/x", type="placed.v1", time=datetime.now(UTC), data=b'{"order_id":1}')
            )
            await rig.raw(message.republished({header.ATTEMPT: foreign}), "placed.v1")
        await rig.settled()

    assert attempts == [1] * 6


# ── sessions die ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_handler_outlives_its_session_and_the_redelivery_is_a_duplicate() -> None:
    go_on = asyncio.Event()
    ended: list[str] = []

    async def handle(event: Placed, context: Context) -> None:
        await go_on.wait()
        await context.publish(Followed(order_id=event.order_id))
        ended.append("whole")

    async with Rig(service(handle)) as rig:
        await rig.publish(Placed())
        await until(lambda: rig.attempts(handle))
        await rig.consumer.cut_session()
        await until(rig.copies)  # the redelivery finds the claim taken, and comes back later
        go_on.set()
        await rig.settled()

        assert ended == ["whole"]
        assert rig.attempts(handle) == 1
        assert len(rig.published(Followed)) == 1


async def test_on_a_dead_session_nothing_is_published_for_a_delivery() -> None:
    go_on = asyncio.Event()

    async def handle(event: Placed, context: Context) -> None:
        if not go_on.is_set():
            await go_on.wait()
            raise ConnectionError

    async with Rig(service(handle)) as rig:
        await rig.publish(Placed())
        await until(lambda: rig.attempts(handle))
        await rig.consumer.inner.pause()
        go_on.set()
        await until(lambda: rig.engine.consumers[0].is_idle)
        assert rig.copies() == []
        assert rig.depth("events.shop") == 1
        await rig.consumer.inner.resume()
        await rig.settled()

        assert rig.attempts(handle) == 2  # it had failed, and its claim was given back


async def test_a_copy_is_given_up_when_the_session_dies_in_between() -> None:
    refused: list[Publication] = []

    async def handle(event: Placed, context: Context) -> None:
        if not refused:
            raise ConnectionError

    def refuse_first(publication: Publication) -> bool:
        if publication.exchange != "events" and not refused:
            refused.append(publication)
            raise NotPublished("nacked", maybe_stored=False)
        return False

    async with Rig(service(handle)) as rig:
        rig.transport.fault = refuse_first
        await rig.publish(Placed())
        await until(lambda: refused)
        await rig.consumer.cut_session()
        await rig.settled()

        assert rig.copies() == []
        assert rig.attempts(handle) == 2


async def test_a_delivery_that_waited_for_its_turn_is_not_run_when_its_session_has_died() -> None:
    go_on = asyncio.Event()
    ran: list[int] = []

    async def handle(event: Placed) -> None:
        ran.append(event.order_id)
        await go_on.wait()

    async with Rig(service(handle, concurrency=1)) as rig:
        await rig.publish(Placed(order_id=1))
        await rig.publish(Placed(order_id=2))
        await until(lambda: ran == [1])
        await rig.consumer.inner.pause()
        go_on.set()
        await until(lambda: rig.engine.consumers[0].is_idle)
        assert ran == [1]  # the second is somebody else's by now
        await rig.consumer.inner.resume()
        await rig.settled()

    assert ran == [1, 2]


# ── draining ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_was_taken_is_settled_before_the_end() -> None:
    go_on = asyncio.Event()
    ran: list[int] = []

    async def handle(event: Placed) -> None:
        await go_on.wait()
        ran.append(event.order_id)

    rig = Rig(service(handle, concurrency=2))
    async with rig:
        for number in range(6):
            await rig.publish(Placed(order_id=number))
        await until(lambda: rig.attempts(handle) == 2)
        stopping = asyncio.ensure_future(rig.engine.stop(5, asyncio.Event()))
        await rig.publish(Placed(order_id=99))  # comes too late
        go_on.set()
        await stopping

        assert ran == list(range(6))
        assert rig.depth("events.shop") == 1


@pytest.mark.parametrize("hurries", [False, True])
async def test_what_is_not_settled_in_time_goes_back_with_its_claim(hurries: bool) -> None:
    cancelled: list[int] = []

    async def handle(event: Placed) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(event.order_id)
            raise

    rig = Rig(service(handle, concurrency=1))
    async with rig:
        await rig.publish(Placed(order_id=1), id="1")
        await rig.publish(Placed(order_id=2), id="2")
        await until(lambda: rig.attempts(handle))
        hurry = asyncio.Event()
        if hurries:
            hurry.set()
        await rig.engine.stop(60 if hurries else 0.01, hurry)

        assert cancelled == [1]
        assert rig.depth("events.shop") == 2
        assert rig.copies() == []
        claim = await rig.store.claim("shop/handle/placed//tests 1", LEASE)
        assert isinstance(claim, Mine)
        assert claim.crashes == 0


async def test_a_handler_that_finishes_instead_of_being_cancelled_is_done() -> None:
    async def handle(event: Placed) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return

    rig = Rig(service(handle))
    async with rig:
        await rig.publish(Placed())
        await until(lambda: rig.attempts(handle))
        await rig.engine.stop(0, asyncio.Event())

        assert rig.depth("events.shop") == 0


# ── an event's data is in no log, no header and no message ──────────────────────────────────────────────────────────


class Line(BaseModel):
    amount: int


class Order(BaseModel):
    lines: list[Line]
    by_name: dict[str, int]


def validate(event: Placed) -> None:
    Order.model_validate({"lines": [{"amount": event.email}], "by_name": {event.email: event.email}})


async def as_it_is(event: Placed) -> None:
    validate(event)


async def as_a_cause(event: Placed) -> None:
    try:
        validate(event)
    except ValueError as error:
        raise RuntimeError("it does not fit") from error


async def as_a_context(event: Placed) -> None:
    try:
        validate(event)
    except ValueError:
        raise RuntimeError("it does not fit")  # noqa: B904  # on purpose


async def in_a_group(event: Placed) -> None:
    try:
        validate(event)
    except ValueError as error:
        raise ExceptionGroup("several", [error, ExceptionGroup("inner", [error])]) from None


async def when_it_is_cancelled(event: Placed) -> None:
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        validate(event)


@pytest.mark.parametrize("handle", [as_it_is, as_a_cause, as_a_context, in_a_group, when_it_is_cancelled])
async def test_a_validation_error_shows_no_data(
    handle: Callable[[Placed], Awaitable[None]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with Rig(shop := service(handle, timeout=timedelta(milliseconds=20))) as rig:
        await rig.publish(Placed(email="MARKER"))
        await rig.settled()

        letter = only(rig.dead_letters(shop))
        assert "MARKER" in letter.body.decode()
        assert "MARKER" not in repr(letter.headers)
        assert "MARKER" not in repr(letter)
        assert "int_parsing" in letter.trace
    assert caplog.records
    assert "MARKER" not in "".join(repr(vars(record)) for record in caplog.records)


class Inner(BaseModel):
    email: int


class Outer(Event, name="placed"):
    email: Inner | dict[str, Inner] | list[Inner]


@settings(deadline=None)  # each example is a broker and a worker
@given(
    data=st.recursive(
        st.just("MARKER"),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["email", "MARKER", "x"]), inner),
        max_leaves=6,
    )
)
def test_data_that_does_not_fit_is_told_without_it(data: object) -> None:
    async def handle(event: Outer) -> None: ...

    async def run() -> None:
        async with Rig(shop := service(handle)) as rig:
            body = json.dumps({"email": data}).encode()
            await rig.raw(
                encode(Envelope(id="1", source="/x", type="placed.v1", time=datetime.now(UTC), data=body)), "placed.v1"
            )
            await rig.settled()
            letters = rig.dead_letters(shop)
            assert all("MARKER" not in repr(letter.headers) for letter in letters)
            assert all(letter.reason == "invalid-data" for letter in letters)

    logging.disable(logging.CRITICAL)
    try:
        asyncio.run(run())
    finally:
        logging.disable(logging.NOTSET)


async def test_an_error_is_cut_to_what_a_header_frame_holds_with_the_innermost_frames_kept() -> None:
    def deeper(depth: int) -> None:
        if not depth:
            raise ValueError("é" * 10_000)
        deeper(depth - 1)

    async def handle(event: Placed) -> None:
        deeper(500)

    async with Rig(shop := service(handle)) as rig:
        await rig.publish(Placed())
        await rig.settled()

        letter = only(rig.dead_letters(shop))
        assert len(letter.error.encode()) <= LONGEST_ERROR
        assert letter.error.startswith("ValueError: é")
        assert len(letter.trace.encode()) <= LONGEST_TRACE
        assert letter.trace.endswith("é\n")


async def test_a_delayed_event_that_failed_comes_from_where_events_come_from() -> None:
    async def handle(event: Placed) -> None:
        raise Reject("no")

    async with Rig(shop := service(handle)) as rig:
        await rig.publish(Placed(), delay=timedelta(minutes=1))
        await rig.settled()

        letter = only(rig.dead_letters(shop))
        assert (letter.headers[header.ORIGIN_EXCHANGE], letter.headers[header.ORIGIN_KEY]) == ("events", "placed.v1")


# ── the log ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_each_decision_is_logged_once_with_its_facts(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "eventbus.delivery")

    async def handle(event: Placed, context: Context) -> None:
        if event.order_id and context.attempt < 3:
            raise ConnectionError("away")
        if event.order_id:
            raise Reject("never")

    async with Rig(shop := service(handle)) as rig:
        await rig.publish(Placed(order_id=1), id="1")
        await rig.publish(Placed(order_id=0), id="0")
        await rig.publish(Placed(order_id=0), id="0")
        await rig.settled()
        assert len(rig.dead_letters(shop)) == 1

    told = [(r.levelname, r.__dict__["event_id"], r.__dict__["attempt"], r.__dict__["outcome"]) for r in caplog.records]
    assert sorted(told) == sorted([
        ("WARNING", "1", 1, "retry"),
        ("WARNING", "1", 2, "retry"),
        ("ERROR", "1", 3, "dead-lettered"),
        ("DEBUG", "0", 1, "handled"),
        ("INFO", "0", 1, "duplicate"),
    ])  # fmt: skip
    assert {(r.__dict__["service"], r.__dict__["handler"], r.__dict__["event_type"]) for r in caplog.records} == {
        ("shop", "handle", "placed.v1")
    }
