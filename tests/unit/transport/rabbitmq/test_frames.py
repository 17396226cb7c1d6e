"""Our frames against the client's: each reads what the other writes, and what is no AMQP is told in one way."""

from __future__ import annotations

import decimal
import math
import struct
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pamqp import decode, frame
from pamqp.body import ContentBody
from pamqp.commands import Basic
from pamqp.encode import encode_table_value
from pamqp.header import ContentHeader

from eventbus.transport.rabbitmq import frames
from eventbus.transport.rabbitmq.frames import Malformed

FRAME_MAX = 4096  # the least that AMQP allows
CHANNELS = st.integers(1, 2**16 - 1)
TAGS = st.integers(0, 2**63 - 1)  # AMQP has 64 bits without a sign, the client one less
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SHORT = TEXT.filter(lambda text: len(text.encode()) <= 255)
NAMES = TEXT.filter(lambda text: len(text.encode()) <= frames.MAX_NAME_BYTES)
MOMENTS = st.integers(0, 2**32 - 1).map(lambda seconds: datetime.fromtimestamp(seconds, UTC))
EXCHANGES = st.from_regex(r"[a-zA-Z0-9-_.:]{0,100}", fullmatch=True)  # what the client checks
PLAIN = TEXT | st.booleans() | st.integers(-(2**63), 2**63 - 1)


def same(ours: object, theirs: object) -> bool:
    """Equal, of the same type, all the way down; and nan is nan."""
    if type(ours) is not type(theirs):
        return False
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return list(ours) == list(theirs) and all(same(ours[name], theirs[name]) for name in ours)
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(ours, float) and isinstance(theirs, float) and math.isnan(ours):
        return math.isnan(theirs)
    return ours == theirs


def test_the_comparison_sees_types_and_order() -> None:
    assert same({"a": [math.nan, bytearray(b"x")]}, {"a": [math.nan, bytearray(b"x")]})
    assert not same(1, True)
    assert not same(b"x", bytearray(b"x"))
    assert not same({"a": 1, "b": 2}, {"b": 2, "a": 1})
    assert not same([1], [1, 2])
    assert not same({"a": [1.0]}, {"a": [math.nan]})


# ── tables, as bytes: every type that there is ────────────────────────────────────────────────────────────────────────


def sized(content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + content


def packed(kind: bytes, layout: str, values: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    return values.map(lambda value: kind + struct.pack(layout, value))


def named(name: str) -> bytes:
    encoded = name.encode()
    return bytes((len(encoded),)) + encoded


def ints(bits: int, *, signed: bool) -> st.SearchStrategy[int]:
    return st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else st.integers(0, 2**bits - 1)


SCALARS = st.one_of(
    packed(b"t", ">B", st.integers(0, 255)),
    packed(b"b", ">b", ints(8, signed=True)),
    packed(b"B", ">B", ints(8, signed=False)),
    packed(b"s", ">h", ints(16, signed=True)),
    packed(b"u", ">H", ints(16, signed=False)),
    packed(b"I", ">i", ints(32, signed=True)),
    packed(b"i", ">I", ints(32, signed=False)),
    packed(b"l", ">q", ints(64, signed=True)),
    packed(b"L", ">q", ints(64, signed=True)),
    packed(b"f", ">f", st.floats(width=32)),
    packed(b"d", ">d", st.floats()),
    st.builds(lambda places, unscaled: b"D" + struct.pack(">Bi", places, unscaled), ints(8, signed=False),
              ints(32, signed=True)),
    packed(b"T", ">Q", st.integers(0, 2**32 - 1) | st.integers(2**32, 253_402_300_799_000)),
    TEXT.map(lambda text: b"S" + sized(text.encode())),
    st.binary(max_size=20).map(lambda raw: b"x" + sized(raw)),
    st.sampled_from([b"V", b"\0"]),
)  # fmt: skip
# What the client reads as something else.
ODD = st.just(b"S" + sized(b"\xff\xfe"))
# What nobody reads: milliseconds beyond the year 9999.
NO_MOMENTS = packed(b"T", ">Q", st.integers(253_402_300_800_000, 2**64 - 1))


def raw_entries(values: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """The entries of a table. No name comes twice."""
    return st.dictionaries(NAMES, values, max_size=5).map(
        lambda entries: b"".join(named(name) + value for name, value in entries.items())
    )


def raw_values(scalars: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    return st.recursive(
        scalars,
        lambda inner: (
            st.lists(inner, max_size=4).map(lambda values: b"A" + sized(b"".join(values)))
            | raw_entries(inner).map(lambda entries: b"F" + sized(entries))
        ),
        max_leaves=8,
    )


RAW_TABLES = raw_entries(raw_values(SCALARS))


@given(RAW_TABLES)
def test_a_table_of_every_type_reads_as_the_client_reads_it(entries: bytes) -> None:
    ours = frames.read_table(entries, 0, len(entries))

    _, theirs = decode.field_table(sized(entries))

    assert same(ours.values, theirs)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"t\x01", True),
        (b"b\xff", -1),
        (b"B\xff", 255),
        (b"s\xff\xfe", -2),
        (b"u\xff\xfe", 65534),
        (b"I\xff\xff\xff\xfd", -3),
        (b"i\xff\xff\xff\xfd", 2**32 - 3),
        (b"l" + b"\xff" * 8, -1),
        (b"L" + b"\xff" * 8, -1),
        (b"f\x3f\xc0\0\0", 1.5),
        (b"d\x3f\xf8\0\0\0\0\0\0", 1.5),
        (b"D\x02\0\0\0\x7b", Decimal("1.23")),
        (b"D\x02\xff\xff\xff\x85", Decimal("-1.23")),
        (b"S\0\0\0\x02\xc3\xa9", "é"),
        (b"A\0\0\0\x03b\x07V", [7, None]),
        (b"T" + (1).to_bytes(8, "big"), datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC)),
        (b"T" + (1_700_000_000_500).to_bytes(8, "big"), datetime(2023, 11, 14, 22, 13, 20, 500_000, tzinfo=UTC)),
        (b"F\0\0\0\x04\x01ab\x07", {"a": 7}),
        (b"V", None),
        (b"\0", None),
        (b"x\0\0\0\x01\xff", bytearray(b"\xff")),
    ],
)
def test_each_type_means_what_rabbitmq_says_that_it_means(value: bytes, expected: object) -> None:
    entries = named("h") + value

    read = frames.read_table(entries, 0, len(entries)).values

    assert same(read, {"h": expected})


