"""Live and ready: what is wrong is named, a blocked loop is told, and nobody who asks waits for the loop."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import re
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from threading import Thread
from typing import TypeVar
from urllib.parse import urlsplit

import pytest

from eventbus import Context, Event, Service, SetupError, Worker
from eventbus.health import BLOCKED_S, PROBE_AGAIN_S, SILENT_S, Readiness, Watchdog, answering, served
from eventbus.message import Message
from eventbus.topology import Names, shared
from eventbus.transport.base import Publication
from eventbus.transport.memory import MemoryTransport
from eventbus.worker import Probe, probes_of, problems_of
from tests.rig import FlakyStore, until

T = TypeVar("T")

URL = "memory://test-health"
DEADLINE_S = 10.0


class Placed(Event, name="placed"):
    order_id: int = 1


def shop(handle: Callable[[], object] = lambda: None) -> Service[object]:
    made: Service[object] = Service("payments")

    @made.on("placed")
    async def capture(event: Placed, context: Context[object]) -> None:
        handle()

    return made


# ── the watchdog ──────────────────────────────────────────────────────────────────────────────────────────────────────


def block_until(condition: Callable[[], object], secret: str) -> None:
    """Keep the event loop from turning; *secret* is a local of the frame that does."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"never happened ({len(secret)})"
        time.sleep(0.002)


def wait_for(answer: Callable[[], T | None]) -> T:
    """The first answer that is one; in a thread beside the loop's."""
    deadline = time.monotonic() + DEADLINE_S
    while (found := answer()) is None:
        assert time.monotonic() < deadline, "no answer"
        time.sleep(0.002)
    return found


def told(caplog: pytest.LogCaptureFixture, words: str) -> list[logging.LogRecord]:
    return [r for r in caplog.records if r.name == "eventbus.health" and words in r.getMessage()]


async def test_a_blocked_loop_is_told_once_with_the_place_and_without_data_and_told_again_when_it_turns(
    caplog: pytest.LogCaptureFixture,
) -> None:
    answers: list[str] = []
    with Watchdog(blocked_s=0.05, look_s=0.01) as watchdog:
        assert watchdog.blockage() is None
        elsewhere = Thread(target=lambda: answers.append(wait_for(watchdog.blockage)))
        elsewhere.start()
        began_s, long_s = time.monotonic(), 0.3  # many looks
        block_until(lambda: answers and time.monotonic() - began_s > long_s, "ada lovelace".upper())
        elsewhere.join()
        await until(lambda: told(caplog, "turns again"))
        assert watchdog.blockage() is None

    [blocked] = told(caplog, "blocked here")
    assert blocked.levelno == logging.ERROR
    assert blocked.stack_info is not None
    assert "in block_until" in blocked.stack_info
    assert "test_health.py" in blocked.stack_info
    assert "ADA LOVELACE" not in blocked.stack_info
    assert "run_forever" not in blocked.stack_info  # what is above the loop has nothing to do with it
    assert len(told(caplog, "turns again")) == 1
    assert re.fullmatch(r"the event loop has not turned for \d+ s: it is at .*test_health.py:\d+ in \w+", answers[0])


async def test_each_blockage_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with Watchdog(blocked_s=0.02, look_s=0.01):
        for times in (1, 2):
            block_until(lambda times=times: len(told(caplog, "blocked here")) == times, "")  # type: ignore[misc]
            await until(lambda times=times: len(told(caplog, "turns again")) == times)  # type: ignore[misc]


async def test_a_loop_that_turns_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    looks = 0

    class Counting(Watchdog):
        def _look(self) -> None:
            nonlocal looks
            looks += 1
            super()._look()

    with Counting(blocked_s=5.0, look_s=0.001) as watchdog:
        await until(lambda: looks > 50)
        assert watchdog.blockage() is None

    assert caplog.records == []


# ── readiness ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Asking:
    """A readiness in the hands of a test, which also tells the time."""

    def __init__(self, **probes: Probe) -> None:
        self.now_s = 1000.0
        self.known: list[str] = []
        self.readiness = Readiness(lambda: self.known, lambda: probes, clock=lambda: self.now_s)

    async def look(self, after_s: float = 0.0) -> Sequence[str]:
        self.now_s += after_s
        self.readiness.look()
        for _ in range(10):  # probes that need not wait answer meanwhile
            await asyncio.sleep(0)
        return self.readiness.problems()


async def test_before_the_first_look_nothing_is_ready() -> None:
    assert Asking().readiness.problems() == ("starting",)


async def test_nothing_wrong_is_ready_and_what_is_known_is_told() -> None:
    asking = Asking()

    assert list(await asking.look()) == []
    asking.known = ["payments: queue events.payments is not consumed: gone"]
    assert list(await asking.look()) == ["payments: queue events.payments is not consumed: gone"]


