"""One queue in one session, on channels that take their time: whatever a handler acked is told to the broker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest

from eventbus.message import Message
from eventbus.transport.base import Delivery, Source
from eventbus.transport.rabbitmq import consumer
from eventbus.transport.rabbitmq.acks import Ack, Settlement
from eventbus.transport.rabbitmq.channels import Incoming
from eventbus.transport.rabbitmq.consumer import BEHIND, PROBATION


class Channel:
    """Brings what the test says, and waits for a turn with each settlement, as a full socket does."""

    def __init__(self) -> None:
        self.bring: Callable[[Incoming], None] = lambda _: None
        self.prefetch = 0
        self.told: list[Settlement] = []
        self.is_cancelled = self.is_closed = False
        self.during_settle: Callable[[], None] = lambda: None

    async def consume(self, queue: str, prefetch: int, deliver: Callable[[Incoming], None]) -> None:
        self.bring, self.prefetch = deliver, prefetch

    async def cancel(self) -> None:
        await asyncio.sleep(0)
        self.is_cancelled = True

    async def settle(self, batch: Sequence[Settlement]) -> None:
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


async def gone_wide(channels: Sequence[Channel]) -> tuple[consumer._Feed, asyncio.Task[None], list[Delivery]]:
    """A feed that is through its probation and consumes on the second of *channels*, who runs it, and what it takes."""
    session = SimpleNamespace(is_live=True, when_ended=lambda _: None, fail=pytest.fail, reason=None)
    taken: list[Delivery] = []
    feed = consumer._Feed(session, Source("q", 100, taken.append))  # type: ignore[arg-type]  # all that it asks for
    await feed.begin()
    running = asyncio.create_task(feed.run())
    await asyncio.sleep(0)
    for tag in range(1, PROBATION + 1):
        channels[0].bring(incoming(tag))
        taken.pop().ack()
    await until(lambda: len(channels) == 2)
    return feed, running, taken


async def test_what_ends_while_its_left_channel_is_settled_is_acked_before_that_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    channels: list[Channel] = []

    async def open_receiving(_session: object) -> Channel:
        channels.append(Channel())
        return channels[-1]

    monkeypatch.setattr(consumer, "open_receiving", open_receiving)
    feed, running, taken = await gone_wide(channels)
    wide = channels[1]
    assert wide.prefetch == 100
    for tag in range(1, BEHIND + 3):
        wide.bring(incoming(tag))
    slow, *fast, last = taken
    for delivery in fast:
        delivery.ack()
    await until(lambda: wide.is_cancelled)  # it has moved on
    assert len(channels) == 3
    await until(lambda: channels[2].prefetch == 100)
    assert not wide.is_closed
    wide.during_settle = slow.ack
    last.ack()  # what is settled when the slow one ends
    await until(lambda: wide.is_closed)
    feed.finish()
    await running

    assert all(wide.is_acked(tag) for tag in range(1, BEHIND + 3))


async def test_what_is_being_opened_to_move_on_to_ends_with_the_feed(monkeypatch: pytest.MonkeyPatch) -> None:
    channels: list[Channel] = []
    ended: list[str] = []

    async def open_receiving(_session: object) -> Channel:
        if len(channels) == 2:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append("opening")
        channels.append(Channel())
        return channels[-1]

    monkeypatch.setattr(consumer, "open_receiving", open_receiving)
    feed, running, taken = await gone_wide(channels)
    wide = channels[1]

    for tag in range(1, BEHIND + 2):
        wide.bring(incoming(tag))
    for delivery in taken[1:]:
        delivery.ack()
    await until(lambda: feed._next is not None)
    wide.bring(incoming(BEHIND + 2))  # it still brings, and what it brings is settled, while the next one is opened
    taken[-1].ack()
    await until(lambda: wide.is_acked(BEHIND + 2))
    assert not wide.is_cancelled

    feed.finish()
    await running
    await until(lambda: bool(ended))
    assert wide.is_closed
