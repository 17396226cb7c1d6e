"""The rules of CloudEvents, and every way in and out of a message. The SDK is the second opinion."""

from __future__ import annotations

import base64
import copy
import json
import pickle
import subprocess
import sys
import traceback
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, replace
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest
from cloudevents.core.bindings import amqp, rabbitmq
from cloudevents.core.v03.event import CloudEvent as OldCloudEvent
from cloudevents.core.v1.event import CloudEvent
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from eventbus.envelope import Envelope, decode, enclose, encode
from eventbus.errors import EnvelopeError
from eventbus.event import Event
from eventbus.message import Message

NOW = datetime(2030, 1, 31, 12, 0, 0, 250_000, tzinfo=UTC)
RECEIVED = datetime(2031, 2, 3, tzinfo=UTC)
SECRET_DATA = "ada@example.com"


class OrderPlaced(Event):
    order_id: int
    total: Decimal


ORDER = OrderPlaced(order_id=7, total=Decimal("12.30"))
ENVELOPE = enclose(ORDER, id="1", source="/shop", time=NOW, subject="ada", extensions={"tenant": "t"})
HEADERS: Mapping[str, object] = {
    "cloudEvents_specversion": "1.0",
    "cloudEvents_id": "1",
    "cloudEvents_source": "/shop",
    "cloudEvents_type": "order_placed.v1",
    "cloudEvents_time": "2030-01-31T12:00:00.250000Z",
    "cloudEvents_subject": "ada",
    "cloudEvents_tenant": "t",
}
MESSAGE = Message(HEADERS, b'{"order_id":7,"total":"12.30"}', "application/json")


def read(message: Message) -> Envelope:
    return decode(message, now=lambda: RECEIVED)


def structured(document: object, content_type: str = "application/cloudevents+json") -> Message:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return Message({}, body, content_type)


def with_header(name: str, value: object) -> Message:
    return replace(MESSAGE, headers={**HEADERS, name: value})


def without_header(name: str) -> Message:
    return replace(MESSAGE, headers={key: value for key, value in HEADERS.items() if key != name})


# ── our own form ────────────────────────────────────────────────────────────────────────────────────


def test_an_event_is_written_in_binary_mode() -> None:
    assert encode(ENVELOPE) == MESSAGE


def test_what_is_written_is_read_again() -> None:
    envelope = read(MESSAGE)

    assert envelope == ENVELOPE
    assert envelope.event(OrderPlaced) == ORDER


def test_a_whole_second_is_written_as_one() -> None:
    headers = encode(replace(ENVELOPE, time=datetime(2030, 1, 1, tzinfo=UTC))).headers

    assert headers["cloudEvents_time"] == "2030-01-01T00:00:00Z"


@pytest.mark.parametrize("content_type", ["application/cloudevents+json", "Application/CloudEvents-batch+json; a=b"])
def test_data_that_would_be_read_as_the_event_itself_are_not_published(content_type: str) -> None:
    with pytest.raises(EnvelopeError, match="would be taken for the event itself"):
        encode(replace(ENVELOPE, datacontenttype=content_type))


# What CloudEvents lets an attribute be; the SDK cannot carry an empty extension over JSON null, nor should it.
TEXTS = st.text(st.characters(exclude_categories=["Cc", "Cs", "Cn", "Co"]), min_size=1, max_size=30)
SOURCES = st.from_regex(r"(/[a-zA-Z0-9._~!$&'()*+,;=:@-]{1,10}){1,3}|urn:[a-z0-9]{1,9}(%C3%A9)?", fullmatch=True)
TIMES = st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30), timezones=st.just(UTC))  # noqa: DTZ001  # made aware
EXTENSIONS = st.dictionaries(
    st.from_regex(r"[a-z0-9]{1,20}", fullmatch=True).filter(
        lambda name: (
            name
            not in {"id", "source", "type", "specversion", "time", "subject", "datacontenttype", "dataschema", "data"}
        )
    ),
    st.one_of(st.text(TEXTS.map(lambda t: t[0]), max_size=10), st.integers(-(2**31), 2**31 - 1), st.booleans()),
    max_size=4,
)
JSON_VALUES = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
JSON_DATA = st.dictionaries(st.text(max_size=5), JSON_VALUES | st.lists(JSON_VALUES, max_size=2), max_size=3)
ENVELOPES = st.builds(
    Envelope,
    id=TEXTS,
    source=SOURCES,
    type=TEXTS,
    time=TIMES,
    subject=st.none() | TEXTS,
    dataschema=st.none() | SOURCES,
    datacontenttype=st.sampled_from(
        ["application/json", "application/vnd.shop+json", "application/json; charset=utf-8"]
    ),
    extensions=EXTENSIONS,
    data=JSON_DATA.map(lambda data: json.dumps(data).encode()),
)


