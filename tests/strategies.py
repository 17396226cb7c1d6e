"""Messages for property tests: whatever can stand on the wire, good, half right and hostile.

`raw_messages` are bytes, as a broker hands them out; `messages` what a transport may make of them. The mass of them,
for live workers, is drawn faster by `tests.faults.hostile.messages`.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from hypothesis import strategies as st
from pamqp.header import ContentHeader

from eventbus.message import Message
from eventbus.transport.rabbitmq.channels import decode
from tests import corpus
from tests.faults.hostile.amqp import Field, Raw, encode_properties

SPANS = {"b": (-(2**7), 2**7), "B": (0, 2**8), "s": (-(2**15), 2**15), "u": (0, 2**16), "I": (-(2**31), 2**31),
         "i": (0, 2**32), "l": (-(2**63), 2**63), "T": (0, 2**64)}  # fmt: skip
ATTRIBUTES = ("specversion", "id", "source", "type", "time", "subject", "datacontenttype", "dataschema", "tenant",
              "data", "data_base64", "Bad-Name", "")  # fmt: skip
CORPUS = list(corpus.load().values())
PREFIXES = ("cloudEvents_", "cloudEvents:", "ce-", "ce_", "Ce-", "")
GOOD = {"specversion": "1.0", "id": "1", "source": "/x", "type": "order_placed.v1"}
CONTENT_TYPES = (
    "", "application/json", "application/cloudevents+json", "application/cloudevents+json; charset=utf-16",
    "application/cloudevents-batch+json", "APPLICATION/CLOUDEVENTS", "text/plain", "a/b+json; x",
)  # fmt: skip


# ── on the wire ─────────────────────────────────────────────────────────────────────────────────────


def _numbers(kind: str) -> st.SearchStrategy[Field]:
    low, beyond = SPANS[kind]
    edges = st.sampled_from((low, 0, beyond - 1))
    return st.tuples(st.just(kind), edges | st.integers(low, beyond - 1))


def _text(max_size: int) -> st.SearchStrategy[bytes]:
    return st.text(st.characters(exclude_categories=["Cs"]), max_size=max_size // 4).map(str.encode)


TEXTS = _text(80) | st.binary(max_size=20)
NAMES = st.sampled_from((b"", b"a", b"x-app", b"CC", b"x-death", b"x-eventbus-attempt", b"k" * 129, b"k" * 255)) | TEXTS
SCALARS: st.SearchStrategy[Field] = st.one_of(
    *map(_numbers, SPANS),
    st.tuples(st.just("t"), st.booleans()),
    st.tuples(st.just("d"), st.floats()),
    st.tuples(st.just("f"), st.floats(width=32)),
    st.tuples(st.just("D"), st.tuples(st.integers(0, 255), st.integers(0, 2**32 - 1))),
    st.tuples(st.sampled_from("Sx"), TEXTS),
    st.just(("V", None)),
)
FIELDS: st.SearchStrategy[Field] = st.recursive(
    SCALARS,
    lambda inner: (
        st.tuples(st.just("A"), st.lists(inner, max_size=3))
        | st.tuples(st.just("F"), st.lists(st.tuples(NAMES, inner), max_size=3))
    ),
    max_leaves=8,
)
SHORT = _text(60) | st.binary(max_size=9)
PROPERTIES: dict[str, st.SearchStrategy[Any]] = {
    "content_type": st.sampled_from(CONTENT_TYPES).map(str.encode) | SHORT,
    "content_encoding": SHORT,
    "delivery_mode": st.integers(0, 255),
    "priority": st.integers(0, 255),
    "correlation_id": SHORT,
    "reply_to": SHORT,
    "message_id": SHORT,
    "timestamp": st.integers(0, 2**64 - 1),
    "type": SHORT,
    "app_id": SHORT,
}


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
DEEP = st.sampled_from((b"[" * 100_000, b'{"a":' * 5000, b"[" * 400 + b"]" * 400))
DOUBLED = st.sampled_from((b'{"order_id":1,"order_id":2,"email":"a"}', b'{"id":"1","id":"2","specversion":"1.0"}'))


@st.composite
def attributes(draw: st.DrawFn) -> dict[str, Any]:
    """A CloudEvent's attributes with some missing, and some that are none."""
    given: dict[str, Any] = dict(GOOD)
    for name in draw(st.lists(st.sampled_from(ATTRIBUTES), max_size=3)):
        if draw(st.booleans()):
            given.pop(name, None)
        else:
            given[name] = draw(JSON_VALUES)
    return given


def _as_json(value: Any) -> bytes:
    return json.dumps(value).encode()  # NaN and lone surrogates included


BODIES = st.one_of(
    st.binary(max_size=50), JSON_VALUES.map(_as_json), attributes().map(_as_json), DEEP, DOUBLED,
    st.lists(attributes(), max_size=2).map(_as_json),
)  # fmt: skip


def _field(value: Any) -> Field:
    """*value* as a field; a number that AMQP has not becomes a text."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "S", b"%d" % value
    if isinstance(value, str):
        return "S", value.encode(errors="surrogatepass")
    if isinstance(value, list):
        return "A", [_field(one) for one in value]
    if isinstance(value, dict):
        return "F", [(name.encode(errors="surrogatepass")[:255], _field(one)) for name, one in value.items()]
    return corpus.field_of(value)


@st.composite
def raw_messages(draw: st.DrawFn) -> Raw:
    """Any message that can be on the wire, its headers well-formed as AMQP has it."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.sampled_from(CORPUS))
    names = draw(st.lists(st.sampled_from(sorted(PROPERTIES)), unique=True, max_size=4))
    values: dict[str, Any] = {name: draw(PROPERTIES[name]) for name in names}
    headers: list[tuple[bytes, Field]] = draw(st.lists(st.tuples(NAMES, FIELDS), max_size=4))
    if draw(st.booleans()):
        prefix = draw(st.sampled_from(PREFIXES))
        headers += [(f"{prefix}{name}".encode(), _field(value)) for name, value in draw(attributes()).items()]
    if headers or "priority" in values:
        values["headers"] = headers
    return Raw(draw(TEXTS), encode_properties(values), draw(BODIES))


# ── as a transport has it ───────────────────────────────────────────────────────────────────────────


def read(raw: Raw) -> Message | None:
    """*raw* as the client hands it on; None where it cannot read the headers."""
    header = ContentHeader()
    try:
        header.unmarshal(bytes(12) + raw.properties)
    except ValueError:
        return None
    return decode(header.properties, raw.body)


_VALUES: st.SearchStrategy[object] = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(), st.text(max_size=9),
        st.binary(max_size=9), st.binary(max_size=9).map(bytearray), st.decimals(), st.just(Decimal("1e-255")),
        st.datetimes(timezones=st.just(UTC)), st.datetimes(), st.just(datetime.max),  # noqa: DTZ901  # hostile
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
_HEADER_NAMES = st.text(max_size=9) | st.builds(str.__add__, st.sampled_from(PREFIXES), st.sampled_from(ATTRIBUTES))
ODD_MESSAGES = st.builds(
    Message,
    headers=st.dictionaries(_HEADER_NAMES, _VALUES, max_size=6),
    body=BODIES,
    content_type=st.none() | st.sampled_from(CONTENT_TYPES) | st.text(max_size=9),
    properties=st.dictionaries(st.sampled_from(("timestamp", "priority", "app_id", "reply_to")), _VALUES, max_size=2),
)
# Those of the wire, and some that no client of today makes of anything there.
messages = raw_messages().map(read).filter(lambda message: message is not None) | ODD_MESSAGES
