"""Hostile messages by the hundred thousand, the same for the same seed.

Only what a broker takes in: RabbitMQ hangs up on a NaN in a header, a type of field that it does not know, an
expiration that is no number, a foreign user id.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tests import corpus
from tests.faults.hostile.amqp import Field, Raw, encode_field, encode_properties, nested

JSON = b"application/json"
STRUCTURED = b"application/cloudevents+json"
ORDER = b"order_placed.v1"
Headers = Sequence[tuple[bytes, Field]]
NOTHING: Mapping[str, Any] = {}
FRAME = 131_072  # what a broker lets a header take at the most
TEXTS = ("", " ", "a", "ada@example.com", "gr\u00fcn", "\u2603", "\U0001f600", "\x00", "\x7f", "\u202e", "\ufffe",
         "'; drop",
         "%s%n", "../..", "{}", "null", "1e999", "-0", "NaN", "x" * 300)  # fmt: skip
BYTES = (b"", b"\xff", b"\xff\xfe", b"\xc3\x28", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\x00", b"\xef\xbb\xbf{}")
TIMES = (0, 1, 2**31, 2**32 - 1, 2**32, 2**33, 1_700_000_000, 1_700_000_000_000, 1_700_000_000_123, 253_402_300_800,
         2**60, 2**63 - 1, 2**63, 2**64 - 1)  # fmt: skip
SPANS = {"b": 2**7, "s": 2**15, "I": 2**31, "l": 2**63}
UNSIGNED = {"B": 2**8, "u": 2**16, "i": 2**32}
ATTRIBUTES = ("specversion", "id", "source", "type", "time", "subject", "datacontenttype", "dataschema", "tenant")
JSON_BODIES = (
    b"", b" ", b"null", b"[]", b"{}", b'""', b"0", b"nul", b"{", b"\xef\xbb\xbf{}", b"NaN", b"[NaN,Infinity]",
    b'{"order_id":NaN,"email":"a"}', b'{"order_id":1e999,"email":"a"}', b'{"order_id":1,"order_id":2,"email":"a"}',
    b'{"order_id":1.5,"email":"a"}', b'{"order_id":"1","email":7}', b'{"order_id":true,"email":null}',
    b'{"order_id":1,"email":"\\ud800"}', b'{"order_id":1,"email":"\xff"}', b'{"order_id":1,"email":"a","total":1e308}',
    b'{"order_id":' + b"9" * 5000 + b',"email":"a"}', b'{"order_id":1,"email":"a"}}', b'{"order_id":1,"email":"a",}',
    b"[" * 20_000, b'{"a":' * 5_000, b'{"order_id":1,"email":"a","deep":' + b"[" * 3000 + b"]" * 3000 + b"}",
)  # fmt: skip


class Generator:
    """Draws messages. Each kind is a method; the name is how the kind is counted."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self._number = 0
        self._corpus = list(corpus.load().values())
        self._kinds: dict[str, tuple[int, Callable[[], Raw]]] = {
            "good": (20, self.good),
            "good, structured": (8, self.structured),
            "handler fails, refuses, postpones": (3, self.misbehaving),
            "corpus": (6, lambda: self.rng.choice(self._corpus)),
            "corpus, mutated": (12, self.mutated),
            "half a CloudEvent": (12, self.half),
            "structured, broken": (8, self.broken_structured),
            "batch": (2, self.batch),
            "hostile data": (8, self.hostile_data),
            "headers of every type": (10, self.any_headers),
            "long names": (2, self.long_names),
            "times out of range": (3, self.times),
            "no UTF-8": (4, self.no_utf8),
            "deep headers": (1, self.deep),
            "large": (1, self.large),
            "forged headers of bus and broker": (4, self.forged),
            "keys": (2, self.keys),
            "empty": (1, lambda: Raw(ORDER, encode_properties({}), b"")),
            "random bytes": (3, self.random_bytes),
        }

    def messages(self, number: int) -> Iterator[tuple[str, Raw]]:
        names, weights = list(self._kinds), [weight for weight, _ in self._kinds.values()]
        for kind in self.rng.choices(names, weights, k=number):
            yield kind, self._kinds[kind][1]()

    # ── events ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def attributes(self, **changed: Any) -> dict[str, Any]:
        """Good ones, but for what is *changed*."""
        self._number += 1
        good = {"specversion": "1.0", "id": f"h-{self._number}", "source": "/hostile", "type": ORDER.decode()}
        return good | {"time": "2030-01-31T12:00:00Z"} | changed

    def order(self) -> bytes:
        return json.dumps({"order_id": self._number, "email": self.rng.choice(TEXTS)}).encode()

    def binary(
        self,
        attributes: Mapping[str, Any],
        body: bytes,
        more: Headers = (),
        *,
        prefix: str = "cloudEvents_",
        properties: Mapping[str, Any] = NOTHING,
    ) -> Raw:
        headers = [(f"{prefix}{name}".encode(), corpus.field_of(value)) for name, value in attributes.items()]
        headers += more
        self.rng.shuffle(headers)
        values = {"content_type": JSON, "headers": headers} | dict(properties)
        return Raw(self.key(), encode_properties(values), body)

    def key(self) -> bytes:
        return self.rng.choice((ORDER, ORDER, b"order_placed.v2", b"thing.happened.v1"))

    def good(self) -> Raw:
        prefix = self.rng.choice(("cloudEvents_", "cloudEvents:", "ce-", "ce_"))
        return self.binary(self.attributes(), self.order(), prefix=prefix)

    def structured(self) -> Raw:
        event = self.attributes(data={"order_id": self._number, "email": "a", "deep": [[1.5, None]]})
        return Raw(self.key(), encode_properties({"content_type": STRUCTURED}), json.dumps(event).encode())

    def misbehaving(self) -> Raw:
        subject = self.rng.choice(("fails", "refused", "postponed"))
        return self.binary(self.attributes(subject=subject), self.order(), self.harmless_headers())

    def half(self) -> Raw:
        """Attributes missing, of a wrong type, twice, or under several prefixes."""
        attributes = self.attributes()
        for _ in range(self.rng.randint(1, 3)):
            name = self.rng.choice(ATTRIBUTES)
            if self.rng.random() < 0.3:
                attributes.pop(name, None)
            else:
                attributes[name] = self.value()
        prefix = self.rng.choice(("cloudEvents_", "cloudEvents:", "ce-", "Ce-", "", "cloudevents_"))
        more: Headers = [(b"ce-id", ("S", b"x"))] if self.rng.random() < 0.1 else []
        return self.binary(attributes, self.order(), more, prefix=prefix)

    def broken_structured(self) -> Raw:
        event = self.attributes(data=self.value())
        event[self.rng.choice(ATTRIBUTES)] = self.value()
        if self.rng.random() < 0.3:
            event["data_base64"] = self.rng.choice(("", "AA==", "?", 7))
        body = bytearray(json.dumps(event, default=str).encode())
        for _ in range(self.rng.choice((0, 0, 1, 3))):
            body[self.rng.randrange(len(body))] = self.rng.randrange(256)
        if self.rng.random() < 0.2:
            del body[self.rng.randrange(len(body)) :]
        content_type = self.rng.choice((
            STRUCTURED, STRUCTURED, STRUCTURED + b"; charset=utf-8", STRUCTURED + b"; charset=utf-16",
            STRUCTURED.upper(), b"application/cloudevents+avro", b"application/cloudevents",
        ))  # fmt: skip
        return Raw(self.key(), encode_properties({"content_type": content_type}), bytes(body))

    def batch(self) -> Raw:
        body = json.dumps([self.attributes(data={"n": n}) for n in range(self.rng.randint(0, 3))]).encode()
        return Raw(self.key(), encode_properties({"content_type": b"application/cloudevents-batch+json"}), body)

    def hostile_data(self) -> Raw:
        content_type = self.rng.choice(
            (JSON, JSON, JSON, b"", b"text/plain", b"application/xml; x=", b"a", b"/", b"x" * 255)
        )
        return self.binary(self.attributes(), self.rng.choice(JSON_BODIES), properties={"content_type": content_type})

    # ── headers and properties ──────────────────────────────────────────────────────────────────────────────────────

    def any_headers(self) -> Raw:
        headers = [(self.name(), self.field(3)) for _ in range(self.rng.randint(0, 8))]
        if self.rng.random() < 0.5:
            return Raw(self.key(), encode_properties(self.properties() | {"headers": headers}), self.order())
        return self.binary(self.attributes(), self.order(), headers, properties=self.properties())

    def properties(self) -> dict[str, Any]:
        choose = self.rng.choice
        drawn = {
            "content_encoding": choose((b"", b"utf-8", b"gzip")), "priority": choose((0, 1, 9, 255)),
            "correlation_id": choose((b"", b"c" * 255)), "reply_to": choose((b"", b"amq.rabbitmq.reply-to.x")),
            "expiration": b"4294967295", "message_id": choose((b"", b"same", "gr\u00fcn".encode())),
            "timestamp": choose((0, 1_700_000_000)), "type": choose((b"", b"order")), "app_id": choose((b"", b"app")),
            "delivery_mode": choose((1, 2)),
        }  # fmt: skip
        return {name: value for name, value in drawn.items() if self.rng.random() < 0.3}

    def harmless_headers(self) -> Headers:
        return [(b"x-app", ("S", b"shop")), (b"n", ("I", 5)), (b"deep", ("F", [(b"a", ("A", [("t", True)]))]))]

    def name(self) -> bytes:
        return self.rng.choice(
            (
                b"",
                b"a",
                b" ",
                b"x-app",
                "gr\u00fcn".encode(),
                b"traceparent",
                b"k" * 128,
                b"%d" % self.rng.randrange(99),
            )
        )

    def field(self, depth: int) -> Field:
        kind = self.rng.choice("bBsuIiltfdDSxVTAF" if depth else "bBsuIiltfdDSxVT")
        if kind in SPANS:
            return kind, self.rng.choice((-SPANS[kind], SPANS[kind] - 1, 0, -1))
        if kind in UNSIGNED:
            return kind, self.rng.choice((0, UNSIGNED[kind] - 1))
        match kind:
            case "t":
                return kind, self.rng.random() < 0.5
            case "f" | "d":
                return kind, self.rng.choice(
                    (0.0, -0.0, 1.5, 0.1 if kind == "d" else 0.25, 1e300 if kind == "d" else 1e30)
                )
            case "D":
                return kind, (self.rng.choice((0, 2, 28, 255)), self.rng.choice((0, 110, 2**32 - 1)))
            case "S":
                return kind, self.rng.choice((self.rng.choice(TEXTS).encode(), self.rng.choice(BYTES)))
            case "x":
                return kind, self.rng.choice(BYTES)
            case "V":
                return kind, None
            case "T":
                return kind, self.rng.choice((0, 1_700_000_000, 2**31))
            case "A":
                return kind, [self.field(depth - 1) for _ in range(self.rng.randint(0, 3))]
            case _:
                return kind, [(b"%d" % n, self.field(depth - 1)) for n in range(self.rng.randint(0, 3))]

    def value(self) -> Any:
        """A value that an attribute should not have."""
        return self.rng.choice((
            *TEXTS, 0, 1, -1, 2**31, 2**63 - 1, 1.5, True, None, [], {}, {"a": [1]}, ["x"], {"$T": 5}, {"$D": [2, 110]}
        ))  # fmt: skip

    def long_names(self) -> Raw:
        size = self.rng.choice((128, 129, 200, 255))
        name = self.rng.choice((b"k" * size, "\u00fc".encode() * (size // 2)))
        more: Headers = [(name, ("S", b"v"))]
        return self.binary(self.attributes(subject=self.rng.choice(("a", "fails"))), self.order(), more)

    def times(self) -> Raw:
        seconds = self.rng.choice(TIMES)
        where = self.rng.randrange(3)
        more: Headers = [(b"at", ("T", seconds))] if where == 0 else []
        changed = {"time": {"$T": seconds}} if where == 1 else {}
        properties = {"timestamp": seconds} if where == 2 else {}
        subject = self.rng.choice(("a", "fails"))
        return self.binary(self.attributes(subject=subject, **changed), self.order(), more, properties=properties)

    def no_utf8(self) -> Raw:
        broken = self.rng.choice(BYTES[1:6])
        subject = self.rng.choice(("a", "fails"))
        match self.rng.randrange(5):
            case 0:
                return self.binary(self.attributes(subject=subject), self.order(), [(broken, ("S", b"v"))])
            case 1:
                return self.binary(self.attributes(subject=subject), self.order(), [(b"v", ("S", broken))])
            case 2:
                return self.binary(self.attributes(), self.order(), [(b"cloudEvents_subject", ("S", broken))])
            case 3:
                name = self.rng.choice(("content_type", "correlation_id", "app_id", "message_id", "reply_to"))
                return self.binary(self.attributes(subject=subject), self.order(), properties={name: broken})
            case _:
                return self.binary(
                    self.attributes(subject=subject), self.order(), [(b"deep", ("F", [(broken, ("V", None))]))]
                )

    def deep(self) -> Raw:
        depth = self.rng.choice((10, 100, 200, 300, 400, 450, 480, 500, 1000, 5000, 10_000))
        return self.binary(
            self.attributes(subject=self.rng.choice(("a", "fails"))), self.order(), [(b"deep", nested(depth))]
        )

    def large(self) -> Raw:
        match self.rng.randrange(3):
            case 0:
                return self.binary(self.attributes(), b" " * self.rng.choice((140_000, 300_000)) + self.order())
            case 1:  # a copy with a word more does not fit
                subject = self.rng.choice(("a", "fails"))
                return self.binary(
                    self.attributes(subject=subject), self.order(), [(b"l", ("S", b"x" * (FRAME - 600)))]
                )
            case _:
                many: Headers = [(b"h%d" % n, ("S", b"v" * 20)) for n in range(2000)]
                return self.binary(self.attributes(subject=self.rng.choice(("a", "fails"))), self.order(), many)

    def forged(self) -> Raw:
        number = self.field(0)
        death: Field = ("A", [("F", [
            (b"queue", ("S", self.rng.choice((b"events.everything", b"events.delay.v1.00", b"q")))),
            (b"reason", ("S", self.rng.choice((b"rejected", b"expired", b"delivery_limit", b"maxlen")))),
            (b"count", ("l", 1)), (b"exchange", ("S", b"events")), (b"time", ("T", 1_700_000_000)),
            (b"routing-keys", ("A", [("S", b"k")])),
        ])])  # fmt: skip
        choices: Headers = [
            (b"x-eventbus-attempt", self.rng.choice((number, ("l", 2**63 - 1), ("I", -5), ("I", 2), ("I", 99)))),
            (b"x-eventbus-handler", self.rng.choice((number, ("S", b"take"), ("S", b"gone"), ("S", b"")))),
            (b"x-eventbus-first-failed", number), (b"x-eventbus-reason", ("S", b"exhausted")),
            (b"x-eventbus-origin-key", number), (b"x-eventbus-origin-exchange", number), (b"x-eventbus-error", number),
            (b"x-eventbus-\xff", number), (b"x-delivery-count", number), (b"x-acquired-count", ("l", 99)),
            (b"x-death", death), (b"x-first-death-queue", ("S", b"q")), (b"x-last-death-reason", number),
            (b"CC", ("A", [("S", b"other.key")])), (b"BCC", ("A", [("S", b"thing.x")])), (b"traceparent", number),
        ]  # fmt: skip
        subject = self.rng.choice(("a", "fails"))
        return self.binary(
            self.attributes(subject=subject), self.order(), self.rng.sample(choices, self.rng.randint(1, 4))
        )

    def keys(self) -> Raw:
        key = self.rng.choice(
            (b"", b".", b"..", b"a" * 255, b"order_placed.\xff", b"\xff\xfe", "gr\u00fcn".encode(), b"a b", b"#", b"*")
        )
        good = self.good()
        return Raw(key, good.properties, good.body)

    # ── what nobody meant ───────────────────────────────────────────────────────────────────────────────────────────

    def random_bytes(self) -> Raw:
        content_type = self.rng.choice((JSON, STRUCTURED, b"application/octet-stream", b""))
        values = {"content_type": content_type} if content_type else {}
        return Raw(self.key(), encode_properties(values), self.rng.randbytes(self.rng.choice((1, 10, 100, 5000))))

    def mutated(self) -> Raw:
        """A real message with bytes of its body changed, cut out or doubled; and a header more."""
        base = self.rng.choice(self._corpus)
        body = bytearray(base.body)
        for _ in range(self.rng.randint(0, 4)):
            at = self.rng.randrange(len(body) + 1)
            match self.rng.randrange(3):
                case 0:
                    body[at : at + 1] = self.rng.randbytes(1)
                case 1:
                    del body[at : at + self.rng.randint(1, 20)]
                case _:
                    body[at:at] = body[at : at + 20]
        properties = base.properties
        if self.rng.random() < 0.5:
            properties = _with_header(properties, self.name(), self.field(2))
        return Raw(self.rng.choice((base.key, ORDER)), properties, bytes(body))


def _with_header(properties: bytes, name: bytes, field: Field) -> bytes:
    """*properties* with one header more; the flags stay where there are no headers yet."""
    (flags,) = struct.unpack_from(">H", properties)
    if not flags & 1 << 13:
        return properties
    at = 2
    for bit in (15, 14):  # the two short strings before the headers
        if flags & 1 << bit:
            at += 1 + properties[at]
    (size,) = struct.unpack_from(">I", properties, at)
    more = bytes([len(name)]) + name + encode_field(field)
    return properties[:at] + struct.pack(">I", size + len(more)) + more + properties[at + 4 :]