@given(ENVELOPES)
def test_every_envelope_survives_the_wire(envelope: Envelope) -> None:
    assert read(encode(envelope)) == envelope


GOOD = {name: HEADERS[f"cloudEvents_{name}"] for name in ("specversion", "source", "type", "id", "time")}
ODD_VALUES = st.sampled_from(
    [None, 1, True, b"\xff", "", "1.0", "a\x00", "no time", "2030-01-31T12:00:00Z", NOW, 10**20]
)


@given(
    st.fixed_dictionaries({name: st.just(value) | ODD_VALUES for name, value in GOOD.items()}),
    st.sampled_from([None, "", "application/json", "text/plain", "application/cloudevents+json"]),
    st.sampled_from([None, *GOOD]),
)
def test_a_message_with_nothing_else_is_read_as_one_with_more(
    attributes: dict[str, object], content_type: str | None, renamed: str | None
) -> None:
    """The few headers that every event has are read by a way of their own, and what a broker adds must not matter."""
    headers = {f"cloudEvents_{name if name != renamed else 'tenant'}": value for name, value in attributes.items()}

    alone = outcome(Message(headers, b"{}", content_type))
    with_more = outcome(Message({**headers, "x-delivery-count": 1}, b"{}", content_type))

    assert alone == with_more


def outcome(message: Message) -> Envelope | str:
    try:
        return read(message)
    except EnvelopeError as error:
        return str(error)


def sdk_message(message: Message) -> amqp.AMQPMessage:
    properties = {} if message.content_type is None else {"content-type": message.content_type}
    return amqp.AMQPMessage(properties, dict(message.headers), message.body)


def from_sdk(message: amqp.AMQPMessage) -> Message:
    return Message(message.application_properties, message.application_data, message.properties.get("content-type"))


@given(ENVELOPES)
def test_the_sdks_amqp_binding_reads_what_we_write_as_the_same_event(envelope: Envelope) -> None:
    event = amqp.from_binary_event(sdk_message(encode(envelope)))

    assert event.get_attributes() == envelope.to_cloudevent().get_attributes()
    assert event.get_data() == json.loads(envelope.data)


@given(ENVELOPES)
def test_we_read_what_the_sdks_amqp_binding_writes_as_the_same_event(envelope: Envelope) -> None:
    written = from_sdk(amqp.to_binary_event(envelope.to_cloudevent()))

    # The SDK writes milliseconds, and the data as Python writes JSON.
    assert same(read(written), envelope, precision=timedelta(milliseconds=1))


@given(ENVELOPES)
def test_the_sdk_and_we_write_the_same_headers_but_for_the_time(envelope: Envelope) -> None:
    theirs = dict(amqp.to_binary_event(envelope.to_cloudevent()).application_properties)
    ours = dict(encode(envelope).headers)

    milliseconds, text = theirs.pop("cloudEvents_time"), ours.pop("cloudEvents_time")
    assert isinstance(milliseconds, int)
    assert isinstance(text, str)
    assert theirs == ours


@given(ENVELOPES)
def test_structured_mode_of_the_sdk_is_the_same_event(envelope: Envelope) -> None:
    written = from_sdk(amqp.to_structured_event(envelope.to_cloudevent()))

    assert same(read(written), envelope)


