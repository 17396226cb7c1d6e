"""Is a worker well? `/live` and `/ready` over HTTP, and a watchdog for an event loop that does not turn.

The one rule: whoever answers never needs the event loop. Looks are taken on the loop, once a second; a thread of its
own answers with the last one, so that a blocked loop is an answer and not a silence. Nothing is told to health per
delivery: it asks.

    /live    the event loop turns
    /ready   every queue is consumed, publishing is not blocked, the idempotency store answers

200, or 503 with `{"status": "not ready", "problems": ["payments: queue events.payments is not consumed: ..."]}`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import socket
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from types import FrameType
from typing import Final, Self
from urllib.parse import urlsplit

from eventbus.errors import SetupError
from eventbus.worker import Probe, Worker, probes_of, problems_of

log = logging.getLogger("eventbus.health")

LOOK_S: Final = 1.0  # how often a look is taken, and the loop is asked whether it turns
BLOCKED_S: Final = 5.0  # a loop that has not turned for longer is blocked: heartbeats and leases suffer next
# /ready is red within these two and a look after a store or the broker fell silent: 10 s.
PROBE_AGAIN_S: Final = 4.0
SILENT_S: Final = 5.0
PROBE_S: Final = 20.0  # asked anew after that: what was asked may have got lost
CLIENT_S: Final = 5.0  # a client that sends no request within this is hung up on


# ── does the event loop turn? ─────────────────────────────────────────────────────────────────────────────────────────


class Watchdog:
    """Asks the running event loop, from a thread of its own, whether it turns; logs where it does not.

    Enter and leave it on the loop's own thread.
    """

    def __init__(self, *, blocked_s: float = BLOCKED_S, look_s: float = LOOK_S) -> None:
        self._blocked_s, self._look_s = blocked_s, look_s
        self._asked_s: float | None = None  # since when an answer is waited for
        self._is_told = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_looking, name="eventbus watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def blockage(self) -> str | None:
        """For how long the loop has been blocked, and where; None while it turns. From any thread."""
        asked_s = self._asked_s
        if asked_s is None or (silent_s := time.monotonic() - asked_s) <= self._blocked_s:
            return None
        return f"the event loop has not turned for {silent_s:.0f} s: it is at {_place(self._stack())}"

    def _keep_looking(self) -> None:
        while not self._ended.wait(self._look_s):
            self._look()

    def _look(self) -> None:
        asked_s = self._asked_s
        if asked_s is None:
            self._asked_s = time.monotonic()
            with suppress(RuntimeError):  # the loop is closed: nobody waits for it any more
                self._loop.call_soon_threadsafe(self._turned)
        elif not self._is_told and (silent_s := time.monotonic() - asked_s) > self._blocked_s:
            self._is_told = True
            stack = "".join(self._stack().format())
            _log_with_stack(f"the event loop has not turned for {silent_s:.1f} s: it is blocked here", stack)

    def _turned(self) -> None:
        asked_s, self._asked_s = self._asked_s, None
        if self._is_told and asked_s is not None:
            self._is_told = False
            log.warning("the event loop turns again, after %.1f s", time.monotonic() - asked_s)

    def _stack(self) -> traceback.StackSummary:
        """What the loop has called and waits for, the innermost last. Without locals, which hold events' data."""
        innermost: FrameType | None = sys._current_frames().get(self._loop_thread)
        frames = traceback.walk_stack(innermost) if innermost is not None else iter(())
        called = itertools.takewhile(lambda at: at[0].f_code.co_filename != asyncio.events.__file__, frames)
        summary = traceback.StackSummary.extract(called)
        summary.reverse()
        return summary


def _place(stack: Sequence[traceback.FrameSummary]) -> str:
    return f"{stack[-1].filename}:{stack[-1].lineno} in {stack[-1].name}" if stack else "a place unknown"


def _log_with_stack(message: str, stack: str) -> None:
    # `stack_info=True` would show the watchdog's own stack.
    record = log.makeRecord(log.name, logging.ERROR, __file__, 0, message, (), None, sinfo=stack.rstrip())
    if log.isEnabledFor(logging.ERROR):
        log.handle(record)


# ── is the worker ready? ──────────────────────────────────────────────────────────────────────────────────────────────


