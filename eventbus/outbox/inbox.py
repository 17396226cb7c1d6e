"""The transactional inbox: a handler's writes, the row that says it was done, and its events, in one transaction.

The inbox row is written first. On PostgreSQL a second run of the same work waits there until the first has ended; on
SQLite it waits for the file.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from weakref import WeakSet

from sqlalchemy import Engine
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

from eventbus.context import AlreadyDone, Unit
from eventbus.database import INBOX, check_version, error_of
from eventbus.envelope import Envelope
from eventbus.errors import SetupError
from eventbus.idempotency.base import digest
from eventbus.outbox.sql import write

# As long as the idempotency store remembers; a relay forgets them in the background.
KEEP_INBOX = timedelta(days=7)
# Whose tables are of this version: that is not asked for each event.
_CHECKED: WeakSet[Engine] = WeakSet()


@asynccontextmanager
async def open_unit(
    state: object,
    key: str,
    *,
    check: Callable[[Envelope], None],
    committed: Callable[[AsyncEngine], Awaitable[None]] | None = None,
) -> AsyncIterator[Unit]:
    """A transaction on the engine that *state* is or has, with *key* in the inbox.

    *check* raises EnvelopeError for what no broker would take; *committed* is called after the commit.

    Raises:
        AlreadyDone: the inbox knows *key*.
        SetupError: no engine, or no tables of this version. StoreError: the database did not answer.
    """
    engine = _engine_of(state)
    async with AsyncSession(engine, expire_on_commit=False) as session, session.begin():
        try:
            connection = await session.connection()
            if engine.sync_engine not in _CHECKED:
                await check_version(connection)
                _CHECKED.add(engine.sync_engine)
            is_new = await _note(connection, key)
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            raise error_of(error, engine) from error
        if not is_new:
            raise AlreadyDone

        async def publish(envelope: Envelope, delay: timedelta | None) -> None:
            check(envelope)
            await write(connection, envelope, delay)

        yield Unit(session, publish)
    if committed is not None:
        await committed(engine)


async def _note(connection: AsyncConnection, key: str) -> bool:
    """Write the inbox row; False if it is there already."""
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    done = await connection.execute(insert(INBOX).values(key=digest(key)).on_conflict_do_nothing())
    return done.rowcount == 1


def _engine_of(state: object) -> AsyncEngine:
    engine = state if isinstance(state, AsyncEngine) else getattr(state, "engine", None)
    if not isinstance(engine, AsyncEngine):
        raise SetupError(
            f"context.transaction() needs a database, and context.state is {type(state).__name__}: let the service's "
            "lifespan yield an SQLAlchemy AsyncEngine, or something that has it as .engine"
        )
    return engine