@given(ENVELOPES)
def test_the_sdks_rabbitmq_binding_is_the_same_event_with_text_extensions(envelope: Envelope) -> None:
    envelope = replace(envelope, extensions={name: str(value) for name, value in envelope.extensions.items()})

    binary = rabbitmq.to_binary_event(envelope.to_cloudevent())
    whole = rabbitmq.to_structured_event(envelope.to_cloudevent())

    assert same(read(Message(binary.headers, binary.body, binary.content_type)), envelope)
    assert same(read(Message(whole.headers, whole.body, whole.content_type)), envelope)


@given(ENVELOPES)
def test_an_envelope_survives_being_a_cloudevent(envelope: Envelope) -> None:
    assert same(Envelope.from_cloudevent(envelope.to_cloudevent()), envelope)


def same(one: Envelope, other: Envelope, precision: timedelta = timedelta(0)) -> bool:
    """The same event: data equal as JSON, time within *precision*."""
    return (
        json.loads(one.data) == json.loads(other.data)
        and abs(one.time - other.time) <= precision
        and replace(one, data=b"", time=NOW) == replace(other, data=b"", time=NOW)
    )


# ── the rules ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"id": ""}, "'id' is empty"),
        ({"id": 7}, "'id' is a value of type int"),
        ({"id": "a\nb"}, "'id' holds a control character"),
        ({"type": ""}, "'type' is empty"),
        ({"type": "a\x7f"}, "'type' holds a control character"),
        ({"type": "\ud800"}, "'type' holds a control character"),
        ({"subject": "\U0001fffe"}, "'subject' holds a control character or what is no character"),
        ({"subject": ""}, "'subject' is empty"),
        ({"source": ""}, "'source' is empty"),
        ({"source": "my shop"}, "'source' is no URI reference"),
        ({"source": "/café"}, "'source' is no URI reference"),
        ({"source": "/100%"}, "'source' is no URI reference"),
        ({"source": "/a#b#c"}, "'source' is no URI reference"),
        ({"source": ["/a"]}, "'source' is a value of type list"),
        ({"dataschema": "a b"}, "'dataschema' is no URI reference"),
        ({"datacontenttype": ""}, "'datacontenttype' is empty"),
        ({"time": datetime(2030, 1, 1)}, "'time' has no time zone"),  # noqa: DTZ001  # that is the mistake
        ({"time": "2030-01-01T00:00:00Z"}, "'time' is a value of type str"),
        ({"time": datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=1)))}, "'time' lies outside"),
        ({"data": "text"}, "'data' is a value of type str"),
        ({"extensions": {"Tenant": "t"}}, "'Tenant' is no name for a CloudEvents extension"),
        ({"extensions": {"my_tenant": "t"}}, "'my_tenant' is no name"),
        ({"extensions": {"": "t"}}, "'' is no name"),
        ({"extensions": {1: "t"}}, "1 is no name"),
        ({"extensions": {"data": "t"}}, "'data' has the name of an attribute"),
        ({"extensions": {"specversion": "1.0"}}, "'specversion' has the name of an attribute"),
        ({"extensions": {"big": 2**31}}, "'big' is a number over 32 bits"),
        ({"extensions": {"share": 0.5}}, "'share' is a value of type float"),
        ({"extensions": {"none": None}}, "'none' is missing"),
        ({"extensions": {"text": "a\0"}}, "'text' holds a control character"),
    ],
)
def test_an_envelope_that_breaks_a_rule_cannot_be_made(change: dict[str, Any], said: str) -> None:
    with pytest.raises(EnvelopeError) as caught:
        replace(ENVELOPE, **change)

    assert said in str(caught.value)
    assert caught.value.reason == "invalid-envelope"


