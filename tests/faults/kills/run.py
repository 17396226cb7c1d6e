"""One run: orders flow, programs die at the steps that they were told and are started anew, and all is counted.

No clock says when: so many orders are placed for each kill, the next ones when it has happened.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import shutil
import signal
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.kills.count import Count, count
from tests.faults.kills.play import Play
from tests.faults.kills.points import OF_MANY, Aim
from tests.faults.ledger.processes import Program

LOOK_AGAIN_S = 0.25
START_S = 90.0
QUIET_S = 60.0  # nothing has happened for so long, though a lease ends after half a minute: it will not happen any more
IDLE_S = 5.0  # everything is done, and a step that was not reached by now will not be
KEPT = Path(".eventbus/kills")  # what bad runs leave behind


@dataclass(frozen=True, slots=True)
class Result:
    """What a run came to."""

    counted: Count
    killed: Counter[tuple[str, str]]  # by program and step
    unreached: tuple[str, ...]
    took_s: float

    @property
    def failings(self) -> tuple[str, ...]:
        missed = (f"steps that were not reached: {', '.join(self.unreached)}",) if self.unreached else ()
        return (*self.counted.failings, *missed)


def aims_for(play: Play, kills: int | None, seed: int) -> dict[str, list[Aim]]:
    """*kills* of them, by program: each of its steps once before one comes again. None: each step once, the first time.

    As many for each program, but for what does not divide.
    """
    chance = random.Random(seed)
    if kills is None:
        return {name: [Aim(point) for point in part.points] for name, part in play.parts.items()}
    aims: dict[str, list[Aim]] = {name: [] for name in play.parts}
    left: dict[str, list[str]] = {name: [] for name in play.parts}
    for number in range(kills):
        name = list(aims)[number % len(aims)]
        if not left[name]:
            left[name] = chance.sample(play.parts[name].points, len(play.parts[name].points))
        point = left[name].pop()
        aims[name].append(Aim(point, chance.randint(1, 2 if point in OF_MANY else 8)))
    return aims


@dataclass
class Run:
    """The programs of *play* at work."""

    play: Play
    folder: Path
    aims: Mapping[str, Iterable[Aim]]
    options: list[str]  # for every victim
    is_patient: bool = False  # a program that cannot start is started again, as a container engine does
    killed: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._left = {name: deque(self.aims.get(name, ())) for name in self.play.parts}
        self._programs = {
            name: Program("tests.faults.kills.victim", [], self.folder / f"{name}.log") for name in self.play.parts
        }

    @property
    def kills_left(self) -> int:
        return sum(map(len, self._left.values()))

    @property
    def unreached(self) -> tuple[str, ...]:
        return tuple(f"{name} {aim.point}" for name, aims in self._left.items() for aim in aims)

    async def keep_all(self) -> None:
        """Start the programs, and start each anew that was killed at its step; never ends."""
        await asyncio.gather(*(self._keep(name) for name in self._programs))

    async def _keep(self, name: str) -> None:
        program, left, told = self._programs[name], self._left[name], self.folder / f"{name}.killed"
        while True:
            aim = left[0] if left else None
            program.arguments = [*self.options, *self._words(name, aim, told)]
            program.start()
            while program.is_running:  # noqa: ASYNC110  # a process tells nobody
                await asyncio.sleep(0.02)
            program.close()
            if aim is not None and told.exists() and program.process.returncode == -signal.SIGKILL:
                told.unlink()
                left.popleft()
                self.killed[name, aim.point] += 1
            elif not self.is_patient:
                raise AssertionError(f"{name} ended with {program.process.returncode}:\n{program.log_tail()}")

    def _words(self, name: str, aim: Aim | None, told: Path) -> list[str]:
        part = self.play.parts[name]
        aimed = ["--at", aim.point, "--nth", str(aim.nth), "--killed", str(told)] if aim else []
        settings = [word for setting in part.settings.items() for word in ("--set", "=".join(setting))]
        return [*aimed, *settings, "--", *part.command]

    async def stop(self) -> None:
        """Let them end in order."""
        for program in self._programs.values():
            await program.stop()
            assert program.process.returncode == 0, program.log_tail()

    def discard(self) -> None:
        for program in self._programs.values():
            if program.lives:
                program.discard()


async def run_play(
    play: Play,
    folder: Path,
    *,
    orders: int,
    aims: Mapping[str, Iterable[Aim]],
    lease_s: float | None = None,
    saboteur: str | None = None,
    quiet_s: float = QUIET_S,
    tell: Callable[[int, int, Count], None] = lambda _kills, _placed, _count: None,
) -> Result:
    """Place *orders* while the programs die.

    *lease_s*: how long the dead keep what they held; None: as long as the bus has it. *tell* is told how many kills and
    orders there were, and the figures so far.
    """
    options = (["--lease-s", str(lease_s)] if lease_s else []) + (["--saboteur", saboteur] if saboteur else [])
    run = Run(play, folder, aims, options)

    async def flow(keeping: asyncio.Task[None]) -> None:
        await _flow(run, keeping, orders, quiet_s, tell)

    return await _run(run, flow, is_wrong_on_purpose=saboteur is not None)


async def run_outage(
    play: Play,
    folder: Path,
    *,
    orders: tuple[int, int],
    aims: Mapping[str, Iterable[Aim]],
    outage_s: float,
    lease_s: float | None = None,
    quiet_s: float = QUIET_S,
) -> Result:
    """Place the first number of *orders*, and the second one while the broker is away for *outage_s* at least.

    It comes back once all of *aims* have happened. Then whoever ended meanwhile can start again, and all is done.
    """
    before, total = orders[0], sum(orders)
    broker = play.place.broker
    run = Run(play, folder, aims, ["--lease-s", str(lease_s)] if lease_s else [], is_patient=True)

    async def flow(keeping: asyncio.Task[None]) -> None:
        # It would forget queues that were declared within the last second.
        await asyncio.to_thread(broker.restart)
        await play.order(range(before))
        await _settled(run, keeping, quiet_s)
        await asyncio.to_thread(broker.kill)
        back_s = time.monotonic() + outage_s
        ordering = asyncio.create_task(play.order(range(before, total)))
        try:
            while run.kills_left or time.monotonic() < back_s:
                assert time.monotonic() < back_s + START_S, f"not reached while the broker was away: {run.unreached}"
                await asyncio.sleep(LOOK_AGAIN_S)
            assert count(await play.look()).waiting, "nothing was committed while the broker was away"
            await asyncio.to_thread(broker.start)
            await ordering
        finally:
            ordering.cancel()
        await _settled(run, keeping, quiet_s)

    return await _run(run, flow)


async def _run(
    run: Run, flow: Callable[[asyncio.Task[None]], Awaitable[None]], *, is_wrong_on_purpose: bool = False
) -> Result:
    """Start the programs, let *flow* happen, and count."""
    began, play, folder = time.monotonic(), run.play, run.folder
    keeping = asyncio.create_task(run.keep_all())
    try:
        await _started(run, keeping)
        await flow(keeping)
        await _until(play.place.is_empty)
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        await run.stop()
        found = await play.look()
        given_up = {*found.given_up, *await play.place.dead_letters(play.services)}
        counted = count(dataclasses.replace(found, given_up=given_up))
    except BaseException:
        keep(folder)
        raise
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        run.discard()
    result = Result(counted, run.killed, run.unreached, time.monotonic() - began)
    if result.failings and not is_wrong_on_purpose:
        keep(folder)
    return result


async def _started(run: Run, keeping: asyncio.Task[None]) -> None:
    """Until every service has its queue; what is published before reaches none."""
    deadline = time.monotonic() + START_S
    while not keeping.done() and not await run.play.place.has_queues(run.play.services):
        assert time.monotonic() < deadline, f"the services' queues were not there within {START_S:.0f} s"
        await asyncio.sleep(LOOK_AGAIN_S)


async def _settled(run: Run, keeping: asyncio.Task[None], quiet_s: float) -> None:
    """Until nothing more has to happen, or nothing moves any more."""
    seen, moved_s = None, time.monotonic()
    while not (counted := count(await run.play.look())).is_settled and time.monotonic() - moved_s < quiet_s:
        if keeping.done():
            keeping.result()
        if counted != seen:
            seen, moved_s = counted, time.monotonic()
        await asyncio.sleep(LOOK_AGAIN_S)


async def _flow(
    run: Run,
    keeping: asyncio.Task[None],
    orders: int,
    quiet_s: float,
    tell: Callable[[int, int, Count], None],
) -> None:
    """Until all orders are placed and settled and all kills have happened, or nothing moves any more."""
    kills, placed = run.kills_left, 0
    step = -(-orders // (kills + 1))
    seen: object = None
    moved_s = time.monotonic()
    while True:
        counted = count(await run.play.look())
        killed = kills - run.kills_left
        tell(killed, placed, counted)
        if keeping.done():
            keeping.result()
        if (now := (killed, placed, counted)) != seen:
            seen, moved_s = now, time.monotonic()
        still_s = time.monotonic() - moved_s
        # The next orders with the next kill; or when there is nothing left that could bring it about.
        allowed = min(orders, max(step * (killed + 1), placed + step if counted.is_settled and still_s > 1 else 0))
        if placed < allowed:
            await run.play.order(range(placed, allowed))
            placed = allowed
        elif still_s > quiet_s or (counted.is_settled and _is_over(run, placed == orders, still_s)):
            return
        await asyncio.sleep(LOOK_AGAIN_S)


def _is_over(run: Run, is_placed: bool, still_s: float) -> bool:
    """Whether all kills have happened, or no order is left that could bring one about."""
    return not run.kills_left if still_s <= IDLE_S else is_placed


async def _until(is_empty: Callable[[], Awaitable[bool]]) -> None:
    """Until it is so, or half a minute has passed: what still waits then is to be counted as it is."""
    deadline = time.monotonic() + 30
    while not await is_empty() and time.monotonic() < deadline:  # noqa: ASYNC110  # the broker does not tell
        await asyncio.sleep(0.5)


def keep(folder: Path) -> None:
    """Leave databases and logs where a person can look at them."""
    shutil.copytree(folder, KEPT / folder.name, dirs_exist_ok=True)
