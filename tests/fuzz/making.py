"""What a broker sends, invented: frames of every kind on every channel, and cuts through them.

Everything comes from the given Random: the same seed, the same bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Final

from pamqp import frame
from pamqp.base import Frame
from pamqp.commands import Basic, Channel, Confirm, Connection, Queue
from pamqp.heartbeat import Heartbeat

FRAME_MAX: Final = 4096  # the least that AMQP allows, so that many bodies take several frames
CONSUMING: Final = (1, 2)
PUBLISHING: Final = 3
CLIENTS: Final = (4, 5)  # channels that are the client's alone
FIRST_NO_MOMENT: Final = 253_402_300_800_000  # in milliseconds: the year 10,000


# ── tables ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def sized(content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + content


def short(text: str) -> bytes:
    encoded = text.encode()
    return bytes((len(encoded),)) + encoded


def text(random: Random, longest: int = 12) -> str:
    return "".join(random.choices("abc-._ é€𝄞\0\xce", k=random.randint(0, longest)))


def number(random: Random, bits: int, *, signed: bool) -> int:
    value = random.choice((0, 1, 2 ** (bits - 1) - 1, 2 ** (bits - 1), 2**bits - 1, random.getrandbits(bits)))
    return value - 2 ** (bits - 1) if signed else value


def _packed(kind: bytes, layout: str, bits: int, *, signed: bool) -> Callable[[Random, int], bytes]:
    packing = struct.Struct(layout)
    return lambda random, _depth: kind + packing.pack(number(random, bits, signed=signed))


def _moment(random: Random, _depth: int) -> bytes:
    latest = random.choice((2**31, 2**32, FIRST_NO_MOMENT))
    return b"T" + struct.pack(">Q", random.randrange(latest))


def _decimal(random: Random, _depth: int) -> bytes:
    return b"D" + struct.pack(">Bi", random.randrange(256), number(random, 32, signed=True))


def _double(random: Random, _depth: int) -> bytes:
    return b"d" + random.choice((random.randbytes(8), struct.pack(">d", random.uniform(-1e6, 1e6))))


def _array(random: Random, depth: int) -> bytes:
    return b"A" + sized(b"".join(value(random, depth + 1) for _ in range(random.randrange(4))))


def _inner(random: Random, depth: int) -> bytes:
    return b"F" + sized(entries(random, depth + 1))


_VALUES: Final[Sequence[Callable[[Random, int], bytes]]] = (
    lambda random, _: b"S" + sized(text(random, 30).encode()),
    lambda random, _: b"S" + sized(random.randbytes(random.randrange(20))),
    lambda random, _: b"x" + sized(random.randbytes(random.randrange(20))),
    lambda random, _: b"t" + bytes((random.choice((0, 1, 1, 0, 7)),)),
    lambda random, _: random.choice((b"V", b"\0")),
    lambda random, _: b"f" + random.randbytes(4),
    _packed(b"b", ">b", 8, signed=True),
    _packed(b"B", ">B", 8, signed=False),
    _packed(b"s", ">h", 16, signed=True),
    _packed(b"u", ">H", 16, signed=False),
    _packed(b"I", ">i", 32, signed=True),
    _packed(b"i", ">I", 32, signed=False),
    _packed(b"l", ">q", 64, signed=True),
    _packed(b"L", ">q", 64, signed=True),
    _double,
    _decimal,
    _moment,
)


def value(random: Random, depth: int = 0) -> bytes:
    """A field of any type, its type first."""
    if depth < 4 and random.random() < 0.2:
        return random.choice((_array, _inner))(random, depth)
    return random.choice(_VALUES)(random, depth)


def entries(random: Random, depth: int = 0) -> bytes:
    """Those of a table."""
    return b"".join(short(text(random)) + value(random, depth) for _ in range(random.randrange(5)))


# ── content ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def properties(random: Random, message_id: str | None = None) -> bytes:
    """A content header's, from the flags on: each of the fourteen may be there."""
    flags, parts = 0, []

    def add(flag: int, encoded: bytes) -> None:
        nonlocal flags
        flags |= flag
        parts.append(encoded)

    def maybe(flag: int, make: Callable[[], bytes]) -> None:
        if random.random() < 0.3:
            add(flag, make())

    maybe(0x8000, lambda: short(text(random)))
    maybe(0x4000, lambda: short(text(random)))
    if random.random() < 0.8:
        add(0x2000, sized(entries(random)))
    maybe(0x1000, lambda: bytes((random.randrange(256),)))
    maybe(0x0800, lambda: bytes((random.randrange(256),)))
    maybe(0x0400, lambda: short(text(random)))
    maybe(0x0200, lambda: short(text(random)))
    maybe(0x0100, lambda: short(text(random)))
    if message_id is not None:
        add(0x0080, short(message_id))
    else:
        maybe(0x0080, lambda: short(text(random)))
    maybe(0x0040, lambda: _moment(random, 0)[1:])
    for flag in (0x0020, 0x0010, 0x0008, 0x0004):
        maybe(flag, lambda: short(text(random)))
    return struct.pack(">H", flags) + b"".join(parts)


def framed(kind: int, channel: int, payload: bytes) -> bytes:
    return struct.pack(">BHI", kind, channel, len(payload)) + payload + b"\xce"


