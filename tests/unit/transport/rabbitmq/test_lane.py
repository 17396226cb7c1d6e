"""Confirms end the publishes that they mean, deliveries are what was sent, and settlements are what was settled."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal
from typing import cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pamqp import frame
from pamqp.base import Frame
from pamqp.commands import Basic, Channel, Confirm
from pamqp.header import ContentHeader

from eventbus.message import Message
from eventbus.transport.base import Publication, Unpublishable
from eventbus.transport.rabbitmq import channels, frames, lane
from eventbus.transport.rabbitmq.acks import Ack, Reject
from eventbus.transport.rabbitmq.channels import Incoming
from eventbus.transport.rabbitmq.lane import LaneConsuming, LanePublishing
from eventbus.transport.rabbitmq.session import Lost, Session
from tests.fuzz.cases import no_hang
from tests.fuzz.lanes import FAR_S, Lanes, Pair, ids_in
from tests.fuzz.making import CONSUMING, FRAME_MAX, PUBLISHING, framed, short, sized
from tests.fuzz.reading import split

CONSUMER = CONSUMING[0]


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    pair = await Pair.open()
    yield pair
    await pair.close()


def sent(method: Frame, channel: int = PUBLISHING) -> bytes:
    return frame.marshal(method, channel)


def header(size: int, properties: bytes, channel: int = PUBLISHING) -> bytes:
    return framed(2, channel, struct.pack(">HHQ", 60, 0, size) + properties)


def returned(message_id: str | None, body: bytes = b"body") -> bytes:
    properties = b"\0\0" if message_id is None else b"\0\x80" + short(message_id)
    pieces = b"".join(framed(3, PUBLISHING, body[at : at + 3]) for at in range(0, len(body), 3))
    return sent(Basic.Return(312, "NO_ROUTE", "events", "fact.v1")) + header(len(body), properties) + pieces


# ── confirms ──────────────────────────────────────────────────────────────────────────────────────────────────────────

Told = Callable[[list[str]], bytes]  # what the broker says, by the message ids of what was published


def ack(tag: int, *, multiple: bool = False) -> Told:
    return lambda _: sent(Basic.Ack(tag, multiple))


def nack(tag: int, *, multiple: bool = False) -> Told:
    return lambda _: sent(Basic.Nack(tag, multiple))


def back(tag: int, body: bytes = b"body") -> Told:
    return lambda ids: returned(ids[tag - 1], body)


def stray(message_id: str | None) -> Told:
    return lambda _: returned(message_id)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ([], {}),
        ([ack(2)], {2: True}),
        ([ack(2), ack(1)], {1: True, 2: True}),
        ([ack(3, multiple=True)], {1: True, 2: True, 3: True}),
        ([ack(2), ack(3, multiple=True)], {1: True, 2: True, 3: True}),
        ([ack(0, multiple=True)], {1: True, 2: True, 3: True, 4: True}),
        ([ack(0)], {}),
        ([nack(2)], {2: "nacked"}),
        ([nack(3, multiple=True)], {1: "nacked", 2: "nacked", 3: "nacked"}),
        ([nack(0, multiple=True)], {1: "nacked", 2: "nacked", 3: "nacked", 4: "nacked"}),
        ([ack(1), nack(2, multiple=True), ack(4, multiple=True)], {1: True, 2: "nacked", 3: True, 4: True}),
        ([ack(4, multiple=True), ack(2, multiple=True), ack(3)], {1: True, 2: True, 3: True, 4: True}),
        ([ack(1), nack(1)], {1: True}),
        ([ack(5), ack(9, multiple=False)], {}),
        ([ack(2**63 - 1, multiple=True)], {1: True, 2: True, 3: True, 4: True}),
        ([back(2), ack(2)], {2: False}),
        ([back(2)], {}),
        ([back(2, b""), ack(2)], {2: False}),
        ([back(2, b"x" * 10), ack(2)], {2: False}),
        ([back(1), back(3), ack(3, multiple=True)], {1: False, 2: True, 3: False}),
        ([back(1), back(2), ack(2), ack(1)], {1: False, 2: False}),
        ([back(2), nack(2)], {2: "nacked"}),
        ([stray("0" * 32), stray(""), stray(None), stray("é"), ack(2, multiple=True)], {1: True, 2: True}),
        ([ack(1), back(1)], {1: True}),
    ],
)  # fmt: skip
async def test_a_confirm_ends_the_publishes_that_it_means(
    pair: Pair, told: list[Told], expected: dict[int, bool | str]
) -> None:
    lanes = await Lanes.open(pair)
    ids = ids_in(await lanes.publish([Message({}, b"%d" % number) for number in range(4)]))
    assert len(set(ids)) == 4

    data = b"".join(one(ids) for one in told)
    with no_hang():
        lanes.feed(data, range(1, len(data) + 1))

    assert lanes.is_live
    assert await lanes.passed_on() == b""
    assert await lanes.outcomes() == expected


async def test_a_confirm_touches_what_it_confirms_and_nothing_else(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many were confirmed before: a long life must not make the next confirm slower."""
    lanes = await Lanes.open(pair)
    touched: list[int] = []
    confirm_one = LanePublishing._confirm_one

    def counting(self: LanePublishing, tag: int, *, is_stored: bool) -> None:
        touched.append(tag)
        confirm_one(self, tag, is_stored=is_stored)

    monkeypatch.setattr(LanePublishing, "_confirm_one", counting)
    for batch in range(10):
        await lanes.publish([Message({}, b"")] * 100)
        single = b"".join(sent(Basic.Ack(batch * 100 + each)) for each in range(1, 99))
        lanes.feed(single, [len(single)])
    await asyncio.sleep(0)
    touched.clear()

    last = sent(Basic.Ack(1000, True))
    lanes.feed(last, [len(last)])

    assert touched == [batch * 100 + each for batch in range(10) for each in (99, 100)]
    assert await lanes.outcomes() == dict.fromkeys(range(1, 1001), True)


