"""`eventbus relay` on a real RabbitMQ: what was committed leaves, whoever is killed, and whoever is away."""

from __future__ import annotations

import asyncio
import signal
import sys
import textwrap
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert

from eventbus import Service, Worker
from eventbus.database import OUTBOX, create, open_engine
from eventbus.outbox import Relay
from eventbus.outbox import relay as relay_module
from tests.outboxes import Placed, arriving, place, place_many, relayed, rows_of, until_asked, waiting
from tests.programs import eventbus, running
from tests.rig import until
from tests.servers import BrokerServer
from tests.stores import apart, make_tables

ROOT = Path(__file__).parent.parent.parent

# An API process that is killed at once after its commit, before anything else can happen.
DIES_AFTER_COMMIT = """
    import asyncio, os, signal, sys
    from sqlalchemy.ext.asyncio import AsyncSession
    from eventbus.database import open_engine
    from eventbus.outbox import Outbox
    from tests.outboxes import Placed

    async def main(commits):
        engine = open_engine(sys.argv[1])
        session = AsyncSession(engine)
        await Outbox(source="/api").publish(session, Placed(order_id=1))
        if commits:
            await session.commit()
        os.kill(os.getpid(), signal.SIGKILL)

    asyncio.run(main(sys.argv[2] == "commit"))
"""


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    url: str = request.getfixturevalue(f"{request.param}_url")
    apart(make_tables(url))
    return url


async def run(code: str, *arguments: str) -> int:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", textwrap.dedent(code), *arguments, cwd=ROOT)
    return await process.wait()


async def test_what_a_process_committed_leaves_though_it_died_right_after(
    database_url: str, rabbitmq_url: str, tmp_path: Path
) -> None:
    async with arriving(rabbitmq_url) as arrived:
        assert await run(DIES_AFTER_COMMIT, database_url, "do not") == -signal.SIGKILL
        assert await run(DIES_AFTER_COMMIT, database_url, "commit") == -signal.SIGKILL
        program = running(
            *("relay", "--database", database_url, "--url", rabbitmq_url, "--health", "127.0.0.1:0"),
            cwd=tmp_path,
        )
        with program as relay:
            await asyncio.to_thread(relay.wait_for, "ready\n")
            await until(lambda: arrived.orders)
            (health,) = [line.split()[1] for line in relay.out.splitlines() if line.startswith("health")]
            await until_asked(lambda: asyncio.to_thread(status_of, f"{health.removesuffix('/live')}/ready"), 200)
            done = await asyncio.to_thread(relay.end)

    assert done.code == 0, done.err
    assert "stopping" in done.out
    assert arrived.orders == [1]


