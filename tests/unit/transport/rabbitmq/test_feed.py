"""One queue in one session, on channels that take their time: whatever a handler acked is told to the broker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest

from eventbus.message import Message
from eventbus.transport.base import Delivery, Source
from eventbus.transport.rabbitmq import feed as feed_module
from eventbus.transport.rabbitmq.acks import Ack, Settlement
from eventbus.transport.rabbitmq.channels import Incoming
from eventbus.transport.rabbitmq.feed import BEHIND, PROBATION, Feed

PREFETCH = 100


class Channel:
    """Brings what the test says, and waits for a turn with each settlement, as a full socket does."""

    def __init__(self, prefetch: int) -> None:
        self.bring: Callable[[Incoming], None] = lambda _: None
        self.prefetch = prefetch
        self.told: list[Settlement] = []
        self.is_consumed = self.is_cancelled = self.is_closed = False
        self.may_cancel = asyncio.Event()
        self.may_cancel.set()
        self.during_settle: Callable[[], None] = lambda: None

    async def consume(self, queue: str, deliver: Callable[[Incoming], None]) -> None:
        await asyncio.sleep(0)
        self.bring, self.is_consumed = deliver, True

    async def cancel(self) -> None:
        await self.may_cancel.wait()
        self.is_cancelled = True

    async def settle(self, batch: Sequence[Settlement]) -> None:
        assert self.is_consumed
        assert not self.is_closed
        for each in batch:
            await asyncio.sleep(0)
            self.told.append(each)
        during, self.during_settle = self.during_settle, lambda: None
        during()

    async def close(self) -> None:
        self.is_closed = True

    def is_acked(self, tag: int) -> bool:
        return any(isinstance(s, Ack) and (s.tag == tag or (s.is_multiple and s.tag > tag)) for s in self.told)


def incoming(tag: int) -> Incoming:
    return Incoming(tag, "events", "fact.v1", False, Message({}, b"%d" % tag), is_readable=True)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  # what is waited for has no event of its own
            await asyncio.sleep(0)


async def gone_wide(channels: Sequence[Channel]) -> tuple[Feed, asyncio.Task[None], list[Delivery]]:
    """A feed that is through its probation and consumes on the second of *channels*, who runs it, and what it takes."""
    session = SimpleNamespace(is_live=True, when_ended=lambda _: None, fail=pytest.fail, reason=None)
    taken: list[Delivery] = []
    feed = Feed(session, Source("q", PREFETCH, taken.append))  # type: ignore[arg-type]  # all that it asks for
    await feed.begin()
    running = asyncio.create_task(feed.run())
    await asyncio.sleep(0)
    for tag in range(1, PROBATION + 1):
        channels[0].bring(incoming(tag))
        taken.pop().ack()
    await until(lambda: len(channels) == 2 and channels[1].is_consumed)
    assert [channel.prefetch for channel in channels] == [1, PREFETCH]
    return feed, running, taken


@pytest.fixture
def channels(monkeypatch: pytest.MonkeyPatch) -> list[Channel]:
    """What the feed has opened."""
    opened: list[Channel] = []

    async def open_receiving(_session: object, prefetch: int) -> Channel:
        await asyncio.sleep(0)
        opened.append(Channel(prefetch))
        return opened[-1]

    monkeypatch.setattr(feed_module, "open_receiving", open_receiving)
    return opened


def all_but_one(channel: Channel, taken: list[Delivery]) -> Delivery:
    """Have *channel* bring what makes a feed move on, and settle it but for the first; that one."""
    del taken[:]
    for tag in range(1, BEHIND + 2):
        channel.bring(incoming(tag))
    slow, *fast = taken
    for delivery in fast:
        delivery.ack()
    return slow


async def feed_ends(feed: Feed, running: asyncio.Task[None]) -> None:
    """Have *feed* settle what is acked, close its channels and end."""
    feed.finish()
    await running


async def test_what_ends_while_its_left_channel_is_settled_is_acked_before_that_is_closed(
    channels: list[Channel],
) -> None:
    feed, running, taken = await gone_wide(channels)
    wide = channels[1]
    wide.bring(incoming(BEHIND + 2))
    last = taken.pop()
    slow = all_but_one(wide, taken)

    await until(lambda: wide.is_cancelled and channels[2].is_consumed)  # it has moved on
    assert not wide.is_closed
    wide.during_settle = slow.ack
    last.ack()  # what is settled when the slow one ends
    await until(lambda: wide.is_closed)
    await feed_ends(feed, running)

    assert all(wide.is_acked(tag) for tag in range(1, BEHIND + 3))


async def test_behind_a_second_slow_one_a_channel_is_open_already(channels: list[Channel]) -> None:
    feed, running, taken = await gone_wide(channels)
    all_but_one(channels[1], taken)
    await until(lambda: len(channels) == 4)
    assert [channel.is_consumed for channel in channels] == [True, True, True, False]

    all_but_one(channels[2], taken)
    await until(lambda: channels[2].is_cancelled and channels[3].is_consumed)
    assert channels[3].prefetch == PREFETCH

    await feed_ends(feed, running)


async def test_a_channel_that_may_still_bring_something_is_not_closed_though_all_on_it_is_settled(
    channels: list[Channel],
) -> None:
    feed, running, taken = await gone_wide(channels)
    wide = channels[1]
    wide.may_cancel.clear()
    slow = all_but_one(wide, taken)
    await until(lambda: len(channels) == 3 and channels[2].is_consumed)

    slow.ack()
    await until(lambda: wide.is_acked(1))
    wide.bring(incoming(BEHIND + 2))  # sent before the broker heard of the cancel
    taken[-1].ack()
    await until(lambda: wide.is_acked(BEHIND + 2))
    assert not wide.is_closed

    wide.may_cancel.set()
    await until(lambda: wide.is_closed)
    await feed_ends(feed, running)


async def test_what_is_stopped_while_it_moves_on_takes_nothing_more_from_either_channel(
    channels: list[Channel],
) -> None:
    feed, running, taken = await gone_wide(channels)
    channels[1].may_cancel.clear()
    slow = all_but_one(channels[1], taken)
    await until(lambda: len(channels) == 3 and channels[2].is_consumed)

    stopping = asyncio.create_task(feed.stop())
    await asyncio.sleep(0)
    channels[1].may_cancel.set()
    await stopping

    assert channels[1].is_cancelled
    assert channels[2].is_cancelled
    slow.ack()
    await feed_ends(feed, running)
    assert channels[1].is_acked(1)


async def test_handlers_that_all_take_their_time_are_no_reason_to_move_on(channels: list[Channel]) -> None:
    feed, running, taken = await gone_wide(channels)
    wide, slow = channels[1], PREFETCH // 4

    for tag in range(1, slow + BEHIND + 2):
        wide.bring(incoming(tag))
    for delivery in taken[slow:]:
        delivery.ack()
    await until(lambda: wide.is_acked(slow + BEHIND + 1))
    assert len(channels) == 2

    taken[0].ack()  # the oldest: how long they wait is counted from the next one on
    await until(lambda: wide.is_acked(1))
    wide.bring(incoming(slow + BEHIND + 2))
    taken[-1].ack()
    await until(lambda: wide.is_acked(slow + BEHIND + 2))
    assert len(channels) == 2

    await feed_ends(feed, running)


async def test_what_is_being_opened_to_move_on_to_ends_with_the_feed(
    channels: list[Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    feed, running, taken = await gone_wide(channels)
    wide, opening = channels[1], list[str]()

    async def open_receiving(_session: object, _prefetch: int) -> Channel:
        opening.append("begun")
        try:
            await asyncio.Event().wait()
        finally:
            opening.append("ended")
        raise AssertionError

    monkeypatch.setattr(feed_module, "open_receiving", open_receiving)

    all_but_one(wide, taken)
    await until(lambda: opening == ["begun"])
    wide.bring(incoming(BEHIND + 2))  # it still brings, and what it brings is settled, while the next one is opened
    taken[-1].ack()
    await until(lambda: wide.is_acked(BEHIND + 2))
    assert not wide.is_cancelled

    await feed_ends(feed, running)
    assert opening == ["begun", "ended"]
    assert wide.is_closed
