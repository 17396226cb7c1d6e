"""`eventbus run --health` under faults: `/ready` is red within 15 s, says why, and is green again without a restart."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from eventbus.message import Message
from eventbus.topology import Queue, Topology, quorum
from eventbus.transport.base import Delivery, Publication, Source
from eventbus.transport.rabbitmq import RabbitMQ
from eventbus.transport.rabbitmq.acks import Settlement
from eventbus.transport.rabbitmq.lane import LaneConsuming
from tests.programs import Program, eventbus, running
from tests.servers import BrokerServer, vhost_of

RED_S = 15.0
GREEN_S = 60.0  # a broker's restart included, on a busy computer
LOOK_AGAIN_S = 0.05

# A test cuts the store off with a file in the working directory: one that refuses, or one that hangs.
PAYMENTS = """
import asyncio, pathlib, time

import eventbus.worker
from eventbus import Event, Service, StoreError
from eventbus.idempotency import MemoryStore


class CanBeCutOff:
    def __init__(self):
        self._store = MemoryStore()

    def __getattr__(self, method):
        return getattr(self._store, method)

    async def claim(self, key, lease):
        if pathlib.Path("refuses").exists():
            raise StoreError("cut off")
        if pathlib.Path("hangs").exists():
            await asyncio.sleep(3600)
        return await self._store.claim(key, lease)


eventbus.worker.store_from_url = lambda url: CanBeCutOff()


class PaymentRequested(Event):
    how: str


payments = Service("payments")


@payments.on("payment_requested")
async def capture(event: PaymentRequested) -> None:
    print("began", event.how, flush=True)
    if event.how == "slowly":
        while not pathlib.Path("go-on").exists():
            await asyncio.sleep(0.02)
    if event.how == "blocking":
        blocks_the_loop(secret="4111" + "1111")
    print("ended", event.how, flush=True)


def blocks_the_loop(secret):
    while not pathlib.Path("go-on").exists():
        time.sleep(0.02)