async def test_what_is_alone_on_its_way_is_sent_at_once_and_what_is_not_is_joined(pair: Pair) -> None:
    lanes = await Lanes.open(pair)

    assert len(ids_in(lanes.begin([Message({}, b"alone")]))) == 1
    assert lanes.begin([Message({}, b"second"), Message({}, b"third")]) == b""
    await asyncio.sleep(0)
    assert len(ids_in(pair.received())) == 2

    lanes.feed(confirms := sent(Basic.Ack(3, True)), [len(confirms)])
    assert len(ids_in(lanes.begin([Message({}, b"alone again")]))) == 1


async def test_what_the_lane_does_not_know_is_the_clients(pair: Pair) -> None:
    lanes = await Lanes.open(pair)
    data = b"".join([
        sent(Confirm.SelectOk()), sent(Channel.Close(404, "NOT_FOUND", 60, 40)), sent(Basic.CancelOk("c"), CONSUMER),
        sent(Basic.GetOk(1, False, "events", "k", 0), CONSUMER), header(0, b"\0\0", CONSUMER), header(1, b"\0\0"),
        framed(3, PUBLISHING, b"x"),
    ])  # fmt: skip

    lanes.feed(data, [len(data)])

    assert await lanes.passed_on() == data


@pytest.mark.parametrize("method", [frames.ACK, frames.NACK])
@pytest.mark.parametrize("arguments", [b"", b"\0" * 8, b"\0" * 10])
async def test_a_confirm_that_is_none_ends_the_session(pair: Pair, method: int, arguments: bytes) -> None:
    lanes = await Lanes.open(pair)
    await lanes.publish([Message({}, b"")])
    data = framed(1, PUBLISHING, method.to_bytes(4, "big") + arguments) + sent(Basic.Ack(1))

    lanes.feed(data, [len(data)])

    assert isinstance(lanes.reason, frames.Malformed)
    assert await lanes.outcomes() == {1: "lost"}


async def opened(pair: Pair) -> tuple[Lanes, LanePublishing]:
    lanes = Lanes(pair)
    lanes._numbers = [PUBLISHING]
    return lanes, await LanePublishing.open(cast("Session", lanes))


def in_s(seconds: float) -> float:
    return asyncio.get_running_loop().time() + seconds


async def test_a_publish_that_was_cancelled_disturbs_no_other(pair: Pair) -> None:
    lanes, publishing = await opened(pair)
    encoded = publishing.encode(Publication("events", "fact.v1", Message({}, b"")))
    one, other = (publishing.publish(encoded, in_s(FAR_S)) for _ in range(2))
    await asyncio.sleep(0)

    one.cancel()
    with suppress(asyncio.CancelledError):
        await one
    lanes.splitter.feed(sent(Basic.Ack(2, True)))

    assert await other is True
    lanes.fail(None)


async def test_a_publish_ends_at_its_deadline_and_its_late_confirm_is_nobodys(pair: Pair) -> None:
    lanes, publishing = await opened(pair)
    encoded = publishing.encode(Publication("events", "fact.v1", Message({}, b"")))
    patient = publishing.publish(encoded, in_s(FAR_S))
    await asyncio.sleep(0)

    with pytest.raises(TimeoutError):
        await publishing.publish(encoded, in_s(0.01))
    lanes.splitter.feed(sent(Basic.Ack(2)))
    assert not patient.done()
    lanes.splitter.feed(sent(Basic.Ack(1)))

    assert await patient is True
    lanes.fail(None)