def test_an_envelope_takes_what_cloudevents_lets_it() -> None:
    paris = timezone(timedelta(hours=1))

    envelope = replace(
        ENVELOPE,
        id="zwölf\u00a0\U0001f600",
        source="//host:80/a?b=c#d",
        time=datetime(2030, 1, 1, 12, tzinfo=paris),
        extensions={"averyveryverylongname": "", "min": -(2**31), "flag": True, "0": "x"},
    )

    assert envelope.time == datetime(2030, 1, 1, 11, tzinfo=UTC)
    assert envelope.time.tzinfo is UTC


def test_an_envelope_does_not_change() -> None:
    given_extensions = {"tenant": "t"}
    envelope = replace(ENVELOPE, extensions=given_extensions)
    given_extensions["tenant"] = "u"

    assert envelope.extensions == {"tenant": "t"}
    with pytest.raises(FrozenInstanceError):
        envelope.id = "2"  # type: ignore[misc]
    with pytest.raises(TypeError):
        envelope.extensions["tenant"] = "u"  # type: ignore[index]
    assert {envelope, ENVELOPE} == {ENVELOPE}


def test_an_envelope_is_copied_and_pickled() -> None:
    assert pickle.loads(pickle.dumps(ENVELOPE)) == copy.deepcopy(ENVELOPE) == copy.copy(ENVELOPE) == ENVELOPE


def test_the_data_are_not_shown() -> None:
    assert "12.30" not in repr(ENVELOPE)


# ── the data ────────────────────────────────────────────────────────────────────────────────────────


class Anything(BaseModel):
    order_id: int


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "application/json",
        "Application/JSON",
        "application/json; charset=utf-8",
        "application/vnd.shop.order+json",
        "application/problem+json;v=1",
        "text/json",
    ],
)
def test_any_json_type_is_read_as_a_model(content_type: str | None) -> None:
    assert replace(ENVELOPE, datacontenttype=content_type).event(Anything) == Anything(order_id=7)


@pytest.mark.parametrize("content_type", ["text/plain", "application/xml", "application/jsonlines", "json", "a+json"])
def test_another_type_is_no_model_and_says_how_to_get_the_bytes(content_type: str) -> None:
    with pytest.raises(EnvelopeError, match="annotate the handler with Envelope") as caught:
        replace(ENVELOPE, datacontenttype=content_type).event(Anything)

    assert caught.value.reason == "invalid-data"


def test_data_that_do_not_fit_are_invalid_data() -> None:
    with pytest.raises(EnvelopeError, match="order_id: int_parsing") as caught:
        replace(ENVELOPE, data=b'{"order_id":"%s"}' % SECRET_DATA.encode()).event(Anything)

    assert caught.value.reason == "invalid-data"
    assert_hidden(caught.value)


# ── what others write: binary mode ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "prefix", ["cloudEvents_", "cloudEvents:", "ce-", "ce_", "Ce-", "CE_", "cloudevents:", "CLOUDEVENTS_"]
)
def test_every_prefix_in_use_is_read(prefix: str) -> None:
    headers = {prefix + name.removeprefix("cloudEvents_"): value for name, value in HEADERS.items()}

    assert read(replace(MESSAGE, headers=headers)) == ENVELOPE


def test_an_http_bridges_capitals_are_read() -> None:
    headers = {"Ce-Specversion": "1.0", "Ce-Id": "1", "Ce-Source": "/shop", "Ce-Type": "t", "Ce-Tenant": "x"}

    assert read(Message(headers, b"")).extensions == {"tenant": "x"}


def test_mixed_prefixes_are_refused() -> None:
    with pytest.raises(EnvelopeError, match=r"mix the prefixes ce-, cloudevents_"):
        read(with_header("ce-id", "2"))


def test_other_headers_are_no_extensions() -> None:
    others = {"traceparent": "00-1", "x-eventbus-attempt": 2, "cell": "a", "cloud": 1, "ce": "b", "x-death": [{}]}

    assert read(replace(MESSAGE, headers={**HEADERS, **others})) == ENVELOPE


