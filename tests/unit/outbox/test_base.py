"""A row of the outbox and an envelope: out and back, whatever somebody wrote into the row."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import CheckConstraint

from eventbus import Envelope, EnvelopeError
from eventbus.database import OUTBOX
from eventbus.outbox.base import BUCKETS, Row, bucket_of, delay_left, envelope_of, ordering_key, trace_of, values_of

TEXTS = st.text(st.characters(exclude_categories=["Cc", "Cs", "Cn", "Co"]), min_size=1, max_size=30)
ENVELOPES = st.builds(
    Envelope,
    id=TEXTS,
    source=st.just("/shop"),
    type=TEXTS,
    time=st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30), timezones=st.just(UTC)),  # noqa: DTZ001  # made aware
    subject=st.none() | TEXTS,
    dataschema=st.none() | st.just("urn:schema"),
    datacontenttype=st.none() | st.sampled_from(["application/json", "image/png"]),
    extensions=st.dictionaries(
        st.sampled_from(["a", "b1"]), TEXTS | st.just("") | st.integers(-(2**31), 2**31 - 1) | st.booleans()
    ),
    data=st.binary(max_size=20),
)
NOW = datetime(2030, 1, 31, 12, tzinfo=UTC)
NOW_MS = int(NOW.timestamp() * 1000)


def row(**values: Any) -> Row:
    """A row as another program may have written it: what it must give, and the defaults of the table."""
    written = {
        "event_id": "1", "source": "/shop", "type": "placed.v1", "time": None, "subject": None,
        "datacontenttype": "application/json", "dataschema": None, "extensions": "{}", "traceparent": None,
        "tracestate": None, "data": b"{}", "created_ms": NOW_MS, "due_ms": None, "now_ms": NOW_MS, **values,
    }  # fmt: skip
    return Row(id=7, bucket=0, key=None, attempts=0, size=2, values=written)


@given(ENVELOPES)
def test_an_envelope_comes_out_of_its_row_as_it_went_in(envelope: Envelope) -> None:
    written = values_of(envelope, due_ms=None, trace={})

    assert envelope_of(row(**written)) == envelope


def test_what_another_program_may_leave_out_is_filled_in() -> None:
    read = envelope_of(row())

    assert (read.time, read.subject, read.extensions) == (NOW, None, {})


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("event_id", "", "'id' is empty"),
        ("event_id", None, "'id' is missing"),
        ("source", "not a reference", "'source' is no URI reference"),
        ("type", "a\nb", "'type' holds a control character"),
        ("time", "yesterday", "column time"),
        ("time", "2029-12-24T18:00:00", "column time"),
        ("time", 17, "column time"),
        ("extensions", "{", "column extensions"),
        ("extensions", "[]", "column extensions"),
        ("extensions", "[" * 100_000, "column extensions"),
        ("extensions", None, "column extensions"),
        ("extensions", '{"Upper": 1}', "no name for a CloudEvents extension"),
        ("extensions", '{"a": {}}', "'a' is a value of type dict"),
        ("data", "text", "'data' is a value of type str"),
        ("created_ms", 10**30, "column time"),
    ],
)
def test_what_somebody_broke_is_named_and_not_quoted(column: str, value: object, said: str) -> None:
    with pytest.raises(EnvelopeError) as raised:
        envelope_of(row(**{column: value}))

    assert said in str(raised.value)
    assert not value or len(str(value)) < 5 or str(value) not in str(raised.value)


def test_a_delay_is_what_is_left_of_it() -> None:
    assert delay_left(row(due_ms=None)) is None
    assert delay_left(row(due_ms=NOW_MS - 1)) is None
    assert delay_left(row(due_ms=NOW_MS + 60_000)) == timedelta(minutes=1)


@pytest.mark.parametrize("due_ms", ["soon", 1.5, 10**30])
def test_a_due_time_that_is_none_is_told(due_ms: object) -> None:
    with pytest.raises(EnvelopeError, match="column due_ms"):
        delay_left(row(due_ms=due_ms))


def test_events_are_kept_in_order_by_their_subject_or_by_their_partition_key() -> None:
    def envelope(**more: Any) -> Envelope:
        return Envelope(id="1", source="/shop", type="placed.v1", time=NOW, **more)

    assert ordering_key(envelope()) is None
    assert ordering_key(envelope(subject="order-1")) == "order-1"
    assert ordering_key(envelope(subject="order-1", extensions={"partitionkey": "ada"})) == "ada"


def test_a_key_has_the_bucket_that_the_documentation_says() -> None:
    # The CRC-32 of "123456789", its check value, is 0xCBF43926 in every language.
    assert bucket_of("123456789") == 0xCBF43926 % BUCKETS


def test_the_table_takes_the_buckets_that_there_are() -> None:
    (check,) = (str(c.sqltext) for c in OUTBOX.c.bucket.constraints if isinstance(c, CheckConstraint))

    assert check == f"bucket BETWEEN 0 AND {BUCKETS - 1}"


def test_only_a_trace_is_carried_that_is_one() -> None:
    assert trace_of(row(traceparent="00-1-2-01", tracestate=5)) == {"traceparent": "00-1-2-01"}


def test_extensions_are_written_as_json() -> None:
    envelope = Envelope(id="1", source="/s", type="t.v1", time=NOW, extensions={"a": 1, "b": True, "c": "x"})

    assert json.loads(values_of(envelope, due_ms=None, trace={})["extensions"]) == {"a": 1, "b": True, "c": "x"}
