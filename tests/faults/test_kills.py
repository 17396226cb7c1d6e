"""Killed at each step, on SQLite and PostgreSQL: every order has its effects once, and every committed row was told of.

`make kills` does it to the shop with more orders and kills, and with a longer outage.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from rich.console import Console

from tests.faults.kills.__main__ import main, show
from tests.faults.kills.count import Found, count
from tests.faults.kills.play import SmallPlay
from tests.faults.kills.points import BY_INBOX, BY_KEY, BY_OUTBOX, POINTS, Aim
from tests.faults.kills.run import Result, aims_for, run_outage, run_play
from tests.faults.kills.shop import ShopPlay, outage_aims
from tests.faults.kills.stage import Databases, Place, Store
from tests.servers import BrokerServer
from tests.stores import Stores

ORDERS = 60
SHOP_KILLS = 5  # one for each program: what is dear is to start them anew
LEASE_S = 3.0
QUIET_S = 40.0  # longer than whatever is waited for here, on a busy computer
WRONG_QUIET_S = 7.0  # more than two leases: what a wrong build has lost does not come back


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest) -> Store:
    found: Store = request.param
    return found


@pytest.fixture
async def databases(store: Store, stores: Stores, tmp_path: Path) -> AsyncIterator[Databases]:
    made = Databases(store, stores, tmp_path)
    yield made
    await made.close()


@pytest.fixture
def place(broker: BrokerServer) -> Place:
    return Place(broker, broker.new_vhost())


async def test_killed_at_each_step_every_order_has_its_effects_once_and_every_committed_row_is_published(
    place: Place, databases: Databases, tmp_path: Path
) -> None:
    async with SmallPlay.on(place, databases) as play:
        result = await run_play(
            play, tmp_path, orders=ORDERS, aims=aims_for(play, None, seed=0), lease_s=LEASE_S, quiet_s=QUIET_S
        )

    assert result.failings == ()
    assert result.counted.placed == result.counted.rows == ORDERS
    # A step that is never reached proves nothing.
    reached = [("payments", point) for point in BY_INBOX] + [("inventory", point) for point in BY_KEY]
    assert result.killed == Counter(reached)


async def test_the_shop_is_killed_and_every_order_has_one_payment_and_one_reservation(
    place: Place, databases: Databases, tmp_path: Path
) -> None:
    async with ShopPlay.on(place, databases) as play:
        result = await run_play(
            play, tmp_path, orders=ORDERS, aims=aims_for(play, SHOP_KILLS, seed=0), lease_s=LEASE_S, quiet_s=QUIET_S
        )

    assert result.failings == ()
    assert (result.killed.total(), result.counted.placed) == (SHOP_KILLS, ORDERS)
    assert result.counted.rows == result.counted.arrived == 5 * ORDERS


async def test_what_is_committed_while_the_broker_is_away_leaves_though_the_door_dies_right_after_its_commit(
    own_broker: BrokerServer, databases: Databases, tmp_path: Path
) -> None:
    before, away = 5, 15
    async with ShopPlay.on(Place(own_broker, own_broker.new_vhost()), databases) as play:
        result = await run_outage(
            play,
            tmp_path,
            orders=(before, away),
            aims=outage_aims(before, away),
            outage_s=3,
            lease_s=LEASE_S,
            quiet_s=QUIET_S,
        )

    assert result.failings == ()
    assert (result.killed.total(), result.counted.placed) == (2, before + away)


async def test_what_is_rolled_back_is_never_published(place: Place, databases: Databases, tmp_path: Path) -> None:
    async with SmallPlay.on(place, databases, fail_first=True) as play:
        result = await run_play(play, tmp_path, orders=ORDERS, aims={}, lease_s=LEASE_S, quiet_s=QUIET_S)

    assert result.failings == ()
    # Nothing but what the second attempt said, and that once.
    assert result.counted.rows == result.counted.arrived == ORDERS


# ── the proof that a run can be bad ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("store", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("saboteur", "program", "points", "finding"),
    [
        ("ack-first", "payments", ["before-claim", "before-commit"], "effects missing"),
        ("done-first", "inventory", ["after-claim", "before-handler"], "effects missing"),
        ("inbox-first", "payments", ["after-begin", "before-commit"], "effects missing"),
        ("inbox-last", "payments", ["after-commit", "before-done"], "effects doubled"),
        ("mark-first", "payments", ["after-pick", "before-publish"], "committed rows unpublished"),
        ("publish-after-commit", "payments", ["before-publish", "before-publish"], "effects untold"),
    ],
)
async def test_a_build_that_is_wrong_is_found_out(
    saboteur: str, program: str, points: list[str], finding: str, place: Place, databases: Databases, tmp_path: Path
) -> None:
    aims = {program: [Aim(point, nth=3) for point in points]}
    async with SmallPlay.on(place, databases) as play:
        result = await run_play(
            play, tmp_path, orders=20, aims=aims, lease_s=LEASE_S, saboteur=saboteur, quiet_s=WRONG_QUIET_S
        )

    assert any(finding in failing for failing in result.failings), result


@pytest.mark.parametrize("store", ["sqlite"], indirect=True)
async def test_a_build_that_publishes_what_is_rolled_back_is_found_out(
    place: Place, databases: Databases, tmp_path: Path
) -> None:
    async with SmallPlay.on(place, databases, fail_first=True) as play:
        result = await run_play(
            play, tmp_path, orders=10, aims={}, lease_s=LEASE_S, saboteur="publish-before-commit", quiet_s=WRONG_QUIET_S
        )

    assert "event of payment of 0" in result.counted.doubled


@pytest.mark.parametrize("store", ["sqlite"], indirect=True)
async def test_a_shop_that_publishes_without_an_outbox_is_found_out(
    place: Place, databases: Databases, tmp_path: Path
) -> None:
    aims = {"payments": [Aim("before-publish")], "inventory": [Aim("before-publish")]}
    async with ShopPlay.on(place, databases) as play:
        result = await run_play(
            play, tmp_path, orders=10, aims=aims, lease_s=LEASE_S, saboteur="publish-after-commit",
            quiet_s=WRONG_QUIET_S,
        )  # fmt: skip

    assert {name.split()[0] for name in result.counted.untold} == {"payment", "reservation"}
    assert {name.split()[0] for name in result.counted.missing} >= {"parcel"}


# ── counting ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_step_belongs_to_a_way_of_working() -> None:
    assert {*BY_KEY, *BY_INBOX, *BY_OUTBOX} == set(POINTS)


def found(**changes: object) -> Found:
    """Two orders, with all that belongs to them, but for *changes*."""
    fine: dict[str, object] = {
        "placed": ["1", "2"],
        "effects": {"payment": Counter(["1", "2"])},
        "told": {"payment": Counter(["1", "2"])},
        "rows": {"a", "b"},
        "arrived": {"a", "b"},
    }
    return Found(**(fine | changes))  # type: ignore[arg-type]  # any of its fields


@pytest.mark.parametrize(
    ("changes", "failing", "is_settled"),
    [
        ({"effects": {"payment": Counter(["1"])}}, "1 effects missing (payment of 2)", False),
        ({"effects": {"payment": Counter(["1", "2", "2"])}}, "1 effects doubled (payment of 2)", True),
        ({"told": {"payment": Counter(["1", "2", "2"])}}, "1 effects doubled (event of payment of 2)", True),
        ({"told": {"payment": Counter(["2"])}}, "1 effects untold (payment of 1)", False),
        ({"arrived": {"a"}}, "1 committed rows unpublished (b)", False),
        ({"arrived": {"a", "b", "c"}}, "1 events without a committed row (c)", True),
        ({"waiting": {"b"}}, "1 rows wait", False),
        ({"given_up": {"payments gave up: no"}}, "1 given up (payments gave up: no)", True),
        ({"wrong": {"3 mugs for 2"}}, "1 sums wrong (3 mugs for 2)", True),
    ],
)
def test_what_must_not_be_is_named(changes: dict[str, object], failing: str, is_settled: bool) -> None:
    counted = count(found(**changes))

    assert counted.failings == (failing,)
    assert counted.is_settled is is_settled
    assert count(found()).failings == ()


def test_a_step_that_is_not_reached_is_a_failure() -> None:
    result = Result(count(found()), Counter(), ("payments after-commit",), 1.0)

    assert result.failings == ("steps that were not reached: payments after-commit",)


def test_a_run_is_shown_with_its_kills_and_what_was_bad() -> None:
    console, killed = Console(record=True, width=200, file=io.StringIO()), Counter({("payments", "after-commit"): 3})

    show(Result(count(found()), killed, (), 1.0), "sqlite", console)
    fine = console.export_text()
    show(Result(count(found(arrived={"a"})), killed, (), 1.0), "sqlite", console)
    bad = console.export_text()

    assert "3 kills, 2 orders, 2 committed rows, 2 events at their queues" in fine
    assert "every order has one payment and one reservation" in fine
    assert "BAD 1 committed rows unpublished (b)" in bad
    assert "every order" not in bad


@pytest.mark.parametrize("arguments", [["--orders", "0"], ["--kills", "-1"], ["--store", "mysql"]])
def test_what_cannot_be_run_is_said_at_once(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)

    assert ended.value.code == 2
    assert "error: argument" in capsys.readouterr().err
