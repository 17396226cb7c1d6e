"""What a stream of frames says, read with pamqp: the measure for the lane."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pamqp import frame
from pamqp.body import ContentBody
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from eventbus.message import KEPT_PROPERTIES
from tests.fuzz.making import CONSUMING, PUBLISHING

# A delivery is the text of its values: `repr` tells True from 1 and bytes from a bytearray, and one nan is another.
Delivered = str


def delivered(
    channel: int, tag: int, is_redelivered: bool, exchange: str, key: str, content: tuple[Any, Any, Any], body: bytes
) -> Delivered:
    """*content*: headers, content type and the other properties that are kept."""
    return repr((channel, tag, is_redelivered, exchange, key, content, body))


@dataclass
class Read:
    """What is in a stream, and for whom. `confirms` maps tags to how their publish ended: True, False or "nacked"."""

    frames: int = 0
    deliveries: list[Delivered] = field(default_factory=list)
    confirms: dict[int, bool | str] = field(default_factory=dict)
    passed_on: bytes = b""


def split(data: bytes) -> Iterator[tuple[bytes, int, Any]]:
    """Each frame of *data*, with its channel and what pamqp makes of it."""
    at = 0
    while at < len(data):
        size = 8 + int.from_bytes(data[at + 3 : at + 7], "big")
        used, channel, what = frame.unmarshal(data[at : at + size])
        assert used == size
        yield data[at : at + size], channel, what
        at += size


def read(data: bytes, ids: list[str]) -> Read:
    """*ids* are the message ids of what was published, by their tags from 1 on."""
    result = Read()
    passed_on: list[bytes] = []
    open_: dict[int, tuple[Any, ContentHeader | None, bytes]] = {}
    returned: set[int] = set()

    def complete(channel: int) -> None:
        method, header, body = open_[channel]
        if header is None or len(body) < (header.body_size or 0):
            return
        del open_[channel]
        if isinstance(method, Basic.Deliver):
            sent = header.properties
            kept = {name: getattr(sent, name) for name in KEPT_PROPERTIES if getattr(sent, name) is not None}
            result.deliveries.append(
                delivered(channel, method.delivery_tag or 0, bool(method.redelivered), method.exchange or "",
                          method.routing_key or "", (sent.headers or {}, sent.content_type, kept), body)
            )  # fmt: skip
        elif header.properties.message_id in ids:
            returned.add(ids.index(header.properties.message_id) + 1)

    def confirm(what: Basic.Ack | Basic.Nack) -> None:
        last = what.delivery_tag or (len(ids) if what.multiple else 0)
        for tag in range(1, len(ids) + 1):
            if (tag <= last if what.multiple else tag == last) and tag not in result.confirms:
                result.confirms[tag] = tag not in returned if isinstance(what, Basic.Ack) else "nacked"

    for raw, channel, what in split(data):
        result.frames += 1
        match what:
            case Basic.Deliver() if channel in CONSUMING:
                open_[channel] = what, None, b""
            case Basic.Return() if channel == PUBLISHING:
                open_[channel] = what, None, b""
            case Basic.Ack() | Basic.Nack() if channel == PUBLISHING:
                confirm(what)
            case ContentHeader() if channel in open_:
                open_[channel] = open_[channel][0], what, b""
                complete(channel)
            case ContentBody() if channel in open_:
                method, header, body = open_[channel]
                open_[channel] = method, header, body + what.value
                complete(channel)
            case _:
                passed_on.append(raw)
    result.passed_on = b"".join(passed_on)
    return result
