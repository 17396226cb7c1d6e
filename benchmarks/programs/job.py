"""What a measured program is told, what it measures, and how it answers. Shared by all of them, in Python.

The driver and a program speak in lines: the program says `ready`, is told `go`, says `working` once it consumes, and
ends with one line of JSON. Times are on the clock that all processes of a machine share.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PREFETCH = 300
WINDOW = 1000
KEY = "order_placed.v1"  # the routing key
MARKS = 200  # how many times at most a run's progress is noted
IDLE_S = 3.0  # a program that shares its queue has no more work
HELD_UP_S = 120.0  # nothing happens any more: something is wrong


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One measured run of one program."""

    role: Literal["publish", "handle", "both", "relay", "place", "transact", "check"]
    url: str
    events: int
    how: Literal["one", "window", "many"] = "window"
    payload: int = 420
    headers: bool = True  # the C client sends those of our messages; without them it sends less than any bus can
    rate: float | None = None  # publish so many in a second, whatever the confirms do
    latency: bool = False  # note how long each event took
    share: bool = False  # another process handles the same queue: nobody knows how many come
    idempotency: str = "memory://"  # the store's URL; none: without
    database: str = ""  # the outbox's URL
    keys: int = 1  # of the outbox's rows
    tracing: bool = False
    subscriptions: int = 1
    types: int = 0  # of the events that are published; 0: one for each subscription
    slow_every: int = 0  # every so many events one takes two seconds, the first as soon as it counts
    loop: Literal["asyncio", "uvloop"] = "asyncio"
    profile: bool = False


class Meter:
    """Counts events, and notes when."""

    def __init__(self, job: Job) -> None:
        self.expected = job.events
        self.count = 0
        self.marks: list[tuple[int, float, float]] = []  # events, time, CPU time
        self.latencies_us: list[int] = []
        self.rss_at_10000 = 0
        self.last_s = time.monotonic()
        self._step = max(1, job.events // MARKS)
        self._takes_latencies = job.latency

    def saw(self, sent_ns: int) -> None:
        """One event is handled, or confirmed."""
        self.count += 1
        if self._takes_latencies:
            self.latencies_us.append((time.monotonic_ns() - sent_ns) // 1000)
        if self.count % self._step == 0 or self.count == self.expected:
            self._mark()

    def saw_many(self, events: int) -> None:
        """So many more."""
        self.count += events
        self._mark()

    def _mark(self) -> None:
        self.last_s = time.monotonic()
        self.marks.append((self.count, self.last_s, time.process_time()))
        if not self.rss_at_10000 and self.count >= 10_000:
            self.rss_at_10000 = rss_kb()

    @property
    def is_done(self) -> bool:
        return self.count >= self.expected


def rss_kb() -> int:
    """The process's resident memory now."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def max_rss_kb() -> int:
    """The most that it ever was. (`getrusage` says what the parent had when it forked, if that was more.)"""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise RuntimeError("this system's /proc does not say how much memory a process has taken")


def job_of(arguments: Sequence[str]) -> Job:
    """What the driver asks for."""
    return Job(**json.loads(arguments[1]))


def wait_for_go() -> None:
    """Say that we are ready, and wait until we may begin."""
    print("ready", flush=True)
    if sys.stdin.readline() != "go\n":
        raise SystemExit("the driver has gone")


def say_working() -> None:
    print("working", flush=True)


def report(meter: Meter, **more: object) -> None:
    """The answer: the last line that the driver reads."""
    answer = {
        "count": meter.count,
        "marks": meter.marks,
        "latencies_us": meter.latencies_us,
        "max_rss_kb": max_rss_kb(),
        "rss_at_10000_kb": meter.rss_at_10000,
        **more,
    }
    print(json.dumps(answer), flush=True)
