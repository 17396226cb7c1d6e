"""`python -m tests.faults.lateness`: is anything early that the delay tree brings, and how late is it?

On each broker line, for each count: so many delayed events that are all due at the same moment, as many retries, and as
many events whose delays are mixed. Straight through the transport: what is measured is the tree and one consumer, not
handlers. Writes lateness.json beside ledger.json, and the section of LEDGER.md that shows it. Exits with 3 if anything
was early or did not come.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from eventbus import EventBusError
from eventbus.delay import MAX_BITS, UNIT, rounded, way
from eventbus.message import Message
from eventbus.topology import Names, merge, of_service, shared
from eventbus.transport.base import Delivery, Publication, Source
from eventbus.transport.rabbitmq import RabbitMQ
from tests.faults.ledger import report
from tests.faults.ledger.run import versions_of
from tests.servers import Brokers, BrokerServer, NoBroker, ServerError, find_own_lines

BAD: Final = 3
COUNTS: Final = (100, 1_000, 10_000)
NAMES: Final = Names()
SERVICE, EVENT = "mails", "ordered.v1"
WAYS: Final = {  # what is measured, with the target of its messages and the queue that they come to
    "events at once": (f"publish.{EVENT}", NAMES.queue(SERVICE)),
    "retries at once": (f"retry.{SERVICE}", NAMES.retry_queue(SERVICE)),
    "events mixed": (f"publish.{EVENT}", NAMES.queue(SERVICE)),
}
# So many are published in a second at least, on a busy computer: what is due at once needs delays that leave the time.
SLOWEST_PER_S: Final = 600
SHORTEST_S: Final = 4.0
UNCONFIRMED: Final = 100  # at a time: what waits for its turn is not on its way yet
PREFETCH: Final = 1000
PUBLISH_S: Final = 60.0
# What has not come so long after the last was due is missing.
GIVE_UP_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class Sent:
    """One message: when its publishing began, on the loop's clock, and the delay that was asked for."""

    at_s: float
    delay: timedelta

    @property
    def due_s(self) -> float:
        """With the delay as the tree rounds it up."""
        return self.at_s + rounded(self.delay).total_seconds()


@dataclass(frozen=True, slots=True)
class Figures:
    """How late messages came, in seconds. `earliest_s` is after the delay that was asked for, the others after due."""

    messages: int
    due_within_s: float
    earliest_s: float | None  # None: nothing came at all
    p50_s: float | None
    p99_s: float | None
    max_s: float | None
    early: int
    missing: int
    twice: int

    @property
    def is_good(self) -> bool:
        return self.early == 0 and self.missing == 0


def figures_of(sent: Mapping[int, Sent], arrived: Mapping[int, Sequence[float]]) -> Figures:
    """What *sent* and the moments at which each of them *arrived* come to."""
    first = {number: min(moments) for number, moments in arrived.items()}
    waited = {number: at_s - sent[number].at_s for number, at_s in first.items()}
    margins = [waited_s - sent[number].delay.total_seconds() for number, waited_s in waited.items()]
    late = sorted(at_s - sent[number].due_s for number, at_s in first.items())
    due = [each.due_s for each in sent.values()]
    return Figures(
        messages=len(sent),
        due_within_s=max(due) - min(due),
        earliest_s=min(margins, default=None),
        p50_s=_share(late, 0.5),
        p99_s=_share(late, 0.99),
        max_s=late[-1] if late else None,
        early=sum(margin < 0 for margin in margins),
        missing=len(sent) - len(first),
        twice=sum(len(moments) > 1 for moments in arrived.values()),
    )


def _share(ordered: Sequence[float], share: float) -> float | None:
    """The value that this share of *ordered* does not exceed."""
    return ordered[math.ceil(share * len(ordered)) - 1] if ordered else None


# ── when what is published ────────────────────────────────────────────────────────────────────────────────────────────


def longest_for(count: int) -> timedelta:
    """The longest delay: half of it passes while *count* messages are published."""
    return timedelta(seconds=max(SHORTEST_S, 2 * count / SLOWEST_PER_S))


