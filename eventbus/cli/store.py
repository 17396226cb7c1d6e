"""`eventbus store`: the tables of a database, made and checked; a Redis, looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from eventbus.cli import output
from eventbus.cli.connection import complete, read_settings
from eventbus.errors import SetupError, hide_password

if TYPE_CHECKING:
    from eventbus.idempotency import Keeper

app = typer.Typer(help="Where handled keys are kept: make its tables, check it.")

StoreUrl = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        help="postgresql://user:password@host/database, sqlite:///path or redis://host (EVENTBUS_IDEMPOTENCY)",
    ),
]


@app.callback(invoke_without_command=True)
def store(context: typer.Context) -> None:
    output.show_help_alone(context)


@app.command("create", epilog="Example: eventbus store create --url postgresql://orders:secret@localhost/orders")
def create(url: StoreUrl = None, as_json: output.Json = False) -> None:
    """Make the tables that a database lacks; those that are there stay as they are. Several may do it at once.

    For the idempotency store, and for the inbox and the outbox of a service. Redis needs none.
    """
    found = _find(url)
    needs_tables = not found.startswith(("redis://", "rediss://"))
    if needs_tables:
        complete(_create(found))
    shown = hide_password(found)
    if as_json:
        output.say_json({"url": shown, "needs_tables": needs_tables})
    else:
        output.say(f"{shown} has the tables" if needs_tables else f"{shown} needs no tables")


@app.command("check", epilog="Example: eventbus store check --url redis://localhost/0 --json")
def check(url: StoreUrl = None, as_json: output.Json = False) -> int:
    """See that a store is there and as it must be.

    Exit code 3 if it is not: tables are missing or of another version, a Redis may forget what it was given. 1 if
    nobody answered.
    """
    found = _find(url)
    problems = complete(_problems(_keeper(found)))
    shown = hide_password(found)
    if as_json:
        output.say_json({"url": shown, "problems": problems})
    else:
        for problem in problems:
            output.say(output.printable(problem))
        if not problems:
            output.say(f"{shown} is as it must be")
    return output.FOUND_PROBLEMS if problems else output.DONE


def _find(url: str | None) -> str:
    found = url or read_settings().idempotency
    if found.startswith("memory:"):
        raise SetupError(
            f"{found} lives inside one process, and this command is another one: give the --url of a database or of "
            "a Redis, or set EVENTBUS_IDEMPOTENCY"
        )
    return found


def _keeper(url: str) -> Keeper:
    from eventbus.idempotency import keeper_of

    return keeper_of(url)


async def _create(url: str) -> None:
    from eventbus.database import create, open_engine

    engine = open_engine(url)
    try:
        await create(engine)
    finally:
        await engine.dispose()


async def _problems(keeper: Keeper) -> list[str]:
    try:
        return [f"{keeper.where}: {remark}" for remark in await keeper.open()]
    except SetupError as error:
        return [str(error)]
    finally:
        await keeper.close()
