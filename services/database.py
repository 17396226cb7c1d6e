"""How each service opens its own SQLite file. Nothing here knows a table.

On the bus's own engine: one connection per process, one transaction at a time, and an immediate one.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path

from sqlalchemy import Dialect, String
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase
from sqlalchemy.types import TypeDecorator

from eventbus.database import open_engine


class Sessions:
    """Sessions on one database, each in its turn: first come, first served.

    The pool alone is not fair: it gives a connection that comes free to whoever asks next, and sends the one who waited
    for it to the end of the line. An event would be overtaken by others that came long after it.
    """

    def __init__(self, sessions: async_sessionmaker[AsyncSession]) -> None:
        self._sessions = sessions
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def __call__(self) -> AsyncIterator[AsyncSession]:
        """A session to read with."""
        async with self._turn, self._sessions() as session:
            yield session

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncSession]:
        """A session whose changes are kept when the block ends well. Open no other one inside: it waits for ever."""
        async with self._turn, self._sessions.begin() as session:
            yield session


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
    engine = open_engine(f"sqlite:///{file}")
    try:
        async with engine.begin() as connection:
            await connection.run_sync(tables.metadata.create_all)
        yield Sessions(async_sessionmaker(engine, expire_on_commit=False))
    finally:
        await engine.dispose()
