"""One of two workers of a service: its handler notes that it began and that it ended, and waits while told to.

    python -m tests.faults.pair NAME FOLDER

Lines in FOLDER/runs: `began|ended ORDER NAME`. While FOLDER/hold is there, handlers wait.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
from pathlib import Path

from eventbus import Event, Service, run

LOOK_AGAIN_S = 0.02


class Placed(Event, name="placed"):
    order_id: int


def pair_of(name: str, folder: Path) -> Service:
    service = Service("shop")

    def note(what: str, event: Placed) -> None:
        with (folder / "runs").open("a") as file:  # a line at a time, whoever else writes
            file.write(f"{what} {event.order_id} {name}\n")

    @service.on(Placed)
    async def handle(event: Placed) -> None:
        note("began", event)
        while (folder / "hold").exists():  # noqa: ASYNC110  # another process says when
            await asyncio.sleep(LOOK_AGAIN_S)
        note("ended", event)

    return service


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    run(pair_of(options.name, options.folder))
