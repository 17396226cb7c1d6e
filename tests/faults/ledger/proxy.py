"""A TCP proxy on the loopback that can stop forwarding: both ways, one way, or with one side gone unnoticed."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from dataclasses import dataclass, field
from typing import Literal, Self

Direction = Literal["to the broker", "from the broker"]
DIRECTIONS: tuple[Direction, ...] = ("to the broker", "from the broker")


@dataclass(eq=False)
class _Link:
    """One connection through the proxy."""

    client: asyncio.StreamWriter
    broker: asyncio.StreamWriter
    is_half_open: bool = False


@dataclass
class Proxy:
    """Forwards a port of its own to *host*:*port*; an async context manager. With *tls* its clients speak TLS to it."""

    host: str
    port: int
    own_port: int = 0
    tls: ssl.SSLContext | None = None
    _links: set[_Link] = field(default_factory=set)
    _flows: dict[Direction, asyncio.Event] = field(default_factory=dict)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def __aenter__(self) -> Self:
        for direction in DIRECTIONS:
            self._flows[direction] = asyncio.Event()
            self._flows[direction].set()
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.own_port, ssl=self.tls)
        self.own_port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def links(self) -> frozenset[object]:
        """The connections that there are now."""
        return frozenset(self._links)

    def stall(self, *directions: Direction) -> None:
        """Forward nothing that goes in *directions*, old connections and new ones alike; nobody is told."""
        for direction in directions:
            self._flows[direction].clear()

    def flow(self) -> None:
        """Forward again, what was held back first."""
        for flow in self._flows.values():
            flow.set()

    def cut(self) -> None:
        """Close every connection on both sides."""
        for link in list(self._links):
            link.client.transport.abort()
            link.broker.transport.abort()

    def leave_half_open(self) -> None:
        """Close every connection towards the broker; the client's side stays open, and silent for ever."""
        for link in list(self._links):
            link.is_half_open = True
            link.broker.transport.abort()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._link(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            from_broker, to_broker = await asyncio.open_connection(self.host, self.port)
        except OSError:
            writer.transport.abort()
            return
        link = _Link(writer, to_broker)
        self._links.add(link)
        try:
            await asyncio.gather(
                self._pump(reader, to_broker, "to the broker", link),
                self._pump(from_broker, writer, "from the broker", link),
            )
        finally:
            self._links.discard(link)
            writer.transport.abort()
            to_broker.transport.abort()

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, direction: Direction, link: _Link
    ) -> None:
        with contextlib.suppress(OSError):
            while chunk := await source.read(65536):
                await self._flows[direction].wait()
                if not link.is_half_open:
                    sink.write(chunk)
                    await sink.drain()
        if not link.is_half_open:
            sink.transport.abort()
