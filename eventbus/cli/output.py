"""What the program says, and how it ends.

stdout has the answer and nothing else (with `--json`: JSON); whatever is said about it goes to stderr. An error is one
line that names the thing and the remedy, and it decides the exit code: 0 done, 1 could not, 2 wrong usage, 3 found
problems, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from eventbus.errors import EventBusError, hide_password

if TYPE_CHECKING:
    from rich.console import Console

    from eventbus.envelope import Envelope

WIDE = 10_000  # columns: nothing is cut or wrapped that a script may read

DONE, COULD_NOT, WRONG_USAGE, FOUND_PROBLEMS, INTERRUPTED = 0, 1, 2, 3, 130

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


class WrongUsage(Exception):  # becomes exit code 2; not an EventBusError, for no other program can meet it
    """What was typed cannot be meant."""


# ── the answer ──────────────────────────────────────────────────────────────────────────────────────


def console() -> Console:
    """stdout for tables and colours; plain text where it is no terminal, with lines as long as they are."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else WIDE)


def say(line: str = "") -> None:
    """A line of the answer."""
    typer.echo(line)


def say_json(value: object) -> None:
    """The answer for scripts, as one line; people get it indented where it is a terminal."""
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2 if sys.stdout.isatty() else None))


def note(line: str) -> None:
    """Something about the answer."""
    typer.echo(line, err=True)


def printable(text: str) -> str:
    """*text* that others wrote, without what would move a terminal's cursor or change its colours."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def cloud_event(envelope: Envelope, *, with_data: bool) -> dict[str, object]:
    """*envelope* as CloudEvents' JSON format has it (section 3); without its data unless they are asked for."""
    known: Mapping[str, object] = {
        "specversion": "1.0",
        "id": envelope.id,
        "source": envelope.source,
        "type": envelope.type,
        "time": envelope.time.isoformat().replace("+00:00", "Z"),
        "subject": envelope.subject,
        "datacontenttype": envelope.datacontenttype,
        "dataschema": envelope.dataschema,
        **envelope.extensions,
    }
    shown = {name: value for name, value in known.items() if value is not None}
    return shown | (json_data(envelope.data, "data") if with_data else {})


def json_data(data: bytes, name: str) -> dict[str, object]:
    """*data* as a member: JSON as it is, text as a string, and anything else in base64 under `<name>_base64`."""
    from base64 import b64encode

    try:
        text = data.decode()
    except UnicodeDecodeError:
        return {f"{name}_base64": b64encode(data).decode()}
    try:
        return {name: json.loads(text)}
    except (ValueError, RecursionError):
        return {name: text}


def show_help_alone(context: typer.Context) -> None:
    """A group without a command shows what it has."""
    if context.invoked_subcommand is None:
        if text := context.get_help():  # rich prints it by itself
            say(text)
        raise typer.Exit(WRONG_USAGE)


# ── the end ─────────────────────────────────────────────────────────────────────────────────────────


def exit_code(command: Callable[[], object], *, debug: bool) -> int:
    """What *command* ends with. Its errors are said here, once, each on a line; *debug* adds the traceback."""
    try:
        result = command()
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:  # the reader has enough (`eventbus ... | head`), and knows
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at exit
        return COULD_NOT
    except Exception as error:  # noqa: BLE001  # the last line of a program: whatever it is, a person reads one line
        if debug:
            traceback.print_exc()
        for line in _lines(error, debug=debug):
            note(f"error: {line}")
        return _code(error)
    return result if isinstance(result, int) else DONE


def _code(error: BaseException) -> int:
    match error:
        case WrongUsage():
            return WRONG_USAGE
        case typer.TyperException():
            return error.exit_code
        case BaseExceptionGroup():
            return max(_code(inner) for inner in error.exceptions)
        case _:
            return COULD_NOT


def _lines(error: BaseException, *, debug: bool) -> Iterator[str]:
    match error:
        case EventBusError():  # hides passwords by itself
            yield from str(error).splitlines()
        case WrongUsage():
            yield hide_password(str(error))
        case typer.TyperException():
            yield f"{_sentence(error.format_message())}{_see_help(error)}"
        case BaseExceptionGroup():
            for inner in error.exceptions:
                yield from _lines(inner, debug=debug)
        case _:
            where = "" if debug else " (with --debug: where)"
            yield f"{type(error).__name__}: {hide_password(' '.join(str(error).split()))}{where}"


def _sentence(text: str) -> str:
    """*text* so that another sentence can follow."""
    return text if text.endswith((".", "?", "!")) else f"{text}."


def _see_help(error: typer.TyperException) -> str:
    path = getattr(getattr(error, "ctx", None), "command_path", None)
    return f" See: {path} --help" if path else ""