@pytest.mark.parametrize("attribute", ["id", "source", "type", "specversion"])
def test_a_missing_attribute_is_named(attribute: str) -> None:
    with pytest.raises(EnvelopeError, match=f"'{attribute}' is missing"):
        read(without_header(f"cloudEvents_{attribute}"))
    with pytest.raises(EnvelopeError, match=f"'{attribute}' is missing"):
        read(with_header(f"cloudEvents_{attribute}", None))


@pytest.mark.parametrize(
    ("header", "value", "said"),
    [
        ("specversion", "0.3", "'specversion' is '0.3': only '1.0'"),
        ("specversion", 1.0, "'specversion' is a value of type float"),
        ("id", b"\xff", "'id' is not UTF-8"),
        ("id", 12, "'id' is a value of type int: give a string"),
        ("type", bytearray(b"order"), "'type' is a value of type bytearray"),
        ("source", b"\xff", "'source' is not UTF-8"),
        ("tenant", b"\xff", "'tenant' is not UTF-8"),
        ("tenant", 1.5, "'tenant' is a value of type float"),
        ("tenant", ["a"], "'tenant' is a value of type list"),
        ("tenant", 2**40, "'tenant' is a number over 32 bits"),
        ("Tenant", "t", "'Tenant' is no name"),
        ("data", "t", "'data' has the name of an attribute"),
        ("", "t", "'' is no name"),
        ("subject", "", "'subject' is empty"),
        ("time", "yesterday", "'time' is no time"),
        ("time", "2030-01-31 12:00:00", "'time' is no time"),
        ("time", "2030-01-31", "'time' is no time"),
        ("time", "2030-W01-1T00:00:00Z", "'time' is no time"),
        ("time", "2030-02-30T00:00:00Z", "'time' is no time"),
        ("time", "2030-01-31T12:00:00", "'time' is no time"),
        ("time", "", "'time' is no time"),
        ("time", 10**18, "'time' is no time"),
        ("time", True, "'time' is no time"),
        ("time", 1.5, "'time' is no time"),
        ("time", "0001-01-01T00:00:00+01:00", "'time' lies outside"),
    ],
)
def test_a_malformed_attribute_is_named_with_the_remedy(header: str, value: object, said: str) -> None:
    with pytest.raises(EnvelopeError) as caught:
        read(with_header(f"cloudEvents_{header}", value))

    assert said in str(caught.value)
    assert caught.value.reason == "invalid-envelope"


@pytest.mark.parametrize(
    ("written", "time"),
    [
        ("2030-01-31T12:00:00Z", datetime(2030, 1, 31, 12, tzinfo=UTC)),
        ("2030-01-31t12:00:00z", datetime(2030, 1, 31, 12, tzinfo=UTC)),
        ("2030-01-31T12:00:00.5+02:00", datetime(2030, 1, 31, 10, 0, 0, 500_000, tzinfo=UTC)),
        ("2030-01-31T12:00:00.123456789-00:30", datetime(2030, 1, 31, 12, 30, 0, 123_456, tzinfo=UTC)),
        (1_896_091_200_250, datetime(2030, 1, 31, 12, 0, 0, 250_000, tzinfo=UTC)),
        (-1, datetime(1969, 12, 31, 23, 59, 59, 999_000, tzinfo=UTC)),
        (datetime(2030, 1, 31, 12, tzinfo=UTC), datetime(2030, 1, 31, 12, tzinfo=UTC)),
        (datetime(2030, 1, 31, 12), datetime(2030, 1, 31, 12, tzinfo=UTC)),  # noqa: DTZ001  # a client's timestamp
    ],
)
def test_a_time_is_read_as_text_timestamp_or_milliseconds(written: object, time: datetime) -> None:
    assert read(with_header("cloudEvents_time", written)).time == time


def test_a_missing_time_is_the_messages_timestamp_or_when_it_came() -> None:
    timeless = without_header("cloudEvents_time")

    assert read(timeless).time == RECEIVED
    assert read(replace(timeless, properties={"timestamp": NOW})).time == NOW
    assert read(replace(timeless, properties={"timestamp": "nonsense"})).time == RECEIVED
    assert read(replace(MESSAGE, properties={"timestamp": RECEIVED})).time == NOW


