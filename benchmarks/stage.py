"""Runs cells: each program a process of its own, in a virtual host that is new for each cell."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.databases import Databases
from benchmarks.figures import (
    CPU_HANDLE,
    CPU_PUBLISH,
    HANDLE,
    MEMORY,
    MEMORY_AT_10000,
    PUBLISH_MANY,
    PUBLISH_ONE,
    PUBLISH_WINDOW,
    RELAYED,
    TRANSACTION,
    TRANSACTION_WITH_EVENT,
    Answer,
    Figure,
    cpu_us,
    latencies_of,
    median_ms,
    rate_of,
)
from benchmarks.plan import LATENCY_RATE, MODULES, OUTBOX_KEYS, PICK_UP_RATE, C, Cell
from benchmarks.programs import outbox
from benchmarks.programs.job import WINDOW, Job
from tests.servers import BrokerServer

SOURCE = Path(__file__).parent / "c" / "client.c"
START_S = 60.0
SLOWEST_RATE = 150  # events a second; a program that is slower is stopped
SAMPLES = 5  # of what is measured by starting a program
WHAT = {"one": PUBLISH_ONE, "window": PUBLISH_WINDOW, "many": PUBLISH_MANY}


class ProgramError(Exception):
    """A measured program did not do its work."""


def build_client(folder: Path) -> Path | None:
    """The C client; None where there is no compiler or no librabbitmq, and we may not install them."""
    return _compiled(folder) or (_compiled(folder) if _install_compiler() else None)


def _compiled(folder: Path) -> Path | None:
    client = folder / "client"
    command = ["cc", "-O2", "-D_GNU_SOURCE", "-o", str(client), str(SOURCE), "-lrabbitmq"]
    if shutil.which("cc") is None or subprocess.run(command, capture_output=True).returncode != 0:
        return None
    return client


def _install_compiler() -> bool:
    """As the tests install their broker: on Debian, where we are root."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return False
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "gcc", "libc6-dev", "librabbitmq-dev"]
    return all(
        subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0
        for command in (["apt-get", "update", "-qq"], install)
    )


class Process:
    """One program at work."""

    def __init__(self, command: Sequence[str], limit_s: float) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=_environment(),
        )
        # Read all the time, or a program that logs much would wait for us.
        self._said_wrong: list[str] = []
        self._reader = threading.Thread(target=self._read_errors, daemon=True)
        self._reader.start()
        self._limit = threading.Timer(limit_s, self._process.kill)
        self._limit.start()

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        self._said_wrong += self._process.stderr

    def await_line(self, expected: str) -> None:
        if (line := self._line()) != expected:
            raise self._failure(f"said {line[:80]!r} instead of {expected!r}")

    def go(self) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure("ended before it began") from None

    def answer(self) -> Answer:
        """What it measured; it has ended when this returns."""
        while (line := self._line()) in ("working", "ready"):
            pass
        if not line.startswith("{"):
            raise self._failure("ended without an answer")
        answer: dict[str, Any] = json.loads(line)
        self._process.wait(START_S)
        return answer

    def end(self) -> None:
        self._limit.cancel()
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().rstrip("\n")

    def _failure(self, what: str) -> ProgramError:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        return ProgramError(f"{what}; its last words: {''.join(self._said_wrong[-8:]).strip() or 'none'}")


