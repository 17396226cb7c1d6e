"""The outbox and its relays, on real SQLite files and a real PostgreSQL: what is committed leaves, once, in order."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from sqlalchemy import insert, select, text, update
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from eventbus import Context, Envelope, EnvelopeError, Event, Service, SetupError, Worker
from eventbus.database import INBOX, LEASES, OUTBOX, SCHEMA, create, open_engine
from eventbus.delay import LONGEST
from eventbus.outbox import Outbox, Relay
from eventbus.outbox import relay as relay_module
from eventbus.outbox.base import BUCKETS
from eventbus.outbox.leases import Leases
from eventbus.outbox.sql import MOST_DELETED, Rows, set_aside, try_again
from eventbus.worker import probes_of, problems_of
from tests.outboxes import (
    Placed,
    arriving,
    broken_commits,
    new_broker,
    place,
    place_many,
    relayed,
    rows_of,
    until_asked,
    waiting,
)
from tests.rig import until
from tests.stores import StoreServer

LONG_S = 3600.0
ENDS_S = 10.0
A_DAY = timedelta(days=1)


@pytest.fixture(params=["sqlite", "postgresql"])
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[AsyncEngine]:
    """An engine on each kind of database, with the tables."""
    engine = open_engine(request.getfixturevalue(f"{request.param}_url"))
    await create(engine)
    yield engine
    await engine.dispose()


@pytest.fixture
async def postgresql(postgresql_url: str) -> AsyncIterator[AsyncEngine]:
    engine = open_engine(postgresql_url)
    await create(engine)
    yield engine
    await engine.dispose()


def url_of(engine: AsyncEngine) -> str:
    return engine.url.set(drivername=engine.dialect.name).render_as_string(hide_password=False)


async def execute(engine: AsyncEngine, statement: Any) -> int:
    async with engine.begin() as connection:
        return int((await connection.execute(statement)).rowcount)


# ── writing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_is_rolled_back_is_not_published_and_what_is_committed_is(engine: AsyncEngine) -> None:
    outbox, url = Outbox(source="/shop"), new_broker()
    async with arriving(url) as arrived, Relay(engine, url=url):
        async with AsyncSession(engine) as session:
            await outbox.publish(session, Placed(order_id=1))
            await session.rollback()
        async with engine.begin() as connection:  # a session is not needed
            await outbox.publish(connection, Placed(order_id=2))
        await relayed(engine)
        await until(lambda: arrived.orders)

        assert arrived.orders == [2]
        assert [row["published_ms"] is not None for row in await rows_of(engine)] == [True]


async def test_what_a_savepoint_undoes_is_not_published(engine: AsyncEngine) -> None:
    outbox = Outbox(source="/shop")

    async with AsyncSession(engine) as session, session.begin():
        await outbox.publish(session, Placed(order_id=1))
        nested = await session.begin_nested()
        await outbox.publish(session, Placed(order_id=2))
        await nested.rollback()

    assert len(await rows_of(engine)) == 1


async def test_an_event_arrives_as_it_was_published(engine: AsyncEngine) -> None:
    outbox, url = Outbox(source="/shop"), new_broker()
    async with arriving(url) as arrived, Relay(engine, url=url):
        async with AsyncSession(engine) as session, session.begin():
            sent = await outbox.publish(
                session, Placed(order_id=1), id="mine", subject="ada", extensions={"tenant": "é", "number": 7}
            )
            picture = Envelope(
                id="2", source="/camera", type="taken.v1", time=datetime.now(UTC), datacontenttype="image/png",
                data=b"\x00\xff",
            )  # fmt: skip
            assert await outbox.publish(session, picture) == picture
        await until(lambda: len(arrived.envelopes) == 2)

        assert (sent.id, sent.source, sent.subject) == ("mine", "/shop", "ada")
        assert sorted(arrived.envelopes, key=lambda e: e.id) == [picture, sent]


async def test_the_trace_of_the_transaction_goes_on_where_the_relay_publishes(engine: AsyncEngine) -> None:
    url = new_broker()
    span = trace.NonRecordingSpan(trace.SpanContext(0xABC, 0xDEF, is_remote=False, trace_flags=trace.TraceFlags(1)))
    with trace.use_span(span):
        await place(engine, 1)
    async with arriving(url) as arrived, Relay(engine, url=url):
        await until(lambda: arrived.envelopes)

    (row,) = await rows_of(engine)
    assert row["traceparent"] == f"00-{0xABC:032x}-{0xDEF:016x}-01"
    assert arrived.envelopes[0].extensions["traceparent"] == row["traceparent"]


async def test_a_delay_counts_from_the_publish_and_is_never_shortened(engine: AsyncEngine) -> None:
    outbox, url, got = Outbox(source="/shop"), new_broker(), list[float]()
    service: Service[Any] = Service("shop")

    @service.on("placed")
    async def handle(event: Placed) -> None:
        got.append(asyncio.get_running_loop().time())

    async with Worker(service, url=url), Relay(engine, url=url):
        began_s = asyncio.get_running_loop().time()
        async with AsyncSession(engine) as session, session.begin():
            await outbox.publish(session, Placed(order_id=1), delay=timedelta(seconds=0.7))
        await until(lambda: got)

    assert got[0] - began_s >= 0.7


@pytest.mark.parametrize("delay", [timedelta(seconds=-1), LONGEST + timedelta(seconds=1)])
async def test_what_a_bus_refuses_an_outbox_refuses_too(engine: AsyncEngine, delay: timedelta) -> None:
    wide = Envelope(id="1", source="/s", type="w" * 200, time=datetime.now(UTC))
    outbox = Outbox(source="/shop")
    async with AsyncSession(engine) as session, session.begin():
        with pytest.raises(ValueError, match="a delay of"):
            await outbox.publish(session, Placed(order_id=1), delay=delay)
        with pytest.raises(EnvelopeError):
            await outbox.publish(session, Placed(order_id=1), id="")
        with pytest.raises(EnvelopeError, match="too long for a routing key"):
            await outbox.publish(session, wide)
        with pytest.raises(EnvelopeError, match="neither an Event nor an Envelope"):
            await outbox.publish(session, "an event")  # type: ignore[arg-type]  # what a checker would find

    assert await rows_of(engine) == []
    with pytest.raises(SetupError, match="cannot be"):
        Outbox(source="not a source")


async def test_an_event_that_does_not_serialise_leaves_the_transaction_as_it_was(engine: AsyncEngine) -> None:
    class Odd(Event, name="odd"):
        what: Any

    outbox, url = Outbox(source="/shop"), new_broker()
    async with arriving(url) as arrived, Relay(engine, url=url):
        async with AsyncSession(engine) as session, session.begin():
            with pytest.raises(EnvelopeError, match="odd"):
                await outbox.publish(session, Odd(what=object()))
            await outbox.publish(session, Placed(order_id=1))
        await until(lambda: arrived.envelopes)

        assert arrived.orders == [1]


async def test_an_outbox_without_tables_says_how_to_make_them(engine: AsyncEngine) -> None:
    await execute(engine, text("DROP TABLE eventbus_outbox"))

    with pytest.raises(SetupError, match="eventbus store create"):
        await place(engine, 1)


async def test_an_error_of_the_database_shows_no_data(engine: AsyncEngine) -> None:
    await execute(engine, text("CREATE UNIQUE INDEX one ON eventbus_outbox (type)"))

    with pytest.raises(SQLAlchemyError) as raised:
        await place(engine, 123456789, 123456789)

    assert "123456789" not in str(raised.value)


async def test_a_program_in_another_language_writes_what_it_must_and_no_more(engine: AsyncEngine) -> None:
    url = new_broker()
    await execute(
        engine,
        text(
            "INSERT INTO eventbus_outbox (event_id, source, type, data) VALUES ('1', '/elsewhere', 'placed.v1', :data)"
        ).bindparams(data=b'{"order_id": 5}'),
    )

    async with arriving(url) as arrived, Relay(engine, url=url):
        await until(lambda: arrived.envelopes)

    (read,) = arrived.envelopes
    assert (read.id, read.source, read.event(Placed)) == ("1", "/elsewhere", Placed(order_id=5))
    assert abs(read.time - datetime.now(UTC)) < timedelta(minutes=5)


async def test_the_table_refuses_a_bucket_that_no_relay_would_read(engine: AsyncEngine) -> None:
    with pytest.raises(SQLAlchemyError):
        await execute(
            engine,
            insert(OUTBOX).values(bucket=BUCKETS, event_id="1", source="/s", type="t.v1", data=b"{}"),
        )


# ── order, and several relays ───────────────────────────────────────────────────────────────────────────────────────


async def test_two_relays_publish_each_of_many_rows_once_and_in_order_per_key(engine: AsyncEngine) -> None:
    url, keys, count = new_broker(), 40, 2000
    await place_many(engine, count, keys=keys)
    other = open_engine(url_of(engine))

    async with arriving(url) as arrived, Relay(engine, url=url), Relay(other, url=url):
        await relayed(engine)
        await until(lambda: len(arrived.envelopes) >= count)
    await other.dispose()

    assert sorted(arrived.orders) == list(range(count))
    assert all(orders == sorted(orders) for orders in arrived.by_key().values())


async def test_relays_share_the_buckets_evenly_and_one_that_leaves_gives_its_own_back(engine: AsyncEngine) -> None:
    one, two, three = (Leases(engine, name, lambda _: True) for name in ("one", "two", "three"))
    await one.look()
    assert sorted(one.readable()) == list(range(BUCKETS))

    for _ in range(3):
        for leases in (two, three, one):
            await leases.look()

    shares = [leases.readable() for leases in (one, two, three)]
    assert sorted(bucket for share in shares for bucket in share) == list(range(BUCKETS))
    assert {len(share) for share in shares} <= {4, 5, 6}

    await one.end()
    for leases in (two, three, two, three):
        await leases.look()
    assert one.readable() == []
    assert sorted([*two.readable(), *three.readable()]) == list(range(BUCKETS))


async def test_a_first_look_that_is_not_committed_is_made_up_for_by_the_next(engine: AsyncEngine) -> None:
    leases = Leases(engine, "one", lambda _: True)

    with broken_commits(engine), pytest.raises(DBAPIError):
        await leases.look()
    assert leases.readable() == []
    await leases.look()

    assert len(leases.readable()) == BUCKETS


async def test_a_bucket_is_not_given_up_while_rows_of_it_are_on_their_way(engine: AsyncEngine) -> None:
    busy = {BUCKETS - 1}
    one, two = Leases(engine, "one", lambda bucket: bucket not in busy), Leases(engine, "two", lambda _: True)
    await one.look()
    await two.look()

    await one.look()
    await two.look()
    assert BUCKETS - 1 not in one.readable()  # nothing more of it is read
    assert BUCKETS - 1 not in two.readable()

    busy.clear()
    await one.look()
    await two.look()
    assert BUCKETS - 1 in two.readable()


async def test_a_relay_that_stalled_past_its_lease_publishes_and_marks_nothing_more(engine: AsyncEngine) -> None:
    now_s = 0.0
    await place(engine, 1)
    stalled, next_ = (
        Leases(engine, "stalled", lambda _: True, clock=lambda: now_s),
        Leases(engine, "next", lambda _: True),
    )
    await stalled.look()
    rows = Rows(engine, "stalled", longest_bytes=1000)
    (row,) = await rows.waiting(range(BUCKETS), limit=10, without_ids=(), without_keys=())
    before = stalled.generation(row.bucket)

    now_s = LONG_S
    await execute(engine, update(LEASES).values(ends_ms=0))  # time passes for the database too
    assert stalled.generation(row.bucket) is None
    await next_.look()

    assert await rows.mark(published=[row.id], failed=[row.id], set_aside={row.id: "why"}) == 0
    assert await Rows(engine, "next", longest_bytes=1000).mark(published=[row.id], failed=[], set_aside={}) == 1
    await next_.end()
    await stalled.look()
    assert before is not None
    assert stalled.generation(row.bucket) not in (None, before)


async def test_a_relay_that_dies_is_succeeded_when_its_leases_end(engine: AsyncEngine) -> None:
    url = new_broker()
    await Leases(engine, "dead", lambda _: False).look()
    await place(engine, 1)
    async with arriving(url) as arrived, Relay(engine, url=url) as relay:
        await until(lambda: relay.lag is not None)
        assert arrived.envelopes == []

        await execute(engine, update(LEASES).where(LEASES.c.holder == "dead").values(ends_ms=0))
        await until(lambda: arrived.orders == [1])


# ── rows that cannot be published ───────────────────────────────────────────────────────────────────────────────────


async def test_rows_that_can_never_be_published_are_set_aside_and_those_behind_them_leave(
    engine: AsyncEngine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eventbus.transport.memory.MAX_MESSAGE_BYTES", 1000)
    url, outbox = new_broker(), Outbox(source="/shop")
    async with AsyncSession(engine) as session, session.begin():
        large = Envelope(id="large", source="/s", type="big.v1", time=datetime.now(UTC), subject="a", data=b"x" * 1001)
        await outbox.publish(session, large)
        await outbox.publish(session, Placed(order_id=1), subject="a")
    broken: list[dict[str, Any]] = [{"extensions": "{"}, {"time": "soon"}, {"type": ""}, {"due_ms": 10**18}]
    if engine.dialect.name == "sqlite":  # which takes anything for anything
        broken += [{"data": text("'text'")}, {"due_ms": text("'soon'")}, {"attempts": text("'x'"), "type": ""}]
    for values in broken:
        row = {"event_id": "1", "source": "/s", "type": "t.v1", "data": b"{}", "ordering_key": "a", **values}
        await execute(engine, insert(OUTBOX).values(row))
    await place(engine, 2, subject="a")

    async with arriving(url) as arrived, Relay(engine, url=url) as relay:
        await relayed(engine)
        await until(lambda: relay.lag is not None and arrived.orders == [1, 2])
        assert not any("wait" in problem for problem in relay.problems())
    found = await set_aside(engine, limit=100)

    assert len(found) == 1 + len(broken)
    assert found[0].error == (
        "it has 1001 bytes, and the broker takes 1000: keep large things elsewhere and send a reference"
    )
    assert caplog.text.count("can never be published, it is set aside") == len(found)


async def test_what_was_set_aside_is_tried_again_once_it_is_mended(engine: AsyncEngine) -> None:
    url = new_broker()
    await place(engine, 1, 2)
    await execute(engine, update(OUTBOX).values(extensions="{"))
    async with arriving(url) as arrived, Relay(engine, url=url):
        await relayed(engine)
        first, second = await set_aside(engine, limit=10)
        await execute(engine, update(OUTBOX).values(extensions="{}"))

        assert await try_again(engine, [first.id]) == 1
        await until(lambda: arrived.orders == [1])
        assert await try_again(engine) == 1
        await until(lambda: arrived.orders == [1, 2])
        assert await try_again(engine) == 0

    assert second.id > first.id


async def test_a_read_holds_no_more_than_the_largest_message_and_a_few(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eventbus.outbox.sql.MOST_BYTES", 250)
    for size in (100, 100, 100, 5000, 100):
        await execute(
            engine, insert(OUTBOX).values(event_id="1", source="/s", type="t.v1", ordering_key="a", data=b"x" * size)
        )
    rows = Rows(engine, "me", longest_bytes=1000)

    first = await rows.waiting([0], limit=10, without_ids=(), without_keys=())
    assert [row.size for row in first] == [100, 100, 100]
    await execute(engine, update(OUTBOX).where(OUTBOX.c.id <= first[-1].id).values(published_ms=1))
    second = await rows.waiting([0], limit=10, without_ids=(), without_keys=())

    assert [(row.size, row.values["data"] is None) for row in second] == [(5000, True), (100, False)]


async def test_rows_on_their_way_are_not_read_again(engine: AsyncEngine) -> None:
    await place(engine, 1, 2, subject="a")
    await place(engine, 3, 4)
    rows = Rows(engine, "me", longest_bytes=1000)
    everything = [row.id for row in await rows.waiting(range(BUCKETS), limit=10, without_ids=(), without_keys=())]

    left = await rows.waiting(range(BUCKETS), limit=10, without_ids={everything[2]}, without_keys={"a"})

    assert [row.id for row in left] == [everything[3]]


# ── starting, waking, ending ────────────────────────────────────────────────────────────────────────────────────────


async def test_a_relay_without_tables_says_how_to_make_them(sqlite_url: str, postgresql_url: str) -> None:
    for url in (sqlite_url, postgresql_url):
        engine = open_engine(url)
        with pytest.raises(SetupError, match="eventbus store create"):
            async with Relay(engine, url=new_broker()):
                raise AssertionError
        await engine.dispose()


async def test_a_relay_on_tables_of_another_version_is_refused(engine: AsyncEngine) -> None:
    await execute(engine, update(SCHEMA).values(version=999))

    with pytest.raises(SetupError, match="are of version 999, and this eventbus needs"):
        async with Relay(engine, url=new_broker()):
            raise AssertionError


async def test_where_transactions_are_serializable_relays_publish_each_row_once(postgresql: AsyncEngine) -> None:
    url, count = new_broker(), 2000
    database = postgresql.url.database
    await execute(postgresql, text(f"ALTER DATABASE {database} SET default_transaction_isolation = 'serializable'"))
    one, other = (open_engine(url_of(postgresql)) for _ in range(2))  # with connections that know it
    await place_many(one, count, keys=40)

    async with arriving(url) as arrived, Relay(one, url=url), Relay(other, url=url):
        await relayed(postgresql)
        await until(lambda: len(arrived.envelopes) >= count)
    for engine in (one, other):
        await engine.dispose()

    assert sorted(arrived.orders) == list(range(count))
    assert all(orders == sorted(orders) for orders in arrived.by_key().values())


async def test_what_cannot_be_a_relay_is_refused() -> None:
    with pytest.raises(SetupError, match="is no AsyncEngine"):
        Relay("sqlite:///x")  # type: ignore[arg-type]  # what a checker would find
    with pytest.raises(SetupError, match="keep="):
        Relay(open_engine("sqlite:///x"), keep=timedelta(seconds=-1))
    with pytest.raises(SetupError, match="the relay is not running"):
        await Relay(open_engine("sqlite:///x")).wait()


async def test_a_relay_is_entered_once(engine: AsyncEngine) -> None:
    relay = Relay(engine, url=new_broker())
    assert relay.problems() == ["starting: no broker has answered yet"]
    async with relay:
        await until(lambda: relay.problems() == [])
    assert relay.problems() == ["stopping: no more rows are read"]

    with pytest.raises(SetupError, match="has run already"):
        async with relay:
            raise AssertionError


async def test_postgresql_wakes_the_relay_with_the_commit(
    postgresql: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_module, "POLL_TOLD_S", LONG_S)  # who is not told, waits for ever
    url = new_broker()
    async with arriving(url) as arrived, Relay(postgresql, url=url) as relay:
        await _listened(postgresql)
        await until(lambda: relay.lag is not None)

        await place(postgresql, 1)
        await until(lambda: arrived.orders == [1])

        await _end_listeners(postgresql)  # it listens anew
        await _listened(postgresql)
        await place(postgresql, 2)
        await until(lambda: arrived.orders == [1, 2])


async def test_without_a_word_from_postgresql_rows_are_found_by_asking(
    postgresql: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_module, "POLL_TOLD_S", 0.05)
    url = new_broker()
    async with arriving(url) as arrived, Relay(postgresql, url=url):
        await execute(
            postgresql, insert(OUTBOX).values(event_id="1", source="/s", type="placed.v1", data=b'{"order_id": 1}')
        )  # without a NOTIFY

        await until(lambda: arrived.orders == [1])


_LISTENERS = "FROM pg_stat_activity WHERE datname = current_database() AND query ILIKE 'LISTEN%'"


async def _listened(engine: AsyncEngine) -> None:
    async def listeners() -> object:
        async with engine.connect() as connection:
            return (await connection.execute(text(f"SELECT count(*) {_LISTENERS}"))).scalar_one()

    await until_asked(listeners, 1)


async def _end_listeners(engine: AsyncEngine) -> None:
    """Return when they have ended: one that is still to end would be taken for the next one."""
    async with engine.connect() as connection:
        await connection.execute(text(f"SELECT pg_terminate_backend(pid, 30000) {_LISTENERS}"))


async def test_a_relay_waits_for_its_database_and_goes_on(
    own_store: Callable[[str], StoreServer], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "eventbus.outbox")
    monkeypatch.setattr(relay_module, "AGAIN_S", 0.05)
    monkeypatch.setattr(relay_module, "LOOK_S", 0.2)
    server, url = own_store("postgresql"), new_broker()
    database = server.new_url()
    engine = open_engine(database)
    await create(engine)
    async with arriving(url) as arrived, Relay(engine, url=url) as relay:
        await place(engine, 1)
        await until(lambda: arrived.orders == [1])

        await asyncio.to_thread(server.kill)
        await until(lambda: any("outbox: " in problem for problem in relay.problems()))
        await asyncio.to_thread(server.start)
        await until(lambda: relay.problems() == [])
        other = open_engine(database)  # none of its connections died
        await place(other, 2)
        await until(lambda: arrived.orders[-1] == 2)
    await other.dispose()
    await engine.dispose()

    assert caplog.text.count("the relay waits for its database") == caplog.text.count("database answers again") >= 1


async def test_the_lag_is_told_and_makes_the_relay_unready(engine: AsyncEngine) -> None:
    rows = Rows(engine, "me", longest_bytes=1000)
    await place(engine, 1, 2, 3)
    await execute(engine, update(OUTBOX).where(OUTBOX.c.id == 1).values(error="broken"))
    await execute(engine, update(OUTBOX).where(OUTBOX.c.id == 2).values(created_ms=OUTBOX.c.created_ms - 600_000))

    lag = await rows.lag()
    assert (lag.rows, lag.set_aside) == (2, 1)
    assert timedelta(minutes=10) <= lag.oldest < timedelta(minutes=15)

    await Leases(engine, "somebody", lambda _: False).look()  # who does not do its work
    async with Relay(engine, url=new_broker()) as relay:
        await until(lambda: relay.lag is not None)
        (problem,) = relay.problems()
    assert problem.startswith("outbox: 2 rows wait, the oldest for 6")


@dataclass(frozen=True)
class Deps:
    engine: AsyncEngine
    relay: Relay


async def test_a_worker_tells_the_problems_of_the_relay_that_its_lifespan_yields(engine: AsyncEngine) -> None:
    url = new_broker()

    @asynccontextmanager
    async def lifespan(_: Service[Deps]) -> AsyncIterator[Deps]:
        async with Relay(engine, url=url) as relay:
            yield Deps(engine, relay)

    service = Service("shop", lifespan=lifespan)

    @service.on("placed")
    async def handle(event: Placed, context: Context[Deps]) -> None:
        context.state.relay.stop()

    async with Worker(service, url=url) as worker:
        await until(lambda: problems_of(worker) == [])
        assert "shop: relay: publishing" in probes_of(worker)
        await place(engine, 1)
        await until(lambda: any(problem.startswith("shop: relay: ") for problem in problems_of(worker)))


async def test_an_empty_outbox_has_no_lag(engine: AsyncEngine) -> None:
    lag = await Rows(engine, "me", longest_bytes=1000).lag()

    assert (lag.rows, lag.oldest, lag.set_aside) == (0, timedelta(0), 0)


async def test_what_is_old_is_deleted_a_few_at_a_time_and_what_waits_never_is(engine: AsyncEngine) -> None:
    old, rows = OUTBOX.c.created_ms - 2 * 86_400_000, Rows(engine, "me", longest_bytes=1000)
    await place_many(engine, MOST_DELETED + 20, keys=5)
    await execute(engine, update(OUTBOX).where(OUTBOX.c.id > 5).values(published_ms=old))
    await execute(
        engine, update(OUTBOX).where(OUTBOX.c.id > MOST_DELETED + 10).values(published_ms=OUTBOX.c.created_ms)
    )
    await execute(engine, update(OUTBOX).where(OUTBOX.c.id == 5).values(error="broken"))

    assert [await rows.delete_published(A_DAY) for _ in range(3)] == [MOST_DELETED, 5, 0]
    assert [row["id"] for row in await rows_of(engine)] == [1, 2, 3, 4, 5, *range(MOST_DELETED + 11, MOST_DELETED + 21)]


async def test_a_relay_forgets_what_was_published_and_handled_long_ago(engine: AsyncEngine) -> None:
    week = 8 * 86_400_000
    await place(engine, 1, 2)
    await execute(engine, update(OUTBOX).where(OUTBOX.c.id == 1).values(published_ms=OUTBOX.c.created_ms - week))
    for key, done_ms in (("old", OUTBOX.c.created_ms - week), ("new", OUTBOX.c.created_ms)):
        await execute(
            engine,
            insert(INBOX).from_select(["key", "done_ms"], select(text(f"'{key}'"), done_ms).where(OUTBOX.c.id == 2)),
        )

    async def keys() -> object:
        async with engine.connect() as connection:
            return set((await connection.execute(select(INBOX.c.key))).scalars())

    async def ids() -> object:
        return [row["id"] for row in await rows_of(engine)]

    async with Relay(engine, url=new_broker()):
        await until_asked(keys, {"new"})
        await until_asked(ids, [2])


async def test_leaving_marks_what_was_confirmed(engine: AsyncEngine) -> None:
    url = new_broker()
    async with arriving(url) as arrived:
        async with Relay(engine, url=url):
            await place_many(engine, 700, keys=7)
            await until(lambda: arrived.envelopes)
        marked = {row["event_id"] for row in await rows_of(engine) if row["published_ms"] is not None}

        assert marked == {envelope.id for envelope in arrived.envelopes}


@pytest.mark.parametrize("turns", range(6))
async def test_a_relay_that_is_left_as_rows_are_marked_ends_at_once(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, turns: int
) -> None:
    monkeypatch.setattr(relay_module, "CANCEL_AGAIN_S", LONG_S)
    monkeypatch.setattr(relay_module, "POLL_S", LONG_S)
    mark, stopped = Rows.mark, asyncio.Event()

    async def mark_and_stop(self: Rows, **what: Any) -> int:
        marked = await mark(self, **what)
        stop_in(turns)
        return marked

    def stop_in(turns: int) -> None:
        if turns:  # of the event loop: those waiting are told one after the other
            asyncio.get_running_loop().call_soon(stop_in, turns - 1)
        else:
            relay.stop()
            stopped.set()

    monkeypatch.setattr(Rows, "mark", mark_and_stop)
    engine = open_engine(sqlite_url)
    await create(engine)
    await place(engine, 1)
    relay = Relay(engine, url=new_broker())
    async with asyncio.timeout(ENDS_S), relay:
        await stopped.wait()

    assert await waiting(engine) == 0
    await engine.dispose()


async def test_a_relay_ends_though_its_database_loses_a_cancellation(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_module, "CANCEL_AGAIN_S", 0.01)
    asked = list[str]()

    def loses(what: str) -> Callable[..., Any]:
        async def ask(*_: object, **__: object) -> None:
            asked.append(what)
            try:
                await asyncio.sleep(LONG_S)
            except asyncio.CancelledError:
                if asked.count(what) == 1:
                    raise OSError from None
                raise

        return ask

    monkeypatch.setattr(Rows, "waiting", loses("rows"))
    monkeypatch.setattr(Rows, "lag", loses("lag"))
    engine = open_engine(sqlite_url)
    await create(engine)
    async with asyncio.timeout(ENDS_S), Relay(engine, url=new_broker()) as relay:
        await until(lambda: set(asked) == {"rows", "lag"})

    assert not relay.is_running
    await engine.dispose()


async def test_an_engine_of_ones_own_making_will_do(tmp_path: Path) -> None:
    from sqlalchemy.ext.asyncio import create_async_engine

    url = new_broker()
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'own.db'}")
    await create(engine)
    async with arriving(url) as arrived, Relay(engine, url=url):
        await place(engine, 1)
        await until(lambda: arrived.orders == [1])
        await relayed(engine)
        assert await waiting(engine) == 0
    await engine.dispose()
