"""`eventbus` on the command line.

Only typer is imported here and at the top of the commands' modules: `eventbus --help` answers at once, and a command
loads what it needs when it runs.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from eventbus.cli import dead, demo, outbox, output, publish, relay, run, store, tail, topology, undeliverable, version

app = typer.Typer(
    name="eventbus",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(
    invoke_without_command=True,
    epilog="Settings: options, then EVENTBUS_* in the environment, then .env in the working directory. "
    "Exit codes: 0 done, 1 could not, 2 wrong usage, 3 found problems.",
)
def eventbus(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error. May stand anywhere.")] = False,
    show_version: Annotated[
        bool, typer.Option("--version", help="Say which eventbus this is. More of it: eventbus version.")
    ] = False,
) -> None:
    """Run event-driven services on RabbitMQ, and look after them."""
    if show_version:
        from importlib.metadata import version as installed

        output.say(f"eventbus {installed('eventbus')}")
        raise typer.Exit
    output.show_help_alone(context)


app.command("run", epilog="Example: eventbus run shop.payments:service shop.mails:service --log json")(run.run)
app.command("relay", epilog="Example: eventbus relay --database postgresql://orders@localhost/orders")(relay.relay)
app.command("demo", epilog="Example: eventbus demo --url amqp://guest:guest@localhost/")(demo.demo)
app.command("publish", epilog="""Example: eventbus publish order_placed '{"total": 12}' --schemas shop.schemas""")(
    publish.publish
)
app.command("tail", epilog="Example: eventbus tail order_placed --json --data | jq .data")(tail.tail)
app.add_typer(topology.app, name="topology")
app.add_typer(dead.app, name="dead")
app.add_typer(outbox.app, name="outbox")
app.add_typer(undeliverable.app, name="undeliverable")
app.add_typer(store.app, name="store")
app.command("version", epilog="Example: eventbus version --json")(version.version)


def main() -> None:
    """The console script."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    sys.exit(output.exit_code(lambda: app(arguments, prog_name="eventbus", standalone_mode=False), debug=debug))
