"""Workers that share an idempotency store: each event once, whoever stalls, and nothing while the store is down."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta

import pytest
from sqlalchemy import text

from eventbus import Bus, Event, Service, SetupError, StoreError, Worker
from eventbus.database import METADATA, SCHEMA_VERSION, create, open_engine
from eventbus.idempotency import SharedStore, shared_store
from eventbus.idempotency.base import KEEP_DONE, LEASE, Mine
from eventbus.worker import probes_of, problems_of, run
from tests.rig import until
from tests.stores import StoreServer, make_tables

NOBODY = "127.0.0.1:1"  # where nothing listens
SHORT = timedelta(seconds=1)


class Placed(Event, name="placed"):
    order_id: int


def counting(handled: Counter[int]) -> Service[object]:
    service: Service[object] = Service("shop")

    @service.on("placed")
    async def handle(event: Placed) -> None:
        handled[event.order_id] += 1
        await asyncio.sleep(0)

    return service


def new_broker() -> str:
    return f"memory://{secrets.token_hex(4)}"


def said(caplog: pytest.LogCaptureFixture, what: str) -> int:
    return sum(what in record.getMessage() for record in caplog.records)


# ── two workers ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_event_that_is_delivered_to_two_workers_of_a_service_is_handled_by_one(
    shared_store_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="eventbus.delivery")
    handled: Counter[int] = Counter()
    one, other = new_broker(), new_broker()
    async with (
        Worker(counting(handled), url=one, idempotency=shared_store_url),
        Worker(counting(handled), url=other, idempotency=shared_store_url),
        Bus(one) as to_one,
        Bus(other) as to_other,
    ):
        sent = await to_one.publish_many(Placed(order_id=number) for number in range(300))
        await to_other.publish_many(sent)
        await until(lambda: said(caplog, "suppressed a duplicate") == len(sent), "each was delivered twice")

    assert handled == Counter(range(300))


async def test_a_claim_lost_by_a_stalled_loop_is_noticed_and_its_completion_does_not_count(
    shared_store_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="eventbus.delivery")
    monkeypatch.setattr("eventbus.consumer.LEASE", SHORT)
    service, url, taken_over = Service("shop"), new_broker(), threading.Event()
    runs: list[int] = []

    @service.on("placed", idempotency_key=lambda event: str(event.order_id))
    async def handle(event: Placed) -> None:
        runs.append(event.order_id)
        assert taken_over.wait(60)  # nothing of this loop turns meanwhile, no claim is renewed

    async def take_over() -> None:
        """Another worker, in a thread and a loop of its own."""
        async with shared_store(shared_store_url) as store:
            await until(lambda: runs)
            while not isinstance(claim := await store.claim("shop/handle/placed/7", LEASE), Mine):  # noqa: ASYNC110
                await asyncio.sleep(0.05)  # as a worker does, to which it was delivered as well
            assert claim.crashes == 1
            assert await store.complete("shop/handle/placed/7", claim.token, KEEP_DONE)
        taken_over.set()

    async with Worker(service, url=url, idempotency=shared_store_url), Bus(url) as bus:
        other = asyncio.create_task(asyncio.to_thread(asyncio.run, take_over()))
        await asyncio.sleep(0)
        await bus.publish(Placed(order_id=7))
        await other
        await until(lambda: said(caplog, "suppressed a duplicate"), "what the other has done is recognised")

    assert runs == [7]
    assert said(caplog, "lost its claim") == 1


# ── opened and closed by the worker ─────────────────────────────────────────────────────────────────────────────────


async def test_a_store_that_was_passed_open_stays_open(shared_store_url: str) -> None:
    handled: Counter[int] = Counter()
    url = new_broker()
    async with shared_store(shared_store_url) as store:
        async with Worker(counting(handled), url=url, idempotency=store), Bus(url) as bus:
            await bus.publish(Placed(order_id=1))
            await until(lambda: handled)

        assert isinstance(await store.claim("after the worker", LEASE), Mine)


async def test_a_store_that_was_passed_closed_is_refused(sqlite_url: str) -> None:
    with pytest.raises(SetupError, match=r"is not open: enter it first, `async with store:`, or pass its URL"):
        await Worker(counting(Counter()), url=new_broker(), idempotency=shared_store(sqlite_url)).__aenter__()


async def test_a_store_is_let_go_where_the_broker_refuses(
    shared_store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[SharedStore] = []
    open_ = SharedStore.open

    async def noted(store: SharedStore) -> None:
        opened.append(store)
        await open_(store)

    monkeypatch.setattr(SharedStore, "open", noted)
    monkeypatch.setenv("EVENTBUS_DECLARE", "verify")

    with pytest.raises(SetupError, match="EVENTBUS_DECLARE=apply"):
        await Worker(counting(Counter()), url=new_broker(), idempotency=shared_store_url).__aenter__()

    assert [store.is_open for store in opened] == [False]


async def test_a_store_and_a_broker_that_are_silent_are_waited_for_side_by_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("eventbus.idempotency.shared.OPEN_TIMEOUT_S", 3600)
    monkeypatch.setattr("eventbus.transport.rabbitmq.session.CONNECT_TIMEOUT_S", 3600)
    asked = set[str]()
    async with silent("store", asked) as store, silent("broker", asked) as broker:
        worker = Worker(counting(Counter()), url=f"amqp://{broker}/", idempotency=f"redis://{store}/0")
        entering = asyncio.create_task(worker.__aenter__())

        await until(lambda: asked == {"store", "broker"}, "both are asked, though neither has answered")

        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering


@asynccontextmanager
async def silent(name: str, asked: set[str]) -> AsyncIterator[str]:
    """The address of somebody who takes connections, notes in *asked* that one came, and never answers."""

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.add(name)
        await reader.read()  # until the other side has given up
        writer.close()

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    async with server:
        yield f"{host}:{port}"


# ── a start that cannot be ──────────────────────────────────────────────────────────────────────────────────────────


async def start(idempotency: str) -> None:
    async with asyncio.timeout(15):
        await Worker(counting(Counter()), url=new_broker(), idempotency=idempotency).__aenter__()


@pytest.mark.parametrize("url", [f"postgresql://ada:secret@{NOBODY}/shop", f"redis://ada:secret@{NOBODY}/0"])
async def test_a_store_that_is_down_at_the_start_is_an_error_without_the_password(url: str) -> None:
    with pytest.raises(StoreError, match=r"ada:\*\*\*@127\.0\.0\.1:1/.*ConnectionRefused|ada:\*\*\*@.*Connect call"):
        await start(url)


def test_a_program_whose_store_is_down_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(counting(Counter()), url=new_broker(), idempotency=f"redis://{NOBODY}/0")

    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith(f"error: redis://{NOBODY}/0 did not do it: ConnectionError: ")


@pytest.mark.parametrize("name", ["sqlite", "postgresql"])
async def test_a_database_without_tables_is_an_error_that_says_how_to_make_them(
    name: str, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue(f"{name}_url")

    with pytest.raises(SetupError, match="lacks tables of the bus: make them with `eventbus store create --url"):
        await start(url)

    await make_tables(url)
    await make_tables(url)  # as often as one likes
    async with Worker(counting(Counter()), url=new_broker(), idempotency=url):
        pass


@pytest.mark.parametrize("table", METADATA.tables)
@pytest.mark.parametrize("name", ["sqlite", "postgresql"])
async def test_a_database_that_lacks_one_table_is_found_out(
    name: str, table: str, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue(f"{name}_url")
    await make_tables(url)
    await execute(url, f"DROP TABLE {table}")

    with pytest.raises(SetupError, match="lacks tables of the bus"):
        await start(url)


@pytest.mark.parametrize("name", ["sqlite", "postgresql"])
async def test_tables_of_another_version_are_refused_and_left_alone(name: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue(f"{name}_url")
    await make_tables(url)
    await execute(url, "UPDATE eventbus_schema SET version = 999")
    what = f"are of version 999, and this eventbus needs {SCHEMA_VERSION}: .*`eventbus store create --url"

    with pytest.raises(SetupError, match=what):
        await start(url)
    with pytest.raises(SetupError, match=what):
        await make_tables(url)


async def test_tables_are_made_by_several_at_once(postgresql_url: str) -> None:
    engines = [open_engine(postgresql_url) for _ in range(5)]

    await asyncio.gather(*(create(engine) for engine in engines))

    for engine in engines:
        await engine.dispose()
    await start_and_stop(postgresql_url)


async def test_a_wrong_password_is_the_operators_to_mend(postgresql_url: str) -> None:
    with pytest.raises(SetupError, match="password authentication failed") as raised:
        await start(postgresql_url.replace("let-me-in", "wrong-one"))

    assert "wrong-one" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("mysql://ada:secret@host/shop", r"no idempotency store for 'mysql://ada:\*\*\*@host/shop': use memory://, "),
        ("sqlite://", "names no file: use sqlite:///path"),
        ("postgresql://host:port/shop", "names no database: use sqlite:///path or postgresql://"),
    ],
)
async def test_an_url_of_something_else_is_refused(url: str, what: str) -> None:
    with pytest.raises(SetupError, match=what):
        await start(url)


async def start_and_stop(idempotency: str) -> None:
    async with Worker(counting(Counter()), url=new_broker(), idempotency=idempotency):
        pass


async def execute(url: str, statement: str) -> int:
    """Return how many rows it gave."""
    engine = open_engine(url)
    try:
        async with engine.begin() as connection:
            result = await connection.execute(text(statement))
            return len(result.all()) if result.returns_rows else 0
    finally:
        await engine.dispose()


# ── a store that goes away ──────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def worker_at(store: str, handled: Counter[int]) -> AsyncIterator[tuple[Worker, Bus]]:
    url = new_broker()
    async with Worker(counting(handled), url=url, idempotency=store) as worker, Bus(url) as bus:
        yield worker, bus


async def goes_on_after(worker: Worker, bus: Bus, handled: Counter[int], back: Callable[[], Awaitable[None]]) -> None:
    """With a store that is down: nothing is run, all of it is told, and it goes on once the store is *back*."""
    await bus.publish(Placed(order_id=2))
    await until(lambda: any("consuming pauses: the idempotency store" in p for p in problems_of(worker)), "red")
    probed = await probes_of(worker)["idempotency store"]()
    assert probed is not None
    assert probed.startswith("it does not answer: ")
    assert handled == Counter({1: 1})

    await back()

    await until(lambda: handled[2], "it goes on")
    await until(lambda: not problems_of(worker), "it is ready again")
    assert await probes_of(worker)["idempotency store"]() is None
    assert handled == Counter({1: 1, 2: 1})


@pytest.mark.parametrize("name", ["postgresql", "redis"])
async def test_while_the_store_is_down_nothing_is_run_and_the_worker_is_not_ready(
    name: str, own_store: Callable[[str], StoreServer]
) -> None:
    handled: Counter[int] = Counter()
    server = await asyncio.to_thread(own_store, name)
    store = await asyncio.to_thread(server.new_url)
    await make_tables(store)
    async with worker_at(store, handled) as (worker, bus):
        await bus.publish(Placed(order_id=1), id="the first")
        await until(lambda: handled)
        await asyncio.to_thread(server.kill)

        await goes_on_after(worker, bus, handled, lambda: asyncio.to_thread(server.start))

        await bus.publish(Placed(order_id=1), id="the first")  # from before the crash
        await bus.publish(Placed(order_id=3))
        await until(lambda: handled[3])
        assert handled[1] == 1


@pytest.mark.parametrize("name", ["sqlite", "postgresql"])
async def test_a_store_whose_tables_are_gone_is_down_until_they_are_there_again(
    name: str, request: pytest.FixtureRequest
) -> None:
    handled: Counter[int] = Counter()
    store = request.getfixturevalue(f"{name}_url")
    await make_tables(store)
    async with worker_at(store, handled) as (worker, bus):
        await bus.publish(Placed(order_id=1))
        await until(lambda: handled)
        async with asyncio.timeout(30):  # what is not recorded when the table goes is done again, and rightly so
            while not await execute(store, "SELECT key FROM eventbus_keys WHERE token IS NULL"):
                pass
        await execute(store, "DROP TABLE eventbus_keys")

        await goes_on_after(worker, bus, handled, lambda: make_tables(store))
