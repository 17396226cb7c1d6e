"""The wire form of an event: headers and body. Neutral ground between the codec and the transports.

Nothing here knows CloudEvents or a broker's client. The one rule: whatever part publishes a message *again*
goes through `republished`, so that what a broker wrote into the headers never travels a second time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

# What AMQP 0-9-1 can carry in a header. Foreign messages may hold all of it; ours hold scalars only.
Headers = Mapping[str, object]

ATTEMPT = "x-eventbus-attempt"
HANDLER = "x-eventbus-handler"
FIRST_FAILED = "x-eventbus-first-failed"
REASON = "x-eventbus-reason"
ERROR = "x-eventbus-error"
TRACE = "x-eventbus-trace"
ORIGIN_EXCHANGE = "x-eventbus-origin-exchange"
ORIGIN_KEY = "x-eventbus-origin-key"
OURS = "x-eventbus-"

# On 3.10 and 3.13 the broker believes an `x-death` that a client sent: a copied one looks like a dead-letter cycle,
# is dropped or held, and 32 held ones stop the delay tree for everybody. CC and BCC would route the copy twice.
_BROKERS_OWN = frozenset({"x-delivery-count", "x-acquired-count", "x-stream-offset", "CC", "BCC"})
_BROKERS_OWN_PREFIXES = ("x-death", "x-first-death-", "x-last-death-")

# Kept from a foreign message when it is published again. Not `user_id` (the broker checks it against the
# connection), `expiration` (the copy would vanish), `delivery_mode` (always 2) or `message_id` (fresh every time).
KEPT_PROPERTIES = (
    "content_encoding",
    "priority",
    "correlation_id",
    "reply_to",
    "timestamp",
    "message_type",
    "app_id",
)


@dataclass(
    slots=True
)  # `Final` instead of frozen: one is made for each event, and freezing makes that four times dearer
class Message:
    """Headers, body and the body's content type; `properties` holds what a foreign sender set besides.

    `encoded` holds, by name, the bytes on the wire of those headers that we would encode otherwise: so what is
    published again is the original's.
    """

    headers: Final[Headers]
    body: Final[bytes]
    content_type: Final[str | None] = None
    properties: Final[Headers] = field(default_factory=dict)
    encoded: Final[Mapping[str, bytes]] = field(default_factory=dict, compare=False, repr=False)

    def republished(self, headers: Headers | None = None) -> Message:
        """This message as it may be published again: without the broker's own headers, with *headers* on top."""
        kept = {name: value for name, value in self.headers.items() if not _is_brokers_own(name)}
        kept.update(headers or {})
        properties = {name: value for name, value in self.properties.items() if name in KEPT_PROPERTIES}
        encoded = {name: raw for name, raw in self.encoded.items() if name not in (headers or {})}
        return replace(self, headers=kept, properties=properties, encoded=encoded)

    def without_ours(self) -> Message:
        """This message without the bus's own headers: what a replay publishes, and what was first published."""
        return replace(self, headers={name: v for name, v in self.headers.items() if not name.startswith(OURS)})


def _is_brokers_own(name: str) -> bool:
    return name in _BROKERS_OWN or name.startswith(_BROKERS_OWN_PREFIXES)


def matches(pattern: str, key: str) -> bool:
    """Whether a topic exchange routes *key* to a binding of *pattern* (AMQP 0-9-1, section 3.1.3.3)."""
    return _matches(_words(pattern), _words(key))


def _words(key: str) -> list[str]:
    return key.split(".") if key else []  # RabbitMQ: the empty key has no words, not one empty word


def _matches(pattern: list[str], words: list[str]) -> bool:
    # Greedy: only the last `#` passed so far ever has to take one word more, so nothing is tried twice for the others.
    at = word = 0
    last_hash, taken_until = -1, 0
    while word < len(words):
        if at < len(pattern) and pattern[at] == "#":
            last_hash, taken_until = at, word
            at += 1
        elif at < len(pattern) and pattern[at] in ("*", words[word]):
            at, word = at + 1, word + 1
        elif last_hash >= 0:
            taken_until += 1
            at, word = last_hash + 1, taken_until
        else:
            return False
    return all(left == "#" for left in pattern[at:])
