"""`python -m tests.faults.hostile`: hostile messages through a live worker, counted; or a worker under a backlog.

Exits with 3 if a count does not add up, a message came back changed, the worker died or its memory grew too much.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.faults.hostile import backlog
from tests.faults.hostile.run import Result, run_hostile
from tests.servers import Brokers, NoBroker, find_own_lines

BAD = 3


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.hostile", description=__doc__)
    parser.add_argument("--messages", type=int, default=100_000, help="how many hostile ones (default: %(default)s)")
    parser.add_argument("--backlog", type=int, metavar="EVENTS",
                        help="instead: memory behind so many events, and with handlers that hang")  # fmt: skip
    parser.add_argument("--broker", help="only this line (default: every one that is here)")
    parser.add_argument("--seed", type=int, help="what the messages are drawn from")
    parser.add_argument("--json", action="store_true", help="the figures for programs")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options, brokers = options_of(arguments), Brokers()
    console, is_good, told = Console(stderr=options.json), True, []
    try:
        for line in [options.broker] if options.broker else find_own_lines():
            result = run_on(line, brokers, options, console)
            is_good &= result.is_good
            told.append(as_json(result))
            if not options.json:
                show(result, console)
            for server in brokers.started():
                server.discard()  # two brokers at a time are too much for a small computer
    except NoBroker as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        brokers.close()
    if options.json:
        print(json.dumps(told, indent=1))
    return 0 if is_good else BAD


def run_on(line: str, brokers: Brokers, options: argparse.Namespace, console: Console) -> Result | backlog.Result:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
               TimeElapsedColumn())  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        shown = bar.add_task(f"{line}", total=options.backlog or options.messages)

        def tell(done: int, of: int) -> None:
            bar.update(shown, completed=done, total=of)

        server = brokers.own(line)
        result: Result | backlog.Result
        if options.backlog:
            result = asyncio.run(backlog.run_backlog(server, events=options.backlog, progress=tell))
        else:
            seed = random.randrange(1_000_000) if options.seed is None else options.seed
            result = asyncio.run(run_hostile(server, messages=options.messages, seed=seed, progress=tell))
        server.drop_vhosts()
        return result


def as_json(result: Result | backlog.Result) -> dict[str, object]:
    return dataclasses.asdict(result) | {"is_good": result.is_good}


def show(result: Result | backlog.Result, console: Console) -> None:
    if isinstance(result, Result):
        show_counts(result, console)
    else:
        show_memory(result, console)
    console.print("[green]good[/]" if result.is_good else "[red]BAD[/]")


def show_counts(result: Result, console: Console) -> None:
    names = ("sent", "handled", "dead", "again", "narrowed", "lost", "changed", "invented", "left")
    table = Table("service", *names, title=f"RabbitMQ {result.broker}, seed {result.seed}")
    for counted in result.counts:
        table.add_row(counted.service, *(str(getattr(counted, name)) for name in names))
    console.print(table)
    for counted in result.counts:
        kinds = Table("kind", "what became of it", title=counted.service)
        for kind, fates in sorted(counted.fates.items()):
            kinds.add_row(kind, ", ".join(f"{number} {fate}" for fate, number in sorted(fates.items())))
        console.print(kinds)
    console.print(
        f"worker: {'alive' if result.is_alive else 'DEAD'}, exit code {result.exit_code}, sessions lost "
        f"{result.sessions_lost}; memory {result.early_mb:.1f} MB after a tenth, {result.end_mb:.1f} MB at the end "
        f"({result.growth:.2f} x); {result.took_s:.0f} s"
    )
    for problem in result.problems:
        console.print(problem, markup=False, highlight=False)


def show_memory(result: backlog.Result, console: Console) -> None:
    table = Table("worker", "behind", "handled", "memory, MB", title=f"RabbitMQ {result.broker}")
    for state in result.states:
        table.add_row(state.what, str(state.behind), str(state.handled), f"{state.rss_mb:.1f}")
    console.print(table)
    console.print(f"backlog against little: {result.growth:.2f} x; {result.took_s:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
