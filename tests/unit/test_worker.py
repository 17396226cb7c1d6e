"""Starting, going on and stopping: in order, in time, and with everything left that was entered."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from eventbus import Bus, Context, Event, Service, SetupError, StoreError, TopologyConflict, TransportError, Worker
from eventbus.idempotency import IdempotencyStore, MemoryStore
from eventbus.transport.base import CONNECT_TIMEOUT_S
from eventbus.transport.memory import MemoryTransport
from eventbus.worker import run, topology_of
from tests.rig import FaultyTransport, until

URL = "memory://test-worker"
Lifespan = Callable[[Service[Any]], AbstractAsyncContextManager[str]]


class Placed(Event, name="placed"):
    order_id: int = 1


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EVENTBUS_URL", "EVENTBUS_IDEMPOTENCY", "EVENTBUS_NAMESPACE", "EVENTBUS_DECLARE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def transport(monkeypatch: pytest.MonkeyPatch) -> FaultyTransport:
    """What the worker runs on."""
    transport = FaultyTransport(MemoryTransport(URL))
    monkeypatch.setattr("eventbus.worker.from_url", lambda url, **_: transport)
    return transport


@pytest.fixture
def said() -> list[str]:
    """What happened, in order."""
    return []


def lifespan(said: list[str], *, fails_at: str = "") -> Lifespan:
    @asynccontextmanager
    async def resources(service: Service[Any]) -> AsyncIterator[str]:
        if fails_at == "start":
            raise OSError("no database")
        said.append(f"enter {service.name}")
        try:
            yield f"state of {service.name}"
        finally:
            said.append(f"leave {service.name}")
            if fails_at == "end":
                raise OSError("the database is gone")

    return resources


def service(name: str, of: Lifespan | None = None, handle: Callable[..., Any] | None = None) -> Service[str]:
    made = Service(name, lifespan=of)

    async def nothing(event: Placed, context: Context[str]) -> None: ...

    made.on("placed", name="handle")(handle or nothing)
    return made


# ── lifespans ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_lifespans_are_entered_in_order_and_left_in_reverse(said: list[str]) -> None:
    async with Worker(*(service(name, lifespan(said)) for name in "abc"), url=URL):
        assert said == ["enter a", "enter b", "enter c"]

    assert said[3:] == ["leave c", "leave b", "leave a"]


async def test_what_a_lifespan_yields_is_the_state_and_is_there_before_the_first_event(said: list[str]) -> None:
    async def handle(event: Placed, context: Context[str]) -> None:
        said.append(context.state)

    shop = service("shop", lifespan(said), handle)
    async with Worker(shop, url=URL), Bus(URL) as bus:
        await bus.publish(Placed())
        await until(lambda: len(said) == 2)

    assert said == ["enter shop", "state of shop", "leave shop"]


async def test_a_service_without_a_lifespan_has_no_state(said: list[str]) -> None:
    async def handle(event: Placed, context: Context[str]) -> None:
        said.append(repr(context.state))

    async with Worker(service("shop", None, handle), url=URL), Bus(URL) as bus:
        await bus.publish(Placed())
        await until(lambda: said)

    assert said == ["None"]


async def test_a_lifespan_that_fails_has_the_others_left_and_nothing_is_consumed(
    said: list[str], transport: FaultyTransport
) -> None:
    worker = Worker(service("a", lifespan(said)), service("b", lifespan(said, fails_at="start")), url=URL)

    with pytest.raises(OSError, match="no database"):
        await worker.__aenter__()

    assert said == ["enter a", "leave a"]
    assert transport.consumers == []


async def test_a_start_that_fails_at_the_broker_leaves_the_lifespans(
    said: list[str], transport: FaultyTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(self: object, within_s: float) -> None:
        raise TopologyConflict("queue 'events.a' exists with other arguments")

    monkeypatch.setattr("tests.rig.FaultyConsumer.start", refuse)

    with pytest.raises(TopologyConflict):
        await Worker(service("a", lifespan(said)), url=URL).__aenter__()

    assert said == ["enter a", "leave a"]


async def test_a_start_whose_time_is_over_leaves_the_lifespans(
    said: list[str], transport: FaultyTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(self: object, within_s: float) -> None:
        said.append("asked")
        assert 0 < within_s < CONNECT_TIMEOUT_S, "what connecting has left of it"
        raise TransportError("nobody answered")

    monkeypatch.setattr("tests.rig.FaultyConsumer.start", hang)

    with pytest.raises(TransportError, match="nobody answered"):
        await Worker(service("a", lifespan(said)), url=URL).__aenter__()

    assert said == ["enter a", "asked", "leave a"]


async def test_lifespans_are_left_when_the_block_raises(said: list[str]) -> None:
    with pytest.raises(ZeroDivisionError):
        async with Worker(service("a", lifespan(said)), url=URL):
            raise ZeroDivisionError

    assert said == ["enter a", "leave a"]


async def test_a_lifespan_that_fails_at_the_end_is_heard_and_the_others_are_left(said: list[str]) -> None:
    with pytest.raises(OSError, match="the database is gone"):
        async with Worker(service("a", lifespan(said)), service("b", lifespan(said, fails_at="end")), url=URL):
            pass

    assert said[2:] == ["leave b", "leave a"]


async def test_a_lifespan_is_left_by_the_task_that_entered_it_so_that_it_may_hold_a_task_group(said: list[str]) -> None:
    @asynccontextmanager
    async def resources(service: Service[Any]) -> AsyncIterator[str]:
        entered_by = asyncio.current_task()
        async with asyncio.TaskGroup() as tasks:
            refreshing = tasks.create_task(asyncio.Event().wait())
            yield "state"
            refreshing.cancel()
        said.append(str(asyncio.current_task() is entered_by))

    async with Worker(service("a", resources), url=URL):
        pass

    assert said == ["True"]


async def test_a_background_task_of_a_lifespan_that_fails_ends_the_worker(said: list[str]) -> None:
    @asynccontextmanager
    async def resources(service: Service[Any]) -> AsyncIterator[str]:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(refresh())
            yield "state"

    async def refresh() -> None:
        raise OSError("the token cannot be refreshed")

    with pytest.raises(ExceptionGroup) as raised:
        async with Worker(service("a", resources), url=URL) as worker:
            await worker.wait()

    assert [str(error) for error in raised.value.exceptions] == ["the token cannot be refreshed"]


async def test_entering_can_be_given_up(said: list[str]) -> None:
    @asynccontextmanager
    async def slow(service: Service[Any]) -> AsyncIterator[str]:
        said.append("entered")
        try:
            await asyncio.Event().wait()
            yield ""
        finally:
            said.append("cancelled")

    entering = asyncio.create_task(Worker(service("a", slow), url=URL).__aenter__())
    await until(lambda: said == ["entered"])
    entering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await entering

    assert said == ["entered", "cancelled"]


# ── stopping ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_leaving_settles_what_was_taken_and_takes_nothing_more(transport: FaultyTransport) -> None:
    go_on = asyncio.Event()
    started: list[int] = []
    ended: list[int] = []

    async def handle(event: Placed) -> None:
        started.append(event.order_id)
        await go_on.wait()
        ended.append(event.order_id)

    async with Bus(URL) as bus:
        worker = Worker(service("a", None, handle), url=URL)
        async with worker:
            await bus.publish_many([Placed(order_id=number) for number in range(3)])
            await until(lambda: len(started) == 3)
            worker._stop()
            await until(lambda: transport.consumers[0].stops)
            await bus.publish(Placed(order_id=3))
            go_on.set()
        assert sorted(ended) == [0, 1, 2]

        async with Worker(service("a", None, handle), url=URL):
            await until(lambda: 3 in ended)


async def test_what_is_not_settled_within_the_grace_period_is_handled_by_the_next_worker(
    caplog: pytest.LogCaptureFixture,
) -> None:
    attempts: list[int] = []
    store = MemoryStore()

    async def handle(event: Placed, context: Context[str]) -> None:
        attempts.append(context.attempt)
        if len(attempts) == 1:
            await asyncio.Event().wait()

    async with Bus(URL) as bus:
        shop = service("a", None, handle)
        async with Worker(shop, url=URL, idempotency=store, grace=timedelta(milliseconds=10)):
            await bus.publish(Placed())
            await until(lambda: attempts)
        assert "the grace period ended: unsettled deliveries of a go back to the broker" in caplog.text

        async with Worker(shop, url=URL, idempotency=store):  # the claim was given back, not left to its lease
            await until(lambda: len(attempts) == 2)

    assert attempts == [1, 1]


async def test_waiting_ends_when_the_worker_has_stopped() -> None:
    async with Worker(service("a"), url=URL) as worker:
        waiting = asyncio.ensure_future(worker.wait())
        await asyncio.sleep(0)
        assert not waiting.done()
        worker._stop()
        await waiting


async def test_whoever_waits_may_give_up_and_the_worker_goes_on() -> None:
    handled: list[int] = []

    async def handle(event: Placed) -> None:
        handled.append(event.order_id)

    async with Worker(service("a", None, handle), url=URL) as worker, Bus(URL) as bus:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(worker.wait(), 0.01)
        await bus.publish(Placed(order_id=1))
        await until(lambda: handled)


async def test_a_worker_that_is_not_entered_says_so() -> None:
    with pytest.raises(SetupError, match="the worker is not running: use it inside `async with Worker"):
        await Worker(service("a"), url=URL).wait()


async def test_a_worker_runs_once() -> None:
    worker = Worker(service("a"), url=URL)
    async with worker:
        with pytest.raises(SetupError, match="this worker has run already: make a new one"):
            await worker.__aenter__()
    with pytest.raises(SetupError, match="this worker has run already"):
        await worker.__aenter__()


def test_a_negative_grace_period_cannot_be() -> None:
    with pytest.raises(SetupError, match="grace=-1 day, 23:59:59 must be zero or more"):
        Worker(service("a"), url=URL, grace=timedelta(seconds=-1))


# ── what cannot be recovered from ───────────────────────────────────────────────────────────────────────────────────

CONFLICT = TopologyConflict("queue 'events.a' exists with other arguments")


async def test_what_cannot_be_recovered_from_ends_the_worker_and_is_raised_where_it_is_waited_for(
    said: list[str], transport: FaultyTransport
) -> None:
    worker = await Worker(service("a", lifespan(said)), url=URL).__aenter__()
    transport.consumers[0].fail(CONFLICT)

    with pytest.raises(TopologyConflict):
        await worker.wait()

    assert said == ["enter a", "leave a"]


async def test_what_cannot_be_recovered_from_is_raised_when_the_block_is_left(
    transport: FaultyTransport, caplog: pytest.LogCaptureFixture
) -> None:
    worker = await Worker(service("a"), url=URL).__aenter__()
    transport.consumers[0].fail(CONFLICT)
    await until(lambda: "the worker ends: queue 'events.a' exists" in caplog.text)

    with pytest.raises(TopologyConflict):
        await worker.__aexit__(None, None, None)


async def test_an_error_of_the_block_is_not_hidden_by_the_workers(
    transport: FaultyTransport, caplog: pytest.LogCaptureFixture
) -> None:
    worker = await Worker(service("a"), url=URL).__aenter__()
    transport.consumers[0].fail(CONFLICT)
    await until(lambda: "the worker ends" in caplog.text)

    await worker.__aexit__(ZeroDivisionError, ZeroDivisionError(), None)  # which Python goes on raising


class DownOnce(MemoryStore):
    """Down for the first claim."""

    is_down = True

    async def claim(self, key: str, lease: timedelta) -> Any:
        if self.is_down:
            self.is_down = False
            raise StoreError("it does not answer")
        return await super().claim(key, lease)


async def test_a_pause_that_cannot_be_ended_ends_the_worker(transport: FaultyTransport) -> None:
    async with Bus(URL) as bus:
        worker = await Worker(service("a"), url=URL, idempotency=DownOnce()).__aenter__()
        transport.consumers[0].fails_to_resume = SetupError("the permission is gone")
        await bus.publish(Placed())

        with pytest.raises(SetupError, match="the permission is gone"):
            await asyncio.wait_for(worker.wait(), 10)


class Refusing(MemoryStore):
    """Takes every claim but those of handlers, as a store of another schema may."""

    async def claim(self, key: str, lease: timedelta) -> Any:
        if not key.startswith("eventbus/"):
            raise StoreError("no such table")
        return await super().claim(key, lease)


async def test_pauses_for_the_same_trouble_grow_and_spare_the_delivery_limit(transport: FaultyTransport) -> None:
    async with Worker(service("a"), url=URL, idempotency=Refusing()), Bus(URL) as bus:
        began = asyncio.get_running_loop().time()
        await bus.publish(Placed())
        await until(lambda: transport.consumers[0].pauses == 4)

        assert asyncio.get_running_loop().time() - began >= 0.1 + 0.2 + 0.4


async def test_nothing_is_consumed_again_behind_a_drain(transport: FaultyTransport) -> None:
    go_on, started = asyncio.Event(), asyncio.Event()
    store = DownOnce()
    store.is_down = False

    async def handle(event: Placed) -> None:
        started.set()
        await go_on.wait()

    one_at_a_time = Service[str]("a", concurrency=1)
    one_at_a_time.on("placed")(handle)
    worker = Worker(one_at_a_time, url=URL, idempotency=store)
    async with Bus(URL) as bus, worker:
        await bus.publish_many([Placed(order_id=1), Placed(order_id=2)])
        await started.wait()
        worker._stop()
        await until(lambda: transport.consumers[0].stops)
        store.is_down = True  # for the second, which was taken and waits for its turn
        go_on.set()
        await worker.wait()

    assert not store.is_down

    assert transport.consumers[0].pauses == 0
    assert transport.consumers[0].resumes == 0


# ── what it is made of ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_without_a_url_nothing_is_started(said: list[str]) -> None:
    with pytest.raises(SetupError, match="no broker"):
        await Worker(service("a", lifespan(said))).__aenter__()

    assert said == []


@pytest.mark.parametrize("store", [None, "memory://", MemoryStore()])
async def test_the_memory_store_with_a_real_broker_is_warned_of_once(
    store: str | IdempotencyStore | None, transport: FaultyTransport, caplog: pytest.LogCaptureFixture
) -> None:
    async with Worker(service("a"), url="amqp://somewhere/", idempotency=store):
        pass

    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == ["idempotency is memory://: duplicates are recognised within this process only"]


async def test_a_start_that_fails_says_why_and_warns_of_nothing_else(
    transport: FaultyTransport, caplog: pytest.LogCaptureFixture
) -> None:
    @asynccontextmanager
    async def broken(_: Service[str]) -> AsyncIterator[str]:
        raise OSError("no database")
        yield ""

    with pytest.raises(OSError, match="no database"):
        await Worker(service("a", broken), url="amqp://somewhere/").__aenter__()

    assert caplog.records == []


async def test_the_memory_store_with_the_embedded_broker_is_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    async with Worker(service("a"), url=URL):
        pass

    assert caplog.records == []


async def test_an_idempotency_store_that_there_is_not_is_told_before_anything_is_started() -> None:
    with pytest.raises(SetupError, match="no idempotency store for"):
        await Worker(service("a"), url=URL, idempotency="mysql://nowhere/").__aenter__()


async def test_the_topology_is_declared_only_as_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVENTBUS_DECLARE", "verify")

    with pytest.raises(SetupError, match="EVENTBUS_DECLARE=apply"):
        await Worker(service("a"), url=URL).__aenter__()


def test_the_topology_of_services_is_that_of_each_and_what_they_share() -> None:
    from eventbus.service import check_all
    from eventbus.topology import Names

    a, b = service("a"), Service("b")
    b.on("placed.v1", "#", name="x")(nothing)

    topology = topology_of(Names(), check_all((a, b)))

    bound = {(x.destination, x.routing_key) for x in topology.bindings if x.source == "events"}
    assert bound == {("events.a", "placed.*"), ("events.b", "placed.v1"), ("events.b", "#")}
    assert len(topology.queues) == 25 + 6


async def nothing(event: Placed) -> None: ...


async def test_what_runs_is_told_line_by_line() -> None:
    shop = service("shop")
    async with Worker(shop, url=URL, namespace="staging") as worker:
        lines = worker._describe()

    assert lines[0].startswith("broker   embedded ")
    assert lines[0].endswith(" at memory, namespace staging")
    assert lines[1] == "service  shop  (prefetch 100, concurrency 100)"
    assert lines[2].split() == (
        "handle placed.* as placed.v1; 10 attempts, 1 s × 3 up to 10 min; timeout 30 s".split()  # noqa: RUF001, SIM905
    )
    assert lines[3] == "idempotency  memory://"


# ── run ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_run_says_in_one_line_what_cannot_work_and_exits_1(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        run(service("a"), url="http://user:hunter2@host/")

    assert raised.value.code == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "error: 'http://user:***@host/' names no broker: use amqp://, amqps:// or memory://\n"


def test_run_says_which_broker_does_not_answer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class NobodyThere(FaultyTransport):
        async def open(self, *_: Any) -> None:
            raise TransportError("nobody answers at host:5672: start the broker, or correct the URL")

    monkeypatch.setattr("eventbus.worker.from_url", lambda url, **_: NobodyThere(MemoryTransport(URL)))

    with pytest.raises(SystemExit) as raised:
        run(service("a"), url="amqp://host/")

    assert raised.value.code == 1
    assert capsys.readouterr().err == "error: nobody answers at host:5672: start the broker, or correct the URL\n"


PROGRAM = """
    import asyncio, sys
    from contextlib import asynccontextmanager
    from eventbus import Bus, Event, Service, run

    class Placed(Event, name="placed"):
        pass

    @asynccontextmanager
    async def lifespan(service):
        async with Bus("memory://", source="/x") as bus:
            publishing = asyncio.create_task(publish(bus))
            yield bus
            await publishing
        print("left", flush=True)

    async def publish(bus):
        await asyncio.sleep(0.05)
        await bus.publish(Placed())

    shop = Service("shop", lifespan=lifespan)

    @shop.on("placed")
    async def handle(event: Placed) -> None:
        print("started", flush=True)
        try:
            await asyncio.sleep(float(sys.argv[1]))
        except asyncio.CancelledError:
            print("cancelled", flush=True)
            raise
        print("handled", flush=True)

    run(shop, url="memory://")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("takes_s", "signals", "end"),
    [
        ("0.3", 1, ["stopping: waiting for handlers at work (again to hurry)", "handled", "left"]),
        ("60", 2, ["stopping: waiting for handlers at work (again to hurry)", "stopping now", "cancelled", "left"]),
    ],
)
def test_a_signal_drains_and_a_second_one_hurries(
    tmp_path: Path, number: signal.Signals, takes_s: str, signals: int, end: list[str]
) -> None:
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    with subprocess.Popen([sys.executable, program, takes_s], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line.strip())
            if lines[-1] == "started" or (lines[-1].startswith("stopping:") and signals == 2):
                process.send_signal(number)
        assert process.wait(10) == 0

    assert lines[lines.index("ready") + 1 :] == ["started", *end]


