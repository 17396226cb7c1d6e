"""What a run is told as: a table, results.json for programs, and the marked part of PERFORMANCE.md for people."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

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
    TARGETS,
    TRANSACTION,
    TRANSACTION_WITH_EVENT,
    UNITS,
    Figures,
    is_met,
    ratios_of,
)
from benchmarks.plan import CELERY, DRAMATIQ, NOTES, OURS, OUTBOXES, SHARES, STORES, Database, in_outbox, relayed

BEGIN, END = "<!-- figures: written by `make bench` -->", "<!-- the end of the figures -->"
ALONE = {PUBLISH_MANY: "publish_many", "embedded": "memory://", "import eventbus": "start",
         "from eventbus import *": "start", "eventbus --help": "start"}  # fmt: skip
FILES = 15  # of a profile
LATENCIES = ("latency p50", "latency p99", "latency p99.9")


@dataclass(slots=True)
class Run:
    """One run of `make bench`."""

    form: str  # whole, quick or part
    rounds: int
    events: int
    started: str
    machine: Mapping[str, object]
    versions: Mapping[str, str]
    notes: list[str] = field(default_factory=list)  # what is missing, and why
    took_s: float = 0.0
    figures: Figures = field(default_factory=Figures)
    profile: list[dict[str, object]] = field(default_factory=list)

    def to_json(self) -> dict[str, object]:
        """Everything, for programs."""
        return {
            "form": self.form,
            "rounds": self.rounds,
            "events": self.events,
            "started": self.started,
            "took_s": round(self.took_s),
            "machine": self.machine,
            "versions": self.versions,
            "notes": self.notes,
            "ratios": ratios_of(self.figures),
            "targets": {name: f"{'>=' if sense == '+' else '<='} {value}" for name, (sense, value) in TARGETS.items()},
            "figures": [
                {
                    "what": what,
                    "program": program,
                    "variant": variant or "default",
                    "unit": UNITS[what],
                    "median": _rounded(statistics.median(values)),
                    "rounds": [_rounded(value) for value in values],
                }
                for (what, program, variant), values in self.figures.rounds.items()
            ],
            "profile": self.profile,
        }


def _rounded(value: float) -> float:
    return round(value) if value >= 1000 else round(value, 3)


# ── tables ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table, for a terminal and for Markdown."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def _judged(name: str, value: float) -> tuple[str, str]:
    """What was to be reached, and whether it was."""
    if name not in TARGETS:
        return "", ""
    sense, target = TARGETS[name]
    return f"{'at least' if sense == '+' else 'at most'} {target:g}", "met" if is_met(name, value) else "missed"


def sheets(run: Run) -> Iterator[Sheet]:
    """All that was measured."""
    figures = run.figures
    ratios = ratios_of(figures)
    if ratios:
        yield Sheet(
            "Targets",
            ("ratio or seconds", "measured", "target", ""),
            [(name, f"{value:g}", *_judged(name, value)) for name, value in ratios.items()],
        )
    head = ("program", "publish, one by one", "publish, window of 1,000", "handle", "CPU to publish", "CPU to handle",
            "p50", "p99", "p99.9")  # fmt: skip
    rows = [row for program in SHARES if any((row := _program(figures, program))[1:])]
    if rows:
        yield Sheet("Clients: events/s, µs of the process's CPU per event, ms end to end at 500/s", head, rows)
    variants = list(dict.fromkeys((p, v) for what, p, v in figures.rounds if what == HANDLE))
    if variants:
        yield Sheet("Situations: events/s, and MB of the worker's memory at its most", (
            "program", "situation", "publish", "handle", "memory", "after 10,000"
        ), [_variant(figures, program, variant) for program, variant in variants])  # fmt: skip
    if any(what == RELAYED for what, *_ in figures.rounds):
        yield Sheet("The outbox: rows/s, ms from commit to handler, ms of a transaction", (
            "database", "one relay", "two relays", "p50", "p99", "without an event", "with one"
        ), [_outbox(figures, database) for database in OUTBOXES])  # fmt: skip
    alone = [(what, figures.median(what, OURS, variant)) for what, variant in ALONE.items()]
    if any(value is not None for _, value in alone):
        shown = [(what, f"{_shown(value)} {UNITS[what]}") for what, value in alone if value is not None]
        yield Sheet("Ours alone", ("what", "figure"), shown)


def _program(figures: Figures, program: str) -> tuple[str, ...]:
    window = figures.median(PUBLISH_WINDOW, program)
    if program in (CELERY, DRAMATIQ):
        one, window = window, None  # no window: each publish waits for its confirm
    else:
        one = figures.median(PUBLISH_ONE, program, "one by one")
    values = (
        one, window, figures.median(HANDLE, program), figures.median(CPU_PUBLISH, program),
        figures.median(CPU_HANDLE, program), *(figures.median(what, program, "latency") for what in LATENCIES),
    )  # fmt: skip
    return (program, *(_shown(value) for value in values))


def _variant(figures: Figures, program: str, variant: str) -> tuple[str, ...]:
    published = figures.median(PUBLISH_WINDOW, program, variant) or figures.median(PUBLISH_MANY, program, variant)
    values = (published, *(figures.median(what, program, variant) for what in (HANDLE, MEMORY, MEMORY_AT_10000)))
    return (program, variant or "420 B, all defaults", *(_shown(value) for value in values))


def _outbox(figures: Figures, database: Database) -> tuple[str, ...]:
    there = in_outbox(database)
    values = [figures.median(RELAYED, OURS, relayed(database, relays)) for relays in (1, 2)]
    values += [figures.median(what, OURS, there) for what in (*LATENCIES[:2], TRANSACTION, TRANSACTION_WITH_EVENT)]
    return (STORES[database], *(_shown(value) for value in values))


def _shown(value: float | None) -> str:
    if not value:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def show(run: Run, console: Console) -> None:
    """Print it."""
    for sheet in sheets(run):
        table = Table(*sheet.head, title=sheet.title, title_justify="left")
        for column in table.columns[1:]:
            column.justify = "right"
        for row in sheet.rows:
            table.add_row(*row)
        console.print(table)
    for note in _notes(run):
        console.print(f"- {note}", highlight=False, soft_wrap=True)


def _notes(run: Run) -> list[str]:
    measured = {program for _, program, _ in run.figures.rounds}
    return [*(f"{program}: {note}" for program, note in NOTES.items() if program in measured), *run.notes]


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_json(run: Run, folder: Path) -> Path:
    """results.json in *folder*."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    file.write_text(json.dumps(run.to_json(), indent=1, ensure_ascii=False) + "\n")
    return file


