"""One queue in one session: what comes from it, and where that is settled.

Probation: a session begins with one delivery at a time, so that a message that kills the process takes no innocent
neighbours' delivery counts with it. It goes wide once a few came through, and what comes back too often runs alone.
Moving on: behind a handler that takes long every ack is one of its own, which costs the broker as much as a publish. So
its channel is left to it, and what comes next comes on a fresh one.
Handlers never run here: `deliver` only takes a delivery in.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import Final

from eventbus.transport.base import Source
from eventbus.transport.rabbitmq.acks import AckBatch
from eventbus.transport.rabbitmq.channels import Incoming
from eventbus.transport.rabbitmq.delivery import RabbitDelivery
from eventbus.transport.rabbitmq.session import CLOSE_TIMEOUT_S, Lost, Session, log
from eventbus.transport.rabbitmq.way import Receiving, open_receiving

PROBATION: Final = 3  # deliveries of a queue that must come through before it goes wide
SUSPICIOUS_COUNT: Final = 3  # handed out this often before: it may be what ended those sessions
# Settled behind a slow one before a fresh channel is worth its round trips; and how many channels may be left so.
BEHIND: Final = 100
MOST_LEFT: Final = 32


class _Stretch:
    """What one channel brought, and where that is settled."""

    def __init__(self, feed: Feed, channel: Receiving) -> None:
        self.queue, self.session = feed.queue, feed.session
        self.channel = channel
        self.batch = AckBatch()
        self.unsettled = 0
        # The fewest unsettled since its settlements were last sent: what has just come is no sign of slowness.
        self.fewest = feed.prefetch
        self.is_cancelled = False  # and brings nothing more
        self._feed = feed

    def take(self, incoming: Incoming) -> None:
        self._feed.take(incoming, self)

    def ack(self, delivery: RabbitDelivery) -> None:
        self.batch.ack(delivery.tag)
        self._settled(delivery)

    def reject(self, delivery: RabbitDelivery) -> None:
        self.batch.reject(delivery.tag)
        self._settled(delivery)

    def _settled(self, delivery: RabbitDelivery) -> None:
        self.unsettled -= 1
        if self.unsettled < self.fewest:
            self.fewest = self.unsettled
        self._feed.settled(delivery)


class Feed:
    """One queue in one session. Only `run` talks to the broker; everything else leaves it notes and wakes it."""

    def __init__(self, session: Session, source: Source) -> None:
        self.session = session
        self.queue, self.prefetch = source.queue, source.prefetch
        self._source = source
        self._stretch: _Stretch | None = None
        self._left: list[_Stretch] = []  # each with a slow handler
        self._moving: asyncio.Task[None] | None = None
        self._spare: Receiving | None = None  # to move on to: where one handler was slow others will be
        self._closing = set[asyncio.Task[None]]()  # channels that were left, and are settled
        self._unsettled = 0  # of all channels, but for what is held
        self._calm = 0  # how many in a row came through without suspicion
        self._is_wide = False
        self._is_turning = False  # narrow to wide or back: nothing more is taken from this channel
        self._is_stopping = False
        self._is_closing = False
        # What comes before `run` does waits: who stops the consumer meanwhile knows nothing of this session yet.
        self._early: list[tuple[Incoming, _Stretch]] | None = []
        self._held: deque[RabbitDelivery] = deque()  # suspicious ones that wait to be alone
        self._wake = asyncio.Event()
        self._has_stopped = asyncio.Event()
        session.when_ended(self._wake.set)

    async def begin(self) -> None:
        """Consume, on a fresh channel: cancel and consume on one channel breaks on 3.10.8 (rabbitmq-server #5927).

        Raises:
            Lost: the session died, or the broker refused.
        """
        prefetch = self.prefetch if self._is_wide else 1
        self._stretch = stretch = _Stretch(self, await open_receiving(self.session, prefetch))
        self._calm = 0
        await stretch.channel.consume(self.queue, stretch.take)

    # ── notes ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def take(self, incoming: Incoming, stretch: _Stretch) -> None:
        if self._early is not None:
            self._early.append((incoming, stretch))
            return
        if self._is_stopping or not self.session.is_live:
            return  # in flight when the consumer was cancelled: not taken, and given back with the channel
        delivery = RabbitDelivery(stretch, incoming)
        stretch.unsettled += 1
        is_suspicious = delivery.count >= SUSPICIOUS_COUNT
        if self._is_wide and is_suspicious:
            self._held.append(delivery)
            self._turn()
        else:
            if not self._is_wide and not is_suspicious and self._calm >= PROBATION - 1:
                # The last narrow one. Cancelled now, while it fills the window of 1, the channel brings nothing more
                # that closing it would have to give back.
                self._turn()
            self._hand_over(delivery, is_readable=incoming.is_readable)

    def _turn(self) -> None:
        self._is_turning = True
        self._wake.set()

    def _hand_over(self, delivery: RabbitDelivery, *, is_readable: bool = True) -> None:
        self._unsettled += 1
        if not is_readable:
            log.error("headers that cannot be read: rejected", extra={"queue": self.queue, "key": delivery.key})
            delivery.reject()
            return
        try:
            self._source.deliver(delivery)
        except Exception as error:  # noqa: BLE001  # whatever it is, the message must not wait here for ever
            log.exception("a delivery was not taken in", extra={"queue": self.queue})
            self.session.fail(error)

    def settled(self, delivery: RabbitDelivery) -> None:
        self._unsettled -= 1
        self._calm = 0 if delivery.count >= SUSPICIOUS_COUNT else self._calm + 1
        self._wake.set()

    async def stop(self) -> None:
        """Take nothing more; what was delivered can still be settled."""
        self._is_stopping = True
        self._wake.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._has_stopped.wait()

    def finish(self) -> None:
        """Have `run` send what is settled, close the channel and return."""
        self._is_stopping = self._is_closing = True
        self._wake.set()

    # ── the one that talks ────────────────────────────────────────────────────────────────────────────────────────

    async def run(self) -> None:
        """Carry the notes to the broker until the session ends or `finish` is called."""
        early, self._early = self._early or [], None
        for incoming, stretch in early:
            self.take(incoming, stretch)
        try:
            while not self._is_closing and self.session.is_live:
                await self._carry()
                await self._wake.wait()
                self._wake.clear()
            await self._close_all()
        except Lost as lost:
            self.session.fail(lost.reason)
        except Exception as error:  # noqa: BLE001  # a bug of ours: it must not be a consumer for whom nobody settles
            log.exception("a queue was not served to the end", extra={"queue": self.queue})
            self.session.fail(error)
        finally:
            self._has_stopped.set()
            beside = [*self._closing, *([self._moving] if self._moving else [])]
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)

    async def _carry(self) -> None:
        is_taking = not (self._is_stopping or self._is_turning)
        if self._moving is not None and (self._moving.done() or not is_taking):
            await self._moving
            self._moving = None
        stretch = self._stretch
        assert stretch is not None
        if not is_taking:
            await stretch.channel.cancel()  # as in `_close_all`
        await stretch.channel.settle(stretch.batch.take())
        fewest, stretch.fewest = stretch.fewest, stretch.unsettled
        if self._is_stopping:
            self._has_stopped.set()
        elif self._is_turning and self._unsettled == 0:
            await self._go_on()
        elif is_taking and stretch.batch.waited >= BEHIND and self._moving is None and self._may_leave(fewest):
            # Beside: while a call waits for its answer nothing is settled here, and soon nothing more comes.
            self._moving = asyncio.create_task(self._move_on(stretch), name=f"eventbus moving on in {self.queue}")
        for left in list(self._left):
            # Asked before: what is settled while this batch is sent is in the next one.
            is_over = left.is_cancelled and not left.unsettled
            await left.channel.settle(left.batch.take())
            if is_over:
                self._left.remove(left)
                closing = asyncio.create_task(self._close_beside(left), name=f"eventbus closing in {self.queue}")
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)

    async def _go_on(self) -> None:
        """The channel is cancelled and everything on it settled, but what is held."""
        if self._held:
            self._hand_over(self._held.popleft())
        else:
            await self._close_all()
            self._is_wide, self._is_turning = not self._is_wide, False
            await self.begin()

    def _may_leave(self, unsettled: int) -> bool:
        # The prefetch bounds what one channel brings: with those that were left it must not come to much more.
        unsettled += sum(left.unsettled for left in self._left)
        return len(self._left) < MOST_LEFT and unsettled * 4 < self.prefetch

    async def _move_on(self, stretch: _Stretch) -> None:
        """Leave *stretch* to its slow handler; what it brought is settled there."""
        try:
            channel = self._spare or await open_receiving(self.session, self.prefetch)
            self._spare = None
            self._left.append(stretch)
            self._stretch = fresh = _Stretch(self, channel)
            await asyncio.gather(stretch.channel.cancel(), fresh.channel.consume(self.queue, fresh.take))
            stretch.is_cancelled = True
            self._spare = await open_receiving(self.session, self.prefetch)
        finally:
            self._wake.set()

    async def _close_beside(self, left: _Stretch) -> None:
        try:
            await left.channel.close()
        except Lost as lost:
            self.session.fail(lost.reason)

    async def _close_all(self) -> None:
        stretches = [*self._left, *([self._stretch] if self._stretch else [])]
        self._left, self._stretch = [], None
        for stretch in stretches:
            if self.session.is_live:
                await stretch.channel.cancel()  # before anything is settled, which would make room for more
                await stretch.channel.settle(stretch.batch.take())
                await stretch.channel.close()