def _environment() -> dict[str, str]:
    """The caller's, without what would change a program's defaults."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("EVENTBUS_", "OTEL_"))}


class Stage:
    """Runs cells on one broker."""

    def __init__(self, broker: BrokerServer, client: Path | None, databases: Databases) -> None:
        self._broker = broker
        self._client = client
        self._databases = databases

    def run(self, cell: Cell) -> tuple[list[Figure], list[dict[str, object]]]:
        """The cell's figures, and a profile where it asks for one.

        Raises:
            ProgramError: a program failed.
        """
        if cell.kind == "start":
            return starts(), []
        with ExitStack() as needed:
            url = "memory://" if cell.kind == "embedded" else self._broker.new_vhost()
            needed.callback(self._broker.drop_vhosts)
            database = needed.enter_context(self._databases.new(cell.database)) if cell.database else ""
            match cell.kind:
                case "embedded":
                    with self._running(cell, Job(role="both", url=url, events=cell.events)) as process:
                        return [Figure("embedded", rate_of([_whole(process, cell.events)]))], []
                case "latency":
                    return self._latency(cell, url), []
                case "publish":
                    answers = self._publish(cell, url)
                    return [Figure(WHAT[str(cell.options["how"])], rate_of(answers))], []
                case "relay":
                    return self._relay(cell, url, database), []
                case "pick up":
                    return self._pick_up(cell, url, database), []
                case "transaction":
                    return self._transaction(cell, database), []
                case "flow" | "profile":
                    return self._flow(replace(cell, options=_with_store(cell, database)), url)

    def _flow(self, cell: Cell, url: str) -> tuple[list[Figure], list[dict[str, object]]]:
        """Publish all, and then handle what is in the queue."""
        published = self._publish(cell, url)
        handled = self._handle(cell, url)
        if cell.kind == "profile":
            told = {"publish": published[0], "handle": handled[0]}
            return [], [{"of": of, "files": answer["files"], "rows": answer["profile"]} for of, answer in told.items()]
        how = str(cell.options.get("how", "window"))
        figures = [
            Figure(WHAT[how], rate_of(published)),
            Figure(HANDLE, rate_of(handled)),
            Figure(CPU_PUBLISH, cpu_us(published)),
            Figure(CPU_HANDLE, cpu_us(handled)),
            Figure(MEMORY, max(answer["max_rss_kb"] for answer in handled) / 1024),
        ]
        if at_10000 := max(answer.get("rss_at_10000_kb", 0) for answer in handled):
            figures.append(Figure(MEMORY_AT_10000, at_10000 / 1024))
        return figures, []

    def _publish(self, cell: Cell, url: str) -> list[Answer]:
        each = cell.events // cell.processes
        job = self._job(cell, role="publish", url=url, events=each)
        return self._together(cell, job, [each] * cell.processes)

    def _handle(self, cell: Cell, url: str) -> list[Answer]:
        job = self._job(cell, role="handle", url=url, events=cell.events, share=cell.processes > 1)
        return self._together(cell, job, [cell.events])

    def _together(self, cell: Cell, job: Job, expected: Sequence[int]) -> list[Answer]:
        """Run the cell's processes from the same moment on."""
        processes: list[Process] = []
        try:
            for _ in range(cell.processes):
                processes.append(self._start(cell, job))
                processes[-1].await_line("ready")  # one declares at a time
            for process in processes:
                process.go()
            answers = [process.answer() for process in processes]
        finally:
            for process in processes:
                process.end()
        if sum(int(answer["count"]) for answer in answers) != sum(expected):
            raise ProgramError(f"saw {[answer['count'] for answer in answers]} of {sum(expected)} events")
        return answers

    def _latency(self, cell: Cell, url: str) -> list[Figure]:
        handling = self._job(cell, role="handle", url=url, events=cell.events, latency=True)
        publishing = self._job(cell, role="publish", url=url, events=cell.events, rate=LATENCY_RATE)
        with self._running(cell, publishing) as publisher:
            publisher.await_line("ready")  # the queue is declared
            with self._running(cell, handling) as worker:
                worker.await_line("ready")
                worker.go()
                worker.await_line("working")
                time.sleep(0.5)  # what has started is calm
                publisher.go()
                answer = _complete(worker.answer(), cell.events)
            _complete(publisher.answer(), cell.events)
        return latencies_of(answer)

    # ── the outbox ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _relay(self, cell: Cell, url: str, database: str) -> list[Figure]:
        """Publish the rows of a full outbox; none twice, and those of one key in order."""
        job = Job(role="relay", url=url, database=database, events=cell.events, keys=OUTBOX_KEYS)
        with ExitStack() as running:
            reader = running.enter_context(self._running(cell, replace(job, role="check")))
            reader.await_line("ready")  # the queue is declared
            for _ in range(cell.processes):
                running.enter_context(self._running(cell, job)).await_line("ready")
            asyncio.run(outbox.shared(database, cell.processes))
            asyncio.run(outbox.fill(job))
            marks = asyncio.run(outbox.published(database, cell.events, START_S + cell.events / SLOWEST_RATE))
            reader.go()
            answer = _complete(reader.answer(), cell.events)
        if answer["again"] or answer["disordered"]:
            raise ProgramError(f"{answer['again']} rows arrived twice, {answer['disordered']} out of order")
        return [Figure(RELAYED, rate_of([{"marks": marks}]))]

    def _pick_up(self, cell: Cell, url: str, database: str) -> list[Figure]:
        """From before a transaction that writes an event until inside the handler."""
        job = Job(role="handle", url=url, database=database, events=cell.events, keys=OUTBOX_KEYS)
        with ExitStack() as running:
            worker = running.enter_context(self._running(cell, replace(job, latency=True)))
            worker.await_line("ready")
            worker.go()
            worker.await_line("working")
            running.enter_context(self._running(cell, replace(job, role="relay"))).await_line("ready")
            placing = running.enter_context(self._running(cell, replace(job, role="place", rate=PICK_UP_RATE)))
            placing.await_line("ready")
            placing.go()
            _complete(placing.answer(), cell.events)
            answer = _complete(worker.answer(), cell.events)
        return latencies_of(answer)

    def _transaction(self, cell: Cell, database: str) -> list[Figure]:
        """What a transaction with one row takes, and one that writes an event besides."""
        with self._running(cell, Job(role="transact", url="", database=database, events=cell.events)) as process:
            answer = _whole(process, cell.events)
        return [
            Figure(TRANSACTION, median_ms(answer["without_us"])),
            Figure(TRANSACTION_WITH_EVENT, median_ms(answer["with_us"])),
        ]

    # ── programs ────────────────────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def _running(self, cell: Cell, job: Job) -> Iterator[Process]:
        process = self._start(cell, job)
        try:
            yield process
        finally:
            process.end()

    @staticmethod
    def _job(cell: Cell, **more: Any) -> Job:
        return Job(**{**cell.options, **more})

    def _start(self, cell: Cell, job: Job) -> Process:
        if cell.program == C:
            command = self._c_command(job)
        else:
            program = "outbox" if job.role in outbox.ROLES else MODULES[cell.program]
            module = f"benchmarks.programs.{program}"
            command = [sys.executable, "-m", module, json.dumps(asdict(job))]
        return Process(command, START_S + job.events / SLOWEST_RATE)

    def _c_command(self, job: Job) -> list[str]:
        assert self._client is not None
        parts = urllib.parse.urlsplit(job.url)
        many = 1 if job.role == "handle" else {"one": 1, "window": WINDOW, "many": WINDOW}[job.how]
        return [
            str(self._client), parts.hostname or "", str(parts.port), urllib.parse.unquote(parts.path[1:]),
            parts.username or "guest", parts.password or "guest", job.role, str(job.events), str(job.payload),
            str(many), str(job.rate or 0), str(int(job.latency)), str(int(job.headers)),
        ]  # fmt: skip


