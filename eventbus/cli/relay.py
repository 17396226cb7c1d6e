"""`eventbus relay`: what was committed to an outbox is published, until SIGTERM or Ctrl-C."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from eventbus.cli import output
from eventbus.cli.connection import Database, Namespace, Place, Url, complete, database_url, find
from eventbus.cli.run import LogFormat, LogLevel, host_and_port

if TYPE_CHECKING:
    from datetime import timedelta


def relay(
    database: Database = None,
    url: Url = None,
    namespace: Namespace = None,
    keep: Annotated[
        float, typer.Option(metavar="HOURS", min=0, help="How long rows are kept once they are published.")
    ] = 24,
    health: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Answer /live and /ready over HTTP there, for example 127.0.0.1:8082"),
    ] = None,
    log: LogFormat = None,
    log_level: LogLevel = None,
) -> None:
    """Publish what is committed to the outbox of a database, until SIGTERM or Ctrl-C. Several may run at a time.

    The first signal reads nothing more and lets what is on its way be confirmed; a second one does not wait.
    """
    place = find(url, namespace)
    found = database_url(database, place.settings)
    address = None if health is None else host_and_port(health)

    from datetime import timedelta

    from eventbus.cli import logs
    from eventbus.telemetry import install_sdk

    logs.configure(log or place.settings.log, log_level or place.settings.log_level)
    install_sdk("eventbus-relay")
    complete(_serve(place, found, timedelta(hours=keep), address))


async def _serve(place: Place, database: str, keep: timedelta, address: tuple[str, int] | None) -> None:
    import asyncio
    import signal
    from contextlib import AsyncExitStack

    from eventbus import garbage, health
    from eventbus.database import open_engine, shown
    from eventbus.outbox import Relay

    engine = open_engine(database)
    relay = Relay(engine, url=place.url, namespace=place.names.namespace, keep=keep)
    loop, serving = asyncio.get_running_loop(), asyncio.current_task()
    assert serving is not None
    signals = 0

    def on_signal() -> None:
        nonlocal signals
        signals += 1
        output.say("stopping: waiting for what is on its way (again to hurry)" if signals == 1 else "stopping now")
        relay.stop()
        if signals > 1 or not relay.is_running:
            serving.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    try:
        async with AsyncExitStack() as around:
            around.push_async_callback(engine.dispose)
            watchdog = around.enter_context(health.Watchdog())
            if address is not None:
                told = health.told(relay.problems, relay.probes, watchdog, *address)
                output.say(f"health   {await around.enter_async_context(told)}/live and /ready")
            await around.enter_async_context(relay)
            garbage.never_in_what_was_loaded()
            output.say(f"outbox   {shown(engine)}, published rows are kept for {keep}")
            output.say(f"broker   {relay.broker}, namespace {place.names.namespace}")
            output.say("ready")
            await relay.wait()
    except asyncio.CancelledError:
        if not signals:
            raise
        serving.uncancel()
