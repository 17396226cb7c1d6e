"""Frames on one connection go to whom they are for, however they arrive."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import AsyncIterator

import pytest
from pamqp import frame
from pamqp.commands import Basic, Queue
from pamqp.heartbeat import Heartbeat

from eventbus.transport.rabbitmq import frames
from eventbus.transport.rabbitmq.splitter import Splitter, unfit
from tests.fuzz import making, reading
from tests.fuzz.lanes import Lanes, Pair

OURS, THEIRS = 1, 4
FRAME_MAX = making.FRAME_MAX


class Inbox:
    """Takes what is no method, and keeps it; or does as `error` says."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.taken: list[tuple[int, bytes]] = []

    def take(self, kind: int, data: bytes, at: int, end: int) -> bool:
        if self.error is not None:
            raise self.error
        if kind == frames.METHOD:
            return False
        self.taken.append((kind, data[at:end]))
        return True


class Connection:
    """A splitter with one inbox, after the handshake."""

    def __init__(self, pair: Pair, *, heartbeat_s: float = 0, frame_max: int = FRAME_MAX) -> None:
        self.pair = pair
        self.client = asyncio.StreamReader()
        self.splitter = Splitter(self.client, pair.writer)
        self.failures: list[BaseException] = []
        self.inbox = Inbox()
        self.splitter.begin(frame_max=frame_max, heartbeat_s=heartbeat_s, fail=self.failures.append)
        self.splitter.enter(OURS, self.inbox)

    async def passed_on(self) -> bytes:
        self.client.feed_eof()
        return await self.client.read()


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    pair = await Pair.open()
    yield pair
    await pair.close()


def body(channel: int, payload: bytes) -> bytes:
    return making.framed(3, channel, payload)


METHOD = frame.marshal(Queue.DeclareOk("work", 1, 1), OURS)
HEARTBEAT = frame.marshal(Heartbeat(), 0)


async def test_each_frame_goes_to_whom_it_is_for(pair: Pair) -> None:
    connection = Connection(pair)

    connection.splitter.feed(body(OURS, b"1") + METHOD + body(THEIRS, b"2") + HEARTBEAT + body(OURS, b""))

    assert connection.inbox.taken == [(3, b"1"), (3, b"")]
    assert await connection.passed_on() == METHOD + body(THEIRS, b"2") + HEARTBEAT


async def test_a_channel_that_was_left_is_the_clients(pair: Pair) -> None:
    connection = Connection(pair)

    connection.splitter.leave(OURS, connection.inbox)
    connection.splitter.leave(OURS, connection.inbox)
    connection.splitter.feed(body(OURS, b"late"))

    assert await connection.passed_on() == body(OURS, b"late")


async def test_a_number_that_is_another_channels_by_now_stays_with_it(pair: Pair) -> None:
    connection, next_one = Connection(pair), Inbox()
    connection.splitter.enter(OURS, next_one)

    connection.splitter.leave(OURS, connection.inbox)
    connection.splitter.feed(body(OURS, b"1"))

    assert next_one.taken == [(3, b"1")]
    assert not connection.inbox.taken


async def test_a_heartbeat_is_the_clients_on_whatever_channel(pair: Pair) -> None:
    connection = Connection(pair)

    connection.splitter.feed(making.framed(8, OURS, b""))

    assert not connection.inbox.taken
    assert await connection.passed_on() == making.framed(8, OURS, b"")


async def test_what_arrives_comes_through_the_readers_own_door(pair: Pair) -> None:
    """The splitter takes the place of `feed_data`, which is where the event loop puts what the socket brought."""
    connection = Connection(pair)

    connection.client.feed_data(body(OURS, b"1") + METHOD)

    assert connection.inbox.taken == [(3, b"1")]
    assert await connection.passed_on() == METHOD


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 100])
async def test_pieces_of_any_size_are_the_same_frames(pair: Pair, size: int) -> None:
    connection = Connection(pair)
    data = (body(OURS, b"x" * 30) + METHOD + HEARTBEAT + body(OURS, b"\xce" * 20) + body(THEIRS, b"y")) * 3

    for at in range(0, len(data), size):
        connection.splitter.feed(data[at : at + size])

    assert connection.inbox.taken == [(3, b"x" * 30), (3, b"\xce" * 20)] * 3
    assert await connection.passed_on() == (METHOD + HEARTBEAT + body(THEIRS, b"y")) * 3


async def test_a_frame_is_handed_on_with_its_last_byte(pair: Pair) -> None:
    connection = Connection(pair)
    data = body(OURS, b"1")

    connection.splitter.feed(data[:-1])
    assert not connection.inbox.taken

    connection.splitter.feed(data[-1:])
    assert connection.inbox.taken == [(3, b"1")]


async def test_contents_of_every_channel_cut_at_every_place_in_turn(pair: Pair) -> None:
    data = b"".join(making.stream(random.Random(5), [], 12))
    expected = reading.read(data, [])

    for place in range(len(data) + 1):
        lanes = await Lanes.open(pair)
        lanes.feed(data, [place, len(data)])

        assert lanes.deliveries() == expected.deliveries
        assert await lanes.passed_on() == expected.passed_on
        assert lanes.reason is None
    assert expected.deliveries
    assert expected.passed_on


