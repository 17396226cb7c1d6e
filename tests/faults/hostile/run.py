"""One run from its beginning to its count: a worker in a process of its own, a broker, and everything at once."""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pamqp import commands

from tests.faults.hostile.amqp import Connection, Raw, decode_properties
from tests.faults.hostile.count import Count, count, digest_of
from tests.faults.hostile.messages import Generator
from tests.servers import BrokerServer

SERVICES = ("everything", "orders")
WITNESS = "hostile.witness"
STEP_S = 60.0
QUIET_S = 6.0  # nothing has happened for so long: the copies that wait longest in the delay tree wait 0.5 s
PER_MESSAGE_S = 0.02  # a busy computer included
LOOK_S = 0.5
EARLY = 0.1  # the share of the messages after which memory is compared with the end
LIMIT = 1.2

Progress = Callable[[int, int], None]


@dataclass
class Worker:
    """The handling program at work."""

    process: subprocess.Popen[bytes]
    notes: Path
    log: Path

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def rss_mb(self) -> float:
        """Its resident memory."""
        return status_mb(self.process.pid, "VmRSS")

    def handled(self) -> set[str]:
        return set(self.notes.read_text().splitlines())

    def sessions_lost(self) -> int:
        return self.log.read_text(errors="replace").count("connection lost")

    def stop(self) -> int:
        """SIGTERM; its exit code."""
        self.process.terminate()
        return self.process.wait(STEP_S)


def status_mb(pid: int, name: str) -> float:
    """What /proc says about a process' memory."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise AssertionError(f"no {name} of {pid}: has it ended?")


@asynccontextmanager
async def working(url: str, module: str = "tests.faults.hostile.worker", *more: str) -> AsyncIterator[Worker]:
    """A worker that consumes; killed at the end if it is still there."""
    with tempfile.TemporaryDirectory(prefix="eventbus-hostile-") as folder:
        notes, log = Path(folder) / "notes", Path(folder) / "log"
        notes.touch()
        ours = {name: value for name, value in os.environ.items() if not name.startswith("EVENTBUS_")}
        with log.open("wb") as file:
            process = await asyncio.to_thread(
                subprocess.Popen, [sys.executable, "-m", module, "--url", url, "--into", str(notes), *more],
                env=ours, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            )  # fmt: skip
        worker = Worker(process, notes, log)
        try:
            yield worker
        finally:
            process.kill()
            process.wait()


async def until(condition: Callable[[], bool], what: str, *, within_s: float = STEP_S) -> None:
    try:
        async with asyncio.timeout(within_s):
            while not await asyncio.to_thread(condition):  # noqa: ASYNC110  # other processes bring it about
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise AssertionError(f"not within {within_s:.0f} s: {what}") from None


# ── hostile messages ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Result:
    """What became of the messages, and of the worker."""

    broker: str
    seed: int
    messages: int
    counts: tuple[Count, ...]
    is_alive: bool
    exit_code: int | None
    sessions_lost: int
    early_mb: float
    end_mb: float
    took_s: float
    problems: tuple[str, ...] = ()

    @property
    def growth(self) -> float:
        return self.end_mb / self.early_mb

    @property
    def is_good(self) -> bool:
        return (
            self.is_alive
            and self.exit_code == 0
            and all(counted.adds_up for counted in self.counts)
            and self.growth <= LIMIT
        )


async def run_hostile(
    broker: BrokerServer,
    *,
    messages: int,
    seed: int,
    quiet_s: float = QUIET_S,
    progress: Progress = lambda _done, _of: None,
) -> Result:
    """Publish *messages* to a live worker on *broker*, and count."""
    began = time.monotonic()
    url = await asyncio.to_thread(broker.new_vhost)
    async with working(url) as worker:
        with Connection(url) as connection:
            await until(lambda: "\nready" in worker.log.read_text() or not worker.is_alive, "the worker consumes")
            _bind_witness(connection)
            kinds: list[str] = []
            generated = _noting_kinds(Generator(seed).messages(messages), kinds)
            publishing = asyncio.create_task(asyncio.to_thread(connection.publish, "events", generated))
            early_mb = await _until_settled(url, worker, publishing, messages, quiet_s, progress)
            end_mb = worker.rss_mb() if worker.is_alive else 0.0
            is_alive = worker.is_alive
            lost, notes = worker.sessions_lost(), worker.handled()
            exit_code = await asyncio.to_thread(worker.stop) if is_alive else None
            counts, problems = await asyncio.to_thread(_count_all, url, kinds, notes)
            return Result(broker.line, seed, messages, counts, is_alive, exit_code, lost, early_mb, end_mb,
                          time.monotonic() - began, problems)  # fmt: skip


def _bind_witness(connection: Connection) -> None:
    """A queue that nobody consumes: what the broker gives to a consumer, whatever it made of what was sent."""
    arguments: Any = {"x-queue-type": "quorum"}
    connection.call(commands.Queue.Declare(queue=WITNESS, durable=True, arguments=arguments), commands.Queue.DeclareOk)
    bind = commands.Queue.Bind(queue=WITNESS, exchange="events", routing_key="#")
    connection.call(bind, commands.Queue.BindOk)


def _noting_kinds(messages: Iterator[tuple[str, Raw]], kinds: list[str]) -> Iterator[Raw]:
    for kind, raw in messages:
        kinds.append(kind)
        yield raw


async def _until_settled(
    url: str, worker: Worker, publishing: asyncio.Task[int], messages: int, quiet_s: float, progress: Progress
) -> float:
    """Return when nothing waits and nothing happens any more; the worker's memory after the first tenth."""
    deadline, early_mb = time.monotonic() + STEP_S + messages * PER_MESSAGE_S, 0.0
    seen, moved = (-1, -1, -1), time.monotonic()
    with Connection(url) as connection:
        while time.monotonic() < deadline and worker.is_alive:
            await asyncio.sleep(LOOK_S)
            now = await asyncio.to_thread(_look, connection, worker)
            done, waiting, _ = now
            progress(min(done, messages), messages)
            if not early_mb and done >= EARLY * messages:
                early_mb = worker.rss_mb()
            if now != seen or waiting or not publishing.done():
                seen, moved = now, time.monotonic()
            elif time.monotonic() - moved > quiet_s:
                break
    if publishing.done():
        publishing.result()
    return early_mb


