"""This bus, through its public interface, with its defaults."""

# No `from __future__ import annotations`: handlers are made for classes that exist only here.
import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

from benchmarks.order import Order, lines_of, note_of
from benchmarks.programs import job as jobs
from benchmarks.programs.job import HELD_UP_S, PREFETCH, WINDOW, Job, Meter
from benchmarks.programs.looping import in_window, main, until_done
from eventbus import Bus, Envelope, Event, IdempotencyStore, Service, Worker
from eventbus.idempotency.base import Claim, Mine

SLOW_S = 2.0
SLOW = 1000  # the first slow event, where there are so many: behind those that are not measured


class OrderPlaced(Order, Event, name="order_placed"):
    """What everybody publishes, as an event of this bus."""


def event_classes(count: int) -> list[type[OrderPlaced]]:
    """As many event classes as there are subscriptions."""
    more = [
        type(f"OrderPlaced{n}", (OrderPlaced,), {"__module__": __name__}, name=f"order_placed_{n}")
        for n in range(1, count)
    ]
    return [OrderPlaced, *more]


class NoIdempotency(IdempotencyStore):
    """Remembers nothing: what the claims cost is the difference."""

    async def claim(self, key: str, lease: timedelta) -> Claim:
        return Mine("")

    async def renew(self, key: str, token: str, lease: timedelta) -> bool:
        return True

    async def complete(self, key: str, token: str, keep: timedelta) -> bool:
        return True

    async def free(self, key: str, token: str) -> bool:
        return True


class Publisher:
    """Publishes events in turn over the job's event classes."""

    def __init__(self, bus: Bus, job: Job) -> None:
        self._bus = bus
        self._classes = event_classes(job.types or job.subscriptions)
        self._lines, self._note = lines_of(job.payload), note_of(job.payload)

    def _event(self, number: int, sent_ns: int) -> OrderPlaced:
        event_class = self._classes[number % len(self._classes)]
        return event_class(number=number, sent_ns=sent_ns, lines=self._lines, note=self._note)

    def __call__(self, number: int, sent_ns: int) -> Awaitable[Envelope]:
        return self._bus.publish(self._event(number, sent_ns))

    async def many(self, numbers: Sequence[int]) -> None:
        await self._bus.publish_many([self._event(number, 0) for number in numbers])


def service_of(job: Job, meter: Meter) -> Service[Any]:
    """A service with the job's subscriptions."""
    service = Service("bench", prefetch=PREFETCH, concurrency=PREFETCH)
    slow = min(SLOW, job.slow_every // 2)
    for number, event_class in enumerate(event_classes(job.subscriptions)):

        async def handle(event: event_class) -> None:  # type: ignore[valid-type]  # made above
            meter.saw(event.sent_ns)  # type: ignore[attr-defined]
            # Counted before: it is the others that a slow one might hold up.
            if job.slow_every and event.number % job.slow_every == slow:  # type: ignore[attr-defined]
                await asyncio.sleep(SLOW_S)

        service.on(event_class, name=f"handle_{number}")(handle)
    return service


def worker_of(job: Job, meter: Meter) -> Worker:
    return Worker(service_of(job, meter), url=job.url, idempotency=job.idempotency or NoIdempotency())


def install_tracing() -> None:
    """The SDK with its batch processor, and an exporter into nothing."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

    class Nothing(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            return SpanExportResult.SUCCESS

    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(Nothing()))
    trace.set_tracer_provider(provider)


class EventBus:
    @asynccontextmanager
    async def publisher(self, job: Job) -> AsyncIterator[Publisher]:
        if job.tracing:
            install_tracing()
        async with worker_of(job, Meter(job)):
            pass  # its queues are declared
        async with Bus(job.url) as bus:
            yield Publisher(bus, job)

    @asynccontextmanager
    async def worker(self, job: Job, meter: Meter) -> AsyncIterator[None]:
        if job.tracing:
            install_tracing()
        async with worker_of(job, meter):
            yield


async def embedded(job: Job) -> None:
    """Publish and handle in one process: what a test or a demo costs per event."""
    meter = Meter(job)
    async with worker_of(job, meter), Bus(job.url) as bus:
        jobs.wait_for_go()
        await in_window(Publisher(bus, job), job, Meter(job), WINDOW)
        await until_done(meter, HELD_UP_S)
        jobs.report(meter)


if __name__ == "__main__":
    asked = jobs.job_of(sys.argv)
    if asked.role == "both":
        asyncio.run(embedded(asked))
    else:
        main(EventBus())
