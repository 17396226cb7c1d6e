"""How a service serves HTTP inside its own event loop, and what all doors have in common. Nothing here knows a service.

The process has one owner of its signals, `run`; a server never takes them, so that several can live in one process.
"""

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from typing import Annotated

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import StringConstraints
from sqlalchemy import text

from eventbus import EventBusError, PublishError, Worker
from services.database import Sessions

log = logging.getLogger(__name__)

# Long enough to outlive a broker's hiccup, short enough for a client that waits for an answer.
PUBLISH_TIMEOUT = timedelta(seconds=5)

# As HTML's <input type=email> has it: no quoting, no comments, nothing that a mail header could misread.
Email = Annotated[
    str,
    StringConstraints(
        to_lower=True,
        max_length=254,
        pattern=r"^[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]+@[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*$",
    ),
]


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def serving(app: FastAPI, host: str, port: int) -> AsyncIterator[int]:
    """Serve *app* until the block ends, then finish the requests under way; gives the port (of 0: the free one)."""
    listener = socket.create_server((host, port))
    bound: int = listener.getsockname()[1]
    server = _Server(
        uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=5,
        )
    )
    task = asyncio.create_task(server.serve(sockets=[listener]), name=f"http :{bound}")
    log.info("ready: http://%s:%s", host, bound)
    try:
        yield bound
    finally:
        server.should_exit = True
        await task


def answer_when_the_bus_is_away(app: FastAPI) -> None:
    """Answer 503 when an event was not confirmed: the client's retry publishes it again under the same id."""

    @app.exception_handler(PublishError)
    async def unavailable(_: Request, error: PublishError) -> JSONResponse:
        log.warning("not confirmed: %s", error)
        return JSONResponse(
            {"detail": "not accepted yet: send it again with the same key"},
            status_code=503,
            headers={"Retry-After": "5"},
        )


def answer_health(app: FastAPI, sessions: Sessions) -> None:
    """GET /health: 200 while the database answers. The bus is not asked: away, it is a matter of 503 and a retry."""

    @app.get("/health")
    async def health() -> dict[str, str]:
        async with sessions() as session:
            await session.execute(text("SELECT 1"))
        return {"status": "ok"}


async def until_stopped(worker: Worker | None = None) -> None:
    """Return on SIGINT or SIGTERM; when *worker* ends first, raise why."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    waits: list[asyncio.Task[object]] = [asyncio.create_task(stop.wait(), name="signal")]
    if worker is not None:
        waits.append(asyncio.create_task(worker.wait(), name="worker"))
    try:
        done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in waits:
            task.cancel()


def run(main: Callable[[], Coroutine[None, None, None]]) -> None:
    """Run *main*; what cannot be recovered from is one line and exit code 1."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    try:
        asyncio.run(main())
    except (EventBusError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
