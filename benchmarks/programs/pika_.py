"""pika: blocking for one by one and for handling, its SelectConnection for a window."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pika
from pika.adapters.blocking_connection import BlockingChannel
from pika.channel import Channel

from benchmarks.order import Order, lines_of, note_of
from benchmarks.programs import blocking
from benchmarks.programs import job as jobs
from benchmarks.programs.job import KEY, PREFETCH, WINDOW, Job, Meter

PERSISTENT = pika.BasicProperties(content_type="application/json", delivery_mode=2)


def channel_of(job: Job) -> BlockingChannel:
    channel = pika.BlockingConnection(pika.URLParameters(job.url)).channel()
    channel.exchange_declare("bench", "topic", durable=True)  # type: ignore[arg-type]  # its stub wants an enum
    channel.queue_declare("bench", durable=True, arguments={"x-queue-type": "quorum"})
    channel.queue_bind("bench", "bench", KEY)
    return channel


class Pika:
    def publisher(self, job: Job) -> Callable[[Order], object]:
        channel = channel_of(job)
        channel.confirm_delivery()

        def publish(order: Order) -> None:
            channel.basic_publish("bench", KEY, order.model_dump_json().encode(), PERSISTENT)

        return publish

    def work(self, job: Job, meter: Meter, saw: Callable[[int], None]) -> None:
        channel = channel_of(job)
        channel.basic_qos(prefetch_count=PREFETCH)

        def handle(_channel: object, method: pika.spec.Basic.Deliver, _properties: object, body: bytes) -> None:
            order = Order.model_validate_json(body)
            assert method.delivery_tag is not None
            channel.basic_ack(method.delivery_tag)
            saw(order.sent_ns)

        channel.basic_consume("bench", handle)
        jobs.say_working()
        channel.start_consuming()


class Window:
    """Keeps a window of publishes under way."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._lines, self._note = lines_of(job.payload), note_of(job.payload)
        self._meter = Meter(job)
        self._sent = self._confirmed = 0

    def run(self) -> None:
        channel_of(self._job).connection.close()  # it is declared
        connection = pika.SelectConnection(pika.URLParameters(self._job.url), on_open_callback=self._open)  # type: ignore[arg-type]
        connection.ioloop.start()

    def _open(self, connection: pika.SelectConnection) -> None:
        connection.channel(on_open_callback=self._opened)

    def _opened(self, channel: Channel) -> None:
        self._channel = channel
        channel.confirm_delivery(self._confirm, callback=lambda _ok: self._begin())

    def _begin(self) -> None:
        jobs.wait_for_go()
        self._fill()

    def _fill(self) -> None:
        while self._sent - self._confirmed < WINDOW and self._sent < self._job.events:
            order = Order(number=self._sent, sent_ns=0, lines=self._lines, note=self._note)
            self._channel.basic_publish("bench", KEY, order.model_dump_json().encode(), PERSISTENT)
            self._sent += 1

    def _confirm(self, frame: object) -> None:
        method: pika.spec.Basic.Ack = frame.method  # type: ignore[attr-defined]  # not in its stub
        assert isinstance(method, pika.spec.Basic.Ack), method
        confirmed = method.delivery_tag - self._confirmed if method.multiple else 1
        self._confirmed += confirmed
        for _ in range(confirmed):
            self._meter.saw(0)
        if self._confirmed == self._job.events:
            jobs.report(self._meter)
            blocking.leave()
        self._fill()


if __name__ == "__main__":
    asked = jobs.job_of(sys.argv)
    if asked.role == "publish" and asked.how == "window" and asked.rate is None:
        Window(asked).run()
    else:
        blocking.main(Pika())