def test_amqp_types_become_the_strings_that_cloudevents_has_for_them() -> None:
    headers = {**HEADERS, "cloudEvents_a": bytearray(b"\xff\xfe"), "cloudEvents_b": NOW, "cloudEvents_c": None}

    assert read(replace(MESSAGE, headers=headers)).extensions == {
        "tenant": "t",
        "a": "//4=",
        "b": "2030-01-31T12:00:00.250000Z",
    }


@pytest.mark.parametrize("content_type", [None, ""])
def test_no_content_type_means_json(content_type: str | None) -> None:
    envelope = read(replace(MESSAGE, content_type=content_type))

    assert envelope.datacontenttype is None
    assert envelope.event(OrderPlaced) == ORDER
    assert encode(envelope).content_type is None


def test_a_content_type_among_the_headers_is_read_where_the_property_is_missing() -> None:
    message = with_header("cloudEvents_datacontenttype", "text/plain")

    assert read(message).datacontenttype == "application/json"
    assert read(replace(message, content_type=None)).datacontenttype == "text/plain"


def test_any_body_may_be_the_data() -> None:
    envelope = read(replace(MESSAGE, body=b"\xff\x00garbage", content_type="application/octet-stream"))

    assert envelope.data == b"\xff\x00garbage"


@pytest.mark.parametrize("headers", [{}, {"type": "order_placed.v1"}, {"ce": "1.0"}, {"cloudEvents_tenant": "t"}])
def test_what_is_no_event_at_all_says_what_would_be(headers: dict[str, object]) -> None:
    with pytest.raises(
        EnvelopeError, match=r"no CloudEvents attributes: neither binary headers .* nor structured mode"
    ):
        read(Message(headers, b"{}", "application/json"))


# ── what others write: structured mode ──────────────────────────────────────────────────────────────

DOCUMENT: dict[str, object] = {
    "specversion": "1.0",
    "id": "1",
    "source": "/shop",
    "type": "t",
    "time": "2030-01-01T00:00:00Z",
}


@pytest.mark.parametrize(
    "content_type",
    [
        "application/cloudevents+json",
        "application/cloudevents+json; charset=utf-8",
        'application/cloudevents+json;charset="UTF-8"',
        "application/cloudevents+json ; x=y; CHARSET=US-ASCII",
        "Application/CloudEvents+JSON",
    ],
)
def test_structured_mode_is_read(content_type: str) -> None:
    document = {**DOCUMENT, "data": {"order_id": 7}, "tenant": "t", "flag": True, "n": 3, "subject": None}

    envelope = read(structured(document, content_type))

    assert envelope == Envelope(
        id="1",
        source="/shop",
        type="t",
        time=datetime(2030, 1, 1, tzinfo=UTC),
        datacontenttype=None,
        extensions={"tenant": "t", "flag": True, "n": 3},
        data=b'{"order_id": 7}',
    )


def test_the_structured_data_keep_every_digit() -> None:
    attributes = b'"id" : "1","source":"/s","type":"t","specversion":"1.0"'
    document = b' { "data" : {"total":12345678901234567.890, "n":1e400} , ' + attributes + b" } "

    assert read(structured(document)).data == b'{"total":12345678901234567.890, "n":1e400}'


