"""How each service opens its own database: SQLite, or PostgreSQL. Nothing here knows a table.

The engine is the service's own, opened as the bus opens its own. Tables are made by `services.tables`, never here.
"""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal

from sqlalchemy import Dialect, String, func, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.types import TypeDecorator

from eventbus import SetupError
from eventbus.database import check, open_engine
from eventbus.outbox import Relay
from services.settings import Settings


@dataclass(frozen=True, slots=True)
class Database:
    """A service's database. `context.transaction()` finds the engine here, and a worker's `/ready` the relay."""

    engine: AsyncEngine
    relay: Relay | None = None

    def session(self) -> AsyncSession:
        """A session to read with."""
        return AsyncSession(self.engine, expire_on_commit=False)

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncSession]:
        """A session whose changes are kept when the block ends well. On SQLite, open no other one inside."""
        async with self.session() as session, session.begin():
            yield session


@asynccontextmanager
async def open_database(settings: Settings, service: str, *, has_outbox: bool = False) -> AsyncIterator[Database]:
    """The database of *service*; if it has an outbox, with a relay that publishes what is committed to it.

    The relay is embedded since it has no other reader than the service has, wakes by the service's own commits, and is
    one process less for each service to run and to watch. `SHOP_RELAY=0` leaves it to `eventbus relay`.

    Raises:
        SetupError: the tables are not there. StoreError, TransportError: the database, or the broker, does not answer.
    """
    async with AsyncExitStack() as stack:
        engine = open_engine(settings.database_of(service))
        stack.push_async_callback(engine.dispose)
        try:
            await check(engine)
        except SetupError as error:
            raise SetupError(f"{error}; or these and the shop's with `python -m services.tables {service}`") from error
        embedded = has_outbox and settings.relay
        yield Database(engine, await stack.enter_async_context(Relay(engine)) if embedded else None)


async def alone(session: AsyncSession, *names: object) -> None:
    """Wait until no other transaction is at work on *names*; then they are this one's until it ends.

    PostgreSQL runs transactions side by side, and two of them that look for the same row and find none would both write
    it. SQLite runs one at a time. Several names in the same order everywhere, or two transactions wait for each other.
    """
    if session.get_bind().dialect.name == "postgresql":
        for name in names:
            await session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(str(name), 0))))


class Exact(TypeDecorator[Decimal]):
    """A decimal as text: SQLite has no exact number with a fraction."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: Decimal | None, dialect: Dialect) -> str | None:
        return None if value is None else str(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Decimal | None:
        return None if value is None else Decimal(value)