def _look(connection: Connection, worker: Worker) -> tuple[int, int, int]:
    """How many messages of the first service are settled, how many wait, how much was noted."""
    noted = worker.notes.read_bytes().count(b'["everything"') if worker.notes.stat().st_size < 2**26 else 0
    dead = connection.count("events.everything.dead")
    waiting = sum(connection.count(queue) for queue in _queues())
    return noted + dead, waiting, connection.count("events.orders.dead")


def _queues() -> Iterator[str]:
    for service in SERVICES:
        yield f"events.{service}"
        yield f"events.{service}.retry"


def _count_all(url: str, kinds: list[str], notes: set[str]) -> tuple[tuple[Count, ...], tuple[str, ...]]:
    with Connection(url) as connection:
        left = {queue: connection.count(queue) for queue in (*_queues(), "events.undeliverable")}
    with Connection(url) as connection:
        sent = list(zip(kinds, connection.take_all(WITNESS), strict=True))
    problems = [f"{number} left in {queue}" for queue, number in left.items() if number]
    counts = []
    for service in SERVICES:
        mine = [(kind, raw) for kind, raw in sent if service == "everything" or _is_order(raw.key)]
        dead: dict[str, Counter[str]] = {}
        samples: dict[str, Raw] = {}
        with Connection(url) as connection:
            for raw in connection.take_all(f"events.{service}.dead"):
                dead.setdefault(digest := digest_of(raw), Counter())[_reason(raw)] += 1
                samples[digest] = raw
        waits = sum(number for queue, number in left.items() if queue.startswith((f"events.{service}", "events.und")))
        counts.append(count(service, mine, dead, notes, waits))
        problems += _told(service, mine, samples)
    return tuple(counts), tuple(problems)


def _told(service: str, sent: list[tuple[str, Raw]], dead: Mapping[str, Raw]) -> Iterator[str]:
    """The first few dead letters that are no message that was sent, for a person to look at."""
    known = {digest_of(raw, as_read=as_read) for _, raw in sent for as_read in (False, True)}
    changed = (raw for digest, raw in dead.items() if digest not in known)
    for raw in itertools.islice(changed, 5):
        yield f"{service}: changed: {raw.properties[:400]!r} {raw.body[:100]!r}"


def _is_order(key: bytes) -> bool:
    """Whether a binding of `order_placed.*` takes it."""
    words = key.split(b".")
    return len(words) == 2 and words[0] == b"order_placed"


def _reason(raw: Raw) -> str:
    """Why it is dead: the bus' word, or that the broker moved it untouched."""
    headers = dict(decode_properties(raw.properties).get("headers", ()))
    if b"x-death" in headers:
        return "rejected untouched"
    reason: bytes = headers.get(b"x-eventbus-reason", b"S\0\0\0\0unknown")
    return reason[5:].decode()
