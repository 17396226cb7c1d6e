"""Which buckets of the outbox are this relay's: leases, shared out evenly among the relays that live.

A relay that is killed loses its buckets when their leases end. One that stalled past that finds out before it publishes
anything: `generation` is asked for with each row, and tells nothing of a lease whose time is over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import ColumnElement, delete, func, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from eventbus.database import LEASES, now_ms
from eventbus.outbox.base import BUCKETS
from eventbus.outbox.sql import LEASE_PREFIX

LEASE = timedelta(seconds=10)
# Not used to the end: a row that is published in the last moment would be published by the next holder too.
MARGIN_S = 2.0
RELAY_PREFIX = "relay/"


@dataclass(slots=True)
class _Held:
    generation: int
    ends_s: float  # on the monotonic clock


class Leases:
    """The buckets of the relay called *holder*. *is_idle* tells whether nothing of a bucket is on its way."""

    def __init__(
        self,
        engine: AsyncEngine,
        holder: str,
        is_idle: Callable[[int], bool],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine, self._holder, self._is_idle, self._clock = engine, holder, is_idle, clock
        self._insert = postgresql.insert if engine.dialect.name == "postgresql" else sqlite.insert
        self._held: dict[int, _Held] = {}
        self._leaving: set[int] = set()  # too many; given up once nothing of them is on its way
        self._generations = 0
        self._has_rows = False

    def readable(self) -> list[int]:
        """The buckets that rows may be read of."""
        return [bucket for bucket in self._held if bucket not in self._leaving and self.generation(bucket) is not None]

    def generation(self, bucket: int) -> int | None:
        """A number for this hold of *bucket*; None while it is not held. The next hold has another one."""
        held = self._held.get(bucket)
        return held.generation if held is not None and held.ends_s > self._clock() else None

    async def look(self) -> None:
        """Begin the leases anew, and take or give up buckets until this relay has its share. Several times a lease."""
        began_s = self._clock()
        async with self._engine.begin() as connection:
            relays = await self._say_alive(connection)
            names = await connection.execute(
                update(LEASES)
                .where(LEASES.c.holder == self._holder, LEASES.c.name.startswith(LEASE_PREFIX))
                .values(ends_ms=_end())
                .returning(LEASES.c.name)
            )
            mine = {_bucket(name) for name in names.scalars()}
            share = -(-BUCKETS // relays)
            given_up = {bucket for bucket in sorted(mine)[share:] if self._is_idle(bucket)}
            if given_up:
                await self._give_up(connection, given_up)
            taken = await self._take(connection, share - len(mine)) if len(mine) < share else set()
        self._has_rows = True  # not before they are committed: a first look that fails leaves none
        self._note((mine - given_up) | taken, taken, began_s + LEASE.total_seconds() - MARGIN_S)
        self._leaving = set(sorted(mine)[share:]) - given_up

    def _note(self, mine: Collection[int], taken: Collection[int], ends_s: float) -> None:
        for bucket in [bucket for bucket in self._held if bucket not in mine]:
            del self._held[bucket]
        for bucket in mine:
            held = self._held.get(bucket)
            if held is not None and bucket not in taken:
                held.ends_s = ends_s
            else:
                self._generations += 1
                self._held[bucket] = _Held(self._generations, ends_s)

    async def end(self) -> None:
        """Give everything up, so that another relay need not wait for the leases to end."""
        self._held.clear()
        async with self._engine.begin() as connection:
            await self._give_up(connection, range(BUCKETS))
            await connection.execute(delete(LEASES).where(LEASES.c.name == RELAY_PREFIX + self._holder))

    async def _say_alive(self, connection: AsyncConnection) -> int:
        """Note that this relay lives; how many do."""
        if not self._has_rows:
            rows = [{"name": f"{LEASE_PREFIX}{n}", "holder": "", "ends_ms": 0} for n in range(BUCKETS)]
            await connection.execute(self._insert(LEASES).on_conflict_do_nothing(), rows)
        me = self._insert(LEASES).values(name=RELAY_PREFIX + self._holder, holder=self._holder, ends_ms=_end())
        await connection.execute(
            me.on_conflict_do_update(index_elements=[LEASES.c.name], set_={"ends_ms": me.excluded.ends_ms})
        )
        is_relay = LEASES.c.name.startswith(RELAY_PREFIX)
        ended = select(LEASES.c.name).where(is_relay, LEASES.c.ends_ms <= now_ms()).with_for_update(skip_locked=True)
        await connection.execute(delete(LEASES).where(LEASES.c.name.in_(ended)))
        living = select(func.count()).where(is_relay, LEASES.c.ends_ms > now_ms())
        return max(1, (await connection.execute(living)).scalar_one())

    async def _take(self, connection: AsyncConnection, count: int) -> set[int]:
        is_free = (LEASES.c.name.startswith(LEASE_PREFIX), LEASES.c.ends_ms <= now_ms())
        # SQLite has one writer at a time, and this is one statement.
        free = select(LEASES.c.name).where(*is_free).limit(count).with_for_update(skip_locked=True)
        taken = await connection.execute(
            update(LEASES)
            .where(LEASES.c.name.in_(free), *is_free)
            .values(holder=self._holder, ends_ms=_end())
            .returning(LEASES.c.name)
        )
        return {_bucket(name) for name in taken.scalars()}

    async def _give_up(self, connection: AsyncConnection, buckets: Collection[int]) -> None:
        names = [f"{LEASE_PREFIX}{bucket}" for bucket in buckets]
        await connection.execute(
            update(LEASES).where(LEASES.c.name.in_(names), LEASES.c.holder == self._holder).values(holder="", ends_ms=0)
        )


def _end() -> ColumnElement[int]:
    return now_ms() + int(LEASE.total_seconds() * 1000)


def _bucket(name: str) -> int:
    return int(name.removeprefix(LEASE_PREFIX))
