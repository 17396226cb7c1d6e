"""The handling program: services whose handler writes one row per event, and does what the event tells it to.

An effect is inserted by its key; where it is there already, its count goes up: so the handler is idempotent, and the
books know how often it ran.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sqlite3
import time
from datetime import timedelta
from pathlib import Path

from eventbus import Context, Retry, Service, run
from tests.faults.ledger import saboteurs
from tests.faults.ledger.books import FOLLOWS, SharedStore, open_books
from tests.faults.ledger.events import Counted, Followed
from tests.faults.ledger.processes import end_with_parent

WORK_S = 0.005  # long enough for a kill to fall into it
SLOW_S = 8.0
BLOCKED_S = 20.0  # longer than the broker waits for a heartbeat where a cell sets one of 4 s
TIMEOUT = timedelta(seconds=3)
# Each a single level of the delay tree: a cell that makes its queues refuse is about the copies that we publish, not
# about what a broker cannot move on from one level to the next, and tries again only after three minutes.
RETRY = Retry(attempts=10, delay=timedelta(milliseconds=250), factor=2.0, max_delay=timedelta(seconds=4), jitter=0.0)
WRITE_RUN = "insert into runs values (?, ?, ?, ?, ?)"
WRITE_EFFECT = """
insert into effects values (?, ?, ?, ?, 1) on conflict (service, event) do update set count = count + 1
"""


class NoException(BaseException):
    """What a handler should never raise."""


def counting(name: str, books: sqlite3.Connection, options: argparse.Namespace) -> Service:
    """The service *name*, which does each event's work."""
    timeout = timedelta(minutes=1) if options.patient else TIMEOUT
    service = Service(name, retry=RETRY, timeout=timeout, prefetch=options.prefetch, concurrency=options.concurrency)

    @service.on(Counted)
    async def handle(event: Counted, context: Context) -> None:
        event_id = context.envelope.id
        is_first = event.kind != "works" and not has_run(books, name, event_id)
        books.execute(WRITE_RUN, (name, event_id, event.number, context.attempt, time.time()))
        await asyncio.sleep(options.work_s)
        if event.kind == "publishes-and-exits":
            await context.publish(Followed(number=event.number))  # by every run, with the same id
        if is_first or event.kind == "poison":
            books.execute("insert into broken values (?, ?, ?, ?)", (name, event_id, event.number, time.time()))
            await misbehave(event)
        books.execute(WRITE_EFFECT, (name, event_id, event.number, time.time()))

    @service.on(Followed)
    async def follow(event: Followed, context: Context) -> None:
        books.execute(WRITE_RUN, (name + FOLLOWS, context.envelope.id, event.number, context.attempt, time.time()))
        books.execute(WRITE_EFFECT, (name + FOLLOWS, context.envelope.id, event.number, time.time()))

    return service


def has_run(books: sqlite3.Connection, service: str, event: str) -> bool:
    question = "select 1 from runs where service = ? and event = ?"
    return books.execute(question, (service, event)).fetchone() is not None


async def misbehave(event: Counted) -> None:
    """What the event's kind does to a handler the first time."""
    match event.kind:
        case "works":
            return
        case "fails":
            raise ConnectionError("the first time fails")
        case "slow":
            await asyncio.sleep(SLOW_S)
        case "hangs":
            await asyncio.Event().wait()
        case "raises-base-exception":
            raise NoException
        case "blocks":
            time.sleep(BLOCKED_S)  # noqa: ASYNC251  # the point
        case "publishes-and-exits" | "exits" | "poison":
            os._exit(1)


def main(options: argparse.Namespace) -> None:
    end_with_parent()
    if options.saboteur:
        saboteurs.ALL[options.saboteur]()
    books = open_books(options.books)
    services = [counting(name, books, options) for name in options.services.split(",")]
    store = SharedStore(books, timedelta(seconds=options.lease_s))
    run(*services, url=options.url, idempotency=store, grace=timedelta(seconds=5))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--url")
    parser.add_argument("--books", type=Path)
    parser.add_argument("--services")
    parser.add_argument("--work-s", type=float, default=WORK_S)
    parser.add_argument("--prefetch", type=int, default=100)
    parser.add_argument("--concurrency", type=int, default=100)
    parser.add_argument("--lease-s", type=float, default=30, help="the longest lease that the store gives")
    parser.add_argument("--patient", action="store_true", help="handlers may take a minute")
    parser.add_argument("--saboteur", choices=list(saboteurs.ALL))
    main(parser.parse_args())
