"""RabbitMQ's sessions under faults: what was confirmed arrives, and what cannot work is told in one line."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from eventbus.errors import SetupError, TopologyConflict, TransportError
from eventbus.message import Message
from eventbus.topology import Binding, Exchange, Names, Queue, Topology, merge, of_service, quorum, shared
from eventbus.transport.base import Declare, Delivery, NotPublished, Publication, Source, Unpublishable
from eventbus.transport.rabbitmq import RabbitMQ, publisher, session
from eventbus.transport.rabbitmq.consumer import RabbitConsumer
from eventbus.transport.rabbitmq.delivery import RabbitDelivery
from eventbus.transport.rabbitmq.feed import BEHIND
from tests.faults.ledger.proxy import Proxy
from tests.servers import BrokerServer, vhost_of, with_login

TIMEOUT_S = 90.0  # restarts of a broker included, on a busy computer


def small(**arguments: str | int) -> Topology:
    """A fanout and its queue, which is the service's own."""
    queue = Queue("work", quorum(dict(arguments), delivery_limit=1000))
    return Topology((Exchange("facts", "fanout"),), (queue,), (Binding("facts", "work", "queue", ""),))


def fact(body: bytes | str, **headers: object) -> Publication:
    return Publication("facts", "fact.v1", Message(headers, body if isinstance(body, bytes) else body.encode()))


async def eventually(condition: Callable[[], bool], what: str, timeout_s: float = TIMEOUT_S) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110  # what is waited for happens in another process
                await asyncio.sleep(0.02)
    except TimeoutError:
        pytest.fail(f"not within {timeout_s:.0f} s: {what}")


@dataclass
class Taken:
    """What a consumer was given. `acks` settles at once whatever it accepts."""

    acks: Callable[[Delivery], bool] = lambda _: True
    deliveries: list[Delivery] = field(default_factory=list)

    def __call__(self, delivery: Delivery) -> None:
        self.deliveries.append(delivery)
        if self.acks(delivery):
            delivery.ack()

    @property
    def bodies(self) -> list[str]:
        return [delivery.message.body.decode() for delivery in self.deliveries]


@asynccontextmanager
async def opened(url: str, topology: Topology, declare: Declare = "apply", **options: int) -> AsyncIterator[RabbitMQ]:
    transport = RabbitMQ(url, **options)  # type: ignore[arg-type]
    await transport.open(topology, declare)
    try:
        yield transport
    finally:
        await transport.close()


@asynccontextmanager
async def consuming(
    url: str, topology: Topology, taken: Taken, *, prefetch: int = 20, declare: Declare = "apply"
) -> AsyncIterator[RabbitConsumer]:
    consumed = [queue.name for queue in topology.queues if not queue.is_shared and not queue.name.endswith(".dead")]
    sources = [Source(queue, prefetch, taken) for queue in consumed]
    consumer = RabbitMQ(url).consumer(sources, topology, declare)
    await consumer.start()
    try:
        yield consumer
    finally:
        await consumer.close()


async def waiting_in(url: str, queue: str) -> list[str]:
    async with opened(url, Topology(()), "never") as transport, transport.browse(queue) as deliveries:
        return [delivery.message.body.decode(errors="replace") async for delivery in deliveries]


async def first_waiting_in(url: str, queue: str) -> list[str]:
    """What waits in *queue*, as soon as something does."""
    async with asyncio.timeout(TIMEOUT_S):
        while not (found := await waiting_in(url, queue)):  # noqa: ASYNC110  # another process moves it there
            await asyncio.sleep(0.1)
    return found


