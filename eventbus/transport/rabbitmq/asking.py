"""What a broker tells over AMQP alone, by passive declarations: what exists, what is ready, who consumes.

Exact and of this moment, where the management API's figures may be ten seconds old. Nothing is changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Iterable, Mapping
from dataclasses import dataclass

import aiormq
from yarl import URL

from eventbus.errors import TransportError
from eventbus.topology import Exchange, Queue
from eventbus.transport.rabbitmq.refusals import Address, not_allowed
from eventbus.transport.rabbitmq.session import Calling, Lost, Session, connect, first
from eventbus.transport.rabbitmq.verify import Standing


@dataclass(slots=True)
class Asking:
    """Asks over one session, on one channel for as long as all that it asks for exists."""

    session: Session
    _channel: aiormq.Channel | None = None

    @property
    def version(self) -> str:
        return self.session.server.version

    @property
    def cluster(self) -> str:
        """What the broker calls itself, to know it again elsewhere."""
        return self.session.server.cluster

    async def queues(self, names: Iterable[str]) -> Mapping[str, Standing]:
        """Those of *names* that exist.

        Raises:
            SetupError: it may not be asked. TransportError: the connection was lost.
        """
        asked = [(name, await self.queue(name)) for name in names]
        return {name: standing for name, standing in asked if standing is not None}

    async def queue(self, name: str) -> Standing | None:
        """How *name* stands; None if there is no such queue."""
        return await self._ask(Queue(name, {}))

    async def exchanges(self, names: Iterable[str]) -> frozenset[str]:
        """Those of *names* that exist."""
        return frozenset([name for name in names if await self._ask(Exchange(name, "topic"))])

    async def _ask(self, part: Exchange | Queue) -> Standing | None:
        try:
            if self._channel is None:
                self._channel = await self.session.open_probe()
            async with Calling(self.session, self._channel):
                if isinstance(part, Exchange):
                    await self._channel.exchange_declare(part.name, passive=True)
                    return Standing(0, 0)
                said = await self._channel.queue_declare(part.name, passive=True)
                return Standing(said.message_count or 0, said.consumer_count or 0)
        except Lost as lost:
            self._channel = None  # a refusal closes it
            if isinstance(lost.reason, aiormq.ChannelNotFoundEntity):
                return None
            if isinstance(lost.reason, aiormq.ChannelClosed):
                raise not_allowed(lost.reason, self.session.address.user) from lost
            raise TransportError(f"the connection to {self.session.address} was lost: {lost}") from lost


@contextlib.asynccontextmanager
async def asking(url: str) -> AsyncGenerator[Asking, None]:
    """A session for questions.

    Raises:
        SetupError, TransportError: nobody answers there, within 15 s, or not to us.
    """
    parsed = URL(url)
    session = await first(lambda: connect(parsed, "asking"), Address.of(parsed))
    try:
        yield Asking(session)
    finally:
        await session.close()
