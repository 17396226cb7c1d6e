"""`eventbus outbox`: how far its relays are behind, and the rows that can never be published as they are."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from eventbus.cli import letters as shown
from eventbus.cli import output
from eventbus.cli.connection import Database, complete, database_url, read_settings
from eventbus.cli.output import WrongUsage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.ext.asyncio import AsyncEngine

    from eventbus.outbox.base import Lag
    from eventbus.outbox.sql import SetAside

T = TypeVar("T")
MOST_SHOWN = 1000

app = typer.Typer(help="What waits in an outbox, and what was set aside there: list, try again.")


@app.callback(invoke_without_command=True)
def outbox(context: typer.Context) -> None:
    output.show_help_alone(context)


@app.command("list", epilog="Example: eventbus outbox list --database postgresql://orders@localhost/orders --json")
def list_(database: Database = None, as_json: output.Json = False) -> None:
    """List the rows that were set aside, each with its error, and say how many wait."""
    lag, rows = complete(_on(database, _look))
    if as_json:
        rows_json = [{"id": r.id, "event_id": r.event_id, "type": r.type, "error": r.error} for r in rows]
        oldest_s = lag.oldest.total_seconds()
        output.say_json({"waiting": lag.rows, "oldest_s": oldest_s, "set_aside": lag.set_aside, "rows": rows_json})
        return
    waits = f", the oldest for {lag.oldest.total_seconds():.0f} s" if lag.rows else ""
    output.say(f"{lag.rows} rows wait{waits}; {lag.set_aside} were set aside")
    if rows:
        shown.print_table(("id", "event id", "type", "error"), ((str(r.id), r.event_id, r.type, r.error) for r in rows))


@app.command("retry", epilog="Example: eventbus outbox retry 17 18")
def retry(
    ids: Annotated[list[int] | None, typer.Argument(metavar="ID", help="Which, as the list prints them.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    database: Database = None,
) -> None:
    """Let the relays try rows again that were set aside, once what was wrong with them is mended."""
    if bool(ids) == everything:
        raise WrongUsage("say which rows: IDs as `eventbus outbox list` prints them, or --all")

    async def mend(engine: AsyncEngine) -> int:
        from eventbus.outbox.sql import try_again

        return await try_again(engine, None if everything else ids)

    output.say(f"{complete(_on(database, mend))} rows are tried again")


async def _look(engine: AsyncEngine) -> tuple[Lag, Sequence[SetAside]]:
    from eventbus.outbox.sql import Rows, set_aside

    return await Rows(engine, "", longest_bytes=0).lag(), await set_aside(engine, limit=MOST_SHOWN)


async def _on(database: str | None, ask: Callable[[AsyncEngine], Awaitable[T]]) -> T:
    """What *ask* says of the outbox in *database*, whose tables are checked before."""
    from sqlalchemy.exc import SQLAlchemyError

    from eventbus.database import check, error_of, open_engine

    engine = open_engine(database_url(database, read_settings()))
    try:
        await check(engine)
        return await ask(engine)
    except (SQLAlchemyError, OSError, TimeoutError) as error:
        raise error_of(error, engine) from error
    finally:
        await engine.dispose()
