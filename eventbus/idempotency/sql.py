"""Idempotency keys in a table: SQLite, for the processes of one computer, and PostgreSQL.

Both say the same in two statements, each for all keys of a turn: an UPDATE that takes effect where the token still
holds the key, and an INSERT that takes over what has expired. The time is the database's. Expired rows stay until
`clean`: a claim that expired without being freed was a crash, and whoever comes next is told.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NoReturn  # Any: what asyncpg takes for parameters

from eventbus.database import check, error_of, open_engine, shown, state_of
from eventbus.errors import StoreError
from eventbus.idempotency.base import KEEP_DONE, Claim, Done, Mine, Theirs
from eventbus.idempotency.shared import Change, Wish

if TYPE_CHECKING:
    import asyncpg

_DONE = Done()
# A crash is told of for as long as a success is remembered.
KEEP_CRASHED_MS = KEEP_DONE // timedelta(milliseconds=1)
# What PostgreSQL calls a deadlock, or two transactions in each other's way: nothing was done, and the next try works.
TRY_AGAIN = ("40P01", "40001")
TRIES = 5

_CHANGE = """
UPDATE eventbus_keys AS k
SET token = CASE WHEN c.is_held THEN k.token END, expires_ms = {now} + c.ms
FROM {changes} WHERE k.key = c.of AND k.token = c.by
RETURNING key
"""
_CLAIM = """
INSERT INTO eventbus_keys AS k (key, token, expires_ms, crashes)
SELECT w.key, {owner}, {now} + w.ms, 0 FROM {wishes} WHERE true
ON CONFLICT (key) DO UPDATE SET token = excluded.token, expires_ms = excluded.expires_ms,
    crashes = CASE WHEN k.token IS NULL THEN 0 ELSE k.crashes + 1 END
