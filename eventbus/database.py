"""The bus's tables in a database of yours: what they are, and how to open, make and check them.

The one rule: tables are made by `create` (`eventbus store create`) and never in passing. `METADATA` is plain
SQLAlchemy, so that Alembic can look after them as well. SQLite and PostgreSQL; `pip install 'eventbus[sql]'`.
"""

from __future__ import annotations

import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import Any  # Any: what a driver takes

from eventbus.errors import SetupError, StoreError, hide_password

try:
    from sqlalchemy import (
        BigInteger,
        CheckConstraint,
        Column,
        Connection,
        Dialect,
        Index,
        Integer,
        LargeBinary,
        MetaData,
        SmallInteger,
        String,
        Table,
        Text,
        event,
        insert,
        make_url,
        select,
        text,
    )
    from sqlalchemy.dialects.postgresql import VARCHAR
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.exc import ArgumentError, DBAPIError, ProgrammingError, SQLAlchemyError
    from sqlalchemy.exc import OperationalError as CannotRun
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
    from sqlalchemy.ext.compiler import compiles
    from sqlalchemy.pool import ConnectionPoolEntry
    from sqlalchemy.sql.functions import FunctionElement
except ModuleNotFoundError as error:
    raise SetupError(f"a database needs {error.name}: pip install 'eventbus[sql]'") from error

# ── the tables ────────────────────────────────────────────────────────────────────────────────────────────────────────

# Raised with every change that an older eventbus would not get along with.
SCHEMA_VERSION = 1

METADATA = MetaData()


class now_ms(FunctionElement[int]):  # noqa: N801  # a function of SQL
    """Milliseconds since 1970, on the database's clock."""

    type = BigInteger()
    inherit_cache = True


@compiles(now_ms, "postgresql")
def _now_ms_of_postgresql(*_: object, **__: object) -> str:
    return "CAST(extract(epoch FROM clock_timestamp()) * 1000 AS BIGINT)"


@compiles(now_ms, "sqlite")
def _now_ms_of_sqlite(*_: object, **__: object) -> str:
    return "(CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER))"


def _partial_index(name: str, column: str, where: str) -> Index:
    return Index(name, column, postgresql_where=text(where), sqlite_where=text(where))


# One row.
SCHEMA = Table("eventbus_schema", METADATA, Column("version", Integer, primary_key=True, autoincrement=False))

# Idempotency keys: what has been handled, and what is being handled now.
KEYS = Table(
    "eventbus_keys",
    METADATA,
    # A digest of the key in hexadecimal: a key may be long, and made of an event's data. Compared byte by byte.
    Column("key", String(32).with_variant(VARCHAR(32, collation="C"), "postgresql"), primary_key=True),
    Column("token", String(40)),  # of the claim that holds the key; null once it is done
    # The end of the lease, or until when it is remembered as done: milliseconds since 1970, on the database's clock.
    Column("expires_ms", BigInteger, nullable=False),
    Column("crashes", Integer, nullable=False),  # claims before this one that expired without being freed
    Index("eventbus_keys_expires_ms", "expires_ms"),  # for cleaning up
)

# The transactional inbox: what has been handled, written in the transaction that handled it.
INBOX = Table(
    "eventbus_inbox",
    METADATA,
    Column("key", String(32).with_variant(VARCHAR(32, collation="C"), "postgresql"), primary_key=True),  # as above
    Column("done_ms", BigInteger, nullable=False, server_default=now_ms()),
    Index("eventbus_inbox_done_ms", "done_ms"),  # for cleaning up
)

# The outbox: events that leave once the transaction that wrote them is committed. Any program may write here; the
# README says what each column means.
OUTBOX = Table(
    "eventbus_outbox",
    METADATA,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column(
        "bucket",
        SmallInteger,
        CheckConstraint("bucket BETWEEN 0 AND 15", name="eventbus_outbox_bucket"),
        nullable=False,
        server_default="0",
    ),
    Column("ordering_key", Text),
    Column("event_id", Text, nullable=False),
    Column("source", Text, nullable=False),
    Column("type", Text, nullable=False),
    Column("time", Text),
    Column("subject", Text),
    Column("datacontenttype", Text, server_default="application/json"),
    Column("dataschema", Text),
    Column("extensions", Text, nullable=False, server_default="{}"),
    Column("traceparent", Text),
    Column("tracestate", Text),
    Column("data", LargeBinary, nullable=False),
    Column("created_ms", BigInteger, nullable=False, server_default=now_ms()),
    Column("due_ms", BigInteger),
    Column("published_ms", BigInteger),
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("error", Text),
    # Each holds only the rows that it is about: the table is mostly what has been published.
    _partial_index("eventbus_outbox_waiting", "id", "published_ms IS NULL AND error IS NULL"),
    _partial_index("eventbus_outbox_set_aside", "id", "error IS NOT NULL"),
    _partial_index("eventbus_outbox_published_ms", "published_ms", "published_ms IS NOT NULL"),
    sqlite_autoincrement=True,  # an id is not used again when the last rows are deleted
)

