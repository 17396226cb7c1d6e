"""Messages become frames and come back equal, or are refused."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp.header import ContentHeader

from eventbus.message import Message
from eventbus.transport.base import Publication, Unpublishable
from eventbus.transport.rabbitmq.channels import decode, encode

FRAME_MAX = 131_072


def there_and_back(message: Message) -> Message:
    """*message* as its receiver reads it."""
    encoded = encode(Publication("events", "fact.v1", message), frame_max=FRAME_MAX)
    read = ContentHeader()
    read.unmarshal(ContentHeader(body_size=len(encoded.body), properties=encoded.properties).marshal())
    assert read.properties.delivery_mode == 2
    return decode(read.properties, encoded.body)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
SCALARS = TEXT | st.booleans() | st.integers(-(2**63), 2**63 - 1)


@given(st.dictionaries(TEXT.filter(lambda name: len(name.encode()) <= 128), SCALARS), st.binary(), TEXT | st.none())
def test_scalars_arrive_unchanged(headers: dict[str, object], body: bytes, content_type: str | None) -> None:
    message = Message(headers, body, content_type or None)

    arrived = there_and_back(message)

    assert arrived == message
    assert {name: type(value) for name, value in arrived.headers.items()} == {n: type(v) for n, v in headers.items()}


FOREIGN = st.recursive(
    SCALARS
    | st.none()
    | st.floats()
    | st.binary()
    | st.binary().map(bytearray)
    | st.decimals()
    | st.datetimes(timezones=st.just(UTC)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from("abc"), FOREIGN))
def test_whatever_else_arrives_unchanged_or_is_refused(headers: dict[str, object]) -> None:
    message = Message(headers, b"body")

    try:
        arrived = there_and_back(message)
    except Unpublishable:
        return
    assert arrived.headers == headers


def test_what_a_foreign_sender_set_is_kept_and_the_rest_is_not() -> None:
    kept = {
        "content_encoding": "gzip",
        "priority": 5,
        "correlation_id": "c",
        "reply_to": "r",
        "timestamp": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        "message_type": "t",
        "app_id": "a",
    }

    arrived = there_and_back(Message({}, b"", None, {**kept, "user_id": "ada", "expiration": "1", "message_id": "m"}))

    assert arrived.properties == kept


@pytest.mark.parametrize(
    "message",
    [
        Message({"h": 1.1}, b""),
        Message({"h": b"bytes"}, b""),
        Message({"h": 2**63}, b""),
        Message({"h": Decimal("1e300")}, b""),
        Message({"h": object()}, b""),
        Message({"h": "\ud800"}, b""),
        Message({"\ud800": "h"}, b""),
        Message({"h" * 129: ""}, b""),
        Message({"é" * 65: ""}, b""),
        Message({}, b"", "t" * 256),
        Message({}, b"", None, {"correlation_id": "c" * 256}),
        Message({}, b"", None, {"timestamp": datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)}),
        Message({f"h{n}": "x" * 8192 for n in range(16)}, b""),
        Message({"h": "x" * FRAME_MAX}, b""),
        Message({"h": ["x" * FRAME_MAX]}, b""),
    ],
)
def test_what_would_arrive_changed_or_not_at_all_is_refused(message: Message) -> None:
    with pytest.raises(Unpublishable) as caught:
        encode(Publication("events", "fact.v1", message), frame_max=FRAME_MAX)
    assert not caught.value.maybe_stored


@pytest.mark.parametrize("key", ["k" * 256, "é" * 128, "\ud800"])
def test_a_key_that_does_not_fit_is_refused(key: str) -> None:
    with pytest.raises(Unpublishable):
        encode(Publication("events", key, Message({}, b"")), frame_max=FRAME_MAX)


def test_headers_that_just_fit_into_a_frame_are_taken() -> None:
    arrived = there_and_back(Message({f"h{n:02}": "x" * 8000 for n in range(16)}, b""))

    assert len(arrived.headers) == 16
