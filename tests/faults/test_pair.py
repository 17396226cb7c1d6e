"""Two workers of one service, processes of their own on a real RabbitMQ, with a store that they share.

One is stopped past its lease, as a loop that stalls is: SIGSTOP, and SIGCONT when the other one has taken over.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from eventbus import Bus
from tests.faults.ledger.processes import Program
from tests.faults.pair import Placed
from tests.rig import until

NAMES = ("one", "other")
LEASE_S = 3.0
# What the broker waits for before it gives a stopped worker's deliveries to the other one.
HEARTBEAT_S = 2
MANY = 200


@dataclass(frozen=True, slots=True)
class Pair:
    """The two at work."""

    url: str
    folder: Path
    programs: dict[str, Program]

    def runs(self, what: str) -> list[tuple[int, str]]:
        """Which orders, and whose: of the runs that *what* (`began`, `ended`)."""
        file = self.folder / "runs"
        lines = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
        return [(int(order), name) for did, order, name in lines if did == what]

    def hold(self) -> None:
        (self.folder / "hold").touch()

    def go_on(self) -> None:
        (self.folder / "hold").unlink()

    def said(self, words: str) -> int:
        return sum(program.said(words) for program in self.programs.values())


@pytest.fixture
def pair(shared_store_url: str, rabbitmq_url: str, tmp_path: Path) -> Iterator[Pair]:
    url = f"{rabbitmq_url}?heartbeat={HEARTBEAT_S}"
    settings = ["--set", f"EVENTBUS_URL={url}", "--set", f"EVENTBUS_IDEMPOTENCY={shared_store_url}"]
    programs = {
        name: Program(
            "tests.faults.kills.victim",
            ["--lease-s", str(LEASE_S), *settings, "--", "tests.faults.pair", name, str(tmp_path)],
            tmp_path / f"{name}.log",
        )
        for name in NAMES
    }
    for program in programs.values():
        program.start()
    yield Pair(rabbitmq_url, tmp_path, programs)
    for program in programs.values():
        program.discard()


async def both_at_work(pair: Pair, bus: Bus) -> None:
    """Until each of the two has handled something."""
    async with asyncio.timeout(60):
        order = -1
        while {name for _, name in pair.runs("ended")} != set(NAMES):
            await bus.publish(Placed(order_id=order))
            order -= 1
            await asyncio.sleep(0.1)


async def test_an_event_that_comes_to_both_workers_is_run_by_one(pair: Pair) -> None:
    async with Bus(pair.url) as bus:
        await both_at_work(pair, bus)
        events = [Placed(order_id=order) for order in range(MANY)]
        sent = await bus.publish_many(events)
        await bus.publish_many(sent)  # the broker gives it to the one or to the other
        await until(lambda: pair.said("suppressed a duplicate") == MANY, "each was recognised")

    ended = [(order, name) for order, name in pair.runs("ended") if order >= 0]
    assert Counter(order for order, _ in ended) == Counter(range(MANY))
    assert {name for _, name in ended} == set(NAMES)


async def test_a_claim_lost_to_a_stalled_loop_is_noticed_and_the_completion_of_the_stalled_does_not_count(
    pair: Pair,
) -> None:
    async with Bus(pair.url) as bus:
        await both_at_work(pair, bus)
        pair.hold()
        sent = await bus.publish(Placed(order_id=7))
        await until(lambda: any(order == 7 for order, _ in pair.runs("began")))
        ((_, stalled),) = [run for run in pair.runs("began") if run[0] == 7]
        (successor,) = set(NAMES) - {stalled}
        pair.programs[stalled].freeze()
        pair.go_on()
        await until(lambda: (7, successor) in pair.runs("ended"), "the other one has taken over")
        assert (7, stalled) not in pair.runs("ended")
        # The stalled one is still at it when it goes on, and finishes what nobody waits for any more.
        pair.programs[stalled].thaw()
        await until(lambda: pair.programs[stalled].said("lost its claim"), "it is noticed")
        await bus.publish(sent)
        await until(lambda: pair.said("suppressed a duplicate"), "what the successor did is what counts")

    assert [name for order, name in pair.runs("began") if order == 7] == [stalled, successor]
    assert pair.programs[successor].said("lost its claim") == 0
