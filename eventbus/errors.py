"""What can go wrong, cut by who must act. Every message gives the value and the remedy.

    EventBusError
    ├─ EnvelopeError        the sender's: it is no event that anybody could read
    ├─ TransportError       the broker's: the caller may try again
    │  ├─ PublishError      one event: .envelope, .maybe_stored
    │  │  ├─ PublishTimeout the deadline passed without a confirm
    │  │  └─ Unroutable     no queue took it
    │  └─ PartlyPublished   several events: .published, .failed
    ├─ StoreError           a store's: it did not answer
    └─ SetupError           the programmer's or the operator's: nothing was started
       └─ TopologyConflict  the broker holds something else under our name

    Reject, RetryLater      what a handler says; not EventBusErrors

No message of an error holds an event's data: locations and kinds only. Passwords in URLs are shown as `***`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from eventbus.envelope import Envelope

__all__ = [
    "EnvelopeError",
    "EventBusError",
    "PartlyPublished",
    "PublishError",
    "PublishTimeout",
    "Reject",
    "RetryLater",
    "SetupError",
    "StoreError",
    "TopologyConflict",
    "TransportError",
    "Unroutable",
    "hide_password",
]


class EventBusError(Exception):
    """Whatever this library raises on purpose."""


class EnvelopeError(EventBusError):
    """A message that is no CloudEvent, an event that does not serialise, or data that its model refuses.

    `reason` says which: the first two are `invalid-envelope`, the last `invalid-data`.
    """

    def __init__(
        self, message: str, *, reason: Literal["invalid-envelope", "invalid-data"] = "invalid-envelope"
    ) -> None:
        super().__init__(message)
        self.reason: Literal["invalid-envelope", "invalid-data"] = reason


class TransportError(EventBusError):
    """The broker did not do what was asked; the same call may work later."""


class PublishError(TransportError):
    """One event was not confirmed.

    Give `envelope` to `publish` again: it keeps its id, so that consumers recognise a duplicate. `maybe_stored`
    is False where the broker certainly holds no copy.
    """

    def __init__(self, message: str, *, envelope: Envelope, maybe_stored: bool) -> None:
        super().__init__(message)
        self.envelope = envelope
        self.maybe_stored = maybe_stored


class PublishTimeout(PublishError):
    """The publish timeout ended before the broker confirmed."""


class Unroutable(PublishError):
    """No queue took the event, and `require_subscriber=True` asked for one."""


class PartlyPublished(TransportError):
    """Some of `publish_many`'s events were not confirmed.

    `published` holds the envelopes that were, in the order given; `failed` one error for each of the others.
    """

    def __init__(self, message: str, *, published: Sequence[Envelope], failed: Sequence[PublishError]) -> None:
        super().__init__(message)
        self.published: Sequence[Envelope] = published
        self.failed: Sequence[PublishError] = failed


class StoreError(EventBusError):
    """A store did not answer; nothing was claimed or recorded."""


class SetupError(EventBusError):
    """A mistake in the program, its settings or the broker's permissions; nothing was started."""


class TopologyConflict(SetupError):
    """The broker holds a queue or an exchange of this name with other arguments."""


class Reject(Exception):  # a verdict of the handler, not an error of this library
    """Raised by a handler: this event can never be handled. It is dead-lettered as `rejected`, without a retry."""


class RetryLater(Exception):  # as above
    """Raised by a handler: try again after *delay*, whatever the retry policy says. It uses up an attempt."""

    def __init__(self, delay: timedelta, reason: str = "") -> None:
        if not isinstance(delay, timedelta):
            raise TypeError(f"RetryLater({delay!r}) is no timedelta: say RetryLater(timedelta(seconds=...))")
        super().__init__(reason or f"again in {delay}")
        if delay < timedelta(0):
            raise ValueError(f"RetryLater({delay!r}) lies in the past: give a delay of zero or more")
        self.delay = delay
        self.reason = reason


def hide_password(url: str) -> str:
    """*url* with its password shown as `***`, wherever an URL is printed or logged.

    Greedy up to the last `@`: a password that holds an unescaped `@` or `/` must not be shown in part.
    """
    return re.sub(r"(?<=://)([^:@/\s]*):\S*@", r"\1:***@", url)