class _Asked:
    """One probe, asked over and over, one at a time. A long silence is an answer too."""

    def __init__(self) -> None:
        self._task: asyncio.Task[str | None] | None = None
        self._asked_s = 0.0
        self._answer: str | None = None

    def look(self, probe: Probe, now_s: float) -> str | None:
        """What is wrong as far as the last answer says. Never waits."""
        if self._task is not None and self._task.done():
            self._answer = _answer_of(self._task)
        if self._task is None or (self._task.done() and now_s - self._asked_s >= PROBE_AGAIN_S):
            self._task = asyncio.ensure_future(asyncio.wait_for(probe(), PROBE_S))
            self._asked_s = now_s
        elif not self._task.done() and now_s - self._asked_s > SILENT_S:
            return f"no answer for {now_s - self._asked_s:.0f} s"
        return self._answer

    async def end(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


def _answer_of(task: asyncio.Task[str | None]) -> str | None:
    if task.cancelled():
        return "the question was cancelled"
    error = task.exception()
    if isinstance(error, TimeoutError):
        return f"no answer within {PROBE_S:.0f} s"
    return task.result() if error is None else f"{type(error).__name__} while asking"


class Readiness:
    """What keeps a worker from its work: *problems* that it knows of, and what its *probes* say.

    Entered, it looks once a second.
    """

    def __init__(
        self,
        problems: Callable[[], Sequence[str]],
        probes: Callable[[], Mapping[str, Probe]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask_problems, self._ask_probes = problems, probes
        self._clock = clock
        self._asked: dict[str, _Asked] = {}
        self._seen: tuple[str, ...] = ("starting",)
        self._seen_s = clock()

    @asynccontextmanager
    async def looking(self) -> AsyncIterator[None]:
        """Look again and again until the block is left."""
        task = asyncio.create_task(self._keep_looking(), name="eventbus readiness")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await asyncio.gather(*(asked.end() for asked in self._asked.values()))

    async def _keep_looking(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(LOOK_S)

    def look(self) -> None:
        """Ask once. On the event loop."""
        now_s = self._clock()
        try:
            found = [*self._ask_problems()]
            for name, probe in self._ask_probes().items():
                answer = self._asked.setdefault(name, _Asked()).look(probe, now_s)
                # What is known says more than what is not answered.
                if answer is not None and not any(problem.startswith(f"{name}: ") for problem in found):
                    found.append(f"{name}: {answer}")
        except Exception as error:
            log.exception("readiness cannot be told")
            found = [f"readiness cannot be told: {type(error).__name__}"]
        self._seen, self._seen_s = tuple(found), now_s

    def problems(self) -> Sequence[str]:
        """What the last look has seen. From any thread."""
        seen_s = self._seen_s
        if self._clock() - seen_s > BLOCKED_S:
            return [f"the last look is {self._clock() - seen_s:.0f} s old: the event loop hardly turns"]
        return self._seen


# ── answering ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = CLIENT_S
    server_version, sys_version = "eventbus", ""

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        check = self.server.checks.get(path)
        if check is None:
            known = " and ".join(self.server.checks)
            self._send(HTTPStatus.NOT_FOUND, {"status": "not found", "problems": [f"there is only {known}"]})
            return
        problems = list(check())
        name = path.lstrip("/")
        status = HTTPStatus.SERVICE_UNAVAILABLE if problems else HTTPStatus.OK
        self._send(status, {"status": f"not {name}" if problems else name, "problems": problems})

    def do_HEAD(self) -> None:
        self.do_GET()

    def _send(self, status: HTTPStatus, answer: Mapping[str, object]) -> None:
        body = json.dumps(answer, ensure_ascii=False).encode(errors="replace") + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Not to stderr, as the class does by itself: every few seconds for ever."""


class _Server(ThreadingHTTPServer):
    """A thread for each request, so that a client that says nothing keeps nobody waiting."""

    daemon_threads = True
    server_bind = TCPServer.server_bind  # HTTPServer's own looks the host's name up, which can take long

    def __init__(self, host: str, port: int, checks: Mapping[str, Callable[[], Sequence[str]]]) -> None:
        self.checks = checks
        # `localhost` is both: IPv4 then, where most clients look first.
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family = min((family for family, *_ in found), key=lambda family: family != socket.AF_INET)
        super().__init__((host, port), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away in the middle is nobody's concern; the class would print a traceback."""
        log.debug("a health request was not answered", exc_info=True)


@asynccontextmanager
async def answering(
    host: str, port: int, *, live: Callable[[], Sequence[str]], ready: Callable[[], Sequence[str]]
) -> AsyncIterator[str]:
    """Answer `/live` and `/ready` at *host* and *port* (0: a free one) until the block is left; gives the URL.

    Raises:
        SetupError: that address cannot be had.
    """
    try:
        server = _Server(host, port, {"/live": live, "/ready": ready})
    except (OSError, OverflowError) as error:  # the second: no such port number
        why = getattr(error, "strerror", None) or str(error)
        raise SetupError(f"health cannot listen at {_shown(host, port)}: {why}; give another address") from error
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="eventbus health")
    thread.daemon = True
    thread.start()
    try:
        yield f"http://{_shown(host, server.server_address[1])}"
    finally:
        await asyncio.to_thread(server.shutdown)
        server.server_close()
        thread.join()


def _shown(host: str, port: object) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@asynccontextmanager
async def served(worker: Worker, watchdog: Watchdog, host: str, port: int) -> AsyncIterator[str]:
    """Tell at *host* and *port* how *worker* is, from before its start to after its end; gives the URL.

    Raises:
        SetupError: that address cannot be had.
    """

    async with told(lambda: problems_of(worker), lambda: probes_of(worker), watchdog, host, port) as url:
        yield url


@asynccontextmanager
async def told(
    problems: Callable[[], Sequence[str]],
    probes: Callable[[], Mapping[str, Probe]],
    watchdog: Watchdog,
    host: str,
    port: int,
) -> AsyncIterator[str]:
    """Tell at *host* and *port* what *problems* and *probes* say, of whatever runs here; gives the URL.

    Raises:
        SetupError: that address cannot be had.
    """

    def live() -> Sequence[str]:
        blockage = watchdog.blockage()
        return [] if blockage is None else [blockage]

    readiness = Readiness(problems, probes)
    async with (
        readiness.looking(),
        answering(host, port, live=live, ready=lambda: live() or readiness.problems()) as url,
    ):
        yield url
