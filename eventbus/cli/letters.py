"""How messages that wait for a person are shown: dead letters, and what was undeliverable."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import typer

from eventbus.cli import output
from eventbus.cli.output import WrongUsage

if TYPE_CHECKING:
    from eventbus.envelope import Envelope


def event_of(envelope: Envelope | None) -> dict[str, object]:
    """Which event it is, without its data."""
    return {
        "event_id": envelope.id if envelope else None,
        "type": envelope.type if envelope else None,
        "source": envelope.source if envelope else None,
        "subject": envelope.subject if envelope else None,
    }


def as_json(headers: Iterable[tuple[str, object]], body: bytes) -> dict[str, object]:
    """Headers and data, for scripts."""
    plain = {name: value if isinstance(value, str | int | float) else repr(value) for name, value in headers}
    return {"headers": plain, **output.json_data(body, "body")}


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table whose last column may be wrapped."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in columns:
        table.add_column(name, no_wrap=name != columns[-1], justify="right" if name == "attempts" else "left")
    for row in rows:
        table.add_row(*(Text(output.printable(cell)) for cell in row))
    output.console().print(table)


def print_facts(facts: Mapping[str, object]) -> None:
    """A line for each fact that there is."""
    for name, value in facts.items():
        if value is not None:
            output.say(f"{name.replace('_', ' '):<13} {output.printable(str(value))}")


def print_content(headers: Iterable[tuple[str, object]], body: bytes) -> None:
    output.say("\nheaders")
    for name, value in headers:
        output.say(f"  {output.printable(f'{name}: {value}')}")
    output.say("\ndata")
    output.say(f"  {output.printable(body.decode(errors='backslashreplace'))}")


def must_be_able_to_ask(what: str, *, yes: bool, are_named: bool) -> None:
    """Raises:
    WrongUsage: many at once are meant, nobody said yes, and nobody is here to ask.
    """
    if not (yes or are_named or sys.stdin.isatty()):
        raise WrongUsage(f"many at once, and nobody here to ask: add --yes, or name the {what}")


def is_agreed(question: str, *, yes: bool) -> bool:
    return yes or not sys.stdin.isatty() or typer.confirm(question, err=True)