def at_once(count: int, longest: timedelta) -> list[timedelta]:
    """Delays that the tree does not round, the longest first: each for when that much is left until all are due."""
    most = max(1, longest // UNIT)
    exact = [units for units in range(most, most // 2, -1) if units.bit_count() <= MAX_BITS]
    return sorted((exact[number % len(exact)] * UNIT for number in range(count)), reverse=True)


def mixed(count: int, longest: timedelta, seed: int) -> list[timedelta]:
    """Any delays up to *longest*, in any order."""
    chance = random.Random(seed)
    return [timedelta(milliseconds=chance.uniform(0, longest / timedelta(milliseconds=1))) for _ in range(count)]


# ── one run ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Run:
    """Messages on their way through the delay tree of the broker at *url*, and when they came."""

    url: str
    what: str
    sent: dict[int, Sent] = field(default_factory=dict)
    arrived: dict[int, list[float]] = field(default_factory=dict)

    async def measure(self, delays: Sequence[timedelta]) -> Figures:
        """Send a message with each of *delays*, consume until all came, and tell how late they were."""
        topology = merge([shared(NAMES), of_service(NAMES, SERVICE, ["ordered.*"])])
        target, queue = WAYS[self.what]
        transport = RabbitMQ(self.url)
        await transport.open(topology, "apply")
        try:
            consumer = transport.consumer([Source(queue, PREFETCH, self._take)], topology, "apply")
            await consumer.start()
            try:
                await self._publish(transport, target, delays)
                await self._all_came()
            finally:
                await consumer.close()
        finally:
            await transport.close()
        return figures_of(self.sent, self.arrived)

    def _take(self, delivery: Delivery) -> None:
        self.arrived.setdefault(int(delivery.message.body), []).append(asyncio.get_running_loop().time())
        delivery.ack()

    async def _publish(self, transport: RabbitMQ, target: str, delays: Sequence[timedelta]) -> None:
        loop, turn = asyncio.get_running_loop(), asyncio.Semaphore(UNCONFIRMED)
        due_s = loop.time() + delays[0].total_seconds()

        async def send(number: int, delay: timedelta) -> None:
            through = way(delay, target)
            message = Message({}, str(number).encode())
            async with turn:
                self.sent[number] = Sent(loop.time(), delay)
                assert await transport.publish(
                    Publication(NAMES.delay_level(through.level), through.key, message), timeout_s=PUBLISH_S
                )

        async with asyncio.TaskGroup() as group:
            for number, delay in enumerate(delays):
                if self.what != "events mixed" and (early_s := due_s - delay.total_seconds() - loop.time()) > 0:
                    await asyncio.sleep(early_s)
                group.create_task(send(number, delay))

    async def _all_came(self) -> None:
        loop = asyncio.get_running_loop()
        give_up_s = max(each.due_s for each in self.sent.values()) + GIVE_UP_S
        while len(self.arrived) < len(self.sent) and loop.time() < give_up_s:  # noqa: ASYNC110  # they come by the thousand
            await asyncio.sleep(0.05)


async def measure(url: str, what: str, count: int, *, longest: timedelta | None = None, seed: int = 0) -> Figures:
    """How late *count* messages are, sent the way *what* says through the tree of a fresh virtual host at *url*."""
    most = longest or longest_for(count)
    delays = mixed(count, most, seed) if what == "events mixed" else at_once(count, most)
    return await Run(url, what).measure(delays)


# ── all runs ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.lateness", description=__doc__)
    parser.add_argument("--broker", help="only this line (default: every one that is here)")
    parser.add_argument("--counts", type=lambda text: [int(part) for part in text.split(",")], default=list(COUNTS),
                        metavar="N,...", help=f"how many (default: {','.join(map(str, COUNTS))})")  # fmt: skip
    parser.add_argument("--delay", type=float, metavar="S",
                        help="the longest delay (default: enough to publish so many before they are due)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="what mixed delays are made of")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON, and nothing else")
    parser.add_argument("--into", type=Path, default=Path(), help="the folder of lateness.json and LEDGER.md")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = options_of(arguments)
    brokers, rows = Brokers(), list[dict[str, object]]()
    try:
        for line in [options.broker] if options.broker else find_own_lines():
            server = brokers.own(line)
            rows += run_on(server, options)
            server.discard()  # two brokers at a time are too much for a small computer
    except (NoBroker, ServerError, EventBusError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    finally:
        brokers.close()
    if options.json:
        print(json.dumps(rows, indent=1))
    return BAD if any(row["early"] or row["missing"] for row in rows) else 0


def run_on(server: BrokerServer, options: argparse.Namespace) -> list[dict[str, object]]:
    """A row for each count and each way, written and printed as they come."""
    rows = []
    longest = timedelta(seconds=options.delay) if options.delay else None
    for count in options.counts:
        for what in WAYS:
            started = datetime.now(UTC).isoformat(timespec="seconds")
            found = asyncio.run(measure(server.new_vhost(), what, count, longest=longest, seed=options.seed))
            server.drop_vhosts()
            row = {"broker": server.line, "what": what, **asdict(found), "longest_delay_s":
                   (longest or longest_for(count)).total_seconds(), "versions": versions_of(server),
                   "started": started, "seed": options.seed}  # fmt: skip
            rows.append(row)
            report.write_lateness([row], options.into)
            if not options.json:
                print(told(row), flush=True)
    return rows


def told(row: Mapping[str, object]) -> str:
    """One run in one line."""
    figures = " ".join(f"{name}={report.seconds(row[name])}" for name in report.LATENESS[2:])
    mark = "BAD" if row["early"] or row["missing"] else "ok "
    return f"{mark} {row['broker']:<5} {row['what']:<16} {figures}"


if __name__ == "__main__":
    sys.exit(main())