# Which relay reads which bucket of the outbox, and which relays there are.
LEASES = Table(
    "eventbus_leases",
    METADATA,
    Column("name", String(64).with_variant(VARCHAR(64, collation="C"), "postgresql"), primary_key=True),
    Column("holder", String(40), nullable=False),
    Column("ends_ms", BigInteger, nullable=False),
)

# ── opening ───────────────────────────────────────────────────────────────────────────────────────────────────────────

CONNECT_TIMEOUT_S = 10
# An execution option: this transaction writes nothing, and need not wait for the one that does.
ONLY_READS = "eventbus_only_reads"


def open_engine(url: str) -> AsyncEngine:
    """An engine on `sqlite:///path` or `postgresql://user:password@host/database`. Nothing is connected yet.

    On SQLite every transaction is an immediate one, and there is one at a time: a read followed by a write cannot lose
    another's write, and whoever waits does so in the event loop instead of meeting a locked database.

    Raises:
        SetupError: an URL of something else, or a driver that is not installed.
    """
    try:
        parsed = make_url(url)
        engine_of = {"sqlite": _sqlite, "postgresql": _postgresql}[parsed.drivername]
    except (ArgumentError, ValueError, KeyError):
        shown = hide_password(url)
        raise SetupError(f"{shown!r} names no database: use sqlite:///path or postgresql://user@host/name") from None
    if engine_of is _sqlite and not parsed.database:
        raise SetupError(f"{url!r} names no file: use sqlite:///path, or sqlite:////path from the root")
    try:
        return engine_of(url)
    except ModuleNotFoundError as error:
        raise SetupError(f"{parsed.drivername}:// needs {error.name}: pip install 'eventbus[sql]'") from error


def _postgresql(url: str) -> AsyncEngine:
    import asyncpg

    async def connect(*_: object, **__: object) -> asyncpg.Connection[asyncpg.Record]:
        # The URL as it is: asyncpg knows what PostgreSQL's own clients know, `sslmode` and all.
        return await asyncpg.connect(url, timeout=CONNECT_TIMEOUT_S)

    shown = make_url(url).set(drivername="postgresql+asyncpg")
    # An error shows the statement, not the data in it: it goes to logs and dead letters.
    return create_async_engine(shown, async_creator=connect, hide_parameters=True)


def _sqlite(url: str) -> AsyncEngine:
    parsed = make_url(url).set(drivername="sqlite+aiosqlite")
    options = {"factory": _SqliteConnection}
    engine = create_async_engine(parsed, pool_size=1, max_overflow=0, hide_parameters=True, connect_args=options)
    event.listen(engine.sync_engine, "do_connect", _try_sqlite)
    event.listen(engine.sync_engine, "connect", _configure_sqlite)
    event.listen(engine.sync_engine, "begin", _begin_immediate)
    return engine


class _SqliteConnection(sqlite3.Connection):
    """Ends its transaction before it is closed.

    SQLite keeps a connection, and its locks, for as long as anything holds a cursor whose rows were not all read. What
    was cancelled in the middle of a statement does, in its traceback: everybody else found the database locked.
    """

    def close(self) -> None:
        with suppress(sqlite3.ProgrammingError):  # closed already, which may be said twice
            if self.in_transaction:
                self.rollback()
        super().close()


