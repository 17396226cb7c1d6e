"""`eventbus demo`: the example shop, where the checkout with it is."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Annotated, Literal

import typer

from eventbus.cli import output
from eventbus.errors import SetupError

SCENARIO = "services.demo"


def demo(
    url: Annotated[
        str | None, typer.Option("--url", metavar="URL", help="A broker for the shop; without it one of its own.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the shop up afterwards, until Ctrl-C.")] = False,
    sabotage: Annotated[
        Literal["lose", "twice"] | None, typer.Option(help="Break a promise, to see that it is noticed.")
    ] = None,
    as_json: output.Json = False,
) -> None:
    """Watch a small shop live on events: people register, orders are placed, mails fail and recover.

    Ends with a table; exit code 0 only if nothing was lost and nothing done twice. EVENTBUS_URL is left alone.
    """
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    if not _is_there():
        raise SetupError(
            f"there is no shop in {here}: the demo ({SCENARIO}) is part of the source checkout; "
            "run it in that folder (make demo)"
        )
    code: int = importlib.import_module(SCENARIO).main(url=url, keep=keep, sabotage=sabotage, as_json=as_json)
    raise typer.Exit(code)


def _is_there() -> bool:
    try:
        return importlib.util.find_spec(SCENARIO) is not None
    except ModuleNotFoundError:  # not even the package around it
        return False
