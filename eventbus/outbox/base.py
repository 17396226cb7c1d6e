"""The outbox as data: what an envelope is in a row, and a row as an envelope again.

The one rule: whatever stands in a row, reading it ends in an envelope or in an `EnvelopeError`; one that somebody broke
by hand must not stop the others. No database here.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from eventbus.envelope import Envelope
from eventbus.errors import EnvelopeError

# Relays share the work by buckets of keys. More of them than anybody runs relays; each costs a row in the leases.
BUCKETS = 16
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Row:
    """One event in the outbox, unread: `values` are the columns as the driver gives them."""

    id: int
    bucket: int
    key: str | None  # rows of one key leave in the order of their ids; without a key there is no order
    attempts: int
    size: int
    values: Mapping[str, Any]  # Any: whatever somebody wrote there


@dataclass(frozen=True, slots=True)
class Lag:
    """How far the relays are behind: rows that wait, since when the oldest does, and rows that were set aside."""

    rows: int
    oldest: timedelta
    set_aside: int


def ordering_key(envelope: Envelope) -> str | None:
    """What *envelope* is kept in order by: its CloudEvents `partitionkey`, else its subject."""
    key = envelope.extensions.get("partitionkey")
    return envelope.subject if key is None else str(key)


def bucket_of(key: str) -> int:
    """The same for the same key, in every language: its CRC-32."""
    return zlib.crc32(key.encode()) % BUCKETS


def values_of(envelope: Envelope, *, due_ms: object, trace: Mapping[str, str]) -> dict[str, Any]:
    """The columns of *envelope*'s row; the rest is the database's to fill in (and *due_ms*, if it is an expression)."""
    key = ordering_key(envelope)
    return {
        "bucket": bucket_of(envelope.id if key is None else key),
        "ordering_key": key,
        "event_id": envelope.id,
        "source": envelope.source,
        "type": envelope.type,
        "time": envelope.time.isoformat(),
        "subject": envelope.subject,
        "datacontenttype": envelope.datacontenttype,
        "dataschema": envelope.dataschema,
        "extensions": json.dumps(dict(envelope.extensions)),
        "traceparent": trace.get("traceparent"),
        "tracestate": trace.get("tracestate"),
        "data": envelope.data,
        "due_ms": due_ms,
    }


def envelope_of(row: Row) -> Envelope:
    """The envelope in *row*.

    Raises:
        EnvelopeError: what stands there is no CloudEvent; it says which column, not what it holds.
    """
    values = row.values
    return Envelope(
        id=values["event_id"],
        source=values["source"],
        type=values["type"],
        time=_time(values["time"], values["created_ms"]),
        subject=values["subject"],
        datacontenttype=values["datacontenttype"],
        dataschema=values["dataschema"],
        extensions=_extensions(values["extensions"]),
        data=values["data"],
    )


def trace_of(row: Row) -> dict[str, str]:
    """The trace that the event was written in, as W3C's headers have it; empty without one."""
    if row.values["traceparent"] is None:
        return {}
    found = {name: row.values[name] for name in ("traceparent", "tracestate")}
    return {name: value for name, value in found.items() if isinstance(value, str)}


def delay_left(row: Row) -> timedelta | None:
    """How long *row*'s event is to be held back: what was left when it was read, so that it is never early.

    Raises:
        EnvelopeError: the column holds no number.
    """
    due_ms, now_ms = row.values["due_ms"], row.values["now_ms"]  # both on the database's clock
    if due_ms is None:
        return None
    if not isinstance(due_ms, int):
        raise EnvelopeError("the column due_ms holds no whole number: write milliseconds since 1970")
    try:
        left = timedelta(milliseconds=due_ms - now_ms)
    except OverflowError:
        raise EnvelopeError("the column due_ms lies millions of years away: write milliseconds since 1970") from None
    return left if left > timedelta(0) else None


def _time(value: object, created_ms: object) -> datetime:
    try:
        if value is None and isinstance(created_ms, int):
            return _EPOCH + timedelta(milliseconds=created_ms)
        time = datetime.fromisoformat(value) if isinstance(value, str) else None
    except (ValueError, OverflowError):
        time = None
    if time is None or time.tzinfo is None:
        raise EnvelopeError("the column time holds no time: write it as RFC 3339 has it, like 2030-01-31T12:00:00Z")
    return time


def _extensions(value: object) -> Mapping[str, Any]:
    if value == "{}":  # as most are
        return {}
    try:
        found = json.loads(value) if isinstance(value, str) else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):  # not chained: the decoder's error carries the text
        raise EnvelopeError("the column extensions holds no JSON object: write one, with {} for none")
    return found