def _with_store(cell: Cell, url: str) -> Mapping[str, object]:
    """The cell's options, with its idempotency store, if it has one of its own."""
    return {**cell.options, "idempotency": url} if url else cell.options


def _whole(process: Process, events: int) -> Answer:
    process.await_line("ready")
    process.go()
    return _complete(process.answer(), events)


def _complete(answer: Answer, events: int) -> Answer:
    if answer["count"] != events:
        raise ProgramError(f"saw {answer['count']} of {events} events")
    return answer


def starts() -> list[Figure]:
    """How long a program waits for `import eventbus`, and a person for `eventbus --help`."""
    timed = "import time; began = time.perf_counter(); {}; print(time.perf_counter() - began)"
    figures = []
    for _ in range(SAMPLES):
        for statement in ("import eventbus", "from eventbus import *"):
            ran = _run([sys.executable, "-c", timed.format(statement)])
            figures.append(Figure(statement, float(ran)))
        began = time.perf_counter()
        _run([str(Path(sys.executable).parent / "eventbus"), "--help"])
        figures.append(Figure("eventbus --help", time.perf_counter() - began))
    return figures


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=START_S, env=_environment())
    except FileNotFoundError as error:
        raise ProgramError(f"{Path(command[0]).name} is not installed") from error
    if done.returncode != 0:
        raise ProgramError(done.stderr[-500:])
    return done.stdout
