"""Looking without taking part: at what waits in a queue, at what passes an exchange. On a session of its own each."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Final

import aiormq

from eventbus.errors import TransportError
from eventbus.transport.base import Delivery
from eventbus.transport.rabbitmq.acks import AckBatch
from eventbus.transport.rabbitmq.channels import ConsumingChannel, Incoming
from eventbus.transport.rabbitmq.declare import declare_view
from eventbus.transport.rabbitmq.delivery import RabbitDelivery
from eventbus.transport.rabbitmq.refusals import not_allowed
from eventbus.transport.rabbitmq.session import CLOSE_TIMEOUT_S, Lost, Session

GIVEN_BACK_A_SECOND: Final = 100  # at least, on a busy computer too
# The broker's channel passes no more on before these are applied, the others in reverse order, and those that it still
# has when it is closed in any order (quorum queues, seen on every line).
GIVEN_BACK_AT_ONCE: Final = 32
APPLIED_S: Final = 1.0
LOOK_AGAIN_S: Final = 0.01
PREFETCH: Final = 200  # how far a view may lag behind before the broker begins to drop what is oldest


class _Look:
    """What one look holds. What was settled is told to the broker at the next step, or at the end."""

    def __init__(self, session: Session, channel: ConsumingChannel, queue: str) -> None:
        self.session = session
        self.queue = queue
        self._channel = channel
        self._batch = AckBatch()
        self._held: dict[int, None] = {}  # tags of what was got and is not settled; ordered
        self._arrived: deque[RabbitDelivery] = deque()
        self._has_news = asyncio.Event()
        session.when_ended(self._has_news.set)

    def ack(self, delivery: RabbitDelivery) -> None:
        self._held.pop(delivery.tag, None)
        self._batch.ack(delivery.tag)

    def reject(self, delivery: RabbitDelivery) -> None:
        self._held.pop(delivery.tag, None)
        self._batch.reject(delivery.tag)

    async def next_in_queue(self) -> RabbitDelivery | None:
        await self._channel.settle(self._batch.take())
        incoming = await self._channel.get(self.queue)
        if incoming is None:
            return None
        self._held[incoming.tag] = None
        return RabbitDelivery(self, incoming)

    async def consume(self) -> None:
        await self._channel.consume(self.queue, self._on_arrival)

    def _on_arrival(self, incoming: Incoming) -> None:
        self._arrived.append(RabbitDelivery(self, incoming))
        self._has_news.set()

    async def next_arrival(self) -> RabbitDelivery:
        while not self._arrived:
            self._has_news.clear()
            await self._channel.settle(self._batch.take())
            if not self.session.is_live:
                raise Lost(self.session.reason)
            await self._has_news.wait()
        delivery = self._arrived.popleft()
        delivery.ack()
        return delivery

    async def end(self) -> None:
        """Tell what was settled, give back the rest."""
        # A broker that does not answer must not keep whoever wants to leave. It gets all back with the session.
        enough_s = CLOSE_TIMEOUT_S + len(self._held) / GIVEN_BACK_A_SECOND
        with contextlib.suppress(Lost, TimeoutError):
            async with asyncio.timeout(enough_s):
                await self._give_back()

    async def _give_back(self) -> None:
        await self._channel.settle(self._batch.take())
        if self._held:
            # Oldest first: what a closed channel gives back, the broker puts back in any order.
            held, waiting, is_alone = list(self._held), await self._channel.count(self.queue), True
            for start in range(0, len(held), GIVEN_BACK_AT_ONCE):
                some = held[start : start + GIVEN_BACK_AT_ONCE]
                await self._channel.give_back(some)
                waiting += len(some)
                is_alone = is_alone and await self._is_back(waiting)
        await self._channel.close()

    async def _is_back(self, messages: int) -> bool:
        """Wait until so many are in the queue; False if they do not come to that: somebody else takes them."""
        deadline_s = asyncio.get_running_loop().time() + APPLIED_S
        while await self._channel.count(self.queue) < messages:
            if asyncio.get_running_loop().time() > deadline_s:
                return False
            await asyncio.sleep(LOOK_AGAIN_S)
        return True


@contextlib.asynccontextmanager
async def browse(session: Session, queue: str) -> AsyncGenerator[AsyncIterator[Delivery], None]:
    """`Transport.browse` over *session*."""
    with _explained(session):
        look = _Look(session, await ConsumingChannel.open(session, PREFETCH), queue)
        first = await look.next_in_queue()  # at once, so that a missing queue is told at the door
    async with contextlib.aclosing(_one_by_one(look, first)) as deliveries:
        try:
            yield deliveries
        finally:
            await look.end()


async def _one_by_one(look: _Look, delivery: RabbitDelivery | None) -> AsyncGenerator[Delivery, None]:
    with _explained(look.session):
        while delivery is not None:
            yield delivery
            delivery = await look.next_in_queue()


@contextlib.asynccontextmanager
async def tail(session: Session, exchange: str, pattern: str) -> AsyncGenerator[AsyncIterator[Delivery], None]:
    """`Transport.tail` over *session*."""
    with _explained(session):
        queue = await declare_view(session, exchange, pattern)
        look = _Look(session, await ConsumingChannel.open(session, PREFETCH), queue)
        await look.consume()
    async with contextlib.aclosing(_for_ever(look)) as deliveries:
        try:
            yield deliveries
        finally:
            await look.end()


async def _for_ever(look: _Look) -> AsyncGenerator[Delivery, None]:
    with _explained(look.session):
        while True:
            yield await look.next_arrival()


@contextlib.contextmanager
def _explained(session: Session) -> Iterator[None]:
    try:
        yield
    except Lost as lost:
        if isinstance(lost.reason, aiormq.ChannelClosed):
            raise not_allowed(lost.reason, session.address.user) from lost
        raise TransportError(f"the connection to {session.address} was lost: {lost}") from lost
