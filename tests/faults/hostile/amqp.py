"""AMQP 0-9-1 as bytes: properties with every field type that there is, and a blocking connection that sends them.

No client library would send what this sends, nor read it: values stay as they are on the wire, a name or a text is
bytes, and a name may be there twice.
"""

from __future__ import annotations

import hashlib
import select
import socket
import struct
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from pamqp import commands, frame
from pamqp.base import Frame

# A type's letter and its value: bytes for S and x, int for b B s u I i l L T, float for f d, bool for t, None for V,
# (scale, number) for D, fields for A, and names with fields for F; under "=" the whole field as bytes.
# Any: a closed union would be recursive and as wide.
Field = tuple[str, Any]
Table = Sequence[tuple[bytes, Field]]

_NUMBERS = {"b": ">b", "B": ">B", "s": ">h", "u": ">H", "I": ">i", "i": ">I", "l": ">q", "L": ">q", "T": ">Q",
            "f": ">f", "d": ">d", "t": ">?"}  # fmt: skip
_INTEGERS = frozenset("bBsuIilL")
# In the order of the specification, the highest bit first; each with how its value is written.
PROPERTIES = (
    "content_type", "content_encoding", "headers", "delivery_mode", "priority", "correlation_id", "reply_to",
    "expiration", "message_id", "timestamp", "type", "user_id", "app_id", "cluster_id",
)  # fmt: skip
_OCTETS = frozenset({"delivery_mode", "priority"})
SOCKET_S = 120.0
BATCH = 256 * 1024
DEEP = 50  # below this, tables are compared as bytes


# ── properties ────────────────────────────────────────────────────────────────────────────────────────────────────────


def encode_field(field: Field) -> bytes:
    kind, value = field
    if kind == "=":
        return bytes(value)
    letter = kind.encode()
    if kind in _NUMBERS:
        return letter + struct.pack(_NUMBERS[kind], value)
    if kind in "Sx":
        return letter + _counted(value)
    if kind == "V":
        return letter
    if kind == "D":
        return letter + struct.pack(">BI", *value)
    if kind == "A":
        return letter + _counted(b"".join(map(encode_field, value)))
    return letter + encode_table(value)


def encode_table(table: Table) -> bytes:
    return _counted(b"".join(bytes([len(name)]) + name + encode_field(field) for name, field in table))