def status_of(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


async def test_a_relay_that_is_killed_in_the_middle_is_succeeded_by_another(
    database_url: str, rabbitmq_url: str, tmp_path: Path
) -> None:
    count, keys = 6000, 50
    engine = open_engine(database_url)
    await place_many(engine, count, keys=keys)
    words = ("relay", "--database", database_url, "--url", rabbitmq_url)

    async with arriving(rabbitmq_url) as arrived:
        with running(*words, cwd=tmp_path, wait_for="ready\n") as first:
            while await waiting(engine) == count:  # noqa: ASYNC110  # another process marks what it has published
                await asyncio.sleep(0.01)
            await asyncio.to_thread(first.end, signal.SIGKILL)
        left = await waiting(engine)
        with running(*words, cwd=tmp_path, wait_for="ready\n"):
            await relayed(engine)
            await until(lambda: len(set(arrived.orders)) == count)
    await engine.dispose()

    assert 0 < left < count
    assert sorted(set(arrived.orders)) == list(range(count))
    ids: dict[int, set[str]] = {}
    for envelope, order in zip(arrived.envelopes, arrived.orders, strict=True):
        ids.setdefault(order, set()).add(envelope.id)
    assert {len(of_one) for of_one in ids.values()} == {1}  # what was published twice is recognised
    for orders in arrived.by_key().values():
        first_times = list(dict.fromkeys(orders))
        assert first_times == sorted(first_times)
    # Once more at most what was on its way: rows that were confirmed and not marked yet.
    assert len(arrived.envelopes) <= count + relay_module.WINDOW


async def test_what_is_committed_while_the_broker_is_away_leaves_when_it_is_back(
    sqlite_url: str, own_broker: BrokerServer
) -> None:
    url, handled = own_broker.new_vhost(), Counter[int]()
    engine = open_engine(sqlite_url)
    await create(engine)
    service: Service[Any] = Service("shop")

    @service.on("placed")
    async def handle(event: Placed) -> None:
        handled[event.order_id] += 1

    async with Worker(service, url=url), Relay(engine, url=url) as relay:
        await asyncio.to_thread(own_broker.restart)  # it forgets what was declared within the last second otherwise
        await place(engine, 1)
        await until(lambda: handled[1])

        await asyncio.to_thread(own_broker.kill)
        await place(engine, 2, 3, subject="ada")
        await until(lambda: any(problem.startswith("publishing: ") for problem in relay.problems()))
        assert await waiting(engine) == 2
        await asyncio.to_thread(own_broker.start)
        await until(lambda: handled[2] and handled[3])
        await relayed(engine)
        await until(lambda: not relay.problems())
    await engine.dispose()

    assert handled == Counter({1: 1, 2: 1, 3: 1})


async def test_a_row_over_what_the_broker_was_told_to_take_is_set_aside_and_those_behind_it_leave(
    sqlite_url: str, own_broker: BrokerServer
) -> None:
    url = own_broker.new_vhost()
    engine = open_engine(sqlite_url)
    await create(engine)
    async with own_broker.taking_at_most(2000), arriving(url) as arrived, Relay(engine, url=url):
        async with engine.begin() as connection:  # the relay does not know of the broker's limit
            large: dict[str, Any] = {"event_id": "large", "source": "/s", "type": "placed.v1", "data": b"x" * 5000}
            wide: dict[str, Any] = {**large, "data": b"{}", "extensions": f'{{"x": "{"y" * 200_000}"}}'}
            for row in (large, wide):
                await connection.execute(insert(OUTBOX).values(**row, ordering_key="ada"))
        await place(engine, 1, 2, subject="ada")
        await relayed(engine)
        await until(lambda: arrived.orders[-1:] == [2])
    errors = [row["error"] for row in await rows_of(engine)]
    await engine.dispose()

    assert "its body takes" in errors[0]
    assert "its headers take" in errors[1]
    assert errors[2:] == [None, None]
    assert list(dict.fromkeys(arrived.orders)) == [1, 2]


async def test_rows_that_were_set_aside_are_listed_and_tried_again(sqlite_url: str, tmp_path: Path) -> None:
    apart(make_tables(sqlite_url))
    engine = open_engine(sqlite_url)
    async with engine.begin() as connection:
        for error in (None, "too large", "broken"):
            await connection.execute(
                insert(OUTBOX).values(event_id="1", source="/s", type="t.v1", data=b"{}", error=error)
            )

    listed = eventbus("outbox", "list", cwd=tmp_path, EVENTBUS_DATABASE=sqlite_url)
    as_json = eventbus("outbox", "list", "--json", "--database", sqlite_url, cwd=tmp_path).json
    assert listed.code == 0
    assert "1 rows wait, the oldest for" in listed.out
    assert "2 were set aside" in listed.out
    assert "too large" in listed.out
    assert (as_json["waiting"], [row["error"] for row in as_json["rows"]]) == (1, ["too large", "broken"])

    one = eventbus("outbox", "retry", "2", "--database", sqlite_url, cwd=tmp_path)
    everything = eventbus("outbox", "retry", "--all", "--database", sqlite_url, cwd=tmp_path)
    assert [one.out, everything.out] == ["1 rows are tried again\n"] * 2
    assert [row["error"] for row in await rows_of(engine)] == [None] * 3
    assert eventbus("outbox", "retry", "--database", sqlite_url, cwd=tmp_path).code == 2
    await engine.dispose()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["relay", "--url", "amqp://localhost/"], "no database: give --database"),
        (["relay", "--database", "sqlite:///x.db"], "no broker: give --url"),
        (["relay", "--database", "sqlite:///x.db", "--url", "memory://"], "lives inside one process"),
        (["relay", "--database", "mysql://u:secret@h/d", "--url", "amqp://localhost/"], "names no database"),
        (["relay", "--database", "sqlite:///x.db", "--url", "amqp://localhost/"], "eventbus store create --url"),
        (["outbox", "list", "--database", "sqlite:///x.db"], "eventbus store create --url"),
        (["outbox", "list"], "no database: give --database"),
    ],
)
def test_what_cannot_work_is_one_line_that_says_what_to_do(words: list[str], said: str, tmp_path: Path) -> None:
    done = eventbus(*words, cwd=tmp_path)

    assert done.code == 1
    assert said in done.error
    assert "secret" not in done.err
    assert not (tmp_path / "x.db").exists()
