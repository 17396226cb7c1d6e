"""The loops of the programs without asyncio. Their publishes wait for the confirm: there is no window."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Protocol

from benchmarks.order import Order, lines_of, note_of
from benchmarks.programs import job as jobs
from benchmarks.programs.job import Job, Meter


class Program(Protocol):
    """One client."""

    def publisher(self, job: Job) -> Callable[[Order], object]:
        """Connect, declare the queue, and give what publishes one event."""

    def work(self, job: Job, meter: Meter, saw: Callable[[int], None]) -> None:
        """Consume until the process is ended by *saw*."""


def main(program: Program) -> None:
    """Do what the driver asks for."""
    job = jobs.job_of(sys.argv)
    if job.role == "publish":
        publish(program.publisher(job), job)
    else:
        handle(program, job)


def publish(publish_one: Callable[[Order], object], job: Job) -> None:
    lines, note = lines_of(job.payload), note_of(job.payload)
    meter = Meter(job)
    jobs.wait_for_go()
    began = time.monotonic()
    for number in range(job.events):
        if job.rate is not None:
            time.sleep(max(0.0, began + number / job.rate - time.monotonic()))
        publish_one(Order(number=number, sent_ns=time.monotonic_ns(), lines=lines, note=note))
        meter.saw(0)
    jobs.report(meter)
    leave()


def handle(program: Program, job: Job) -> None:
    meter = Meter(job)
    jobs.wait_for_go()

    def saw(sent_ns: int) -> None:
        meter.saw(sent_ns)
        if meter.count == meter.expected:
            jobs.report(meter)
            leave()

    program.work(job, meter, saw)


def leave() -> None:
    """End at once, whatever threads there are: all that was to be measured is told."""
    sys.stdout.flush()
    os._exit(0)
