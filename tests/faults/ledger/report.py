"""What a run is told as: `ledger.json` for programs, `LEDGER.md` for people."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.faults.ledger.cells import CELLS
from tests.faults.ledger.known import known_bugs
from tests.faults.ledger.processes import lane
from tests.faults.ledger.run import Result

IDENTITY = ("broker", "lane", "fault")
ON = "on"
COLUMNS = ("fault", "events", "published", "confirmed", "handled", "duplicates", "dead_lettered", "destroyed", "lost",
           "done_twice", "recovery_s")  # fmt: skip
LATENESS = ("broker", "what", "messages", "due_within_s", "earliest_s", "p50_s", "p99_s", "max_s", "early", "missing",
            "twice")  # fmt: skip
INTRODUCTION = """\
# The ledger

Real publishers and workers against real brokers, one thing broken at a time while events flow, and every event counted.
Written by `make ledger`; one cell again: `make ledger CELL=worker-killed BROKER=4.3 EVENTS=1000`; with events on the
client's way instead of the lane: `EVENTBUS_LANE=off make ledger`.

* **handled**: events whose effect is there for every service. **lost**: confirmed, and no effect, no dead letter, and
  not destroyed. **destroyed**: was in a queue that was deleted, or published while that was absent; anything else that
  is missing is lost.
* **duplicates**: how often an event came again after its effect was there; the idempotency store suppressed it, or the
  handler ran again since a crash had come before the record, and found its own row. **done twice**: handled again after
  it was recorded as done, or with two effects.
* **recovery**: seconds from the fault's end until each service has handled an event that came to its handler after it,
  and was published after it, too; where workers had been away or had ended, the first of those that waited. Within
  10 s, and where a dead connection is found out by a heartbeat of 4 s, within 14 s; 0 where everything had been handled
  by then.

Each cell asserts that something broke: processes died of SIGKILL, connections ended, publishes stood still.
"""
LATENESS_INTRODUCTION = """\

## The delay tree

Messages that wait for one moment: delayed events and retries that are all due **at once**, published before with the
delay that is left, and events whose delays are **mixed**. Written by `make lateness`.

* **due within**: seconds from the first to the last that is due. **earliest**: the least that a message came after the
  delay that was asked for; **early** are those for which that is negative.
* **p50**, **p99**, **max**: seconds from due, with the delay as the tree rounds it up, to the delivery to one consumer,
  which takes them one after the other. **twice**: delivered again, which dead-lettering at least once may do.
"""


def as_json(result: Result) -> dict[str, object]:
    """One cell, with the fields that programs rely on."""
    counted = result.counted
    return {
        "broker": result.broker,
        "fault": result.cell.name,
        "published": counted.published,
        "confirmed": counted.confirmed,
        "handled": len(counted.handled),
        "duplicates": counted.duplicates,
        "dead_lettered": len(counted.dead_lettered),
        "destroyed": len(counted.destroyed),
        "lost": len(counted.lost),
        "done_twice": len(counted.done_twice),
        "recovery_s": result.recovery_s,
        "events": result.events,
        "versions": result.versions,
        "started": result.started,
        "seed": result.seed,
        "lane": lane(),
    }


def write(result: Result, folder: Path) -> None:
    """Write both files into *folder* with *result* in them. The other cells keep the figures that they had."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "ledger.json"
    cells = {tuple(str(cell[name]) for name in IDENTITY): cell for cell in [*_known(file), as_json(result)]}
    order = {name: place for place, name in enumerate(CELLS)}

    def place(which: tuple[str, ...]) -> tuple[object, ...]:
        broker, lane_, fault = which
        return broker, lane_ != ON, order.get(fault, len(order))

    file.write_text(json.dumps([cells[which] for which in sorted(cells, key=place)], indent=1) + "\n")
    _tell(folder)


def write_lateness(rows: Iterable[dict[str, object]], folder: Path) -> None:
    """Write lateness.json and LEDGER.md into *folder* with *rows* in them. The other rows keep their figures."""
    file = folder / "lateness.json"
    kept = {(str(row["broker"]), int(str(row["messages"])), str(row["what"])): row for row in [*_known(file), *rows]}
    file.write_text(json.dumps([kept[which] for which in sorted(kept)], indent=1) + "\n")
    _tell(folder)


def faults_of(line: str, folder: Path) -> set[str]:
    """The cells of the broker *line*, and of the way that events take now, that are in *folder*'s ledger."""
    known = _known(folder / "ledger.json")
    return {str(cell["fault"]) for cell in known if (cell["broker"], cell["lane"]) == (line, lane())}


def _tell(folder: Path) -> None:
    (folder / "LEDGER.md").write_text(as_markdown(_known(folder / "ledger.json"), _known(folder / "lateness.json")))


def _known(file: Path) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = json.loads(file.read_text()) if file.exists() else []
    return rows


def as_markdown(cells: Sequence[dict[str, object]], lateness: Sequence[dict[str, object]] = ()) -> str:
    """One table per broker line, and one for the delay tree."""
    parts = [INTRODUCTION]
    for line, way in dict.fromkeys((str(cell["broker"]), str(cell["lane"])) for cell in cells):
        of_line = [cell for cell in cells if (cell["broker"], cell["lane"]) == (line, way)]
        parts += [f"\n## RabbitMQ {line}{'' if way == ON else f', EVENTBUS_LANE={way}'}\n", *_table(of_line)]
        parts.append(_origin(of_line))
    if lateness:
        parts += [LATENESS_INTRODUCTION, *_lateness_table(lateness), _origin(lateness)]
    if cells:
        parts += known_bugs(str(dict(cell["versions"])["rabbitmq"]) for cell in cells)  # type: ignore[call-overload]
    return "\n".join(parts) + "\n"


def _origin(runs: Sequence[dict[str, object]]) -> str:
    """What was under test, and when."""
    versions = sorted({", ".join(f"{k} {v}" for k, v in dict(run["versions"]).items()) for run in runs})  # type: ignore[call-overload]
    return f"\n{'; '.join(versions)}. Run {_span(str(run['started']) for run in runs)}."


def _lateness_table(rows: Iterable[dict[str, object]]) -> list[str]:
    head = "| " + " | ".join(name.removesuffix("_s").replace("_", " ") for name in LATENESS) + " |"
    body = ["| " + " | ".join(seconds(row[name]) for name in LATENESS) + " |" for row in rows]
    return [head, "|---|---" + "|---:" * (len(LATENESS) - 2) + "|", *body]


def seconds(value: object) -> str:
    """Delays are told by the millisecond."""
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def _table(cells: Iterable[dict[str, object]]) -> list[str]:
    head = "| " + " | ".join(name.replace("_", " ") for name in (*COLUMNS, "what breaks")) + " |"
    rows = [head, "|---" + "|---:" * (len(COLUMNS) - 1) + "|---|"]
    for cell in cells:
        says = CELLS[str(cell["fault"])].says if cell["fault"] in CELLS else ""
        rows.append("| " + " | ".join(_shown(cell[name]) for name in COLUMNS) + f" | {says} |")
    return rows


def _shown(value: object) -> str:
    return "" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)


def _span(moments: Iterable[str]) -> str:
    days = sorted({moment[:10] for moment in moments})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
