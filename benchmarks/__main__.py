"""`python -m benchmarks`: measure, print a table, write results.json, a picture and PERFORMANCE.md's figures.

A whole run writes into benchmarks/ and PERFORMANCE.md; `--only` and `--quick` write into .eventbus/bench/, so that they
do not replace the published figures. Exits with 1 if a program failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Container, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import plot, report
from benchmarks.databases import SERVERS, Databases
from benchmarks.machine import machine, versions
from benchmarks.plan import GROUPS, MODULES, OURS, C, Cell, cells
from benchmarks.stage import ProgramError, Stage, build_client
from tests.servers import Brokers, NoBroker, ServerError, find_own_lines
from tests.stores import NoStore

PUBLISHED = Path(__file__).parent
PAGE = PUBLISHED.parent / "PERFORMANCE.md"
ASIDE = PUBLISHED.parent / ".eventbus" / "bench"
ROUNDS, EVENTS, QUICK_EVENTS = 3, 20_000, 6_000
PLAIN_WIDTH = 150
BUSY = 1.0  # a load that was there before the broker started
# Not counted: a broker that has just started is busy with itself.
WARM_UP = Cell(kind="flow", program=OURS, events=5000, groups=frozenset())
PACKAGES = {"FastStream": "faststream", "taskiq": "taskiq_aio_pika", "Celery": "celery", "Dramatiq": "dramatiq",
            "pika": "pika"}  # fmt: skip


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    groups = "; ".join(f"{name} ({says})" for name, says in GROUPS.items())
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--only", help=f"some of these, with commas: {groups}")
    parser.add_argument("--quick", action="store_true", help="one round of few events, about two minutes")
    parser.add_argument("--rounds", type=_positive, help=f"default {ROUNDS}")
    parser.add_argument("--events", type=_positive, help=f"about so many for each program, default {EVENTS:,}")
    parser.add_argument("--broker", help="the broker line (default: what is installed here, else the oldest container)")
    parser.add_argument("--into", type=Path, help="the folder of results.json and results.png")
    options = parser.parse_args(arguments)
    options.groups = set(options.only.split(",")) if options.only else set(GROUPS)
    if unknown := options.groups - set(GROUPS):
        parser.error(f"--only {', '.join(sorted(unknown))}: there is {', '.join(GROUPS)}")
    options.rounds = options.rounds or (1 if options.quick else ROUNDS)
    options.events = options.events or (QUICK_EVENTS if options.quick else EVENTS)
    return options


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    options = options_of(arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=PLAIN_WIDTH)  # else tables would be folded to 80
    brokers, databases = Brokers(), Databases()
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="eventbus-bench-") as folder:
            computer = machine()  # its load, before the broker is a part of it
            client = build_client(Path(folder))
            broker = brokers.own(options.broker or default_line())
            run = new_run(options, computer, versions(broker.version, has_client=client is not None))
            console.print(f"{broker.origin}; {told_versions(run)}", highlight=False, soft_wrap=True)
            wanted = chosen(options, run, client, databases)
            is_good = measure(wanted, Stage(broker, client, databases), run, console)
    except NoBroker as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        brokers.close()
        databases.close()
    run.took_s = time.monotonic() - began
    report.show(run, console)
    write(run, options.into, console)
    return 0 if is_good else 1


def new_run(options: argparse.Namespace, computer: dict[str, object], found: dict[str, str]) -> report.Run:
    """Nothing measured yet."""
    form = "part" if options.only else "quick" if options.quick else "whole"
    started = datetime.now(UTC).isoformat(timespec="seconds")
    run = report.Run(form, options.rounds, options.events, started, computer, found)
    if (load := float(str(computer["load_before"]))) > BUSY:
        run.notes.append(f"the machine was busy when it began (load {load}): all is slower")
    return run


def told_versions(run: report.Run) -> str:
    return ", ".join(f"{name} {version}" for name, version in run.versions.items())


def default_line() -> str:
    """A native node where there is one: the way to a container costs more than some of what is measured."""
    lines = find_own_lines()
    native = [line for line, source in lines.items() if source.says.startswith("native")]
    return [*native, *lines][0]


def chosen(options: argparse.Namespace, run: report.Run, client: Path | None, databases: Databases) -> list[Cell]:
    """The cells that were asked for and can be measured; *run* notes the others."""
    missing = {program for program, package in PACKAGES.items() if importlib.util.find_spec(package) is None}
    run.notes += [f"{program}: not measured, not installed" for program in MODULES if program in missing]
    if client is None:
        missing.add(C)
        how = "apt-get install gcc librabbitmq-dev"
        run.notes.append(f"{C}: the limit is missing, no compiler or no librabbitmq (Debian: {how}); pika is nearest")
    wanted = [cell for cell in cells(options.events, quick=options.quick) if cell.groups & options.groups]
    absent = set(without(databases, {cell.database for cell in wanted}, run))
    return [cell for cell in wanted if cell.program not in missing and cell.database not in absent]


def without(databases: Databases, wanted: Container[str], run: report.Run) -> Iterator[str]:
    """The database servers that are *wanted* and cannot be had; *run* notes why, and which the others are."""
    for name in SERVERS:
        if name in wanted:
            try:
                run.notes.append(databases.start(name))
            except (NoStore, ServerError) as error:
                run.notes.append(f"{name}: not measured: {error}")
                yield name


def measure(wanted: Sequence[Cell], stage: Stage, run: report.Run, console: Console) -> bool:
    """Run all cells in turn, round by round; whether none failed."""
    rounds = [[cell for cell in wanted if number == 0 or not cell.is_once] for number in range(run.rounds)]
    rounds[1::2] = [backwards[::-1] for backwards in rounds[1::2]]  # nobody always comes after the same neighbour
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    failed = set[str]()
    with contextlib.suppress(ProgramError, ServerError, ValueError):  # if it fails, it fails below, and is told
        stage.run(WARM_UP)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        shown = bar.add_task("", total=sum(map(len, rounds)))
        for number, cells_of_round in enumerate(rounds):
            for cell in cells_of_round:
                bar.update(shown, description=f"round {number + 1}: {cell.title}")
                began = time.monotonic()
                try:
                    figures, profile = stage.run(cell)
                except (ProgramError, ServerError, ValueError) as error:
                    failed.add(cell.title)
                    run.notes.append(f"{cell.title}, round {number + 1}: failed: {str(error).splitlines()[-1]}")
                    console.print(f"BAD {cell.title}: {error}", highlight=False, soft_wrap=True)
                else:
                    for figure in figures:
                        run.figures.add(cell.program, cell.variant, figure)
                    run.profile += profile
                    if not console.is_terminal or os.environ.get("VERBOSE"):
                        told = ", ".join(f"{figure.what} {figure.value:,.6g}" for figure in figures)
                        console.print(f"{number + 1} {cell.title} ({time.monotonic() - began:.1f} s): {told}",
                                      highlight=False, soft_wrap=True)  # fmt: skip
                bar.advance(shown)
    return not failed


def write(run: report.Run, into: Path | None, console: Console) -> None:
    """All files of this run."""
    is_whole = run.form == "whole"
    folder = into or (PUBLISHED if is_whole else ASIDE)
    written = [report.write_json(run, folder)]
    if plot.draw(run.figures, folder / "results.png"):
        written.append(folder / "results.png")
    if is_whole and folder == PUBLISHED:
        report.write_markdown(run, PAGE)
        written.append(PAGE)
    console.print(
        f"took {run.took_s:.0f} s; written: {', '.join(os.path.relpath(file) for file in written)}", soft_wrap=True
    )


if __name__ == "__main__":
    sys.exit(main())