WHERE k.expires_ms <= {now}
RETURNING key, crashes
"""
_LOOK = "SELECT key, token IS NULL AS is_done, expires_ms - {now} AS left_ms FROM eventbus_keys WHERE key IN ({keys})"
_CLEAN = """
DELETE FROM eventbus_keys WHERE key IN (
    SELECT key FROM eventbus_keys
    WHERE expires_ms <= {now} AND (token IS NULL OR expires_ms <= {now} - {keep})
    ORDER BY expires_ms LIMIT {at_most} {locking}
)
"""


def _claims(
    token: str, wishes: Sequence[Wish], made: Mapping[str, int], others: Mapping[str, tuple[bool, int]]
) -> dict[str, Claim]:
    """What each wish came to: *made* has the crashes of those claimed, *others* whether and for how long they are."""
    mine = Mine(token)
    claims: dict[str, Claim] = {}
    for key, _ in wishes:
        crashes = made.get(key)
        if crashes is not None:
            claims[key] = Mine(token, crashes) if crashes else mine
        else:
            # What is gone again by the time it is looked for was somebody else's a moment ago.
            is_done, left_ms = others.get(key, (False, 0))
            claims[key] = _DONE if is_done and left_ms > 0 else Theirs(timedelta(milliseconds=max(left_ms, 0)))
    return claims


# ── SQLite ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class SQLiteKeeper:
    """Keys in a SQLite file. Each turn is a transaction."""

    _now = "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)"
    _change = _CHANGE.format(
        now=_now,
        changes="(SELECT json_extract(value, '$[0]') AS of, json_extract(value, '$[1]') AS by,"
        " json_extract(value, '$[2]') AS ms, json_extract(value, '$[3]') AS is_held FROM json_each(:changes)) AS c",
    )
    _claim = _CLAIM.format(
        now=_now,
        owner=":token",
        wishes="(SELECT json_extract(value, '$[0]') AS key, json_extract(value, '$[1]') AS ms"
        " FROM json_each(:wishes)) AS w",
    )
    _look = _LOOK.format(now=_now, keys="SELECT value FROM json_each(:keys)")
    _clean = _CLEAN.format(now=_now, keep=KEEP_CRASHED_MS, at_most=":at_most", locking="")

    def __init__(self, url: str) -> None:
        self._engine = open_engine(url)

    @property
    def where(self) -> str:
        return shown(self._engine)

    async def open(self) -> Sequence[str]:
        await check(self._engine)
        return ()

    async def turn(
        self, token: str, wishes: Sequence[Wish], changes: Sequence[Change]
    ) -> tuple[dict[str, Claim], set[str]]:
        changed: set[str] = set()
        made: dict[str, int] = {}
        others: dict[str, tuple[bool, int]] = {}
        try:
            async with self._engine.begin() as connection:
                if changes:
                    rows = await connection.exec_driver_sql(self._change, {"changes": json.dumps(changes)})
                    changed = {key for (key,) in rows}
                if wishes:
                    rows = await connection.exec_driver_sql(self._claim, {"token": token, "wishes": json.dumps(wishes)})
                    made = {row.key: row.crashes for row in rows}
                if len(made) < len(wishes):
                    missing = json.dumps([key for key, _ in wishes if key not in made])
                    rows = await connection.exec_driver_sql(self._look, {"keys": missing})
                    others = {row.key: (bool(row.is_done), row.left_ms) for row in rows}
        except Exception as error:
            raise StoreError(str(error_of(error, self._engine))) from error
        return _claims(token, wishes, made, others), changed

    async def clean(self, at_most: int) -> int:
        try:
            async with self._engine.begin() as connection:
                return (await connection.exec_driver_sql(self._clean, {"at_most": at_most})).rowcount
        except Exception as error:
            raise StoreError(str(error_of(error, self._engine))) from error

    async def close(self) -> None:
        await self._engine.dispose()


# ── PostgreSQL ────────────────────────────────────────────────────────────────────────────────────────────────────────


class PostgreSQLKeeper:
    """Keys in PostgreSQL, over one connection of its own.

    Past SQLAlchemy, and each statement its own transaction: what is between the statement and the wire is paid for by
    every event. Rows are locked in the order of their keys, so that workers at the same keys wait for each other.
    """

    # Once for the statement, not for each row.
    _now = "(SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint)"
    _change = _CHANGE.format(
        now=_now, changes="unnest($1::text[], $2::text[], $3::bigint[], $4::boolean[]) AS c(of, by, ms, is_held)"
    )
    _claim = _CLAIM.format(now=_now, owner="$3", wishes="unnest($1::text[], $2::bigint[]) AS w(key, ms)")
    _look = _LOOK.format(now=_now, keys="SELECT unnest($1::text[])")
    _clean = _CLEAN.format(now=_now, keep=KEEP_CRASHED_MS, at_most="$1", locking="FOR UPDATE SKIP LOCKED")
    # Every key is looked up by itself. The planner, left alone, reads the whole table where it believes it small,
    # and keeps to that for as long as a statement stays prepared.
    _settings = "SET enable_seqscan = off; SET enable_hashjoin = off; SET enable_mergejoin = off"

    def __init__(self, url: str) -> None:
        self._engine = open_engine(url)
        self._url = url
        self._connection: asyncpg.Connection[asyncpg.Record] | None = None

    @property
    def where(self) -> str:
        return shown(self._engine)

    async def open(self) -> Sequence[str]:
        await check(self._engine)
        return ()

    async def turn(
        self, token: str, wishes: Sequence[Wish], changes: Sequence[Change]
    ) -> tuple[dict[str, Claim], set[str]]:
        changed: set[str] = set()
        made: dict[str, int] = {}
        others: dict[str, tuple[bool, int]] = {}
        if changes:
            changed = {key for (key,) in await self._fetch(self._change, *_columns(changes))}
        if wishes:
            keys, leases = _columns(wishes)
            made = {key: crashes for key, crashes in await self._fetch(self._claim, keys, leases, token)}  # noqa: C416
        if len(made) < len(wishes):
            rows = await self._fetch(self._look, [key for key, _ in wishes if key not in made])
            others = {key: (is_done, left_ms) for key, is_done, left_ms in rows}
        return _claims(token, wishes, made, others), changed

    async def clean(self, at_most: int) -> int:
        return len(await self._fetch(f"{self._clean} RETURNING key", at_most))

    async def close(self) -> None:
        self._drop()
        await self._engine.dispose()

    async def _fetch(self, statement: str, *parameters: Any) -> list[asyncpg.Record]:
        for left in reversed(range(TRIES)):
            try:
                return await (await self._connected()).fetch(statement, *parameters)
            except Exception as error:  # noqa: BLE001  # whatever it is, the connection is not to be trusted any more
                if left == 0 or state_of(error) not in TRY_AGAIN:
                    self._fail(error)
            except BaseException:  # the time is over: what comes next on this connection is this one's answer
                self._drop()
                raise
        raise AssertionError  # the last try has returned or raised

    async def _connected(self) -> asyncpg.Connection[asyncpg.Record]:
        import asyncpg

        if self._connection is None or self._connection.is_closed():
            self._connection = await asyncpg.connect(self._url)
            await self._connection.execute(self._settings)
        return self._connection

    def _fail(self, error: Exception) -> NoReturn:
        self._drop()
        raise StoreError(str(error_of(error, self._engine))) from error

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None


def _columns(rows: Sequence[tuple[Any, ...]]) -> list[list[Any]]:
    """*rows*, in the order of their keys, as one array a column."""
    return [list(column) for column in zip(*sorted(rows, key=itemgetter(0)), strict=True)]