"""


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker in a process of its own, and what its health says."""

    program: Program
    cwd: Path
    broker_url: str
    health_url: str

    def get(self, path: str) -> tuple[int, list[str]]:
        """The status code and the problems."""
        parts = urlsplit(self.health_url)
        with closing(http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=10)) as connection:
            connection.request("GET", path)
            response = connection.getresponse()
            answer = json.loads(response.read())
        name = path.strip("/")
        assert answer["status"] == (name if response.status == 200 else f"not {name}")
        assert bool(answer["problems"]) == (response.status == 503)
        return response.status, answer["problems"]

    def until(self, path: str, wanted: Callable[[int, list[str]], bool], within_s: float) -> float:
        """Wait until the answer is as *wanted*; the seconds that it took."""
        began_s = time.monotonic()
        while not wanted(*(last := self.get(path))):
            assert time.monotonic() - began_s < within_s, f"not within {within_s} s; last: {last}; {self.program.err}"
            time.sleep(LOOK_AGAIN_S)
        return time.monotonic() - began_s

    def is_red(self, *words: str, path: str = "/ready") -> None:
        """It is within 15 s, and one of its problems has all these words."""
        self.until(
            path, lambda status, said: status == 503 and any(all(w in p for w in words) for p in said), within_s=RED_S
        )

    def is_green(self, path: str = "/ready") -> None:
        self.until(path, lambda status, _: status == 200, within_s=GREEN_S)

    def publish(self, how: str) -> None:
        done = eventbus(
            "publish", "payment_requested", json.dumps({"how": how}), "--schemas", "shop", "--url", self.broker_url,
            cwd=self.cwd,
        )  # fmt: skip
        assert done.code == 0, done.err

    def still_works(self) -> None:
        """It handles what is published now."""
        self.publish("quickly")
        self.program.wait_for("ended quickly")


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A working directory with the module `shop`."""
    (tmp_path / "shop.py").write_text(PAYMENTS)
    return tmp_path


@contextmanager
def working(shop: Path, url: str, **variables: str) -> Iterator[Worker]:
    """A worker that is ready, on the broker at *url*."""
    words = ("run", "shop:payments", "--url", url, "--health", "127.0.0.1:0")
    with running(*words, cwd=shop, wait_for="ready\n", **variables) as program:
        worker = Worker(program, shop, url, health_url_of(program))
        worker.is_green()
        yield worker


def health_url_of(program: Program) -> str:
    program.wait_for("/live and /ready")
    found = re.search(r"^health   (http://\S+)/live and /ready$", program.out, re.MULTILINE)
    assert found, program.out
    return found[1]


@pytest.fixture
def alarming(own_broker_of_every_line: BrokerServer) -> Iterator[BrokerServer]:
    """A broker whose memory alarm a test may raise; it is over afterwards."""
    yield own_broker_of_every_line
    own_broker_of_every_line.ctl("set_vm_memory_high_watermark", "0.6")


# ── consuming ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_deleted_queue_is_red_and_green_once_it_is_declared_again(every_line: BrokerServer, shop: Path) -> None:
    url = every_line.new_vhost()
    with working(shop, url) as worker:
        every_line.api("DELETE", f"/queues/{vhost_of(url)}/events.payments")
        worker.is_red("payments: queue events.payments is not consumed: ", "cancelled the consumer")
        worker.is_green()
        worker.still_works()


def test_a_queue_that_stays_away_is_red_until_somebody_declares_it(every_line: BrokerServer, shop: Path) -> None:
    url = every_line.new_vhost()
    apply = ("topology", "apply", "shop:payments", "--url", url)
    assert eventbus(*apply, cwd=shop).code == 0
    with working(shop, url, EVENTBUS_DECLARE="never") as worker:
        every_line.api("DELETE", f"/queues/{vhost_of(url)}/events.payments.retry")
        worker.is_red("payments: queue events.payments.retry is not consumed: ", "no queue 'events.payments.retry'")
        assert worker.get("/live")[0] == 200
        assert eventbus(*apply, cwd=shop).code == 0
        worker.is_green()
        worker.still_works()


def test_a_consumer_that_the_broker_gives_up_is_red(own_broker_of_every_line: BrokerServer, shop: Path) -> None:
    """An ack that comes too late: from 4.3 on the consumer is cancelled, before that its channel closed."""
    broker = own_broker_of_every_line
    setting = "[application:set_env(rabbit, Name, Value) || {{Name, Value}} <- [{}]]."
    broker.ctl("eval", setting.format("{consumer_timeout, 1000}, {channel_tick_interval, 500}"))
    try:
        with working(shop, broker.new_vhost()) as worker:
            worker.publish("slowly")
            worker.program.wait_for("began slowly")
            worker.is_red("payments: queue events.payments is not consumed: ")
            (shop / "go-on").touch()
            worker.is_green()
            worker.still_works()
    finally:
        broker.ctl("eval", setting.format("{consumer_timeout, 1800000}, {channel_tick_interval, 60000}"))


def test_a_broker_that_is_away_is_red_for_consuming_and_publishing(
    own_broker_of_every_line: BrokerServer, shop: Path
) -> None:
    broker = own_broker_of_every_line
    with working(shop, broker.new_vhost()) as worker:
        broker.stop()
        try:
            worker.is_red("payments: queue events.payments is not consumed: ")
            worker.is_red("publishing: no connection to the broker")
            assert worker.get("/live")[0] == 200
        finally:
            broker.start()
        worker.is_green()
        worker.still_works()


async def test_a_consumer_that_is_gone_on_a_live_connection_is_missing(rabbitmq_url: str) -> None:
    topology = Topology((), (Queue("a", quorum()), Queue("b", quorum())))
    sources = [Source(queue.name, 10, lambda delivery: delivery.ack()) for queue in topology.queues]
    consumer = RabbitMQ(rabbitmq_url).consumer(sources, topology, "apply")
    assert set(consumer.missing()) == {"a", "b"}
    await consumer.start()
    try:
        assert consumer.missing() == {}
        [feed] = [task for task in asyncio.all_tasks() if task.get_name() == "eventbus feed a"]
        feed.cancel()
        await asyncio.gather(feed, return_exceptions=True)
        assert consumer.missing() == {"a": "its task has ended on a live connection"}
        await consumer.pause()
        assert consumer.missing() == {"a": "consuming pauses", "b": "consuming pauses"}
    finally:
        await consumer.close()
    assert consumer.missing() == {"a": "consuming was stopped", "b": "consuming was stopped"}


async def test_a_queue_that_a_bug_left_unserved_is_missing_and_served_again(
    rabbitmq_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Delivery] = []
    seen: list[str] = []
    settle = LaneConsuming.settle

    async def broken_once(self: LaneConsuming, batch: Sequence[Settlement]) -> None:
        if batch and len(taken) == 1:
            raise ZeroDivisionError("a bug")
        await settle(self, batch)

    def take(delivery: Delivery) -> None:
        taken.append(delivery)
        delivery.ack()

    monkeypatch.setattr(LaneConsuming, "settle", broken_once)
    topology = Topology((), (Queue("a", quorum(delivery_limit=10)),))
    transport = RabbitMQ(rabbitmq_url)
    await transport.open(topology, "apply")
    consumer = transport.consumer([Source("a", 10, take)], topology, "apply")
    await consumer.start()
    try:
        assert await transport.publish(Publication("", "a", Message({}, b"")), timeout_s=RED_S)
        async with asyncio.timeout(RED_S):
            while len(taken) < 2 or not consumer.missing():
                seen += consumer.missing().values()
                await asyncio.sleep(LOOK_AGAIN_S)
            while consumer.missing():
                seen += consumer.missing().values()
                await asyncio.sleep(LOOK_AGAIN_S)
    finally:
        await consumer.close()
        await transport.close()
    assert "the connection was lost (a bug)" in seen
    assert seen[-1].endswith("only, after: the connection was lost (a bug)")


# ── publishing ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_memory_alarm_is_red_though_nothing_is_published(alarming: BrokerServer, shop: Path) -> None:
    with working(shop, alarming.new_vhost()) as worker:
        alarming.ctl("set_vm_memory_high_watermark", "0.0000001")
        worker.is_red("publishing: the broker takes nothing in and has blocked the connection", "low on memory")
        assert worker.get("/ready")[1] == [p for p in worker.get("/ready")[1] if p.startswith("publishing: ")]
        assert worker.get("/live")[0] == 200
        alarming.ctl("set_vm_memory_high_watermark", "0.6")
        worker.is_green()
        worker.still_works()


# ── the store ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("cut_off", ["refuses", "hangs"])
def test_a_store_that_is_down_is_red_though_nothing_comes(rabbitmq_url: str, shop: Path, cut_off: str) -> None:
    with working(shop, rabbitmq_url) as worker:
        (shop / cut_off).touch()
        worker.is_red("idempotency store: ", "cut off" if cut_off == "refuses" else "no answer")
        (shop / cut_off).unlink()
        worker.is_green()
        worker.still_works()


def test_consuming_that_pauses_for_the_store_is_red(rabbitmq_url: str, shop: Path) -> None:
    with working(shop, rabbitmq_url) as worker:
        (shop / "refuses").touch()
        worker.publish("quickly")
        worker.is_red("payments: queue events.payments is not consumed: consuming pauses: the idempotency store ")
        (shop / "refuses").unlink()
        worker.is_green()
        worker.program.wait_for("ended quickly")


# ── the event loop ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_blocked_loop_is_not_live_and_the_log_says_where_it_blocks(rabbitmq_url: str, shop: Path) -> None:
    with working(shop, rabbitmq_url) as worker:
        worker.publish("blocking")
        worker.is_red("the event loop has not turned for", "shop.py:", "in blocks_the_loop", path="/live")
        worker.is_red("the event loop has not turned for")
        worker.program.wait_for("it is blocked here")
        (shop / "go-on").touch()
        worker.is_green("/live")
        worker.is_green()
        worker.program.wait_for("the event loop turns again")
        worker.still_works()

        [blocked] = [json.loads(line) for line in worker.program.err.splitlines() if "it is blocked here" in line]
    assert blocked["logger"] == "eventbus.health"
    assert "in blocks_the_loop" in blocked["stack_info"]
    assert "in capture" in blocked["stack_info"]
    assert "41111111" not in worker.program.err


# ── start and end ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_worker_that_starts_or_drains_is_live_and_not_ready(rabbitmq_url: str, shop: Path) -> None:
    with working(shop, rabbitmq_url) as worker:
        worker.publish("slowly")
        worker.program.wait_for("began slowly")
        worker.program.send(signal.SIGTERM)
        worker.is_red("stopping: nothing more is taken")
        assert worker.get("/live")[0] == 200
        (shop / "go-on").touch()
        assert worker.program.end(None).code == 0
        assert "ended slowly" in worker.program.out


def test_before_a_broker_has_answered_it_is_live_and_not_ready(shop: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"amqp://guest:guest@127.0.0.1:{silent.getsockname()[1]}/"
        with running("run", "shop:payments", "--url", url, "--health", "127.0.0.1:0", cwd=shop) as program:
            worker = Worker(program, shop, url, health_url_of(program))
            worker.is_red("starting: no broker has answered yet")
            assert worker.get("/live") == (200, [])


def test_an_address_that_is_taken_is_one_line_and_nothing_is_started(shop: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = eventbus("run", "shop:payments", "--url", "memory://", "--health", address, cwd=shop)

    assert done.code == 1
    assert done.error == f"health cannot listen at {address}: Address already in use; give another address"
    assert done.out == ""


@pytest.mark.parametrize("address", ["8081", "localhost", ":8081", "localhost:http", "127.0.0.1:70000"])
def test_what_is_no_address_is_wrong_usage(shop: Path, address: str) -> None:
    done = eventbus("run", "shop:payments", "--url", "memory://", "--health", address, cwd=shop)

    assert done.code == 2
    assert done.error == f"--health {address!r} is no HOST:PORT: give one like 127.0.0.1:8081"
