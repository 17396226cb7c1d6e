"""The handling program. What its handlers have done is a line in a file: service, and the event as it was given.

An event whose subject says so makes its handler fail, refuse, postpone or hang.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from datetime import timedelta
from pathlib import Path

from eventbus import Context, Envelope, Event, Reject, Retry, RetryLater, Service, run
from tests.faults.hostile.count import line_of

# Soon, and not for ever: what fails here fails each time.
RETRY = Retry(attempts=2, delay=timedelta(milliseconds=250), jitter=0.0)


class OrderPlaced(Event, name="order_placed"):
    order_id: int
    email: str
    total: float = 0.0


def services_writing_to(file: int) -> list[Service]:
    """One service that takes every event as it is, and one that reads orders."""
    everything, orders = Service("everything", retry=RETRY), Service("orders", retry=RETRY)

    def note(service: str, envelope: Envelope) -> None:
        os.write(file, line_of(service, envelope).encode() + b"\n")

    @everything.on("#")
    async def take(envelope: Envelope) -> None:
        await misbehave(envelope.subject)
        note("everything", envelope)

    @orders.on("order_placed")
    async def place(event: OrderPlaced, context: Context) -> None:
        await misbehave(context.envelope.subject)
        note("orders", context.envelope)

    return [everything, orders]


async def misbehave(subject: str | None) -> None:
    match subject:
        case "fails":
            raise ConnectionError("this one always fails")
        case "refused":
            raise Reject("not wanted")
        case "postponed":
            raise RetryLater(timedelta(milliseconds=250))
        case "hangs":
            await asyncio.Event().wait()


def main(url: str, into: Path) -> None:
    file = os.open(into, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    run(*services_writing_to(file), url=url, grace=timedelta(seconds=5))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--url")
    parser.add_argument("--into", type=Path)
    options = parser.parse_args()
    main(options.url, options.into)