async def test_what_a_probe_answers_is_told_and_asked_again_until_it_is_well() -> None:
    answers: list[str | None] = ["it does not answer", None]

    async def store() -> str | None:
        return answers.pop(0)

    asking = Asking(**{"idempotency store": store})
    await asking.look()
    assert list(await asking.look(1)) == ["idempotency store: it does not answer"]
    assert len(answers) == 1  # not asked each time
    await asking.look(PROBE_AGAIN_S)
    assert list(await asking.look(1)) == []


async def test_silence_is_an_answer_and_nothing_more_is_asked_until_it_ends() -> None:
    asked = 0
    ending = asyncio.Event()

    async def silent() -> str | None:
        nonlocal asked
        asked += 1
        await ending.wait()
        return None

    asking = Asking(publishing=silent)
    await asking.look()
    assert list(await asking.look(SILENT_S)) == []
    assert list(await asking.look(1)) == [f"publishing: no answer for {SILENT_S + 1:.0f} s"]
    await asking.look(60)
    assert asked == 1
    ending.set()
    await asking.look()
    assert list(await asking.look()) == []


async def test_a_probe_that_raises_is_told_by_the_kind_of_its_error() -> None:
    async def broken() -> str | None:
        raise ValueError("order 17 of Ada")

    asking = Asking(publishing=broken)
    await asking.look()

    assert list(await asking.look()) == ["publishing: ValueError while asking"]


async def test_a_probe_that_never_answers_is_asked_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eventbus.health.PROBE_S", 0.01)
    asked = 0

    async def lost() -> str | None:
        nonlocal asked
        asked += 1
        await asyncio.Event().wait()
        return None

    asking = Asking(publishing=lost)
    await asking.look()
    async with asyncio.timeout(DEADLINE_S):
        while list(await asking.look(PROBE_AGAIN_S)) != ["publishing: no answer within 0 s"] or asked < 3:  # noqa: ASYNC110  # time passes
            await asyncio.sleep(0.01)


async def test_what_is_known_says_more_than_what_a_probe_does() -> None:
    async def slow() -> str | None:
        return "not confirmed"

    asking = Asking(publishing=slow)
    asking.known = ["publishing: the broker is under an alarm"]
    await asking.look()

    assert list(await asking.look()) == ["publishing: the broker is under an alarm"]


async def test_a_look_that_fails_is_not_ready(caplog: pytest.LogCaptureFixture) -> None:
    def fails() -> Sequence[str]:
        raise KeyError("a bug")

    readiness = Readiness(fails, dict)
    readiness.look()

    assert list(readiness.problems()) == ["readiness cannot be told: KeyError"]
    assert told(caplog, "cannot be told")


async def test_an_old_look_is_not_believed() -> None:
    asking = Asking()
    await asking.look()
    asking.now_s += BLOCKED_S + 1

    assert list(asking.readiness.problems()) == ["the last look is 6 s old: the event loop hardly turns"]


async def test_while_looking_it_looks_and_probes_that_are_not_done_end_with_it() -> None:
    ended = asyncio.Event()

    async def endless() -> str | None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return None

    readiness = Readiness(list, lambda: {"publishing": endless})
    async with readiness.looking():
        await until(lambda: readiness.problems() == ())

    assert ended.is_set()


# ── HTTP ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def ask(url: str, path: str, method: str = "GET") -> tuple[int, object]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=DEADLINE_S)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        body = response.read()
        return response.status, json.loads(body) if body else None
    finally:
        connection.close()


async def get(url: str, path: str, method: str = "GET") -> tuple[int, object]:
    return await asyncio.to_thread(ask, url, path, method)


async def until_status(url: str, status: int) -> None:
    """Until the next look has seen it."""
    async with asyncio.timeout(DEADLINE_S):
        while (await get(url, "/ready"))[0] != status:  # noqa: ASYNC110  # what is waited for happens in other threads
            await asyncio.sleep(0.02)


def state(name: str, *problems: str) -> Mapping[str, object]:
    return {"status": name, "problems": list(problems)}


async def test_each_answer_names_what_is_wrong() -> None:
    live: list[str] = []
    ready = ["payments: größer als erlaubt"]
    async with answering("127.0.0.1", 0, live=lambda: live, ready=lambda: ready) as url:
        assert await get(url, "/live") == (200, state("live"))
        assert await get(url, "/ready?verbose") == (503, state("not ready", "payments: größer als erlaubt"))
        ready.clear()
        live.append("blocked")
        assert await get(url, "/live") == (503, state("not live", "blocked"))
        assert await get(url, "/ready") == (200, state("ready"))
        assert await get(url, "/ready", "HEAD") == (200, None)
        assert (await get(url, "/metrics"))[0] == 404


async def test_a_blocked_loop_is_answered_for() -> None:
    async with answering("127.0.0.1", 0, live=lambda: ["blocked"], ready=list) as url:
        assert ask(url, "/live") == (503, state("not live", "blocked"))  # on the loop's own thread: it does not turn


