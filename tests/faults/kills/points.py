"""The steps at which a program can be killed, by name. They live here and not in the bus: it pays nothing for them.

`arm` puts itself before or behind one function, in the program that is to die, and SIGKILLs the process when that is
reached for the n-th time.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.pool import Pool

from eventbus.bus import Sender
from eventbus.consumer import ServiceConsumer
from eventbus.delivery import Handled, Outcome
from eventbus.envelope import Envelope
from eventbus.idempotency.base import Claim, Mine
from eventbus.idempotency.shared import SharedStore
from eventbus.outbox.base import Row
from eventbus.outbox.sql import Rows
from eventbus.topology import Names
from eventbus.transport.rabbitmq.acks import Settlement
from eventbus.transport.rabbitmq.delivery import RabbitDelivery
from eventbus.transport.rabbitmq.lane import Encoded, LaneConsuming, LanePublishing

Reach = Callable[[], None]  # called whenever the step is reached; the n-th time it does not return

# ── the idempotency key ───────────────────────────────────────────────────────────────────────────────────────────────


def _before_claim(reach: Reach) -> None:
    claim = SharedStore.claim

    async def wrapped(self: SharedStore, key: str, lease: timedelta) -> Claim:
        reach()
        return await claim(self, key, lease)

    SharedStore.claim = wrapped  # type: ignore[method-assign]


def _after_claim(reach: Reach) -> None:
    claim = SharedStore.claim

    async def wrapped(self: SharedStore, key: str, lease: timedelta) -> Claim:
        claimed = await claim(self, key, lease)
        if isinstance(claimed, Mine):
            reach()
        return claimed

    SharedStore.claim = wrapped  # type: ignore[method-assign]


def _before_done(reach: Reach) -> None:
    complete = SharedStore.complete

    async def wrapped(self: SharedStore, key: str, token: str, keep: timedelta) -> bool:
        reach()
        return await complete(self, key, token, keep)

    SharedStore.complete = wrapped  # type: ignore[method-assign]


def _after_done(reach: Reach) -> None:
    complete = SharedStore.complete

    async def wrapped(self: SharedStore, key: str, token: str, keep: timedelta) -> bool:
        completed = await complete(self, key, token, keep)
        reach()
        return completed

    SharedStore.complete = wrapped  # type: ignore[method-assign]


# ── the handler ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _before_handler(reach: Reach) -> None:
    handled = ServiceConsumer._handled

    async def wrapped(self: ServiceConsumer, run: Any) -> Outcome:
        reach()
        return await handled(self, run)

    ServiceConsumer._handled = wrapped  # type: ignore[method-assign]


def _after_handler(reach: Reach) -> None:
    handled = ServiceConsumer._handled

    async def wrapped(self: ServiceConsumer, run: Any) -> Outcome:
        outcome = await handled(self, run)
        if isinstance(outcome, Handled):
            reach()
        return outcome

    ServiceConsumer._handled = wrapped  # type: ignore[method-assign]


# ── its transaction ───────────────────────────────────────────────────────────────────────────────────────────────────
# As the database's driver sees it, so that it holds whoever begins and commits: a handler's inbox, or an API.


def _after_begin(reach: Reach) -> None:
    _after_insert("eventbus_inbox", reach)


def _after_write(reach: Reach) -> None:
    _after_insert("eventbus_outbox", reach)


def _after_insert(table: str, reach: Reach) -> None:
    @event.listens_for(Engine, "after_cursor_execute")
    def executed(_c: Connection, _k: object, statement: str, *_: object) -> None:
        if statement.startswith(f"INSERT INTO {table} "):
            reach()


_TELLS = "tests.kills.tells"  # on a connection: its transaction tells of something, or has been in the inbox
_COMMITS = "tests.kills.commits"


def _before_commit(reach: Reach) -> None:
    def reached(_: Connection) -> None:
        reach()

    _listen_for_commits(reached)


def _after_commit(reach: Reach) -> None:
    def commits(connection: Connection) -> None:
        connection.info[_COMMITS] = True

    @event.listens_for(Pool, "reset")
    def given_back(_c: object, record: Any, _s: object) -> None:
        if record is not None and record.info.pop(_COMMITS, False):
            reach()

    _listen_for_commits(commits)


def _listen_for_commits(commits: Callable[[Connection], None]) -> None:
    """*commits* is told of each transaction with a row for the inbox or the outbox, right before its COMMIT."""

    @event.listens_for(Engine, "after_cursor_execute")
    def executed(connection: Connection, _k: object, statement: str, *_: object) -> None:
        if statement.startswith(("INSERT INTO eventbus_inbox ", "INSERT INTO eventbus_outbox ")):
            connection.info[_TELLS] = True

    @event.listens_for(Engine, "rollback")
    def rolled_back(connection: Connection) -> None:
        connection.info.pop(_TELLS, None)

    @event.listens_for(Engine, "commit")
    def committing(connection: Connection) -> None:
        if connection.info.pop(_TELLS, False):
            commits(connection)


# ── publishing: a handler's, and a relay's ────────────────────────────────────────────────────────────────────────────


def _before_publish(reach: Reach) -> None:
    send = Sender.send

    async def wrapped(
        self: Sender, envelope: Envelope, delay: timedelta | None = None, *, require_subscriber: bool = False
    ) -> None:
        reach()
        await send(self, envelope, delay, require_subscriber=require_subscriber)

    Sender.send = wrapped  # type: ignore[method-assign]


def _before_confirm(reach: Reach) -> None:
    publish = LanePublishing.publish

    async def wrapped(self: LanePublishing, encoded: Encoded, deadline_s: float) -> bool:
        publishing = asyncio.ensure_future(publish(self, encoded, deadline_s))
        await asyncio.sleep(0)
        if encoded.exchange == Names().events:  # no copy for a retry, and no probe
            self._splitter.flush()  # the operating system has it, and hands it over although we die
            reach()
        return await publishing

    LanePublishing.publish = wrapped  # type: ignore[assignment, method-assign]


def _after_confirm(reach: Reach) -> None:
    send = Sender.send

    async def wrapped(
        self: Sender, envelope: Envelope, delay: timedelta | None = None, *, require_subscriber: bool = False
    ) -> None:
        await send(self, envelope, delay, require_subscriber=require_subscriber)
        reach()

    Sender.send = wrapped  # type: ignore[method-assign]


# ── the relay ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _after_pick(reach: Reach) -> None:
    waiting = Rows.waiting

    async def wrapped(
        self: Rows,
        buckets: Collection[int],
        *,
        limit: int,
        without_ids: Collection[int],
        without_keys: Collection[str],
    ) -> Sequence[Row]:
        rows = await waiting(self, buckets, limit=limit, without_ids=without_ids, without_keys=without_keys)
        if rows:
            reach()
        return rows

    Rows.waiting = wrapped  # type: ignore[method-assign]


def _before_mark(reach: Reach) -> None:
    mark = Rows.mark

    async def wrapped(
        self: Rows, *, published: Collection[int], failed: Collection[int], set_aside: Mapping[int, str]
    ) -> int:
        if published:
            reach()
        return await mark(self, published=published, failed=failed, set_aside=set_aside)

    Rows.mark = wrapped  # type: ignore[method-assign]


def _after_mark(reach: Reach) -> None:
    mark = Rows.mark

    async def wrapped(
        self: Rows, *, published: Collection[int], failed: Collection[int], set_aside: Mapping[int, str]
    ) -> int:
        marked = await mark(self, published=published, failed=failed, set_aside=set_aside)
        if published:
            reach()
        return marked

    Rows.mark = wrapped  # type: ignore[method-assign]


# ── the broker is told ────────────────────────────────────────────────────────────────────────────────────────────────


def _before_ack(reach: Reach) -> None:
    ack = RabbitDelivery.ack

    def wrapped(self: RabbitDelivery) -> None:
        reach()
        ack(self)

    RabbitDelivery.ack = wrapped  # type: ignore[method-assign]


def _after_ack(reach: Reach) -> None:
    settle = LaneConsuming.settle

    async def wrapped(self: LaneConsuming, batch: Sequence[Settlement]) -> None:
        await settle(self, batch)
        if batch:
            self._splitter.flush()
            reach()

    LaneConsuming.settle = wrapped  # type: ignore[method-assign]


# ── by name ───────────────────────────────────────────────────────────────────────────────────────────────────────────

POINTS: Mapping[str, Callable[[Reach], None]] = {
    "before-claim": _before_claim,
    "after-claim": _after_claim,
    "before-handler": _before_handler,
    "after-begin": _after_begin,
    "after-write": _after_write,
    "before-commit": _before_commit,
    "after-commit": _after_commit,
    "after-handler": _after_handler,
    "before-done": _before_done,
    "after-done": _after_done,
    "before-ack": _before_ack,
    "after-ack": _after_ack,
    "before-publish": _before_publish,
    "before-confirm": _before_confirm,
    "after-confirm": _after_confirm,
    "after-pick": _after_pick,
    "before-mark": _before_mark,
    "after-mark": _after_mark,
}

# Both ways of working go through these.
_CLAIMED = ("before-claim", "after-claim", "before-handler", "after-handler", "before-done", "after-done")
_DELIVERY = (*_CLAIMED, "before-ack", "after-ack")
_PUBLISH = ("before-publish", "before-confirm", "after-confirm")
_TRANSACTION = ("after-write", "before-commit", "after-commit")
_RELAY = ("after-pick", *_PUBLISH, "before-mark", "after-mark")

# Who handles by a key alone, and publishes by itself.
BY_KEY = (*_DELIVERY, *_PUBLISH)
# Who handles in a transaction with the inbox; with the relay that publishes what was committed.
BY_INBOX = (*_DELIVERY, "after-begin", *_TRANSACTION, *_RELAY)
# Who writes and tells in one transaction, and handles nothing.
BY_OUTBOX = (*_TRANSACTION, *_RELAY)
# Reached once for many orders at a time.
OF_MANY = ("after-pick", "before-mark", "after-mark", "after-ack")


@dataclass(frozen=True, slots=True)
class Aim:
    """Where a program is to die: when it comes to *point* for the *nth* time."""

    point: str
    nth: int = 1


def arm(name: str, nth: int, killed: Path) -> None:
    """SIGKILL this process when the step *name* is reached for the *nth* time; the file *killed* tells that it was."""
    reached = 0

    def reach() -> None:
        nonlocal reached
        reached += 1
        if reached == nth:
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    POINTS[name](reach)