def write_markdown(run: Run, page: Path) -> None:
    """Replace the marked part of *page* by this run's figures."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{as_markdown(run)}\n{END}{after}")


def as_markdown(run: Run) -> str:
    """The figures, without prose around them."""
    parts = [
        (f"Run {run.started[:10]}: {run.rounds} rounds of about {run.events:,} events, {run.took_s / 60:.0f} minutes. "
        f"{run.machine['processor']}, {run.machine['cores']} cores, {run.machine['memory_gb']} GB, "
        f"{run.machine['system']}. {', '.join(f'{name} {value}' for name, value in run.versions.items())}."),
        "![Events a second and latency, by client](benchmarks/results.png)",
    ]  # fmt: skip
    for sheet in sheets(run):
        parts.append(f"### {sheet.title}")
        parts.append("\n".join(_markdown_rows(sheet)))
    parts += ["### Notes", "\n".join(f"* {note}" for note in _notes(run))]
    for part in run.profile:
        parts.append(f"### Where the time goes: {part['of']}")
        shares: Mapping[str, float] = part["files"]  # type: ignore[assignment]
        parts.append(", ".join(f"`{file}` {share:.1%}" for file, share in list(shares.items())[:FILES]) + ".")
        parts.append("\n".join(_profile_rows(part["rows"])))  # type: ignore[arg-type]
    return "\n\n".join(parts) + "\n"


def _markdown_rows(sheet: Sheet) -> Iterator[str]:
    yield "| " + " | ".join(sheet.head) + " |"
    yield "|---" + "|---:" * (len(sheet.head) - 1) + "|"
    for row in sheet.rows:
        yield "| " + " | ".join(row) + " |"


def _profile_rows(rows: Sequence[Mapping[str, object]]) -> Iterator[str]:
    yield "| own share | calls | function |"
    yield "|---:|---:|---|"
    for row in rows:
        yield f"| {float(str(row['share'])):.1%} | {row['calls']} | `{row['function']}` |"
