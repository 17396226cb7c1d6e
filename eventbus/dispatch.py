"""Which subscriptions want an event, looked up by its type, however many there are; and how each of them takes it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Final

from pydantic import BaseModel
from pydantic_core import SchemaValidator

from eventbus.envelope import JSON, Envelope
from eventbus.errors import EnvelopeError
from eventbus.event import refusal_of, split_type
from eventbus.service import Key, Subscription

MOST_KNOWN: Final = 10_000  # types; foreign senders may use any number of them


class UnknownVersion(Exception):  # an outcome on its way to decide()
    """A handler's annotation has no class for this event's type."""


class Interest:
    """One subscription's interest in the events of one type: what is the same for all of them, worked out once.

    With a thousand types, whatever is looked up for an event was last used a thousand events before, and is in no
    cache of the processor's any more (PERFORMANCE.md). A model that is rebuilt by force is read as it was.
    """

    __slots__ = (
        "_head", "_key", "_model", "_validate", "function", "handler", "subscription", "takes_context", "timeout_s",
        "type",
    )  # fmt: skip

    def __init__(self, service: str, subscription: Subscription, type_: str) -> None:
        """*service* is the name of the subscription's service."""
        self.subscription, self.type = subscription, type_
        self.handler, self.function = subscription.handler, subscription.function
        self.takes_context = subscription.takes_context
        self.timeout_s = subscription.timeout.total_seconds()
        reads = subscription.reads
        self._model = reads.model if reads.events is None else reads.events.get(type_)
        self._validate = _validate_of(self._model)
        self._key = subscription.key
        self._head = f"{service}/{subscription.handler}/{_name_in_key(type_)}/"

    def read(self, envelope: Envelope) -> BaseModel | Envelope:
        """What the handler is called with.

        Raises:
            UnknownVersion: the annotation names no class for this type.
            EnvelopeError: the data is not what the class says; its reason is `invalid-data`.
        """
        if self._model is None:
            if self.subscription.reads.envelope:
                return envelope
            raise UnknownVersion(f"handler {self.handler!r} reads {self.subscription.reads}, not {self.type}")
        if self._validate is None or envelope.datacontenttype != JSON:
            return envelope.event(self._model)
        try:
            return self._validate(envelope.data)  # as `event` does, which looks the validator up
        except Exception as error:  # noqa: BLE001  # a validator's own bug, too
            refusal = refusal_of(self._model, error)
        raise refusal

    def idempotency_key(self, envelope: Envelope, event: object) -> str:
        """The key that tells this handler's work on this event from all other work.

        Raises:
            EnvelopeError: the event has no such value.
        """
        if self._key is None:
            return f"{self._head}{envelope.source} {envelope.id}"
        return f"{self._head}{_value(self._key, event)}"


def _validate_of(model: type[BaseModel] | None) -> Callable[[bytes], BaseModel] | None:
    """What reads JSON as *model*; None where it has to be asked for each time.

    That is so where the class is not fully defined, and where a plugin of pydantic's watches.
    """
    validator = None if model is None else model.__pydantic_validator__
    return validator.validate_json if isinstance(validator, SchemaValidator) else None


def _name_in_key(type_: str) -> str:
    return split_type(type_)[0].replace("%", "%25").replace("/", "%2F")  # a foreign one may hold a slash


def _value(key: Key, event: object) -> str:
    match key:
        case str(name):
            return _field(event, name)
        case tuple(names):
            return json.dumps([_field(event, name) for name in names])
        case function:
            return _call(function, event)


def _field(event: object, name: str) -> str:
    try:
        value = getattr(event, name)
        key = str(value)
    except Exception as error:  # noqa: BLE001  # a property may raise anything; its text may hold data
        raise EnvelopeError(
            f"the event's {name!r}, its idempotency key, raised {type(error).__name__}", reason="invalid-data"
        ) from None
    if value is None:  # all events without one would be duplicates of the first
        raise EnvelopeError(f"the event's {name!r}, its idempotency key, is None", reason="invalid-data")
    return key


def _call(function: Callable[..., object], event: object) -> str:
    try:
        value = function(event)
    except Exception as error:  # noqa: BLE001  # as above
        raise EnvelopeError(f"its idempotency key raised {type(error).__name__}", reason="invalid-data") from None
    if not isinstance(value, str):
        raise EnvelopeError(
            f"its idempotency key is of type {type(value).__name__}: return a str", reason="invalid-data"
        )
    return value


class Dispatch:
    """The subscriptions of one service, in the order in which they were declared."""

    def __init__(self, service: str, subscriptions: Iterable[Subscription]) -> None:
        """*service* is the service's name."""
        self._service = service
        # All by their place. `order_placed.v1` and `order_placed.*` are found by what they say; a search through all,
        # for each new type, costs a service of a thousand a second.
        self._by_pattern: dict[str, dict[int, Subscription]] = {}
        self._others: dict[int, Subscription] = {}
        self._by_handler: dict[str, Subscription] = {}
        self._known: dict[str, tuple[Interest, ...]] = {}
        for place, subscription in enumerate(subscriptions):
            self._by_handler[subscription.handler] = subscription
            for pattern in subscription.patterns:
                if _is_plain(pattern.removesuffix(".*")):
                    self._by_pattern.setdefault(pattern, {})[place] = subscription
                else:
                    self._others[place] = subscription

    def wanting(self, type_: str) -> tuple[Interest, ...]:
        """The interest of each that events of *type_* are for."""
        known = self._known.get(type_)
        if known is None:
            asked = self._others | self._by_pattern.get(type_, {}) | self._by_pattern.get(_any_version(type_), {})
            wanting = [asked[place] for place in sorted(asked) if asked[place].wants(type_)]
            known = tuple(Interest(self._service, subscription, type_) for subscription in wanting)
            if len(self._known) < MOST_KNOWN:
                self._known[type_] = known
        return known

    def of(self, handler: str, type_: str) -> Interest | None:
        """The interest of the one called *handler*, whether it wants events of *type_* or not; None if there is none.

        A retry names its handler.
        """
        subscription = self._by_handler.get(handler)
        return None if subscription is None else Interest(self._service, subscription, type_)


def _is_plain(pattern: str) -> bool:
    return not {"*", "#"}.intersection(pattern.split("."))


def _any_version(type_: str) -> str:
    return type_.rpartition(".")[0] + ".*"
