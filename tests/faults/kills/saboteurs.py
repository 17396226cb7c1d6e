"""Builds of the bus that are wrong on purpose: a run with kills must find each of them out, or it proves nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from eventbus.consumer import ServiceConsumer
from eventbus.context import Unit
from eventbus.database import INBOX
from eventbus.envelope import Envelope
from eventbus.idempotency.base import KEEP_DONE, Claim, Mine, digest
from eventbus.idempotency.shared import SharedStore
from eventbus.outbox import inbox
from eventbus.outbox.base import Row
from eventbus.outbox.sql import Rows
from eventbus.transport.base import Delivery


def ack_first() -> None:
    """A delivery is acked when it comes."""
    take = ServiceConsumer._take

    async def swapped(self: ServiceConsumer, delivery: Delivery, task: asyncio.Task[Any]) -> None:
        delivery.ack()
        await take(self, delivery, task)

    ServiceConsumer._take = swapped  # type: ignore[method-assign]


def done_first() -> None:
    """A key is done as soon as it is claimed."""
    claim = SharedStore.claim
    complete = SharedStore.complete

    async def claimed(self: SharedStore, key: str, lease: timedelta) -> Claim:
        found = await claim(self, key, lease)
        if isinstance(found, Mine):
            await complete(self, key, found.token, KEEP_DONE)
        return found

    async def completed(*_: object) -> bool:
        return True

    SharedStore.claim = claimed  # type: ignore[method-assign]
    SharedStore.complete = completed  # type: ignore[method-assign, assignment]


def inbox_first() -> None:
    """The inbox row is committed before the handler writes: what it then writes may be lost."""
    note = inbox._note

    async def noted(connection: AsyncConnection, key: str) -> bool:
        is_new = await note(connection, key)
        begin = "BEGIN" if connection.dialect.name == "postgresql" else "BEGIN IMMEDIATE"
        for statement in ("COMMIT", begin):
            await connection.exec_driver_sql(statement)
        return is_new

    inbox._note = noted


def inbox_last() -> None:
    """The handler's writes are committed before the inbox row: a second run does not know of them."""
    open_unit = inbox.open_unit

    async def known(connection: AsyncConnection, key: str) -> bool:
        return await connection.scalar(select(INBOX.c.key).where(INBOX.c.key == digest(key))) is None

    @asynccontextmanager
    async def opened(state: object, key: str, **options: Any) -> AsyncIterator[Unit]:
        async def write_inbox(engine: AsyncEngine) -> None:
            async with engine.begin() as connection:
                await connection.execute(insert(INBOX).values(key=digest(key)))

        async with open_unit(state, key, check=options["check"], committed=write_inbox) as unit:
            yield unit

    inbox._note = known
    inbox.open_unit = opened


def publish_after_commit() -> None:
    """What a handler publishes in its transaction goes to the broker behind the commit, and not into the outbox."""
    _publish_past_the_outbox(is_early=False)


def publish_before_commit() -> None:
    """What a handler publishes in its transaction goes to the broker at once, and not into the outbox."""
    _publish_past_the_outbox(is_early=True)


def _publish_past_the_outbox(*, is_early: bool) -> None:
    open_unit = ServiceConsumer._open_unit

    @asynccontextmanager
    async def opened(self: ServiceConsumer, state: object, key: str) -> AsyncIterator[Unit]:
        send = self._environment.sender.send
        waiting: list[tuple[Envelope, timedelta | None]] = []

        async def publish(envelope: Envelope, delay: timedelta | None) -> None:
            if is_early:
                await send(envelope, delay)
            else:
                waiting.append((envelope, delay))

        async with open_unit(self, state, key) as unit:
            yield Unit(unit.session, publish)
        for envelope, delay in waiting:
            await send(envelope, delay)

    ServiceConsumer._open_unit = opened  # type: ignore[method-assign]


def mark_first() -> None:
    """Rows of the outbox are marked as published when they are read."""
    waiting = Rows.waiting

    async def marked(self: Rows, buckets: Collection[int], **options: Any) -> Sequence[Row]:
        rows = await waiting(self, buckets, **options)
        if rows:
            await self.mark(published=[row.id for row in rows], failed=(), set_aside={})
        return rows

    Rows.waiting = marked  # type: ignore[method-assign]


ALL: Mapping[str, Callable[[], None]] = {
    "ack-first": ack_first,
    "done-first": done_first,
    "inbox-first": inbox_first,
    "inbox-last": inbox_last,
    "mark-first": mark_first,
    "publish-after-commit": publish_after_commit,
    "publish-before-commit": publish_before_commit,
}