async def test_the_end_of_the_session_is_told_to_all_who_wait_and_to_who_comes_later(pair: Pair) -> None:
    lanes, publishing = await opened(pair)
    encoded = publishing.encode(Publication("events", "fact.v1", Message({}, b"")))
    publishes = [publishing.publish(encoded, in_s(FAR_S)) for _ in range(3)]
    await asyncio.sleep(0)

    lanes.fail(ConnectionError("gone"))
    ends = await asyncio.gather(*publishes, return_exceptions=True)

    assert [type(each) for each in ends] == [Lost] * 3
    with pytest.raises(Lost, match="gone"):
        await publishing.publish(encoded, in_s(FAR_S))


async def test_any_number_of_keys_can_be_published_to(pair: Pair) -> None:
    lanes, publishing = await opened(pair)
    publishes = []
    written = b""
    for number in range(lane._MAX_METHODS + 5):
        encoded = publishing.encode(Publication("events", f"fact.v{number}", Message({}, b"")))
        publishes.append(publishing.publish(encoded, in_s(FAR_S)))
        await asyncio.sleep(0)
        lanes.splitter.flush()
        written += pair.received()

    keys = [what.routing_key for _, _, what in split(written) if isinstance(what, Basic.Publish)]
    assert keys == [f"fact.v{number}" for number in range(lane._MAX_METHODS + 5)]
    lanes.splitter.feed(sent(Basic.Ack(0, True)))
    assert all(await asyncio.gather(*publishes))
    lanes.fail(None)


# ── deliveries ────────────────────────────────────────────────────────────────────────────────────────────────────────


DELIVER = sent(Basic.Deliver("ctag", 7, True, "events", "fact.v1"), CONSUMER)


def content(properties: bytes, *pieces: bytes, size: int | None = None) -> bytes:
    made = header(sum(map(len, pieces)) if size is None else size, properties, CONSUMER)
    return made + b"".join(framed(3, CONSUMER, piece) for piece in pieces)


async def delivered(pair: Pair, data: bytes) -> list[Incoming]:
    lanes = await Lanes.open(pair)
    lanes.feed(data, [len(data)])
    assert lanes.is_live
    return [incoming for _, incoming in lanes.incoming]


async def test_a_delivery_is_what_was_sent(pair: Pair) -> None:
    foreign = b"d" + struct.pack(">d", 1.5)
    table = sized(short("a") + b"S" + sized(b"b") + short("n") + foreign)
    properties = b"\xa0\x08" + short("application/json") + table + short("app")

    incoming = await delivered(pair, DELIVER + content(properties, b"body ", b"in ", b"parts"))

    expected = Message({"a": "b", "n": 1.5}, b"body in parts", "application/json", {"app_id": "app"})
    assert incoming == [Incoming(7, "events", "fact.v1", True, expected, True)]
    assert incoming[0].message.encoded == {"n": foreign}


async def test_a_delivery_may_be_empty_and_the_next_is_its_own(pair: Pair) -> None:
    data = DELIVER + content(b"\0\0") + DELIVER + content(b"\0\0", b"x") + DELIVER + content(b"\0\0", b"y", b"z")

    assert [each.message.body for each in await delivered(pair, data)] == [b"", b"x", b"yz"]


@pytest.mark.parametrize(
    "properties",
    [
        b"\x20\0" + sized(short("a") + b"?"),
        b"\x20\0" + sized(b"\x02\xff\xfeV"),
        b"\x20\0" + struct.pack(">I", 99),
        b"\x80\0\x01\xff",
        b"\0\x01",
        b"\x20\0" + sized(short("at") + b"T" + (2**60).to_bytes(8, "big")),
    ],
)
async def test_a_message_that_nobody_can_read_is_one_and_its_neighbours_are_read(pair: Pair, properties: bytes) -> None:
    data = DELIVER + content(properties, b"bad") + DELIVER + content(b"\0\0", b"good")

    bad, good = await delivered(pair, data)

    assert not bad.is_readable
    assert (bad.tag, bad.message) == (7, Message({}, b"bad"))
    assert good.is_readable
    assert good.message.body == b"good"


async def test_a_header_that_is_no_text_is_dead_lettered_as_it_came(pair: Pair) -> None:
    properties = b"\x20\0" + sized(short("s") + b"S" + sized(b"\xff"))
    (incoming,) = await delivered(pair, DELIVER + content(properties, b"body"))

    copy = incoming.message.republished({"x-eventbus-reason": "invalid-data"})
    encoded = lane.encode(Publication("events.dead", "shop", copy), frame_max=FRAME_MAX)

    assert incoming.is_readable
    assert properties[6:] + short("x-eventbus-reason") + b"S" + sized(b"invalid-data") in encoded.head


