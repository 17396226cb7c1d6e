"""The table of what differs between the broker lines, asked of each: a broker does as its line says."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel

from eventbus.transport.rabbitmq.lines import Line, delivery_count, line_of
from tests.servers import BrokerServer

DEADLINE_S = 60.0
QUORUM = {"x-queue-type": "quorum"}
CONSUMER_TIMEOUT = "[application:set_env(rabbit, Name, Value) || {{Name, Value}} <- [{}]]."
IMPATIENT = "{consumer_timeout, 1000}, {channel_tick_interval, 500}"
AS_IT_WAS = "{consumer_timeout, 1800000}, {channel_tick_interval, 60000}"


@pytest.fixture
def line(own_broker_of_every_line: BrokerServer) -> Line:
    return line_of("RabbitMQ", own_broker_of_every_line.version)


@pytest.fixture
def channel(own_broker_of_every_line: BrokerServer) -> Iterator[BlockingChannel]:
    """A channel on a virtual host with the quorum queue `work`, of delivery limit 2."""
    connection = pika.BlockingConnection(pika.URLParameters(own_broker_of_every_line.new_vhost()))
    channel = connection.channel()
    channel.confirm_delivery()
    channel.queue_declare("work", durable=True, arguments=QUORUM | {"x-delivery-limit": 2})
    yield channel
    connection.close()


@dataclass(frozen=True, slots=True)
class Got:
    """A message, and how the broker handed it out."""

    tag: int
    is_redelivered: bool
    headers: Mapping[str, object]
    body: bytes


def got(channel: BlockingChannel, queue: str = "work") -> Got:
    """The next message of *queue*, as soon as there is one."""
    until_s = time.monotonic() + DEADLINE_S
    while time.monotonic() < until_s:
        method, properties, body = channel.basic_get(queue)
        if method is not None and properties is not None and isinstance(body, bytes):
            return Got(method.delivery_tag or 0, bool(method.redelivered), properties.headers or {}, body)
        time.sleep(0.05)
    raise AssertionError(f"nothing came to {queue} within {DEADLINE_S:.0f} s")


def give_back(channel: BlockingChannel, tag: int, how: Literal["nack", "reject"]) -> None:
    if how == "nack":
        channel.basic_nack(tag, requeue=True)
    else:
        channel.basic_reject(tag, requeue=True)


@pytest.mark.parametrize("how", ["nack", "reject"])
def test_giving_back_counts_against_the_limit_as_the_table_says(
    line: Line, channel: BlockingChannel, how: Literal["nack", "reject"]
) -> None:
    channel.basic_publish("", "work", b"patient")

    for times in range(3):  # one more than the limit
        message = got(channel)
        assert delivery_count(line, message.headers, is_redelivered=message.is_redelivered) == times
        give_back(channel, message.tag, how)
    channel.basic_publish("", "work", b"next")

    counts = line.nack_counts if how == "nack" else line.reject_counts
    assert got(channel).body == (b"next" if counts else b"patient")


def test_a_late_ack_ends_the_channel_or_its_consumer_as_the_table_says(
    line: Line, channel: BlockingChannel, own_broker_of_every_line: BrokerServer
) -> None:
    ended: list[str] = []
    own_broker_of_every_line.ctl("eval", CONSUMER_TIMEOUT.format(IMPATIENT))
    try:
        late = channel.connection.channel()  # which has read how patient it is to be
        late.add_on_cancel_callback(lambda _: ended.append("consumer"))
        late.queue_declare("late", durable=True, arguments=QUORUM)
        late.basic_consume("late", lambda *_: None)
        late.basic_publish("", "late", b"never acked")
        until_s = time.monotonic() + DEADLINE_S
        while not ended and time.monotonic() < until_s:
            late.connection.process_data_events(time_limit=1)
            if late.is_closed:
                ended.append("channel")
    finally:
        own_broker_of_every_line.ctl("eval", CONSUMER_TIMEOUT.format(AS_IT_WAS))

    assert ended == ["channel" if line.ack_timeout_closes_channel else "consumer"]


def test_an_x_death_that_a_client_sent_is_believed_as_the_table_says(line: Line, channel: BlockingChannel) -> None:
    dying = {"x-message-ttl": 1, "x-dead-letter-exchange": "", "x-dead-letter-routing-key": "work"}
    channel.queue_declare("dying", durable=True, arguments=QUORUM | dying)
    death = {"queue": "work", "reason": "expired", "count": 1, "exchange": "", "routing-keys": ["work"]}
    channel.basic_publish("", "dying", b"forged", pika.BasicProperties(headers={"x-death": [death]}))
    channel.basic_publish("", "dying", b"clean")

    assert got(channel).body == (b"clean" if line.believes_sent_x_death else b"forged")


def test_the_largest_message_is_as_the_table_says(line: Line, own_broker_of_every_line: BrokerServer) -> None:
    told = own_broker_of_every_line.ctl("eval", "rabbit_misc:get_env(rabbit, max_message_size, none).")

    assert told.strip() == str(line.max_message_bytes)
