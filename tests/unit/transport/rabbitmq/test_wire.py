"""A header frame that the client cannot read becomes one of the same length that it can; and why a broker blocks."""

from __future__ import annotations

import asyncio
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp.commands import Basic, Connection
from pamqp.frame import marshal
from pamqp.header import ContentHeader
from yarl import URL

from eventbus.transport.rabbitmq.wire import UNREADABLE_DELIVERY_MODE, Wire, _Frames, readable, with_readable_key

HEADERS = 0x2000


def frame(flags: int, properties: bytes) -> bytes:
    return struct.pack(">HHQH", 60, 0, 77, flags) + properties


def table(content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + content


def read(header: bytes) -> ContentHeader:
    content = ContentHeader()
    content.unmarshal(header)
    return content


UNREADABLE = [
    frame(HEADERS, table(b"\x01aT" + (2**60).to_bytes(8, "big"))),  # a timestamp of the year 36,536,598
    frame(HEADERS, table(b"\x02\xff\xfeV")),  # a name that is no UTF-8
    frame(HEADERS, table(b"\x01a?")),  # a type that nobody knows
]


@pytest.mark.parametrize("header", UNREADABLE)
def test_an_unreadable_header_is_marked_and_keeps_its_length_and_its_bodys_size(header: bytes) -> None:
    with pytest.raises(ValueError):
        read(header)

    mended = readable(header)

    assert len(mended) == len(header)
    assert read(mended).body_size == 77
    assert read(mended).properties.delivery_mode == UNREADABLE_DELIVERY_MODE


def test_a_readable_header_is_left_alone() -> None:
    header = ContentHeader(body_size=3, properties=Basic.Properties(headers={"a": 1}, delivery_mode=2)).marshal()

    assert readable(header) is header


@given(st.integers(0, 0xFFFF), st.binary(max_size=80))
def test_whatever_a_header_holds_it_can_be_read_afterwards(flags: int, properties: bytes) -> None:
    mended = readable(frame(flags, properties))

    assert len(mended) == 14 + len(properties)
    assert read(mended).body_size == 77


# ── a routing key that is no text, tables without end ───────────────────────────────────────────────

KEYS = st.text(max_size=40).map(str.encode) | st.binary(max_size=200)


def delivery(exchange: bytes, key: bytes) -> bytes:
    """A basic.deliver by hand: the client would not write such a key."""
    names = b"".join(bytes([len(name)]) + name for name in (exchange, key))
    return Basic.Deliver.index.to_bytes(4, "big") + b"\x03tag" + (258).to_bytes(8, "big") + b"\x01" + names


@given(KEYS, KEYS)
def test_whatever_the_routing_key_is_the_delivery_can_be_read(exchange: bytes, key: bytes) -> None:
    mended = with_readable_key(delivery(exchange, key))

    frame = Basic.Deliver()
    frame.unmarshal(mended[4:])
    assert (frame.consumer_tag, frame.delivery_tag, frame.redelivered) == ("tag", 258, True)
    assert len(mended) == len(delivery(exchange, key))
    if key.decode(errors="replace").encode() == key:
        assert frame.routing_key == key.decode()


def test_a_key_that_can_be_read_is_left_alone() -> None:
    as_got = marshal(Basic.GetOk(7, False, "events", "gr\u00fcn.v1", 3), 1)[7:-1]

    assert with_readable_key(as_got) == as_got


def test_tables_nested_deeper_than_the_client_can_read_are_marked() -> None:
    nested = b"\x01aF" + table(b"")
    for _ in range(2000):
        nested = b"\x01aF" + table(nested)

    mended = readable(frame(HEADERS, table(nested)))

    assert read(mended).properties.delivery_mode == UNREADABLE_DELIVERY_MODE


async def test_only_the_delivery_with_such_a_key_is_marked() -> None:
    spoilt, good = delivery(b"events", b"\xff.v1"), delivery(b"events", b"a.v1")
    header = ContentHeader(body_size=3, properties=Basic.Properties(headers={"a": 1}, delivery_mode=2)).marshal()
    payloads = iter([(1, spoilt), (2, header), (1, good), (2, header)])
    pieces: list[bytes] = []

    async def piece(n: int) -> bytes:
        if not pieces:
            kind, payload = next(payloads)
            pieces.extend([bytes([kind]), b"\0\1" + len(payload).to_bytes(4, "big"), payload + b"\xce"])
        return pieces.pop(0)

    frames = _Frames(piece, is_careful=True)
    got = [[await frames.readexactly(n) for n in (1, 6, 99)][2] for _ in range(4)]

    modes = [read(got[at][:-1]).properties.delivery_mode for at in (1, 3)]
    assert modes == [UNREADABLE_DELIVERY_MODE, 2]
    assert got[2] == good + b"\xce"


# ── why the broker takes nothing in ─────────────────────────────────────────────────────────────────


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    """A frame, in the pieces in which the client reads it."""
    head = await reader.readexactly(1) + await reader.readexactly(6)
    return head + await reader.readexactly(int.from_bytes(head[3:], "big") + 1)


async def heard(wire: Wire, *frames: bytes) -> list[str | None]:
    """What *wire* says of the broker after each of *frames*."""

    async def send(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"".join(frames))
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(send, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        reader, _ = await wire.create(URL(f"amqp://{host}:{port}"))
        wire.opened()
        said = []
        for frame in frames:
            assert await read_frame(reader) == frame
            said.append(wire.blocked_by)
        wire.abort()
    return said


@pytest.mark.parametrize("reason", ["low on memory", "low on disk", ""])
async def test_a_connection_that_publishes_hears_why_it_is_blocked_until_it_is_not(reason: str) -> None:
    ack = marshal(Basic.Ack(delivery_tag=1), 1)
    blocked, unblocked = marshal(Connection.Blocked(reason), 0), marshal(Connection.Unblocked(), 0)

    said = await heard(Wire(is_tls=False, is_careful=False, is_publishing=True), ack, blocked, ack, unblocked, ack)

    assert said == [None, reason, reason, None, None]


async def test_a_body_is_not_taken_for_a_method() -> None:
    body = b"\x03" + marshal(Connection.Blocked("no"), 1)[1:]

    assert await heard(Wire(is_tls=False, is_careful=True, is_publishing=True), body) == [None]