STUBBORN = """
    import asyncio, sys, time
    from contextlib import asynccontextmanager
    from eventbus import Bus, Event, Service, run

    class Placed(Event, name="placed"):
        pass

    async def publish():
        async with Bus("memory://", source="/x") as bus:
            await asyncio.sleep(0.05)
            await bus.publish(Placed())

    @asynccontextmanager
    async def lifespan(service):
        publishing = asyncio.create_task(publish())
        yield
        await publishing

    shop = Service("shop", lifespan=lifespan)

    @shop.on("placed")
    async def handle(event: Placed) -> None:
        print("started", flush=True)
        if sys.argv[1] == "thread":
            await asyncio.to_thread(time.sleep, 60)
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                pass

    run(shop, url="memory://")
"""


@pytest.mark.parametrize("waits_for", ["loop", "thread"])
def test_a_handler_that_does_not_end_does_not_keep_the_process(tmp_path: Path, waits_for: str) -> None:
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(STUBBORN))
    with subprocess.Popen(
        [sys.executable, program, waits_for], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if line.startswith(("started", "stopping:")):
                process.send_signal(signal.SIGTERM)
        said = process.stderr.read()

        assert process.wait(20) == 1

    assert said.splitlines()[-1] == "error: a handler did not end, and was left behind"


STARTING = """
    import asyncio, os, signal, sys
    from contextlib import asynccontextmanager
    from eventbus import Envelope, Service, run

    @asynccontextmanager
    async def lifespan(service):
        for _ in range(int(sys.argv[1])):
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(float(sys.argv[2]))
        yield
        print("left", flush=True)

    shop = Service("shop", lifespan=lifespan)

    @shop.on("#")
    async def handle(envelope: Envelope) -> None: ...

    run(shop, url="memory://")
"""


@pytest.mark.parametrize(("signals", "takes_s", "end"), [(1, "0.1", "left"), (2, "0.1", "stopping now")])
def test_a_signal_while_it_starts_stops_it_in_order(tmp_path: Path, signals: int, takes_s: str, end: str) -> None:
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(STARTING))

    ended = subprocess.run([sys.executable, program, str(signals), takes_s], capture_output=True, text=True, timeout=20)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines()[0].startswith("stopping: ")
    assert ended.stdout.splitlines()[-1] == end
    assert "ready" not in ended.stdout


@pytest.mark.parametrize("hangs_up", [True, False])
def test_a_signal_while_the_broker_does_not_answer_ends_it(tmp_path: Path, hangs_up: bool) -> None:
    program = tmp_path / "program.py"
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"amqp://127.0.0.1:{deaf.getsockname()[1]}/"
        program.write_text(textwrap.dedent(STARTING).replace("memory://", url))
        with (
            subprocess.Popen([sys.executable, program, "0", "0"], stdout=subprocess.PIPE, text=True) as process,
            deaf.accept()[0] as connection,
        ):
            if hangs_up:  # the client sees its connection break and the cancellation at once
                connection.close()
            process.terminate()

            assert process.wait(10) == 0