def _counted(content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + content


def encode_properties(values: Mapping[str, Any]) -> bytes:
    """The flags and the values of *values*: bytes, an int for an octet or the timestamp, a table for the headers."""
    flags, parts = 0, []
    for place, name in enumerate(PROPERTIES):
        if name in values:
            flags |= 1 << (15 - place)
            parts.append(_encode_property(name, values[name]))
    return struct.pack(">H", flags) + b"".join(parts)


def _encode_property(name: str, value: Any) -> bytes:
    if name == "headers":
        return encode_table(value)
    if name in _OCTETS:
        return bytes([value])
    if name == "timestamp":
        return struct.pack(">Q", value)
    return bytes([len(value)]) + bytes(value)


def nested(depth: int) -> Field:
    """A table in a table in a table, *depth* times: more than a recursive function could write, or read."""
    inner = encode_field(("F", ()))
    size, heads = len(inner), []
    for _ in range(depth):
        heads.append(b"F" + struct.pack(">I", size + 2) + b"\x01a")
        size += len(heads[-1])
    return "=", b"".join(reversed(heads)) + inner


def decode_properties(properties: bytes) -> dict[str, Any]:
    """What `encode_properties` was given, with the headers as names and encoded fields."""
    (flags,) = struct.unpack_from(">H", properties)
    at, values = 2, {}
    for place, name in enumerate(PROPERTIES):
        if flags & 1 << (15 - place):
            values[name], at = _decode_property(name, properties, at)
    return values


def _decode_property(name: str, data: bytes, at: int) -> tuple[Any, int]:
    if name == "headers":
        end = at + 4 + _count_at(data, at)
        return _entries(data, at + 4, end), end
    if name in _OCTETS:
        return data[at], at + 1
    if name == "timestamp":
        return struct.unpack_from(">Q", data, at)[0], at + 8
    end = at + 1 + data[at]
    return data[at + 1 : end], end


def _entries(data: bytes, at: int, end: int) -> list[tuple[bytes, bytes]]:
    """The names in a table, each with its encoded field."""
    entries = []
    while at < end:
        begin = at + 1
        at = begin + data[at]
        name, begin = data[begin:at], at
        at = _end_of_field(data, at)
        entries.append((name, data[begin:at]))
    return entries


def _end_of_field(data: bytes, at: int) -> int:
    kind, at = chr(data[at]), at + 1
    if kind in _NUMBERS:
        return at + struct.calcsize(_NUMBERS[kind])
    if kind == "V":
        return at
    if kind == "D":
        return at + 5
    assert kind in "SxAF", f"an unknown type of field: {kind!r}"
    return at + 4 + _count_at(data, at)


def _count_at(data: bytes, at: int) -> int:
    count: int = struct.unpack_from(">I", data, at)[0]
    return count


def value_of(field: bytes, depth: int = 0) -> tuple[str, str]:
    """What an encoded field says, however wide its number is written, and in whatever order its names are."""
    kind = chr(field[0])
    if kind in _NUMBERS:
        (number,) = struct.unpack_from(_NUMBERS[kind], field, 1)
        return "int" if kind in _INTEGERS else "float" if kind in "fd" else kind, repr(number)
    if kind not in "AF" or depth > DEEP:
        return kind, repr(field)
    if kind == "F":
        return kind, _digest(sorted((name, value_of(one, depth + 1)) for name, one in entries_of(field)))
    return kind, _digest([value_of(one, depth + 1) for one in elements_of(field)])


def entries_of(table: bytes) -> list[tuple[bytes, bytes]]:
    """The names in a field of type F, each with its encoded field."""
    return _entries(table, 5, len(table))


def elements_of(array: bytes) -> list[bytes]:
    """The encoded fields in a field of type A."""
    at, elements = 5, []
    while at < len(array):
        begin, at = at, _end_of_field(array, at)
        elements.append(array[begin:at])
    return elements


def _digest(values: object) -> str:
    # Not the text itself: a text in a text in a text doubles its quotes each time.
    return hashlib.sha256(repr(values).encode()).hexdigest()


# ── the connection ────────────────────────────────────────────────────────────────────────────────────────────────────


class Refused(Exception):
    """The broker closed the channel or the connection, and this is what it said."""


@dataclass(frozen=True, slots=True)
class Raw:
    """A message as it is on the wire."""

    key: bytes
    properties: bytes
    body: bytes


class Connection:
    """A blocking connection with one channel in confirm mode; a context manager."""

    def __init__(self, url: str) -> None:
        parts = urllib.parse.urlsplit(url)
        self._socket = socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 5672), timeout=SOCKET_S)
        self._buffer = bytearray()
        self._published = self._confirmed = 0
        login = f"\0{parts.username or 'guest'}\0{parts.password or 'guest'}"
        self._socket.sendall(b"AMQP\x00\x00\x09\x01")
        self._wait_for(commands.Connection.Start)
        self._send(commands.Connection.StartOk({}, "PLAIN", login, "en_US"), channel=0)
        tune = self._wait_for(commands.Connection.Tune)
        self.frame_max: int = tune.frame_max
        self._send(commands.Connection.TuneOk(tune.channel_max, tune.frame_max, 0), channel=0)
        vhost = urllib.parse.unquote(parts.path[1:]) or "/"
        self._send(commands.Connection.Open(vhost), channel=0)
        self._wait_for(commands.Connection.OpenOk)
        self.call(commands.Channel.Open(), commands.Channel.OpenOk)
        self.call(commands.Confirm.Select(), commands.Confirm.SelectOk)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def call(self, method: Frame, answer: type[Frame]) -> Any:
        """Send *method* and return the broker's *answer*."""
        self._send(method)
        return self._wait_for(answer)

    def count(self, queue: str) -> int:
        """How many messages wait in *queue*; those that a consumer holds are not among them."""
        declared = self.call(commands.Queue.Declare(queue=queue, passive=True), commands.Queue.DeclareOk)
        count: int = declared.message_count
        return count

    # ── publishing ──────────────────────────────────────────────────────────────────────────────────────────────────

    def publish(
        self, exchange: str, messages: Iterator[Raw], *, progress: Callable[[int], None] = lambda _: None
    ) -> int:
        """Publish *messages*, and return how many once all are confirmed."""
        batch = bytearray()
        for message in messages:
            batch += self._frames(exchange.encode(), message)
            self._published += 1
            if len(batch) >= BATCH:
                self._socket.sendall(batch)
                batch.clear()
                self._take_in()
                progress(self._published)
        self._socket.sendall(batch)
        while self._confirmed < self._published:
            self._read()
            self._take_in()
        return self._published

    def _frames(self, exchange: bytes, message: Raw) -> bytes:
        method = struct.pack(">HHHB", 60, 40, 0, len(exchange)) + exchange
        method += bytes([len(message.key)]) + message.key + b"\0"
        parts = [_frame(1, method)]
        parts.append(_frame(2, struct.pack(">HHQ", 60, 0, len(message.body)) + message.properties))
        room = self.frame_max - 8
        parts += [_frame(3, message.body[at : at + room]) for at in range(0, len(message.body), room)]
        return b"".join(parts)

    def _take_in(self) -> None:
        """Note what has been confirmed."""
        while select.select([self._socket], [], [], 0)[0]:
            self._read()
        while (payload := self._next_frame()) is not None:
            self._note(payload)

    def _note(self, payload: tuple[int, bytes]) -> None:
        kind, content = payload
        if kind == 1 and content[:4] == b"\x00\x3c\x00\x50":  # basic.ack: of a tag, or of all up to it
            (tag,) = struct.unpack_from(">Q", content, 4)
            self._confirmed = tag if content[12] & 1 else self._confirmed + 1
        elif kind == 1:
            self._refuse_if_closed(_method(content))

    # ── consuming ───────────────────────────────────────────────────────────────────────────────────────────────────

    def take_all(self, queue: str) -> Iterator[Raw]:
        """What is in *queue* now, taken out of it."""
        left = self.count(queue)
        self._send(commands.Basic.Consume(queue=queue, no_ack=True))
        while left:
            kind, content = self._frame()
            if kind == 1 and content[:4] == b"\x00\x3c\x00\x3c":  # basic.deliver
                left -= 1
                yield self._message(content)

    def _message(self, deliver: bytes) -> Raw:
        key = deliver
        at = 4
        at += 1 + deliver[at]  # the consumer's tag
        at += 9  # the delivery's, and whether it is redelivered
        at += 1 + deliver[at]  # the exchange
        key = deliver[at + 1 : at + 1 + deliver[at]]
        _, header = self._frame()
        (size,) = struct.unpack_from(">Q", header, 4)
        body = bytearray()
        while len(body) < size:
            body += self._frame()[1]
        return Raw(key, header[12:], bytes(body))

    # ── frames ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _send(self, method: Frame, channel: int = 1) -> None:
        self._socket.sendall(frame.marshal(method, channel))

    def _wait_for(self, answer: type[Frame]) -> Any:
        while True:
            kind, content = self._frame()
            if kind == 1:
                method = _method(content)
                self._refuse_if_closed(method)
                if isinstance(method, answer):
                    return method

    def _refuse_if_closed(self, method: Frame) -> None:
        if isinstance(method, commands.Channel.Close | commands.Connection.Close):
            raise Refused(f"{method.reply_code} {method.reply_text}")

    def _frame(self) -> tuple[int, bytes]:
        while (found := self._next_frame()) is None:
            self._read()
        return found

    def _next_frame(self) -> tuple[int, bytes] | None:
        if len(self._buffer) < 7:
            return None
        kind, _, size = struct.unpack_from(">BHI", self._buffer)
        if len(self._buffer) < size + 8:
            return None
        content = bytes(self._buffer[7 : 7 + size])
        del self._buffer[: size + 8]
        return kind, content

    def _read(self) -> None:
        read = self._socket.recv(1024 * 1024)
        if not read:
            raise Refused("the broker hung up")
        self._buffer += read


def _frame(kind: int, content: bytes) -> bytes:
    return struct.pack(">BHI", kind, 1, len(content)) + content + b"\xce"


def _method(content: bytes) -> Frame:
    method: Frame = commands.INDEX_MAPPING[struct.unpack_from(">I", content)[0]]()
    method.unmarshal(content[4:])
    return method
