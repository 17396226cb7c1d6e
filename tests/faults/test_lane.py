"""A connection that dies at any byte or turns to garbage: its session ends, and settles nothing that nobody settled.

No real broker can be made to stop at a byte. This one speaks as far as sessions need it, with the client's own codec.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from pamqp import frame
from pamqp.base import Frame
from pamqp.body import ContentBody
from pamqp.commands import Basic, Channel, Confirm, Connection
from pamqp.header import ContentHeader
from pamqp.heartbeat import Heartbeat
from yarl import URL

from eventbus.errors import TransportError
from eventbus.message import Message
from eventbus.transport.base import Delivery, Publication, Source
from eventbus.transport.rabbitmq.channels import Nacked
from eventbus.transport.rabbitmq.consumer import RabbitConsumer
from eventbus.transport.rabbitmq.feed import PROBATION
from eventbus.transport.rabbitmq.frames import Malformed
from eventbus.transport.rabbitmq.lane import LanePublishing
from eventbus.transport.rabbitmq.refusals import Address
from eventbus.transport.rabbitmq.session import Lost, Session, connect
from tests.fuzz import making

TIMEOUT_S = 60.0  # on a busy computer
SERVER = {"product": "RabbitMQ", "version": "4.3.0", "capabilities": {"publisher_confirms": True, "basic.nack": True}}
PIECE = 16  # bytes of body in a frame: a broker may send less than fits


def content(channel: int, method: Frame, body: bytes, **properties: Any) -> list[bytes]:
    header = ContentHeader(body_size=len(body), properties=Basic.Properties(**properties))
    pieces = [frame.marshal(ContentBody(body[at : at + PIECE]), channel) for at in range(0, len(body), PIECE)]
    return [frame.marshal(method, channel), frame.marshal(header, channel), *pieces]


class Broker:
    """Answers one connection as RabbitMQ does, and after *lasts* bytes of what comes once all is set up, it dies."""

    def __init__(self, lasts: int | None = None, *, is_reset: bool = False) -> None:
        self._lasts = lasts
        self._is_reset = is_reset
        self._is_set_up = False
        self._writer: asyncio.StreamWriter | None = None
        self.handed_out = b""

    # ── what a kind of it does ────────────────────────────────────────────────────────────────────────────────────

    def consumes(self, channel: int) -> None:
        """Somebody consumes on *channel*."""

    def hears(self, channel: int, what: Any) -> None:
        """A frame came that is not answered here."""

    # ── what each does ────────────────────────────────────────────────────────────────────────────────────────────

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[URL]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        try:
            yield URL(f"amqp://guest:guest@127.0.0.1:{server.sockets[0].getsockname()[1]}/")
        finally:
            server.close()
            if self._writer is not None:
                self._writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._writer is not None:
            writer.transport.abort()
            return
        self._writer = writer
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            assert (await reader.readexactly(8)).startswith(b"AMQP")
            self.send(0, Connection.Start(server_properties=SERVER, mechanisms="PLAIN"))  # type: ignore[arg-type]  # a table
            while True:
                head = await reader.readexactly(7)
                rest = await reader.readexactly(int.from_bytes(head[3:], "big") + 1)
                _, channel, what = frame.unmarshal(head + rest)
                self._answer(channel, what)
        writer.close()

    def _answer(self, channel: int, what: Any) -> None:
        match what:
            case Connection.StartOk():
                self.send(0, Connection.Tune(2047, making.FRAME_MAX, 20))
            case Connection.Open():
                self.send(0, Connection.OpenOk())
            case Connection.Close():
                self.send(0, Connection.CloseOk())
            case Channel.Open():
                self.send(channel, Channel.OpenOk())
            case Channel.Close():
                self.send(channel, Channel.CloseOk())
            case Confirm.Select():
                self.send(channel, Confirm.SelectOk())
                self._is_set_up = True
            case Basic.Qos():
                self.send(channel, Basic.QosOk())
            case Basic.Cancel():
                self.send(channel, Basic.CancelOk(what.consumer_tag))
            case Basic.Consume():
                self.send(channel, Basic.ConsumeOk("ctag"))
                self._is_set_up = True
                self.consumes(channel)
            case Connection.TuneOk() | Heartbeat():
                pass
            case _:
                self.hears(channel, what)

    def send(self, channel: int, method: Frame) -> None:
        self.hand_out([frame.marshal(method, channel)])

    def hand_out(self, made: Iterable[bytes]) -> None:
        """Send, as long as this broker lasts."""
        assert self._writer is not None
        data = b"".join(made)
        if self._is_set_up:
            left = None if self._lasts is None else self._lasts - len(self.handed_out)
            data = data[:left]
            self.handed_out += data
        if not self._writer.is_closing():
            self._writer.write(data)
            if self.is_dead:
                self._die()

    def _die(self) -> None:
        assert self._writer is not None
        if self._is_reset:
            no_linger = struct.pack("ii", 1, 0)
            self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)
            self._writer.transport.abort()
        else:
            self._writer.close()

    @property
    def is_dead(self) -> bool:
        return len(self.handed_out) == self._lasts

    def frames_out(self) -> list[Any]:
        """What was sent as a whole, once all was set up."""
        read, at = [], 0
        data = self.handed_out
        while len(data) >= at + 8 and len(data) >= (stop := at + 8 + int.from_bytes(data[at + 3 : at + 7], "big")):
            read.append(frame.unmarshal(data[at:stop])[2])
            at = stop
        return read


@pytest.fixture(autouse=True)
async def nothing_is_left_behind(caplog: pytest.LogCaptureFixture) -> AsyncIterator[None]:
    """No task survives, nothing complains about a task that nobody looked at, and no log has a traceback."""
    before = asyncio.all_tasks()
    yield
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    if left:
        await asyncio.wait(left, timeout=TIMEOUT_S)
    assert all(task.done() for task in left), left
    noisy = [record for record in caplog.records if record.exc_info or record.name == "asyncio"]
    assert not noisy, [record.getMessage() for record in noisy]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110  # what is waited for happens at the other end of a socket
            await asyncio.sleep(0.001)


async def end(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def is_over(session: Session) -> None:
    """Return once *session* has ended, all of it: what is called from then on is told."""
    async with asyncio.timeout(TIMEOUT_S):
        await session.ended.wait()
        with pytest.raises(Lost):
            await session.open_probe()
        await session.close()


# ── consuming ─────────────────────────────────────────────────────────────────────────────────────────────────────────

NARROW = PROBATION  # deliveries before the channel is changed for a wide one
WIDE = 3
HELD = 2  # on the wide channel nobody settles this one, and those around it are settled
BODY = b"0123456789" * 3


class Shop(Broker):
    """Sends one delivery after the other to the first consumer, and a few at once to the second."""

    def __init__(self, lasts: int | None, *, is_reset: bool = False) -> None:
        super().__init__(lasts, is_reset=is_reset)
        self._consumers = 0
        self.sent: list[bytes] = []
        self.acked: set[tuple[int, int]] = set()  # consumer and tag

    def consumes(self, channel: int) -> None:
        self._consumers += 1
        self._deliver(channel, *([1] if self._consumers == 1 else range(1, WIDE + 1)))

    def hears(self, channel: int, what: Any) -> None:
        assert isinstance(what, Basic.Ack), what
        assert what.delivery_tag, "tag 0 acks everything"
        first = 1 if what.multiple else what.delivery_tag
        self.acked |= {(self._consumers, tag) for tag in range(first, what.delivery_tag + 1)}
        if self._consumers == 1 and what.delivery_tag < NARROW:
            self._deliver(channel, what.delivery_tag + 1)

    def _deliver(self, channel: int, *tags: int) -> None:
        made: list[bytes] = []
        for tag in tags:
            self.sent.append(b"%d %d " % (self._consumers, tag) + BODY)
            method = Basic.Deliver("ctag", tag, False, "events", "fact.v1")
            made += content(channel, method, self.sent[-1], headers={"id": str(tag)})
        self.hand_out(made)

    def whole(self) -> list[bytes]:
        """The bodies of what was delivered to the last byte."""
        bodies: list[bytes] = []
        missing = 0
        for each in self.frames_out():
            if isinstance(each, ContentHeader):
                missing = each.body_size or 0
            elif isinstance(each, ContentBody):
                missing -= len(each)
                if not missing:
                    bodies.append(self.sent[len(bodies)])
        return bodies


class Served:
    """What a consumer of one broker did until its end, and how its session ended."""

    def __init__(self, shop: Shop) -> None:
        self.shop = shop
        self.taken: list[bytes] = []
        self.settled: set[tuple[int, int]] = set()
        self.reason: BaseException | None = None
        self.before_closing = 0  # so many bytes were sent when the consumer was told to close

    def deliver(self, delivery: Delivery) -> None:
        self.taken.append(delivery.message.body)
        consumer, tag = map(int, delivery.message.body.split()[:2])
        if (consumer, tag) != (2, HELD):
            self.settled.add((consumer, tag))
            delivery.ack()


async def serve(shop: Shop) -> Served:
    """Consume until *shop* dies; if it lasts, until it has heard of all that is settled."""
    served = Served(shop)
    sessions: list[Session] = []

    async with shop.listening() as url:

        async def build(is_careful: bool) -> Session:
            sessions.append(await connect(url, "consuming", is_careful=is_careful, has_lane=True))
            return sessions[-1]

        consumer = RabbitConsumer(build, Address.of(url), [Source("work", 10, served.deliver)])
        starting = asyncio.create_task(consumer.start())

        def is_all() -> bool:
            return len(shop.acked) >= NARROW + WIDE - 1 and not shop.is_dead

        await until(lambda: bool(sessions) and (is_all() or not sessions[0].is_live))
        served.before_closing = len(shop.handed_out)
        if not sessions[0].is_live:
            served.reason = sessions[0].reason
            await is_over(sessions[0])
        await end(starting)
        async with asyncio.timeout(TIMEOUT_S):
            await consumer.close()
    assert len(sessions) == 1
    return served


async def test_a_connection_that_lasts_is_served_to_the_end() -> None:
    served = await serve(Shop(None))

    assert served.taken == served.shop.sent == served.shop.whole()
    assert served.shop.acked == served.settled
    assert len(served.settled) == NARROW + WIDE - 1
    assert served.reason is None


async def test_a_connection_that_is_closed_at_any_byte_settles_nothing_that_nobody_settled() -> None:
    whole = await serve(Shop(None))
    assert len(whole.shop.handed_out) > 500

    for lasts in range(1, len(whole.shop.handed_out)):
        served = await serve(Shop(lasts))

        assert served.shop.acked <= served.settled, lasts
        assert served.taken == served.shop.whole(), lasts
        assert (served.reason is not None) == (lasts <= whole.before_closing), lasts


async def test_a_connection_that_is_reset_at_any_byte_settles_nothing_that_nobody_settled() -> None:
    whole = await serve(Shop(None))

    for lasts in range(1, len(whole.shop.handed_out), 7):
        served = await serve(Shop(lasts, is_reset=True))

        assert served.shop.acked <= served.settled, lasts
        assert served.taken == whole.taken[: len(served.taken)], lasts
        assert len(served.taken) <= len(served.shop.whole()), lasts
        assert (served.reason is not None) == (lasts <= whole.before_closing), lasts


# ── publishing ────────────────────────────────────────────────────────────────────────────────────────────────────────

PUBLISHED = 7


class Confirming(Broker):
    """Hears `PUBLISHED` publishes, then answers all of them but the last."""

    def __init__(self, lasts: int | None = None) -> None:
        super().__init__(lasts)
        self._ids: list[str] = []

    def hears(self, channel: int, what: Any) -> None:
        if not isinstance(what, ContentHeader):
            return
        self._ids.append(what.properties.message_id or "")
        if len(self._ids) < PUBLISHED:
            return

        def returned(tag: int) -> list[bytes]:
            method = Basic.Return(312, "NO_ROUTE", "events", "fact.v1")
            return content(channel, method, b"body %d " % tag + BODY, message_id=self._ids[tag - 1])

        def confirmed(method: Frame) -> list[bytes]:
            return [frame.marshal(method, channel)]

        self.hand_out([
            *confirmed(Basic.Ack(1)), *returned(2), *confirmed(Basic.Ack(3, True)), *confirmed(Basic.Nack(4)),
            *returned(6), *confirmed(Basic.Ack(5)), *confirmed(Basic.Ack(6)),
        ])  # fmt: skip

    def told(self) -> list[bool | type[BaseException]]:
        """How each publish has to end."""
        tags = [
            (type(each), each.delivery_tag) for each in self.frames_out() if isinstance(each, Basic.Ack | Basic.Nack)
        ]
        acked = {tag for kind, tag in tags if kind is Basic.Ack} | ({2} if (Basic.Ack, 3) in tags else set())
        nacked = {tag for kind, tag in tags if kind is Basic.Nack}
        return [
            tag not in (2, 6) if tag in acked else Nacked if tag in nacked else Lost for tag in range(1, PUBLISHED + 1)
        ]


async def publish(broker: Confirming) -> list[bool | type[BaseException]]:
    """How each publish ended."""
    async with broker.listening() as url:
        session = await connect(url, "publishing", has_lane=True)
        lane = await LanePublishing.open(session)
        encoded = lane.encode(Publication("events", "fact.v1", Message({"id": "1"}, BODY)))
        deadline_s = asyncio.get_running_loop().time() + TIMEOUT_S
        publishes = [lane.publish(encoded, deadline_s) for _ in range(PUBLISHED)]
        await until(lambda: not session.is_live or all(each.done() for each in publishes[:-1]))
        session.fail(None)
        async with asyncio.timeout(TIMEOUT_S):
            ends = await asyncio.gather(*publishes, return_exceptions=True)
        await is_over(session)
    return [type(each) if isinstance(each, BaseException) else each for each in ends]


async def test_a_connection_that_is_closed_at_any_byte_confirms_what_was_confirmed() -> None:
    whole = Confirming()
    assert await publish(whole) == whole.told() == [True, False, True, Nacked, True, False, Lost]
    assert len(whole.handed_out) > 300

    for lasts in range(1, len(whole.handed_out)):
        broker = Confirming(lasts)

        assert await publish(broker) == broker.told(), lasts


# ── garbage ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Babbling(Broker):
    """Says *noise* as soon as somebody consumes, and nothing more."""

    def __init__(self, noise: Callable[[int], bytes]) -> None:
        super().__init__()
        self._noise = noise

    def consumes(self, channel: int) -> None:
        self.hand_out([self._noise(channel)])


DELIVER = Basic.Deliver("ctag", 1, False, "events", "fact.v1")


@pytest.mark.parametrize(
    "noise",
    [
        lambda channel: struct.pack(">BHI", 3, channel, making.FRAME_MAX) + b"x" * 100,  # more than fits into a frame
        lambda _: struct.pack(">BHI", 1, 0, 2**32 - 1) + b"x",
        lambda channel: making.framed(1, channel, b"\0" * 20)[:-1] + b"x",  # no end
        lambda channel: making.framed(7, channel, b"x"),  # of a type that there is not
        lambda channel: making.framed(1, channel, b"\0\x3c\0\x3c\x04ctag"),  # a deliver that is too short
        lambda channel: b"".join(content(channel, DELIVER, BODY)[:2] + content(channel, DELIVER, BODY)),
        lambda channel: b"".join(content(channel, DELIVER, BODY)[:2]) + making.framed(3, channel, b"x" * 99),
        lambda channel: frame.marshal(DELIVER, channel) + making.framed(3, channel, b"x"),
        lambda channel: frame.marshal(DELIVER, channel) + making.framed(2, channel, b"x" * 13),
        lambda _: b"HTTP/1.1 400 Bad Request\r\n\r\n",
    ],
)
async def test_garbage_ends_the_session_at_once(noise: Callable[[int], bytes]) -> None:
    served = await serve(Shop(None))
    babbling = Babbling(noise)
    taken: list[Delivery] = []

    async with babbling.listening() as url:
        session = await connect(url, "consuming", has_lane=True)
        consumer = RabbitConsumer(lambda _: ready(session), Address.of(url), [Source("work", 10, taken.append)])
        starting = asyncio.create_task(consumer.start())
        await is_over(session)
        await end(starting)
        await consumer.close()

    assert isinstance(session.reason, Malformed)
    assert not taken
    assert served.reason is None


async def never(_message: object) -> None:
    raise AssertionError("a delivery")


async def ready(session: Session) -> Session:
    return session


@pytest.mark.parametrize(
    ("greeting", "why"),
    [
        (b"AMQP\0\0\x09\x01", "not AMQP 0-9-1"),
        (b"AMQP\x03\x01\0\0", "not AMQP 0-9-1"),
        (b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n", "closed"),
        (b"", "closed"),
    ],
)
async def test_who_is_no_broker_is_told_as_without_the_lane(greeting: bytes, why: str) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(8)
        writer.write(greeting)
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    url = URL(f"amqp://guest:guest@127.0.0.1:{server.sockets[0].getsockname()[1]}/")
    told = []
    for has_lane in (True, False):
        with pytest.raises(TransportError, match=why) as caught:
            await connect(url, "a test", has_lane=has_lane)
        told.append(str(caught.value))
    server.close()

    assert told[0] == told[1]


async def test_bytes_at_random_end_the_session() -> None:
    for seed in range(30):
        noise = random.Random(seed).randbytes(2 * making.FRAME_MAX)

        async with Babbling(lambda _, noise=noise: noise).listening() as url:  # type: ignore[misc]  # a default as a closure
            session = await connect(url, "consuming", has_lane=True)
            channel = await session.open_channel()
            with contextlib.suppress(Exception):
                await channel.basic_consume("work", never)
            await is_over(session)
