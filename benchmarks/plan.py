"""What is measured, as data: a cell is one program in one situation, run once in every round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

OURS, C = "eventbus", "C, librabbitmq"
FASTSTREAM, AIO_PIKA, TASKIQ, CELERY, DRAMATIQ, PIKA = "FastStream", "aio-pika", "taskiq", "Celery", "Dramatiq", "pika"
MODULES = {
    OURS: "ours",
    FASTSTREAM: "faststream_",
    AIO_PIKA: "aio_pika_",
    TASKIQ: "taskiq_",
    CELERY: "celery_",
    DRAMATIQ: "dramatiq_",
    PIKA: "pika_",
}
# Where a program's defaults are weaker than what is compared, or it cannot do what the others do.
NOTES = {
    OURS: "defaults, with idempotency in memory where nothing else is said; prefetch and concurrency raised from 100 "
    "to 300",
    FASTSTREAM: "strengthened: quorum queue (default classic), persistent (default not), prefetch (default unlimited)",
    AIO_PIKA: "strengthened: quorum queue (default classic), persistent (default not), prefetch (default unlimited)",
    TASKIQ: "defaults are as durable; prefetch raised from 10, tasks at a time from 100 to 300",
    CELERY: "strengthened: confirms (default none), late acks (default early), quorum queue; one solo worker; "
    "no window: each publish waits for its confirm",
    DRAMATIQ: "strengthened: confirms (default none), quorum queue (no option: a method overridden); eight threads; "
    "no window: each publish waits for its confirm",
    PIKA: "strengthened: confirms, quorum queue, persistent; BlockingConnection, its SelectConnection for the window",
    C: "the limit: the same messages as ours, headers and all, and as ours returned where no queue takes them; no "
    "validation, no handler",
}
GROUPS = {
    "publish": "one by one, in a window of 1,000, publish_many",
    "handle": "a full queue: decode, validate, claim, handle, settle",
    "latency": "end to end at 500 events a second",
    "idempotency": "without it, and with its keys in Redis, SQLite and PostgreSQL",
    "outbox": "relays on PostgreSQL and SQLite: rows a second, latency, and what a transaction pays for an event",
    "tracing": "with the OpenTelemetry SDK, its batch processor and an exporter into nothing",
    "payload": "100 B and 10 kB instead of 420 B",
    "subscriptions": "10 and 1,000 instead of 1, with events for each of them, and for one of 1,000",
    "slow": "one slow handler of two seconds at a time, and one event in 5,000",
    "processes": "two that publish, then two that handle",
    "loop": "uvloop instead of asyncio's own",
    "backlog": "10 thousand to a million events in the queue: time and memory",
    "embedded": "memory://, publishing and handling in one process",
    "start": "import eventbus, eventbus --help",
    "profile": "where the time goes",
}

# Slow programs get fewer events, so that a round takes each about as long.
SHARES = {OURS: 2.0, C: 2.0, FASTSTREAM: 0.5, PIKA: 0.5, AIO_PIKA: 0.5, TASKIQ: 0.5, CELERY: 0.2, DRAMATIQ: 0.2}
ONE_BY_ONE = 0.1  # of the events
LATENCY_RATE = 500.0
LATENCY_S = 5.0
BACKLOGS = (10_000, 100_000, 1_000_000)


# Every row has one of so many keys, and rows of one key leave in order.
OUTBOX_KEYS = 1000
# What the targets ask for is asked of this many; the others say how it compares.
MANY_ROWS, ROWS = 100_000, 20_000
PICK_UP_RATE, PICK_UP_S = 100.0, 12.0
TRANSACTIONS = 2000

ONE_SLOW, MANY_SLOW = "a slow handler among fast ones", "one in 5,000 slow"
FOR_ONE = "1000 subscriptions, events for one"
NO_HEADERS = "no headers"  # of the C client's: a message that is less than any event

Kind = Literal["flow", "publish", "latency", "embedded", "start", "profile", "relay", "pick up", "transaction"]
Database = Literal["", "redis", "sqlite", "postgresql"]
STORES: dict[Database, str] = {"redis": "Redis", "sqlite": "SQLite", "postgresql": "PostgreSQL"}
OUTBOXES: tuple[Database, ...] = ("postgresql", "sqlite")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One program in one situation."""

    kind: Kind
    program: str
    events: int
    groups: frozenset[str]
    variant: str = ""
    options: Mapping[str, object] = field(default_factory=dict)  # of the programs' Job
    processes: int = 1
    database: Database = ""  # a new one for each cell: for the idempotency store or the outbox
    is_once: bool = False  # not in every round

    @property
    def title(self) -> str:
        return f"{self.program}: {self.variant or self.kind}"


def cells(events: int, *, quick: bool = False) -> list[Cell]:
    """Everything that `make bench` measures, with about *events* events each; *quick* leaves out what takes long."""
    compared = list(_compared(events, quick=quick))
    asked = [
        cell
        for cell in compared
        if cell.program in (OURS, C, FASTSTREAM) and cell.variant in ("", NO_HEADERS, "one by one")
    ]
    return [
        *_stores(events),
        *_targets(events),
        *compared,
        *([] if quick else 2 * [*_targets(events), *asked]),  # of three figures one bad second would decide
        *_variants(events, quick=quick),
        *_outbox(quick=quick),
        *_once(events, quick=quick),
    ]


