"""What the processes of one cell write down, in one SQLite file, and the idempotency store that they share.

A row is committed before the step that it tells of goes on, so that a SIGKILL takes nothing back. Not synced to the
disk: here processes die, not computers.
"""

from __future__ import annotations

import sqlite3
import time
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

from eventbus import StoreError
from eventbus.idempotency.base import Claim, Done, Mine, Theirs

BUSY_S = 30.0
SCHEMA = """
create table if not exists published (event text primary key, number int, began real, confirmed real);
create table if not exists runs (service text, event text, number int, attempt int, began real);
create table if not exists broken (service text, event text, number int, at real);
create table if not exists effects (
    service text, event text, number int, at real, count int, primary key (service, event)
);
create table if not exists claims (key text primary key, token text, ends real, crashes int, done real);
create table if not exists suppressed (key text, at real);
create table if not exists switches (name text primary key);
create index if not exists runs_of_an_event on runs (service, event);
"""


def open_books(path: Path) -> sqlite3.Connection:
    """The books in the file *path*; every statement is a transaction of its own, unless it says `begin`."""
    books = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
    books.execute("pragma journal_mode = wal")
    books.execute("pragma synchronous = off")
    books.executescript(SCHEMA)
    return books


SOURCE = "/ledger"
FOLLOWS = " follows"  # a service's name and this: where the effects of the events are that its handlers published
CUT_OFF = "the store is cut off"
# One statement, so one transaction: the claim is ours where there is none, or one that has ended undone, by a crash.
CLAIM = """
insert into claims (key, token, ends, crashes) values (?1, ?2, ?3, 0)
on conflict (key) do update set token = ?2, ends = ?3, crashes = crashes + 1 where done is null and ends <= ?4
returning crashes
"""


def key_of(service: str, event: str) -> str:
    """The idempotency key of the work on *event*."""
    if service.endswith(FOLLOWS):
        name = service.removesuffix(FOLLOWS)
        return f"{name}/follow/followed//services/{name} {event}"
    return f"{service}/handle/counted/{SOURCE} {event}"


class SharedStore:
    """An idempotency store that the workers share, and that a test can cut off. Atomic: one transaction each."""

    def __init__(self, books: sqlite3.Connection, longest_lease: timedelta) -> None:
        self._books = books
        self._longest_lease = longest_lease

    async def claim(self, key: str, lease: timedelta) -> Claim:
        self._check()
        now, token = time.time(), str(uuid4())
        row = (key, token, now + min(lease, self._longest_lease).total_seconds(), now)
        if claimed := self._books.execute(CLAIM, row).fetchall():
            return Mine(token, claimed[0][0])
        held = self._books.execute("select ends, done from claims where key = ?", (key,)).fetchone()
        if held is None:  # given back meanwhile
            return await self.claim(key, lease)
        ends, done = held
        if done is None:
            return Theirs(timedelta(seconds=max(0.0, ends - now)))
        self._books.execute("insert into suppressed values (?, ?)", (key, now))
        return Done()

    async def renew(self, key: str, token: str, lease: timedelta) -> bool:
        return self._change("update claims set ends = ?", key, token, time.time() + lease.total_seconds())

    async def complete(self, key: str, token: str, keep: timedelta) -> bool:
        return self._change("update claims set done = ?", key, token, time.time())

    async def free(self, key: str, token: str) -> bool:
        return self._change("delete from claims", key, token)

    def _change(self, change: str, key: str, token: str, *values: float) -> bool:
        self._check()
        statement = f"{change} where key = ? and token = ? and done is null"
        return self._books.execute(statement, (*values, key, token)).rowcount == 1

    def _check(self) -> None:
        if self._books.execute("select 1 from switches where name = ?", (CUT_OFF,)).fetchone():
            raise StoreError(CUT_OFF)
