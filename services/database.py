"""How each service opens its own SQLite file. Nothing here knows a table.

One connection per process and an immediate transaction each time: a read followed by a write cannot lose another's
write, and a handler waits for its turn in the event loop instead of meeting a locked database.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path

from sqlalchemy import Connection, Dialect, String, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.types import TypeDecorator

Sessions = async_sessionmaker[AsyncSession]


class Exact(TypeDecorator[Decimal]):
    """A decimal as text: SQLite has no exact number with a fraction."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: Decimal | None, dialect: Dialect) -> str | None:
        return None if value is None else str(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Decimal | None:
        return None if value is None else Decimal(value)


@asynccontextmanager
async def open_database(file: Path, tables: type[DeclarativeBase]) -> AsyncIterator[Sessions]:
    """Sessions on *file*, with *tables* made where they are missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    engine = create_async_engine(f"sqlite+aiosqlite:///{file}", pool_size=1, max_overflow=0)
    event.listen(engine.sync_engine, "connect", _configure)
    event.listen(engine.sync_engine, "begin", _begin)
    try:
        async with engine.begin() as connection:
            await connection.run_sync(tables.metadata.create_all)
        yield async_sessionmaker(engine, expire_on_commit=False)
    finally:
        await engine.dispose()


def _configure(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # the driver begins nothing by itself: `_begin` does
    cursor = connection.cursor()
    cursor.execute("PRAGMA busy_timeout = 10000")  # milliseconds; another process may hold the file
    cursor.execute("PRAGMA journal_mode = WAL")  # readers of other processes never wait for the writer
    # A commit reaches the disk before its event is acknowledged; NORMAL may lose the last ones with the power.
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.close()


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")