def _stores(events: int) -> Iterator[Cell]:
    """Just before ours in every round: the machine is as it is for the store that they are compared with."""
    for database in STORES:
        yield replace(_cell("flow", OURS, events, "idempotency", variant=in_store(database)), database=database)


def _targets(events: int) -> Iterator[Cell]:
    """Just before ours, too."""
    ours = events * SHARES[OURS]
    yield _cell("flow", OURS, ours, "tracing", variant="with tracing", tracing=True)
    yield _cell("flow", OURS, ours, "subscriptions", variant="1000 subscriptions", subscriptions=1000)
    yield _cell("flow", OURS, ours, "subscriptions", variant=FOR_ONE, subscriptions=1000, types=1)
    yield _cell("flow", OURS, ours, "slow", variant=ONE_SLOW, slow_every=int(ours))


def _compared(events: int, *, quick: bool) -> Iterator[Cell]:
    # The variants of ours are compared with its flow.
    all_of_ours = frozenset(GROUPS) - {"latency", "backlog", "embedded", "start", "profile"}
    for program, share in SHARES.items():
        groups = all_of_ours if program == OURS else {"publish", "handle"}
        yield _cell("flow", program, events * share, *groups)
        if program == C:
            yield _cell("flow", C, events * share, *groups, variant=NO_HEADERS, headers=False)
        if program not in (CELERY, DRAMATIQ):  # their flow is one by one
            yield _cell("publish", program, events * ONE_BY_ONE, "publish", variant="one by one", how="one")
        if program in (OURS, FASTSTREAM, C) or not quick:
            yield _cell("latency", program, LATENCY_RATE * LATENCY_S, "latency", variant="latency")
    yield _cell("publish", OURS, events * SHARES[OURS], "publish", variant="publish_many", how="many")


def _variants(events: int, *, quick: bool) -> Iterator[Cell]:
    if quick:
        return
    ours = events * SHARES[OURS]
    yield _cell("flow", OURS, ours, "subscriptions", variant="10 subscriptions", subscriptions=10)
    yield _cell("flow", OURS, ours, "slow", variant=MANY_SLOW, slow_every=5000)
    yield _cell("flow", OURS, ours, "idempotency", variant="without idempotency", idempotency="")
    yield replace(_cell("flow", OURS, ours * 2, "processes", variant="2 processes"), processes=2)
    for program in (OURS, FASTSTREAM):
        yield _cell("flow", program, events * SHARES[program], "loop", variant="uvloop", loop="uvloop")
    for program in (OURS, FASTSTREAM, C):
        yield _cell("flow", program, events * SHARES[program], "payload", variant="100 B", payload=100)
        yield _cell("flow", program, events * SHARES[program] / 4, "payload", variant="10 kB", payload=10_000)


def _outbox(*, quick: bool) -> Iterator[Cell]:
    share = 10 if quick else 1
    for database in OUTBOXES:
        one = _cell("relay", OURS, ROWS / share, "outbox", variant=relayed(database, 1))
        yield replace(one, database=database, is_once=True)
        picked_up = _cell("pick up", OURS, PICK_UP_RATE * PICK_UP_S / share, "outbox", variant=in_outbox(database))
        yield replace(picked_up, database=database, is_once=True)
        paid = _cell("transaction", OURS, TRANSACTIONS / share, "outbox", variant=in_outbox(database))
        yield replace(paid, database=database, is_once=True)
    two = _cell("relay", OURS, MANY_ROWS / share, "outbox", variant=relayed("postgresql", 2))
    yield replace(two, database="postgresql", processes=2, is_once=True)


def in_store(database: Database) -> str:
    """What a cell with that idempotency store is called."""
    return f"keys in {STORES[database]}"


def in_outbox(database: Database) -> str:
    """What a cell with an outbox there is called."""
    return f"outbox in {STORES[database]}"


def relayed(database: Database, relays: int) -> str:
    """What a cell with *relays* is called."""
    return f"{relays} {'relay' if relays == 1 else 'relays'} on {STORES[database]}"


def _once(events: int, *, quick: bool) -> Iterator[Cell]:
    backlogs = BACKLOGS[:2] if quick else BACKLOGS
    found = [_cell("flow", OURS, many, "backlog", variant=f"a backlog of {many:,}", how="many") for many in backlogs]
    found.append(_cell("embedded", OURS, events, "embedded", variant="memory://"))
    found.append(_cell("start", OURS, 0, "start", variant="start"))
    found.append(_cell("profile", OURS, events, "profile", variant="profile", profile=True))
    yield from (replace(cell, is_once=True) for cell in found)


def _cell(kind: Kind, program: str, events: float, *groups: str, variant: str = "", **options: object) -> Cell:
    return Cell(kind=kind, program=program, events=int(events), groups=frozenset(groups), variant=variant,
                options=options)  # fmt: skip
