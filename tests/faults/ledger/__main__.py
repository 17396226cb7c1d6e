"""`python -m tests.faults.ledger`: run cells, print their figures, write LEDGER.md and ledger.json.

Exits with 3 if any cell lost an event, did one twice, or gave one up that it need not have.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from eventbus import EventBusError
from tests import cluster
from tests.faults.ledger import report, saboteurs
from tests.faults.ledger.cells import CELLS, SHORT, Cell
from tests.faults.ledger.run import Result, run_cell
from tests.servers import Brokers, BrokerServer, NoBroker, ServerError, find_own_lines

BAD = 3
SHORT_EVENTS = 200


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.ledger", description=__doc__)
    parser.add_argument("--cell", action="append", choices=list(CELLS), metavar="NAME",
                        help=f"only this one, may be repeated: {', '.join(CELLS)}")  # fmt: skip
    parser.add_argument("--broker", help="only this line (default: every one that is here)")
    parser.add_argument("--events", type=int, help="how many (default: each cell's own number)")
    parser.add_argument("--seed", type=int, help="what the events' ids are made of")
    parser.add_argument("--short", action="store_true", help=f"{', '.join(SHORT)}; {SHORT_EVENTS} events each")
    parser.add_argument("--saboteur", choices=list(saboteurs.ALL), help="a bus that is wrong on purpose")
    parser.add_argument("--into", type=Path, default=Path(), help="the folder of LEDGER.md and ledger.json")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = options_of(arguments)
    cells = [CELLS[name] for name in options.cell or (SHORT if options.short else CELLS)]
    events = options.events or (SHORT_EVENTS if options.short else None)
    brokers, nodes, is_good = Brokers(), cluster.ClusterServer(), True
    try:
        for line in lines_for(cells, options):
            of_line = [cell for cell in cells if cell.needs_cluster == (line == cluster.LINE)]
            own = nodes.running if line == cluster.LINE else functools.partial(brokers.own, line)
            is_good &= run_on(line, own, of_line, events, options)
            for server in brokers.started():
                server.discard()  # two brokers at a time are too much for a small computer
    except (NoBroker, ServerError) as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        brokers.close()
        nodes.discard()
    return 0 if is_good else BAD


def lines_for(cells: Sequence[Cell], options: argparse.Namespace) -> list[str]:
    """The broker lines that *cells* run on, the cluster last.

    Raises:
        NoBroker: what was asked for by name is not to be had.
    """
    on_one_node = [cell for cell in cells if not cell.needs_cluster]
    if options.broker not in (None, cluster.LINE):
        if not on_one_node:
            raise NoBroker(f"{cells[0].name} needs a cluster: leave the broker out, or name {cluster.LINE}")
        return [options.broker]
    lines = list(find_own_lines()) if on_one_node and not options.broker else []
    if len(on_one_node) == len(cells):
        if not lines:
            raise NoBroker(f"{cells[0].name} is not among what breaks in a cluster: leave the broker out")
        return lines
    if (why := cluster.why_none()) is None:
        return [*lines, cluster.LINE]
    if not lines:
        raise NoBroker(f"no {cluster.LINE} here: {why}")
    print(f"{cluster.LINE} is left out: {why}")
    return lines


def run_on(
    line: str, own: Callable[[], BrokerServer], cells: Iterable[Cell], events: int | None, options: argparse.Namespace
) -> bool:
    """Run *cells* on the broker *line*, whether all were good; the files are written after each."""
    console, is_good = Console(), True
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
               TimeElapsedColumn())  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        for cell in cells:
            shown = bar.add_task(f"{line} {cell.name}")

            def tell(done: int, of: int, shown: object = shown) -> None:
                bar.update(shown, completed=done, total=of)  # type: ignore[arg-type]

            server = own()
            running = run_cell(cell, server, events=events, seed=options.seed, saboteur=options.saboteur, progress=tell)
            try:
                result = asyncio.run(running)
            except (AssertionError, EventBusError, ServerError, TimeoutError) as error:  # the other cells go on
                console.print(f"BAD {line:<5} {cell.name:<33} {type(error).__name__}: {error}", soft_wrap=True)
                is_good = False
                if isinstance(server, cluster.ClusterServer):
                    server.discard()  # a node may still be away
                continue
            finally:
                bar.remove_task(shown)
            server.drop_vhosts()
            console.print(told(result), highlight=False, soft_wrap=True)
            is_good &= result.is_good
            if options.saboteur is None:
                report.write(result, options.into)
    return is_good


def told(result: Result) -> str:
    """One cell in one line."""
    cell = report.as_json(result)
    figures = " ".join(f"{name}={cell[name]}" for name in report.COLUMNS[1:])
    mark = "ok " if result.is_good else "BAD"
    return f"{mark} {result.broker:<5} {result.cell.name:<33} {figures} took_s={result.took_s:.0f}"


if __name__ == "__main__":
    sys.exit(main())
