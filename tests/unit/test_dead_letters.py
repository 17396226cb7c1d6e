"""Given-up deliveries: looked at where they are, published again on request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventbus import Bus, Context, Envelope, Event, Reject, Retry, Service, SetupError, TransportError, Worker
from eventbus import message as header
from eventbus.dead_letters import DeadLetter, DeadLetters, read
from eventbus.envelope import encode
from eventbus.idempotency import MemoryStore
from eventbus.message import Message
from eventbus.topology import Names, of_service, shared
from eventbus.transport.base import NotPublished, Publication
from eventbus.transport.memory import MemoryTransport
from tests.rig import FaultyTransport, until

URL = "memory://test-dead-letters"


class Placed(Event, name="placed"):
    order_id: int


class Shop:
    """A service whose handlers refuse what `refuses` says, with the broker that it runs on."""

    def __init__(self) -> None:
        self.refuses: Callable[[Placed], bool] = lambda _: True
        self.handled: list[tuple[str, int, int]] = []  # by whom, which, on which attempt
        self.service = Service("shop", retry=Retry(attempts=2, delay=timedelta(milliseconds=1)))

        @self.service.on("placed")
        async def bill(event: Placed, context: Context) -> None:
            self._handle("bill", event, context)

        @self.service.on("placed")
        async def ship(event: Placed, context: Context) -> None:
            self.handled.append(("ship", event.order_id, context.attempt))

    def _handle(self, name: str, event: Placed, context: Context) -> None:
        if self.refuses(event):
            raise Reject(f"no {event.order_id}")
        self.handled.append((name, event.order_id, context.attempt))


async def letters() -> list[DeadLetter]:
    async with DeadLetters("shop", url=URL) as dead:
        return [letter async for letter in dead]


async def filled(bus: Bus, numbers: int = 3) -> list[DeadLetter]:
    """Publish and wait until all of them are dead letters."""
    for number in range(numbers):
        await bus.publish(Placed(order_id=number))
    return await at_least(numbers)


async def at_least(number: int) -> list[DeadLetter]:
    """The dead letters, once there are *number*."""
    async with asyncio.timeout(10):
        while len(found := await letters()) < number:  # noqa: ASYNC110  # another program would have to ask, too
            await asyncio.sleep(0.005)
    return found


def with_id(id: str) -> Callable[[DeadLetter], bool]:
    return lambda letter: letter.id == id


# ── looking ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_looking_gives_the_oldest_first_and_leaves_them_where_they_are() -> None:
    shop = Shop()
    async with Worker(shop.service, url=URL), Bus(URL) as bus:
        found = await filled(bus)

        assert [letter.error for letter in found] == ["no 0", "no 1", "no 2"]
        assert await letters() == found
        assert len({letter.id for letter in found}) == 3


async def test_a_dead_letter_says_what_who_why_how_often_and_since_when() -> None:
    shop = Shop()
    async with Worker(shop.service, url=URL), Bus(URL, source="/x") as bus:
        before = datetime.now(UTC)
        (letter,) = await filled(bus, 1)

    assert letter.envelope is not None
    assert letter.envelope.event(Placed) == Placed(order_id=0)
    assert (letter.service, letter.handler, letter.reason, letter.attempts) == ("shop", "bill", "rejected", 1)
    assert letter.body == b'{"order_id":0}'
    assert letter.headers["cloudEvents_source"] == "/x"
    assert letter.headers[header.ORIGIN_KEY] == "placed.v1"
    assert before <= letter.first_failed <= datetime.now(UTC)


async def test_an_iteration_that_is_left_early_hides_nothing() -> None:
    shop = Shop()
    async with Worker(shop.service, url=URL), Bus(URL) as bus:
        await filled(bus)
        shop.refuses = lambda _: False
        async with DeadLetters("shop", url=URL) as dead:
            async for _ in dead:
                break
            assert await dead.replay() == 3


async def test_one_can_be_replayed_while_they_are_looked_at() -> None:
    shop = Shop()
    async with Worker(shop.service, url=URL), Bus(URL) as bus:
        await filled(bus)
        shop.refuses = lambda _: False
        async with DeadLetters("shop", url=URL) as dead:
            async for letter in dead:
                if letter.error == "no 1":
                    assert await dead.replay(with_id(letter.id)) == 1
        await until(lambda: ("bill", 1, 1) in shop.handled)

        assert [letter.error for letter in await letters()] == ["no 0", "no 2"]


async def test_a_dead_letters_data_is_not_shown_by_chance() -> None:
    letter = read(Message({"x": "MARKER", header.REASON: "exhausted", header.TRACE: "MARKER"}, b"MARKER"), "shop")

    assert "MARKER" not in repr(letter)


# ── replaying ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_replay_goes_to_the_handler_that_gave_up_and_begins_at_attempt_1() -> None:
    shop = Shop()
    async with Worker(shop.service, url=URL), Bus(URL) as bus:
        await filled(bus, 1)
        shop.refuses = lambda _: False
        async with DeadLetters("shop", url=URL) as dead:
            assert await dead.replay() == 1
        await until(lambda: len(shop.handled) == 2)

        assert shop.handled == [("ship", 0, 1), ("bill", 0, 1)]
        assert await letters() == []


async def test_only_what_is_picked_is_replayed() -> None:
    shop = Shop()
    async with Worker(shop.service, url=URL), Bus(URL) as bus:
        await filled(bus)
        shop.refuses = lambda _: False
        async with DeadLetters("shop", url=URL) as dead:
            assert await dead.replay(lambda letter: letter.error == "no 1") == 1
            assert await dead.replay(lambda letter: False) == 0
        await until(lambda: ("bill", 1, 1) in shop.handled)

        assert [letter.error for letter in await letters()] == ["no 0", "no 2"]


async def test_what_is_given_up_again_is_not_replayed_again_by_the_same_call() -> None:
    shop = Shop()
    async with Worker(shop.service, url=URL), Bus(URL) as bus:
        before = await filled(bus)
        async with DeadLetters("shop", url=URL) as dead, asyncio.timeout(10):
            assert await dead.replay() == 3
        await until(lambda: len(shop.handled) == 3)
        after = await at_least(3)

        assert {letter.id for letter in after}.isdisjoint(letter.id for letter in before)


async def test_what_was_handled_meanwhile_is_recognised_as_a_duplicate() -> None:
    shop, store = Shop(), MemoryStore()
    async with Worker(shop.service, url=URL, idempotency=store), Bus(URL) as bus:
        (letter,) = await filled(bus, 1)
        shop.refuses = lambda _: False
        assert letter.envelope is not None
        await bus.publish(letter.envelope)  # somebody was quicker
        await until(lambda: ("bill", 0, 1) in shop.handled)
        async with DeadLetters("shop", url=URL) as dead:
            assert await dead.replay() == 1
        await bus.publish(Placed(order_id=99))
        await until(lambda: ("bill", 99, 1) in shop.handled)

    assert shop.handled.count(("bill", 0, 1)) == 1


@pytest.mark.parametrize("confirmed", [0, 1])
async def test_a_replay_that_is_not_confirmed_stays_a_dead_letter_with_those_behind_it(
    confirmed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport = FaultyTransport(MemoryTransport(URL))
    monkeypatch.setattr("eventbus.desk.from_url", lambda url, **_: transport)

    def refuse(publication: Publication) -> bool:
        if len(transport.published) == confirmed:
            raise NotPublished("the broker said no", maybe_stored=False)
        return False

    shop = Shop()
    async with Worker(shop.service, url=URL), Bus(URL) as bus:
        await filled(bus)
        shop.refuses = lambda _: False
        async with DeadLetters("shop", url=URL) as dead:
            transport.fault = refuse
            with pytest.raises(
                TransportError, match=rf"could not be replayed \(the broker said no\); {confirmed} were"
            ):
                await dead.replay()
            transport.fault = None

            left = [letter.error async for letter in dead]

    assert left == ["no 0", "no 1", "no 2"][confirmed:]


async def test_a_replay_without_a_retry_queue_loses_nothing() -> None:
    transport = MemoryTransport(URL)
    names = Names()
    whole = of_service(names, "shop", ["#"])
    only_dead = replace(
        whole,
        queues=tuple(queue for queue in whole.queues if queue.name == "events.shop.dead"),
        bindings=tuple(binding for binding in whole.bindings if binding.destination == "events.shop.dead"),
    )
    await transport.open(shared(names), "apply")
    try:
        await transport.consumer([], only_dead, "apply").start()
        await transport.publish(Publication("events.dead", "shop", Message({}, b"x")), timeout_s=1)
        async with DeadLetters("shop", url=URL) as dead:
            # It went to the parking place: stored, and watched. Never nowhere.
            assert await dead.replay() == 1
        async with transport.browse("events.undeliverable") as parked:
            assert [delivery.message.body async for delivery in parked] == [b"x"]
    finally:
        await transport.close()


# ── what is read of a message ───────────────────────────────────────────────────────────────────────────────────────


def dead(**headers: object) -> DeadLetter:
    return read(Message(headers, b"body"), "shop")


WHEN = datetime(2030, 1, 31, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("death", "reason", "error"),
    [
        ({"reason": "rejected", "time": WHEN}, "rejected", "rejected to the broker: no copy of it could be published"),
        (
            {"reason": "delivery_limit", "time": WHEN},
            "delivery-limit",
            "its workers ended in the middle of it, again and again",
        ),
        ({"reason": "expired", "time": WHEN}, "rejected", "moved here by the broker"),
    ],
)
def test_what_the_broker_moved_by_itself_has_the_brokers_reason(
    death: dict[str, object], reason: str, error: str
) -> None:
    letter = dead(**{"x-death": [death, {"reason": "expired"}]})

    assert (letter.reason, letter.error, letter.first_failed, letter.attempts) == (reason, error, WHEN, 1)


def test_our_own_reason_goes_before_the_brokers() -> None:
    letter = dead(
        **{"x-death": [{"reason": "rejected"}], header.REASON: "exhausted", header.ERROR: "why", header.ATTEMPT: 7}
    )

    assert (letter.reason, letter.error, letter.attempts) == ("exhausted", "why", 7)


@pytest.mark.parametrize(
    ("written", "understood"),
    [
        (WHEN.isoformat(), WHEN),
        ("2030-01-31T12:00:00", WHEN),
        (WHEN, WHEN),
        (WHEN.replace(tzinfo=None), WHEN),
        ("yesterday", datetime.fromtimestamp(0, UTC)),
        (7, datetime.fromtimestamp(0, UTC)),
    ],
)
def test_when_it_first_failed_has_a_time_zone_whoever_wrote_it(written: object, understood: datetime) -> None:
    assert dead(**{header.FIRST_FAILED: written}).first_failed == understood


NAMES = st.sampled_from(["reason", "time", "count", "queue", "x", ""])
ANYTHING: st.SearchStrategy[Any] = st.recursive(
    st.sampled_from([None, True, -1, 2**70, 2.5, "", "1", "\ud800", b"\xff", WHEN, WHEN.replace(tzinfo=None)]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=2),
    max_leaves=3,
)
KNOWN = st.sampled_from(
    ["x-death", header.REASON, header.ERROR, header.ATTEMPT, header.HANDLER, header.FIRST_FAILED, header.TRACE,
     "cloudEvents_id", "cloudEvents_specversion"]
)  # fmt: skip


@given(st.dictionaries(KNOWN | NAMES, ANYTHING, max_size=5), st.binary(max_size=9), st.none() | st.text(max_size=9))
def test_whatever_is_there_can_be_looked_at(headers: dict[str, Any], body: bytes, content_type: str | None) -> None:
    letter = read(Message(headers, body, content_type), "shop")

    assert letter.body == body
    assert letter.first_failed.tzinfo is not None
    assert letter.id


def test_an_id_stays_although_looking_changes_the_brokers_counters() -> None:
    message = encode(Envelope(id="1", source="/x", type="placed.v1", time=WHEN))
    looked_at = Message({**message.headers, "x-delivery-count": 3, "x-acquired-count": 4}, message.body)

    assert read(looked_at, "shop").id == read(message, "shop").id
    assert read(Message({**message.headers, "z": 1}, message.body), "shop").id != read(message, "shop").id
    assert read(Message(message.headers, b"other"), "shop").id != read(message, "shop").id


# ── the desk ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_desk_that_is_not_open_says_so() -> None:
    dead = DeadLetters("shop", url=URL)

    with pytest.raises(SetupError, match="the desk is not open: use it inside `async with DeadLetters"):
        await dead.replay()
    with pytest.raises(SetupError, match="the desk is not open"):
        [letter async for letter in dead]


async def test_a_service_that_never_ran_has_no_dead_letters_to_look_at() -> None:
    async with DeadLetters("nobody", url=URL) as dead:
        with pytest.raises(SetupError, match=r"events\.nobody\.dead"):
            [letter async for letter in dead]


def test_a_name_that_is_none_is_refused() -> None:
    with pytest.raises(SetupError, match="service name"):
        DeadLetters("Not One", url=URL)
