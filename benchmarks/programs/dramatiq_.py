"""Dramatiq, one process of its default eight threads. No confirms, classic queues by default: strengthened."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from benchmarks.order import Order
from benchmarks.programs import blocking
from benchmarks.programs import job as jobs
from benchmarks.programs.job import PREFETCH, Job, Meter

os.environ["dramatiq_queue_prefetch"] = str(PREFETCH)  # noqa: SIM112  # its name; read at import

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker


class OnQuorumQueues(RabbitmqBroker):  # type: ignore[misc]  # its package is not where types are checked
    """It has no option for the queue type."""

    def _build_queue_arguments(self, queue_name: str) -> dict[str, object]:
        return {**super()._build_queue_arguments(queue_name), "x-queue-type": "quorum"}


def actor_of(job: Job, saw: Callable[[int], None]) -> tuple[Any, Any]:
    broker = OnQuorumQueues(url=job.url, confirm_delivery=True)
    dramatiq.set_broker(broker)

    def handle(order: dict[str, object]) -> None:
        saw(Order.model_validate(order).sent_ns)

    return broker, dramatiq.actor(handle, actor_name="handle", queue_name="bench")


class OnDramatiq:
    def publisher(self, job: Job) -> Callable[[Order], object]:
        broker, actor = actor_of(job, lambda _: None)
        broker.declare_queue("bench", ensure=True)
        return lambda order: actor.send(order.model_dump(mode="json"))

    def work(self, job: Job, meter: Meter, saw: Callable[[int], None]) -> None:
        lock = threading.Lock()

        def saw_alone(sent_ns: int) -> None:  # threads count together
            with lock:
                saw(sent_ns)

        broker, _ = actor_of(job, saw_alone)
        dramatiq.Worker(broker).start()
        jobs.say_working()
        threading.Event().wait()


if __name__ == "__main__":
    blocking.main(OnDramatiq())
