"""One cell from its beginning to its figures."""

from __future__ import annotations

import asyncio
import contextlib
import platform
import random
import shutil
import tempfile
import time
import urllib.parse
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from tests.faults.ledger.books import open_books
from tests.faults.ledger.cells import Cell
from tests.faults.ledger.count import Count, all_handle_again, count
from tests.faults.ledger.events import specials
from tests.faults.ledger.processes import Program, look_after
from tests.faults.ledger.proxy import Proxy
from tests.faults.ledger.stage import Stage
from tests.servers import BrokerServer

QUIET_S = 12.0  # nothing waits anywhere, and nothing has happened for so long: it will not happen any more
SETTLING_S = 20.0
KEPT = Path(".eventbus/ledger")  # what bad cells leave behind

Progress = Callable[[int, int], None]  # effects so far, and effects in all


@dataclass(frozen=True, slots=True)
class Result:
    """One cell's figures, and what they were taken from."""

    cell: Cell
    broker: str
    counted: Count
    events: int
    recovery_s: float | None
    took_s: float
    started: str
    seed: int
    versions: dict[str, str]

    @property
    def is_good(self) -> bool:
        return not self.failings

    @property
    def failings(self) -> tuple[str, ...]:
        """What a cell must not show: lost events, work done twice, needless dead letters, a late recovery."""
        counted, bound_s = self.counted, self.cell.recovers_within_s
        found = {
            f"lost {len(counted.lost)}": bool(counted.lost),
            f"done twice {len(counted.done_twice)}": bool(counted.done_twice),
            f"given up {len(counted.dead_lettered)}": len(counted.dead_lettered) > self.cell.dead_letters,
            f"recovery not within {bound_s:g} s": self.recovery_s is not None and self.recovery_s > bound_s,
        }
        return tuple(what for what, is_so in found.items() if is_so)


async def run_cell(
    cell: Cell,
    broker: BrokerServer,
    *,
    events: int | None = None,
    seed: int | None = None,
    saboteur: str | None = None,
    quiet_s: float = QUIET_S,
    progress: Progress = lambda _done, _of: None,
) -> Result:
    """Run *cell* on *broker*, which it may kill."""
    began, started = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    number = events or cell.events
    chosen = random.randrange(1_000_000) if seed is None else seed
    async with staged(cell, broker, number, chosen, saboteur) as stage:
        acting = asyncio.create_task(_act(cell, stage))
        try:
            dead = await _until_settled(cell, stage, acting, quiet_s, progress)
        except Exception:
            _keep(stage, f"{broker.line}-{cell.name}-{chosen}")
            raise
        await _stop(stage)
        counted = _counted(cell, stage, dead | await stage.dead_letters())
        result = Result(
            cell, broker.line, counted, number, _recovery_s(cell, stage, counted),
            took_s=time.monotonic() - began, started=started, seed=chosen, versions=versions_of(broker),
        )  # fmt: skip
        if not result.is_good and saboteur is None:
            _keep(stage, f"{broker.line}-{cell.name}-{chosen}")
    return result


def _counted(cell: Cell, stage: Stage, dead: set[str]) -> Count:
    publishing = stage.specials if cell.kind == "publishes-and-exits" else ()
    return count(stage.books, stage.services, dead, stage.destroyed, publishing)


def _keep(stage: Stage, name: str) -> None:
    """Leave the books and the programs' logs where a person can look at them."""
    shutil.copytree(stage.publisher.log.parent, KEPT / name, dirs_exist_ok=True)


def versions_of(broker: BrokerServer) -> dict[str, str]:
    """What was under test."""
    return {
        "rabbitmq": broker.version,
        "eventbus": version("eventbus"),
        "aio-pika": version("aio-pika"),
        "python": platform.python_version(),
    }


