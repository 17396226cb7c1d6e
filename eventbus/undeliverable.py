"""What no queue took, and the alternate exchanges caught: look at it where it is, and publish it again.

Nothing is lost here, but nobody handles it either. Each message goes back to where its key says that it was going:
to a service's retries, to the subscribers of a type, to a service's dead letters.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Literal, Self, assert_never

from eventbus import message as header
from eventbus.bus import DEFAULT_PUBLISH_TIMEOUT
from eventbus.dead_letters import death_of, read, time_of
from eventbus.delay import LEVELS
from eventbus.desk import Desk, envelope_of, id_of
from eventbus.envelope import Envelope
from eventbus.errors import SetupError
from eventbus.message import Message
from eventbus.service import check_service_name
from eventbus.topology import Names
from eventbus.transport.base import Delivery, Publication

__all__ = ["Undeliverable", "UndeliverableMessage", "Why"]

# A closed set: no queue for a service's retries; no subscriber of a delayed event when it was due; no queue for a
# service's dead letters; taken from a service's dead letters by a policy; something that the bus did not put here.
Why = Literal["no-retry-queue", "no-subscriber", "no-dead-queue", "taken-from-dead-letters", "unknown"]


@dataclass(frozen=True, slots=True)
class UndeliverableMessage:
    """One message that no queue took. `envelope` is None where it is no CloudEvent; `body` is as it came.

    `target` is the service, or for `no-subscriber` the event's type; None where nobody can tell. `id` names it for
    `eventbus undeliverable show|replay`.
    """

    id: str
    envelope: Envelope | None
    body: bytes = field(repr=False)  # data: it must not get into a log by `print(message)`
    headers: dict[str, object] = field(repr=False)
    exchange: str
    key: str
    why: Why
    target: str | None
    since: datetime | None  # when the broker moved it last, as far as it says


class Undeliverable:
    """The undeliverable messages of a namespace; an async context manager. Looking leaves them where they are."""

    def __init__(self, *, url: str | None = None, namespace: str | None = None) -> None:
        self._desk = Desk("Undeliverable", url, namespace)

    async def __aenter__(self) -> Self:
        """Connect, within 15 s.

        Raises:
            SetupError: it cannot work. TransportError: nobody answered.
        """
        await self._desk.open()
        return self

    async def __aexit__(self, t: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        await self._desk.close()

    async def __aiter__(self) -> AsyncIterator[UndeliverableMessage]:
        """Each message that is there now, the first that came first."""
        for message in await self._desk.look(self._names.undeliverable, self._read):
            yield message

    async def replay(self, which: Callable[[UndeliverableMessage], bool] = lambda _: True) -> int:
        """Publish those that *which* picks to where they were going, and return how many went.

        Each is confirmed, then removed. What still has no subscriber, no queue or no known target stays.

        Raises:
            TransportError: one was not confirmed; it and those behind it stay.
        """
        return await self._desk.replay(self._names.undeliverable, self._read, which, self._publish)

    @property
    def _names(self) -> Names:
        return self._desk.sender.names

    def _read(self, delivery: Delivery) -> UndeliverableMessage:
        return interpret(self._names, delivery.exchange, delivery.key, delivery.message)

    async def _publish(self, undelivered: UndeliverableMessage, message: Message) -> bool:
        publication = again(self._names, undelivered, message)
        if publication is None:
            return False
        timeout_s = DEFAULT_PUBLISH_TIMEOUT.total_seconds()
        return await self._desk.sender.transport.publish(publication, timeout_s=timeout_s)


def interpret(names: Names, exchange: str, key: str, message: Message) -> UndeliverableMessage:
    """What *message* is, which came by *exchange* with *key*. Never fails: whatever is there can be looked at."""
    since = time_of(death_of(message.headers).get("time"))
    why, target = _going_to(names, exchange, key, message.headers)
    return UndeliverableMessage(
        id=id_of(message),
        envelope=envelope_of(message, since or datetime.fromtimestamp(0, UTC)),
        body=message.body,
        headers=dict(message.headers),
        exchange=exchange,
        key=key,
        why=why,
        target=target,
        since=since,
    )


def _going_to(names: Names, exchange: str, key: str, headers: Mapping[str, object]) -> tuple[Why, str | None]:
    # The exchange by which it came in last: the tree's end, or a level from where it went on to the end.
    if exchange in {names.delay_level(level) for level in (None, *range(LEVELS))}:
        kind, _, target = key.split(".", LEVELS)[-1].partition(".")
        if kind == "retry" and _is_service(target):
            return "no-retry-queue", target
        if kind == "publish" and target:
            return "no-subscriber", target
    if exchange == names.dead_exchange and _is_service(key):
        return "no-dead-queue", key
    queue = str(death_of(headers).get("queue", ""))
    service = queue.removeprefix(f"{names.namespace}.").removesuffix(".dead")
    if exchange == names.undeliverable and _is_service(service) and queue == names.dead_queue(service):
        return "taken-from-dead-letters", service
    return "unknown", None


def _is_service(name: str) -> bool:
    try:
        check_service_name(name)
    except SetupError:
        return False
    return True


def again(names: Names, undelivered: UndeliverableMessage, message: Message) -> Publication | None:
    """How *message* is published to where it was going; None if nobody can tell where that was."""
    target = undelivered.target
    if target is None:
        return None
    # To the queue itself: from an exchange that it is not bound to the message would come back here, without a word.
    match undelivered.why:
        case "no-retry-queue":
            # It has waited its time. Handler and attempt stand in its headers, and stay.
            return Publication("", names.retry_queue(target), message.republished())
        case "no-subscriber":
            # Not to the tree's end, which would bring it back here without a word.
            return Publication(names.events, target, message.republished())
        case "no-dead-queue" | "taken-from-dead-letters":
            return Publication("", names.dead_queue(target), message.republished(_reason(message, target)))
        case "unknown":
            return None
        case _:
            assert_never(undelivered.why)


def _reason(message: Message, service: str) -> dict[str, object]:
    """Why it is a dead letter. What only the broker noted, in headers that no copy may carry, is written as ours."""
    if header.REASON in message.headers:
        return {}
    deaths = message.headers.get("x-death")
    earlier = [death for death in deaths if not _is_of_a_dead_queue(death)] if isinstance(deaths, list) else []
    dead = read(Message({**message.headers, "x-death": earlier}, message.body), service)
    return {header.REASON: dead.reason, header.ERROR: dead.error}


def _is_of_a_dead_queue(death: object) -> bool:
    return isinstance(death, Mapping) and str(death.get("queue", "")).endswith(".dead")