@pytest.mark.parametrize(
    "garbage",
    [
        DELIVER + DELIVER,
        DELIVER + content(b"\0\0", size=5) + content(b"\0\0", size=5),
        DELIVER + framed(3, CONSUMER, b"body"),
        DELIVER + content(b"\0\0", b"too much", size=3),
        DELIVER + content(b"\0\0", b"12", b"34", size=3),
        DELIVER + framed(2, CONSUMER, b"\0" * 13),
        framed(1, CONSUMER, frames.DELIVER.to_bytes(4, "big") + b"\x09ctag"),
    ],
)
async def test_a_content_that_is_none_ends_the_session_and_is_never_another_ones(pair: Pair, garbage: bytes) -> None:
    lanes = await Lanes.open(pair)

    lanes.feed(garbage, [len(garbage)])

    assert isinstance(lanes.reason, frames.Malformed)
    assert not lanes.incoming


# ── settlements ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_is_settled_is_written_in_its_order(pair: Pair) -> None:
    lanes = Lanes(pair)
    lanes._numbers = [CONSUMER]
    consuming = await LaneConsuming.open(cast("Session", lanes), 10)

    await consuming.settle([])
    await consuming.settle([Reject(4), Ack(3, is_multiple=True), Ack(6)])
    await consuming.give_back([8, 9])
    lanes.splitter.flush()

    written = [(channel, what.name, dict(what)) for _, channel, what in split(pair.received())]
    assert written == [
        (CONSUMER, "Basic.Reject", {"delivery_tag": 4, "requeue": False}),
        (CONSUMER, "Basic.Ack", {"delivery_tag": 3, "multiple": True}),
        (CONSUMER, "Basic.Ack", {"delivery_tag": 6, "multiple": False}),
        (CONSUMER, "Basic.Nack", {"delivery_tag": 8, "multiple": False, "requeue": True}),
        (CONSUMER, "Basic.Nack", {"delivery_tag": 9, "multiple": False, "requeue": True}),
    ]


async def test_nothing_is_settled_on_a_session_that_is_over(pair: Pair) -> None:
    lanes = Lanes(pair)
    lanes._numbers = [CONSUMER]
    consuming = await LaneConsuming.open(cast("Session", lanes), 10)
    lanes.fail(ConnectionError("gone"))

    with pytest.raises(Lost, match="gone"):
        await consuming.settle([Ack(1)])
    with pytest.raises(Lost, match="gone"):
        await consuming.give_back([1])


# ── both ways of encoding ─────────────────────────────────────────────────────────────────────────────────────────────

TEXT = st.text(max_size=20)
HEADERS = st.dictionaries(
    TEXT | st.text("n", min_size=127, max_size=130),
    st.recursive(
        TEXT
        | st.booleans()
        | st.integers(-(2**64), 2**64)
        | st.none()
        | st.floats()
        | st.binary()
        | st.binary().map(bytearray)
        | st.decimals()
        | st.datetimes(timezones=st.just(UTC)),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
        max_leaves=5,
    ),
    max_size=4,
)
PROPERTIES = st.fixed_dictionaries(
    {},
    optional={
        "content_encoding": TEXT,
        "priority": st.integers(-1, 256),
        "correlation_id": TEXT | st.just("c" * 256),
        "reply_to": TEXT,
        "timestamp": st.datetimes(timezones=st.just(UTC)),
        "message_type": TEXT,
        "app_id": TEXT,
    },
)


def read_lane(publication: Publication) -> Message | None:
    try:
        encoded = lane.encode(publication, frame_max=FRAME_MAX)
    except Unpublishable:
        return None
    data = encoded.head + short("id") + encoded.tail
    read = frames.read_properties(data, 0, len(data))
    kept = {name: value for name, value in read.others.items() if name != "delivery_mode" and value != ""}
    return Message(read.table.values, encoded.body, read.content_type, kept)


def read_client(publication: Publication) -> Message | None:
    try:
        encoded = channels.encode(publication, frame_max=FRAME_MAX)
    except Unpublishable:
        return None
    read = ContentHeader()
    read.unmarshal(ContentHeader(properties=encoded.properties).marshal())
    return channels.decode(read.properties, encoded.body)


@given(HEADERS, PROPERTIES, TEXT | st.none(), TEXT)
@example({"d": Decimal("1E+3")}, {}, None, "k").via("a power of ten")
@example({}, {"timestamp": datetime(2026, 1, 2, 3, 4, 5, 600_000, UTC)}, None, "k").via("a part of a second")
@example({"h": "x" * FRAME_MAX}, {}, None, "k").via("more than fits into a frame")
@example({}, {}, None, "k" * 256).via("a key that is too long")
@example({"\ud800": 1}, {}, None, "k").via("half a character")
def test_both_ways_carry_the_same_and_refuse_the_same(
    headers: dict[str, object], properties: dict[str, object], content_type: str | None, key: str
) -> None:
    publication = Publication("events", key, Message(headers, b"body", content_type, properties))

    assert read_lane(publication) == read_client(publication)