@contextlib.asynccontextmanager
async def staged(
    cell: Cell, broker: BrokerServer, events: int, seed: int, saboteur: str | None
) -> AsyncIterator[Stage]:
    """The cell's programs at work, in a virtual host of their own, behind a proxy."""
    url = await asyncio.to_thread(broker.new_vhost)
    parts = urllib.parse.urlsplit(url)
    with tempfile.TemporaryDirectory(prefix="eventbus-ledger-") as folder:
        file = Path(folder) / "books.sqlite"
        books = open_books(file)
        async with Proxy(parts.hostname or "127.0.0.1", parts.port or 5672) as proxy:
            via = _via(url, proxy.own_port, cell.heartbeat_s)
            rate = min(cell.rate, events / cell.flow_s)
            publisher = Program(
                "tests.faults.ledger.publisher",
                ["--url", via, "--books", str(file), "--events", str(events if cell.flows else 0),
                 "--rate", str(rate), "--seed", str(seed), "--kind", cell.kind, "--every", str(cell.every),
                 "--share", str(cell.share)],
                Path(folder) / "publisher.log",
            )  # fmt: skip
            works = ["--url", via, "--books", str(file), "--services", ",".join(cell.services), *cell.worker_options]
            works += ["--saboteur", saboteur] if saboteur else []
            workers = [
                Program("tests.faults.ledger.worker", works, Path(folder) / f"worker-{n}.log")
                for n in range(cell.workers)
            ]
            stage = Stage(broker, url, proxy, books, events, cell.services, publisher, workers,
                          specials(events, cell.every, cell.share), seed)  # fmt: skip
            for worker in workers:
                worker.start()
            # From the beginning: a cluster on a busy computer takes longer to declare all on than a start may take.
            looking = [asyncio.create_task(look_after(workers))]
            try:
                await stage.until(stage.is_declared, "the services' queues are there")
                publisher.start()
                looking.append(asyncio.create_task(look_after([publisher])))
                yield stage
            finally:
                for task in looking:
                    task.cancel()
                for program in [publisher, *workers]:
                    if program.lives:
                        program.discard()
                books.close()


def _via(url: str, port: int, heartbeat_s: int | None) -> str:
    parts = urllib.parse.urlsplit(url)
    netloc = f"{parts.username or 'guest'}:{parts.password or 'guest'}@127.0.0.1:{port}"
    query = f"heartbeat={heartbeat_s}" if heartbeat_s else ""
    return parts._replace(netloc=netloc, query=query).geturl()


async def _act(cell: Cell, stage: Stage) -> None:
    await stage.published(cell.begins_at)
    await cell.fault(stage)


async def _until_settled(
    cell: Cell, stage: Stage, acting: asyncio.Task[None], quiet_s: float, progress: Progress
) -> set[str]:
    """Return when every event is accounted for, or nothing moves any more; the dead letters that were seen."""
    wanted = stage.events * len(stage.services)
    deadline = time.monotonic() + cell.within_s
    moved, seen = time.monotonic(), -1
    dead: set[str] = set()
    while time.monotonic() < deadline:
        await asyncio.sleep(0.25)
        progress(handled := stage.handled(), wanted)
        if acting.done():
            acting.result()
        if handled != seen or not acting.done() or not stage.publisher.has_ended:
            moved, seen = time.monotonic(), handled
            continue
        if not _counted(cell, stage, dead).lost:
            break
        if time.monotonic() - moved > 2:
            dead = await stage.dead_letters()
        if time.monotonic() - moved > quiet_s and not await _waits(stage):
            break
    if not acting.done():
        acting.cancel()
        raise AssertionError(f"{cell.name}: the fault was not over after {cell.within_s:.0f} s")
    await _until_empty(stage)
    return dead


async def _until_empty(stage: Stage) -> None:
    """Until the broker has nothing left to hand out: duplicates count too."""
    deadline = time.monotonic() + SETTLING_S
    while await _waits(stage) and time.monotonic() < deadline:  # noqa: ASYNC110  # the broker does not tell
        await asyncio.sleep(0.5)


async def _waits(stage: Stage) -> bool:
    """Whether anything waits for a handler, or is with one."""
    depths = await stage.depths()
    return any(depth for queue, depth in depths.items() if not queue.endswith((".dead", ".undeliverable")))


async def _stop(stage: Stage) -> None:
    for worker in stage.workers:
        await worker.stop()


def _recovery_s(cell: Cell, stage: Stage, counted: Count) -> float | None:
    """None where it never came to that; 0 where everything had been handled when the fault was seen to be over."""
    if stage.fault_ended is None:
        return None
    first = all_handle_again(stage.books, stage.services, stage.fault_ended, new=cell.recovers_with == "new")
    if first is None:
        return None if counted.lost else 0.0
    return round(first - stage.fault_ended, 3)
