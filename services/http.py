"""How a service serves HTTP inside its own event loop, and what all doors have in common. Nothing here knows a service.

The process has one owner of its signals, `run`; a server never takes them, so that several can live in one process.
"""

import asyncio
import json
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Annotated

import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import StringConstraints
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncSession

from eventbus import EventBusError, Worker
from eventbus.database import state_of
from eventbus.health import Readiness
from eventbus.worker import probes_of, problems_of
from services.database import Database

log = logging.getLogger(__name__)

# As HTML's <input type=email> has it: no quoting, no comments, nothing that a mail header could misread.
Email = Annotated[
    str,
    StringConstraints(
        to_lower=True,
        max_length=254,
        pattern=r"^[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]+@[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*$",
    ),
]

# What people write on one line. A control character belongs in none, and PostgreSQL's text takes no U+0000: a request
# that was let in with one would be accepted here, and fail for ever where it is first kept.
Text = Annotated[str, StringConstraints(pattern=r"^\P{Cc}*$")]

# PostgreSQL's codes of what passes: a lost connection, a deadlock, no room, a lock, an operator at work, a broken disk.
# Other drivers call these an OperationalError; asyncpg's are all plain DBAPIErrors.
_PASSING_STATES = ("08", "40", "53", "55", "57", "58")


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


async def _transaction(request: Request) -> AsyncIterator[AsyncSession]:
    database: Database = request.app.state.database
    async with database.begin() as session:
        yield session


# A transaction for one request: what is written and what the outbox is given in it are committed together. Committed
# before the client is answered, which is what `function` means: by default FastAPI leaves dependencies after that, and
# a commit that fails would be an order that was promised and never was.
Transaction = Annotated[AsyncSession, Depends(_transaction, scope="function")]


def is_passing(error: Exception) -> bool:
    """Whether *error* is the database's trouble of the moment, and not what the request made of it."""
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    if isinstance(error, InterfaceError) and error.orig is not None:
        # asyncpg's own DataError, of a value that it cannot send, is an InterfaceError and a ValueError.
        return not isinstance(error.orig.__cause__, ValueError)
    return isinstance(error, OSError | OperationalError | PoolTimeout) or state_of(error).startswith(_PASSING_STATES)


@asynccontextmanager
async def watched(worker: Worker) -> AsyncIterator[Readiness]:
    """What keeps *worker* from its work, as it was seen within the last second, for `put_on`."""
    readiness = Readiness(lambda: problems_of(worker), lambda: probes_of(worker))
    async with readiness.looking():
        yield readiness


def put_on(app: FastAPI, database: Database, worker: Readiness | None = None) -> None:
    """Give *app* its database, for `Transaction`, and answer for it while it is away, and when asked how it is.

    GET /health: 200 while the database answers. GET /ready: 200 while what is committed also leaves and the *worker*
    beside the door, if there is one, works. The broker may be away for /health and for every POST, whose part it does
    later; /ready tells of it.
    """
    app.state.database = database

    @app.exception_handler(SQLAlchemyError)
    @app.exception_handler(OSError)
    async def unavailable(_: Request, error: Exception) -> JSONResponse:
        if not is_passing(error):
            raise error  # 500: sent again it would fail again
        # Nothing was promised: whether it was committed, the client's retry finds out.
        log.warning("not committed: %s", type(error).__name__)
        return JSONResponse(
            {"detail": "not accepted yet: send it again with the same key"},
            status_code=503,
            headers={"Retry-After": "5"},
        )

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        # FastAPI's own answer quotes what was sent, which UTF-8 and JSON may not take (half a surrogate pair, NaN).
        told = [{name: problem[name] for name in ("type", "loc", "msg")} for problem in error.errors()]
        return Response(json.dumps({"detail": told}), status_code=422, media_type="application/json")

    @app.get("/health")
    async def health() -> dict[str, str]:
        async with database.session() as session:
            await session.execute(text("SELECT 1"))
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> JSONResponse:
        # A worker tells of its relay by itself.
        relay = [] if database.relay is None else database.relay.problems()
        problems = relay if worker is None else [*worker.problems()]
        told = {"status": "not ready" if problems else "ready", "problems": problems}
        return JSONResponse(told, status_code=503 if problems else 200)


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
