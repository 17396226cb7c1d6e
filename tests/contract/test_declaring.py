"""The topology is declared, compared and looked at alike on every adapter, and routes as a real broker does."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pika
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pika.adapters.blocking_connection import BlockingChannel

from eventbus.errors import SetupError, TopologyConflict
from eventbus.message import matches
from eventbus.topology import of_service, quorum
from eventbus.transport.base import Source
from tests.contract.bench import (
    AUDIT,
    COMPARES_SHARED,
    DEADLINE_S,
    KEEPS,
    MAIL,
    NAMES,
    SEES_BINDINGS,
    Bench,
    Inbox,
    content,
    publish,
    queue_of,
    say,
)
from tests.servers import BrokerServer


async def test_declaring_the_same_again_changes_nothing(bench: Bench) -> None:
    transport = await bench.open(MAIL)
    await publish(transport, [say("kept", "order_placed.v1", "events")])

    for declare in ("apply", "verify", "never"):
        await bench.open(MAIL, declare=declare)

    assert len(await content(transport, "events.mail", 1)) == 1


async def test_verify_names_a_missing_queue_and_declares_nothing(bench: Bench) -> None:
    await bench.open(MAIL)

    for _ in range(2):
        with pytest.raises(SetupError, match=r"events\.audit"):
            await bench.open(MAIL, AUDIT, declare="verify")


async def test_a_queue_with_other_arguments_is_a_conflict_that_shows_both(bench: Bench) -> None:
    await bench.open(queue_of("q", quorum(delivery_limit=3)))

    with pytest.raises(TopologyConflict) as caught:
        await bench.open(queue_of("q", quorum(delivery_limit=4)))

    for part in ("'q'", "x-delivery-limit", "3", "4"):
        assert part in str(caught.value)


async def test_a_consumer_declares_its_topology_before_it_consumes(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    inbox = Inbox()
    consumer = transport.consumer([Source("p", 10, inbox)], queue_of("p"), "apply")
    try:
        await consumer.start()
        await publish(transport, [say("hello", "p")])
        await inbox.holds(1)
    finally:
        await consumer.close()


@pytest.mark.needs(KEEPS)
async def test_what_is_stored_outlives_every_connection(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    await publish(transport, [say("kept")])
    await transport.close()

    again = await bench.open(declare="never")

    assert len(await content(again, "q", 1)) == 1


@pytest.mark.needs(SEES_BINDINGS)
async def test_verify_finds_a_missing_binding(bench: Bench) -> None:
    await bench.open(MAIL)

    with pytest.raises(SetupError, match=r"invoice_sent"):
        await bench.open(MAIL, of_service(NAMES, "mail", ["invoice_sent.*"]), declare="verify")


@pytest.mark.needs(COMPARES_SHARED)
async def test_a_shared_queue_with_other_arguments_is_a_conflict(bench: Bench) -> None:
    await bench.open(queue_of("q", quorum(delivery_limit=3), is_shared=True))

    with pytest.raises(TopologyConflict):
        await bench.open(queue_of("q", quorum(delivery_limit=4), is_shared=True))


# ── topic matching: a real broker says what is right ─────────────────────────────────────────────────────────────────


class Judge:
    """Asks a RabbitMQ which of some patterns lead a key to their queue."""

    def __init__(self, channel: BlockingChannel, most_patterns: int) -> None:
        self._channel = channel
        self._received: list[tuple[str, bytes]] = []
        self._queues = [f"judge.{number}" for number in range(most_patterns)]
        for queue in self._queues:
            channel.queue_declare(queue, exclusive=True)
            channel.basic_consume(queue, self._receiver(queue), auto_ack=True)

    def _receiver(self, queue: str) -> Callable[..., None]:
        return lambda _channel, _method, _properties, body: self._received.append((queue, body))

    def matches(self, patterns: Sequence[str], keys: Sequence[str]) -> set[tuple[str, str]]:
        """The pairs of *patterns* and *keys* that match."""
        queues = dict(zip(self._queues, patterns, strict=False))
        for queue, pattern in queues.items():
            self._channel.queue_bind(queue, "amq.topic", pattern)
        for number, key in enumerate(keys):
            self._channel.basic_publish("amq.topic", key, str(number).encode())
        for queue in queues:  # behind everything that was routed there
            self._channel.basic_publish("", queue, b"end")
        until_s = time.monotonic() + DEADLINE_S
        while sum(body == b"end" for _, body in self._received) < len(queues):
            assert time.monotonic() < until_s, "the broker did not deliver"
            self._channel.connection.process_data_events(time_limit=DEADLINE_S)
        for queue, pattern in queues.items():
            self._channel.queue_unbind(queue, "amq.topic", pattern)
        received, self._received[:] = list(self._received), []
        return {(queues[queue], keys[int(body)]) for queue, body in received if body != b"end"}


WORDS = st.sampled_from(["a", "b", "*", "#", ""])
KEYS = st.lists(WORDS, max_size=5).map(".".join)
# RabbitMQ 4.3.5 refuses a binding key with more than two '#'.
PATTERNS = KEYS.filter(lambda pattern: pattern.split(".").count("#") <= 2)


def test_topic_matching_agrees_with_rabbitmq(every_line: BrokerServer) -> None:
    connection = pika.BlockingConnection(pika.URLParameters(every_line.new_vhost()))
    judge = Judge(connection.channel(), most_patterns=8)

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
    @given(
        st.lists(PATTERNS, min_size=8, max_size=8, unique=True), st.lists(KEYS, min_size=30, max_size=30, unique=True)
    )
    def agree(patterns: list[str], keys: list[str]) -> None:
        ours = {(pattern, key) for pattern in patterns for key in keys if matches(pattern, key)}

        assert ours == judge.matches(patterns, keys)

    try:
        agree()
    finally:
        connection.close()
