"""What the transport's suite is written with: an adapter, a bench to open transports on, an inbox to wait for.

The one place for both: the files beside this one ask for `bench` and never for a broker.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import quote, urlsplit

from eventbus.delay import way
from eventbus.message import Message
from eventbus.topology import (
    ArgumentValue,
    Binding,
    Exchange,
    Names,
    Queue,
    Topology,
    merge,
    of_service,
    quorum,
    shared,
)
from eventbus.transport import from_url
from eventbus.transport.base import Consumer, Declare, Delivery, Publication, Source, Transport
from tests.faults.ledger.proxy import Proxy
from tests.servers import BrokerServer, vhost_of

DEADLINE_S = 60  # for what takes milliseconds on an idle computer: only a failure waits for it
CAREFUL = 10  # more deliveries than any adapter wants to see settled before it takes many at a time
WARM_UP = b"warm up"
NAMES = Names()
EMPTY = Topology(())
MAIL = merge([shared(NAMES), of_service(NAMES, "mail", ["order_placed.*"])])
AUDIT = of_service(NAMES, "audit", ["#"])


# ── adapters ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Adapter:
    """One way to keep the port's promises. *lacks*: what it cannot do, and the contract does not promise everywhere."""

    name: str
    line: str | None
    lacks: frozenset[str] = frozenset()
    has_lane: bool = False


KEEPS = "keeps messages when nobody is connected"
LOSES_PARTS = "a connection, a channel or a queue of it can be lost alone"
SEES_BINDINGS = "finds a missing binding when it verifies"
COMPARES_SHARED = "compares the arguments of shared queues and exchanges"
SEES_A_NEW_QUEUE = "notices that a consumed queue was deleted and created again at once"
ORDER = "competing consumers see a queue's order"
# A log's: no adapter has it, and no case asks for it. What is promised instead is that nothing acked is seen again.
HISTORY = "a new consumer sees what others have acked before"


def adapters(lines: Iterable[str]) -> list[Adapter]:
    """The embedded broker and RabbitMQ's *lines*, each in both ways that events can take."""
    # AMQP cannot list bindings, and looking at something without declaring it compares nothing.
    rabbitmq = frozenset({SEES_BINDINGS, COMPARES_SHARED, ORDER, HISTORY})
    # Tried on 3.10.8: it moves the consumer over instead of cancelling it, hands it messages that never leave the
    # broker, and says nothing until the ack timeout half an hour later. 4.0 and 4.3 cancel it.
    before_4 = rabbitmq | {SEES_A_NEW_QUEUE}
    return [
        Adapter("memory", None, frozenset({KEEPS, LOSES_PARTS, SEES_A_NEW_QUEUE, HISTORY})),
        *(
            Adapter(name, line, before_4 if line.startswith("3.") else rabbitmq, has_lane)
            for line in lines
            for name, has_lane in ((f"rabbitmq {line}", False), (f"rabbitmq {line} on the lane", True))
        ),
    ]


# ── what a test holds in hand ────────────────────────────────────────────────────────────────────────────────────────


class Inbox:
    """What a consumer was handed."""

    def __init__(self) -> None:
        self.deliveries: list[Delivery] = []
        self._has_news = asyncio.Event()

    def __call__(self, delivery: Delivery) -> None:
        self.deliveries.append(delivery)
        self._has_news.set()

    @property
    def bodies(self) -> list[bytes]:
        return [delivery.message.body for delivery in self.deliveries]

    @property
    def tally(self) -> Counter[bytes]:
        """How often each body came. Equal to another tally: nothing is missing, and nothing came twice."""
        return Counter(self.bodies)

    async def holds(self, count: int) -> list[Delivery]:
        """At least *count* deliveries, in the order of their arrival."""
        while len(self.deliveries) < count:
            await self._news()
        return self.deliveries

    async def has_seen(self, bodies: Iterable[bytes]) -> None:
        """Return once each of *bodies* came, however often."""
        wanted, checked = set(bodies), 0
        while True:
            wanted.difference_update(delivery.message.body for delivery in self.deliveries[checked:])
            checked = len(self.deliveries)
            if not wanted:
                return
            await self._news()

    async def _news(self) -> None:
        self._has_news.clear()
        async with asyncio.timeout(DEADLINE_S):  # each time anew: ten thousand may take long on a busy computer
            await self._has_news.wait()


def acking(*inboxes: Inbox) -> Callable[[Delivery], None]:
    """Acks what it gets at once, and puts it into each of *inboxes*."""

    def deliver(delivery: Delivery) -> None:
        delivery.ack()
        for inbox in inboxes:
            inbox(delivery)

    return deliver


