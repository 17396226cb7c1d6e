"""taskiq on aio-pika. Persistent, confirmed and on quorum queues by default; its prefetch of 10 is raised."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any

from taskiq.api import run_receiver_task
from taskiq_aio_pika import AioPikaBroker

from benchmarks.order import Order, lines_of, note_of
from benchmarks.programs.job import PREFETCH, Job, Meter
from benchmarks.programs.looping import Publish, main


def task_of(job: Job, meter: Meter) -> tuple[AioPikaBroker, Any]:
    broker = AioPikaBroker(job.url, qos=PREFETCH)

    async def handle(order: Order) -> None:
        meter.saw(order.sent_ns)

    return broker, broker.register_task(handle, task_name="handle")


class Taskiq:
    @asynccontextmanager
    async def publisher(self, job: Job) -> AsyncIterator[Publish]:
        lines, note = lines_of(job.payload), note_of(job.payload)
        broker, task = task_of(job, Meter(job))
        await broker.startup()

        def publish(number: int, sent_ns: int) -> Awaitable[object]:
            sent: Awaitable[object] = task.kiq(Order(number=number, sent_ns=sent_ns, lines=lines, note=note))
            return sent

        try:
            yield publish
        finally:
            await broker.shutdown()

    @asynccontextmanager
    async def worker(self, job: Job, meter: Meter) -> AsyncIterator[None]:
        broker, _ = task_of(job, meter)
        broker.is_worker_process = True
        await broker.startup()
        receiving = asyncio.create_task(run_receiver_task(broker, max_async_tasks=PREFETCH))
        try:
            yield
        finally:
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)
            await broker.shutdown()


if __name__ == "__main__":
    main(Taskiq())