def content(random: Random, channel: int, method: Frame, message_id: str | None = None) -> list[bytes]:
    """*method*, a header and the body's frames, which a broker need not fill."""
    size = random.choice((0, 0, 1, random.randrange(50), random.randrange(500), random.randrange(3 * FRAME_MAX)))
    body = random.randbytes(size)
    header = struct.pack(">HHQ", 60, 0, size) + properties(random, message_id)
    made = [frame.marshal(method, channel), framed(2, channel, header)]
    at = 0
    while at < size:
        step = random.choice((FRAME_MAX - 8, FRAME_MAX - 8, random.randint(1, FRAME_MAX - 8)))
        made.append(framed(3, channel, body[at : at + step]))
        at += step
    return made


def _name(random: Random) -> str:
    return random.choice(("", "events", "events.delay.v1.05"))


def delivery(random: Random, channel: int, tag: int) -> list[bytes]:
    method = Basic.Deliver(text(random), tag, random.random() < 0.5, _name(random), text(random, 40))
    return content(random, channel, method)


def _of_the_client(random: Random, channel: int) -> list[bytes]:
    if random.random() < 0.3:
        return content(random, channel, Basic.GetOk(random.getrandbits(40), False, _name(random), text(random), 3))
    return [frame.marshal(random.choice(_ANSWERS)(), channel)]


_ANSWERS: Final[Sequence[Callable[[], Frame]]] = (
    lambda: Queue.DeclareOk("events.shop", 3, 1),
    lambda: Queue.BindOk(),
    lambda: Channel.OpenOk(),
    lambda: Channel.CloseOk(),
    lambda: Channel.Close(404, "NOT_FOUND - no exchange", 60, 40),
    lambda: Channel.Flow(True),
    lambda: Basic.QosOk(),
    lambda: Basic.ConsumeOk("ctag1"),
    lambda: Basic.CancelOk("ctag1"),
    lambda: Basic.Cancel("ctag1", True),
    lambda: Confirm.SelectOk(),
)


def _of_the_connection(random: Random) -> list[bytes]:
    if random.random() < 0.6:
        return [frame.marshal(Heartbeat(), 0)]
    method = random.choice((Connection.Blocked("low on memory"), Connection.Unblocked(), Connection.CloseOk()))
    return [frame.marshal(method, 0)]


def _of_publishing(random: Random, ids: Sequence[str]) -> list[bytes]:
    """A confirm or a return, of what was sent and of what never was."""
    kind = random.random()
    if kind < 0.3:
        known = ids and random.random() < 0.8
        id_ = random.choice(ids) if known else random.choice(("", "0123456789abcdef", text(random)))
        return content(random, PUBLISHING, Basic.Return(312, "NO_ROUTE", "events", text(random)), id_)
    if kind < 0.4:
        return _of_the_client(random, PUBLISHING)
    tag = random.choice((random.randint(0, len(ids) + 1), 0, 2**62)) if kind < 0.5 else random.randint(1, len(ids) or 1)
    is_multiple = random.random() < 0.3
    return [frame.marshal((Basic.Ack if kind < 0.8 else Basic.Nack)(tag, is_multiple), PUBLISHING)]


def stream(random: Random, ids: Sequence[str], contents: int) -> Iterator[bytes]:
    """Frames of *contents* contents and methods. Channels take turns by frames, even in the midst of a content."""
    waiting: dict[int, list[bytes]] = {channel: [] for channel in (0, *CONSUMING, PUBLISHING, *CLIENTS)}
    tags = dict.fromkeys(CONSUMING, 0)
    while contents or any(waiting.values()):
        channel = random.choice(list(waiting))
        if waiting[channel]:
            yield waiting[channel].pop(0)
        elif contents:
            contents -= 1
            if channel == 0:
                waiting[channel] = _of_the_connection(random)
            elif channel == PUBLISHING:
                waiting[channel] = _of_publishing(random, ids)
            elif channel in CONSUMING and random.random() < 0.85:
                tags[channel] += 1
                waiting[channel] = delivery(random, channel, tags[channel])
            else:
                waiting[channel] = _of_the_client(random, channel)


# ── cuts and damages ──────────────────────────────────────────────────────────────────────────────────────────────────


def cuts(random: Random, size: int) -> list[int]:
    """Where to cut *size* bytes, in order, the end included."""
    longest = random.choices((1, 4, 30, 300, 3000, size + 1), weights=(1, 2, 6, 10, 10, 5))[0]
    if longest == 1:
        return list(range(1, size + 1))
    at, places = 0, []
    while at < size:
        at = min(size, at + 1 + int(random.random() * longest))
        places.append(at)
    return places


def damaged(random: Random, data: bytes) -> bytes:
    """*data* with bytes changed, lost, repeated and invented."""
    made = bytearray(data)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(made) + 1)
        some = random.randint(1, 12)
        match random.randrange(4):
            case 0:
                made[at : at + 1] = random.choice((b"\0", b"\xff", b"\xce", random.randbytes(1)))
            case 1:
                del made[at : at + some]
            case 2:
                made[at:at] = made[at : at + some]
            case _:
                made[at:at] = random.randbytes(some)
    return bytes(made)
