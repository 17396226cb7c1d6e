"""RabbitMQ, from 3.10 on, over AMQP 0-9-1: the transport for `amqp://` and `amqps://`.

Imported only where such a URL is used: `import eventbus` loads no driver.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager

from yarl import URL

from eventbus.errors import SetupError, TransportError, hide_password
from eventbus.topology import Topology
from eventbus.transport.base import Broker, Declare, Delivery, NotPublished, Publication, Source
from eventbus.transport.rabbitmq.consumer import RabbitConsumer
from eventbus.transport.rabbitmq.declare import declare as declare_topology
from eventbus.transport.rabbitmq.looking import browse, tail
from eventbus.transport.rabbitmq.publisher import Publisher
from eventbus.transport.rabbitmq.refusals import Address
from eventbus.transport.rabbitmq.session import Session, connect, first

__all__ = ["RabbitMQ"]


class RabbitMQ:
    """The `Transport` to one RabbitMQ.

    *max_message_bytes*: the broker's `max_message_size` where it is configured; its line's default if left out.
    *has_lane*: events in our own frames instead of through the client, several times faster.
    *window*: how many publishes may be unconfirmed at a time; more wait, within their deadline.
    """

    def __init__(
        self, url: str, *, max_message_bytes: int | None = None, window: int = 1000, has_lane: bool = True
    ) -> None:
        self._url = _parsed(url)
        self._address = Address.of(self._url)
        self._max_message_bytes = max_message_bytes
        self._window = window
        self._has_lane = has_lane
        self._publisher: Publisher | None = None
        self._broker: Broker | None = None
        self._looks: set[Session] = set()

    @property
    def broker(self) -> Broker:
        if self._broker is None:
            raise RuntimeError("who answers is known only after open()")
        return self._broker

    async def open(self, topology: Topology, declare: Declare) -> None:
        publisher = Publisher(
            lambda: self._session("publishing", topology, declare, is_publishing=True),
            self._address,
            max_message_bytes=self._max_message_bytes,
            window=self._window,
        )
        server = (await publisher.open()).server
        self._publisher = publisher
        self._broker = Broker(
            product=server.product,
            version=server.version,
            host=self._address.host,
            port=self._address.port,
            max_message_bytes=publisher.max_message_bytes,
        )

    def publish(self, publication: Publication, *, timeout_s: float) -> Coroutine[None, None, bool]:
        if self._publisher is None:
            raise NotPublished("the transport was never opened", maybe_stored=False)
        return self._publisher.publish(publication, timeout_s=timeout_s)

    def obstacle(self) -> str | None:
        return "the transport was never opened" if self._publisher is None else self._publisher.obstacle()

    def consumer(self, sources: Sequence[Source], topology: Topology, declare: Declare) -> RabbitConsumer:
        purpose = "consuming " + ", ".join(source.queue for source in sources)

        async def build(is_careful: bool) -> Session:
            return await self._session(purpose, topology, declare, is_careful=is_careful)

        return RabbitConsumer(build, self._address, sources)

    @asynccontextmanager
    async def browse(self, queue: str) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        async with self._look(f"browsing {queue}") as session, browse(session, queue) as deliveries:
            yield deliveries

    @asynccontextmanager
    async def tail(self, exchange: str, pattern: str) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        async with self._look(f"tailing {exchange}") as session, tail(session, exchange, pattern) as deliveries:
            yield deliveries

    async def close(self) -> None:
        for session in self._looks:
            session.fail(None)  # each closes its own
        if self._publisher is not None:
            await self._publisher.close()

    async def _session(
        self,
        purpose: str,
        topology: Topology,
        declare: Declare,
        *,
        is_careful: bool = False,
        is_publishing: bool = False,
    ) -> Session:
        session = await connect(
            self._url, purpose, is_careful=is_careful, is_publishing=is_publishing, has_lane=self._has_lane
        )
        try:
            await declare_topology(session, topology, declare)
        except BaseException:
            await session.close()
            raise
        return session

    @asynccontextmanager
    async def _look(self, purpose: str) -> AsyncGenerator[Session, None]:
        if self._publisher is None or self._publisher.is_closed:
            raise TransportError("the transport is closed, or was never opened: open it first")
        session = await first(lambda: connect(self._url, purpose, is_careful=True), self._address)
        self._looks.add(session)
        try:
            yield session
        finally:
            self._looks.discard(session)
            await session.close()


def _parsed(url: str) -> URL:
    shown = hide_password(url)
    try:
        parsed = URL(url)
        port = parsed.port
    except ValueError:  # its text is left out: it may quote a part of the password
        raise SetupError(
            f"{shown} is no URL: use amqp://USER:PASSWORD@HOST:5672/VHOST, with '@', '/', ':' and '#' in a password "
            "written as %40, %2F, %3A and %23"
        ) from None
    if parsed.scheme not in ("amqp", "amqps") or not parsed.host:
        raise SetupError(f"{shown} is no URL of a RabbitMQ: use amqp://USER:PASSWORD@HOST:5672/VHOST, or amqps://")
    if parsed.query.get("no_verify_ssl", "0") != "0":
        raise SetupError(f"{shown} turns certificate checks off: give the broker's authority with ?cafile=PATH")
    return parsed if port else parsed.with_port(5671 if parsed.scheme == "amqps" else 5672)
