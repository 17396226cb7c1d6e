"""`python -m tests.faults.kills`: the shop, killed again and again while orders flow, and a table of what became of it.

Exits with 1 if anything was lost or doubled, or a step at which a program was to die was never reached.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.faults.kills import saboteurs
from tests.faults.kills.count import Count
from tests.faults.kills.points import POINTS
from tests.faults.kills.run import KEPT, Result, aims_for, run_outage, run_play
from tests.faults.kills.shop import SERVICES, ShopPlay, outage_aims
from tests.faults.kills.stage import Databases, Place, Store
from tests.servers import Brokers, NoBroker, ServerError
from tests.stores import NoStore, Stores

BROKEN_OFF = 130


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.kills", description=__doc__)
    parser.add_argument("--orders", type=_positive, default=1000, help="how many (default: %(default)s)")
    parser.add_argument("--kills", type=_positive, default=50, help="how many (default: %(default)s)")
    parser.add_argument("--store", choices=get_args(Store), action="append",
                        help="where services and keys have their databases (default: both kinds)")  # fmt: skip
    parser.add_argument("--broker", help="only this line (default: the first that is here)")
    parser.add_argument("--outage", type=_positive, metavar="SECONDS",
                        help="instead: the broker is away for so long, and doors die right after a commit")  # fmt: skip
    parser.add_argument("--seed", type=int, help="which steps, and at what count")
    parser.add_argument("--saboteur", choices=list(saboteurs.ALL), help="a bus that is wrong on purpose")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be 1 or more")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    options, console = options_of(arguments), Console()
    brokers, stores, is_good = Brokers(), Stores(), True
    try:
        for store in options.store or get_args(Store):
            seed = random.randrange(1_000_000) if options.seed is None else options.seed
            result = asyncio.run(run_on(store, brokers, stores, options, seed, console))
            show(result, f"{store}, {brokers.started()[0].origin}, seed {seed}", console)
            is_good &= not result.failings
    except (NoBroker, NoStore, ServerError, AssertionError) as error:
        print(f"{error}\n(logs and databases: {KEPT})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return BROKEN_OFF
    finally:
        brokers.close()
        stores.close()
    return 0 if is_good else 1


async def run_on(
    store: Store, brokers: Brokers, stores: Stores, options: argparse.Namespace, seed: int, console: Console
) -> Result:
    broker = await asyncio.to_thread(brokers.own, options.broker)
    columns = (TextColumn(store), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory(prefix=f"eventbus-kills-{store}-") as folder,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
    ):
        task = bar.add_task("starting", total=options.orders)

        def tell(kills: int, placed: int, counted: Count) -> None:
            bar.update(task, completed=placed, description=f"{placed} orders, {kills} kills, {counted.rows} rows")

        databases = Databases(store, stores, Path(folder))
        try:
            async with ShopPlay.on(Place(broker, await asyncio.to_thread(broker.new_vhost)), databases) as play:
                if options.outage:
                    before = options.orders // 10
                    aims = outage_aims(before, options.orders - before)
                    return await run_outage(
                        play, Path(folder), orders=(before, options.orders - before), aims=aims, outage_s=options.outage
                    )
                return await run_play(
                    play, Path(folder), orders=options.orders, aims=aims_for(play, options.kills, seed),
                    saboteur=options.saboteur, tell=tell,
                )  # fmt: skip
        finally:
            await databases.close()


def show(result: Result, title: str, console: Console) -> None:
    """The kills by step and program, and the figures below."""
    table = Table("step", *SERVICES, title=f"kills on {title}")
    for point in POINTS:
        kills = [result.killed[service, point] for service in SERVICES]
        if any(kills):
            table.add_row(point, *(str(number or "") for number in kills))
    counted = result.counted
    console.print(table)
    console.print(
        f"{sum(result.killed.values())} kills, {counted.placed} orders, {counted.rows} committed rows, "
        f"{counted.arrived} events at their queues, {result.took_s:.0f} s",
        highlight=False,
    )
    for failing in result.failings:
        console.print(f"[red]BAD[/red] {failing}", highlight=False, soft_wrap=True)
    if not result.failings:
        console.print(
            "every order has one payment and one reservation, and every committed row was published", soft_wrap=True
        )


if __name__ == "__main__":
    logging.getLogger("eventbus").addHandler(logging.NullHandler())  # the victims have logs of their own
    for number in (signal.SIGINT, signal.SIGTERM):  # in the background of a script the first is ignored
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())
