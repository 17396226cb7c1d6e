"""`python -m tests.faults.ledger`: run cells, print their figures, write LEDGER.md and ledger.json.

Exits with 3 if any cell lost an event, did one twice, gave one up that it need not have, or recovered late; with 2 if
what was asked for cannot be. A run that was broken off goes on with `--missing`.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import signal
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

UNUSABLE = 2
BAD = 3
BROKEN_OFF = 130
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
    parser.add_argument("--missing", action="store_true", help="only the cells that ledger.json does not have")
    parser.add_argument("--into", type=Path, default=Path(), help="the folder of LEDGER.md and ledger.json")
    options = parser.parse_args(arguments)
    if options.short:
        options.cell, options.events = options.cell or list(SHORT), options.events or SHORT_EVENTS
    if options.events is not None and (few := too_few(options.events, options.cell or list(CELLS))):
        parser.error(few)
    return options


def too_few(events: int, names: Iterable[str]) -> str | None:
    """Why so many *events* do not do for the cells *names*, or None if they do."""
    name, least = max(((name, CELLS[name].least_events) for name in names), key=lambda found: found[1])
    if events >= least:
        return None
    return (
        f"--events {events}: the cell {name!r} needs {least} at least: with fewer its fault comes when the flow is over"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    options = options_of(arguments)
    cells = [CELLS[name] for name in options.cell or CELLS]
    brokers, nodes, is_good = Brokers(), cluster.ClusterServer(), True
    try:
        for line in lines_for(cells, options):
            of_line = [cell for cell in cells if cell.needs_cluster == (line == cluster.LINE)]
            if options.missing:
                had = report.faults_of(line, options.into)
                of_line = [cell for cell in of_line if cell.name not in had]
            own = nodes.running if line == cluster.LINE else functools.partial(brokers.own, line)
            is_good &= run_on(line, own, of_line, options)
            for server in brokers.started():
                server.discard()  # two brokers at a time are too much for a small computer
    except NoBroker as error:
        print(error, file=sys.stderr)
        return UNUSABLE
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("broken off; --missing goes on with the cells that ledger.json does not have", file=sys.stderr)
        return BROKEN_OFF
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


def run_on(line: str, own: Callable[[], BrokerServer], cells: Sequence[Cell], options: argparse.Namespace) -> bool:
    """Run *cells* on the broker *line*, whether all were good; the files are written after each."""
    console, is_good = Console(), True
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
               TimeElapsedColumn())  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        whole = bar.add_task(f"{line} all cells", total=len(cells), visible=len(cells) > 1)
        for cell in cells:
            shown = bar.add_task(f"{line} {cell.name}")

            def tell(done: int, of: int, shown: object = shown) -> None:
                bar.update(shown, completed=done, total=of)  # type: ignore[arg-type]

            events = options.events
            if events and not cell.flows and not options.cell:
                events = min(events, cell.events)  # each is a kill: more than its own number only where asked for
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
                bar.advance(whole)
            server.drop_vhosts()
            console.print(told(result), highlight=False, soft_wrap=True)
            is_good &= result.is_good
            if options.saboteur is None:
                report.write(result, options.into)
    return is_good


def told(result: Result) -> str:
    """One cell in one line, and one for each of its services."""
    cell, counted = report.as_json(result), result.counted
    figures = " ".join(f"{name}={cell[name]}" for name in report.COLUMNS[1:])
    more = ", ".join(f"{service} handled {number}" for service, number in counted.handled_by.items())
    more += f"; effects {counted.effects}, runs beyond one {counted.runs_beyond_one}, suppressed {counted.suppressed}"
    mark = "ok " if result.is_good else f"BAD ({', '.join(result.failings)})"
    head = f"{mark} {result.broker:<5} {result.cell.name:<33} {figures}"
    return f"{head} took_s={result.took_s:.0f} seed={result.seed}\n      {more}"


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # in the background of a script the first is ignored
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())
