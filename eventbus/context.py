"""What a handler may know about its delivery, and do: publish follow-up events whose ids do not change.

A handler runs at least once, so it may publish the same follow-up twice. The ids are derived from the cause, so that
whoever handles the follow-up recognises the second copy.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Generic
from uuid import UUID

from typing_extensions import TypeVar

from eventbus.envelope import Envelope, enclose
from eventbus.errors import EnvelopeError, SetupError
from eventbus.event import Event

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

S = TypeVar("S", default=Any)  # what the service's lifespan yields; Any where there is none, as in `Context` alone
Publish = Callable[[Envelope, timedelta | None], Awaitable[None]]


class AlreadyDone(BaseException):  # no Exception: a handler that catches those must not take it for one of its own
    """Ends a handler whose work on this event is committed: its key is in the inbox."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A database transaction at work: its session, and how an event is written into it."""

    session: AsyncSession
    publish: Publish


# Opens a unit on what the lifespan yielded, for one idempotency key.
OpenUnit = Callable[[object, str], AbstractAsyncContextManager[Unit]]


class Context(Generic[S]):
    """One attempt of one handler at one event. `state` is what the service's lifespan yielded."""

    __slots__ = (
        "_attempt", "_counter", "_envelope", "_handler", "_inbox", "_publish", "_service", "_source", "_state",
    )  # fmt: skip

    def __init__(
        self,
        envelope: Envelope,
        *,
        attempt: int,
        identity: tuple[str, str, str],
        state: S,
        publish: Publish,
        inbox: tuple[OpenUnit, str] | None = None,
    ) -> None:
        """*identity* is the service, the handler and the source of its events; *inbox* is for one `transaction`."""
        self._envelope = envelope
        self._attempt = attempt
        self._service, self._handler, self._source = identity
        self._state = state
        self._publish = publish
        self._inbox = inbox
        self._counter: Counter[str] | None = None

    @property
    def envelope(self) -> Envelope:
        """The event's CloudEvents attributes and its data as it came."""
        return self._envelope

    @property
    def attempt(self) -> int:
        """1 on the first delivery."""
        return self._attempt

    @property
    def service(self) -> str:
        """The service's name."""
        return self._service

    @property
    def handler(self) -> str:
        """The handler's name: its identity in retries, dead letters and idempotency keys."""
        return self._handler

    @property
    def state(self) -> S:
        """What the service's lifespan yielded; None without one."""
        return self._state

    async def publish(
        self,
        event: Event | Envelope,
        *,
        id: str | None = None,
        subject: str | None = None,
        delay: timedelta | None = None,
        extensions: Mapping[str, str | int | bool] | None = None,
    ) -> Envelope:
        """Publish a follow-up and return its envelope once the broker has confirmed.

        Inside `transaction` it is written to the outbox instead, and leaves after the commit. It carries the cause's id
        as `causationid` and the first event's as `correlationid`. Without *id* its id is derived from the cause, so
        that a second run of this handler publishes the same one; a handler that publishes several equal events gets
        them told apart by their order.

        Raises:
            PublishError: not confirmed. EnvelopeError: it can never be sent.
        """
        envelope = self._enclose(event, id, subject, extensions or {})
        await self._publish(envelope, delay)
        return envelope

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncSession]:
        """A transaction on the database of the service, in which the handler's whole effect happens once.

        `context.state` is the `AsyncEngine`, or has it as `.engine`. Leaving the block commits the handler's writes,
        the inbox row that says so, and what `publish` was given inside, which goes to the outbox instead of the broker.
        An error inside undoes them all, and the next attempt begins anew. Where the inbox knows the event already, the
        handler ends at the `async with`, and its delivery is a duplicate. Once for each run of a handler: what stands
        behind the block is not repeated once the block was left well.

        Raises:
            SetupError: no engine, no tables, or the second transaction of this run.
        """
        if self._inbox is None:
            raise SetupError(
                f"{self._service}.{self._handler} opens a second transaction in one run: "
                "what belongs together is one `async with context.transaction()`"
            )
        (open_unit, key), self._inbox = self._inbox, None
        async with open_unit(self._state, key) as unit:
            outside, self._publish = self._publish, unit.publish
            try:
                yield unit.session
            finally:
                self._publish = outside

    def _enclose(
        self, event: Event | Envelope, id: str | None, subject: str | None, extensions: Mapping[str, str | int | bool]
    ) -> Envelope:
        cause = self._envelope
        related = {"correlationid": cause.extensions.get("correlationid", cause.id), "causationid": cause.id}
        if isinstance(event, Envelope):
            return replace(
                event,
                id=event.id if id is None else id,
                subject=event.subject if subject is None else subject,
                extensions={**related, **event.extensions, **extensions},
            )
        if not isinstance(event, Event):
            raise EnvelopeError(f"{type(event).__name__} is neither an Event nor an Envelope: subclass eventbus.Event")
        envelope = enclose(
            event,
            id="derived below" if id is None else id,
            source=self._source,
            time=datetime.now(UTC),
            subject=subject,
            extensions={**related, **extensions},
        )
        return replace(envelope, id=self._derived_id(envelope)) if id is None else envelope

    def _derived_id(self, envelope: Envelope) -> str:
        cause = self._envelope
        data = hashlib.sha256(envelope.data).hexdigest()
        parts = [cause.source, cause.id, self._service, self._handler, envelope.type, data]
        counter = self._counter = self._counter if self._counter is not None else Counter()
        text = json.dumps(parts)
        counter[text] += 1
        digest = hashlib.sha256(f"{text} {counter[text]}".encode()).digest()
        return str(UUID(bytes=digest[:16], version=5))
