"""Killed at each step, on SQLite and PostgreSQL: every order has its effects once, and every committed row was told of.

`make kills` does it to the shop, with more orders and more kills.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import pytest

from tests.faults.kills.play import SmallPlay
from tests.faults.kills.points import BY_INBOX, BY_KEY, BY_OUTBOX, POINTS
from tests.faults.kills.run import Aim, Result, aims_for, run_play
from tests.faults.kills.stage import Databases, Place
from tests.servers import BrokerServer
from tests.stores import Stores

ORDERS = 60
LEASE_S = 3.0
STORES = ["sqlite", "postgresql"]
Store = Literal["sqlite", "postgresql"]


@asynccontextmanager
async def small_play(broker: BrokerServer, stores: Stores, store: Store, folder: Path) -> AsyncIterator[SmallPlay]:
    databases = Databases(store, stores, folder)
    try:
        async with SmallPlay.on(Place(broker, broker.new_vhost()), databases) as play:
            yield play
    finally:
        await databases.close()


async def run_small(
    broker: BrokerServer,
    stores: Stores,
    store: Store,
    folder: Path,
    aims: dict[str, list[Aim]] | None = None,
    *,
    saboteur: str | None = None,
    quiet_s: float = 40.0,
) -> Result:
    async with small_play(broker, stores, store, folder) as play:
        return await run_play(
            play, folder, orders=ORDERS, aims=aims_for(play, None, seed=0) if aims is None else aims,
            lease_s=LEASE_S, saboteur=saboteur, quiet_s=quiet_s,
        )  # fmt: skip


@pytest.mark.parametrize("store", STORES)
async def test_killed_at_each_step_every_order_has_its_effects_once_and_every_committed_row_is_published(
    store: Store, broker: BrokerServer, stores: Stores, tmp_path: Path
) -> None:
    result = await run_small(broker, stores, store, tmp_path)

    assert result.failings == ()
    assert result.counted.placed == result.counted.rows == ORDERS
    # A step that is never reached proves nothing.
    assert dict(result.killed) == {("payments", point): 1 for point in BY_INBOX} | {
        ("inventory", point): 1 for point in BY_KEY
    }


@pytest.mark.parametrize(
    ("saboteur", "program", "points", "finding"),
    [
        ("ack-first", "payments", ["before-claim", "before-commit"], "effects missing"),
        ("done-first", "inventory", ["after-claim", "before-handler"], "effects missing"),
        ("inbox-first", "payments", ["after-begin", "before-commit"], "effects missing"),
        ("inbox-last", "payments", ["after-commit", "before-done"], "effects doubled"),
        ("mark-first", "payments", ["after-pick", "before-publish"], "committed rows unpublished"),
        ("publish-after-commit", "payments", ["before-publish", "before-publish"], "effects untold"),
        ("publish-before-commit", "payments", ["before-commit"], "events without a committed row"),
    ],
)
async def test_a_build_that_is_wrong_is_found_out(
    saboteur: str, program: str, points: list[str], finding: str, broker: BrokerServer, stores: Stores, tmp_path: Path
) -> None:
    aims = {program: [Aim(point, nth=3) for point in points]}

    result = await run_small(broker, stores, "sqlite", tmp_path, aims, saboteur=saboteur, quiet_s=10)

    assert any(finding in failing for failing in result.failings), result


def test_every_step_belongs_to_a_way_of_working() -> None:
    assert {*BY_KEY, *BY_INBOX, *BY_OUTBOX} == set(POINTS)
