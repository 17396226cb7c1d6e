"""Given-up deliveries of a service: look at them where they are, and publish them again.

Looking never removes. A replay is published first, confirmed, and only then removed: a crash in between leaves the
dead letter and its replay, whose event is recognised as a duplicate if the first replay was handled.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Self, get_args

from eventbus import message as header
from eventbus.delivery import Reason
from eventbus.desk import Desk, envelope_of, id_of
from eventbus.envelope import Envelope
from eventbus.message import Message
from eventbus.service import check_service_name
from eventbus.transport.base import Delivery

__all__ = ["DeadLetter", "DeadLetters", "Reason"]

# How the broker says why it moved a message by itself, in x-death.
_BROKERS_REASONS: Mapping[str, tuple[Reason, str]] = {
    "rejected": ("rejected", "rejected to the broker: no copy of it could be published"),
    "delivery_limit": ("delivery-limit", "its workers ended in the middle of it, again and again"),
}


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One given-up delivery. `envelope` is None where the message is no CloudEvent; `body` is as it came.

    `id` names it for `eventbus dead show|replay`; the event's own id is in the envelope. `error` is one line, `trace`
    the handler's innermost frames. `attempts` is how often it was tried.
    """

    id: str
    envelope: Envelope | None
    body: bytes = field(repr=False)  # data: it must not get into a log by `print(letter)`
    headers: dict[str, object] = field(repr=False)
    service: str
    handler: str | None
    reason: Reason
    error: str
    attempts: int
    first_failed: datetime
    trace: str = field(default="", repr=False)


class DeadLetters:
    """The dead letters of *service*; an async context manager.

    Iterate to look at them, oldest first. They are read when the iteration begins, and are back in their place before
    the first is given out: an iteration can be left early, and a replay inside one finds what it asks for.
    """

    def __init__(self, service: str, *, url: str | None = None, namespace: str | None = None) -> None:
        check_service_name(service)
        self._service = service
        self._desk = Desk("DeadLetters", url, namespace)

    async def __aenter__(self) -> Self:
        """Connect, within 15 s.

        Raises:
            SetupError: it cannot work. TransportError: nobody answered.
        """
        await self._desk.open()
        return self

    async def __aexit__(self, t: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        await self._desk.close()

    async def __aiter__(self) -> AsyncIterator[DeadLetter]:
        """Each dead letter that is there now, oldest first; all stay where they are."""
        for letter in await self._desk.look(self._queue(), self._read):
            yield letter

    async def replay(self, which: Callable[[DeadLetter], bool] = lambda _: True) -> int:
        """Publish those that *which* picks again, to the handler that gave up, and return how many.

        Each is confirmed, then removed. The handler starts over at attempt 1; an event that it has handled meanwhile
        is recognised as a duplicate.

        Raises:
            TransportError: one was not confirmed; it and those behind it stay dead letters.
        """
        return await self._desk.replay(self._queue(), self._read, which, self._publish)

    def _queue(self) -> str:
        return self._desk.sender.names.dead_queue(self._service)

    def _read(self, delivery: Delivery) -> DeadLetter:
        return read(delivery.message, self._service)

    async def _publish(self, letter: DeadLetter, message: Message) -> bool:
        await self._desk.sender.replay(self._service, _fresh(message, letter))
        return True


def _fresh(message: Message, dead: DeadLetter) -> Message:
    """The message as it was, addressed to the handler that gave it up; where it came from stays written on it."""
    kept = {
        name: message.headers[name] for name in (header.ORIGIN_EXCHANGE, header.ORIGIN_KEY) if name in message.headers
    }
    if dead.handler is not None:
        kept[header.HANDLER] = dead.handler
    return message.without_ours().republished(kept)


def read(message: Message, service: str) -> DeadLetter:
    """A message of a dead queue as what it is. Never fails: whatever is there can be looked at."""
    headers = dict(message.headers)
    death = death_of(headers)
    reason, error = _BROKERS_REASONS.get(str(death.get("reason")), ("rejected", "moved here by the broker"))
    if headers.get(header.REASON) in get_args(Reason):
        reason, error = headers[header.REASON], str(headers.get(header.ERROR, ""))  # type: ignore[assignment]  # checked
    handler, attempts = headers.get(header.HANDLER), headers.get(header.ATTEMPT)
    first_failed = (
        time_of(headers.get(header.FIRST_FAILED)) or time_of(death.get("time")) or datetime.fromtimestamp(0, UTC)
    )
    return DeadLetter(
        id=id_of(message),
        envelope=envelope_of(message, first_failed),
        body=message.body,
        headers=headers,
        service=service,
        handler=handler if isinstance(handler, str) else None,
        reason=reason,
        error=error,
        attempts=attempts if isinstance(attempts, int) else 1,
        first_failed=first_failed,
        trace=str(headers.get(header.TRACE, "")),
    )


def death_of(headers: Mapping[str, object]) -> Mapping[str, object]:
    """The broker's note of why it moved the message last; empty if it never did."""
    deaths = headers.get("x-death")
    newest = deaths[0] if isinstance(deaths, list) and deaths else None
    return newest if isinstance(newest, Mapping) else {}


def time_of(value: object) -> datetime | None:
    """*value* as a time, whoever wrote it, if it is one."""
    if isinstance(value, datetime):
        return value if value.tzinfo else value.replace(tzinfo=UTC)
    try:
        return time_of(datetime.fromisoformat(value)) if isinstance(value, str) else None
    except ValueError:
        return None