async def test_a_client_that_says_nothing_keeps_nobody_waiting() -> None:
    async with answering("127.0.0.1", 0, live=list, ready=list) as url:
        parts = urlsplit(url)
        with socket.create_connection((parts.hostname or "", parts.port or 0)):
            assert await get(url, "/live") == (200, state("live"))


async def test_an_address_that_is_taken_is_told_and_free_again_afterwards() -> None:
    async with answering("127.0.0.1", 0, live=list, ready=list) as url:
        port = urlsplit(url).port or 0
        with pytest.raises(SetupError, match=rf"cannot listen at 127.0.0.1:{port}: .*in use"):
            async with answering("127.0.0.1", port, live=list, ready=list):
                pass
    async with answering("127.0.0.1", port, live=list, ready=list) as again:
        assert again == url


async def test_ipv6_is_listened_at_where_the_host_says_so() -> None:
    async with answering("::1", 0, live=list, ready=list) as url:
        assert url.startswith("http://[::1]:")
        assert await get(url, "/live") == (200, state("live"))


# ── a worker ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def settled_problems(worker: Worker) -> list[str]:
    """What it knows, and what its probes answer."""
    answers = {name: await probe() for name, probe in probes_of(worker).items()}
    return [*problems_of(worker), *(f"{name}: {answer}" for name, answer in answers.items() if answer)]


async def test_a_worker_is_ready_from_its_start_to_its_stop() -> None:
    entering, going_on = asyncio.Event(), asyncio.Event()

    @asynccontextmanager
    async def slow(service: Service[object]) -> AsyncIterator[object]:
        entering.set()
        await going_on.wait()
        yield None

    worker = Worker(shop().replace(lifespan=slow), url=URL)
    assert problems_of(worker) == ["starting: no broker has answered yet"]
    starting = asyncio.ensure_future(worker.__aenter__())
    await entering.wait()
    assert problems_of(worker) == ["starting: lifespans are entered, then the queues are consumed"]
    assert probes_of(worker) == {}
    going_on.set()
    await starting
    assert await settled_problems(worker) == []
    assert set(probes_of(worker)) == {"publishing", "idempotency store"}
    ending = asyncio.ensure_future(worker.__aexit__(None, None, None))
    await asyncio.sleep(0)
    assert problems_of(worker) == ["stopping: nothing more is taken, handlers at work may finish"]
    assert probes_of(worker) == {}
    await ending


async def test_a_store_that_does_not_answer_and_a_pause_are_told_and_over_when_it_is_back() -> None:
    store = FlakyStore()
    async with Worker(shop(), url=URL, idempotency=store) as worker:
        store.down.add("claim")
        [problem] = await settled_problems(worker)
        assert problem.startswith("idempotency store: it does not answer: ")

        other = MemoryTransport(URL)
        await other.open(shared(Names()), "apply")
        headers = {"cloudEvents_specversion": "1.0", "cloudEvents_id": "1", "cloudEvents_source": "/t",
                   "cloudEvents_type": "placed.v1"}  # fmt: skip
        event = Message(headers, b'{"order_id": 1}', "application/json")
        await other.publish(Publication("events", "placed.v1", event), timeout_s=DEADLINE_S)
        await until(lambda: len(problems_of(worker)) == 2)
        fresh, retries = problems_of(worker)
        assert fresh.startswith("payments: queue events.payments is not consumed: consuming pauses: the idempotency ")
        assert retries.startswith("payments: queue events.payments.retry is not consumed: ")

        store.down.clear()
        await until(lambda: problems_of(worker) == [])
        assert await settled_problems(worker) == []
        await other.close()


async def test_a_broker_that_is_full_is_told() -> None:
    url = "memory://test-health-full?max_messages=2"
    async with Worker(shop(), url=url) as worker:
        other = MemoryTransport(url)
        await other.open(shared(Names()), "apply")
        for _ in range(2):
            await other.publish(Publication("", "events.payments.dead", Message({}, b"")), timeout_s=DEADLINE_S)
        assert problems_of(worker) == ["publishing: the embedded broker is full (2 messages, max_messages=2)"]
        await other.close()


async def test_a_probe_of_publishing_reaches_no_queue() -> None:
    async with Worker(shop(), url=URL) as worker:
        other = MemoryTransport(URL)
        await other.open(shared(Names()), "apply")
        assert await probes_of(worker)["publishing"]() is None
        assert other.embedded.size == 0
        await other.close()


async def test_health_is_served_from_before_the_start_to_after_the_end() -> None:
    worker = Worker(shop(), url=URL, grace=timedelta(0))
    with Watchdog() as watchdog:
        async with served(worker, watchdog, "127.0.0.1", 0) as url:
            assert (await get(url, "/ready"))[0] == 503
            async with worker:
                await until_status(url, 200)
                assert await get(url, "/live") == (200, state("live"))
            await until_status(url, 503)
            assert await get(url, "/live") == (200, state("live"))
