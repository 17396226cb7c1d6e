"""The publishing program: a steady flow of events, each published again until it is confirmed.

What is not confirmed yet when it starts is published, so that it can be killed and started anew, as a client would be
that knows by its own list what it has to tell. Lines on its standard input: `pause` (answered with `paused` once no
publish is under way) and `resume`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from pathlib import Path

from eventbus import Bus, Envelope, PublishError
from tests.faults.ledger.books import SOURCE, open_books
from tests.faults.ledger.events import Counted, Kind, id_of, specials

AT_A_TIME = 200


class Publisher:
    """Publishes what the books do not have as confirmed."""

    def __init__(self, options: argparse.Namespace, bus: Bus) -> None:
        self._options = options
        self._bus = bus
        self._specials = specials(options.events, options.every, options.share)
        self._books = open_books(options.books)
        self._slots = asyncio.Semaphore(AT_A_TIME)
        self._goes_on = asyncio.Event()
        self._goes_on.set()
        self._under_way: set[asyncio.Task[None]] = set()

    async def publish_all(self) -> None:
        confirmed = {row[0] for row in self._books.execute("select number from published where confirmed not null")}
        missing = [number for number in range(self._options.events) if number not in confirmed]
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        for number in missing:
            await self._goes_on.wait()
            await self._slots.acquire()
            task = loop.create_task(self._publish(number))
            self._under_way.add(task)
            task.add_done_callback(self._ended)
            due_s = max(due_s + 1 / self._options.rate, loop.time() - 1)  # what was held up is not made up for at once
            await asyncio.sleep(due_s - loop.time())
        while self._under_way:
            await asyncio.wait(set(self._under_way))

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._slots.release()
        self._under_way.discard(task)
        task.result()

    async def _publish(self, number: int) -> None:
        event_id = id_of(self._options.seed, number)
        row = (event_id, number, time.time())
        self._books.execute("insert or ignore into published (event, number, began) values (?, ?, ?)", row)
        event: Counted | Envelope = Counted(number=number, kind=self._kind_of(number))
        given_id: str | None = event_id
        while True:
            try:
                await self._bus.publish(event, id=given_id)
                break
            except PublishError as error:
                event, given_id = error.envelope, None
                await asyncio.sleep(0.2)
        self._books.execute("update published set confirmed = ? where event = ?", (time.time(), event_id))

    def _kind_of(self, number: int) -> Kind:
        kind: Kind = self._options.kind
        return kind if number in self._specials else "works"

    async def listen(self) -> None:
        """Do what standard input says."""
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        async for line in reader:
            if line == b"resume\n":
                self._goes_on.set()
            elif line == b"pause\n":
                self._goes_on.clear()
                while self._under_way:
                    await asyncio.wait(set(self._under_way))
                print("paused", flush=True)
        os._exit(1)  # whoever started this program is gone


async def main(options: argparse.Namespace) -> None:
    async with Bus(options.url, source=SOURCE) as bus:
        publisher = Publisher(options, bus)
        listening = asyncio.create_task(publisher.listen())
        await publisher.publish_all()
        listening.cancel()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--url")
    parser.add_argument("--books", type=Path)
    parser.add_argument("--events", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--kind")
    parser.add_argument("--every", type=int)
    parser.add_argument("--share", type=float)
    asyncio.run(main(parser.parse_args()))
