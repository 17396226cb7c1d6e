"""The outbox's table: `Outbox` writes rows in your transaction, `Rows` is what a relay reads and marks.

The one rule: a row is written in the caller's transaction and nowhere else, and it is marked only by the relay that
holds its bucket. Whoever writes rows without this library needs nothing from here: the README documents the table.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import (
    ARRAY,
    Column,
    ColumnElement,
    Delete,
    Select,
    Table,
    Text,
    Update,
    and_,
    any_,
    case,
    cast,
    delete,
    func,
    insert,
    literal,
    not_,
    or_,
    select,
    type_coerce,
    update,
)
from sqlalchemy.exc import StatementError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.types import NullType

from eventbus.bus import check_type, enclosed, source_of_this_program
from eventbus.database import INBOX, LEASES, ONLY_READS, OUTBOX, error_of, now_ms
from eventbus.delay import way
from eventbus.envelope import Envelope, check_source, headers_of
from eventbus.errors import SetupError
from eventbus.event import Event
from eventbus.outbox.base import Lag, Row, values_of
from eventbus.settings import Settings
from eventbus.telemetry import inject

CHANNEL = "eventbus_outbox"  # PostgreSQL's NOTIFY wakes the relays through it
# What one read may hold in memory: rows of a broker's largest size, a few at a time.
MOST_BYTES = 16 * 1024 * 1024
# A delete of more at once would hold its locks, and the disk, for long.
MOST_DELETED = 1000
LEASE_PREFIX = "outbox/"

_WAITS = and_(OUTBOX.c.published_ms.is_(None), OUTBOX.c.error.is_(None))


# ── writing ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Outbox:
    """Publishes into your own transaction: what you commit leaves, what you roll back never was.

    Events come from *source*, EVENTBUS_SOURCE or the program's name, as a `Bus` has it. A `Relay` publishes them.
    """

    def __init__(self, *, source: str | None = None) -> None:
        self._source = source
        if source is not None:
            check_source(source)

    async def publish(
        self,
        session: AsyncSession | AsyncConnection,
        event: Event | Envelope,
        *,
        id: str | None = None,
        subject: str | None = None,
        delay: timedelta | None = None,
        extensions: Mapping[str, str | int | bool] | None = None,
    ) -> Envelope:
        """Write *event* into the transaction of *session* and return its envelope; it leaves after the commit.

        Events of one *subject* leave in the order in which they were written (of one `partitionkey`, where
        *extensions* have that), events without one in any. *delay* counts from now.

        Raises:
            EnvelopeError: it does not serialise, or can never be sent; nothing was written.
            ValueError: a delay that is negative or too long.
            SetupError: no tables, or writing to them is not allowed. Or what the driver raises: nothing was written.
        """
        if self._source is None:
            source = Settings.load().source or source_of_this_program()
            check_source(source)
            self._source = source
        envelope = enclosed(event, self._source, id=id, subject=subject, extensions=extensions)
        connection = session if isinstance(session, AsyncConnection) else await session.connection()
        await write(connection, envelope, delay)
        return envelope


async def write(connection: AsyncConnection, envelope: Envelope, delay: timedelta | None) -> None:
    """Write the row of *envelope* in the transaction of *connection*.

    Raises:
        EnvelopeError, ValueError: it could never be published. SetupError: no tables, or writing is not allowed.
    """
    check_type(envelope.type)
    headers_of(envelope)
    due_ms: ColumnElement[int] | None = None
    if delay is not None:
        way(delay, f"publish.{envelope.type}")
        due_ms = now_ms() + -(-delay // timedelta(milliseconds=1)) + 1  # rounded up: never early
    trace: dict[str, object] = {}
    inject(trace)
    carried = {name: str(value) for name, value in trace.items()}
    statement = insert(OUTBOX).values(values_of(envelope, due_ms=due_ms, trace=carried))
    try:
        if connection.dialect.name == "postgresql":
            # In the same round trip; it is sent with the commit, and once for all rows of a transaction.
            await connection.execute(statement.returning(func.pg_notify(CHANNEL, "")))
        else:
            await connection.execute(statement.inline())
    except StatementError as error:
        error.hide_parameters = True  # they are the event's data, and this may end up in a log
        if isinstance(meant := error_of(error, connection.engine), SetupError):
            raise meant from error
        raise  # a deadlock, a lost connection: the caller knows it from its own statements


# ── reading and marking ───────────────────────────────────────────────────────────────────────────────────────────────


class Rows:
    """The rows as a relay called *holder* sees them. Every method may raise what the driver raises."""

    def __init__(self, engine: AsyncEngine, holder: str, *, longest_bytes: int) -> None:
        """Of a row with more than *longest_bytes* the data is not read: no broker would take it."""
        self._engine = engine
        self._reading = engine.execution_options(**{ONLY_READS: True})
        self._holder = holder
        self._longest_bytes = longest_bytes
        self._has_arrays = engine.dialect.name == "postgresql"

    async def waiting(
        self, buckets: Collection[int], *, limit: int, without_ids: Collection[int], without_keys: Collection[str]
    ) -> Sequence[Row]:
        """The oldest rows of *buckets* that wait, in the order of their ids."""
        statement = self._waiting(buckets, limit, without_ids, without_keys)
        async with self._reading.connect() as connection:
            found = (await connection.execute(statement)).mappings().all()
        return [_row(values) for values in found]

    def _waiting(
        self, buckets: Collection[int], limit: int, without_ids: Collection[int], without_keys: Collection[str]
    ) -> Select[Any]:
        conditions = [_WAITS, self._is_in(OUTBOX.c.bucket, buckets)]
        if without_ids:
            conditions.append(not_(self._is_in(OUTBOX.c.id, without_ids)))
        if without_keys:
            is_free = not_(self._is_in(OUTBOX.c.ordering_key, without_keys))
            conditions.append(or_(OUTBOX.c.ordering_key.is_(None), is_free))
        size = func.length(OUTBOX.c.data)
        # As the driver gives it: what somebody wrote by hand need not be bytes.
        data = type_coerce(case((size <= self._longest_bytes, OUTBOX.c.data)), NullType()).label("data")
        others = [column for column in OUTBOX.c if column.name != "data"]
        oldest = (
            select(*others, data, size.label("size"), now_ms().label("now_ms"))
            .where(*conditions)
            .order_by(OUTBOX.c.id)
            .limit(limit)
            .subquery()
        )
        loaded = func.coalesce(func.length(oldest.c.data), 0)
        counted = select(oldest, (func.sum(loaded).over(order_by=oldest.c.id) - loaded).label("before")).subquery()
        return select(counted).where(counted.c.before < MOST_BYTES).order_by(counted.c.id)

    async def mark(self, *, published: Collection[int], failed: Collection[int], set_aside: Mapping[int, str]) -> int:
        """Write down what became of rows: one transaction. How many were marked; not those of lost buckets."""
        mine = and_(
            OUTBOX.c.published_ms.is_(None),
            (literal(LEASE_PREFIX) + cast(OUTBOX.c.bucket, Text)).in_(
                select(LEASES.c.name).where(LEASES.c.holder == self._holder)
            ),
        )
        marked = 0
        async with self._engine.begin() as connection:
            if published:
                is_one = self._is_in(OUTBOX.c.id, published)
                marked += await self._run(connection, update(OUTBOX).where(is_one, mine).values(published_ms=now_ms()))
            if failed:
                is_one = self._is_in(OUTBOX.c.id, failed)
                more = OUTBOX.c.attempts + 1
                marked += await self._run(connection, update(OUTBOX).where(is_one, mine).values(attempts=more))
            for row_id, error in set_aside.items():
                is_one = OUTBOX.c.id == row_id
                marked += await self._run(connection, update(OUTBOX).where(is_one, mine).values(error=error))
        return marked

    async def lag(self) -> Lag:
        """How far behind everybody together is."""
        waiting = select(func.count(), func.min(OUTBOX.c.created_ms), now_ms()).where(_WAITS)
        aside = select(func.count()).where(OUTBOX.c.error.is_not(None))
        async with self._reading.connect() as connection:
            rows, oldest_ms, at_ms = (await connection.execute(waiting)).one()
            set_aside = (await connection.execute(aside)).scalar_one()
        age_ms = at_ms - oldest_ms if isinstance(oldest_ms, int) else 0
        return Lag(rows, timedelta(milliseconds=max(0, age_ms)), set_aside)

    async def delete_published(self, older_than: timedelta) -> int:
        """Delete some rows that were published before; how many, at most `MOST_DELETED`."""
        return await self._delete_some(OUTBOX, OUTBOX.c.id, OUTBOX.c.published_ms, older_than)

    async def delete_inbox(self, older_than: timedelta) -> int:
        """Forget some of what was handled before; how many keys, at most `MOST_DELETED`."""
        return await self._delete_some(INBOX, INBOX.c.key, INBOX.c.done_ms, older_than)

    async def _delete_some(self, table: Table, id: Column[Any], ended_ms: Column[Any], older_than: timedelta) -> int:
        old = ended_ms < now_ms() - older_than // timedelta(milliseconds=1)
        # Another relay may be at it: then these are its rows. (SQLite has one writer at a time, and knows no locks.)
        some = select(id).where(old).limit(MOST_DELETED).with_for_update(skip_locked=True)
        async with self._engine.begin() as connection:
            return await self._run(connection, delete(table).where(id.in_(some)))

    @staticmethod
    async def _run(connection: AsyncConnection, statement: Update | Delete) -> int:
        return (await connection.execute(statement)).rowcount

    def _is_in(self, column: Column[Any], values: Collection[Any]) -> ColumnElement[bool]:
        """One parameter for all of *values* where the database has arrays: one statement for any number of them."""
        if not self._has_arrays:
            return column.in_(list(values))
        return column == any_(literal(list(values), ARRAY(column.type)))


def _row(values: Mapping[str, Any]) -> Row:
    attempts = values["attempts"]  # SQLite takes anything for a number
    return Row(
        id=values["id"],
        bucket=values["bucket"],
        key=values["ordering_key"],
        attempts=attempts if isinstance(attempts, int) else 0,
        size=values["size"],
        values=values,
    )


# ── mending ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class SetAside:
    """A row that could not be published, for people."""

    id: int
    event_id: str
    type: str
    error: str


async def set_aside(engine: AsyncEngine, *, limit: int) -> Sequence[SetAside]:
    """The oldest rows that were set aside."""
    o = OUTBOX.c
    statement = select(o.id, o.event_id, o.type, o.error).where(o.error.is_not(None)).order_by(o.id).limit(limit)
    async with engine.connect() as connection:
        return [SetAside(*row) for row in await connection.execute(statement)]


async def try_again(engine: AsyncEngine, ids: Collection[int] | None = None) -> int:
    """Let the relays try rows again that were set aside, all of them or those of *ids*; how many there were."""
    conditions = [OUTBOX.c.error.is_not(None), *([] if ids is None else [OUTBOX.c.id.in_(list(ids))])]
    async with engine.begin() as connection:
        done = await connection.execute(update(OUTBOX).where(*conditions).values(error=None, attempts=0))
        if engine.dialect.name == "postgresql":
            await connection.execute(select(func.pg_notify(CHANNEL, "")))
    return done.rowcount