class Bench:
    """Transports and consumers on one broker, ended together. *server*: the RabbitMQ behind it, if it is one."""

    def __init__(
        self, url: str, server: BrokerServer | None, ending: AsyncExitStack, *, has_lane: bool = False
    ) -> None:
        self.url = url
        self._has_lane = has_lane
        self._server = server
        self._ending = ending

    # ── transports ────────────────────────────────────────────────────────────────────────────────

    async def open(self, *topologies: Topology, declare: Declare = "apply", url: str | None = None) -> Transport:
        transport = from_url(url or self.url, has_lane=self._has_lane)
        self._ending.push_async_callback(transport.close)
        await transport.open(merge(topologies), declare)
        return transport

    async def open_with_room_for(self, messages: int) -> Transport:
        """A transport to a queue `q` that refuses to hold many more than this, where the exchange `x` leads by `q`."""
        if self._server is None:
            return await self.open(queue_of("q"), url=f"{self.url}?max_messages={messages}")
        bounds: dict[str, ArgumentValue] = {"x-max-length": messages, "x-overflow": "reject-publish"}
        return await self.open(queue_of("q", quorum(bounds)))

    # ── consumers ─────────────────────────────────────────────────────────────────────────────────

    def consumer(
        self,
        transport: Transport,
        *queues: str,
        deliver: Callable[[Delivery], None],
        prefetch: int = 100,
        topology: Topology = EMPTY,
    ) -> Consumer:
        """A consumer that was not started yet."""
        consumer = transport.consumer([Source(queue, prefetch, deliver) for queue in queues], topology, "apply")
        self._ending.push_async_callback(consumer.close)
        return consumer

    async def consume(
        self,
        transport: Transport,
        *queues: str,
        prefetch: int = 100,
        deliver: Callable[[Delivery], None] | None = None,
        topology: Topology = EMPTY,
    ) -> tuple[Consumer, Inbox]:
        """A consumer that keeps what it gets in the inbox, unless *deliver* does something else with it.

        An adapter may begin carefully: the first deliveries may come one at a time, each after the last was settled.
        """
        inbox = Inbox()
        consumer = self.consumer(transport, *queues, deliver=deliver or inbox, prefetch=prefetch, topology=topology)
        await consumer.start()
        return consumer, inbox

    async def consume_and_ack(self, transport: Transport, *queues: str, prefetch: int = 100) -> tuple[Consumer, Inbox]:
        """A consumer that acks what it gets at once."""
        inbox = Inbox()
        consumer, _ = await self.consume(transport, *queues, prefetch=prefetch, deliver=acking(inbox))
        return consumer, inbox

    async def consume_widely(
        self, transport: Transport, *queues: str, prefetch: int = 100, on: Transport | None = None
    ) -> tuple[Consumer, Inbox]:
        """A consumer of empty queues that is past its careful beginning; *on* another transport, if that is given."""
        careful, inbox = Inbox(), Inbox()

        def deliver(delivery: Delivery) -> None:
            if delivery.message.body != WARM_UP:
                inbox(delivery)
                return
            delivery.ack()
            careful(delivery)

        consumer, _ = await self.consume(on or transport, *queues, prefetch=prefetch, deliver=deliver)
        warm_up = [say(WARM_UP, queue, exchange="") for queue in queues for _ in range(CAREFUL)]
        assert all(await publish(transport, warm_up))
        await careful.holds(len(warm_up))
        return consumer, inbox

    # ── what breaks: only where parts can be lost alone ───────────────────────────────────────────

    async def proxy(self) -> tuple[Proxy, str]:
        """A proxy in front of the broker, and the URL that leads through it. Silence is noticed within seconds."""
        parts = urlsplit(self.url)
        proxy = await self._ending.enter_async_context(Proxy(parts.hostname or "127.0.0.1", parts.port or 5672))
        login = f"{parts.username}:{parts.password}"
        return proxy, parts._replace(netloc=f"{login}@127.0.0.1:{proxy.own_port}", query="heartbeat=2").geturl()

    async def delete_queue(self, queue: str) -> None:
        await self.api("DELETE", queue)

    async def api(self, method: str, queue: str, body: dict[str, object] | None = None) -> object:
        """What the broker's own tools say about *queue*, or do to it."""
        assert self._server is not None, "only where parts can be lost alone"
        path = f"/queues/{quote(vhost_of(self.url), safe='')}/{quote(queue, safe='')}"
        return await asyncio.to_thread(self._server.api, method, path, body)


# ── messages ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def queue_of(
    name: str, arguments: Mapping[str, ArgumentValue] | None = None, *, key: str | None = None, is_shared: bool = False
) -> Topology:
    """A quorum queue that the exchange `x` leads to by *key*, or else by the queue's name."""
    queue = Queue(name, arguments or quorum(delivery_limit=100), is_shared)
    return Topology((Exchange("x", "topic"),), (queue,), (Binding("x", name, "queue", key or name),))


def say(body: str | bytes = b"", key: str = "q", exchange: str = "x") -> Publication:
    return Publication(exchange, key, Message({}, body.encode() if isinstance(body, str) else body))


def say_all(bodies: Iterable[bytes], key: str = "q") -> list[Publication]:
    return [say(body, key) for body in bodies]


def numbered(count: int, what: str = "") -> list[bytes]:
    """*count* different bodies."""
    return [f"{what}{number}".encode() for number in range(count)]


async def publish(transport: Transport, publications: Sequence[Publication]) -> list[bool]:
    """All at once; whether each was taken by a queue."""
    return await asyncio.gather(*[transport.publish(each, timeout_s=DEADLINE_S) for each in publications])


async def publish_by(publishers: int, transport: Transport, publications: Sequence[Publication]) -> None:
    """By so many publishers at the same time, each one message after the other; all must be taken by a queue."""

    async def work(mine: Sequence[Publication]) -> None:
        for each in mine:
            assert await transport.publish(each, timeout_s=DEADLINE_S)

    async with asyncio.TaskGroup() as at_work:
        for number in range(publishers):
            at_work.create_task(work(publications[number::publishers]))


def later(delay: timedelta, target: str, body: str | bytes) -> Publication:
    """*body* for *target* after *delay*, through the delay tree."""
    through = way(delay, target)
    return say(body, through.key, NAMES.delay_level(through.level))


async def content(transport: Transport, queue: str, count: int) -> list[Delivery]:
    """All of *queue*, once *count* messages wait there, and left there."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            found = await look(transport, queue)
            if len(found) >= count:
                return found
            await asyncio.sleep(0.02)


async def look(transport: Transport, queue: str) -> list[Delivery]:
    """All of *queue* now, and left there."""
    async with transport.browse(queue) as browsed:
        return [delivery async for delivery in browsed]
