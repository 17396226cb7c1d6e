"""What became of each message: pure, from what was sent, what is dead and what the handlers noted.

A message is known again by a digest of all that it is, so that none needs a mark that would make it less hostile.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from pamqp.header import ContentHeader

from eventbus.envelope import Envelope, decode
from eventbus.errors import EnvelopeError
from eventbus.transport.rabbitmq import channels
from tests.faults.hostile.amqp import DEEP, Raw, decode_properties, elements_of, entries_of, value_of

# What the broker and the bus write into a message on its way, or take out of it; the contract names them.
OURS = (b"x-eventbus-", b"x-death", b"x-first-death-", b"x-last-death-", b"x-delivery-count", b"x-acquired-count",
        b"CC", b"BCC", b"x-opt-", b"x-stream-offset")  # fmt: skip
NOT_KEPT = ("delivery_mode", "message_id", "user_id", "expiration", "cluster_id", "headers")


def digest_of(raw: Raw, *, as_read: bool = False) -> str:
    """The same for a message and for its dead letter; *as_read*: for a dead letter that the client has narrowed."""
    values = decode_properties(raw.properties)
    headers = [(name, field) for name, field in values.get("headers", ()) if not name.startswith(OURS)]
    others = {name: value for name, value in values.items() if name not in NOT_KEPT and value != b""}
    if as_read:
        headers = [(name, _narrowed(field)) for name, field in dict(headers).items()]
        others |= {"timestamp": _in_seconds(others["timestamp"])} if "timestamp" in others else {}
    said = sorted((name, value_of(field)) for name, field in headers), sorted(others.items())
    return hashlib.sha256(repr(said).encode() + raw.body).hexdigest()[:24]


def _narrowed(field: bytes, depth: int = 0) -> bytes:
    """*field* as pamqp has it: a time after 2106 is read as milliseconds, and of equal names the last is kept."""
    kind = chr(field[0])
    if kind == "T":
        return b"T" + _in_seconds(int.from_bytes(field[1:], "big")).to_bytes(8, "big")
    if kind not in "AF" or depth > DEEP:
        return field
    inner: list[bytes] = []
    if kind == "F":
        for name, one in dict(entries_of(field)).items():
            inner.append(bytes([len(name)]) + name + _narrowed(one, depth + 1))
    else:
        inner += (_narrowed(one, depth + 1) for one in elements_of(field))
    content = b"".join(inner)
    return field[:1] + len(content).to_bytes(4, "big") + content


def _in_seconds(time: int) -> int:
    return time // 1000 if time > 0xFFFFFFFF and time % 1000 == 0 else time


def line_of(service: str, envelope: Envelope) -> str:
    """What a handler notes."""
    data = hashlib.sha256(envelope.data).hexdigest()[:24]
    return json.dumps([service, envelope.source, envelope.id, envelope.type, data])


def envelope_of(raw: Raw) -> Envelope | None:
    """What a handler must have been given, if *raw* is an event at all."""
    header = ContentHeader()
    try:
        header.unmarshal(bytes(12) + raw.properties)
        return decode(channels.decode(header.properties, raw.body), now=lambda: datetime.now(UTC))
    except (EnvelopeError, ValueError, RecursionError):
        return None


@dataclass
class Count:
    """sent + again = handled + dead, if nothing is lost and nothing changed."""

    service: str
    sent: int = 0
    handled: int = 0  # the recognised duplicates of handled events included
    dead: int = 0
    again: int = 0  # dead letters beyond one for a message: a session that died before an ack
    narrowed: int = 0  # dead letters that have the client's reading of a header, see `digest_of`; among the dead
    lost: int = 0
    changed: int = 0  # dead letters that are no message that was sent
    invented: int = 0  # notes of handlers about no event that was sent
    left: int = 0  # still in a queue
    fates: dict[str, dict[str, int]] = field(default_factory=dict)  # by kind of message

    @property
    def adds_up(self) -> bool:
        wrong = self.lost or self.changed or self.invented or self.left
        return not wrong and self.sent + self.again == self.handled + self.dead


def count(
    service: str, sent: Iterable[tuple[str, Raw]], dead: Mapping[str, Counter[str]], notes: set[str], left: int
) -> Count:
    """The fate of each of *sent*, kinds and messages; *dead*: by digest, how many there are for which reason."""
    counted = Count(service, left=left)
    unclaimed = {digest: Counter(reasons) for digest, reasons in dead.items()}
    notes = {note for note in notes if json.loads(note)[0] == service}
    keys = {_key_of(note) for note in notes}
    known, explained = set(), set()
    for kind, raw in sent:
        counted.sent += 1
        known.add(digest := digest_of(raw))
        envelope = envelope_of(raw)
        note = None if envelope is None else line_of(service, envelope)
        explained.add(note)
        reasons = unclaimed.get(digest)
        if not reasons and note not in notes:
            known.add(narrow := digest_of(raw, as_read=True))
            if reasons := unclaimed.get(narrow):
                counted.narrowed += 1
        if reasons:
            fate = next(iter(reasons))
            reasons[fate] -= 1
            reasons += Counter()  # without what is at 0
            counted.dead += 1
        elif note in notes or (note is not None and _key_of(note) in keys):
            fate = "handled" if note in notes else "duplicate"
            counted.handled += 1
        else:
            fate = "lost"
            counted.lost += 1
        fates = counted.fates.setdefault(kind, {})
        fates[fate] = fates.get(fate, 0) + 1
    extra = {digest: reasons.total() for digest, reasons in unclaimed.items()}
    counted.again = sum(number for digest, number in extra.items() if digest in known)
    counted.changed = sum(number for digest, number in extra.items() if digest not in known)
    counted.dead += counted.again
    counted.invented = len(notes - explained)
    return counted


def _key_of(note: str) -> tuple[str, str, str]:
    """What the bus knows a duplicate by: two events with the same are one."""
    _, source, event_id, type_, _ = json.loads(note)
    return source, event_id, re.sub(r"\.v\d+$", "", type_)
