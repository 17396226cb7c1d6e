"""Celery, one solo worker. It confirms nothing, acks early and on classic queues by default: strengthened."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from celery import Celery
from celery.signals import worker_ready
from kombu import Exchange, Queue

from benchmarks.order import Order
from benchmarks.programs import blocking
from benchmarks.programs import job as jobs
from benchmarks.programs.job import PREFETCH, Job, Meter


def app_of(job: Job, saw: Callable[[int], None]) -> tuple[Any, Any]:
    app = Celery("bench", broker=job.url)
    app.conf.update(
        broker_transport_options={"confirm_publish": True},
        task_acks_late=True,
        task_default_queue="bench",
        task_ignore_result=True,
        task_queues=[Queue("bench", Exchange("bench"), "bench", queue_arguments={"x-queue-type": "quorum"})],
        worker_enable_remote_control=False,
        worker_prefetch_multiplier=PREFETCH,  # times one process
        worker_redirect_stdouts=False,  # they are how we speak with the driver
    )

    def handle(order: dict[str, object]) -> None:
        saw(Order.model_validate(order).sent_ns)

    return app, app.task(name="handle")(handle)


class OnCelery:
    def publisher(self, job: Job) -> Callable[[Order], object]:
        app, task = app_of(job, lambda _: None)
        app.connection_for_write().channel()  # a broker that is not there is told now
        return lambda order: task.delay(order.model_dump(mode="json"))

    def work(self, job: Job, meter: Meter, saw: Callable[[int], None]) -> None:
        app, _ = app_of(job, saw)
        logging.disable(logging.WARNING)
        worker_ready.connect(lambda **_: jobs.say_working(), weak=False)
        app.Worker(
            pool="solo", concurrency=1, loglevel="ERROR", without_gossip=True, without_mingle=True, quiet=True
        ).start()


if __name__ == "__main__":
    blocking.main(OnCelery())
