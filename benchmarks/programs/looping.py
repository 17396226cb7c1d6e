"""The loops of the asyncio programs: the same for all, so that what differs is the client."""

from __future__ import annotations

import asyncio
import cProfile
import pstats
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, Self

from benchmarks.programs import job as jobs
from benchmarks.programs.job import HELD_UP_S, IDLE_S, WINDOW, Job, Meter

PROFILED = 25  # functions
Publish = Callable[[int, int], Awaitable[object]]  # an event's number, and when it was sent; returns once confirmed
PublishMany = Callable[[Sequence[int]], Awaitable[object]]
BATCH = 5000


class Program(Protocol):
    """One client."""

    def publisher(self, job: Job) -> AbstractAsyncContextManager[Publish]:
        """Connect, declare the queue, and give what publishes one event."""

    def worker(self, job: Job, meter: Meter) -> AbstractAsyncContextManager[object]:
        """Consume; *meter* sees each event that was handled."""


def main(program: Program) -> None:
    """Do what the driver asks for."""
    job = jobs.job_of(sys.argv)
    running = handle(program, job) if job.role == "handle" else publish(program, job)
    if job.loop == "uvloop":
        import uvloop

        uvloop.run(running)
    else:
        asyncio.run(running)


async def handle(program: Program, job: Job) -> None:
    meter = Meter(job)
    jobs.wait_for_go()
    with Profile(job) as profile:
        meter.last_s = time.monotonic()
        async with program.worker(job, meter):
            jobs.say_working()
            await until_done(meter, IDLE_S if job.share else HELD_UP_S)
    jobs.report(meter, profile=profile.rows, files=profile.files)


async def until_done(meter: Meter, idle_s: float) -> None:
    """Return when all events were seen, or when none has come for *idle_s*."""
    seen = -1
    while not meter.is_done and (seen != meter.count or time.monotonic() - meter.last_s < idle_s):
        if seen != meter.count:
            seen, meter.last_s = meter.count, time.monotonic()
        await asyncio.sleep(0.05)


async def publish(program: Program, job: Job) -> None:
    meter = Meter(job)
    async with program.publisher(job) as publish_one:
        jobs.wait_for_go()
        with Profile(job) as profile:
            if job.rate is not None:
                await paced(publish_one, job, meter)
            elif job.how == "many":
                await in_batches(publish_one, job, meter)
            else:
                await in_window(publish_one, job, meter, 1 if job.how == "one" else WINDOW)
        jobs.report(meter, profile=profile.rows, files=profile.files)


async def in_window(publish_one: Publish, job: Job, meter: Meter, window: int) -> None:
    """Keep *window* publishes under way. Tasks that each publish one after another: no client pays for new tasks."""
    numbers = iter(range(job.events))

    async def publisher() -> None:
        for number in numbers:
            await publish_one(number, 0)
            meter.saw(0)

    await all_of([publisher() for _ in range(window)])


async def in_batches(publish_one: Publish, job: Job, meter: Meter) -> None:
    """As `publish_many` of the program's publisher does it."""
    publish_many: PublishMany = publish_one.many  # type: ignore[attr-defined]  # only ours has it
    batch = min(BATCH, max(1, job.events // 4))
    for first in range(0, job.events, batch):
        numbers = range(first, min(first + batch, job.events))
        await publish_many(numbers)
        meter.saw_many(len(numbers))


async def paced(publish_one: Publish, job: Job, meter: Meter) -> None:
    """Publish at the job's rate, whatever the confirms do: a client that stalls delays what comes after, too."""
    assert job.rate is not None
    began, tasks = time.monotonic(), set[asyncio.Task[None]]()

    async def one(number: int) -> None:
        await publish_one(number, time.monotonic_ns())
        meter.saw(0)

    for number in range(job.events):
        await asyncio.sleep(max(0.0, began + number / job.rate - time.monotonic()))
        tasks.add(task := asyncio.create_task(one(number)))
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)


async def all_of(running: Sequence[Coroutine[Any, Any, None]]) -> None:
    async with asyncio.TaskGroup() as group:
        for one in running:
            group.create_task(one)


class Profile:
    """A profile of a block, if the job asks for one: each function's own share, and the files' shares."""

    def __init__(self, job: Job) -> None:
        self.rows: list[dict[str, object]] = []
        self.files: dict[str, float] = {}
        self._profile = cProfile.Profile() if job.profile else None

    def __enter__(self) -> Self:
        if self._profile is not None:
            self._profile.enable()
        return self

    def __exit__(self, *_: object) -> None:
        if self._profile is None:
            return
        self._profile.disable()
        # Own seconds by function; waiting for the network is no work.
        stats = pstats.Stats(self._profile).stats  # type: ignore[attr-defined]  # not in its stub
        own = {where: (calls, own_s) for where, (_, calls, own_s, _, _) in stats.items() if "epoll" not in where[2]}
        whole_s = sum(own_s for _, own_s in own.values())
        for (path, _, name), (calls, own_s) in sorted(own.items(), key=lambda item: -item[1][1]):
            file, share = _file(path), own_s / whole_s
            self.files[file] = self.files.get(file, 0.0) + share
            if len(self.rows) < PROFILED:
                self.rows.append({"function": f"{file} {name}", "calls": calls, "share": round(share, 4)})
        most = sorted(self.files.items(), key=lambda item: -item[1])[:PROFILED]
        self.files = {file: round(share, 4) for file, share in most}


def _file(path: str) -> str:
    """A file without the machine's folders."""
    parts = path.split("/")
    for root in ("site-packages", "benchmarks", "eventbus"):
        if root in parts[:-1]:
            start = len(parts) - 1 - parts[::-1].index(root) + (root == "site-packages")
            return "/".join(parts[start:])
    return "built in" if path in ("~", "") else "/".join(parts[-2:])