def _try_sqlite(_: Dialect, __: object, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    # A file that cannot be opened is found out here: aiosqlite's thread would outlive the failure, meet a closed event
    # loop where the program ends for it, and print a traceback.
    sqlite3.connect(*arguments, **options).close()


def _configure_sqlite(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # the driver begins nothing by itself: `_begin_immediate` does
    cursor = connection.cursor()
    cursor.execute("PRAGMA busy_timeout = 10000")  # milliseconds; another process may hold the file
    cursor.execute("PRAGMA journal_mode = WAL")  # readers of other processes never wait for the writer
    # A commit reaches the disk before its event is acknowledged; NORMAL may lose the last ones with the power.
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.close()


def _begin_immediate(connection: Connection) -> None:
    only_reads = connection.get_execution_options().get(ONLY_READS, False)
    connection.exec_driver_sql("BEGIN" if only_reads else "BEGIN IMMEDIATE")


# ── making and checking the tables ────────────────────────────────────────────────────────────────────────────────────

# Any number: it is held by whoever makes the tables, so that two at once do not meet half-way.
_CREATING = 0x6576656E74627573


async def create(engine: AsyncEngine) -> None:
    """Make the tables that are missing; those that are there stay as they are.

    Raises:
        SetupError: the tables there are of another version, or making them is not allowed.
        StoreError: the database did not answer.
    """
    try:
        async with engine.begin() as connection:
            if engine.dialect.name == "postgresql":
                await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _CREATING})
            await connection.run_sync(METADATA.create_all)
            version = await _version(connection)
            if version is None:
                await connection.execute(insert(SCHEMA).values(version=SCHEMA_VERSION))
            elif version != SCHEMA_VERSION:
                raise _other_version(engine, version)
    except (SQLAlchemyError, OSError, TimeoutError) as error:
        raise error_of(error, engine) from error


async def check(engine: AsyncEngine) -> None:
    """See that the tables are there, as this version of eventbus needs them, and can be read.

    Raises:
        SetupError: they are not, or reading them is not allowed; it names what to do.
        StoreError: the database did not answer.
    """
    if _is_no_file_yet(engine):  # to connect would make it
        raise _no_tables(engine)
    try:
        async with engine.connect() as connection:
            await check_version(connection)
            for table in METADATA.sorted_tables:
                await connection.execute(select(table).limit(0))
    except (SQLAlchemyError, OSError, TimeoutError) as error:
        raise error_of(error, engine) from error


async def check_version(connection: AsyncConnection) -> None:
    """See that the tables are of this version. It may raise what the driver raises, too.

    Raises:
        SetupError: they are not.
    """
    version = await _version(connection)
    if version is None:
        raise _no_tables(connection.engine)
    if version != SCHEMA_VERSION:
        raise _other_version(connection.engine, version)


async def _version(connection: AsyncConnection) -> int | None:
    version: int | None = await connection.scalar(select(SCHEMA.c.version))
    return version


def _is_no_file_yet(engine: AsyncEngine) -> bool:
    return engine.dialect.name == "sqlite" and not Path(engine.url.database or "").exists()


# ── errors ────────────────────────────────────────────────────────────────────────────────────────────────────────────

# Classes of PostgreSQL's error codes that somebody has to mend: no such database, login refused, not allowed.
_SETUP_STATES = ("3D", "28", "42501")
_NO_SUCH_TABLE, _NO_SUCH_COLUMN = "42P01", "42703"


def error_of(error: Exception, engine: AsyncEngine) -> SetupError | StoreError:
    """What a driver's *error* means. Without what the driver quotes of the data."""
    if _is_of_a_missing_table(error):
        return _no_tables(engine)
    where, state = shown(engine), state_of(error)
    if state.startswith(_SETUP_STATES):
        return SetupError(f"{where}: {_what(error)}")
    return StoreError(f"{where} did not do it: {_what(error)}")


def state_of(error: BaseException) -> str:
    """PostgreSQL's five letters for *error*; empty where it has none."""
    while True:
        state = getattr(error, "sqlstate", None) or getattr(getattr(error, "orig", None), "sqlstate", None)
        if isinstance(state, str) or error.__cause__ is None:
            return state if isinstance(state, str) else ""
        error = error.__cause__


def shown(engine: AsyncEngine) -> str:
    """The engine's URL as people write it, without its password."""
    scheme = "postgresql" if engine.dialect.name == "postgresql" else "sqlite"
    return engine.url.set(drivername=scheme).render_as_string(hide_password=True)


def _what(error: Exception) -> str:
    original = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    first_line = next(iter(str(original).splitlines()), "")  # what follows quotes rows
    return f"{type(original).__name__}: {first_line}"


def _is_of_a_missing_table(error: Exception) -> bool:
    if isinstance(error, ProgrammingError):
        return state_of(error) in (_NO_SUCH_TABLE, _NO_SUCH_COLUMN)
    return isinstance(error, CannotRun) and "no such" in str(error.orig)  # SQLite has no codes for it


def _no_tables(engine: AsyncEngine) -> SetupError:
    where = shown(engine)
    return SetupError(f"{where} lacks tables of the bus: make them with `eventbus store create --url {where}`")


def _other_version(engine: AsyncEngine, version: int) -> SetupError:
    where = shown(engine)
    return SetupError(
        f"the tables of the bus in {where} are of version {version}, and this eventbus needs {SCHEMA_VERSION}: run the "
        f"eventbus that they belong to, or drop them and make new ones with `eventbus store create --url {where}`"
    )