async def first_failure(publishes: Iterable[Awaitable[bool]]) -> None:
    """Raise the first failure, once all have ended."""
    for result in await asyncio.gather(*publishes, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


@pytest.fixture(autouse=True)
async def nothing_is_left_behind(caplog: pytest.LogCaptureFixture) -> AsyncIterator[None]:
    """No task survives, nothing complains about a task that nobody looked at, and no log has a traceback."""
    caplog.set_level(logging.DEBUG, logger="eventbus")
    before = asyncio.all_tasks()
    yield
    ours = asyncio.all_tasks() - before - {asyncio.current_task()}
    await eventually(lambda: all(task.done() for task in ours), f"these end: {ours}", 5)
    noisy = [record for record in caplog.records if record.exc_info or record.name == "asyncio"]
    assert not noisy, [record.getMessage() for record in noisy]


def logged(caplog: pytest.LogCaptureFixture, level: int, message: str) -> int:
    return sum(record.levelno == level and record.getMessage() == message for record in caplog.records)


# ── outages ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("how", ["restart", "kill"])
async def test_what_was_confirmed_is_delivered_across_an_outage_of_the_broker(
    own_broker_of_every_line: BrokerServer, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    broker = own_broker_of_every_line
    url = broker.new_vhost()
    confirmed: list[str] = []
    taken = Taken()
    is_back = asyncio.Event()

    async def publish(transport: RabbitMQ, name: str) -> None:
        for number in range(1_000_000):
            body = f"{name}-{number}"
            assert await transport.publish(fact(body), timeout_s=TIMEOUT_S)
            confirmed.append(body)
            if is_back.is_set():
                return
            await asyncio.sleep(0.005)

    async with opened(url, small()) as transport:
        if how == "kill":
            await asyncio.to_thread(broker.restart)  # a queue that was declared within a second dies with its node
        async with consuming(url, small(), taken):
            async with asyncio.TaskGroup() as publishers:
                for name in "abcdefgh":
                    publishers.create_task(publish(transport, name))
                await eventually(lambda: len(confirmed) > 200, "some are confirmed")
                await asyncio.to_thread(broker.kill if how == "kill" else broker.stop)
                await asyncio.to_thread(broker.start)
                is_back.set()
            await eventually(lambda: set(confirmed) <= set(taken.bodies), "all confirmed ones are delivered")

    assert len(confirmed) == len(set(confirmed)) > 200
    assert logged(caplog, logging.WARNING, "consuming: connection lost") == 1
    assert logged(caplog, logging.INFO, "consuming: connected again") == 1


async def test_a_connection_that_the_broker_closes_is_replaced(
    every_line: BrokerServer, caplog: pytest.LogCaptureFixture
) -> None:
    url = every_line.new_vhost()
    taken = Taken()

    async with opened(url, small()) as transport, consuming(url, small(), taken):
        await transport.publish(fact("before"), timeout_s=TIMEOUT_S)
        await asyncio.to_thread(every_line.ctl, "close_all_connections", "--vhost", vhost_of(url), "for a test")
        await transport.publish(fact("after"), timeout_s=TIMEOUT_S)
        await eventually(lambda: set(taken.bodies) == {"before", "after"}, "both are delivered")

    for what in ("publishing", "consuming"):
        assert logged(caplog, logging.WARNING, f"{what}: connection lost") == 1
        assert logged(caplog, logging.INFO, f"{what}: connected again") == 1


async def test_a_connection_that_only_we_believe_in_is_replaced_after_one_and_a_half_heartbeats(
    every_line: BrokerServer, caplog: pytest.LogCaptureFixture
) -> None:
    url, taken = every_line.new_vhost(), Taken()
    parts = urllib.parse.urlsplit(url)

    async with Proxy(parts.hostname or "127.0.0.1", parts.port or 5672) as proxy:
        via = with_login(url, "guest", "guest").replace(f":{parts.port}/", f":{proxy.own_port}/") + "?heartbeat=2"
        async with opened(via, small()) as transport, consuming(via, small(), taken):
            proxy.leave_half_open()
            await transport.publish(fact("after"), timeout_s=TIMEOUT_S)
            await eventually(lambda: taken.bodies == ["after"], "it is delivered")

    reasons = [vars(record)["why"] for record in caplog.records if "connection lost" in record.getMessage()]
    assert reasons == ["the broker has been silent for 3 s"] * 2


async def test_a_queue_that_was_deleted_is_declared_again(every_line: BrokerServer) -> None:
    url = every_line.new_vhost()
    taken = Taken()

    async with opened(url, small()) as transport, consuming(url, small(), taken):
        await transport.publish(fact("before"), timeout_s=TIMEOUT_S)
        await eventually(lambda: taken.bodies == ["before"], "the first is delivered")
        await asyncio.to_thread(every_line.api, "DELETE", f"/queues/{vhost_of(url)}/work")
        await eventually(lambda: not taken.deliveries[0].is_live, "the session ended")
        async with asyncio.timeout(TIMEOUT_S):
            while not await transport.publish(fact("after"), timeout_s=TIMEOUT_S):  # noqa: ASYNC110  # nobody tells
                await asyncio.sleep(0.02)  # no queue yet
        await eventually(lambda: taken.bodies == ["before", "after"], "the second is delivered")


async def test_a_delivery_whose_ack_comes_too_late_is_delivered_again(own_broker_of_every_line: BrokerServer) -> None:
    """Up to 4.2 the broker closes the channel, from 4.3 on it cancels the consumer: the session ends either way."""
    broker = own_broker_of_every_line
    url = broker.new_vhost()
    taken = Taken(acks=lambda delivery: delivery.count > 0)
    setting = "[application:set_env(rabbit, Name, Value) || {{Name, Value}} <- [{}]]."

    await asyncio.to_thread(
        broker.ctl, "eval", setting.format("{consumer_timeout, 1000}, {channel_tick_interval, 500}")
    )
    try:
        async with opened(url, small()) as transport, consuming(url, small(), taken):
            await transport.publish(fact("slow"), timeout_s=TIMEOUT_S)
            await eventually(lambda: len(taken.deliveries) == 2, "it is delivered again")
    finally:
        await asyncio.to_thread(
            broker.ctl, "eval", setting.format("{consumer_timeout, 1800000}, {channel_tick_interval, 60000}")
        )

    assert not taken.deliveries[0].is_live
    assert taken.deliveries[1].count >= 1


async def test_a_publish_goes_on_once_the_policy_that_bounded_its_queue_is_lifted(
    every_line: BrokerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Channels that were refused are not told by every line: a fresh one is asked."""
    monkeypatch.setattr(publisher, "REFUSED_S", 1.0)
    url = every_line.new_vhost()
    policy = f"/policies/{vhost_of(url)}/small"
    bounds = {"pattern": "^work$", "definition": {"max-length": 1, "overflow": "reject-publish"}, "apply-to": "queues"}

    async with opened(url, small(**{"x-overflow": "reject-publish"})) as transport:
        await asyncio.to_thread(every_line.api, "PUT", policy, bounds)
        fill = (transport.publish(fact("fills it"), timeout_s=0.5) for _ in range(10))
        await asyncio.gather(*fill, return_exceptions=True)
        with pytest.raises(NotPublished, match="a queue refuses it"):
            await transport.publish(fact("too many"), timeout_s=2)
        await asyncio.to_thread(every_line.api, "DELETE", policy)

        assert await transport.publish(fact("in the end"), timeout_s=TIMEOUT_S)


async def test_an_exchange_that_was_deleted_is_declared_again(every_line: BrokerServer) -> None:
    url = every_line.new_vhost()

    async with opened(url, small()) as transport:
        await asyncio.to_thread(every_line.api, "DELETE", f"/exchanges/{vhost_of(url)}/facts")

        assert await transport.publish(fact("after"), timeout_s=TIMEOUT_S)


async def test_an_exchange_that_nobody_declares_is_told(rabbitmq_url: str) -> None:
    async with opened(rabbitmq_url, small()) as transport:
        with pytest.raises(NotPublished, match="no exchange 'nowhere'") as caught:
            await transport.publish(Publication("nowhere", "k", Message({}, b"")), timeout_s=TIMEOUT_S)
        assert await transport.publish(fact("others still arrive"), timeout_s=TIMEOUT_S)

    assert not caught.value.maybe_stored
    assert not caught.value.timed_out


async def test_a_publish_waits_for_a_broker_that_is_away_until_its_deadline(own_broker: BrokerServer) -> None:
    url = own_broker.new_vhost()

    async with opened(url, small()) as transport:
        await asyncio.to_thread(own_broker.stop)
        with pytest.raises(NotPublished) as caught:
            await transport.publish(fact("in vain"), timeout_s=0.5)
        patient = asyncio.create_task(transport.publish(fact("in the end"), timeout_s=TIMEOUT_S))
        await asyncio.to_thread(own_broker.start)

        assert await patient
    assert caught.value.timed_out
    assert await waiting_in(url, "work") == ["in the end"]


async def test_a_broker_that_comes_up_within_the_time_is_waited_for(own_broker: BrokerServer) -> None:
    url = own_broker.new_vhost()
    await asyncio.to_thread(own_broker.stop)
    starting = asyncio.create_task(asyncio.to_thread(own_broker.start))

    transport = RabbitMQ(url)
    while True:
        with suppress(TransportError):
            await transport.open(small(), "apply")
            break

    assert await transport.publish(fact("hello"), timeout_s=TIMEOUT_S)
    await transport.close()
    await starting


async def test_a_broker_under_an_alarm_holds_publishes_up_to_their_deadline(own_broker: BrokerServer) -> None:
    url = own_broker.new_vhost()
    big = b"x" * 4_000_000

    async with opened(url, small()) as transport:
        await asyncio.to_thread(own_broker.ctl, "set_vm_memory_high_watermark", "0.0000001")
        try:
            with pytest.raises(NotPublished) as caught:
                await first_failure(transport.publish(fact(big), timeout_s=2) for _ in range(20))
            patient = asyncio.create_task(transport.publish(fact("in the end"), timeout_s=TIMEOUT_S))
        finally:
            await asyncio.to_thread(own_broker.ctl, "set_vm_memory_high_watermark", "0.8")
        assert await patient

    assert caught.value.timed_out


async def test_closing_does_not_wait_for_a_broker_that_reads_nothing(own_broker: BrokerServer) -> None:
    url = own_broker.new_vhost()
    transport = RabbitMQ(url)
    await transport.open(small(), "apply")
    await asyncio.to_thread(own_broker.ctl, "set_vm_memory_high_watermark", "0.0000001")
    try:
        with pytest.raises(NotPublished):
            await first_failure(transport.publish(fact(b"x" * 4_000_000), timeout_s=2) for _ in range(20))
        async with asyncio.timeout(4 * session.CLOSE_TIMEOUT_S):  # it would wait for as long as the alarm lasts
            await transport.close()
    finally:
        await asyncio.to_thread(own_broker.ctl, "set_vm_memory_high_watermark", "0.8")


async def test_a_closed_transport_publishes_nothing(rabbitmq_url: str) -> None:
    async with opened(rabbitmq_url, small()) as transport:
        pass

    with pytest.raises(NotPublished, match="closed") as caught:
        await transport.publish(fact("late"), timeout_s=TIMEOUT_S)
    assert not caught.value.maybe_stored


async def test_a_cancelled_publish_disturbs_no_other(rabbitmq_url: str) -> None:
    async with opened(rabbitmq_url, small()) as transport:
        publishes = [asyncio.create_task(transport.publish(fact(str(n)), timeout_s=TIMEOUT_S)) for n in range(200)]
        await asyncio.sleep(0)
        for publish in publishes[::2]:
            publish.cancel()
        results = await asyncio.gather(*publishes, return_exceptions=True)

        assert list(results[1::2]) == [True] * 100
        assert await transport.publish(fact("still the same connection"), timeout_s=TIMEOUT_S)


# ── refusals ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def refused(url: str, topology: Topology, declare: Declare = "apply") -> str:
    """The one line with which `open` refuses."""
    with pytest.raises(SetupError) as caught:
        await RabbitMQ(url).open(topology, declare)
    line = str(caught.value)
    assert "\n" not in line
    return line


async def test_a_wrong_password_is_told_without_it(every_line: BrokerServer) -> None:
    line = await refused(with_login(every_line.new_vhost(), "guest", "s3cret"), small())

    assert "login of user 'guest'" in line
    assert "s3cret" not in line


async def test_a_virtual_host_that_does_not_exist_is_told(every_line: BrokerServer) -> None:
    assert "no virtual host 'nope'" in await refused(every_line.url.rstrip("/") + "/nope", small())


async def test_a_virtual_host_without_access_is_told(every_line: BrokerServer) -> None:
    stranger = every_line.add_user(every_line.new_vhost())
    other = every_line.new_vhost()

    line = await refused(stranger.replace(vhost_of(stranger), vhost_of(other)), small())

    assert f"no access to the virtual host '{vhost_of(other)}'" in line


async def test_a_missing_permission_to_declare_is_told(every_line: BrokerServer) -> None:
    url = every_line.add_user(every_line.new_vhost(), configure="^$")

    assert re.search("access to exchange 'facts'.*refused.*permission", await refused(url, small()))


async def test_a_missing_permission_to_read_is_told(every_line: BrokerServer) -> None:
    url = every_line.new_vhost()
    async with opened(url, small()):
        poor = every_line.add_user(url, configure="^$", read="^$")

        with pytest.raises(SetupError, match=r"access to queue 'work'.*refused"):
            await RabbitMQ(poor).consumer([Source("work", 1, Taken())], Topology(()), "never").start()


async def test_a_consumer_that_may_not_connect_says_where_and_why(
    every_line: BrokerServer,
) -> None:
    url = every_line.new_vhost()
    limit = f"/vhost-limits/{vhost_of(url)}/max-connections"
    async with opened(url, small()) as transport:
        await asyncio.to_thread(every_line.api, "PUT", limit, {"value": 1})

        with pytest.raises(TransportError, match=r"at \S+:\d+ within 2 s .*connection limit"):
            await transport.consumer([Source("work", 1, Taken())], Topology(()), "never").start(2.0)


async def test_whoever_may_not_configure_runs_once_the_shared_part_exists(every_line: BrokerServer) -> None:
    url, names = every_line.new_vhost(), Names()
    taken = Taken()
    everything = merge([shared(names), of_service(names, "payments", ["#"])])
    async with opened(url, shared(names)):
        pass

    publisher = every_line.add_user(url, configure="^$", write="^events$", read="^$")
    service = every_line.add_user(url, configure=r"^events\.payments", read=r"^events(\.|$)")
    async with opened(publisher, shared(names)) as transport, consuming(service, everything, taken):
        assert await transport.publish(Publication("events", "fact.v1", Message({}, b"hi")), timeout_s=TIMEOUT_S)
        await eventually(lambda: taken.bodies == ["hi"], "it is delivered")


async def test_a_conflict_shows_both_sides_and_the_way_out(every_line: BrokerServer) -> None:
    url = every_line.new_vhost()
    async with opened(url, small(**{"x-message-ttl": 300})):
        pass

    with pytest.raises(TopologyConflict) as caught:
        await RabbitMQ(url).open(small(**{"x-message-ttl": 200}), "apply")

    assert re.search("queue 'work'.*'x-message-ttl'.*broker holds '?300.*wants '?200", str(caught.value))
    assert "Use another namespace, or drain and delete" in str(caught.value)


async def test_verify_lists_what_is_missing_and_declares_nothing(every_line: BrokerServer) -> None:
    url = every_line.new_vhost()

    first, second = await refused(url, small(), "verify"), await refused(url, small(), "verify")

    assert "exchange 'facts', queue 'work'" in first
    assert second == first


async def test_verify_is_content_with_what_exists(every_line: BrokerServer) -> None:
    url, names = every_line.new_vhost(), Names()
    everything = merge([shared(names), of_service(names, "payments", ["#"])])
    async with opened(url, everything):
        pass

    async with opened(url, everything, "verify") as transport:
        assert await transport.publish(Publication("events", "fact.v1", Message({}, b"")), timeout_s=TIMEOUT_S)


async def test_nobody_there_is_told_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "CONNECT_TIMEOUT_S", 1.0)

    with pytest.raises(TransportError, match=r"no RabbitMQ answered at 127\.0\.0\.1:1 within 1 s"):
        await RabbitMQ("amqp://127.0.0.1:1/").open(small(), "apply")


async def test_silence_is_told_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "CONNECT_TIMEOUT_S", 1.0)
    hung_up = asyncio.Event()

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        hung_up.set()

    async with await asyncio.start_server(say_nothing, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(TransportError, match="no answer"):
            await RabbitMQ(f"amqp://127.0.0.1:{port}/").open(small(), "apply")
        await asyncio.wait_for(hung_up.wait(), 5)


async def test_tls_to_a_port_without_it_is_told(rabbitmq_url: str) -> None:
    assert "does not speak TLS" in await refused(rabbitmq_url.replace("amqp://", "amqps://"), small())


async def test_a_permission_lost_ends_a_consumer_and_fails_publishes(every_line: BrokerServer) -> None:
    owner = every_line.new_vhost()
    url = every_line.add_user(owner)
    topology = small()

    async with opened(url, topology) as transport, consuming(url, topology, Taken()) as consumer:
        every_line.set_permissions(url, configure="^$", write="^$", read="^$")
        await asyncio.to_thread(every_line.ctl, "close_all_connections", "--vhost", vhost_of(url), "for a test")
        with pytest.raises(SetupError, match="refused"):
            await asyncio.wait_for(consumer.wait(), TIMEOUT_S)
        caught = await not_published(transport, fact("in vain"))
        every_line.set_permissions(url)
        await eventually_published(transport)

    assert "refused" in caught.why
    assert not caught.timed_out


async def not_published(transport: RabbitMQ, publication: Publication) -> NotPublished:
    """Why *publication* is not published any more, as soon as that is so."""
    try:
        while True:
            await transport.publish(publication, timeout_s=TIMEOUT_S)
    except NotPublished as why:
        return why


async def eventually_published(transport: RabbitMQ) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        with suppress(NotPublished):
            await transport.publish(fact("allowed again"), timeout_s=TIMEOUT_S)
            return
        await asyncio.sleep(0.1)
    pytest.fail("never published again")


# ── messages that cannot be sent or read ──────────────────────────────────────────────────────────────────────────────


async def test_a_body_over_the_limit_is_refused_before_it_is_sent(rabbitmq_url: str) -> None:
    async with opened(rabbitmq_url, small(), max_message_bytes=1000) as transport:
        assert transport.broker.max_message_bytes == 1000
        with pytest.raises(Unpublishable, match=r"1001 bytes.*accepts 1000"):
            await transport.publish(fact(b"x" * 1001), timeout_s=TIMEOUT_S)
        assert await transport.publish(fact(b"x" * 1000), timeout_s=TIMEOUT_S)


async def test_a_body_over_the_brokers_own_limit_fails_alone(own_broker_of_every_line: BrokerServer) -> None:
    broker = own_broker_of_every_line
    url = broker.new_vhost()
    async with broker.taking_at_most(100_000), opened(url, small()) as transport:
        sizes = [100, 200_000, 100, 100, 300_000, 100]
        results = await asyncio.gather(
            *(transport.publish(fact(b"x" * size), timeout_s=TIMEOUT_S) for size in sizes), return_exceptions=True
        )
        with pytest.raises(Unpublishable):  # learned: not even sent
            await transport.publish(fact(b"x" * 100_001), timeout_s=0)

    assert [type(result) for result in results] == [bool, Unpublishable, bool, bool, Unpublishable, bool]


async def test_a_message_with_headers_that_cannot_be_read_does_not_stop_its_queue(every_line: BrokerServer) -> None:
    url, names = every_line.new_vhost(), Names()
    everything = merge([shared(names), of_service(names, "payments", ["#"])])
    taken = Taken()

    async with opened(url, everything) as transport:
        await publish_unreadable(url, "events", "fact.v1")
        await transport.publish(Publication("events", "fact.v1", Message({}, b"good")), timeout_s=TIMEOUT_S)
        async with consuming(url, everything, taken):
            await eventually(lambda: "good" in taken.bodies, "the good one behind it is delivered")
            assert await first_waiting_in(url, names.dead_queue("payments")) == ["unreadable"]


async def publish_unreadable(url: str, exchange: str, key: str) -> None:
    """Publish a message with a timestamp header in the year 36,536,598, which is correct AMQP."""
    import pika

    class Raw(pika.BasicProperties):
        def encode(self) -> list[bytes]:
            table = b"\x04whenT" + (2**60).to_bytes(8, "big")
            return [(0x2000).to_bytes(2, "big"), len(table).to_bytes(4, "big") + table]

    def send() -> None:
        connection = pika.BlockingConnection(pika.URLParameters(url))
        channel = connection.channel()
        channel.confirm_delivery()
        channel.basic_publish(exchange, key, b"unreadable", Raw(), mandatory=True)
        connection.close()

    await asyncio.to_thread(send)


# ── taking, settling, stopping ────────────────────────────────────────────────────────────────────────────────────────


async def test_after_a_stop_nothing_is_taken_and_what_was_taken_can_be_settled(every_line: BrokerServer) -> None:
    url = every_line.new_vhost()
    held = Taken(acks=lambda delivery: delivery.key == "first")

    async with opened(url, small()) as transport:
        async with consuming(url, small(), held, prefetch=10) as consumer:
            for number in range(3):
                await transport.publish(Publication("facts", "first", Message({}, str(number).encode())), timeout_s=9)
            await eventually(lambda: len(held.deliveries) == 3, "probation is over")
            for number in range(3, 30):
                await transport.publish(fact(str(number)), timeout_s=TIMEOUT_S)
            await eventually(lambda: len(held.deliveries) == 13, "the window is full")
            await consumer.stop()
            await asyncio.wait_for(consumer.wait(), 1)
            for delivery in held.deliveries[3:]:
                assert delivery.is_live
                delivery.ack()
            await transport.publish(fact("30"), timeout_s=TIMEOUT_S)
        assert len(held.deliveries) == 13
        assert not held.deliveries[-1].is_live
        assert sorted(await waiting_in(url, "work"), key=int) == [str(number) for number in range(13, 31)]


async def test_one_slow_handler_does_not_stop_the_queue(every_line: BrokerServer) -> None:
    url = every_line.new_vhost()
    taken = Taken(acks=lambda delivery: delivery.message.body != b"slow")

    async with opened(url, small()) as transport:
        async with consuming(url, small(), taken, prefetch=10):
            await transport.publish(fact("x"), timeout_s=TIMEOUT_S)
            await transport.publish(fact("y"), timeout_s=TIMEOUT_S)
            await transport.publish(fact("z"), timeout_s=TIMEOUT_S)
            await eventually(lambda: len(taken.deliveries) == 3, "probation is over")
            await transport.publish(fact("slow"), timeout_s=TIMEOUT_S)
            for number in range(100):
                await transport.publish(fact(str(number)), timeout_s=TIMEOUT_S)
            await eventually(lambda: len(taken.deliveries) == 104, "all others are delivered past it")
        assert await waiting_in(url, "work") == ["slow"]


async def test_a_pause_gives_everything_back_and_resume_takes_it_again(every_line: BrokerServer) -> None:
    url = every_line.new_vhost()
    taken = Taken(acks=lambda delivery: delivery.count > 0)

    async with opened(url, small()) as transport, consuming(url, small(), taken) as consumer:
        await transport.publish(fact("again"), timeout_s=TIMEOUT_S)
        await eventually(lambda: len(taken.deliveries) == 1, "it is delivered")
        await consumer.pause()
        assert not taken.deliveries[0].is_live
        taken.deliveries[0].ack()  # too late, and harmless
        await consumer.resume()
        await eventually(lambda: len(taken.deliveries) == 2, "it is delivered again")

    assert [delivery.count for delivery in taken.deliveries] == [0, 1]


async def test_a_rejected_message_goes_to_the_dead_letter_exchange_untouched(every_line: BrokerServer) -> None:
    url, names = every_line.new_vhost(), Names()
    everything = merge([shared(names), of_service(names, "payments", ["#"])])

    def reject(delivery: Delivery) -> None:
        delivery.reject()

    async with opened(url, everything) as transport:
        consumer = RabbitMQ(url).consumer([Source(names.queue("payments"), 10, reject)], everything, "apply")
        await consumer.start()
        message = Message({"mine": "1"}, b"\xff\x00", "application/json")
        await transport.publish(Publication("events", "fact.v1", message), timeout_s=TIMEOUT_S)
        await first_waiting_in(url, names.dead_queue("payments"))
        await consumer.close()
        async with transport.browse(names.dead_queue("payments")) as deliveries:
            found = [delivery async for delivery in deliveries]

    assert found[0].message.body == b"\xff\x00"
    assert found[0].message.headers["mine"] == "1"
    assert found[0].message.headers["x-first-death-reason"] == "rejected"


async def test_a_poison_takes_no_innocent_neighbours_with_it(every_line: BrokerServer) -> None:
    """A crash loop: the session is closed with the poison in hand, over and over, until the broker gives it up."""
    url, names = every_line.new_vhost(), Names()
    limited = of_service(names, "payments", ["#"])
    limit = {"x-delivery-limit": 5}
    own = tuple(
        Queue(q.name, {**q.arguments, **limit}) if q.name == names.queue("payments") else q for q in limited.queues
    )
    everything = merge([shared(names), Topology((), own, limited.bindings)])
    handled: list[str] = []
    crashes = 0

    async with opened(url, everything) as transport:
        for number in range(60):
            body = b"poison" if number == 20 else b"good-%d" % number
            await transport.publish(Publication("events", "fact.v1", Message({}, body)), timeout_s=TIMEOUT_S)
        given_up = asyncio.create_task(first_waiting_in(url, names.dead_queue("payments")))

        def is_done() -> bool:
            return given_up.done() and len(handled) >= 59

        while not is_done():
            crashes += await one_life(url, everything, names.queue("payments"), handled, is_done)

    assert await given_up == ["poison"]
    assert len(handled) == len(set(handled)) == 59
    assert crashes >= 5


async def one_life(url: str, topology: Topology, queue: str, handled: list[str], is_done: Callable[[], bool]) -> int:
    """Handle good ones until the poison comes; then die with it in hand. Returns 1 for a death."""
    has_crashed = asyncio.Event()

    def handle(delivery: Delivery) -> None:
        if delivery.message.body == b"poison":
            has_crashed.set()
        elif not has_crashed.is_set():
            handled.append(delivery.message.body.decode())
            delivery.ack()

    consumer = RabbitMQ(url).consumer([Source(queue, 50, handle)], topology, "apply")
    await consumer.start()
    await eventually(lambda: has_crashed.is_set() or is_done(), "it crashes or is done")
    await consumer.close()
    return int(has_crashed.is_set())


async def test_what_came_back_too_often_runs_alone_even_when_wide(every_line: BrokerServer) -> None:
    url = every_line.new_vhost()
    names = ["a", "b", "c", "slow 1", "slow 2"]
    taken = Taken(acks=lambda delivery: delivery.message.body in (b"a", b"b", b"c"))

    async with opened(url, small()) as transport, consuming(url, small(), taken, prefetch=2):
        for name in names:
            await transport.publish(fact(name), timeout_s=TIMEOUT_S)
        await eventually(lambda: taken.bodies == names, "it is wide, and its window is full")
        assert [delivery.count for delivery in taken.deliveries] == [0] * 5, "going wide gives nothing back"
        await transport.publish(fact("suspect"), timeout_s=TIMEOUT_S)
        for _ in range(3):
            assert await waiting_in(url, "work") == ["suspect"]  # taken and given back: a count each
        by_name = dict(zip(taken.bodies, taken.deliveries, strict=True))

        by_name["slow 1"].ack()
        await transport.publish(fact("next"), timeout_s=TIMEOUT_S)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await eventually(lambda: len(taken.deliveries) > 5, "nothing is handed over beside it")
        by_name["slow 2"].ack()
        await eventually(lambda: taken.bodies[5:] == ["suspect"], "the suspect runs alone")
        taken.deliveries[5].ack()
        await eventually(lambda: taken.bodies[6:] == ["next"], "then the next one comes")

    assert taken.deliveries[5].count == 3


async def test_what_comes_behind_a_slow_one_comes_on_a_fresh_channel(every_line: BrokerServer) -> None:
    url = every_line.new_vhost()
    names = [f"{n}" for n in range(2 * BEHIND)]
    later = [f"later {n}" for n in range(20)]
    taken = Taken(acks=lambda delivery: delivery.message.body != b"9")

    def channels() -> int:
        return every_line.ctl("list_channels", "vhost").split().count(vhost_of(url))

    async with opened(url, small()) as transport, consuming(url, small(), taken, prefetch=20):
        await asyncio.gather(*(transport.publish(fact(name), timeout_s=TIMEOUT_S) for name in names))
        await eventually(lambda: sorted(taken.bodies) == sorted(names), "all but one are settled")
        async with asyncio.timeout(TIMEOUT_S):
            while await asyncio.to_thread(channels) != 4:  # one publishes, one is left, one consumes, one is spare
                pass
        # All of the others may have come before the worker had moved on.
        await asyncio.gather(*(transport.publish(fact(name), timeout_s=TIMEOUT_S) for name in later))
        await eventually(lambda: sorted(taken.bodies) == sorted(names + later), "those, too")
        tags = [delivery.tag for delivery in taken.deliveries if isinstance(delivery, RabbitDelivery)]
        assert sum(tag < before for before, tag in pairwise(tags)) == 2, "first wide, then away from the slow one"

        taken.deliveries[taken.bodies.index("9")].ack()
        async with asyncio.timeout(TIMEOUT_S):
            while await asyncio.to_thread(channels) != 3:  # the one that was left is closed
                pass

    assert await waiting_in(url, "work") == [], "what was settled on a channel that was left stays settled"


async def test_a_tail_shows_what_passes_and_ends_with_the_connection(every_line: BrokerServer) -> None:
    url = every_line.new_vhost()
    seen: list[str] = []
    topology = Topology((Exchange("topics", "topic"),))

    async with opened(url, topology) as transport, transport.tail("topics", "order.*") as deliveries:
        for key in ("order.placed", "user.registered", "order.shipped"):
            await transport.publish(Publication("topics", key, Message({}, key.encode())), timeout_s=TIMEOUT_S)
        seen.append((await anext(deliveries)).message.body.decode())
        seen.append((await anext(deliveries)).message.body.decode())
        await transport.close()
        with pytest.raises(TransportError, match="was lost"):
            await anext(deliveries)

    assert seen == ["order.placed", "order.shipped"]


async def test_a_missing_queue_cannot_be_browsed(rabbitmq_url: str) -> None:
    async with opened(rabbitmq_url, small()) as transport:
        with pytest.raises(SetupError, match="no queue 'nothing'"):
            async with transport.browse("nothing"):
                pass
