"""AMQP 0-9-1 as bytes: the frames that carry events, written and read in one pass. No input or output here.

Only what the lane needs: basic.publish, deliver, return, ack, nack, reject, and the content header with its properties
and tables. Everything else stays with the client. Field types are RabbitMQ's (the errata of the specification: `l` and
`L` are both signed, `x` is bytes). What somebody else encoded in a way that we would not is kept as it came, byte for
byte, beside its value: see `Table`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from functools import lru_cache
from typing import Final

METHOD: Final = 1
HEADER: Final = 2
BODY: Final = 3
HEARTBEAT: Final = b"\x08\x00\x00\x00\x00\x00\x00\xce"
END: Final = 0xCE
OVERHEAD: Final = 8  # of a frame: seven bytes before its payload, one behind it

PUBLISH: Final = 0x003C_0028
RETURN: Final = 0x003C_0032
DELIVER: Final = 0x003C_003C
ACK: Final = 0x003C_0050
REJECT: Final = 0x003C_005A
NACK: Final = 0x003C_0078

MAX_DEPTH: Final = 64  # of tables in tables; deeper ones are nobody's headers

_FRAME: Final = struct.Struct(">BHI")
_ACK: Final = struct.Struct(">BHIIQBB")
_U16: Final = struct.Struct(">H")
_U32: Final = struct.Struct(">I")
_I32: Final = struct.Struct(">i")
_I64: Final = struct.Struct(">q")
_U64: Final = struct.Struct(">Q")
_HEADER: Final = struct.Struct(">BHIHHQ")  # the frame's own, then class, weight and the body's size
_LENGTH: Final = tuple(bytes((length,)) for length in range(256))
_TAG_AND_BITS: Final = struct.Struct(">QB")
_LEAST_HEADER: Final = 14  # class, weight and size of the body, and the flags of the properties

# The properties in the order of their flags, from bit 15 downwards.
_NAMES: Final = (
    "content_type", "content_encoding", "headers", "delivery_mode", "priority", "correlation_id", "reply_to",
    "expiration", "message_id", "timestamp", "message_type", "user_id", "app_id", "cluster_id",
)  # fmt: skip
_FLAGS: Final = {name: 1 << (15 - place) for place, name in enumerate(_NAMES)}
_SHORT_STRINGS: Final = frozenset(_NAMES) - {"headers", "delivery_mode", "priority", "timestamp"}
_BEFORE_ID: Final = ("priority", "correlation_id", "reply_to")
_AFTER_ID: Final = ("timestamp", "message_type", "app_id")
_CONTENT_TYPE: Final = _FLAGS["content_type"]
_OURS: Final = _FLAGS["headers"] | _FLAGS["delivery_mode"] | _FLAGS["message_id"]
_PERSISTENT: Final = b"\x02"
_JSON_TYPE: Final = b"\x10application/json"  # nearly everybody's content type


class Malformed(ValueError):
    """These bytes are no AMQP: a length that leads beyond the end, an unknown type, a name that is no UTF-8."""


# ── tables ────────────────────────────────────────────────────────────────────────────────────────────────────────────


# Made for each event, and so not frozen: to freeze one costs more than to read it.
@dataclass(slots=True)
class Table:
    """Headers as values; by name, the bytes (type and value) of those that we would write otherwise."""

    values: dict[str, object]
    foreign: dict[str, bytes]


TEXT: Final = 0x53  # S, which most are


def read_table(data: bytes, begin: int, end: int) -> Table:
    """The table whose entries are `data[begin:end]`; of a name that comes twice, the last value, and all bytes.

    Raises:
        Malformed: they are none.
    """
    values: dict[str, object] = {}
    foreign: dict[str, bytes] = {}
    at, entries = begin, 0
    try:
        while at < end:
            entries += 1
            size = data[at]
            name = str(data[at + 1 : (at := at + 1 + size)], "utf-8")
            kind = data[at]
            if kind == TEXT:
                (size,) = _U32.unpack_from(data, at + 1)
                stop = at + 5 + size
                raw = data[at + 5 : stop]
                try:
                    values[name] = str(raw, "utf-8")
                    if foreign:
                        foreign.pop(name, None)
                except UnicodeDecodeError:
                    values[name], foreign[name] = raw, data[at:stop]
            else:
                value, stop = read_value(data, at, end, 0)
                values[name] = value
                if kind == 0x74 and data[at + 1] < 2:  # t
                    foreign.pop(name, None)
                else:
                    foreign[name] = data[at:stop]
            at = stop
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise Malformed(f"a header table: {error}") from None
    if at != end:
        raise Malformed("a header table: an entry leads beyond its end")
    if entries != len(values):
        foreign |= _repeated(data, begin, end)
    return Table(values, foreign)


def _repeated(data: bytes, at: int, end: int) -> dict[str, bytes]:
    """Of a table that is read already, the values of names that come more than once, with their names in between.

    Written behind the name, they are all there again; only the place among the other names is the first one's.
    """
    found: dict[bytes, list[bytes]] = {}
    while at < end:
        begin, at = at, at + 1 + data[at]
        _, stop = read_value(data, at, end, 0)
        found.setdefault(data[begin:at], []).append(data[at:stop])
        at = stop
    return {str(name[1:], "utf-8"): name.join(values) for name, values in found.items() if len(values) > 1}


def read_value(data: bytes, at: int, end: int, depth: int) -> tuple[object, int]:
    """The value whose type is at *at*, and where it ends."""
    read = _READERS.get(data[at])
    if read is None:
        raise Malformed(f"a header table: no type {data[at : at + 1]!r}")
    if depth > MAX_DEPTH:
        raise Malformed(f"a header table: more than {MAX_DEPTH} in one another")
    value, stop = read(data, at + 1, end, depth)
    if stop > end:
        raise Malformed("a header table: a value leads beyond its end")
    return value, stop


_Reader = Callable[[bytes, int, int, int], tuple[object, int]]


def _number(layout: str) -> _Reader:
    packed = struct.Struct(layout)

    def read(data: bytes, at: int, _end: int, _depth: int) -> tuple[object, int]:
        return packed.unpack_from(data, at)[0], at + packed.size

    return read


def _read_bool(data: bytes, at: int, _end: int, _depth: int) -> tuple[object, int]:
    return data[at] != 0, at + 1


def _read_void(_data: bytes, at: int, _end: int, _depth: int) -> tuple[object, int]:
    return None, at


def _read_decimal(data: bytes, at: int, _end: int, _depth: int) -> tuple[object, int]:
    (unscaled,) = _I32.unpack_from(data, at + 1)
    return Decimal(f"{unscaled}E-{data[at]}"), at + 5  # exact, whatever the context of this thread


def _read_timestamp(data: bytes, at: int, _end: int, _depth: int) -> tuple[object, int]:
    (seconds,) = _U64.unpack_from(data, at)
    return moment(seconds), at + 8


def moment(seconds: int) -> datetime:
    """An AMQP timestamp. Beyond the year 2106 it is in milliseconds, as several senders have it.

    Raises:
        Malformed: it is beyond the year 9999 then, too.
    """
    try:
        return datetime.fromtimestamp(seconds / 1000 if seconds > 0xFFFF_FFFF else seconds, UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise Malformed(f"a timestamp: {error}") from None


def _slice(data: bytes, at: int, end: int) -> tuple[bytes, int]:
    (size,) = _U32.unpack_from(data, at)
    stop = at + 4 + size
    if stop > end:
        raise Malformed("a header table: a value leads beyond its end")
    return data[at + 4 : stop], stop


def _read_string(data: bytes, at: int, end: int, _depth: int) -> tuple[object, int]:
    raw, stop = _slice(data, at, end)
    try:
        return str(raw, "utf-8"), stop
    except UnicodeDecodeError:
        return raw, stop


def _read_bytes(data: bytes, at: int, end: int, _depth: int) -> tuple[object, int]:
    raw, stop = _slice(data, at, end)
    return bytearray(raw), stop


def _read_array(data: bytes, at: int, end: int, depth: int) -> tuple[object, int]:
    stop = at + 4 + _U32.unpack_from(data, at)[0]
    if stop > end:
        raise Malformed("a header table: an array leads beyond its end")
    at += 4
    values: list[object] = []
    while at < stop:
        value, at = read_value(data, at, stop, depth + 1)
        values.append(value)
    return values, stop


def _read_inner_table(data: bytes, at: int, end: int, depth: int) -> tuple[object, int]:
    stop = at + 4 + _U32.unpack_from(data, at)[0]
    if stop > end:
        raise Malformed("a header table: an inner one leads beyond its end")
    at += 4
    values: dict[str, object] = {}
    while at < stop:
        size = data[at]
        name = str(data[at + 1 : (at := at + 1 + size)], "utf-8")
        values[name], at = read_value(data, at, stop, depth + 1)
    return values, stop


_READERS: Final[Mapping[int, _Reader]] = {
    ord("t"): _read_bool,
    ord("b"): _number(">b"),
    ord("B"): _number(">B"),
    ord("s"): _number(">h"),
    ord("u"): _number(">H"),
    ord("I"): _number(">i"),
    ord("i"): _number(">I"),
    ord("l"): _number(">q"),
    ord("L"): _number(">q"),
    ord("f"): _number(">f"),
    ord("d"): _number(">d"),
    ord("D"): _read_decimal,
    ord("S"): _read_string,
    ord("A"): _read_array,
    ord("T"): _read_timestamp,
    ord("F"): _read_inner_table,
    ord("V"): _read_void,
    0: _read_void,  # seen in the wild
    ord("x"): _read_bytes,
}


def write_plain(headers: Mapping[str, object], foreign: Mapping[str, bytes]) -> bytes | None:
    """The table of *headers*, its size first; None if a value is neither plain (str, bool, int64) nor in *foreign*.

    Raises:
        ValueError: a name or a text does not fit, or is no text.
    """
    parts: list[bytes] = []
    for name, value in headers.items():
        if type(value) is str and name in _REPEATED and name not in foreign:
            parts.append(_text_entry(name, value))
            continue
        encoded = _ENCODED_NAMES.get(name) or _encoded_name(name)
        if name in foreign:
            parts += (encoded, foreign[name])
        elif type(value) is str:
            text = value.encode()
            size = len(text)
            parts += (encoded, _TEXT_OF[size] if size < 256 else b"S" + _U32.pack(size), text)
        elif type(value) is bool:
            parts += (encoded, b"t\x01" if value else b"t\x00")
        elif type(value) is int:
            if not -(2**63) <= value < 2**63:
                return None
            parts += (encoded, write_int(value))
        else:
            return None
    table = b"".join(parts)
    return _U32.pack(len(table)) + table


# The same for all events of a type that a program sends.
_REPEATED: Final = frozenset(
    {"cloudEvents_specversion", "cloudEvents_type", "cloudEvents_source", "cloudEvents_dataschema"}
)


@lru_cache(maxsize=4096)
def _text_entry(name: str, value: str) -> bytes:
    text = value.encode()
    return _encoded_name(name) + b"S" + _U32.pack(len(text)) + text


_TEXT_OF: Final = tuple(b"S" + _U32.pack(size) for size in range(256))  # what comes before a short one


def write_int(value: int) -> bytes:
    """The smallest that holds it, type first, as the client writes it."""
    for kind, packed, least, most in _INTS:
        if least <= value <= most:
            return kind + packed.pack(value)
    raise ValueError(f"{value} takes more than 64 bits")


_INTS: Final = (
    (b"b", struct.Struct(">b"), -(2**7), 2**7 - 1),
    (b"s", struct.Struct(">h"), -(2**15), 2**15 - 1),
    (b"u", struct.Struct(">H"), 0, 2**16 - 1),
    (b"I", _I32, -(2**31), 2**31 - 1),
    (b"i", _U32, 0, 2**32 - 1),
    (b"l", _I64, -(2**63), 2**63 - 1),
)

MAX_NAME_BYTES: Final = 128  # as the client has it, so that both ways refuse the same
_MAX_NAMES: Final = 1000
_ENCODED_NAMES: Final[dict[str, bytes]] = {}


def _encoded_name(name: str) -> bytes:
    encoded = name.encode()
    if len(encoded) > MAX_NAME_BYTES:
        raise ValueError(f"a header's name takes {len(encoded)} bytes, and {MAX_NAME_BYTES} fit")
    encoded = bytes((len(encoded),)) + encoded
    if len(_ENCODED_NAMES) < _MAX_NAMES:  # names are few, but foreign ones need not be
        _ENCODED_NAMES[name] = encoded
    return encoded


def write_short(what: str, text: str) -> bytes:
    """*text* with its length in one byte before it.

    Raises:
        ValueError: it does not fit, or is no text.
    """
    encoded = text.encode()
    if len(encoded) > 255:
        raise ValueError(f"{what} takes {len(encoded)} bytes, and 255 fit")
    return bytes((len(encoded),)) + encoded


# ── content headers ───────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class Properties:
    """What a content header holds."""

    table: Table
    content_type: str | None
    message_id: str | None
    others: dict[str, object]  # by the names of `_NAMES`


NO_TABLE: Final = Table({}, {})
_ALL_OTHERS: Final = 0x1FFC
ONLY_PERSISTENT: Final[dict[str, object]] = {"delivery_mode": 2}  # shared, as it is what nearly all have
_PERSISTENT_WITH_ID: Final = _FLAGS["delivery_mode"] | _FLAGS["message_id"]  # as ours are


def read_properties(
    data: bytes, at: int, end: int, read_table: Callable[[bytes, int, int], Table] = read_table
) -> Properties:
    """The properties that begin with their flags at *at*.

    Raises:
        Malformed: they are none.
    """
    try:
        (flags,) = _U16.unpack_from(data, at)
        at += 2
        if flags & 3:
            raise Malformed("properties that nobody knows")
        table, content_type, message_id = NO_TABLE, None, None
        others: dict[str, object] = {}
        if flags & 0x8000:
            if data.startswith(_JSON_TYPE, at):
                content_type, stop = "application/json", at + len(_JSON_TYPE)
            else:
                stop = at + 1 + data[at]
                content_type = str(data[at + 1 : stop], "utf-8")
            at = stop
        if flags & 0x4000:
            stop = at + 1 + data[at]
            others["content_encoding"] = str(data[at + 1 : stop], "utf-8")
            at = stop
        if flags & 0x2000:
            stop = at + 4 + _U32.unpack_from(data, at)[0]
            if stop > end:
                raise Malformed("a header table leads beyond its frame")
            table = read_table(data, at + 4, stop)
            at = stop
        if flags & _ALL_OTHERS == _PERSISTENT_WITH_ID and not others and data[at] == 2:
            others = ONLY_PERSISTENT
            stop = at + 2 + data[at + 1]
            message_id = str(data[at + 2 : stop], "utf-8")
            at = stop
        elif flags & _ALL_OTHERS:
            at, message_id = _read_others(data, at, flags, others)
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise Malformed(f"properties: {error}") from None
    if at != end:
        raise Malformed("properties that end before or behind their frame")
    return Properties(table, content_type, message_id, others)


def _read_others(data: bytes, at: int, flags: int, others: dict[str, object]) -> tuple[int, str | None]:
    message_id = None
    if flags & 0x1000:
        others["delivery_mode"] = data[at]
        at += 1
    if flags & 0x0800:
        others["priority"] = data[at]
        at += 1
    for name in _NAMES[5:]:
        if not flags & _FLAGS[name]:
            continue
        if name == "timestamp":
            others[name] = moment(_U64.unpack_from(data, at)[0])
            at += 8
            continue
        stop = at + 1 + data[at]
        text = str(data[at + 1 : stop], "utf-8")
        if name == "message_id":
            message_id = text
        else:
            others[name] = text
        at = stop
    return at, message_id


def write_properties(content_type: str | None, table: bytes, properties: Mapping[str, object]) -> tuple[bytes, bytes]:
    """What comes before and behind the message id, from the flags on: always persistent, always with an id.

    Raises:
        ValueError, TypeError, struct.error: a value does not fit.
    """
    if not properties:
        return _before_table(content_type) + table + _PERSISTENT, b""
    flags = _OURS
    parts = [b"", b"", b"", table, _PERSISTENT]
    if content_type:
        flags |= _CONTENT_TYPE
        parts[1] = write_short("the content type", content_type)
    tail: list[bytes] = []
    for name in ("content_encoding", *_BEFORE_ID, *_AFTER_ID):
        value = properties.get(name)
        if value is None:
            continue
        flags |= _FLAGS[name]
        encoded = _write_property(name, value)
        if name == "content_encoding":
            parts[2] = encoded
        elif name in _BEFORE_ID:
            parts.append(encoded)
        else:
            tail.append(encoded)
    parts[0] = _U16.pack(flags)
    return b"".join(parts), b"".join(tail)


@lru_cache(maxsize=256)
def _before_table(content_type: str | None) -> bytes:
    """The flags, and the content type, of what has no other properties than ours."""
    if not content_type:
        return _U16.pack(_OURS)
    return _U16.pack(_OURS | _CONTENT_TYPE) + write_short("the content type", content_type)


def _write_property(name: str, value: object) -> bytes:
    if name == "priority":
        if type(value) is not int:
            raise TypeError(f"the priority is a {type(value).__name__}")
        return bytes((value,))
    if name == "timestamp":
        if isinstance(value, datetime):
            aware = value if value.tzinfo is not None else value.replace(tzinfo=UTC)
            return _U64.pack(int(aware.timestamp()))
        if type(value) is int:
            return _U64.pack(value)
        raise TypeError(f"the timestamp is a {type(value).__name__}")
    if not isinstance(value, str):
        raise TypeError(f"{name} is a {type(value).__name__}")
    return write_short(name, value)


# ── methods ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def publish_frame(channel: int, exchange: str, key: str) -> bytes:
    """basic.publish, mandatory."""
    payload = (
        b"\x00\x3c\x00\x28\x00\x00"
        + write_short("the exchange's name", exchange)
        + write_short("the routing key", key)
        + b"\x01"
    )
    return _FRAME.pack(METHOD, channel, len(payload)) + payload + b"\xce"


def content_frames(channel: int, head: bytes, message_id: bytes, tail: bytes, body: bytes, frame_max: int) -> bytes:
    """The header frame and as many body frames as it takes (none for an empty body)."""
    length = len(body)
    size = 13 + len(head) + len(message_id) + len(tail)
    header = (
        _HEADER.pack(HEADER, channel, size, 60, 0, length),
        head,
        _LENGTH[len(message_id)],
        message_id,
        tail,
        b"\xce",
    )
    room = frame_max - OVERHEAD if frame_max else length
    if 0 < length <= room:
        return b"".join((*header, _FRAME.pack(BODY, channel, length), body, b"\xce"))
    parts = [*header]
    for start in range(0, length, room or 1):
        piece = body[start : start + room]
        parts += (_FRAME.pack(BODY, channel, len(piece)), piece, b"\xce")
    return b"".join(parts)


def ack_frame(channel: int, tag: int, *, is_multiple: bool) -> bytes:
    return _ACK.pack(METHOD, channel, 13, ACK, tag, is_multiple, END)


def reject_frame(channel: int, tag: int, *, is_requeued: bool) -> bytes:
    return _ACK.pack(METHOD, channel, 13, REJECT, tag, is_requeued, END)


def nack_frame(channel: int, tag: int, *, is_requeued: bool) -> bytes:
    """basic.nack of *tag* alone."""
    return _ACK.pack(METHOD, channel, 13, NACK, tag, 2 * is_requeued, END)


def read_confirm(data: bytes, at: int, end: int) -> tuple[int, bool]:
    """The tag of a basic.ack or basic.nack whose arguments are `data[at:end]`, and whether all before it are meant too.

    Raises:
        Malformed: it is none.
    """
    if end - at != _TAG_AND_BITS.size:
        raise Malformed("a confirm that ends before or behind its frame")
    tag, bits = _TAG_AND_BITS.unpack_from(data, at)
    return tag, bool(bits & 1)


def read_deliver(data: bytes, at: int, end: int) -> tuple[int, bool, str, str]:
    """Of a basic.deliver whose arguments are `data[at:end]`: tag, redelivered, exchange and routing key.

    In a key that is no UTF-8 the bytes that are not stand as lone surrogates.

    Raises:
        Malformed: it is none.
    """
    try:
        at += 1 + data[at]  # the consumer's tag
        tag, bits = _TAG_AND_BITS.unpack_from(data, at)
    except (IndexError, struct.error) as error:
        raise Malformed(f"basic.deliver: {error}") from None
    where = data[at + 9 : end]
    return tag, bits & 1 == 1, *(_ROUTES.get(where) or _route(where))


_MOST_ROUTES: Final = 4096
# A queue's deliveries come by few. Not an lru_cache: that writes to three entries to find one.
_ROUTES: Final[dict[bytes, tuple[str, str]]] = {}


def _route(where: bytes) -> tuple[str, str]:
    """The exchange and the routing key that *where* holds, and nothing else."""
    try:
        middle = 1 + where[0]
        stop = middle + 1 + where[middle]
    except IndexError as error:
        raise Malformed(f"basic.deliver: {error}") from None
    if stop != len(where):
        raise Malformed("a basic.deliver that ends before or behind its frame")
    if len(_ROUTES) >= _MOST_ROUTES:
        _ROUTES.clear()
    route = str(where[1:middle], "utf-8", "replace"), str(where[middle + 1 :], "utf-8", "surrogateescape")
    _ROUTES[where] = route
    return route


def read_body_size(data: bytes, at: int, end: int) -> int:
    """Of the content header that is `data[at:end]`. Its properties begin at `at + 12`.

    Raises:
        Malformed: it is none.
    """
    if end - at < _LEAST_HEADER:
        raise Malformed("a content header that is too short")
    size: int = _U64.unpack_from(data, at + 4)[0]
    return size


def read_message_id(data: bytes, at: int, end: int) -> str:
    """The message id of the properties that begin with their flags at *at*; empty if there is none."""
    try:
        return read_properties(data, at, end).message_id or ""
    except Malformed:
        return ""
