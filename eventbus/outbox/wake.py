"""Being told of new rows: PostgreSQL's LISTEN, on a connection of its own. Whoever misses a word still polls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from sqlalchemy.ext.asyncio import AsyncEngine

from eventbus.outbox.sql import CHANNEL


@asynccontextmanager
async def listening(engine: AsyncEngine, wake: Callable[[], None]) -> AsyncIterator[asyncio.Event]:
    """Call *wake* for each commit that wrote to the outbox; gives an event that is set when the connection is lost.

    Raises:
        SQLAlchemyError, OSError: it cannot be listened now.
    """
    lost = asyncio.Event()
    async with engine.connect() as connection:
        raw = await connection.get_raw_connection()
        driver: Any = raw.driver_connection  # asyncpg's
        raw.detach()  # it is held for long, and the pool has others to serve
        try:
            driver.add_termination_listener(lambda *_: lost.set())
            await driver.add_listener(CHANNEL, lambda *_: wake())
            yield lost
        except (asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise OSError(f"LISTEN was refused: {type(error).__name__}") from error
        finally:
            driver.terminate()  # at once: whoever leaves is mostly being cancelled