async def test_buffers_of_other_kinds_are_read_as_bytes(pair: Pair) -> None:
    connection = Connection(pair)

    for data in (bytearray(body(OURS, b"1")), memoryview(body(OURS, b"2"))):
        connection.splitter.feed(data)  # type: ignore[arg-type]  # what an event loop may bring
    connection.splitter.feed(memoryview(body(OURS, b"3"))[:9])  # type: ignore[arg-type]
    connection.splitter.feed(bytearray(body(OURS, b"3"))[9:])  # type: ignore[arg-type]

    assert connection.inbox.taken == [(3, b"1"), (3, b"2"), (3, b"3")]
    assert all(type(payload) is bytes for _, payload in connection.inbox.taken)


# ── what is no frame ──────────────────────────────────────────────────────────────────────────────────────────────────

GARBAGE = {
    "too long": struct.pack(">BHI", 3, OURS, FRAME_MAX - 7),
    "much too long": struct.pack(">BHI", 3, THEIRS, 2**32 - 1),
    "no end": body(OURS, b"1")[:-1] + b"\xcd",
    "another type": making.framed(4, THEIRS, b""),
    "type 0": making.framed(0, 0, b""),
    "text": b"HTTP/1.1 400 Bad Request\r\n",
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
@pytest.mark.parametrize("step", [1, 1000])
async def test_garbage_ends_the_session_and_nothing_is_read_after_it(pair: Pair, garbage: bytes, step: int) -> None:
    connection = Connection(pair)
    data = body(OURS, b"before") + METHOD + garbage + b"\0" + body(OURS, b"behind") + METHOD

    for at in range(0, len(data), step):
        connection.splitter.feed(data[at : at + step])

    assert [type(failure) for failure in connection.failures] == [frames.Malformed]
    assert connection.inbox.taken == [(3, b"before")]
    assert await connection.passed_on() == METHOD
    assert pair.writer.transport.is_closing()


async def test_the_longest_frame_that_fits_is_read(pair: Pair) -> None:
    connection = Connection(pair)

    connection.splitter.feed(body(OURS, b"x" * (FRAME_MAX - 8)))

    assert connection.inbox.taken == [(3, b"x" * (FRAME_MAX - 8))]
    assert not connection.failures


async def test_a_broker_without_a_limit_may_send_frames_of_any_length(pair: Pair) -> None:
    connection = Connection(pair, frame_max=0)
    data = body(OURS, b"x" * 3_000_000)

    for at in range(0, len(data), 65_536):
        connection.splitter.feed(data[at : at + 65_536])

    assert [len(payload) for _, payload in connection.inbox.taken] == [3_000_000]


async def test_an_inbox_that_raises_ends_the_session_and_the_client_still_hears_the_rest(pair: Pair) -> None:
    connection = Connection(pair)
    connection.inbox.error = RuntimeError("a bug")

    connection.splitter.feed(body(OURS, b"1") + METHOD + body(THEIRS, b"2"))

    assert connection.inbox.error in connection.failures
    assert await connection.passed_on() == body(THEIRS, b"2")


async def test_before_the_handshake_is_over_the_client_judges(pair: Pair) -> None:
    client = asyncio.StreamReader()
    splitter = Splitter(client, pair.writer)

    splitter.feed(METHOD)
    splitter.feed(b"AMQP\0\0\x09\x01")
    splitter.feed(b"more")

    client.feed_eof()
    assert await client.read() == METHOD + b"AMQP\0\0\x09\x01more"
    assert not pair.writer.transport.is_closing()


# ── heartbeats ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_client_that_reads_none_of_it_hears_that_the_connection_lives(pair: Pair) -> None:
    connection = Connection(pair, heartbeat_s=0.002)

    for _ in range(5):
        await asyncio.sleep(0.002)
        connection.splitter.feed(body(OURS, b"1"))

    heard = await connection.passed_on()
    assert heard == HEARTBEAT * (len(heard) // 8)
    assert len(connection.inbox.taken) == 5
    assert 1 <= len(heard) // 8 <= 5


# ── out ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_is_written_in_one_turn_is_sent_at_its_end_in_order(pair: Pair) -> None:
    connection = Connection(pair)

    connection.splitter.write(b"1", b"2")
    connection.splitter.write(b"3")
    assert pair.received() == b""

    await asyncio.sleep(0)
    assert pair.received() == b"123"


async def test_flush_sends_now_and_once(pair: Pair) -> None:
    connection = Connection(pair)

    connection.splitter.write(b"1")
    connection.splitter.flush()
    assert pair.received() == b"1"

    await asyncio.sleep(0)
    connection.splitter.write(b"2")
    await asyncio.sleep(0)
    assert pair.received() == b"2"


async def test_what_cannot_wait_for_the_end_of_the_turn_is_sent_behind_what_waits(pair: Pair) -> None:
    connection = Connection(pair)

    connection.splitter.write_now(b"1")
    assert pair.received() == b"1"

    connection.splitter.write(b"2")
    connection.splitter.write_now(b"3", b"4")
    assert pair.received() == b"234"


async def test_nothing_is_written_to_a_connection_that_is_closing(pair: Pair) -> None:
    connection = Connection(pair)

    pair.writer.close()
    connection.splitter.write(frame.marshal(Basic.Ack(1), OURS))
    connection.splitter.flush()
    connection.splitter.write_now(frame.marshal(Basic.Ack(2), OURS))

    assert pair.received() == b""


# ── what can be split ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_is_no_stream_is_told(pair: Pair) -> None:
    reader = asyncio.StreamReader()

    assert unfit(reader, pair.writer) is None
    assert unfit(object(), pair.writer) == "it reads with a object"
    assert unfit(reader, object()) == "it writes with a object"
