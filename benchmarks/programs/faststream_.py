"""FastStream's RabbitBroker. Its default queue is classic and its messages are transient: both strengthened."""

from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager

from faststream.rabbit import Channel, ExchangeType, QueueType, RabbitBroker, RabbitExchange, RabbitQueue

from benchmarks.order import Order, lines_of, note_of
from benchmarks.programs.job import KEY, PREFETCH, Job, Meter
from benchmarks.programs.looping import Publish, main

EXCHANGE = RabbitExchange("bench", type=ExchangeType.TOPIC, durable=True)
QUEUE = RabbitQueue("bench", queue_type=QueueType.QUORUM, durable=True, routing_key=KEY)


def broker_of(job: Job) -> RabbitBroker:
    return RabbitBroker(job.url, default_channel=Channel(prefetch_count=PREFETCH), logger=None)


class FastStream:
    @asynccontextmanager
    async def publisher(self, job: Job) -> AsyncIterator[Publish]:
        lines, note = lines_of(job.payload), note_of(job.payload)
        async with broker_of(job) as broker:
            exchange = await broker.declare_exchange(EXCHANGE)
            queue = await broker.declare_queue(QUEUE)
            await queue.bind(exchange, KEY)

            def publish(number: int, sent_ns: int) -> Awaitable[object]:
                order = Order(number=number, sent_ns=sent_ns, lines=lines, note=note)
                published: Awaitable[object] = broker.publish(order, exchange=EXCHANGE, routing_key=KEY, persist=True)
                return published

            yield publish

    @asynccontextmanager
    async def worker(self, job: Job, meter: Meter) -> AsyncIterator[None]:
        async def handle(order: Order) -> None:
            meter.saw(order.sent_ns)

        async with broker_of(job) as broker:
            broker.subscriber(QUEUE, EXCHANGE)(handle)  # acked when the handler has ended
            await broker.start()
            yield


if __name__ == "__main__":
    main(FastStream())