@given(raw_entries(raw_values(SCALARS | ODD)))
@example(named("t") + b"t\x02")
@example(named("s") + b"S" + sized(b"\xff"))
def test_a_table_is_written_again_byte_for_byte(entries: bytes) -> None:
    table = frames.read_table(entries, 0, len(entries))

    assert frames.write_plain(table.values, table.foreign) == sized(entries)


@given(NO_MOMENTS)
@example(b"T" + (2**60).to_bytes(8, "big"))
def test_a_timestamp_beyond_the_year_9999_is_no_table_as_the_client_has_it(value: bytes) -> None:
    entries = named("at") + value
    with pytest.raises(frames.Malformed, match="timestamp"):
        frames.read_table(entries, 0, len(entries))
    with pytest.raises(Exception):  # noqa: B017  # whatever it is
        decode.field_table(sized(entries))


def test_of_a_name_that_comes_twice_the_last_is_read_and_both_are_written_again() -> None:
    """Behind the first one's place: this alone is not the original to the byte."""
    first, last = b"S" + sized(b"\xff"), b"d" + bytes(8)
    for one, other in ((first, last), (last, b"S" + sized(b"text")), (last, b"t\x01"), (b"b\x01", first)):
        entries = named("a") + one + named("b") + b"V" + named("a") + other

        table = frames.read_table(entries, 0, len(entries))

        assert same(table.values, decode.field_table(sized(entries))[1])
        written = frames.write_plain(table.values, table.foreign)
        assert written == sized(named("a") + one + named("a") + other + named("b") + b"V")


def test_a_table_is_read_from_the_midst_of_other_bytes() -> None:
    entries = named("a") + b"S" + sized(b"b") + named("c") + b"d" + bytes(8)

    read = frames.read_table(b"before" + entries + b"behind", 6, 6 + len(entries))

    assert read == frames.read_table(entries, 0, len(entries))


def test_a_decimal_is_exact_in_whatever_context() -> None:
    entries = named("d") + b"D" + struct.pack(">Bi", 255, 123_456_789)

    with decimal.localcontext() as context:
        context.prec = 3
        context.traps[decimal.Inexact] = True
        read = frames.read_table(entries, 0, len(entries)).values

    assert read == {"d": Decimal("123456789E-255")}


