"""aio-pika, the client beneath FastStream, taskiq and (for connections) this bus, as its documentation uses it."""

from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager

from aio_pika import DeliveryMode, ExchangeType, Message, connect_robust
from aio_pika.abc import AbstractExchange, AbstractIncomingMessage, AbstractQueue, AbstractRobustChannel

from benchmarks.order import Order, lines_of, note_of
from benchmarks.programs.job import KEY, PREFETCH, Job, Meter
from benchmarks.programs.looping import Publish, main


async def declare(channel: AbstractRobustChannel) -> tuple[AbstractExchange, AbstractQueue]:
    exchange = await channel.declare_exchange("bench", ExchangeType.TOPIC, durable=True)
    queue = await channel.declare_queue("bench", durable=True, arguments={"x-queue-type": "quorum"})
    await queue.bind(exchange, KEY)
    return exchange, queue


class AioPika:
    @asynccontextmanager
    async def publisher(self, job: Job) -> AsyncIterator[Publish]:
        lines, note = lines_of(job.payload), note_of(job.payload)
        async with await connect_robust(job.url) as connection:
            exchange, _ = await declare(await connection.channel(publisher_confirms=True))

            def publish(number: int, sent_ns: int) -> Awaitable[object]:
                body = Order(number=number, sent_ns=sent_ns, lines=lines, note=note).model_dump_json().encode()
                message = Message(body, content_type="application/json", delivery_mode=DeliveryMode.PERSISTENT)
                return exchange.publish(message, KEY)

            yield publish

    @asynccontextmanager
    async def worker(self, job: Job, meter: Meter) -> AsyncIterator[None]:
        async def handle(message: AbstractIncomingMessage) -> None:
            async with message.process():  # acks at its end
                meter.saw(Order.model_validate_json(message.body).sent_ns)

        async with await connect_robust(job.url) as connection:
            channel = await connection.channel()
            await channel.set_qos(prefetch_count=PREFETCH)
            _, queue = await declare(channel)
            await queue.consume(handle)
            yield


if __name__ == "__main__":
    main(AioPika())
