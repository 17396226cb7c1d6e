"""The relay: publishes what was committed to the outbox, in order per key, and marks what the broker has confirmed.

Published, then marked: a relay that dies in between publishes a row again, under the same event id. Nothing is taken
out of the table but by its age. Several relays share the buckets (`leases`), what they read flows side by side
(`flow`), and the database's troubles are waited out: nothing here ends by itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Self, TypeVar
from uuid import uuid4

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from eventbus import database, garbage
from eventbus.bus import Sender, open_or_close
from eventbus.errors import EnvelopeError, SetupError
from eventbus.outbox.base import BUCKETS, Lag, Row, delay_left, envelope_of, trace_of
from eventbus.outbox.flow import Ended, Flow
from eventbus.outbox.inbox import KEEP_INBOX
from eventbus.outbox.leases import Leases
from eventbus.outbox.sql import MOST_DELETED, Rows
from eventbus.outbox.wake import listening
from eventbus.settings import Settings
from eventbus.telemetry import within
from eventbus.topology import Names
from eventbus.transport import from_url

log = logging.getLogger("eventbus.outbox")
T = TypeVar("T")

DEFAULT_KEEP = timedelta(days=1)
# Rows that are read at a time, and that are on their way: enough to hide the round trips to the database and back.
BATCH = 500
WINDOW = 4 * BATCH
# PostgreSQL tells of new rows, and is asked besides; SQLite has to be asked, which is a matter of 100 µs there.
POLL_TOLD_S = 0.5
POLL_S = 0.02
LOOK_S = 2.0  # how often leases begin anew: several times in each
MEASURE_S = 5.0
SWEEP_S = 60.0
AGAIN_S = 1.0  # after the database did not answer
ANSWER_S = 30.0  # a database that is silent for longer does not answer
GRACE_S = 10.0  # for what is on its way when the relay is left
CANCEL_AGAIN_S = 1.0  # what goes on although it was cancelled
# Readiness is red when a row has waited for longer.
LATE = timedelta(minutes=1)


class _Away(Exception):
    """The database did not answer; it is known and told."""


class Relay:
    """Publishes what was committed to the outbox in *engine*'s database; an async context manager.

    *url* and *namespace* are the bus's, EVENTBUS_URL and EVENTBUS_NAMESPACE by default. Published rows are deleted when
    they are older than *keep*, the inbox's after seven days. As many relays as you like share the work.
    Of one that a service's lifespan yields as `.relay`, the worker's readiness tells the problems.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        *,
        url: str | None = None,
        namespace: str | None = None,
        keep: timedelta = DEFAULT_KEEP,
    ) -> None:
        if not isinstance(engine, AsyncEngine):
            raise SetupError(f"{type(engine).__name__} is no AsyncEngine: use eventbus.database.open_engine(url)")
        if keep < timedelta(0):
            raise SetupError(f"keep={keep} must be zero or more")
        self._engine, self._url, self._namespace, self._keep = engine, url, namespace, keep
        self._holder = uuid4().hex
        self._wake = asyncio.Event()
        self._asked_to_stop = asyncio.Event()
        self._running: asyncio.Task[None] | None = None
        self._trouble: str | None = None
        self._lag: Lag | None = None

    async def __aenter__(self) -> Self:
        """Check the tables, connect to the broker within 15 s, and begin.

        Raises:
            SetupError: no tables, or what the broker will never allow.
            StoreError: the database did not answer. TransportError: no broker did.
        """
        if self._running is not None:
            raise SetupError("this relay has run already: make a new one")
        await database.check(self._engine)
        settings = Settings.load()
        names = Names(self._namespace or settings.namespace)
        transport = from_url(
            self._url or settings.url, max_message_bytes=settings.max_message_bytes, has_lane=settings.has_lane
        )
        await open_or_close(transport, names, settings)
        self._sender = Sender(transport, names)
        self._rows = Rows(self._engine, self._holder, longest_bytes=self._sender.longest_bytes)
        self._leases = Leases(self._engine, self._holder, lambda bucket: self._flow.is_idle(bucket))
        self._flow = Flow(lambda row: _send(row, self._sender), self._leases.generation)
        self._running = asyncio.get_running_loop().create_task(self._run(), name="eventbus relay")
        return self

    async def __aexit__(self, t: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()
        await self.wait()

    def stop(self) -> None:
        """Read nothing more, and end once what is on its way is confirmed and marked, after ten seconds at most."""
        self._asked_to_stop.set()

    async def wait(self) -> None:
        """Return when the relay has stopped."""
        if self._running is None:
            raise SetupError("the relay is not running: use it inside `async with Relay(...) as relay:`")
        await asyncio.shield(self._running)  # whoever waits may give up, the relay still ends in order

    @property
    def is_running(self) -> bool:
        """Whether it was entered and has not ended."""
        return self._running is not None and not self._running.done()

    @property
    def broker(self) -> str:
        """Who publishes, for people."""
        broker = self._sender.transport.broker
        where = broker.host if broker.port is None else f"{broker.host}:{broker.port}"
        return f"{broker.product} {broker.version} at {where}"

    @property
    def lag(self) -> Lag | None:
        """How far all relays are behind, as it was a few seconds ago; None before it was first asked."""
        return self._lag

    def problems(self) -> list[str]:
        """What keeps the outbox from being published, a line each; none if it is ready. Never waits."""
        if self._running is None:
            return ["starting: no broker has answered yet"]
        if self._asked_to_stop.is_set():
            return ["stopping: no more rows are read"]
        if self._running.done():
            return ["the relay has ended: the log says why"]
        if self._trouble is not None:
            return [f"outbox: {self._trouble}"]
        obstacle = self._sender.transport.obstacle()
        found = [] if obstacle is None else [f"publishing: {obstacle}"]
        if self._lag is None:
            return [*found, "starting: the outbox was not measured yet"]
        if self._lag.oldest > LATE:
            waits_s = self._lag.oldest.total_seconds()
            found.append(f"outbox: {self._lag.rows} rows wait, the oldest for {waits_s:.0f} s")
        return found

    def probes(self) -> dict[str, Callable[[], Awaitable[str | None]]]:
        """What only asking tells, by what it is about."""
        return {"publishing": self._sender.probe} if self.is_running else {}

    # ── from the start to the end ───────────────────────────────────────────────────────────────────────────────────

    async def _run(self) -> None:
        try:
            with garbage.rarely():
                await self._relay()
        except Exception:
            log.exception("the relay ends: a bug of its own")  # whoever waits for it learns it, too, but later
            raise
        finally:
            await self._flow.end()
            with suppress(_Away):
                await self._ask(self._leases.end())
            await self._sender.transport.close()

    async def _relay(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            loops = (self._keep_leases, self._keep_marking, self._measure, self._sweep, self._listen)
            others = [tasks.create_task(loop()) for loop in loops]
            feeding = tasks.create_task(self._feed())
            await self._asked_to_stop.wait()
            await _end(feeding)
            with suppress(TimeoutError):
                async with asyncio.timeout(GRACE_S):
                    await self._flow.is_empty.wait()
            await _end(*others)

    async def _feed(self) -> None:
        """Read rows whenever there may be some, and room for them."""
        poll_s = POLL_TOLD_S if self._engine.dialect.name == "postgresql" else POLL_S
        while True:
            self._wake.clear()
            try:
                if await self._read():
                    continue
            except _Away:
                await asyncio.sleep(AGAIN_S)
            with suppress(TimeoutError):
                # Not `wait_for`: Python 3.11's forgets that it was cancelled where what it waits for comes as well, and
                # a relay is mostly left just after rows were marked, which sets this event.
                async with asyncio.timeout(poll_s):
                    await self._wake.wait()

    async def _read(self) -> bool:
        """Take the rows that wait; whether there may be more at once."""
        buckets = self._leases.readable()
        has_room = WINDOW - self._flow.count >= BATCH
        if not buckets or not has_room or self._sender.transport.obstacle() is not None:
            return False
        rows = await self._ask(
            self._rows.waiting(
                buckets, limit=BATCH, without_ids=self._flow.busy_ids(), without_keys=self._flow.busy_keys()
            )
        )
        self._flow.take(rows)
        return len(rows) == BATCH

    # ── writing down what became of rows ────────────────────────────────────────────────────────────────────────────

    async def _keep_marking(self) -> None:
        while True:
            await self._flow.has_ended.wait()
            ended = self._flow.collect()
            self._tell(ended)
            await self._mark(ended)
            if self._flow.let_go(ended.rows()):
                self._wake.set()

    async def _mark(self, ended: Ended) -> None:
        """Mark rows, however long that takes: until then they are not read again."""
        published = [row.id for row in ended.published]
        failed = [row.id for row, _ in ended.failed]
        set_aside = {row.id: error for row, error in ended.set_aside}
        while published or failed or set_aside:
            try:
                marked = await self._ask(self._rows.mark(published=published, failed=failed, set_aside=set_aside))
            except _Away:
                await asyncio.sleep(AGAIN_S)
                continue
            if missing := len(published) + len(failed) + len(set_aside) - marked:
                log.warning("%d rows were not marked: another relay has taken them over meanwhile", missing)
            return

    def _tell(self, ended: Ended) -> None:
        for row, error in ended.set_aside:
            log.error("row %s of the outbox can never be published, it is set aside: %s", row.id, error)
        if ended.failed:
            row, why = ended.failed[0]
            log.warning("%d rows of the outbox were not confirmed and are tried again, the first is %s: %s",
                        len(ended.failed), row.id, why)  # fmt: skip

    # ── in the background ───────────────────────────────────────────────────────────────────────────────────────────

    async def _keep_leases(self) -> None:
        while True:
            before = len(self._leases.readable())
            with suppress(_Away):
                await self._ask(self._leases.look())
            if len(self._leases.readable()) > before:
                self._wake.set()
            await asyncio.sleep(LOOK_S)

    async def _measure(self) -> None:
        while True:
            with suppress(_Away):
                self._lag = await self._ask(self._rows.lag())
                self._sender.telemetry.outbox(self._lag.rows, self._lag.oldest, self._lag.set_aside)
            await asyncio.sleep(MEASURE_S)

    async def _sweep(self) -> None:
        while True:
            with suppress(_Away):
                await self._until_few(lambda: self._rows.delete_published(self._keep))
                await self._until_few(lambda: self._rows.delete_inbox(KEEP_INBOX))
            await asyncio.sleep(SWEEP_S)

    async def _until_few(self, delete: Callable[[], Awaitable[int]]) -> None:
        """Delete in batches, so that nobody waits for long behind one."""
        deleted = MOST_DELETED
        while deleted == MOST_DELETED:
            deleted = await self._ask(delete())

    async def _listen(self) -> None:
        if self._engine.dialect.name != "postgresql":
            return
        while True:
            # Whatever is wrong there: the poll finds the rows, and says what is wrong with the database.
            with suppress(SQLAlchemyError, OSError, TimeoutError):
                async with listening(self._engine, self._wake.set) as lost:
                    await lost.wait()
            await asyncio.sleep(AGAIN_S)

    async def _ask(self, asked: Awaitable[T]) -> T:
        """What the database answers; an `_Away` if it does not, which is logged when it begins and when it ends."""
        try:
            async with asyncio.timeout(ANSWER_S):
                answer = await asked
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            found = str(database.error_of(error, self._engine))
            if self._trouble is None:
                log.error("the relay waits for its database: %s", found)
            self._trouble = found
            raise _Away from error
        if self._trouble is not None:
            self._trouble = None
            log.info("the relay's database answers again")
        return answer


async def _end(*tasks: asyncio.Task[None]) -> None:
    """Cancel *tasks* until they have ended: SQLAlchemy loses a cancellation while it closes a broken connection."""
    going_on = set(tasks)
    while going_on:
        for task in going_on:
            task.cancel()
        _, going_on = await asyncio.wait(going_on, timeout=CANCEL_AGAIN_S)


async def _send(row: Row, sender: Sender) -> None:
    if row.size > sender.longest_bytes:  # its data was not read
        raise EnvelopeError(
            f"it has {row.size} bytes, and the broker takes {sender.longest_bytes}: "
            "keep large things elsewhere and send a reference"
        )
    envelope = envelope_of(row)
    with within(trace_of(row)):
        await sender.send(envelope, delay_left(row))


async def relay_now(engine: AsyncEngine, sender: Sender) -> None:
    """Publish what waits, one row after the other: what a test has instead of a relay beside it."""
    holder = uuid4().hex
    leases = Leases(engine, holder, lambda _: True)
    rows = Rows(engine, holder, longest_bytes=sender.longest_bytes)
    await leases.look()
    while waiting := await rows.waiting(range(BUCKETS), limit=BATCH, without_ids=(), without_keys=()):
        set_aside: dict[int, str] = {}
        for row in waiting:
            try:
                await _send(row, sender)
            except (EnvelopeError, ValueError) as error:
                set_aside[row.id] = str(error)
        published = [row.id for row in waiting if row.id not in set_aside]
        await rows.mark(published=published, failed=(), set_aside=set_aside)
    await leases.end()