# ── tables, as the client writes them, and as we do ───────────────────────────────────────────────────────────────────


WRITABLE = st.recursive(
    PLAIN
    | st.none()
    | st.floats(width=32)
    | MOMENTS
    | st.binary(max_size=20).map(bytearray)
    | st.decimals(places=3, min_value=-(2**20), max_value=2**20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=8,
)


@given(st.dictionaries(NAMES, WRITABLE, max_size=5))
def test_what_the_client_writes_is_read_equally(headers: dict[str, Any]) -> None:
    written = ContentHeader(properties=Basic.Properties(headers=headers)).marshal()

    read = frames.read_properties(written, 12, len(written)).table.values

    back = ContentHeader()
    back.unmarshal(written)
    assert same(read, back.properties.headers or {})
    assert read == headers or any(map(has_nan, headers.values()))


def has_nan(value: object) -> bool:
    if isinstance(value, dict | list):
        return any(map(has_nan, value.values() if isinstance(value, dict) else value))
    return isinstance(value, float) and math.isnan(value)


@given(st.dictionaries(NAMES, PLAIN, max_size=5))
def test_the_client_reads_the_plain_headers_that_we_write(headers: dict[str, object]) -> None:
    written = frames.write_plain(headers, {})

    assert written is not None
    assert same(decode.field_table(written)[1], headers)


@given(st.integers(-(2**63), 2**63 - 1))
@example(2**7).via("each limit")
@example(2**15).via("each limit")
@example(2**16).via("each limit")
@example(2**31).via("each limit")
@example(2**32).via("each limit")
def test_a_number_is_written_as_the_client_writes_it(value: int) -> None:
    for number in (value, -value) if value > -(2**63) else (value,):
        assert frames.write_int(number) == encode_table_value(number)


@pytest.mark.parametrize(
    "value", [1.5, None, b"bytes", bytearray(b"x"), [1], {"a": 1}, Decimal(1), 2**63, -(2**63) - 1]
)
def test_what_is_not_plain_is_not_written_plainly(value: object) -> None:
    assert frames.write_plain({"h": value}, {}) is None


@pytest.mark.parametrize("headers", [{"n" * 129: 1}, {"é" * 65: 1}, {"\ud800": 1}, {"h": "\ud800"}])
def test_a_name_or_text_that_does_not_fit_is_refused(headers: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        frames.write_plain(headers, {})


def test_a_number_of_more_than_64_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="64 bits"):
        frames.write_int(2**63)


def test_any_number_of_names_can_be_written() -> None:
    headers: dict[str, object] = {f"name {number}": number for number in range(3000)}

    for _ in range(2):
        assert decode.field_table(frames.write_plain(headers, {}) or b"")[1] == headers


# ── properties ────────────────────────────────────────────────────────────────────────────────────────────────────────


PROPERTIES = st.fixed_dictionaries(
    {},
    optional={
        "content_type": SHORT,
        "content_encoding": SHORT,
        "headers": st.dictionaries(NAMES, WRITABLE, max_size=3),
        "delivery_mode": st.sampled_from([1, 2]),
        "priority": st.integers(0, 255),
        "correlation_id": SHORT,
        "reply_to": SHORT,
        "expiration": SHORT,
        "message_id": SHORT,
        "timestamp": MOMENTS,
        "message_type": SHORT,
        "user_id": SHORT,
        "app_id": SHORT,
    },
)
KEPT = ("content_encoding", "priority", "correlation_id", "reply_to", "timestamp", "message_type", "app_id")


def all_of(read: frames.Properties) -> dict[str, Any]:
    """*read* as the client's properties have it: None for what is missing."""
    names = [name for name in Basic.Properties.__slots__ if name not in ("content_type", "headers", "message_id")]
    return {
        "content_type": read.content_type,
        "message_id": read.message_id,
        **{name: read.others.get(name) for name in names},
    }


@given(PROPERTIES, st.integers(0, 2**64 - 1))
def test_properties_are_read_as_the_client_reads_them(properties: dict[str, Any], body_size: int) -> None:
    written = ContentHeader(body_size=body_size, properties=Basic.Properties(**properties)).marshal()

    read = frames.read_properties(written, 12, len(written))

    back = ContentHeader()
    back.unmarshal(written)
    assert frames.read_body_size(written, 0, len(written)) == body_size
    assert same(read.table.values, back.properties.headers or {})
    for name, value in all_of(read).items():
        assert same(value, getattr(back.properties, name)) or (name, value) == ("cluster_id", None), name
    assert frames.read_message_id(written, 12, len(written)) == (back.properties.message_id or "")


def test_the_cluster_id_that_nobody_may_set_is_read() -> None:
    written = ContentHeader().marshal()[:12] + struct.pack(">H", 4) + named("c")

    assert frames.read_properties(written, 12, len(written)).others == {"cluster_id": "c"}


@given(
    CHANNELS,
    SHORT | st.none(),
    st.dictionaries(NAMES, PLAIN, max_size=5),
    PROPERTIES,
    SHORT.filter(bool),
    st.binary(max_size=20) | st.integers(0, 3 * FRAME_MAX).map(lambda size: b"\xce" * size),
)
@example(1, None, {}, {}, "i", b"x" * (FRAME_MAX - 8)).via("a body that just fits into one frame")
@example(1, None, {}, {}, "i", b"x" * (FRAME_MAX - 7)).via("one byte more")
def test_the_client_reads_the_content_that_we_write(
    channel: int, content_type: str | None, headers: dict[str, Any], given_: dict[str, Any], id_: str, body: bytes
) -> None:
    properties = {name: value for name, value in given_.items() if name in KEPT}
    table = frames.write_plain(headers, {})
    assert table is not None

    head, tail = frames.write_properties(content_type, table, properties)
    written = frames.content_frames(channel, head, id_.encode(), tail, body, FRAME_MAX)

    header, *bodies = read_by_client(written, channel)
    assert isinstance(header, ContentHeader)
    assert [header.class_id, header.weight, header.body_size] == [60, 0, len(body)]
    sent = header.properties
    assert same(sent.headers, headers)
    assert (sent.content_type, sent.message_id, sent.delivery_mode) == (content_type or None, id_, 2)
    for name in Basic.Properties.__slots__:
        if name not in ("content_type", "headers", "message_id", "delivery_mode", "cluster_id"):
            assert same(getattr(sent, name), properties.get(name)), name
    assert all(isinstance(part, ContentBody) and 0 < len(part) <= FRAME_MAX - 8 for part in bodies)
    assert b"".join(part.value for part in bodies) == body
    assert len(bodies) == -(-len(body) // (FRAME_MAX - 8))


def read_by_client(written: bytes, channel: int) -> list[Any]:
    read: list[Any] = []
    while written:
        used, on, one = frame.unmarshal(written)
        assert on == channel
        assert used <= FRAME_MAX
        read.append(one)
        written = written[used:]
    return read


def test_a_broker_without_a_limit_gets_one_body_frame() -> None:
    head, tail = frames.write_properties(None, bytes(4), {})

    written = frames.content_frames(1, head, b"id", tail, b"x" * 300_000, 0)

    assert len(written) == 300_000 + 8 + len(frames.content_frames(1, head, b"id", tail, b"", 0))


@pytest.mark.parametrize(
    "properties",
    [
        {"priority": 256},
        {"priority": -1},
        {"priority": "5"},
        {"priority": True},
        {"timestamp": "now"},
        {"timestamp": -1},
        {"timestamp": 2**64},
        {"timestamp": datetime(1969, 1, 1, tzinfo=UTC)},
        {"app_id": 5},
        {"app_id": "a" * 256},
        {"reply_to": "\ud800"},
    ],
)
def test_a_property_that_does_not_fit_is_refused(properties: dict[str, object]) -> None:
    with pytest.raises((ValueError, TypeError, struct.error)):
        frames.write_properties(None, bytes(4), properties)


def test_a_time_without_a_zone_is_utc() -> None:
    naive = datetime(2026, 1, 2, 3, 4, 5)  # noqa: DTZ001  # what is tested

    head, tail = frames.write_properties(None, bytes(4), {"timestamp": naive})
    content = head + named("id") + tail

    assert frames.read_properties(content, 0, len(content)).others["timestamp"] == naive.replace(tzinfo=UTC)


# ── what the client reads otherwise, on purpose ───────────────────────────────────────────────────────────────────────


def header_with(entries: bytes) -> bytes:
    return struct.pack(">HHQH", 60, 0, 0, 0x2000) + sized(entries)


def test_a_text_that_is_no_utf8_is_bytes_and_kept_as_it_came() -> None:
    """The client reads the same bytes, and cannot write them."""
    raw = b"S" + sized(b"caf\xe9")
    entries = named("place") + raw

    table = frames.read_table(entries, 0, len(entries))

    assert table == frames.Table({"place": b"caf\xe9"}, {"place": raw})
    with pytest.raises(TypeError):
        encode_table_value(b"caf\xe9")


def test_a_boolean_that_is_neither_0_nor_1_is_kept_as_it_came() -> None:
    entries = named("t") + b"t\x02"

    assert frames.read_table(entries, 0, len(entries)) == frames.Table({"t": True}, {"t": b"t\x02"})


def nested(depth: int, kind: bytes) -> bytes:
    value = b"V"
    for _ in range(depth):
        value = kind + sized(value if kind == b"A" else named("n") + value)
    return named("n") + value


@pytest.mark.parametrize("kind", [b"A", b"F"])
def test_tables_in_tables_have_an_end(kind: bytes) -> None:
    """The client goes on to its interpreter's limit, and dies of a RecursionError."""
    deep = nested(frames.MAX_DEPTH, kind)

    assert same(frames.read_table(deep, 0, len(deep)).values, decode.field_table(sized(deep))[1])
    for depth in (frames.MAX_DEPTH + 1, 5_000):
        deeper = nested(depth, kind)
        with pytest.raises(Malformed, match="in one another"):
            frames.read_table(deeper, 0, len(deeper))


@pytest.mark.parametrize(
    "content",
    [
        b"\x20\x01" + bytes(4),  # a second word of flags, which AMQP 0-9-1 has no properties for
        b"\x20\x02" + bytes(4),
        b"\x20\x00" + bytes(4) + b"more",  # bytes behind the last property
        b"\x20\x00" + struct.pack(">I", 1),  # a table that leads beyond its frame
        b"\x20\x00" + sized(b"\x02\xff\xfeV"),  # a header's name that is no UTF-8
        b"\x20\x00" + sized(b"\x01a?"),  # a type that nobody knows
        b"\x20\x00" + sized(b"\x01a"),  # a name alone
        b"\x80\x00\x01\xff",  # a content type that is no UTF-8
        b"\x00\x80\x01\xff",  # a message id that is none
        b"\x00\x80\x05abc",  # one that leads beyond its frame
        b"\x80\x00",
        b"\x40\x00",
        b"\x10\x00",
        b"\x08\x00",
        b"\x00\x40\0\0",
        b"\x20",
        b"",
    ],
)
def test_properties_that_are_none_are_malformed(content: bytes) -> None:
    data = b"before" + content + b"\xcebehind" + bytes(100)

    with pytest.raises(Malformed):
        frames.read_properties(data, 6, 6 + len(content))
    assert frames.read_message_id(data, 6, 6 + len(content)) == ""


@given(RAW_TABLES, st.data())
def test_a_table_that_is_cut_is_malformed_or_shorter(entries: bytes, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(entries)))
    whole = frames.read_table(entries, 0, len(entries)).values

    try:
        read = frames.read_table(entries, 0, cut).values
    except Malformed:
        return
    assert same(read, dict(list(whole.items())[: len(read)]))
    assert (len(read) == len(whole)) == (cut == len(entries))


READERS: list[Callable[[bytes, int, int], object]] = [
    frames.read_table,
    frames.read_properties,
    frames.read_deliver,
    frames.read_confirm,
    frames.read_body_size,
]


@pytest.mark.parametrize("read", READERS)
@given(before=st.binary(max_size=4), content=st.binary(max_size=60), behind=st.binary(max_size=60))
def test_garbage_is_read_or_malformed(
    read: Callable[[bytes, int, int], object], before: bytes, content: bytes, behind: bytes
) -> None:
    def outcome(data: bytes, at: int, end: int) -> str:
        try:
            return repr(read(data, at, end))
        except Malformed:
            return "malformed"

    alone = outcome(content, 0, len(content))

    # What is around it says nothing about it.
    assert outcome(before + content + behind, len(before), len(before) + len(content)) == alone


@given(RAW_TABLES, st.lists(st.tuples(st.integers(0, 500), st.integers(0, 255)), min_size=1, max_size=5))
def test_a_damaged_table_is_malformed_or_read_as_the_client_reads_it(
    entries: bytes, damages: list[tuple[int, int]]
) -> None:
    damaged = bytearray(entries)
    for place, byte in damages:
        if damaged:
            damaged[place % len(damaged)] = byte

    try:
        ours = frames.read_table(bytes(damaged), 0, len(damaged)).values
    except Malformed:
        return
    try:
        _, theirs = decode.field_table(sized(bytes(damaged)))
    except (ValueError, OverflowError):
        return  # a timestamp that is no moment
    assert same(ours, theirs)


# ── methods ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def arguments(written: bytes) -> tuple[bytes, int, int]:
    """Where a method frame's arguments are: behind seven bytes of the frame and four of the method."""
    return written, 11, len(written) - 1


def method_of(written: bytes) -> int:
    return int.from_bytes(written[7:11], "big")


@given(CHANNELS, SHORT, TAGS, st.booleans(), EXCHANGES, SHORT)
def test_deliver(channel: int, consumer: str, tag: int, is_redelivered: bool, exchange: str, key: str) -> None:
    written = frame.marshal(Basic.Deliver(consumer, tag, is_redelivered, exchange, key), channel)

    assert method_of(written) == frames.DELIVER
    assert frames.read_deliver(*arguments(written)) == (tag, is_redelivered, exchange, key)


def test_a_key_that_is_no_utf8_does_not_keep_an_event_from_being_read() -> None:
    written = named("c") + struct.pack(">QB", 7, 0) + b"\x01e\x02k\xff"

    assert frames.read_deliver(written, 0, len(written)) == (7, False, "e", "k\udcff")


def test_a_deliver_that_is_cut_anywhere_is_malformed() -> None:
    written, at, end = arguments(frame.marshal(Basic.Deliver("tag", 7, True, "events", "fact.v1"), 3))
    more = written + frame.marshal(Basic.Deliver("tag", 8, True, "events", "fact.v1"), 3)

    for cut in [*range(at, end), end + 1]:
        with pytest.raises(Malformed):
            frames.read_deliver(more, at, cut)


@given(CHANNELS, TAGS, st.booleans())
def test_confirms(channel: int, tag: int, is_multiple: bool) -> None:
    for method, expected in (
        (Basic.Ack(tag, is_multiple), frames.ACK),
        (Basic.Nack(tag, is_multiple, requeue=True), frames.NACK),
        (Basic.Nack(tag, is_multiple, requeue=False), frames.NACK),
    ):
        written = frame.marshal(method, channel)

        assert method_of(written) == expected
        assert frames.read_confirm(*arguments(written)) == (tag, is_multiple)


@given(CHANNELS, SHORT)
def test_return_is_known_by_its_message_id(channel: int, id_: str) -> None:
    method = frame.marshal(Basic.Return(312, "NO_ROUTE", "events", "fact.v1"), channel)
    header = frame.marshal(ContentHeader(body_size=3, properties=Basic.Properties(message_id=id_)), channel)

    assert method_of(method) == frames.RETURN
    assert frames.read_message_id(header, 7 + 12, len(header) - 1) == id_
    assert frames.read_body_size(header, 7, len(header) - 1) == 3


@given(CHANNELS, EXCHANGES, SHORT)
def test_the_client_reads_our_publish(channel: int, exchange: str, key: str) -> None:
    used, on, read = frame.unmarshal(written := frames.publish_frame(channel, exchange, key))

    assert (used, on) == (len(written), channel)
    assert isinstance(read, Basic.Publish)
    assert (read.exchange, read.routing_key, read.mandatory, read.immediate) == (exchange, key, True, False)


@given(CHANNELS, TAGS, st.booleans())
def test_the_client_reads_what_we_settle_with(channel: int, tag: int, yes: bool) -> None:
    read = [
        frame.unmarshal(written)[1:]
        for written in (
            frames.ack_frame(channel, tag, is_multiple=yes),
            frames.reject_frame(channel, tag, is_requeued=yes),
            frames.nack_frame(channel, tag, is_requeued=yes),
        )
    ]

    assert [on for on, _ in read] == [channel] * 3
    ack, reject, nack = (one for _, one in read)
    assert isinstance(ack, Basic.Ack)
    assert (ack.delivery_tag, ack.multiple) == (tag, yes)
    assert isinstance(reject, Basic.Reject)
    assert (reject.delivery_tag, reject.requeue) == (tag, yes)
    assert isinstance(nack, Basic.Nack)
    assert (nack.delivery_tag, nack.multiple, nack.requeue) == (tag, False, yes)


def test_a_name_of_more_than_255_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="256 bytes"):
        frames.publish_frame(1, "events", "k" * 256)