@pytest.mark.parametrize(
    ("members", "data"),
    [
        ({}, b""),
        ({"data": None}, b"null"),
        ({"data": "text"}, b'"text"'),
        ({"data": [1, "a"]}, b'[1, "a"]'),
        ({"data": "text", "datacontenttype": "text/plain"}, b"text"),
        ({"data": "grün", "datacontenttype": "text/plain"}, "grün".encode()),
        ({"data": {"a": 1}, "datacontenttype": "application/x-thing"}, b'{"a": 1}'),
        ({"data_base64": "//4=", "datacontenttype": "image/png"}, b"\xff\xfe"),
        ({"data_base64": ""}, b""),
        ({"data_base64": "//4=", "data": None}, b"\xff\xfe"),
        ({"data_base64": None, "data": 1}, b"1"),
    ],
)
def test_structured_data_are_json_text_or_base64(members: dict[str, object], data: bytes) -> None:
    assert read(structured({**DOCUMENT, **members})).data == data


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "no JSON object"),
        (b"garbage", "no JSON object"),
        (b"[]", "no JSON object"),
        (b"{", "no JSON object"),
        (b'{"a"}', "no JSON object"),
        (b'{"a":1,}', "no JSON object"),
        (b'{1:"a"}', "no JSON object"),
        (b'{"a":1} {}', "no JSON object"),
        (b'{"a":NaN}', "no JSON object"),
        (b'{"a":' + b"[" * 100_000, "no JSON object"),
        (b'{"a":' + b"9" * 5000 + b"}", "no JSON object"),
        (b'{"id":"\xff"}', "not UTF-8"),
        (b"{}", "no CloudEvents attributes"),
        ({**DOCUMENT, "id": ""}, "'id' is empty"),
        ({**DOCUMENT, "id": None}, "'id' is missing"),
        ({**DOCUMENT, "specversion": None}, "'specversion' is missing"),
        ({**DOCUMENT, "specversion": "0.3"}, "'specversion' is '0.3'"),
        ({**DOCUMENT, "tenant": {"a": 1}}, "'tenant' is a value of type dict"),
        ({**DOCUMENT, "data": 1, "data_base64": "//4="}, "'data' is there twice"),
        ({**DOCUMENT, "data_base64": "%%%"}, "'data_base64' is not base64"),
        ({**DOCUMENT, "data_base64": "é"}, "'data_base64' is not base64"),
        ({**DOCUMENT, "data_base64": 1}, "'data_base64' is a value of type int"),
        ({**DOCUMENT, "data": "\ud800", "datacontenttype": "text/plain"}, "lone surrogate"),
        ({**DOCUMENT, "data_x": "1"}, "'data_x' is no name"),
        ({**DOCUMENT, "time": "soon"}, "'time' is no time"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_structured_event_that_cannot_be_read_says_why(body: object, said: str) -> None:
    with pytest.raises(EnvelopeError) as caught:
        read(structured(body))

    assert said in str(caught.value)
    assert caught.value.reason == "invalid-envelope"


@pytest.mark.parametrize(
    ("content_type", "said"),
    [
        ("application/cloudevents-batch+json", "one event per message"),
        ("application/cloudevents-batch+json; charset=utf-8", "one event per message"),
        ("application/cloudevents+avro", "'application/cloudevents+avro' cannot be read"),
        ("application/cloudevents", "'application/cloudevents' cannot be read"),
        ("application/cloudevents+json; charset=latin-1", "is in 'latin-1'"),
    ],
)
def test_other_structured_forms_are_refused(content_type: str, said: str) -> None:
    with pytest.raises(EnvelopeError) as caught:
        read(structured(DOCUMENT, content_type))

    assert said in str(caught.value)


@given(st.binary(max_size=60), st.sampled_from(["application/cloudevents+json", "application/json", "", None]))
def test_garbage_is_an_envelope_error_and_nothing_else(body: bytes, content_type: str | None) -> None:
    with pytest.raises(EnvelopeError):
        read(Message({"x": 1}, body, content_type))


HEADER_VALUES = st.one_of(
    *(st.text(), st.binary(), st.integers(), st.floats(), st.booleans(), st.none(), st.datetimes()),
    *(st.binary().map(bytearray), st.lists(st.integers(), max_size=2), st.decimals()),
)


@given(
    st.dictionaries(st.sampled_from([*HEADERS, "cloudEvents_x", "ce-id", "cloudEvents:id"]) | st.text(), HEADER_VALUES)
)
def test_any_headers_make_an_envelope_or_an_envelope_error(headers: dict[str, object]) -> None:
    try:
        envelope = read(replace(MESSAGE, headers={**HEADERS, **headers}))
    except EnvelopeError:
        return
    assert read(encode(envelope)) == envelope


def test_no_error_of_decoding_shows_the_data() -> None:
    document = {**DOCUMENT, "data": SECRET_DATA, "tenant": {}}
    broken = json.dumps(document).encode()[:-1]

    for body in (json.dumps(document).encode(), broken):
        with pytest.raises(EnvelopeError) as caught:
            read(structured(body))
        assert_hidden(caught.value)


# ── the SDK's event ─────────────────────────────────────────────────────────────────────────────────


def test_a_cloudevent_has_the_data_parsed() -> None:
    event = ENVELOPE.to_cloudevent()

    assert event.get_data() == {"order_id": 7, "total": "12.30"}
    assert (event.get_id(), event.get_time(), event.get_extension("tenant")) == ("1", NOW, "t")


@pytest.mark.parametrize(
    ("content_type", "data"),
    [
        ("application/json", b'"a string"'),
        ("application/json", b"[1,2]"),
        ("application/json", b"null"),
        ("application/json", b"\xffno json"),
        ("text/plain", b"text"),
        ("image/png", b"\xff\xfe"),
        (None, b""),
        (None, b"null"),
    ],
)
def test_any_data_survive_being_a_cloudevent(content_type: str | None, data: bytes) -> None:
    envelope = replace(ENVELOPE, datacontenttype=content_type, data=data)

    back = Envelope.from_cloudevent(envelope.to_cloudevent())

    assert back.data.replace(b" ", b"") == data.replace(b" ", b"")
    assert replace(back, data=b"") == replace(envelope, data=b"")


def test_a_cloudevent_of_the_sdks_making_becomes_an_envelope() -> None:
    event = CloudEvent({"id": "1", "type": "t", "source": "/s", "time": NOW, "blob": NOW}, {"at": NOW, "text": "grün"})

    envelope = Envelope.from_cloudevent(event)

    assert json.loads(envelope.data) == {"at": NOW.isoformat(), "text": "grün"}
    assert envelope.extensions == {"blob": "2030-01-31T12:00:00.250000Z"}
    assert event.get_specversion() == "1.0"  # untouched


@pytest.mark.parametrize(
    ("attributes", "data", "said"),
    [
        ({"source": "not a uri"}, b"", "'source' is no URI reference"),
        ({"share": 0.5}, b"", "'share' is a value of type float"),
        ({}, {"thing": object()}, "the data does not serialise as JSON"),
        ({}, {"thing": float("nan")}, "the data does not serialise as JSON"),
    ],
)
def test_what_the_sdk_lets_through_is_checked(attributes: dict[str, Any], data: Any, said: str) -> None:
    event = CloudEvent({"id": "1", "type": "t", "source": "/s", **attributes}, data)

    with pytest.raises(EnvelopeError, match=said):
        Envelope.from_cloudevent(event)


def test_base64_is_what_the_sdk_writes_for_bytes() -> None:
    event = CloudEvent({"id": "1", "type": "t", "source": "/s", "datacontenttype": "image/png"}, b"\xff\xfe")

    message = from_sdk(amqp.to_structured_event(event))

    assert json.loads(message.body)["data_base64"] == base64.b64encode(b"\xff\xfe").decode()
    assert read(message).data == b"\xff\xfe"


def test_an_event_of_the_old_version_is_refused() -> None:
    old = OldCloudEvent({"id": "1", "type": "t", "source": "/s"})

    with pytest.raises(EnvelopeError, match=r"'specversion' is '0\.3'"):
        Envelope.from_cloudevent(old)  # type: ignore[arg-type]


def test_the_sdk_is_loaded_only_when_it_is_asked_for() -> None:
    code = "import sys, eventbus.envelope; sys.exit('cloudevents' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def assert_hidden(error: BaseException) -> None:
    assert SECRET_DATA not in "".join(traceback.format_exception(error))
