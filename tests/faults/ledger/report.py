"""What a run is told as: `ledger.json` for programs, `LEDGER.md` for people."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.faults.ledger.cells import CELLS
from tests.faults.ledger.run import Result

COLUMNS = ("fault", "published", "confirmed", "handled", "duplicates", "dead_lettered", "destroyed", "lost",
           "done_twice", "recovery_s")  # fmt: skip
INTRODUCTION = """\
# The ledger

Real publishers and workers against real brokers, one thing broken at a time while events flow, and every event counted.
Written by `make ledger`; one cell again: `make ledger CELL=worker-killed BROKER=4.3 EVENTS=1000`.

* **handled**: events whose effect is there for every service. **lost**: confirmed, and no effect, no dead letter, and
  not destroyed. **destroyed**: was in a queue that was deleted, or published while that was absent; anything else that
  is missing is lost.
* **duplicates**: how often an event came again after its effect was there; the idempotency store suppressed it, or the
  handler ran again since a crash had come before the record, and found its own row. **done twice**: handled again after
  it was recorded as done, or with two effects.
* **recovery**: seconds from the fault's end to the first event that is handled.
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
    }


def write(result: Result, folder: Path) -> None:
    """Write both files into *folder* with *result* in them. The other cells keep the figures that they had."""
    file = folder / "ledger.json"
    known = json.loads(file.read_text()) if file.exists() else []
    cells = {(cell["broker"], cell["fault"]): cell for cell in [*known, as_json(result)]}
    order = {name: place for place, name in enumerate(CELLS)}
    ordered = sorted(cells.values(), key=lambda cell: (cell["broker"], order.get(cell["fault"], len(order))))
    file.write_text(json.dumps(ordered, indent=1) + "\n")
    (folder / "LEDGER.md").write_text(as_markdown(ordered))


def as_markdown(cells: Sequence[dict[str, object]]) -> str:
    """One table per broker line."""
    parts = [INTRODUCTION]
    for line in dict.fromkeys(str(cell["broker"]) for cell in cells):
        of_line = [cell for cell in cells if cell["broker"] == line]
        parts += [f"\n## RabbitMQ {line}\n", *_table(of_line)]
        versions = sorted({", ".join(f"{k} {v}" for k, v in dict(cell["versions"]).items()) for cell in of_line})  # type: ignore[call-overload]
        parts.append(f"\n{'; '.join(versions)}. Run {_span(str(cell['started']) for cell in of_line)}.")
    return "\n".join(parts) + "\n"


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
