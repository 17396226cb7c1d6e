"""A user's first program, unchanged, as a process of its own: on the embedded broker and on RabbitMQ."""

from __future__ import annotations

import asyncio
import os
import sys
from collections import Counter
from pathlib import Path

FIRST = Path(__file__).parent.parent / "typed" / "first.py"


async def run_first(url: str | None) -> list[str]:
    """What it prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EVENTBUS_")}
    if url is not None:
        environment["EVENTBUS_URL"] = url
    process = await asyncio.create_subprocess_exec(
        sys.executable, FIRST, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, err.decode()
    assert b"Traceback" not in err
    assert b"never retrieved" not in err
    return out.decode().splitlines()


EXPECTED = {
    "order_placed.v1": 6, "payment_captured.v1": 4, "payment_declined.v1": 1, "thank you": 4, "sorry: limit": 1,
}  # fmt: skip


async def test_the_first_program_runs_on_the_embedded_broker() -> None:
    assert Counter(await run_first(None)) == EXPECTED


async def test_the_first_program_runs_on_rabbitmq(rabbitmq_url: str) -> None:
    assert Counter(await run_first(rabbitmq_url)) == EXPECTED
